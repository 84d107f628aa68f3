"""What of a space can fit: a runtime, a budget, and a proposal that is a little too dear."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import chain
from operator import attrgetter

from foldsearch.bound import lower_bound
from foldsearch.errors import BudgetError, SpecError
from foldsearch.fates import fate_named
from foldsearch.plan.cost import GB, Budget, Cost, CostTable, Target, no_less, price
from foldsearch.plan.plan import FoldPlan, is_foldable
from foldsearch.plan.stored import widest_first
from foldsearch.proposal import Fold, Groups, Proposal, Removed, fold_plan
from foldsearch.runtimes import ALL_CAN, runtime_named
from foldsearch.runtimes.nearest import nearest_removed
from foldsearch.runtimes.needs import WORDS, Need
from foldsearch.spec.propose import RandomSuggest, propose
from foldsearch.spec.space import Space


def for_runtime(space: Space, table: CostTable, target: Target) -> Space:
    """The part of the space that the runtime can hold, and its ranks as whole numbers.

    Raises:
        SpecError: it can hold no plan of the space.
    """
    space, runtime = space.for_width(table.width), runtime_named(target.runtime)
    if table.family and runtime.families and table.family not in runtime.families:
        raise SpecError(
            f"the {runtime.name} runtime runs models of {', '.join(sorted(runtime.families))}; this one is of "
            f"{table.family}. Take another runtime."
        )
    cannot: frozenset[Need] = runtime.cannot
    if not table.is_uniform:  # a search shares over all blocks, and every child of its has an output norm
        cannot |= frozenset[Need]({"norm"})
    period = runtime.periods.get(table.family, 1)
    if period > 1:  # fewer would move blocks to positions that the runtime takes for those of another kind
        space = space.model_copy(update={"step": math.lcm(space.step, period)})
        cannot |= frozenset[Need]({"copied block"})
    num_blocks, most = len(table.blocks), math.floor(space.removal[1] * len(table.blocks) + 1e-9)
    if most > 0 and space.counts(num_blocks)[1] == 0 and not (space.attention[1] or space.groups.max_groups):
        raise SpecError(
            f"the space '{space.name}' removes blocks {space.step} at a time, but the model has {num_blocks}, of which "
            "one stays. Lower its step."
        )
    if not cannot:
        return space
    held = held_part(space, cannot)
    if 0 < most < space.step:
        raise SpecError(
            f"in the {runtime.name} runtime blocks of a {table.family} model are removed {space.step} at a time, but "
            f"the space '{space.name}' removes {most} of {len(table.blocks)} at most. Let it remove more (removal), or "
            f"take the {ALL_CAN} runtime."
        )
    changes = most or held.attention[1] or held.groups.max_groups
    lacks = "" if held.fates and changes else f"the space '{space.name}' has none"
    if table.by_position and "moved block" in runtime.cannot:
        lacks = "this model scales attention by a block's position, so its blocks cannot move either"
    if lacks and not table.is_uniform and not runtime.cannot:
        raise SpecError(
            f"blocks of this model are of several kinds, or have experts, so a search shares no weights among them; "
            f"but {lacks}. Let the space remove blocks (removal) and drop or replace them (fates)."
        )
    if lacks:
        without = [what for need, (what, _) in WORDS.items() if need in cannot and need != "moved block"]
        raise SpecError(
            f"the {runtime.name} runtime runs {runtime.blocks}, so it can hold plans without {', '.join(without)} "
            f"only; but {lacks}. Let the space remove blocks (removal) and drop them (fates), or take the {ALL_CAN} "
            "runtime."
        )
    return held


def held_part(space: Space, cannot: AbstractSet[str]) -> Space:
    """The part of the space that can do without what cannot be done; its fates are empty where that is none.

    Every child of a group has an output norm: what cannot do that shares nothing.
    """
    held = {fate: table for fate in space.fates if (table := space.table(fate).held(cannot)) is not None}
    return space.with_tables(held).model_copy(
        update={
            "fates": tuple(held),
            "attention": (0.0, 0.0) if "half block" in cannot else space.attention,
            "groups": space.groups.model_copy(update={"max_groups": 0}) if "norm" in cannot else space.groups,
        }
    )


def can_run(plan: FoldPlan, table: CostTable, target: Target) -> bool:
    """Whether a lawful plan can be folded from the model of the table, and held by the runtime."""
    is_held = runtime_named(target.runtime).holds(plan, table)
    return is_held and is_foldable(plan, table.width) and table.can_fold(plan)


def held_removal(blocks: Iterable[int], table: CostTable, target: Target) -> tuple[int, ...]:
    """The blocks that a criterion chose to remove, or the nearest choice of as many that leaves a model to fold.

    Some block has to attend; and where the runtime has blocks of another kind at certain positions, these stay there.
    Where no choice of so many does, the blocks themselves.
    """
    gone, runtime = set(blocks), runtime_named(target.runtime)
    plan = FoldPlan.dropping(gone, len(table.blocks))
    if not (runtime.holds(plan, table) and table.can_fold(plan)):
        gone = set(nearest_removed(gone, runtime, table) or gone)
    return tuple(sorted(gone))


def held_order(order: Iterable[int], gone: Iterable[int], table: CostTable) -> tuple[int, ...]:
    """In which order blocks lose their attention, without the last that attends where not all do: that one keeps it."""
    order, out = tuple(order), set(gone)
    attending = [block for block in order if table.attends(block) and block not in out]
    if not attending or all(map(table.attends, range(len(table.blocks)))):
        return order
    return tuple(block for block in order if block != attending[-1])


def narrow(space: Space, table: CostTable, target: Target, budget: Budget) -> Space:
    """The part of the space that the runtime can hold, its counts cut to those at which some proposal can fit.

    Ranks are whole numbers in it.

    Raises:
        BudgetError: no proposal of the space can; the message says the smallest price and its plan.
        SpecError: the runtime can hold no plan of the space.
    """
    space = for_runtime(space, table, target)
    num_blocks = len(table.blocks)
    fitting = [
        count
        for count in space.every_count(num_blocks)
        if any(
            budget.admits(lower_bound(replace(proposal, types=types), table, target))
            for proposal in _extremes(space, num_blocks, count)
            for types in space.types  # the fewest bytes need not be the fastest
        )
    ]
    if not fitting:
        raise BudgetError(_unreachable(space, table, target, budget))
    return space.model_copy(update={"removal": (fitting[0] / num_blocks, fitting[-1] / num_blocks)})


def smallest(
    space: Space, table: CostTable, target: Target, term: Callable[[Cost], float | None] | None = None
) -> tuple[FoldPlan, Cost]:
    """The plan of the space that needs the least memory, or has the least of another term, and its price.

    Where all blocks cost the same, which of them it drops is only an example.
    """
    space = for_runtime(space, table, target)
    num_blocks = len(table.blocks)
    alone = [
        price(FoldPlan.dropping([block], num_blocks), table, target).memory_bytes
        for block in range(num_blocks)
    ]
    order = sorted(range(num_blocks - 1, -1, -1), key=lambda block: alone[block])
    plans = [
        fold_plan(
            gone,
            proposal.fold,
            num_blocks,
            bases=dict.fromkeys(gone, order[-1]),
            attention_order=held_order(range(num_blocks), gone, table),
        )
        for count in space.every_count(num_blocks)
        for gone in (held_removal(order[:count], table, target),)
        for proposal in _extremes(space, num_blocks, count)
    ]
    prices = [price(plan, table, target) for plan in plans]
    values = [price.memory_bytes if term is None else term(price) or 0.0 for price in prices]
    least = min(range(len(plans)), key=values.__getitem__)
    return plans[least], prices[least]


def repair(
    proposal: Proposal, space: Space, table: CostTable, target: Target, budget: Budget
) -> Proposal | None:
    """The proposal itself if its lower bound fits, else the nearest one that does; None if none does.

    The count and the criterion stay. Nearest: what stands nearest in the fate's own table first, for each of these
    more groups, then larger ones, then an earlier start, then smaller adapters; then the same in the other types that
    the space has, the widest first.
    """
    others = [types for types in widest_first(space.types) if types != proposal.types]
    nearest = chain.from_iterable(
        _nearest(replace(proposal, types=types), space, len(table.blocks))
        for types in (proposal.types, *others)
    )
    return next((other for other in nearest if budget.admits(lower_bound(other, table, target))), None)


def _nearest(proposal: Proposal, space: Space, num_blocks: int) -> Iterator[Proposal]:
    """The proposal and what may stand in for it, the nearest first."""
    fold, removed = proposal.fold, proposal.removed
    if not isinstance(fold, Fold):
        yield proposal
        return
    others: list[Removed | None] = [None]
    if removed is not None:
        fates = space.table(removed.fate.name).nearest(removed.fate)
        others = [replace(removed, fate=fate) for fate in fates]
    yield proposal
    for other in others:
        yield replace(proposal, fold=replace(fold, removed=other))
        if other is None or other.fate.has_groups:
            for groups in _nearest_groups(fold.groups, space, num_blocks - (removed.count if removed else 0)):
                yield replace(proposal, fold=replace(fold, removed=other, groups=groups))


def _nearest_groups(asked: Groups | None, space: Space, num_kept: int) -> Iterator[Groups]:
    groups = space.groups
    earliest = groups.first_start(num_kept)
    least = Groups(1, min(groups.group_sizes), earliest) if asked is None else asked
    ranks, starts = sorted(set(groups.adapter_ranks), reverse=True), [earliest]
    if asked is not None:
        ranks = sorted({asked.rank, *(rank for rank in ranks if rank < asked.rank)}, reverse=True)
        starts = list(dict.fromkeys((asked.start, min(earliest, asked.start))))
    for rank in ranks:
        for start in starts:
            for size in sorted(size for size in groups.group_sizes if size >= least.size):
                for count in range(least.count, groups.max_groups + 1):
                    yield Groups(count, size, start, rank)


def feasible_share(
    space: Space,
    table: CostTable,
    target: Target,
    budget: Budget,
    *,
    num_proposals: int = 100_000,
    seed: int = 0,
) -> float:
    """Share of random proposals whose lower bound fits as they are, before any repair.

    About 50 µs a proposal.
    """
    suggest = RandomSuggest(seed)
    space = for_runtime(space, table, target)
    fitting = sum(
        budget.admits(lower_bound(propose(suggest, space, len(table.blocks)), table, target))
        for _ in range(num_proposals)
    )
    return fitting / num_proposals


def size(space: Space, num_blocks: int) -> int:
    """Number of different proposals of the space, recovery settings and neighbour moves not counted."""
    criteria = sum(len(space.settings(criterion)) for criterion in space.criteria)
    fates = [(space.table(fate).size(), fate_named(fate).has_groups) for fate in space.fates]
    groups, total, types = space.groups, 0, len(space.types)
    for count in space.every_count(num_blocks):
        kept = num_blocks - count
        starts = groups.start_at(groups.start[1], kept) - groups.first_start(kept) + 1
        grouped = groups.max_groups * len(groups.group_sizes) * starts * len(groups.adapter_ranks)
        fewest_thin, most_thin = space.attention_counts(num_blocks, count)
        for thinned in range(fewest_thin, most_thin + 1):
            if count:
                total += criteria * sum(size * (1 + grouped * with_groups) for size, with_groups in fates)
            else:  # nothing is ranked
                total += bool(thinned) + grouped
    return total * types


def _extremes(space: Space, num_blocks: int, count: int) -> Iterator[Proposal]:
    """Proposals among which the cheapest of a count is: as little or as much of everything as the space allows."""
    _, thinned = space.attention_counts(num_blocks, count)
    groups = space.groups
    every: list[Groups | None] = [
        Groups(number, size, groups.first_start(num_blocks - count), min(groups.adapter_ranks))
        for size in groups.group_sizes
        for number in range(1, groups.max_groups + 1)
    ]
    removals: list[Removed | None] = [None]
    if count:
        criterion = space.criteria[0]  # they all choose as many
        setting = space.settings(criterion)[0]
        removals = [
            Removed(criterion, count, fate, setting)
            for name in space.fates
            for fate in space.table(name).cheapest()
        ]
    for removed in removals:
        if count or thinned or not groups.max_groups:
            yield Proposal(Fold(removed, None, thinned))
        if removed is None or removed.fate.has_groups:
            yield from (Proposal(Fold(removed, one, thinned)) for one in every)


def _unreachable(space: Space, table: CostTable, target: Target, budget: Budget) -> str:
    plan, cost = smallest(space, table, target)
    words, remedies = [], ["Raise the budget"]
    if budget.memory_bytes is not None or budget.flops is not None:
        remedies.append(f"shorten the context ({target.context} tokens)")
        if target.batch > 1:
            remedies.append(f"serve fewer sequences at once (batch, now {target.batch})")
    if budget.memory_bytes is not None:
        words.append(f"{budget.memory_bytes / GB:.6g} GB")
    if budget.flops is not None:
        words.append(f"{budget.flops:.6g} FLOPs per token")
    fastest = ""
    for bound, term, what in _times(table, target, budget):
        words.append(f"{bound:.6g} ms {what}")
        reached = [
            (term(found) or 0.0, str(of))
            for types in space.types
            for of, found in (smallest(space, table, target.storing(types), term),)
        ]
        ms, example = min(reached)
        fastest += f" Its fastest takes {no_less(ms, 4)} ms {what}, with a plan such as '{example}'."
    return (
        f"no plan of the space '{space.name}' keeps the budget of {' and '.join(words)}: its smallest reaches "
        f"{no_less(cost.memory_bytes / GB)} GB and {no_less(cost.flops)} FLOPs per token with a plan such as '{plan}'."
        f"{fastest} {', '.join(remedies)}, or let the space remove more (removal, now up to {space.removal[1]:g})."
    )


def _times(
    table: CostTable, target: Target, budget: Budget
) -> Iterator[tuple[float, Callable[[Cost], float | None], str]]:
    """The times that are bounded and were measured: the bound, the term of a price, and what it is of."""
    latency = table.latency_on(target)
    if latency is not None and budget.prompt_ms is not None:
        yield budget.prompt_ms, attrgetter("prompt_ms"), f"for a prompt of {latency.tokens:,} tokens"
    if latency is not None and budget.decode_ms is not None:
        yield budget.decode_ms, attrgetter("decode_ms"), "for a token"
