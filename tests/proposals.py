"""Proposals in one line, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from foldsearch.fates import Drop, Fate
from foldsearch.plan.plan import AdapterStart, FoldPlan
from foldsearch.proposal import Fold, Given, Groups, Origin, Proposal, RecoveryChoice, Removed, fold_plan


def removing(
    criterion: str,
    count: int,
    fate: Fate = Drop(),  # noqa: B008  # it is frozen
    *,
    groups: Groups | None = None,
    attention: int = 0,
    origin: Origin = "sampler",
    **recovery: Any,
) -> Proposal:
    """A criterion at a count; gates with the usual eps; what is not said as it is by default."""
    setting = 0.5 if criterion == "gate" else None
    removed = Removed(criterion, count, fate, setting)
    return Proposal(Fold(removed, groups, attention), RecoveryChoice(**recovery), origin)


def given(
    plan: FoldPlan, *, start: AdapterStart | None = "svd", origin: Origin = "sampler", **recovery: Any
) -> Proposal:
    """A plan that says it all."""
    return Proposal(Given(plan, start), RecoveryChoice(**recovery), origin)


def count_of(proposal: Proposal) -> int:
    """Blocks that its criterion removes."""
    return 0 if proposal.removed is None else proposal.removed.count


def criterion_in(proposal: Proposal) -> str:
    """Its criterion's name; empty where it has none."""
    return "" if proposal.removed is None else proposal.removed.criterion


def groups_of(proposal: Proposal) -> Groups | None:
    """Its groups."""
    return proposal.fold.groups if isinstance(proposal.fold, Fold) else None


def ordered_plan(
    proposal: Proposal, orders: Mapping[str, Sequence[int]], num_blocks: int, *, base: int | None = None
) -> FoldPlan:
    """The plan of a proposal whose criterion takes the first of a known order."""
    removed = orders.get(criterion_in(proposal), ())[: count_of(proposal)]
    bases = None if base is None else dict.fromkeys(removed, base)
    return fold_plan(removed, proposal.fold, num_blocks, bases=bases)


def retrained(proposal: Proposal, **changes: Any) -> Proposal:
    """The proposal with another recovery training."""
    return replace(proposal, recovery=replace(proposal.recovery, **changes))


def changed(proposal: Proposal, *, groups: Groups | None = None, **changes: Any) -> Proposal:
    """The proposal with other removed blocks, and these groups."""
    assert isinstance(proposal.fold, Fold)
    assert proposal.fold.removed is not None
    removed = replace(proposal.fold.removed, **changes)
    return replace(proposal, fold=replace(proposal.fold, removed=removed, groups=groups))
