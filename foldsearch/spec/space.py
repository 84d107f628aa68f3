"""What may be proposed: a space, as a person writes it.

A space knows no model, no data and no hardware; `foldsearch.spec.fit` cuts it to what can fit a device, once a model is
priced. Its tables for fates and its keys for settings of criteria come from the lists of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator, model_validator

from foldsearch.criteria import CRITERIA, Setting, criterion_names, criterion_of
from foldsearch.fates import FATES, FateTable, fate_named, fate_names
from foldsearch.fates.share import check_ranks
from foldsearch.model.training import Trained
from foldsearch.plan.stored import CACHE_TYPES, TYPES, StoredTypes, every_types
from foldsearch.toml import Rank, Share01, TomlTable, ascending, not_empty, one_of, table_of

Criteria = Annotated[tuple[Annotated[str, one_of(criterion_names)], ...], not_empty]
WeightType = Annotated[str, one_of(lambda: tuple(TYPES))]
CacheType = Annotated[str, one_of(lambda: CACHE_TYPES)]
Fates = Annotated[tuple[Annotated[str, one_of(fate_names)], ...], not_empty]


class GroupsTable(TomlTable):
    """Grouped sharing over the kept blocks (see `foldsearch.proposal.Groups`).

    max_groups: 0 to this many groups. group_sizes: blocks in a group, its owner included.
    start: where the first group may begin, as a share of the kept blocks, from and to.
    adapter_ranks: of each child.
    """

    max_groups: Annotated[int, Field(ge=0)] = 0
    group_sizes: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (2,)
    start: tuple[Share01, Share01] = (0.0, 1.0)
    adapter_ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (0,)

    @field_validator("start")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return ascending(value)

    def first_start(self, num_kept: int) -> int:
        """Position of the earliest start, among so many kept blocks."""
        return self.start_at(self.start[0], num_kept)

    def start_at(self, share: float, num_kept: int) -> int:
        """Position of a start that is a share of the kept blocks; two blocks at least follow it."""
        return max(0, min(int(share * num_kept), num_kept - 2))


class Recover(TomlTable):
    """Recovery training.

    learning_rate: from and to, on a log scale, in root mean squares of the weights (see
    `foldsearch.model.recover.step_units`). delta_ranks: of the recovery deltas. trains: what is trained (see
    `foldsearch.model.recover`); the first one is that of baselines.
    """

    learning_rate: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        0.015,
        0.08,
    )
    delta_ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (8,)
    trains: Annotated[tuple[Trained, ...], Field(min_length=1)] = ("deltas",)

    @property
    def middle_rank(self) -> int:
        """The rank of baselines, and of plans typed by hand."""
        return self.delta_ranks[len(self.delta_ranks) // 2]

    @field_validator("learning_rate")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return ascending(value)


def _values(setting: Setting) -> tuple[Any, Any]:
    value = Annotated[float, Field(gt=0, le=setting.most)]
    return Annotated[tuple[value, ...], Field(min_length=1)], setting.values


_SETTINGS = {one.setting.key: one.setting for one in CRITERIA if one.setting is not None}

if TYPE_CHECKING:
    _OfMethods = TomlTable
else:
    _OfMethods = table_of(
        "_OfMethods",
        {
            **{key: _values(setting) for key, setting in _SETTINGS.items()},
            **{fate.table.key: (fate.table, fate.table()) for fate in FATES if fate.table.key},
        },
    )


class Space(_OfMethods):
    """Everything that is sampled. Neighbours of the front may leave it: they keep the laws and the budget only.

    removal: share of the blocks that is removed, from and to. criteria: what ranks the blocks.
    fates: what becomes of removed blocks; the first is that of the baselines. attention: share of the blocks that lose
    their attention only, from and to. neighbour_share: probability that a trial is a neighbour of a plan on the front.
    groups, recover: see there. weights, kv_cache: types that weights, and keys and values, may be stored in
    (`foldsearch.plan.stored`), of which each proposal has one, baselines the first; empty: as the target says. step:
    blocks are removed in multiples of it. Beside these each fate has its table, and each setting of a criterion its
    key: see `table` and `settings`.
    """

    name: str = "unnamed"
    removal: tuple[Share01, Share01] = (0.0, 0.5)
    criteria: Criteria = ("gate", "block_influence", "window", "greedy")
    fates: Fates = ("drop",)
    attention: tuple[Share01, Share01] = (0.0, 0.0)
    neighbour_share: Share01 = 0.25
    groups: GroupsTable = GroupsTable()
    recover: Recover = Recover()
    weights: tuple[WeightType, ...] = ()
    kv_cache: tuple[CacheType, ...] = ()
    step: Annotated[int, Field(ge=1)] = 1

    @field_validator("removal", "attention")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return ascending(value)

    @model_validator(mode="after")
    def _each_once(self) -> Space:
        for name, options in (
            ("criteria", self.criteria),
            ("fates", self.fates),
            ("recover.trains", self.recover.trains),
            ("weights", self.weights),
            ("kv_cache", self.kv_cache),
            *((key, getattr(self, key)) for key in _SETTINGS),
        ):
            if len(set(options)) < len(options):
                raise ValueError(f"{name} names each option once; got {list(options)}")
        return self

    @property
    def types(self) -> list[StoredTypes]:
        """Every pair of types that a proposal may have; one that is empty is the target's."""
        return every_types(self.weights, self.kv_cache)

    def counts(self, num_blocks: int) -> tuple[int, int]:
        """Fewest and most blocks to drop of `num_blocks`: removal rates as whole numbers, one block always stays.

        Where no multiple of the step lies in the range, the nearest one above it does. Something is dropped or shared,
        so a space without sharing drops at least one block.
        """
        low, high = self.removal
        least = 0 if self.groups.max_groups or self.attention_counts(num_blocks)[1] else 1
        fewest = max(math.ceil(low * num_blocks - 1e-9), least)
        fewest = min(-(-fewest // self.step), (num_blocks - 1) // self.step) * self.step
        most = min(math.floor(high * num_blocks + 1e-9), num_blocks - 1) // self.step * self.step
        return fewest, max(fewest, most)

    def every_count(self, num_blocks: int) -> range:
        """Every number of blocks that may be dropped."""
        fewest, most = self.counts(num_blocks)
        return range(fewest, most + 1, self.step)

    def attention_counts(self, num_blocks: int, num_removed: int = 0) -> tuple[int, int]:
        """Fewest and most of the blocks that lose their attention only; one of the kept blocks always has its own."""
        low, high = self.attention
        most = max(0, min(math.floor(high * num_blocks + 1e-9), num_blocks - num_removed - 1))
        return min(math.ceil(low * num_blocks - 1e-9), most), most

    def for_width(self, width: int) -> Space:
        """The space with ranks that are shares of the width as whole numbers, each once.

        Raises:
            SpecError: a rank is above the width.
        """
        check_ranks("groups.adapter_ranks", self.groups.adapter_ranks, width, self.name)
        return self.with_tables({name: self.table(name).for_width(width, self.name) for name in fate_names()})

    def table(self, fate: str) -> FateTable:
        """What the space says of a fate, by the fate's name."""
        table = fate_named(fate).table
        return getattr(self, table.key) if table.key else table()

    def with_tables(self, tables: Mapping[str, FateTable]) -> Space:
        """The space with other tables, by the names of their fates."""
        return self.model_copy(update={table.key: table for table in tables.values() if table.key})

    def settings(self, criterion: str) -> tuple[float | None, ...]:
        """The values of a criterion's own setting; None alone where it has none."""
        key = criterion_of(criterion).setting_key
        return getattr(self, key) if key else (None,)

    def middle_setting(self, criterion: str) -> float | None:
        """The one of `settings` that baselines have."""
        settings = self.settings(criterion)
        return settings[len(settings) // 2]
