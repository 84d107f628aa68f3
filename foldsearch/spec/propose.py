"""From a space to proposals: what the sampler is asked, and the baselines that every run begins with."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foldsearch.bound import lower_bound
from foldsearch.criteria import criterion_of
from foldsearch.fates import Option, Suggest
from foldsearch.plan.cost import Budget, CostTable, Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import StoredTypes
from foldsearch.proposal import Fold, Groups, Origin, Proposal, RecoveryChoice, Removed
from foldsearch.spec.space import Space

DENSE_FITS_SHARE = 0.2  # of the blocks, which a baseline removes where the budget asks for none


def propose(suggest: Suggest, space: Space, num_blocks: int, *, origin: Origin = "sampler") -> Proposal:
    """One proposal of the space; a parameter is asked for only where it means something.

    Args:
        suggest: answers by name.
        space: what may be proposed; `for_width` has been at its ranks.
        num_blocks: of the dense model.
        origin: recorded in the proposal.
    """
    fewest, most = space.counts(num_blocks)
    count = suggest.integer("num_removed", fewest, most, step=space.step)
    removed = _propose_removed(suggest, space, count) if count else None
    fewest_thin, most_thin = space.attention_counts(num_blocks, count)
    if not count and not space.groups.max_groups:  # something changes
        fewest_thin = max(fewest_thin, min(1, most_thin))
    thinned = suggest.integer("attention_removed", fewest_thin, most_thin) if most_thin else 0
    groups = None
    if removed is None or removed.fate.has_groups:
        groups = _propose_groups(suggest, space, num_blocks - count, 0 if count or thinned else 1)
    recovery = propose_recovery(suggest, space)
    return Proposal(Fold(removed, groups, thinned), recovery, origin, propose_types(suggest, space))


def _propose_removed(suggest: Suggest, space: Space, count: int) -> Removed:
    criterion = suggest.choice("criterion", space.criteria)
    key = criterion_of(criterion).setting_key
    setting = suggest.choice(key, space.settings(criterion)) if key else None  # type: ignore[type-var]
    fate = suggest.choice("fate", space.fates) if len(space.fates) > 1 else space.fates[0]
    return Removed(criterion, count, space.table(fate).propose(suggest), setting)


def _propose_groups(suggest: Suggest, space: Space, num_kept: int, fewest: int) -> Groups | None:
    groups = space.groups
    count = suggest.integer("num_groups", min(fewest, groups.max_groups), groups.max_groups)
    if not count:
        return None
    size = suggest.choice("group_size", groups.group_sizes)
    start = groups.start_at(suggest.number("group_start", *groups.start), num_kept)
    return Groups(count, size, start, suggest.choice("adapter_rank", groups.adapter_ranks))


def propose_recovery(suggest: Suggest, space: Space) -> RecoveryChoice:
    """How to train, alone: all that is left to ask for a plan that is given."""
    learning_rate = suggest.number("learning_rate", *space.recover.learning_rate, log=True)
    rank = suggest.choice("delta_rank", space.recover.delta_ranks)
    trains = space.recover.trains
    # One choice is none: Optuna need not know of it.
    return RecoveryChoice(
        learning_rate, rank, trains[0] if len(trains) == 1 else suggest.choice("trains", trains)
    )


def propose_types(suggest: Suggest, space: Space) -> StoredTypes:
    """The types of weights and of the KV cache, where the space has several; empty is the target's."""
    return StoredTypes(
        suggest.choice("weights", space.weights) if space.weights else "",
        suggest.choice("kv_cache", space.kv_cache) if space.kv_cache else "",
    )


# ---- baselines


@dataclass(slots=True)
class Plain:
    """Answers with as little as is allowed, but for what is given; what it was asked and answered is in `answers`.

    Of whole numbers the least, of others the middle one (on a log scale if asked), of options the first.
    """

    given: dict[str, Any]
    answers: dict[str, Any] = field(default_factory=dict)

    def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """The least."""
        return self._note(name, low)

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """The middle one."""
        middle = math.sqrt(low * high) if log else (low + high) / 2
        return self._note(name, min(max(middle, low), high))

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """The first one."""
        return self._note(name, options[0])

    def _note(self, name: str, plain: Option) -> Option:
        answer = self.given.get(name, plain)
        self.answers[name] = answer
        return answer  # type: ignore[no-any-return]


def baseline(
    space: Space, criterion: str, count: int, num_blocks: int, *, setting: float | None = None
) -> Proposal:
    """A criterion at a count with the space's first fate in its simplest form, and as little else as the space allows.

    Args:
        space: what may be proposed; `for_width` has been at its ranks.
        criterion: one of the space's.
        count: blocks to remove, 1 or more.
        num_blocks: of the dense model.
        setting: of the criterion; None is the middle one of the space's.
    """
    return propose(plain_answers(space, criterion, count, setting), space, num_blocks, origin="baseline")


def plain_answers(space: Space, criterion: str, count: int, setting: float | None = None) -> Plain:
    """What a baseline answers; arguments as for `baseline`."""
    given = {"num_removed": count, "criterion": criterion, "delta_rank": space.recover.middle_rank}
    if key := criterion_of(criterion).setting_key:
        given[key] = space.middle_setting(criterion) if setting is None else setting
    return Plain(given)


def is_baseline(proposal: Proposal, space: Space, num_blocks: int) -> bool:
    """Whether a proposal asks for what a baseline of the space does, whatever its criterion's own setting."""
    removed = proposal.removed
    if removed is None or removed.criterion not in space.criteria:
        return False
    plain = baseline(space, removed.criterion, removed.count, num_blocks, setting=removed.setting)
    return proposal.fold == plain.fold


def baseline_fits(space: Space, count: int, table: CostTable, target: Target, budget: Budget) -> bool:
    """Whether a baseline that removes so many blocks keeps the budget, as far as counts tell."""
    plain = baseline(space, space.criteria[0], count, len(table.blocks))
    return budget.admits(lower_bound(plain, table, target))


def baseline_count(space: Space, table: CostTable, target: Target, budget: Budget) -> int | None:
    """Blocks that a baseline removes; None where removing alone cannot keep the budget."""
    num_blocks = len(table.blocks)
    fewest, most = space.counts(num_blocks)
    if budget.admits(price(FoldPlan.identity(num_blocks), table, target)):
        fewest = min(most, max(fewest, round(DENSE_FITS_SHARE * num_blocks)))
    counts = (count for count in space.every_count(num_blocks) if count >= max(1, fewest))
    return next((count for count in counts if baseline_fits(space, count, table, target, budget)), None)


def first_trials(
    space: Space, table: CostTable, target: Target, budget: Budget
) -> list[tuple[str, int, Origin]]:
    """Criterion, blocks to remove and origin of what every run begins with, however few trials are asked for.

    Args:
        space: narrowed to the budget.
    """
    count = baseline_count(space, table, target, budget)
    if count is None:
        return []
    found: list[tuple[str, int, Origin]] = [(name, count, "baseline") for name in space.criteria]
    _, most = space.counts(len(table.blocks))
    if most > count and budget.admits(price(FoldPlan.identity(len(table.blocks)), table, target)):
        found.append((space.criteria[0], most, "start"))
    return found


class RandomSuggest:
    """Independent random suggestions, for counting and for tests."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        """Uniform."""
        return low + step * int(self._rng.random() * ((high - low) // step + 1))

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Uniform, or uniform in its logarithm."""
        if log:
            return min(max(math.exp(self._rng.uniform(math.log(low), math.log(high))), low), high)
        return self._rng.uniform(low, high)

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        """Uniform."""
        return options[int(self._rng.random() * len(options))]
