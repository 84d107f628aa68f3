"""Plans that differ little from a plan: what a search tries around its front."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from foldsearch.errors import PlanError
from foldsearch.plan.kinds import kind_names
from foldsearch.plan.plan import FoldPlan, Replacement, Slot

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
