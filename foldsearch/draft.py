"""From a proposal to a plan: its criterion chooses the blocks, its fate says what becomes of them, and the price
decides whether the plan is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from foldsearch.bound import lower_bound
from foldsearch.context import TrialContext, open_workbench
from foldsearch.criteria import Choice, Question, criterion_of
from foldsearch.model.evidence import attention_order
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import TrialResult
from foldsearch.progress import StageProgress
from foldsearch.proposal import Fold, Given, Proposal, Removed, fold_plan


def choose_blocks(removed: Removed, context: TrialContext, say: StageProgress) -> Choice:
    """The blocks that a criterion removes, and what is told of how they were found."""
    study = context.study
    return criterion_of(removed.criterion).choose(
        Question(
            bench=open_workbench(context, say),
            count=removed.count,
            most=study.space.counts(len(context.table.blocks))[1],
            setting=removed.setting,
            seed=study.seed,
            gate_steps=study.gates.steps,
            fitted_tokens=study.starts.tokens,
            say=say,
        )
    )


class Draft(NamedTuple):
    """The plan of a proposal, and what is told of how its blocks were found."""

    plan: FoldPlan
    gates: dict[str, Any] | None = None


def choose_plan(fold: Fold | Given, context: TrialContext, say: StageProgress) -> Draft:
    """The plan that a proposal comes to on this model, whatever it costs."""
    if isinstance(fold, Given):
        return Draft(fold.plan)
    chosen = Choice(())
    bases: Mapping[int, int] = {}
    order: Sequence[int] = ()
    if fold.removed is not None:
        chosen = choose_blocks(fold.removed, context, say)
        bases = fold.removed.fate.bases(open_workbench(context, say), chosen.blocks, say)
    if fold.attention_removed:
        order = attention_order(open_workbench(context, say).evidence(say))
    plan = fold_plan(chosen.blocks, fold, len(context.table.blocks), bases=bases, attention_order=order)
    return Draft(plan, None if chosen.summary is None else dict(chosen.summary))


def draft(proposal: Proposal, context: TrialContext, say: StageProgress) -> Draft | TrialResult:
    """The proposal as a plan that fits; or the result that says it does not."""
    cost = lower_bound(proposal, context.table, context.target)
    if context.budget.admits(cost) or proposal.origin == "hand":
        drafted = choose_plan(proposal.fold, context, say)
        cost = price(drafted.plan, context.table, context.target)
        if context.budget.admits(cost) or proposal.origin == "hand":
            return drafted
    else:  # never built; the plan only shows the counts
        removed = range(proposal.removed.count if proposal.removed else 0)
        bases = dict.fromkeys(removed, len(removed))
        drafted = Draft(fold_plan(removed, proposal.fold, len(context.table.blocks), bases=bases))
    over = {name: share for name, share in context.budget.violations(cost).items() if share > 0}
    reason = "; ".join(f"{name} is {share:.1%} above the budget" for name, share in over.items())
    return TrialResult(drafted.plan, cost, None, 0, False, 0, 0.0, "infeasible", reason, gates=drafted.gates)
