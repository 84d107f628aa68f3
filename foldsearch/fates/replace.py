"""A small network takes the place of every run of removed blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, ClassVar

from foldsearch.fates.contract import Bound, Fate, FateTable, Suggest
from foldsearch.plan.cost import CostTable, replacement_cost
from foldsearch.plan.kinds import kind_named, kind_names
from foldsearch.plan.plan import Replacement, Slot
from foldsearch.toml import not_empty, one_of


class Networks(FateTable):
    """Networks in place of runs of blocks, where their fate is "replace" (LLM-Streamline). kinds: of these networks."""

    key: ClassVar[str] = "replace"
    unused: ClassVar[str] = "no network takes the place of blocks"

    kinds: Annotated[tuple[Annotated[str, one_of(kind_names)], ...], not_empty] = ("linear",)

    def propose(self, suggest: Suggest) -> Replace:
        return Replace(suggest.choice("replacement", self.kinds))

    def cheapest(self) -> Iterator[Replace]:
        yield from map(Replace, self.kinds)

    def nearest(self, fate: Fate) -> Iterator[Replace]:
        """Networks of another kind."""
        assert isinstance(fate, Replace)
        yield from map(Replace, dict.fromkeys((fate.kind, *self.kinds)))

    def size(self) -> int:
        return len(self.kinds)

    def held(self, cannot: AbstractSet[str]) -> Networks | None:
        """A copied layer is a stock block, in place of several; other kinds are networks of ours."""
        kinds = tuple(kind for kind in self.kinds if not _lost(kind, cannot))
        return self.model_copy(update={"kinds": kinds}) if kinds else None

    def lost(self, cannot: AbstractSet[str]) -> str:
        kinds = [kind for kind in self.kinds if _lost(kind, cannot)]
        return f"space.replace.kinds {', '.join(map(repr, kinds))}" if kinds else ""

    @property
    def is_fitted(self) -> bool:
        return True


def _lost(kind: str, cannot: AbstractSet[str]) -> bool:
    return ("copied block" if kind_named(kind).is_block else "network") in cannot


@dataclass(frozen=True, slots=True)
class Replace(Fate):
    """Each run of removed blocks is one network (LLM-Streamline, section 3); more than one run is ours."""

    kind: str

    name = "replace"
    source = "LLM-Streamline, arXiv 2403.19135"
    table = Networks

    @property
    def title(self) -> str:
        return self.kind

    def slots(self, removed: Sequence[int], bases: Mapping[int, int]) -> list[Slot | Replacement]:
        return [Replacement(first, last, self.kind) for first, last in runs(removed)]

    def bound(self, count: int, table: CostTable) -> Bound:
        """One run at least, of the cheapest network there is."""
        first = range(len(table.blocks)) if kind_named(self.kind).is_block else (0,)
        prices = [replacement_cost(Replacement(block, block, self.kind), table) for block in first]
        return Bound(parameters=min(one for one, _ in prices), macs=min(one for _, one in prices))


def runs(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
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
