"""Which plan that a search may propose takes the most memory in training, as far as counts tell."""

from __future__ import annotations

from dataclasses import replace

from foldsearch.errors import PlanError
from foldsearch.plan.cost import Budget, CostTable, Target
from foldsearch.plan.plan import UNITS, FoldPlan
from foldsearch.proposal import Fold, Given, Proposal, RecoveryChoice, fold_plan
from foldsearch.spec.fit import can_run, held_removal, repair
from foldsearch.spec.propose import RandomSuggest, propose
from foldsearch.spec.space import Space
from foldsearch.spec.study import Study

DRAWN = 1000  # random proposals, of which the largest is taken
TRAINED_BYTES = 16  # of a trained parameter: itself, its gradient and two moments, in float32
LAST = 3  # blocks that are trained where the last ones are


def largest_to_train(
    study: Study, space: Space, table: CostTable, target: Target, budget: Budget
) -> Proposal | None:
    """The plan that takes the most memory in a step of training, of `DRAWN` proposals that may keep the budget.

    It is only to be trained for a step: which blocks go is an example. A plan that shares weights runs more blocks than
    one of equal bytes that drops them, so the largest one is not the one with the most bytes.

    Args:
        study: whose batches and seed these are.
        space: narrowed to the budget.
        table: the dense model's costs.
        target: of the run.
        budget: of the run.

    Returns:
        None where no drawn proposal comes to a plan that can be folded.
    """
    suggest, num_blocks = RandomSuggest(study.seed), len(table.blocks)
    tokens = study.recovery.batch * study.splits.sequence_length
    most, largest = 0, None
    for _ in range(DRAWN):
        drawn = repair(propose(suggest, space, num_blocks), space, table, target, budget)
        plan = None if drawn is None else _example(drawn, table, target)
        if drawn is None or plan is None or not can_run(plan, table, target.storing(drawn.types)):
            continue
        choice = replace(drawn.recovery, delta_rank=max(space.recover.delta_ranks))
        if (needed := training_bytes(plan, choice, table, tokens)) > most:
            most, largest = needed, Proposal(Given(plan), choice, drawn.origin, drawn.types)
    return largest


def training_bytes(plan: FoldPlan, choice: RecoveryChoice, table: CostTable, tokens: int) -> int:
    """Bytes that a step of training takes beside the weights, to compare plans by: what each executed block keeps for
    the way back, and what is trained.

    Args:
        plan: that is trained.
        choice: how.
        table: the dense model's costs.
        tokens: of the step.
    """
    trained = 0
    for name in UNITS:
        for position, slot, source, is_own in plan.runs(name):
            unit = getattr(table.blocks[source], name)
            if not is_own:
                trained += slot.rank * unit.adapter_width
            elif choice.trains == "deltas":
                trained += choice.delta_rank * unit.adapter_width
            elif choice.trains == "healed" or position >= plan.depth - LAST:
                trained += unit.weights
    return TRAINED_BYTES * trained + 4 * tokens * plan.depth * table.activation_width


def _example(proposal: Proposal, table: CostTable, target: Target) -> FoldPlan | None:
    """A plan that a proposal may come to, whichever blocks its criterion would choose; None where this one is none."""
    if not isinstance(proposal.fold, Fold):
        return proposal.plan
    num_blocks = len(table.blocks)
    last = range(num_blocks - (proposal.removed.count if proposal.removed else 0), num_blocks)
    removed = held_removal(last, table, target)
    bases = dict.fromkeys(removed, 0)
    try:
        return fold_plan(removed, proposal.fold, num_blocks, bases=bases, attention_order=range(num_blocks))
    except PlanError:
        return None


def too_large_words(proposal: Proposal, study: Study, happened: str) -> str:
    """What to say where memory does not hold a step of the largest plan.

    Args:
        proposal: as `largest_to_train` returns it.
        study: of the run.
        happened: instead, as the end of a clause.
    """
    assert proposal.plan is not None, "it holds its plan"
    remedies = ["fewer jobs"] * (study.jobs > 1)
    remedies += smaller_steps(study)
    remedies += ["lower ranks (recover.delta_ranks)"] * (len(study.space.recover.delta_ranks) > 1)
    return (
        f"a step of training has to fit into memory, but that of the largest plan which may be proposed "
        f"({proposal.plan.depth} blocks run, deltas of rank {proposal.recovery.delta_rank}) {happened}. Trials like it "
        f"will fail; smaller ones may fit. Less is taken by {', '.join(remedies)}."
    )


def smaller_steps(study: Study) -> list[str]:
    """What makes a step of training smaller, as remedies."""
    smaller = ["smaller batches (recovery.batch)"] * (study.recovery.batch > 1)
    return [*smaller, "shorter sequences (splits.sequence_length)"]
