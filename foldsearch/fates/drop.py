"""Removed blocks are gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from foldsearch.fates.contract import Bound, Fate, FateTable, Suggest
from foldsearch.plan.cost import CostTable
from foldsearch.plan.plan import Replacement, Slot


class DropTable(FateTable):
    """There is nothing to set."""

    def propose(self, suggest: Suggest) -> Drop:
        return Drop()

    def cheapest(self) -> Iterator[Drop]:
        yield Drop()

    def size(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Drop(Fate):
    """Nothing takes their place (FoldGPT, ShortGPT and most others)."""

    name = "drop"
    source = "FoldGPT, arXiv 2407.00928"
    table = DropTable

    def slots(self, removed: Sequence[int], bases: Mapping[int, int]) -> list[Slot | Replacement]:
        return []

    def bound(self, count: int, table: CostTable) -> Bound:
        return Bound()
