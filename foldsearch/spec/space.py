"""What may be proposed: a space, as a person writes it, and how a suggestion becomes a proposal.

A space knows no model, no data and no hardware. `narrow` cuts it to what can fit a device, once a model is priced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from foldsearch.criteria import criterion_names
from foldsearch.errors import BudgetError, SpecError
from foldsearch.plan.cost import GB, Budget, Cost, CostTable, Target, price
from foldsearch.plan.kinds import kind_named, kind_names
from foldsearch.plan.plan import FoldPlan, is_foldable
from foldsearch.plan.proposal import Fate, Origin, Proposal, fold_plan, lower_bound
from foldsearch.runtimes import ALL_CAN, Runtime, runtime_named
from foldsearch.runtimes.needs import WORDS


def one_of(names: Callable[[], tuple[str, ...]]) -> AfterValidator:
    """A name must be one of a list's; another is told in the words that pydantic has for a `Literal`."""

    def check(name: str) -> str:
        if name not in names():
            *others, last = map(repr, names())
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticKnownError("literal_error", {"expected": expected})
        return name

    return AfterValidator(check)


def _not_empty(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise PydanticKnownError("too_short", {"field_type": "Tuple", "min_length": 1, "actual_length": 0})
    return names


# After each name is known: pydantic's own bound counts only those that are, and would tell of two faults.
Criteria = Annotated[tuple[Annotated[str, one_of(criterion_names)], ...], AfterValidator(_not_empty)]
Kinds = Annotated[tuple[Annotated[str, one_of(kind_names)], ...], AfterValidator(_not_empty)]
Share01 = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=0)]


def as_toml(value: Any) -> str:
    """A value as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _rank_or_share(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(
            f"a rank is a whole number, 0 or more, or a share of the model's width below 1; got {as_toml(value)}"
        )
    return value


RankOrShare = Annotated[int | float, BeforeValidator(_rank_or_share)]
Option = TypeVar("Option", bound=float | int | str)
DENSE_FITS_SHARE = 0.2  # of the blocks, which a baseline removes where the budget asks for none


class Suggest(Protocol):
    """Where suggestions come from: Optuna's trial behind a thin adapter, or plain random numbers."""

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high, both included."""

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from low to high, on a log scale if asked."""

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """One of the options."""


class TomlTable(BaseModel):
    """A table of a TOML file: frozen, strict types, finite numbers, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Groups(TomlTable):
    """Grouped sharing over the retained blocks (see `foldsearch.plan.proposal.fold_plan`).

    max_groups: 0 to this many groups. group_sizes: blocks in a group, its owner included.
    start: where the first group may begin, as a share of the retained blocks, from and to.
    adapter_ranks: of each child.
    """

    max_groups: Annotated[int, Field(ge=0)] = 0
    group_sizes: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (2,)
    start: tuple[Share01, Share01] = (0.0, 1.0)
    adapter_ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (0,)

    @field_validator("start")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range(value)


class Children(TomlTable):
    """Removed blocks that come back as children, where their fate is "share" (FlexiGPT).

    ranks: of their adapters; a whole number, or a share of the model's width (the paper's 256 is 0.0625 of its 4,096).
    starts: how adapters start (see `foldsearch.model.children`).
    """

    ranks: Annotated[tuple[RankOrShare, ...], Field(min_length=1)] = (0.0625,)
    starts: Annotated[tuple[Literal["zero", "svd", "data"], ...], Field(min_length=1)] = ("svd",)


class Replace(TomlTable):
    """Networks in place of runs of blocks, where their fate is "replace" (LLM-Streamline). kinds: of these networks."""

    kinds: Kinds = ("linear",)


class Recover(TomlTable):
    """Recovery training.

    learning_rate: from and to, on a log scale, in root mean squares of the weights (see
    `foldsearch.model.recover.step_units`). delta_ranks: of the recovery deltas.
    """

    learning_rate: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.02,
        0.1,
    )
    delta_ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (8,)

    @field_validator("learning_rate")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range(value)


class Space(TomlTable):
    """Everything that is sampled. Neighbours of the front may leave it: they keep the laws and the budget only.

    removal: share of the blocks that is removed, from and to. criteria: what ranks the blocks.
    fates: what becomes of removed blocks; the first is that of the baselines. attention: share of the blocks that lose
    their attention only, from and to.
    gate_eps: of the gated training. neighbour_share: probability that a trial is a neighbour of a plan on the front.
    """

    name: str = "unnamed"
    removal: tuple[Share01, Share01] = (0.0, 0.5)
    criteria: Criteria = ("gate", "block_influence", "window", "greedy")
    fates: Annotated[tuple[Fate, ...], Field(min_length=1)] = ("drop",)
    attention: tuple[Share01, Share01] = (0.0, 0.0)
    gate_eps: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.5,)
    neighbour_share: Share01 = 0.25
    groups: Groups = Groups()
    children: Children = Children()
    replace: Replace = Replace()
    recover: Recover = Recover()

    @field_validator("removal", "attention")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range(value)

    @model_validator(mode="after")
    def _each_once(self) -> Space:
        for name, options in (
            ("criteria", self.criteria),
            ("gate_eps", self.gate_eps),
            ("fates", self.fates),
        ):
            if len(set(options)) < len(options):
                raise ValueError(f"{name} names each option once; got {list(options)}")
        return self

    def counts(self, num_blocks: int) -> tuple[int, int]:
        """Fewest and most blocks to drop of `num_blocks`: removal rates as whole numbers, one block always stays.

        Where no whole number lies in the range, the nearest one above it does. Something is dropped or shared, so
        a space without sharing drops at least one block.
        """
        low, high = self.removal
        least = 0 if self.groups.max_groups or self.attention_counts(num_blocks)[1] else 1
        fewest = max(math.ceil(low * num_blocks - 1e-9), least)
        fewest = min(fewest, num_blocks - 1)
        return fewest, max(fewest, min(math.floor(high * num_blocks + 1e-9), num_blocks - 1))

    def attention_counts(self, num_blocks: int, num_removed: int = 0) -> tuple[int, int]:
        """Fewest and most of the blocks that lose their attention only; one of the kept blocks always has its own."""
        low, high = self.attention
        most = max(0, min(math.floor(high * num_blocks + 1e-9), num_blocks - num_removed - 1))
        return min(math.ceil(low * num_blocks - 1e-9), most), most

    def for_width(self, width: int) -> Space:
        """The space with ranks that are shares of the width as whole numbers, each once.

        Raises:
            SpecError: a rank is above the width.
        """
        ranks = [
            rank if isinstance(rank, int) else max(1, round(rank * width)) for rank in self.children.ranks
        ]
        for key, values in (("children.ranks", ranks), ("groups.adapter_ranks", self.groups.adapter_ranks)):
            if max(values) > width:
                raise SpecError(
                    f"an adapter's rank is at most the model's width, {width}, but {key} of the space '{self.name}' "
                    f"has {max(values)}. Lower it: at that rank it would cost more than the block's own weights."
                )
        return self.model_copy(
            update={"children": self.children.model_copy(update={"ranks": tuple(dict.fromkeys(ranks))})}
        )


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"a range is written [from, to], the smaller number first; got {list(value)}")
    return value


# ---- proposing


def propose(suggest: Suggest, space: Space, num_blocks: int, *, origin: Origin = "sampler") -> Proposal:
    """One proposal of the space; conditional parameters are asked for only where they mean something.

    Args:
        suggest: answers by name; the names are the fields of `Proposal` (group_start as a share, 0 to 1).
        space: what may be proposed.
        num_blocks: of the dense model.
        origin: recorded in the proposal.
    """
    fewest, most = space.counts(num_blocks)
    num_removed = suggest.integer("num_removed", fewest, most)
    found: dict[str, Any] = _propose_removal(suggest, space) if num_removed else {"criterion": "none"}
    fewest_thin, most_thin = space.attention_counts(num_blocks, num_removed)
    if not num_removed and not space.groups.max_groups:  # something changes
        fewest_thin = max(fewest_thin, min(1, most_thin))
    attention_removed = suggest.integer("attention_removed", fewest_thin, most_thin) if most_thin else 0
    if found.get("fate") != "share":
        changed = num_removed or attention_removed
        found |= _propose_groups(suggest, space, num_blocks - num_removed, 0 if changed else 1)
    learning_rate, delta_rank = propose_recovery(suggest, space)
    return Proposal(
        num_removed=num_removed,
        attention_removed=attention_removed,
        learning_rate=learning_rate,
        delta_rank=delta_rank,
        origin=origin,
        **found,
    )


def _propose_removal(suggest: Suggest, space: Space) -> dict[str, Any]:
    """What ranks the blocks, and what becomes of those that are removed."""
    criterion = suggest.choice("criterion", space.criteria)
    found: dict[str, Any] = {"criterion": criterion}
    if criterion == "gate":
        found["gate_eps"] = suggest.choice("gate_eps", space.gate_eps)
    found["fate"] = suggest.choice("fate", space.fates) if len(space.fates) > 1 else space.fates[0]
    if found["fate"] == "share":
        found["adapter_rank"] = int(suggest.choice("child_rank", space.children.ranks))
        found["adapter_start"] = suggest.choice("adapter_start", space.children.starts)
    elif found["fate"] == "replace":
        found["replacement"] = suggest.choice("replacement", space.replace.kinds)
    return found


def _propose_groups(suggest: Suggest, space: Space, num_retained: int, fewest: int) -> dict[str, Any]:
    """Grouped sharing over the retained blocks."""
    most = space.groups.max_groups
    num_groups = suggest.integer("num_groups", min(fewest, most), most)
    if not num_groups:
        return {}
    group_size = suggest.choice("group_size", space.groups.group_sizes)
    start = suggest.number("group_start", *space.groups.start)
    return {
        "num_groups": num_groups,
        "group_size": group_size,
        "group_start": max(0, min(int(start * num_retained), num_retained - 2)),
        "adapter_rank": suggest.choice("adapter_rank", space.groups.adapter_ranks),
    }


def baseline(space: Space, criterion: str, count: int, num_blocks: int) -> Proposal:
    """A criterion at a count with the space's first fate in its simplest form, and as little else as the space allows.

    Args:
        space: what may be proposed; `for_width` has been at its ranks.
        criterion: one of the space's.
        count: blocks to remove, 1 or more.
        num_blocks: of the dense model.
    """
    fate = space.fates[0]
    low, high = space.recover.learning_rate
    return Proposal(
        criterion,
        num_removed=count,
        gate_eps=space.gate_eps[len(space.gate_eps) // 2] if criterion == "gate" else None,
        fate=fate,
        replacement=space.replace.kinds[0] if fate == "replace" else None,
        adapter_rank=int(space.children.ranks[0]) if fate == "share" else 0,
        adapter_start=space.children.starts[0],
        attention_removed=space.attention_counts(num_blocks, count)[0],
        learning_rate=min(max(math.sqrt(low * high), low), high),
        delta_rank=space.recover.delta_ranks[len(space.recover.delta_ranks) // 2],
        origin="baseline",
    )


def is_baseline(proposal: Proposal, space: Space, num_blocks: int) -> bool:
    """Whether a proposal asks for what a baseline of the space does, however its gates and recovery are set."""
    if proposal.criterion not in space.criteria:
        return False
    same = baseline(space, proposal.criterion, proposal.num_removed, num_blocks)
    mine = replace(proposal, learning_rate=same.learning_rate, delta_rank=same.delta_rank, origin=same.origin)
    return replace(mine, gate_eps=same.gate_eps) == same


def baseline_fits(space: Space, count: int, table: CostTable, target: Target, budget: Budget) -> bool:
    """Whether a baseline that removes so many blocks keeps the budget, as far as counts tell."""
    plain = baseline(space, "window", count, len(table.blocks))
    return budget.admits(lower_bound(plain, table, target))


def baseline_count(space: Space, table: CostTable, target: Target, budget: Budget) -> int | None:
    """Blocks that a baseline removes; None where removing alone cannot keep the budget."""
    num_blocks = len(table.blocks)
    fewest, most = space.counts(num_blocks)
    if budget.admits(price(FoldPlan.identity(num_blocks), table, target)):
        fewest = min(most, max(fewest, round(DENSE_FITS_SHARE * num_blocks)))
    counts = range(max(1, fewest), most + 1)
    return next((count for count in counts if baseline_fits(space, count, table, target, budget)), None)


def first_trials(
    space: Space, table: CostTable, target: Target, budget: Budget
) -> list[tuple[str, int, Origin]]:
    """Criterion, blocks to remove and origin of what every run begins with, however few trials are asked for.

    Args:
        space: narrowed to the budget.
    """
    count = baseline_count(space, table, target, budget)
    if count is None:
        return []
    found: list[tuple[str, int, Origin]] = [(name, count, "baseline") for name in space.criteria]
    _, most = space.counts(len(table.blocks))
    if most > count and budget.admits(price(FoldPlan.identity(len(table.blocks)), table, target)):
        found.append((space.criteria[0], most, "start"))
    return found


def propose_recovery(suggest: Suggest, space: Space) -> tuple[float, int]:
    """Learning rate and delta rank alone: all that is left to ask for a plan that is given."""
    learning_rate = suggest.number("learning_rate", *space.recover.learning_rate, log=True)
    return learning_rate, suggest.choice("delta_rank", space.recover.delta_ranks)


# ---- what can fit


def for_runtime(space: Space, table: CostTable, target: Target) -> Space:
    """The part of the space that the runtime can hold, and its ranks as whole numbers.

    Raises:
        SpecError: it can hold no plan of the space.
    """
    space, runtime = space.for_width(table.width), runtime_named(target.runtime)
    if not runtime.cannot:
        return space
    held = held_part(space, runtime)
    changes = (
        math.floor(space.removal[1] * len(table.blocks) + 1e-9) or held.attention[1] or held.groups.max_groups
    )
    lacks = "" if held.fates and changes else f"the space '{space.name}' has none"
    if table.by_position and "moved block" in runtime.cannot:
        lacks = "this model scales attention by a block's position, so its blocks cannot move either"
    if lacks:
        without = [
            what for need, (what, _) in WORDS.items() if need in runtime.cannot and need != "moved block"
        ]
        raise SpecError(
            f"the {runtime.name} runtime runs {runtime.blocks}, so it can hold plans without {', '.join(without)} "
            f"only; but {lacks}. Let the space remove blocks (removal) and drop them (fates), or take the {ALL_CAN} "
            "runtime."
        )
    return held


def held_part(space: Space, runtime: Runtime) -> Space:
    """The part of the space that the runtime can hold; its fates are empty where that is none.

    Every child of a space has an output norm: what cannot do that shares nothing.
    """
    cannot = runtime.cannot
    kinds = tuple(
        kind for kind in space.replace.kinds if kind_named(kind).is_block or "network" not in cannot
    )
    lost = {*(() if kinds else ("replace",)), *(("share",) if "norm" in cannot else ())}
    return space.model_copy(
        update={
            "fates": tuple(fate for fate in space.fates if fate not in lost),
            "replace": space.replace.model_copy(update={"kinds": kinds or space.replace.kinds}),
            "attention": (0.0, 0.0) if "half block" in cannot else space.attention,
            "groups": space.groups.model_copy(update={"max_groups": 0}) if "norm" in cannot else space.groups,
        }
    )


def can_run(plan: FoldPlan, table: CostTable, target: Target) -> bool:
    """Whether a lawful plan can be folded from the model of the table, and held by the runtime."""
    refusal = runtime_named(target.runtime).refusal(plan, by_position=table.by_position)
    return refusal is None and is_foldable(plan, table.width)


def narrow(space: Space, table: CostTable, target: Target, budget: Budget) -> Space:
    """The part of the space that the runtime can hold, its counts cut to those at which some proposal can fit.

    Ranks are whole numbers in it.

    Raises:
        BudgetError: no proposal of the space can; the message says the smallest price and its plan.
        SpecError: the runtime can hold no plan of the space.
    """
    space = for_runtime(space, table, target)
    num_blocks = len(table.blocks)
    fewest, most = space.counts(num_blocks)
    fitting = [
        count
        for count in range(fewest, most + 1)
        if any(
            budget.admits(lower_bound(proposal, table, target))
            for proposal in _extremes(space, num_blocks, count)
        )
    ]
    if not fitting:
        raise BudgetError(_unreachable(space, table, target, budget))
    return space.model_copy(update={"removal": (fitting[0] / num_blocks, fitting[-1] / num_blocks)})


def smallest(space: Space, table: CostTable, target: Target) -> tuple[FoldPlan, Cost]:
    """The plan of the space that needs the least memory, and its price.

    Where all blocks cost the same, which of them it drops is only an example.
    """
    space = for_runtime(space, table, target)
    num_blocks = len(table.blocks)
    fewest, most = space.counts(num_blocks)
    alone = [
        price(FoldPlan.dropping([block], num_blocks), table, target).memory_bytes
        for block in range(num_blocks)
    ]
    order = sorted(range(num_blocks - 1, -1, -1), key=lambda block: alone[block])
    plans = [
        fold_plan(
            order[:count],
            proposal,
            num_blocks,
            bases=dict.fromkeys(order[:count], order[-1]),
            attention_order=range(num_blocks),
        )
        for count in range(fewest, most + 1)
        for proposal in _extremes(space, num_blocks, count)
    ]
    prices = [price(plan, table, target) for plan in plans]
    least = min(range(len(plans)), key=lambda i: prices[i].memory_bytes)
    return plans[least], prices[least]


def repair(
    proposal: Proposal, space: Space, table: CostTable, target: Target, budget: Budget
) -> Proposal | None:
    """The proposal itself if its lower bound fits, else the nearest one that does; None if none does.

    The count and the criterion stay. Nearest: more groups first, then larger groups, then an earlier start, then
    smaller adapters; where removed blocks are shared or replaced, smaller adapters or another kind of network.
    """
    nearest = _nearest(proposal, space, len(table.blocks) - proposal.num_removed)
    return next((other for other in nearest if budget.admits(lower_bound(other, table, target))), None)


def _nearest(proposal: Proposal, space: Space, num_retained: int) -> Iterator[Proposal]:
    """The proposal and what may stand in for it, the nearest first."""
    yield proposal
    if proposal.plan is not None:
        return
    if proposal.fate == "share":
        smaller = (int(rank) for rank in space.children.ranks if rank < proposal.adapter_rank)
        yield from (replace(proposal, adapter_rank=rank) for rank in sorted(smaller, reverse=True))
        return
    kinds = space.replace.kinds if proposal.fate == "replace" else (None,)
    sizes = sorted(size for size in space.groups.group_sizes if size >= proposal.group_size)
    earliest = _start(space, num_retained)
    ranks, starts = sorted(set(space.groups.adapter_ranks), reverse=True), [earliest]
    if proposal.num_groups:
        ranks = sorted(
            {proposal.adapter_rank, *(r for r in ranks if r < proposal.adapter_rank)}, reverse=True
        )
        starts = list(dict.fromkeys((proposal.group_start, min(earliest, proposal.group_start))))
    for kind in dict.fromkeys((proposal.replacement, *kinds)):
        other = replace(proposal, replacement=kind)
        yield other
        for rank in ranks:
            for start in starts:
                for size in sizes:
                    for groups in range(max(1, proposal.num_groups), space.groups.max_groups + 1):
                        yield replace(
                            other, num_groups=groups, group_size=size, group_start=start, adapter_rank=rank
                        )


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
    fewest, most = space.counts(num_blocks)
    criteria = len(space.criteria) + ("gate" in space.criteria) * (len(space.gate_eps) - 1)
    adapted = set(space.children.starts)
    bare = {start == "data" for start in adapted}  # without adapters, "zero" and "svd" start alike
    children = sum(len(adapted) if rank else len(bare) for rank in space.children.ranks)
    grouping, total = space.groups, 0
    for count in range(fewest, most + 1):
        starts = _start(space, num_blocks - count, end=1) - _start(space, num_blocks - count) + 1
        grouped = grouping.max_groups * len(grouping.group_sizes) * starts * len(grouping.adapter_ranks)
        fewest_thin, most_thin = space.attention_counts(num_blocks, count)
        for thinned in range(fewest_thin, most_thin + 1):
            if count:
                total += ("drop" in space.fates) * criteria * (1 + grouped)
                total += ("replace" in space.fates) * criteria * len(space.replace.kinds) * (1 + grouped)
                total += ("share" in space.fates) * criteria * children
            else:  # nothing is ranked
                total += bool(thinned) + grouped
    return total


def _start(space: Space, num_retained: int, end: int = 0) -> int:
    return max(0, min(int(space.groups.start[end] * num_retained), num_retained - 2))


def _extremes(space: Space, num_blocks: int, count: int) -> Iterator[Proposal]:
    """Proposals among which the cheapest of a count is: as little or as much of everything as the space allows."""
    _, thinned = space.attention_counts(num_blocks, count)
    fates = space.fates if count else ("drop",)
    if "share" in fates:
        rank = int(min(space.children.ranks))
        yield Proposal(
            "window", num_removed=count, fate="share", adapter_rank=rank, attention_removed=thinned
        )
    rest = [Proposal("window", num_removed=count, attention_removed=thinned)] if "drop" in fates else []
    if "replace" in fates:
        rest += [
            Proposal("window", num_removed=count, fate="replace", replacement=kind, attention_removed=thinned)
            for kind in space.replace.kinds
        ]
    for proposal in rest:
        if count or thinned or not space.groups.max_groups:
            yield proposal
        for group_size in space.groups.group_sizes if space.groups.max_groups else ():
            for groups in range(1, space.groups.max_groups + 1):
                yield replace(
                    proposal,
                    group_size=group_size,
                    group_start=_start(space, num_blocks - count),
                    num_groups=groups,
                    adapter_rank=min(space.groups.adapter_ranks),
                )


def _unreachable(space: Space, table: CostTable, target: Target, budget: Budget) -> str:
    plan, cost = smallest(space, table, target)
    words = []
    load = f"shorten the context ({target.context} tokens)"
    if target.batch > 1:
        load += f", serve fewer sequences at once (batch, now {target.batch})"
    if budget.memory_bytes is not None:
        words.append(f"{budget.memory_bytes / GB:.6g} GB")
    if budget.flops is not None:
        words.append(f"{budget.flops:.4g} FLOPs per token")
    return (
        f"no plan of the space '{space.name}' keeps the budget of {' and '.join(words)}: its smallest reaches "
        f"{cost.memory_bytes / GB:.4f} GB and {cost.flops:.4g} FLOPs per token with a plan such as '{plan}'. "
        f"Raise the budget, {load}, or let the space remove more "
        f"(removal, now up to {space.removal[1]:g})."
    )


class RandomSuggest:
    """Independent random suggestions, for counting and for tests."""

    def __init__(self, seed: int) -> None:
        import random

        self._rng = random.Random(seed)

    def integer(self, name: str, low: int, high: int) -> int:
        """Uniform."""
        return low + int(self._rng.random() * (high - low + 1))

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Uniform, or uniform in its logarithm."""
        if log:
            return min(max(math.exp(self._rng.uniform(math.log(low), math.log(high))), low), high)
        return self._rng.uniform(low, high)

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """Uniform."""
        return options[int(self._rng.random() * len(options))]
