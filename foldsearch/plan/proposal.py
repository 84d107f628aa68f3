"""What a search proposes, before it is a plan.

A proposal says *how many* blocks to drop and by which criterion; *which* blocks is known only after the
criterion has looked at the model (gates are trained first). So a proposal has a lower bound of its price, from
counts alone, and becomes a plan when it meets the list of dropped blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

from foldsearch.errors import PlanError
from foldsearch.plan.cost import DTYPE_BYTES, Cost, CostTable, Target, price, replacement_cost
from foldsearch.plan.kinds import kind_named, kind_names
from foldsearch.plan.plan import FoldPlan, Replacement, Slot

Fate = Literal["drop", "share", "replace"]
AdapterStart = Literal["zero", "svd", "data"]
Origin = Literal["sampler", "baseline", "start", "neighbour", "hand"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """One trial as it is suggested.

    What a proposal does not use is set to its default when it is made (a group size without groups, the start of
    adapters where nothing carries one, the criterion where nothing is removed), so equal proposals ask for the same
    thing, and proposals that ask for the same thing are equal.

    criterion: what chooses the blocks, by its name in `foldsearch.criteria`; "given": `plan` says it all (neighbour
    moves, plans typed by hand); "none": no block is removed. num_removed: blocks to remove.
    gate_eps: of the gated training, where the criterion is "gate".
    fate: of the removed blocks: "drop": they are gone (FoldGPT); "share": each comes back as a child of a kept block
    (FlexiGPT); "replace": a network takes the place of every run of them (LLM-Streamline).
    replacement: kind of that network (see `foldsearch.plan.kinds`), where the fate is "replace".
    group_size, group_start, num_groups: grouped sharing (see `fold_plan`); group_size 1 or num_groups 0 is none.
    adapter_rank: of each child. adapter_start: how adapters and output norms start (see `foldsearch.model.children`);
    None exactly where nothing carries one. attention_removed: kept blocks that lose their attention only.
    learning_rate, delta_rank: of the recovery training. origin: who proposed it.

    Raises:
        PlanError: a number is out of its range, or plan, gate_eps and criterion do not agree.
    """

    criterion: str
    num_removed: int = 0
    gate_eps: float | None = None
    fate: Fate = "drop"
    replacement: str | None = None
    group_size: int = 1
    group_start: int = 0
    num_groups: int = 0
    adapter_rank: int = 0
    adapter_start: AdapterStart | None = "svd"
    attention_removed: int = 0
    learning_rate: float = 0.05
    delta_rank: int = 8
    plan: FoldPlan | None = None
    origin: Origin = "sampler"

    def __post_init__(self) -> None:
        if (self.criterion == "given") != (self.plan is not None):
            raise PlanError(
                f"a proposal holds a plan exactly when its criterion is 'given'; got criterion '{self.criterion}' "
                f"and plan {str(self.plan)!r}."
            )
        if self.criterion == "none" and self.num_removed:
            raise PlanError(
                f"a proposal names what ranks the blocks where it removes some, but its criterion is 'none' and "
                f"num_removed is {self.num_removed}. Name a criterion."
            )
        if (self.criterion == "gate") != (self.gate_eps is not None):
            raise PlanError(
                f"a proposal holds gate_eps exactly when its criterion is 'gate'; got criterion '{self.criterion}' "
                f"and gate_eps {self.gate_eps}."
            )
        if self.fate not in get_args(Fate):
            raise PlanError(f"a proposal's fate is one of {', '.join(get_args(Fate))}; got '{self.fate}'.")
        if (self.fate == "replace") != (self.replacement is not None):
            raise PlanError(
                f"a proposal holds a replacement exactly when its fate is 'replace'; got fate '{self.fate}' and "
                f"replacement {self.replacement}."
            )
        if self.fate == "share" and self.num_groups:
            raise PlanError(
                f"removed blocks come back as children of blocks that run their own weights, so a proposal of fate "
                f"'share' has no groups; got num_groups {self.num_groups}."
            )
        for name, value, low in (
            ("attention_removed", self.attention_removed, 0),
            ("num_removed", self.num_removed, 0),
            ("group_size", self.group_size, 1),
            ("group_start", self.group_start, 0),
            ("num_groups", self.num_groups, 0),
            ("adapter_rank", self.adapter_rank, 0),
            ("delta_rank", self.delta_rank, 0),
        ):
            if value < low:
                raise PlanError(f"a proposal's {name} is {low} or more, got {value}.")
        if not 0 < self.learning_rate < float("inf"):
            raise PlanError(f"a proposal's learning_rate is a positive number, got {self.learning_rate}.")
        self._forget_what_is_not_used()

    def _forget_what_is_not_used(self) -> None:
        unused: set[str] = set()
        if self.plan is not None:
            unused |= {"num_removed", "attention_removed", "num_groups"}
        if self.plan is not None or not self.num_removed:
            unused |= {"gate_eps", "fate", "replacement"}
        if "num_groups" in unused or not self.num_groups or self.group_size < 2:
            unused |= {"num_groups", "group_size", "group_start"}
        if "num_groups" in unused and ("fate" in unused or self.fate != "share"):
            unused.add("adapter_rank")
        for name in unused:
            object.__setattr__(self, name, self.__dataclass_fields__[name].default)
        if self.plan is None and not self.num_removed:
            object.__setattr__(self, "criterion", "none")
        rank, norm = self.adapter_rank, self.fate == "share" or self.num_groups > 0
        if self.plan is not None:
            slots = [slot for slot in self.plan.slots if isinstance(slot, Slot)]
            rank, norm = max((slot.rank for slot in slots), default=0), any(slot.norm for slot in slots)
        start = self.adapter_start or "svd"
        if not rank:  # without adapters, only "data" starts the output norms in a way of its own
            start = "data" if start == "data" else "zero"
        object.__setattr__(self, "adapter_start", start if rank or norm else None)

    @property
    def recovery(self) -> tuple[float, int]:
        """What the recovery training of its plan depends on: learning rate and delta rank."""
        return self.learning_rate, self.delta_rank

    def to_json(self) -> dict[str, Any]:
        """Plain dict; a plan as its text and number of blocks."""
        held = None if self.plan is None else {"plan": str(self.plan), "num_blocks": self.plan.num_blocks}
        return {**asdict(self), "plan": held}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Proposal:
        """Read what `to_json` made."""
        held = value["plan"]
        plan = None if held is None else FoldPlan.parse(held["plan"], held["num_blocks"])
        return cls(**{**value, "plan": plan})


# ---- a proposal becomes a plan


def fold_plan(
    dropped: Iterable[int],
    proposal: Proposal,
    num_blocks: int,
    *,
    bases: Mapping[int, int] | None = None,
    attention_order: Iterable[int] = (),
) -> FoldPlan:
    """Remove the blocks and do with them what the proposal says, share in groups over the others, thin attention.

    Fate "share" (FlexiGPT, arXiv 2501.14713, section 3): each removed block runs with the weights of its base block,
    an adapter of rank `adapter_rank` and an output norm. Fate "replace" (LLM-Streamline, arXiv 2403.19135, section 3):
    each run of removed blocks is one replacement; more than one run is ours.

    Grouped sharing (FoldGPT, arXiv 2407.00928, abstract): from the `group_start`-th retained block on, `num_groups`
    runs of `group_size` blocks; the first of a run is the owner, the others are its children, each with norms of
    its own and an adapter of rank `adapter_rank`. Ours: each child also has FlexiGPT's output norm, so that it
    starts near the identity, and a run that the end of the model cuts short keeps what is left of it.

    Args:
        dropped: blocks that the criterion removes; ignored where the proposal holds its plan.
        proposal: how to share what is retained.
        num_blocks: of the dense model.
        bases: the base block of each removed one, where the fate is "share".
        attention_order: blocks whose attention goes first, first; removed blocks and children are passed over.

    Raises:
        PlanError: every block is removed, no attention is left, or a block to remove does not exist.
    """
    if proposal.plan is not None:
        return proposal.plan
    removed = set(dropped)
    plan = FoldPlan.dropping(removed, num_blocks)
    _check_attention_left(proposal, plan.depth)
    slots = [slot for slot in plan.slots if isinstance(slot, Slot)]
    for first, last in _groups(len(slots), proposal):
        owner = slots[first].home
        for position in range(first + 1, last):
            slots[position] = Slot(slots[position].home, owner, owner, proposal.adapter_rank, norm=True)
    borrowed = {slot.attention for slot in slots if slot.attention != slot.home}
    left = proposal.attention_removed
    own = {slot.home: position for position, slot in enumerate(slots) if slot.attention == slot.home}
    if bases is not None:
        borrowed |= {bases[block] for block in removed}
    for block in attention_order:
        if left and block in own and block not in borrowed:
            slots[own[block]] = Slot(block, None, block)
            left -= 1
    added: list[Slot | Replacement] = []
    if proposal.fate == "share":
        assert bases is not None or not removed, "children need their base blocks"
        for block in removed:
            base = (bases or {})[block]
            added.append(Slot(block, base, base, proposal.adapter_rank, norm=True))
    elif proposal.replacement is not None:
        added += [Replacement(first, last, proposal.replacement) for first, last in stretches(removed)]
    every = [*slots, *added]
    every.sort(key=lambda slot: slot.home if isinstance(slot, Slot) else slot.first)
    return FoldPlan(tuple(every), num_blocks)


def _check_attention_left(proposal: Proposal, kept: int) -> None:
    if proposal.attention_removed >= kept:
        raise PlanError(
            f"a plan attends at one position at least, but {proposal.attention_removed} of the {kept} blocks that "
            "are kept lose their attention. Leave one its own."
        )


def removal(plan: FoldPlan, proposal: Proposal) -> tuple[tuple[int, ...], dict[int, int]]:
    """What `fold_plan` made the plan of a proposal from: the blocks that were removed, and the base block of each that
    came back as a child.
    """
    removed, bases = set(plan.dropped), {}
    for slot in plan.slots:
        if isinstance(slot, Replacement):
            removed |= set(range(slot.first, slot.last + 1))
        elif proposal.fate == "share" and slot.mlp is not None and slot.mlp != slot.home:
            bases[slot.home] = slot.mlp
    return tuple(sorted(removed | bases.keys())), bases


def stretches(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First and last block of every run of neighbours, in order."""
    first = last = None
    for block in sorted(blocks):
        if first is None or last is None:
            first = last = block
        elif block == last + 1:
            last = block
        else:
            yield first, last
            first = last = block
    if first is not None and last is not None:
        yield first, last


def _groups(num_retained: int, proposal: Proposal) -> Iterator[tuple[int, int]]:
    """First and past-the-last position of each group."""
    if proposal.group_size < 2:
        return
    for group in range(proposal.num_groups):
        first = proposal.group_start + group * proposal.group_size
        last = min(first + proposal.group_size, num_retained)
        if last - first < 2:
            return
        yield first, last


# ---- blocks to drop that nothing was asked about: what any criterion has to beat


def uniform_drop(count: int, num_blocks: int) -> tuple[int, ...]:
    """Blocks to drop at even distances, in order; the first and the last block stay while others are left.

    Of the two, the last one goes first.

    Raises:
        PlanError: `count` is not between 1 and the number of blocks less one.
    """
    _check_count(count, num_blocks)
    inner = num_blocks - 2
    if count > inner:
        return tuple(range(1, num_blocks))
    # The middles of `count` equal stretches of the inner blocks.
    return tuple(1 + (2 * i + 1) * inner // (2 * count) for i in range(count))


def random_drop(count: int, num_blocks: int, seed: int) -> tuple[int, ...]:
    """Blocks to drop, in order: every choice is as likely as any other.

    Raises:
        PlanError: `count` is not between 1 and the number of blocks less one.
    """
    _check_count(count, num_blocks)
    return tuple(sorted(random.Random(seed).sample(range(num_blocks), count)))


def _check_count(count: int, num_blocks: int) -> None:
    if not 1 <= count < num_blocks:
        raise PlanError(f"from 1 to {num_blocks - 1} of {num_blocks} blocks can be dropped, got {count}.")


# ---- price from counts alone


class _Sums(NamedTuple):
    """Sums over the k cheapest blocks, at index k (`most…`: over the k dearest attentions), and minima.

    Parameters, MACs, cached numbers.
    """

    weights: list[int]
    norms: list[int]
    decode_macs: list[int]
    prefill_macs: list[int]
    kv: list[int]
    most_attention: list[int]
    most_attention_decode: list[int]
    most_attention_prefill: list[int]
    most_kv: list[int]
    smallest_weights: int
    smallest_adapter: int
    smallest_norm: int


# A search prices against one table. Found by identity: hashing a table takes longer than pricing.
_latest: list[tuple[CostTable, int, _Sums]] = []


def _sums(table: CostTable, context: int) -> _Sums:
    for known, known_context, sums in _latest:
        if known is table and known_context == context:
            return sums
    sums = _sum(table, context)
    _latest[:] = [(table, context, sums), *_latest[:3]]
    return sums


def _sum(table: CostTable, context: int) -> _Sums:
    weights, norms, decode, prefill, kv, adapters, output_norms = [], [], [], [], [], [], []
    attentions, attention_decode, attention_prefill = [], [], []
    for block in table.blocks:
        units = (block.attention, block.mlp)
        seen = [min(context, unit.window) if unit.window else context for unit in units]
        weights.append(sum(unit.weights for unit in units))
        norms.append(sum(unit.norms for unit in units) + block.other)
        decode.append(sum(unit.macs + unit.context_macs * n for unit, n in zip(units, seen, strict=True)))
        prefill.append(sum(unit.macs + unit.context_macs * context for unit in units))
        kv.append(sum(unit.kv_width * n for unit, n in zip(units, seen, strict=True)))
        adapters.append(sum(unit.adapter_width for unit in units))
        output_norms.append(sum(unit.output_norm for unit in units))
        attention = block.attention
        attentions.append(attention.weights + attention.norms)
        attention_decode.append(attention.macs + attention.context_macs * seen[0])
        attention_prefill.append(attention.macs + attention.context_macs * context)

    return _Sums(
        weights=_cheapest(weights),
        norms=_cheapest(norms),
        decode_macs=_cheapest(decode),
        prefill_macs=_cheapest(prefill),
        kv=_cheapest(kv),
        most_attention=_cheapest(attentions, dearest=True),
        most_attention_decode=_cheapest(attention_decode, dearest=True),
        most_attention_prefill=_cheapest(attention_prefill, dearest=True),
        most_kv=_cheapest(kv, dearest=True),
        smallest_weights=min(weights),
        smallest_adapter=min(adapters),
        smallest_norm=min(output_norms),
    )


def _cheapest(values: list[int], *, dearest: bool = False) -> list[int]:
    return list(accumulate(sorted(values, reverse=dearest), initial=0))


def lower_bound(proposal: Proposal, table: CostTable, target: Target) -> Cost:
    """A price that no plan of the proposal can be below, term by term.

    Exact where all blocks cost the same, attention stays, and one run at most is replaced, not by `layer`.

    A proposal that holds its plan is priced exactly.

    Raises:
        PlanError: as many blocks are dropped as there are, or no kept block keeps its attention.
        BudgetError: the plan it holds is for another number of blocks.
    """
    if proposal.plan is not None:
        return price(proposal.plan, table, target)
    num_blocks = len(table.blocks)
    kept = num_blocks - proposal.num_removed
    if kept < 1:
        raise PlanError(
            f"a plan runs at least one block, but {proposal.num_removed} of {num_blocks} are dropped. Keep one."
        )
    _check_attention_left(proposal, kept)
    sums = _sums(table, target.context)
    grouped = sum(last - first - 1 for first, last in _groups(kept, proposal))
    back = (
        proposal.num_removed if proposal.fate == "share" else 0
    )  # removed blocks that come back as children
    children, retained = grouped + back, kept + back
    thinned = min(proposal.attention_removed, kept - grouped)
    weights = table.fixed_weights + sums.weights[kept - grouped] + sums.norms[retained]
    weights -= sums.most_attention[thinned]
    carried = children * sums.smallest_norm
    macs = table.fixed_macs
    if not target.shares_weights:
        weights += children * sums.smallest_weights
    else:
        carried += children * proposal.adapter_rank * sums.smallest_adapter
        macs += children * proposal.adapter_rank * sums.smallest_adapter
    if proposal.replacement is not None and proposal.num_removed:  # one run at least
        first = range(num_blocks) if kind_named(proposal.replacement).is_block else (0,)
        prices = [replacement_cost(Replacement(block, block, proposal.replacement), table) for block in first]
        carried += min(parameters for parameters, _ in prices)
        macs += min(found for _, found in prices)
    size = DTYPE_BYTES[target.dtype]
    activations = table.activation_fixed + table.activation_width * min(target.prefill_chunk, target.context)
    return Cost(
        weight_bytes=weights * size,
        adapter_bytes=carried * size,
        kv_bytes=max(0, sums.kv[retained] - sums.most_kv[thinned]) * target.batch * size,
        activation_bytes=(activations + table.vocabulary) * target.batch * size,
        prefill_macs=macs
        + sums.prefill_macs[retained]
        - sums.most_attention_prefill[thinned]
        + table.head_macs / target.context,
        decode_macs=macs + sums.decode_macs[retained] - sums.most_attention_decode[thinned] + table.head_macs,
    )


# ---- neighbours

_TRIES = 50  # random draws before all one-slot moves are listed


def neighbour(plan: FoldPlan, rng: random.Random) -> FoldPlan | None:
    """A lawful plan that differs from `plan` in one or two slots; None where there is none (a model of one block).

    Mostly the count stays: a block, or one unit of a block, goes and another comes back. Else one slot changes: a
    block goes or comes back, loses or regains a unit, shares with another owner or with none, its adapter doubles
    or halves, a replacement changes its kind.

    Takes some milliseconds. Source: swaps after EvoPress (2410.14649), the other moves ours.
    """
    for _ in range(_TRIES):
        draw = rng.random()
        if draw < 0.5:
            moved = _swap(plan, rng, _without_block, _with_block)
        elif draw < 0.6:
            moved = _swap(plan, rng, _without_attention, _with_attention)
        elif draw < 0.7:
            moved = _swap(plan, rng, _without_mlp, _with_mlp)
        else:
            options = list(rng.choice(_MOVES)(plan))
            moved = rng.choice(options) if options else plan
        if moved != plan:
            return moved
    every = [moved for move in _MOVES for moved in move(plan) if moved != plan]
    return rng.choice(every) if every else None


_Move = Callable[[FoldPlan], Iterator[FoldPlan]]


def _swap(plan: FoldPlan, rng: random.Random, take: _Move, give: _Move) -> FoldPlan:
    """Give something back, then take something (what has nothing to give back cannot swap)."""
    if (given := list(give(plan))) and (taken := list(take(rng.choice(given)))):
        return rng.choice(taken)
    return plan


def _put(plan: FoldPlan, first: int, past: int, *slots: Slot | Replacement) -> Iterator[FoldPlan]:
    """The plan with `slots` in place of its positions first..past-1, where that is lawful."""
    try:
        yield FoldPlan((*plan.slots[:first], *slots, *plan.slots[past:]), plan.num_blocks)
    except PlanError:
        return


def _first_runs(plan: FoldPlan) -> Iterator[tuple[int, Slot]]:
    seen: set[int] = set()
    for position, slot in enumerate(plan.slots):
        if isinstance(slot, Slot) and slot.home not in seen:
            seen.add(slot.home)
            yield position, slot


def _place(plan: FoldPlan, block: int) -> int:
    """The position at which a dropped block comes back."""
    ends = [(position, slot.home) for position, slot in _first_runs(plan)]
    ends += [
        (position, slot.last) for position, slot in enumerate(plan.slots) if isinstance(slot, Replacement)
    ]
    return max((position + 1 for position, last in ends if last < block), default=0)


def _without_block(plan: FoldPlan) -> Iterator[FoldPlan]:
    for position, slot in enumerate(plan.slots):
        if isinstance(slot, Slot):
            yield from _put(plan, position, position + 1)


def _with_block(plan: FoldPlan) -> Iterator[FoldPlan]:
    for block in plan.dropped:
        position = _place(plan, block)
        yield from _put(plan, position, position, Slot(block, block, block))


def _without_attention(plan: FoldPlan) -> Iterator[FoldPlan]:
    for position, slot in _first_runs(plan):
        if slot.attention is not None and slot.mlp is not None:
            yield from _put(plan, position, position + 1, _tidy(replace(slot, attention=None)))


def _without_mlp(plan: FoldPlan) -> Iterator[FoldPlan]:
    for position, slot in _first_runs(plan):
        if slot.attention is not None and slot.mlp is not None:
            yield from _put(plan, position, position + 1, _tidy(replace(slot, mlp=None)))


def _with_attention(plan: FoldPlan) -> Iterator[FoldPlan]:
    for position, slot in _first_runs(plan):
        if slot.attention is None:
            yield from _put(plan, position, position + 1, replace(slot, attention=slot.mlp))
    for block in plan.dropped:
        position = _place(plan, block)
        yield from _put(plan, position, position, Slot(block, block, None))


def _with_mlp(plan: FoldPlan) -> Iterator[FoldPlan]:
    for position, slot in _first_runs(plan):
        if slot.mlp is None:
            yield from _put(plan, position, position + 1, replace(slot, mlp=slot.attention))
    for block in plan.dropped:
        position = _place(plan, block)
        yield from _put(plan, position, position, Slot(block, None, block))


def _with_other_owner(plan: FoldPlan) -> Iterator[FoldPlan]:
    """A block shares with the nearest owner on either side; a child carries what other children carry."""
    rank = max((slot.rank for slot in plan.slots if isinstance(slot, Slot)), default=0)
    owners = plan.owners("attention") & plan.owners("mlp")
    for position, slot in _first_runs(plan):
        others = owners - {slot.home, slot.attention, slot.mlp}
        nearest = (
            max((owner for owner in others if owner < slot.home), default=None),
            min((owner for owner in others if owner > slot.home), default=None),
        )
        for owner in nearest:
            if owner is not None:
                child = Slot(slot.home, owner, owner, slot.rank or rank, norm=True)
                yield from _put(plan, position, position + 1, child)


def _with_own_weights(plan: FoldPlan) -> Iterator[FoldPlan]:
    for position, slot in _first_runs(plan):
        if _borrows(slot):
            yield from _put(plan, position, position + 1, Slot(slot.home, slot.home, slot.home))


def _with_other_rank(plan: FoldPlan) -> Iterator[FoldPlan]:
    first = dict(_first_runs(plan))
    for position, slot in enumerate(plan.slots):
        if isinstance(slot, Slot) and (position not in first or _borrows(slot)):
            for rank in (2 * slot.rank, slot.rank // 2) if slot.rank else (1,):
                yield from _put(plan, position, position + 1, replace(slot, rank=rank))


def _with_other_kind(plan: FoldPlan) -> Iterator[FoldPlan]:
    for position, slot in enumerate(plan.slots):
        if isinstance(slot, Replacement):
            for kind in kind_names():
                yield from _put(plan, position, position + 1, Replacement(slot.first, slot.last, kind))


def _borrows(slot: Slot) -> bool:
    return not {slot.attention, slot.mlp} <= {slot.home, None}


def _tidy(slot: Slot) -> Slot:
    """Without adapter and output norm where nothing is borrowed any more."""
    return slot if _borrows(slot) else replace(slot, rank=0, norm=False)


_MOVES: tuple[_Move, ...] = (
    _without_block,
    _with_block,
    _without_attention,
    _without_mlp,
    _with_attention,
    _with_mlp,
    _with_other_owner,
    _with_own_weights,
    _with_other_rank,
    _with_other_kind,
)
