"""What a runtime that cannot share weights can hold: stock blocks, each with weights of its own.

One criterion, which a search narrows its space by before it begins, and an export refuses by.
"""

from __future__ import annotations

from foldsearch.plan.plan import FoldPlan, Replacement, Slot


def unexpandable(plan: FoldPlan, *, by_position: bool = False) -> tuple[str, str] | None:
    """What of a plan stock blocks cannot do, and what to do about it; None where they can do all of it.

    Shared weights are written again and adapters are merged, so children are no hindrance.

    Args:
        plan: of the folded model.
        by_position: whether the model scales attention by a block's position (`CostTable.by_position`).
    """
    if any(isinstance(slot, Replacement) and slot.kind != "layer" for slot in plan.slots):
        return "a network in place of blocks (~)", "replace them by ~layer"
    slots = [slot for slot in plan.slots if isinstance(slot, Slot)]
    if any(slot.norm for slot in slots):
        return "an output norm on a child (+n)", "leave +n out"
    if any(slot.attention is None or slot.mlp is None for slot in slots):
        return "a block without attention or without MLP", "drop or keep the whole block"
    homes = [slot.home if isinstance(slot, Slot) else slot.first for slot in plan.slots]
    if by_position and homes != list(range(len(homes))):
        return (
            "blocks at other positions than their own, and this model scales attention by a block's position "
            "(scale_attn_by_inverse_layer_idx)",
            "leave out only blocks at its end",
        )
    return None
