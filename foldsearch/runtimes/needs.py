"""What a plan may need that not every runtime can do, each with its words. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from foldsearch.plan.plan import FoldPlan, Replacement, Slot

Need = Literal["network", "copied block", "norm", "half block", "moved block"]

# What the plan has, and what to do instead, in the words of a message.
WORDS: dict[Need, tuple[str, str]] = {
    "network": ("a network in place of blocks (~)", "replace them by ~layer"),
    "copied block": ("a block in place of several (~layer)", "drop them, or keep them"),
    "norm": ("an output norm on a child (+n)", "leave +n out"),
    "half block": ("a block without attention or without MLP", "drop or keep the whole block"),
    "moved block": (
        "blocks at other positions than their own, and this model scales attention by a block's position "
        "(scale_attn_by_inverse_layer_idx)",
        "leave out only blocks at its end",
    ),
}


def needs(plan: FoldPlan, *, by_position: bool) -> Iterator[Need]:
    """What a plan needs, in the order in which a message tells it.

    Args:
        plan: of the folded model.
        by_position: whether the model scales attention by a block's position (`CostTable.by_position`).
    """
    if any(isinstance(slot, Replacement) and not slot.is_block for slot in plan.slots):
        yield "network"
    if any(isinstance(slot, Replacement) and slot.is_block for slot in plan.slots):
        yield "copied block"
    slots = [slot for slot in plan.slots if isinstance(slot, Slot)]
    if any(slot.norm for slot in slots):
        yield "norm"
    if any(slot.attention is None or slot.mlp is None for slot in slots):
        yield "half block"
    homes = homes_of(plan)
    if by_position and homes != list(range(len(homes))):
        yield "moved block"


def homes_of(plan: FoldPlan) -> list[int]:
    """The block whose place in the model each position has."""
    return [slot.home if isinstance(slot, Slot) else slot.first for slot in plan.slots]
