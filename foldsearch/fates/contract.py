"""What a fate is: what becomes of removed blocks, what that costs at least, and the table of a space that sets it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeVar

from foldsearch.plan.cost import CostTable
from foldsearch.plan.plan import AdapterStart, FoldPlan, Replacement, Slot
from foldsearch.progress import StageProgress
from foldsearch.toml import TomlTable

if TYPE_CHECKING:
    from foldsearch.model.workbench import Workbench

Option = TypeVar("Option", bound=float | int | str)


class Suggest(Protocol):
    """Where suggestions come from: Optuna's trial behind a thin adapter, or plain random numbers."""

    def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """A whole number from low to high, both included, in steps from the low one on."""

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from low to high, on a log scale if asked."""

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """One of the options."""


class Bound(NamedTuple):
    """What removed blocks cost at least after they met their fate, whichever blocks they are.

    children: blocks that run again with another block's weights, norms of their own, an output norm and an adapter of
    this rank. parameters, macs: of what is new in the model; macs per token.
    """

    children: int = 0
    rank: int = 0
    parameters: int = 0
    macs: int = 0


class Fate(ABC):
    """What becomes of removed blocks. A fate is a frozen dataclass of its own settings, so that equal ones are `==`.

    name: in a space. source: the paper, or "ours". table: of a space, which lists what the settings may be.
    has_groups: whether kept blocks may share weights in groups beside it. needs_bases: whether a removed block needs
    a base block.
    """

    __slots__ = ()
    name: ClassVar[str]
    source: ClassVar[str]
    table: ClassVar[type[FateTable]]
    has_groups: ClassVar[bool] = True
    needs_bases: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """What the blocks become, in a word, for reports; empty where nothing takes their place."""
        return ""

    @property
    def adapter_start(self) -> AdapterStart | None:
        """How adapters and output norms start; None where it makes none."""
        return None

    def bases(self, bench: Workbench, removed: tuple[int, ...], say: StageProgress) -> Mapping[int, int]:
        """The base block of each removed one, where the fate needs one; the dense model may be asked."""
        return {}

    @abstractmethod
    def slots(self, removed: Sequence[int], bases: Mapping[int, int]) -> list[Slot | Replacement]:
        """What takes the place of the removed blocks, which are in order."""

    @abstractmethod
    def bound(self, count: int, table: CostTable) -> Bound:
        """What `count` removed blocks cost at least."""

    @classmethod
    def undo(cls, plan: FoldPlan) -> tuple[tuple[int, ...], dict[int, int]]:
        """What `slots` was given, from the plan that came of it: removed blocks in order, and their base blocks.

        This one finds blocks that nothing stands for, or a network; a fate whose `slots` has a `Slot` has its own.
        """
        replaced = (range(one.first, one.last + 1) for one in plan.slots if isinstance(one, Replacement))
        return tuple(sorted({*plan.dropped, *(block for run in replaced for block in run)})), {}


class FateTable(TomlTable, ABC):
    """The table of a space that sets a fate.

    key: of the table in a space; empty where there is nothing to set. unused: what does not happen where no fate of
    the space is this one, for the sentence that tells of settings without effect.
    """

    key: ClassVar[str] = ""
    unused: ClassVar[str] = ""

    @abstractmethod
    def propose(self, suggest: Suggest) -> Fate:
        """One fate of the table."""

    @abstractmethod
    def cheapest(self) -> Iterator[Fate]:
        """Fates of the table among which the cheapest is."""

    def nearest(self, fate: Fate) -> Iterator[Fate]:
        """The fate, and what may stand in for it where it is too dear, the nearest first."""
        yield fate

    @abstractmethod
    def size(self) -> int:
        """Number of different fates of the table."""

    def for_width(self, width: int, space: str) -> FateTable:
        """The table for a model of this width, ranks as whole numbers.

        Raises:
            SpecError: the model is too narrow for it; `space` is its name, for the message.
        """
        return self

    def held(self, cannot: AbstractSet[str]) -> FateTable | None:
        """The part of the table that a runtime holds which cannot do these (`foldsearch.runtimes.needs.Need`)."""
        return self

    def lost(self, cannot: AbstractSet[str]) -> str:
        """The settings of a space that such a runtime leaves out, in words; empty where it holds all of the table."""
        return ""

    @property
    def is_fitted(self) -> bool:
        """Whether a fate of the table is fitted to text before anything is trained."""
        return False
