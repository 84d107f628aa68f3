"""Colours of a plan's strip, the same in the terminal and on the page.

Pairs of ColorBrewer's "Paired" scheme: an owner in the dark tone, its children in the light one. Blocks that nobody
shares are grey, so colour always means sharing.
"""

from __future__ import annotations

from typing import NamedTuple

from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.strip import Cell, cells

INK, FAINT = "#1f2430", "#8b93a1"  # words; what is there to be found, not to be read
KEPT = ("#78839a", "#99a3b5")  # five blocks dark, five light: a block's number can be read off
DROPPED = "#c9ced6"
REPLACED = "#d01c8b"
PAIRS = (
    ("#1f78b4", "#a6cee3"),
    ("#ff7f00", "#fdbf6f"),
    ("#33a02c", "#b2df8a"),
    ("#6a3d9a", "#cab2d6"),
    ("#e31a1c", "#fb9a99"),
    ("#8c510a", "#dfc27d"),
)


class Painted(NamedTuple):
    """A cell and the colours of its two units; None where the unit does not run."""

    cell: Cell
    attention: str | None
    mlp: str | None


def paint(plan: FoldPlan) -> list[Painted]:
    """The cells of a plan with their colours."""
    drawn = cells(plan)
    lent: list[int] = []  # owners of at least one child, in the order of the model
    for cell in sorted(drawn, key=lambda cell: cell.block):
        for source, own in ((cell.attention, cell.own_attention), (cell.mlp, cell.own_mlp)):
            if source is not None and not own and source not in lent:
                lent.append(source)
    pairs = {owner: PAIRS[i % len(PAIRS)] for i, owner in enumerate(sorted(lent))}

    def colour(source: int | None, own: bool) -> str | None:
        if source is None:
            return None
        if own:
            return pairs[source][0] if source in pairs else KEPT[source // 5 % 2]
        return pairs[source][1]

    return [
        Painted(cell, REPLACED, REPLACED)
        if cell.replaced
        else Painted(cell, colour(cell.attention, cell.own_attention), colour(cell.mlp, cell.own_mlp))
        for cell in drawn
    ]
