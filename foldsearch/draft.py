"""From a proposal to a plan: its criterion chooses the blocks, its fate says what becomes of them, and the price
decides whether the plan is built.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from foldsearch.context import TrialContext, open_workbench
from foldsearch.criteria import Choice, Question, criterion_of
from foldsearch.model.children import base_blocks
from foldsearch.model.evidence import attention_order
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.proposal import Proposal, fold_plan, lower_bound
from foldsearch.plan.result import TrialResult
from foldsearch.progress import StageProgress


def choose_blocks(proposal: Proposal, context: TrialContext, say: StageProgress) -> Choice:
    """The blocks that the proposal's criterion removes, and what is told of how they were found."""
    if not proposal.num_removed:
        return Choice(())
    criterion = criterion_of(proposal.criterion)
    study = context.study
    return criterion.choose(
        Question(
            bench=open_workbench(context, say),
            count=proposal.num_removed,
            most=study.space.counts(len(context.table.blocks))[1],
            setting=getattr(proposal, criterion.setting) if criterion.setting else None,
            seed=study.seed,
            gate_steps=study.gates.steps,
            fitted_tokens=study.starts.tokens,
            say=say,
        )
    )


def choose_plan(
    proposal: Proposal, context: TrialContext, say: StageProgress
) -> tuple[FoldPlan, dict[str, Any] | None]:
    """The plan of a proposal, and what is told of how its blocks were found."""
    if proposal.plan is not None:
        return proposal.plan, None
    chosen = choose_blocks(proposal, context, say)
    bases: dict[int, int] | None = None
    order: tuple[int, ...] = ()
    if proposal.fate == "share" and chosen.blocks:
        bases = base_blocks(open_workbench(context, say).base_distances(say), chosen.blocks)
    if proposal.attention_removed:
        order = attention_order(open_workbench(context, say).evidence(say))
    plan = fold_plan(chosen.blocks, proposal, len(context.table.blocks), bases=bases, attention_order=order)
    return plan, None if chosen.summary is None else dict(chosen.summary)


class Draft(NamedTuple):
    """A proposal's plan, which keeps the budget, and what is told of how its blocks were found."""

    plan: FoldPlan
    gates: dict[str, Any] | None


def draft(proposal: Proposal, context: TrialContext, say: StageProgress) -> Draft | TrialResult:
    """The proposal as a plan that fits; or the result that says it does not."""
    bound = lower_bound(proposal, context.table, context.target)
    gates = None
    if context.budget.admits(bound) or proposal.origin == "hand":
        plan, gates = choose_plan(proposal, context, say)
        cost = price(plan, context.table, context.target)
        if context.budget.admits(cost) or proposal.origin == "hand":
            return Draft(plan, gates)
    else:  # never built; the plan only shows the counts
        removed = range(proposal.num_removed)
        plan = fold_plan(
            removed,
            proposal,
            len(context.table.blocks),
            bases=dict.fromkeys(removed, proposal.num_removed),
        )
        cost = bound
    over = {name: share for name, share in context.budget.violations(cost).items() if share > 0}
    reason = "; ".join(f"{name} is {share:.1%} above the budget" for name, share in over.items())
    return TrialResult(plan, cost, None, 0, False, 0, 0.0, "infeasible", reason, gates=gates)
