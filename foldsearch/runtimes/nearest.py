"""The plan nearest to one that a runtime cannot hold, of those that it can.

It takes no more memory than the plan does. What the runtime cannot hold at a position becomes the whole block, with its
own weights, as far as there is room: first the blocks of which the plan has most of their own weights, of equal ones
the earlier. Where a runtime stores what is shared again, a child takes as many bytes as its block, and becomes it too.
What has no room is left out, and so is what has no block to become: networks in place of blocks, and repeats. Where a
runtime takes the block of a position for one of a certain kind, as many positions of the plan as can stay do, its first
and its last before all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from foldsearch.errors import PlanError
from foldsearch.plan.cost import Cost, CostTable, Target, UnitCost, price
from foldsearch.plan.plan import FoldPlan, Replacement, Slot, word_of
from foldsearch.runtimes import Runtime

_MayRun = Callable[[int, int], bool]  # a block, at a position


@dataclass(frozen=True, slots=True)
class Nearest:
    """A plan that a runtime holds, and what it is in place of, in the words of plans.

    whole: positions that became whole blocks; children: those of them that borrowed. left_out: positions that are gone.
    added: blocks that the other plan did not run.
    """

    plan: FoldPlan
    whole: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What is other in it, and what is lost."""
        found = []
        if self.whole:
            found.append(f"whole blocks with weights of their own in place of {' '.join(self.whole)}")
        if self.added:
            found.append(f"{' '.join(self.added)} added")
        if self.left_out:
            found.append(f"without {' '.join(self.left_out)}")
        words = ", ".join(found)
        return f"{words} (a child saves no bytes there)" if self.children else words


def nearest_held(plan: FoldPlan, runtime: Runtime, table: CostTable, target: Target) -> Nearest | None:
    """The nearest plan that a runtime holds, of a plan that it does not hold.

    Args:
        plan: of a model of the table.
        runtime: that is to hold it.
        table: of the model's costs.
        target: that the plan is priced on; the nearest one may take as much memory, stored as the runtime stores it.

    Returns:
        None where the runtime has no such models, or holds nothing that is as small.
    """
    if table.family and runtime.families and table.family not in runtime.families:
        return None
    room = price(plan, table, target).memory_bytes

    def fits(found: FoldPlan) -> bool:
        is_held = runtime.holds(found, table) and table.can_fold(found)
        return is_held and price_there(found, runtime, table, target).memory_bytes <= room

    def with_whole(homes: set[int]) -> FoldPlan | None:
        found = _with_whole(plan, runtime, homes)
        if found is None:
            return None
        is_placed = not runtime.misplaces(found, table.family, by_position=table.by_position)
        return next(filter(fits, [found] if is_placed else _in_place(found, runtime, table)), None)

    lacking = sorted(_lacking(plan, runtime), key=lambda slot: (-_own_weights(slot, table), slot.home))
    order = [slot.home for slot in lacking]
    # Blocks may differ: what one that attends to all takes holds several that see a window.
    by_cache = sorted(order, key=lambda home: _cached(table.blocks[home].attention, target))
    found = [
        one for one in (_most_whole(order, with_whole), _most_whole(by_cache, with_whole)) if one is not None
    ]
    return _told(plan, max(found, key=lambda one: one[0])[1]) if found else None


def _most_whole(
    order: Sequence[int], with_whole: Callable[[set[int]], FoldPlan | None]
) -> tuple[int, FoldPlan] | None:
    """The first blocks of an order that have room, and those behind them that still have: how many, and the plan."""
    for count in range(len(order), -1, -1):
        taken = set(order[:count])
        if (nearest := with_whole(taken)) is None:
            continue
        for home in order[count + 1 :]:
            if (more := with_whole(taken | {home})) is not None:
                taken, nearest = taken | {home}, more
        return len(taken), nearest
    return None


def _cached(unit: UnitCost, target: Target) -> int:
    return unit.kv_width * target.cached_tokens(unit.window, target.context)


def price_there(plan: FoldPlan, runtime: Runtime, table: CostTable, target: Target) -> Cost:
    """The price on a target if a runtime held the plan, in the units of the target."""
    return price(plan, table, replace(target, shares_weights=runtime.shares_weights))


def nearest_removed(gone: AbstractSet[int], runtime: Runtime, table: CostTable) -> tuple[int, ...] | None:
    """Blocks to drop instead of `gone`, as many and as many of the same, so that the rest can be folded and is held.

    Args:
        gone: blocks that a criterion chose.
        runtime: that is to hold the plan.
        table: of the model's costs.

    Returns:
        In order; None where no plan of so many blocks is held.
    """
    num_blocks = len(table.blocks)
    kept = [block for block in range(num_blocks) if block not in gone]
    for _, found in _placed(kept, gone, _may_run(runtime, table), table.attends):
        if len(found) == len(kept):
            return tuple(block for block in range(num_blocks) if block not in found)
    return None


# ---- what of a plan becomes what


def _is_lacking(slot: Slot, runtime: Runtime, *, repeat: bool = False) -> bool:
    """Whether the runtime cannot hold what a position runs, or not in fewer bytes than those of a block."""
    is_half = slot.attention is None or slot.mlp is None
    is_dear = not runtime.shares_weights and (repeat or _borrows(slot))
    return is_dear or ("half block" in runtime.cannot and is_half) or ("norm" in runtime.cannot and slot.norm)


def _borrows(slot: Slot) -> bool:
    """Whether a position runs weights of other blocks than its own."""
    return not {slot.attention, slot.mlp} <= {slot.home, None}


def _first_runs(plan: FoldPlan) -> list[Slot]:
    """The slots in which a block runs first: all but repeats."""
    first: dict[int, Slot] = {}
    for slot in plan.slots:
        if isinstance(slot, Slot):
            first.setdefault(slot.home, slot)
    return list(first.values())


def _lacking(plan: FoldPlan, runtime: Runtime) -> list[Slot]:
    return [slot for slot in _first_runs(plan) if _is_lacking(slot, runtime)]


def _own_weights(slot: Slot, table: CostTable) -> int:
    block = table.blocks[slot.home]
    return (slot.attention == slot.home) * block.attention.weights + (
        slot.mlp == slot.home
    ) * block.mlp.weights


def _with_whole(plan: FoldPlan, runtime: Runtime, whole: AbstractSet[int]) -> FoldPlan | None:
    """The plan with these blocks whole, and without all else that cannot be; None where that is no plan."""
    gone = {slot.home for slot in _lacking(plan, runtime)} - whole
    slots: list[Slot | Replacement] = []
    seen: set[int] = set()
    for slot in plan.slots:
        if isinstance(slot, Replacement):
            if slot.is_block or "network" not in runtime.cannot:
                slots.append(slot)
            continue
        is_repeat = slot.home in seen
        seen.add(slot.home)
        is_orphan = not gone.isdisjoint({slot.attention, slot.mlp})
        if slot.home in gone or (is_repeat and (is_orphan or _is_lacking(slot, runtime, repeat=True))):
            continue
        becomes = not is_repeat and (is_orphan or slot.home in whole)
        slots.append(_whole(slot.home) if becomes else slot)
    return _lawful(slots, plan.num_blocks)


def _whole(block: int) -> Slot:
    return Slot(block, block, block)


def _lawful(slots: Iterable[Slot | Replacement], num_blocks: int) -> FoldPlan | None:
    try:
        return FoldPlan(tuple(slots), num_blocks)
    except PlanError:  # nothing is left, or nothing that attends
        return None


# ---- where each position has its kind of block


def _may_run(runtime: Runtime, table: CostTable) -> _MayRun:
    return lambda block, position: runtime.takes(block, position, table.family, by_position=table.by_position)


def _in_place(plan: FoldPlan, runtime: Runtime, table: CostTable) -> Iterator[FoldPlan]:
    """Plans of as many positions or fewer, each of the kind that the runtime takes it for, the nearest first.

    Repeats are left out.
    """
    by_block = {slot.home if isinstance(slot, Slot) else slot.first: slot for slot in reversed(plan.slots)}
    for _, found in _placed(sorted(by_block), set(plan.dropped), _may_run(runtime, table), lambda _: True):
        slots: list[Slot | Replacement] = []
        for block in found:
            slot = by_block.get(block, _whole(block))
            is_orphan = isinstance(slot, Slot) and not {slot.attention, slot.mlp} <= {*found, None}
            slots.append(_whole(block) if is_orphan else slot)
        if len(found) <= len(by_block) and (lawful := _lawful(slots, plan.num_blocks)):
            yield lawful


def _placed(
    wanted: Sequence[int],
    others: AbstractSet[int],
    may_run: _MayRun,
    attends: Callable[[int], bool],
) -> list[tuple[int, tuple[int, ...]]]:
    """Of all the blocks, in order, the best for each number of them, the best of these first; each with its worth.

    Each block may run where it then stands, and one of them attends. Best is where most of the wanted ones are and
    fewest others; the first and the last of the wanted ones come before all.
    """
    worth = dict.fromkeys(others, -1) | dict.fromkeys(wanted, 1)
    worth |= dict.fromkeys((wanted[0], wanted[-1]), len(worth))
    # The best choice of the blocks so far: by how many it takes, and whether one of them attends.
    best: dict[tuple[int, bool], tuple[int, tuple[int, ...]]] = {(0, False): (0, ())}
    for block in sorted(worth):
        for (taken, attending), (value, blocks) in sorted(best.items(), reverse=True):
            key = (taken + 1, attending or attends(block))
            new = value + worth[block]
            if may_run(block, taken) and (key not in best or new > best[key][0]):
                best[key] = (new, (*blocks, block))
    return sorted((found for (_, attending), found in best.items() if attending), reverse=True)


# ---- in words


def _told(plan: FoldPlan, found: FoldPlan) -> Nearest:
    """What is other in a plan than in the one that it stands in for."""
    left = list(found.slots)
    became = {slot.home for slot in _first_runs(found)}
    before: set[int] = set()
    whole: list[str] = []
    children: list[str] = []
    left_out: list[str] = []
    for slot in plan.slots:
        is_repeat = isinstance(slot, Slot) and slot.home in before
        if isinstance(slot, Slot):
            before.add(slot.home)
        if slot in left:
            left.remove(slot)
        elif isinstance(slot, Slot) and not is_repeat and slot.home in became:
            whole.append(word_of(slot))
            if _borrows(slot):
                children.append(word_of(slot))
        else:
            left_out.append(word_of(slot, repeat=is_repeat))
    added = tuple(str(block) for block in sorted(became - before))
    return Nearest(found, tuple(whole), tuple(children), tuple(left_out), added)
