"""Removed blocks come back as children: each runs with the weights of a kept block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from foldsearch.errors import PlanError, SpecError
from foldsearch.fates.contract import Bound, Fate, FateTable, Suggest
from foldsearch.plan.cost import CostTable
from foldsearch.plan.plan import AdapterStart, FoldPlan, Replacement, Slot, adapter_start
from foldsearch.progress import StageProgress
from foldsearch.toml import RankOrShare

if TYPE_CHECKING:
    from foldsearch.model.workbench import Workbench


class Children(FateTable):
    """Removed blocks that come back as children, where their fate is "share" (FlexiGPT).

    ranks: of their adapters; a whole number, or a share of the model's width (the paper's 256 is 0.0625 of its 4,096).
    starts: how adapters start (see `foldsearch.model.children`).
    """

    key: ClassVar[str] = "children"
    unused: ClassVar[str] = "no removed block comes back"

    ranks: Annotated[tuple[RankOrShare, ...], Field(min_length=1)] = (0.0625,)
    starts: Annotated[tuple[Literal["zero", "svd", "data"], ...], Field(min_length=1)] = ("svd",)

    def propose(self, suggest: Suggest) -> Share:
        return Share(
            int(suggest.choice("child_rank", self.ranks)), suggest.choice("adapter_start", self.starts)
        )

    def cheapest(self) -> Iterator[Share]:
        yield Share(int(min(self.ranks)))

    def nearest(self, fate: Fate) -> Iterator[Share]:
        """Smaller adapters."""
        assert isinstance(fate, Share)
        yield fate
        for rank in sorted((int(rank) for rank in self.ranks if rank < fate.rank), reverse=True):
            yield Share(rank, fate.start)

    def size(self) -> int:
        return len({Share(int(rank), start) for rank in self.ranks for start in self.starts})

    def for_width(self, width: int, space: str) -> Children:
        ranks = [rank if isinstance(rank, int) else max(1, round(rank * width)) for rank in self.ranks]
        check_ranks("children.ranks", ranks, width, space)
        return self.model_copy(update={"ranks": tuple(dict.fromkeys(ranks))})

    def held(self, cannot: AbstractSet[str]) -> Children | None:
        """Every child has an output norm."""
        return None if "norm" in cannot else self

    def lost(self, cannot: AbstractSet[str]) -> str:
        return "space.fates 'share'" if "norm" in cannot else ""

    @property
    def is_fitted(self) -> bool:
        return "data" in self.starts


def check_ranks(key: str, ranks: Sequence[int], width: int, space: str) -> None:
    """Whether a model of this width can have adapters of these ranks.

    Raises:
        SpecError: a rank is above the width.
    """
    if max(ranks) > width:
        raise SpecError(
            f"an adapter's rank is at most the model's width, {width}, but {key} of the space '{space}' "
            f"has {max(ranks)}. Lower it: at that rank it would cost more than the block's own weights."
        )


@dataclass(frozen=True, slots=True)
class Share(Fate):
    """Each removed block runs with the weights of its base block, an adapter and an output norm (FlexiGPT, section 3).

    rank: of each child's adapter. start: how adapters and output norms start; without adapters only "data" starts the
    norms in a way of its own, so "svd" is then kept as "zero".

    Raises:
        PlanError: the rank is negative.
    """

    rank: int = 0
    start: AdapterStart = "svd"

    name = "share"
    source = "FlexiGPT, arXiv 2501.14713"
    table = Children
    needs_bases = True
    has_groups = False  # children borrow from blocks that run their own weights

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise PlanError(f"the rank of an adapter is 0 or more, got {self.rank}.")
        object.__setattr__(self, "start", adapter_start(self.start, self.rank))

    @property
    def title(self) -> str:
        return "children"

    @property
    def adapter_start(self) -> AdapterStart:
        return self.start

    def bases(self, bench: Workbench, removed: tuple[int, ...], say: StageProgress) -> Mapping[int, int]:
        """The kept block whose weights are nearest (FlexiGPT's base-block metric)."""
        return bench.base_blocks(removed, say)

    def slots(self, removed: Sequence[int], bases: Mapping[int, int]) -> list[Slot | Replacement]:
        return [Slot(block, bases[block], bases[block], self.rank, norm=True) for block in removed]

    def bound(self, count: int, table: CostTable) -> Bound:
        return Bound(children=count, rank=self.rank)

    @classmethod
    def undo(cls, plan: FoldPlan) -> tuple[tuple[int, ...], dict[int, int]]:
        removed, _ = super(Share, cls).undo(plan)
        children = {
            slot.home: slot.mlp
            for slot in plan.slots
            if isinstance(slot, Slot) and slot.mlp is not None and slot.mlp != slot.home
        }
        return tuple(sorted({*removed, *children})), children
