"""What may be proposed: a space, as a person writes it, and how a suggestion becomes a proposal.

A space knows no model, no data and no hardware. `narrow` cuts it to what can fit a device, once a model is priced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from foldsearch.errors import BudgetError
from foldsearch.plan.cost import GB, Budget, Cost, CostTable, Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.proposal import Origin, Proposal, fold_plan, lower_bound

Share01 = Annotated[float, Field(ge=0, le=1)]
Rank = Annotated[int, Field(ge=0)]
Option = TypeVar("Option", bound=float | int | str)


class Suggest(Protocol):
    """Where suggestions come from: Optuna's trial behind a thin adapter, or plain random numbers."""

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number from low to high, both included."""

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number from low to high, on a log scale if asked."""

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """One of the options."""


class TomlTable(BaseModel):
    """A table of a TOML file: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Share(TomlTable):
    """Grouped sharing over the retained blocks (see `foldsearch.plan.proposal.fold_plan`).

    max_groups: 0 to this many groups. group_sizes: blocks in a group, its owner included.
    start: where the first group may begin, as a share of the retained blocks, from and to.
    adapter_ranks: of each child.
    """

    max_groups: Annotated[int, Field(ge=0)] = 0
    group_sizes: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (2,)
    start: tuple[Share01, Share01] = (0.0, 1.0)
    adapter_ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (0,)

    @field_validator("start")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range(value)


class Recover(TomlTable):
    """Recovery training. learning_rate: from and to, on a log scale. delta_ranks: of the recovery deltas."""

    learning_rate: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (
        3e-4,
        3e-3,
    )
    delta_ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (8,)

    @field_validator("learning_rate")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range(value)


class Space(TomlTable):
    """Everything that may be proposed.

    removal: share of the blocks that is dropped, from and to. criteria: what ranks the blocks.
    gate_eps: of the gated training. neighbour_share: probability that a trial is a neighbour of a plan on the front.
    """

    name: str = "unnamed"
    removal: tuple[Share01, Share01] = (0.0, 0.5)
    criteria: Annotated[
        tuple[Literal["gate", "block_influence", "window", "greedy"], ...], Field(min_length=1)
    ] = ("gate", "block_influence", "window", "greedy")
    gate_eps: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.01,)
    neighbour_share: Share01 = 0.25
    share: Share = Share()
    recover: Recover = Recover()

    @field_validator("removal")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        return _range(value)

    @model_validator(mode="after")
    def _each_once(self) -> Space:
        for name, options in (("criteria", self.criteria), ("gate_eps", self.gate_eps)):
            if len(set(options)) < len(options):
                raise ValueError(f"{name} names each option once; got {list(options)}")
        return self

    def counts(self, num_blocks: int) -> tuple[int, int]:
        """Fewest and most blocks to drop of `num_blocks`: removal rates as whole numbers, one block always stays.

        Where no whole number lies in the range, the nearest one above it does. Something is dropped or shared, so
        a space without sharing drops at least one block.
        """
        low, high = self.removal
        fewest = max(math.ceil(low * num_blocks - 1e-9), 0 if self.share.max_groups else 1)
        fewest = min(fewest, num_blocks - 1)
        return fewest, max(fewest, min(math.floor(high * num_blocks + 1e-9), num_blocks - 1))


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"a range is written [from, to], the smaller number first; got {list(value)}")
    return value


# ---- proposing


def propose(suggest: Suggest, space: Space, num_blocks: int, *, origin: Origin = "sampler") -> Proposal:
    """One proposal of the space; conditional parameters are asked for only where they mean something.

    Args:
        suggest: answers by name; the names are the fields of `Proposal` (group_start as a share, 0 to 1).
        space: what may be proposed.
        num_blocks: of the dense model.
        origin: recorded in the proposal.
    """
    fewest, most = space.counts(num_blocks)
    num_removed = suggest.integer("num_removed", fewest, most)
    criterion = suggest.choice("criterion", space.criteria)
    gate_eps = suggest.choice("gate_eps", space.gate_eps) if criterion == "gate" else None
    num_groups = suggest.integer(
        "num_groups", 0 if num_removed else min(1, space.share.max_groups), space.share.max_groups
    )
    group_size, group_start, adapter_rank = 1, 0, 0
    if num_groups:
        group_size = suggest.choice("group_size", space.share.group_sizes)
        start = suggest.number("group_start", *space.share.start)
        group_start = max(0, min(int(start * (num_blocks - num_removed)), num_blocks - num_removed - 2))
        adapter_rank = suggest.choice("adapter_rank", space.share.adapter_ranks)
    learning_rate, delta_rank = propose_recovery(suggest, space)
    return Proposal(
        criterion=criterion,
        num_removed=num_removed,
        gate_eps=gate_eps,
        group_size=group_size,
        group_start=group_start,
        num_groups=num_groups,
        adapter_rank=adapter_rank,
        learning_rate=learning_rate,
        delta_rank=delta_rank,
        origin=origin,
    )


def propose_recovery(suggest: Suggest, space: Space) -> tuple[float, int]:
    """Learning rate and delta rank alone: all that is left to ask for a plan that is given."""
    learning_rate = suggest.number("learning_rate", *space.recover.learning_rate, log=True)
    return learning_rate, suggest.choice("delta_rank", space.recover.delta_ranks)


# ---- what can fit


def narrow(space: Space, table: CostTable, target: Target, budget: Budget) -> Space:
    """The space with its count range cut to the counts at which some proposal can fit.

    Raises:
        BudgetError: no proposal of the space can; the message says the smallest price and its plan.
    """
    num_blocks = len(table.blocks)
    fewest, most = space.counts(num_blocks)
    fitting = [
        count
        for count in range(fewest, most + 1)
        if any(
            budget.admits(lower_bound(proposal, table, target))
            for proposal in _extremes(space, num_blocks, count)
        )
    ]
    if not fitting:
        raise BudgetError(_unreachable(space, table, target, budget))
    return space.model_copy(update={"removal": (fitting[0] / num_blocks, fitting[-1] / num_blocks)})


def smallest(space: Space, table: CostTable, target: Target) -> tuple[FoldPlan, Cost]:
    """The plan of the space that needs the least memory, and its price.

    Where all blocks cost the same, which of them it drops is only an example.
    """
    num_blocks = len(table.blocks)
    _, most = space.counts(num_blocks)
    found = min(
        _extremes(space, num_blocks, most),
        key=lambda proposal: lower_bound(proposal, table, target).memory_bytes,
    )
    alone = [
        price(FoldPlan.dropping([block], num_blocks), table, target).memory_bytes
        for block in range(num_blocks)
    ]
    dropped = sorted(range(num_blocks - 1, -1, -1), key=lambda block: alone[block])[:most]
    plan = fold_plan(dropped, found, num_blocks)
    return plan, price(plan, table, target)


def repair(
    proposal: Proposal, space: Space, table: CostTable, target: Target, budget: Budget
) -> Proposal | None:
    """The proposal itself if its lower bound fits, else the nearest one that does; None if none does.

    The count and the criterion stay. Nearest: more groups first, then larger groups, then an earlier start, then
    smaller adapters.
    """
    if budget.admits(lower_bound(proposal, table, target)):
        return proposal
    if proposal.plan is not None:
        return None
    sizes = sorted(size for size in space.share.group_sizes if size >= proposal.group_size)
    ranks = sorted({proposal.adapter_rank, *space.share.adapter_ranks}, reverse=True)
    earliest = _start(space, len(table.blocks) - proposal.num_removed)
    for rank in (rank for rank in ranks if rank <= proposal.adapter_rank or not proposal.num_groups):
        for start in dict.fromkeys((proposal.group_start, min(earliest, proposal.group_start))):
            for size in sizes:
                for groups in range(max(1, proposal.num_groups), space.share.max_groups + 1):
                    other = replace(
                        proposal, num_groups=groups, group_size=size, group_start=start, adapter_rank=rank
                    )
                    if budget.admits(lower_bound(other, table, target)):
                        return other
    return None


def feasible_share(
    space: Space,
    table: CostTable,
    target: Target,
    budget: Budget,
    *,
    num_proposals: int = 100_000,
    seed: int = 0,
) -> float:
    """Share of random proposals whose lower bound fits as they are, before any repair.

    About 50 µs a proposal.
    """
    suggest = RandomSuggest(seed)
    fitting = sum(
        budget.admits(lower_bound(propose(suggest, space, len(table.blocks)), table, target))
        for _ in range(num_proposals)
    )
    return fitting / num_proposals


def size(space: Space, num_blocks: int) -> int:
    """Number of different proposals of the space, recovery settings and neighbour moves not counted."""
    fewest, most = space.counts(num_blocks)
    criteria = len(space.criteria) + ("gate" in space.criteria) * (len(space.gate_eps) - 1)
    total = 0
    for count in range(fewest, most + 1):
        first, last = _start(space, num_blocks - count), _start(space, num_blocks - count, end=1)
        starts = last - first + 1
        share = space.share
        total += criteria * (
            bool(count) + share.max_groups * len(share.group_sizes) * starts * len(share.adapter_ranks)
        )
    return total


def _start(space: Space, num_retained: int, end: int = 0) -> int:
    return max(0, min(int(space.share.start[end] * num_retained), num_retained - 2))


def _extremes(space: Space, num_blocks: int, count: int) -> Iterator[Proposal]:
    """Proposals among which the cheapest of a count is: nothing shared, or as much as the space allows."""
    if count or not space.share.max_groups:
        yield Proposal("window", num_removed=count)
    if space.share.max_groups:
        for group_size in space.share.group_sizes:
            for groups in range(1, space.share.max_groups + 1):
                yield Proposal(
                    "window",
                    num_removed=count,
                    group_size=group_size,
                    group_start=_start(space, num_blocks - count),
                    num_groups=groups,
                    adapter_rank=min(space.share.adapter_ranks),
                )


def _unreachable(space: Space, table: CostTable, target: Target, budget: Budget) -> str:
    plan, cost = smallest(space, table, target)
    words = []
    if budget.memory_bytes is not None:
        words.append(f"{budget.memory_bytes / GB:.6g} GB")
    if budget.flops is not None:
        words.append(f"{budget.flops:.4g} FLOPs per token")
    return (
        f"no plan of the space '{space.name}' keeps the budget of {' and '.join(words)}: its smallest reaches "
        f"{cost.memory_bytes / GB:.4f} GB and {cost.flops:.4g} FLOPs per token with a plan such as '{plan}'. "
        f"Raise the budget, shorten the context ({target.context} tokens), or let the space remove more "
        f"(removal, now up to {space.removal[1]:g})."
    )


class RandomSuggest:
    """Independent random suggestions, for counting and for tests."""

    def __init__(self, seed: int) -> None:
        import random

        self._rng = random.Random(seed)

    def integer(self, name: str, low: int, high: int) -> int:
        """Uniform."""
        return low + int(self._rng.random() * (high - low + 1))

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Uniform, or uniform in its logarithm."""
        if log:
            return min(max(math.exp(self._rng.uniform(math.log(low), math.log(high))), low), high)
        return self._rng.uniform(low, high)

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """Uniform."""
        return options[int(self._rng.random() * len(options))]
