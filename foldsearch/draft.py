"""From a proposal to a plan: its criterion chooses the blocks, its fate says what becomes of them, and the price
decides whether the plan is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from foldsearch.bound import lower_bound
from foldsearch.context import TrialContext, open_workbench
from foldsearch.criteria import Choice, Request, criterion_of
from foldsearch.model.evidence import attention_order
from foldsearch.plan.cost import price
from foldsearch.plan.stored import AS_TARGET, StoredTypes
from foldsearch.progress import StageProgress
from foldsearch.proposal import Fold, Given, Proposal, Removed, fold_plan
from foldsearch.record import Draft
from foldsearch.spec.fit import held_order, held_removal


def choose_blocks(removed: Removed, context: TrialContext, say: StageProgress) -> Choice:
    """The blocks that a criterion removes, and what is told of how they were found.

    Where the rest could not be folded, or the runtime could not hold it, the nearest choice (see `held_removal`).
    """
    study = context.study
    chosen = criterion_of(removed.criterion).choose(
        Request(
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
    return replace(chosen, blocks=held_removal(chosen.blocks, context.table, context.target))


def choose_plan(
    fold: Fold | Given, context: TrialContext, say: StageProgress, types: StoredTypes = AS_TARGET
) -> Draft:
    """What a proposal comes to on this model, whatever it costs; `types` are those that it is stored in."""
    target = context.target.storing(types)
    if isinstance(fold, Given):
        return Draft(fold.plan, price(fold.plan, context.table, target))
    chosen = Choice(())
    bases: Mapping[int, int] = {}
    order: Sequence[int] = ()
    if fold.removed is not None:
        chosen = choose_blocks(fold.removed, context, say)
        bases = fold.removed.fate.bases(open_workbench(context, say), chosen.blocks, say)
    if fold.attention_removed:
        asked = attention_order(open_workbench(context, say).evidence(say))
        order = held_order(asked, chosen.blocks, context.table)
    plan = fold_plan(chosen.blocks, fold, len(context.table.blocks), bases=bases, attention_order=order)
    cost = price(plan, context.table, target)
    return Draft(plan, cost, None if chosen.summary is None else dict(chosen.summary))


def draft(proposal: Proposal, context: TrialContext, say: StageProgress) -> tuple[Draft, str]:
    """What the proposal comes to, and by how much it is above the budget, in words; a plan typed by hand may be."""
    bound = lower_bound(proposal, context.table, context.target)
    if proposal.origin == "hand":
        return choose_plan(proposal.fold, context, say, proposal.types), ""
    if context.budget.admits(bound):
        drafted = choose_plan(proposal.fold, context, say, proposal.types)
        return drafted, context.budget.excess(drafted.cost)
    # Never built: the plan only shows the counts.
    removed = range(proposal.removed.count if proposal.removed else 0)
    bases = dict.fromkeys(removed, len(removed))
    plan = fold_plan(removed, proposal.fold, len(context.table.blocks), bases=bases)
    return Draft(plan, bound), context.budget.excess(bound)
