"""A plan drawn as a strip: one cell a block, so that the strips of two plans line up block by block."""

from __future__ import annotations

from dataclasses import dataclass

from foldsearch.plan.plan import FoldPlan, Replacement

LEGEND = (
    "█ kept  ▒ child  ▓ half shared  ▀ attention only  ▄ MLP only  ░ one unit, shared  ━ replaced  · dropped"
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One block of the dense model, or one repeat of it, as the plan runs it.

    block: the block. attention, mlp: the block whose weights the unit runs, None where it does not run.
    replaced: whether a replacement stands for it. repeat: whether the block has run before.
    """

    block: int
    attention: int | None = None
    mlp: int | None = None
    replaced: bool = False
    repeat: bool = False

    @property
    def own_attention(self) -> bool:
        """Whether the attention runs, with the block's own weights."""
        return self.attention == self.block and not self.repeat

    @property
    def own_mlp(self) -> bool:
        """Whether the MLP runs, with the block's own weights."""
        return self.mlp == self.block and not self.repeat

    @property
    def glyph(self) -> str:
        """One character (see `LEGEND`)."""
        if self.replaced:
            return "━"
        match (self.attention is not None, self.own_attention, self.mlp is not None, self.own_mlp):
            case (False, _, False, _):
                return "·"
            case (True, True, True, True):
                return "█"
            case (True, False, True, False):
                return "▒"
            case (True, _, True, _):
                return "▓"
            case (True, True, False, _):
                return "▀"
            case (False, _, True, True):
                return "▄"
            case _:
                return "░"


def cells(plan: FoldPlan) -> tuple[Cell, ...]:
    """The cells of a plan: every block of the dense model in order, a repeat where it runs."""
    found: list[Cell] = []
    seen: set[int] = set()
    following = 0  # the first block that has no cell yet
    for slot in plan.slots:
        if isinstance(slot, Replacement):
            found += [Cell(block) for block in range(following, slot.first)]
            found += [Cell(block, replaced=True) for block in range(slot.first, slot.last + 1)]
            following = slot.last + 1
        elif slot.home in seen:
            found.append(Cell(slot.home, slot.attention, slot.mlp, repeat=True))
        else:
            found += [Cell(block) for block in range(following, slot.home)]
            found.append(Cell(slot.home, slot.attention, slot.mlp))
            seen.add(slot.home)
            following = slot.home + 1
    return (*found, *(Cell(block) for block in range(following, plan.num_blocks)))


def strip(plan: FoldPlan) -> str:
    """The plan as one character a cell, without colours."""
    return "".join(cell.glyph for cell in cells(plan))
