"""What a search proposes, before it is a plan.

A proposal says *how many* blocks to remove and by which criterion; *which* blocks is known only after the criterion has
looked at the model (gates are trained first). So a proposal has a lower bound of its price, from counts alone (see
`foldsearch.bound`), and becomes a plan when it meets the removed blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal

from foldsearch.criteria import criterion_of
from foldsearch.errors import PlanError
from foldsearch.fates import Drop, Fate, fate_named
from foldsearch.model.training import Trained
from foldsearch.plan.plan import AdapterStart, FoldPlan, Slot, adapter_start
from foldsearch.plan.stored import AS_TARGET, StoredTypes

Origin = Literal["sampler", "baseline", "start", "screened", "neighbour", "hand"]


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that are removed, in number.

    criterion: what chooses them, by its name in `foldsearch.criteria`. count: 1 or more. fate: what becomes of them.
    setting: of the criterion, where it has one (the gates' eps).

    Raises:
        PlanError: there is no such criterion, it needs a setting or has none, or the count is below 1.
    """

    criterion: str
    count: int
    fate: Fate = Drop()  # noqa: RUF009  # it is frozen
    setting: float | None = None

    def __post_init__(self) -> None:
        _check_least("count of removed blocks", self.count, 1)
        key = criterion_of(self.criterion).setting_key
        if bool(key) != (self.setting is not None):
            raise PlanError(
                f"a proposal names {key or 'a setting'} exactly where its criterion has it; got criterion "
                f"'{self.criterion}' and {self.setting}."
            )

    @property
    def ranking(self) -> tuple[str, int, float | None]:
        """All that the choice of the blocks depends on: equal rankings remove the same blocks."""
        return self.criterion, self.count, self.setting


@dataclass(frozen=True, slots=True)
class Groups:
    """Kept blocks that share weights in groups (FoldGPT, arXiv 2407.00928, abstract).

    From the `start`-th kept block on, `count` runs of `size` blocks; the first of a run is the owner, the others are
    its children, each with norms of its own and an adapter of this rank. Ours: each child also has FlexiGPT's output
    norm, so that it starts near the identity, and a run that the end of the model cuts short keeps what is left of it.

    Raises:
        PlanError: a number is too small.
    """

    count: int
    size: int
    start: int = 0
    rank: int = 0

    def __post_init__(self) -> None:
        for name, value, low in (
            ("count of groups", self.count, 1),
            ("group's size", self.size, 2),
            ("group's start", self.start, 0),
            ("rank of an adapter", self.rank, 0),
        ):
            _check_least(name, value, low)

    def spans(self, num_kept: int) -> Iterator[tuple[int, int]]:
        """First and past-the-last position of each group, among so many kept blocks."""
        for group in range(self.count):
            first = self.start + group * self.size
            last = min(first + self.size, num_kept)
            if last - first < 2:
                return
            yield first, last


@dataclass(frozen=True, slots=True)
class Fold:
    """A way to fold the model, in counts.

    removed, groups: None where there are none. attention_removed: kept blocks that lose their attention only.

    Raises:
        PlanError: the fate of the removed blocks allows no groups, or a number is negative.
    """

    removed: Removed | None = None
    groups: Groups | None = None
    attention_removed: int = 0

    def __post_init__(self) -> None:
        _check_least("count of blocks that lose their attention", self.attention_removed, 0)
        if self.groups is not None and self.removed is not None and not self.removed.fate.has_groups:
            raise PlanError(
                f"blocks whose fate is '{self.removed.fate.name}' borrow from blocks that run their own weights, so "
                "there are no groups beside it. Leave one of the two out."
            )

    @property
    def adapter_start(self) -> AdapterStart | None:
        """How adapters and output norms start; None exactly where nothing carries one."""
        if self.groups is not None:
            return adapter_start("svd", self.groups.rank)
        return None if self.removed is None else self.removed.fate.adapter_start


@dataclass(frozen=True, slots=True)
class Given:
    """A plan that says it all, block by block: moves around the front, plans typed by hand.

    adapter_start: as for `Fold`; what its plan does not use is forgotten.
    """

    plan: FoldPlan
    adapter_start: AdapterStart | None = "svd"

    def __post_init__(self) -> None:
        slots = [slot for slot in self.plan.slots if isinstance(slot, Slot)]
        rank, normed = max((slot.rank for slot in slots), default=0), any(slot.norm for slot in slots)
        start = adapter_start(self.adapter_start or "svd", rank) if rank or normed else None
        object.__setattr__(self, "adapter_start", start)


@dataclass(frozen=True, slots=True)
class RecoveryChoice:
    """The recovery training: learning rate in root mean squares of the weights, rank of the deltas, what is trained.

    Raises:
        PlanError: one of them is out of its range.
    """

    learning_rate: float = 0.035
    delta_rank: int = 8
    trains: Trained = "deltas"

    def __post_init__(self) -> None:
        _check_least("rank of the recovery deltas", self.delta_rank, 0)
        if not 0 < self.learning_rate < inf:
            raise PlanError(f"a proposal's learning rate is a positive number, got {self.learning_rate}.")


@dataclass(frozen=True, slots=True)
class Proposal:
    """One trial as it is suggested: how to fold the model, how to train and store it, and who proposed it.

    Two proposals come to the same untrained model where their `fold` is equal. types: those that it is stored in and
    measured with.
    """

    fold: Fold | Given
    recovery: RecoveryChoice = field(default_factory=RecoveryChoice)
    origin: Origin = "sampler"
    types: StoredTypes = AS_TARGET

    @property
    def plan(self) -> FoldPlan | None:
        """The plan that is given, if one is."""
        return self.fold.plan if isinstance(self.fold, Given) else None

    @property
    def removed(self) -> Removed | None:
        """The blocks that a criterion is to choose, if any."""
        return self.fold.removed if isinstance(self.fold, Fold) else None

    def to_json(self) -> dict[str, Any]:
        """Plain dict; a plan as its text and number of blocks, a fate by its name and settings."""
        fold: dict[str, Any]
        if isinstance(self.fold, Given):
            plan = self.fold.plan
            fold = {
                "plan": str(plan),
                "num_blocks": plan.num_blocks,
                "adapter_start": self.fold.adapter_start,
            }
        else:
            fold = asdict(self.fold)
            if self.fold.removed is not None:
                fold["removed"]["fate"]["name"] = self.fold.removed.fate.name
        return {
            "fold": fold,
            "recovery": asdict(self.recovery),
            "origin": self.origin,
            **asdict(self.types),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Proposal:
        """Read what `to_json` made."""
        recovery = RecoveryChoice(**value["recovery"])
        types = StoredTypes(value["weights"], value.get("kv_cache", ""))  # earlier runs have only the one
        return cls(_fold_from_json(value["fold"]), recovery, value["origin"], types)


def _fold_from_json(value: Mapping[str, Any]) -> Fold | Given:
    if "plan" in value:
        return Given(FoldPlan.parse(value["plan"], value["num_blocks"]), value["adapter_start"])
    removed, groups = value["removed"], value["groups"]
    if removed is not None:
        settings = dict(removed["fate"])
        fate = fate_named(settings.pop("name"))(**settings)
        removed = Removed(**{**removed, "fate": fate})
    return Fold(removed, None if groups is None else Groups(**groups), value["attention_removed"])


def _check_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise PlanError(f"a proposal's {name} is {low} or more, got {value}.")


# ---- a proposal becomes a plan


def fold_plan(
    blocks: Iterable[int],
    fold: Fold | Given,
    num_blocks: int,
    *,
    bases: Mapping[int, int] | None = None,
    attention_order: Iterable[int] = (),
) -> FoldPlan:
    """Remove the blocks and do with them what the proposal says, share in groups over the others, thin attention.

    Args:
        blocks: that the criterion removes; ignored where the plan is given.
        fold: what is done with them, and with those that are kept.
        num_blocks: of the dense model.
        bases: the base block of each removed one, where the fate needs one.
        attention_order: blocks whose attention goes first, first; removed blocks and children are passed over.

    Raises:
        PlanError: every block is removed, no attention is left, or a block to remove does not exist.
    """
    if isinstance(fold, Given):
        return fold.plan
    gone, bases = tuple(sorted(set(blocks))), bases or {}
    plan = FoldPlan.dropping(gone, num_blocks)
    check_attention_left(fold, plan.depth)
    slots = [slot for slot in plan.slots if isinstance(slot, Slot)]
    borrowed = {bases[block] for block in gone if block in bases}
    if fold.groups is not None:
        for first, last in fold.groups.spans(len(slots)):
            owner = slots[first].home
            borrowed.add(owner)
            for position in range(first + 1, last):
                slots[position] = Slot(slots[position].home, owner, owner, fold.groups.rank, norm=True)
    own = {slot.home: position for position, slot in enumerate(slots) if slot.attention == slot.home}
    thinned = [block for block in attention_order if block in own and block not in borrowed]
    for block in thinned[: fold.attention_removed]:
        slots[own[block]] = Slot(block, None, block)
    instead = fold.removed.fate.slots(gone, bases) if fold.removed is not None else []
    every = [*slots, *instead]
    every.sort(key=lambda slot: slot.home if isinstance(slot, Slot) else slot.first)
    return FoldPlan(tuple(every), num_blocks)


def check_attention_left(fold: Fold, num_kept: int) -> None:
    """Whether some kept block attends.

    Raises:
        PlanError: as many as are kept lose their attention.
    """
    if fold.attention_removed >= num_kept:
        raise PlanError(
            f"a plan attends at one position at least, but {fold.attention_removed} of the {num_kept} blocks that "
            "are kept lose their attention. Leave one its own."
        )
