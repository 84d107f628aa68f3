"""Extension: blocks of a small model executed again, each repeat with an adapter and an output norm of its own.

FlexiGPT's second half (arXiv 2501.14713): more depth for hardly more stored bytes. What is not in the paper as we know
it, the two orders by these names and where a remainder goes, is ours.
"""

from __future__ import annotations

from typing import Literal, get_args

from foldsearch.errors import PlanError
from foldsearch.plan.plan import FoldPlan, Slot

Pattern = Literal["block", "sequential"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
DEFAULT_RANK = 1 / 16  # of a repeat's adapters, in widths of the model
MOST_POSITIONS = 10_000  # more than any model runs: a slip of the hand does not fill the memory


def extended(
    plan: FoldPlan,
    first: int,
    last: int,
    depth: int,
    pattern: Pattern = "block",
    rank: int = 0,
) -> FoldPlan:
    """A plan that executes `depth` positions: blocks first..last run again until it does.

    "block" repeats every block right after itself, 1 1 2 2 3 3; "sequential" the run as a whole after itself,
    1 2 3 1 2 3. Whole passes over the run come first; where positions are left over, the first blocks of the run get
    one more each: 1 1 2 2 3, and 1 2 3 1 2. So two blocks of the run never differ by more than one repeat.

    Args:
        plan: what is extended: `FoldPlan.identity` for the dense model. Every block of the run runs its own weights in
            it, and nothing is repeated.
        first, last: the run, both ends in it.
        depth: executed positions, more than without the extension.
        pattern: see above.
        rank: of the adapters on every linear of a repeat; 0 is none. Each repeat has an output norm in any case.

    Raises:
        PlanError: a law is broken; the message names it, the value and a remedy.
    """
    _check(plan, first, last, depth, pattern, rank)
    run = range(first, last + 1)
    passes, left = divmod(depth - plan.depth, len(run))
    again = {block: Slot(block, block, block, rank, True) for block in run}
    slots = []
    for slot in plan.slots:
        slots.append(slot)
        if not isinstance(slot, Slot) or slot.home not in again:
            continue
        if pattern == "block":
            slots += [again[slot.home]] * (passes + (slot.home - first < left))
        elif slot.home == last:
            slots += [again[block] for block in [*run] * passes + [*run[:left]]]
    return FoldPlan(tuple(slots), plan.num_blocks)


def rank_of(rank: float, width: int) -> int:
    """The rank of adapters: a whole number as it is, a fraction as a share of the model's width (at least 1).

    Raises:
        PlanError: it is not between 0 and the width, or the share not above 0 and at most 1.
    """
    if isinstance(rank, int):
        if 0 <= rank <= width:
            return rank
    elif 0 < rank <= 1:
        return max(1, round(rank * width))
    raise PlanError(
        f"the rank of an adapter is a whole number from 0 to the model's width, {width}, or a share of it such as "
        f"{DEFAULT_RANK}, got {rank}."
    )


def _check(base: FoldPlan, first: int, last: int, depth: int, pattern: str, rank: int) -> None:
    if pattern not in PATTERNS:
        raise PlanError(f"an extension's pattern is one of {', '.join(PATTERNS)}, got '{pattern}'.")
    if not 0 <= first <= last < base.num_blocks:
        raise PlanError(
            f"the repeated blocks lie in the model, first before last: blocks go from 0 to {base.num_blocks - 1}, got "
            f"{first}-{last}."
        )
    if rank < 0:
        raise PlanError(f"an adapter's rank is 0 or more, got {rank}.")
    homes = [slot.home for slot in base.slots if isinstance(slot, Slot)]
    if repeated := sorted({home for home in homes if homes.count(home) > 1}):
        raise PlanError(
            f"only a plan without repeats can be extended, but '{base}' repeats blocks {repeated} already. Give the "
            "plan without them, and a larger depth."
        )
    whole = {
        slot.home for slot in base.slots if isinstance(slot, Slot) and slot.attention == slot.mlp == slot.home
    }
    if borrowed := sorted(set(range(first, last + 1)) - whole):
        raise PlanError(
            f"a repeated block runs its own attention and MLP, but blocks {borrowed} of {first}-{last} do not in "
            f"'{base}'. Choose a run of blocks that are kept whole."
        )
    if depth > MOST_POSITIONS:
        raise PlanError(f"an extension runs at most {MOST_POSITIONS:,} positions, got {depth:,}. Lower it.")
    if depth <= base.depth:
        raise PlanError(
            f"an extension runs more positions than before: more than {base.depth}, got {depth}. Raise it."
        )
