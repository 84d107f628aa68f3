"""One step of training of the largest plan that a search may propose, before its first trial: does memory hold it?

A trial trains only after its blocks were chosen, its model healed and measured, and the first trials need not be the
largest; so that memory is too small would else be known after an hour.
"""

from __future__ import annotations

from contextlib import suppress

import torch

from foldsearch.context import TrialContext, open_workbench
from foldsearch.errors import InputError, bytes_asked, is_out_of_memory
from foldsearch.model.fold import fold
from foldsearch.model.recover import Diverged, Recovery
from foldsearch.progress import StageProgress, silent
from foldsearch.proposal import Proposal
from foldsearch.spec.largest import too_large_words
from foldsearch.trial import training_of


def probe_memory(proposal: Proposal, context: TrialContext, say: StageProgress = silent) -> str:
    """Train the plan of a proposal for one step, as a trial would, and forget it.

    Args:
        proposal: with its plan.
        context: of the run, whose recovery texts are trained on.
        say: told the stage.

    Returns:
        What to say where memory does not hold the step, nor two halves of it; empty where it does.
    """
    say("probing memory", 0.0)
    happened = ""
    try:
        _train_a_step(proposal, context, say)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked = bytes_asked(error)
        happened = f"asked for {asked}, which memory did not have" if asked else "did not"
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # not in the handler: its error holds on to what the step had
    if not happened:
        return ""
    halves = ", nor did two halves of it fit" if context.study.recovery.batch > 1 else ""
    return too_large_words(proposal, context.study, f"{happened}{halves}")


def _train_a_step(proposal: Proposal, context: TrialContext, say: StageProgress) -> None:
    bench, study, plan = open_workbench(context, say), context.study, proposal.plan
    assert plan is not None, "it holds its plan"
    assert bench.recovery is not None, "the study has a rung that trains"
    if context.threads:
        torch.set_num_threads(context.threads)
    training = training_of(study, plan, proposal.recovery)
    # What the loss comes to, or that there is nothing to train, is for a trial to tell.
    with suppress(Diverged, InputError):
        recovery = Recovery(fold(bench.dense, plan), training, bench.trained, bench.recovery, study.rungs[-1])
        recovery.train(training.batch * study.splits.sequence_length)
