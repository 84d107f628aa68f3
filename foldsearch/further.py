"""Training of one trial beyond the last rung of its run, for as long as somebody likes.

It begins with the trial's model as the run left it, what was trained there merged, and has a folder of its own in the
trial's. Nothing of the run changes: there the trial stays what it was at the last rung, as all that is compared with it
was trained on as many tokens. The laws of recovery hold (docs/decisions/0010): the best state is kept, and after
training that hurt it goes on from that one at a lower rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from foldsearch.context import TrialContext
from foldsearch.errors import InputError, RunError
from foldsearch.machine import Machine
from foldsearch.model.recover import saved_tokens
from foldsearch.model.training import FurtherTraining, Trained
from foldsearch.paths import printable
from foldsearch.progress import StageProgress, TimeUp, silent
from foldsearch.record import Trial, read_trial
from foldsearch.run import TrialFolder
from foldsearch.trial import Course, go_on

STEPS = 8  # after which the model is measured, of the way to the last token
SHARE_MEASURED = 2  # a step trains on so many times the search tokens at least, which are measured after it


def recover_further(
    number: int,
    context: TrialContext,
    asked: FurtherTraining,
    *,
    progress: StageProgress = silent,
) -> Iterator[Trial]:
    """Train a trial that reached the last rung further; yields it, with all of its results, after every step.

    It may be closed or killed at any time: the same call goes on from the state that was written last.

    Args:
        number: of the trial.
        context: of its run.
        asked: how far, and how.
        progress: told the stage, and its share of this step.

    Raises:
        InputError: it was trained on as many tokens already, or by another `trains`.
        RunError: the trial was not measured.
    """
    began = time.perf_counter()
    if context.threads:
        torch.set_num_threads(context.threads)
    deadline = None if asked.seconds is None else time.monotonic() + asked.seconds
    place = context.run.trial(number)
    trial = _begun(number, place, context, asked.trains)
    if asked.tokens <= (done := trial.last.recovery_tokens):
        raise InputError(
            f"tokens are those in all, and must be more than the {done:,} that trial {number} was trained on; got "
            f"{asked.tokens:,}. Give more."
        )
    marks = marks_until(asked.tokens, trial, context)
    context = _with_rungs(context, trial, marks)
    trial = replace(trial, state="running", reason="")
    coming = list(marks)

    def say(stage: str, share: float) -> None:
        if stage != "recovery":
            progress(stage, share)
            return
        if deadline is not None and time.monotonic() > deadline:
            raise TimeUp("the time is up")
        progress(f"recovery until {coming[0]:,} tokens", share)

    try:
        for step in go_on(trial, context, place.further, say, began):
            trial, began = step, time.perf_counter()
            coming.pop(0)
            yield trial
    except TimeUp:
        yield _ended_here(trial, context, place.further, progress, began)


def marks_until(tokens: int, trial: Trial, context: TrialContext) -> tuple[int, ...]:
    """The tokens after which a trial's model is measured on its way to the last one, whenever it goes on."""
    splits, batch = context.study.splits, context.study.recovery.batch
    begin = trial.results[_rungs_of(trial, context) - 1].recovery_tokens
    step = max(SHARE_MEASURED * splits.search * splits.sequence_length, math.ceil((tokens - begin) / STEPS))
    step = math.ceil(step / (batch * splits.sequence_length)) * batch * splits.sequence_length
    done = trial.last.recovery_tokens
    return (*(mark for mark in range(begin + step, tokens, step) if mark > done), tokens)


def _rungs_of(trial: Trial, context: TrialContext) -> int:
    """How many of a trial's results are of its run."""
    known = read_trial(context.run.trial(trial.number))
    assert known is not None
    return len(known.results)


def _begun(number: int, place: TrialFolder, context: TrialContext, trains: Trained | None) -> Trial:
    """The trial as it stands: as it was trained further, or as the run left it."""
    known, earlier = read_trial(place), read_trial(place.further)
    if known is None or known.state != "finished":
        raise RunError(
            f"only a trial that reached the last rung can be trained further, but trial {number} of "
            f"'{printable(context.run.path)}' did not. Name another one."
        )
    if earlier is not None:
        if trains not in (None, earlier.recovery.trains):
            raise InputError(
                f"training that goes on trains what it began with, and trial {number} was trained further by "
                f"'{earlier.recovery.trains}'; got '{trains}'. Take that, or remove "
                f"'{printable(place.further.path)}' to begin anew."
            )
        return earlier
    recovery = replace(known.recovery, trains=trains or known.recovery.trains)
    assert known.proposal is not None
    return replace(known, proposal=replace(known.proposal, recovery=recovery), files={})


def _with_rungs(context: TrialContext, trial: Trial, marks: tuple[int, ...]) -> TrialContext:
    """The context of a run whose rungs are those that the trial has passed, and these."""
    rungs = (*(result.recovery_tokens for result in trial.results), *marks)
    study = context.study.model_copy(update={"rungs": rungs})
    return replace(context, run=replace(context.run, study=study))


def _ended_here(
    trial: Trial, context: TrialContext, folder: TrialFolder, progress: StageProgress, began: float
) -> Trial:
    """The trial at the tokens that it has come to when the time was up."""
    done = saved_tokens(folder.optimizer)
    if done > trial.last.recovery_tokens:
        (trial,) = go_on(trial, _with_rungs(context, trial, (done,)), folder, progress, began)
        return trial
    last = replace(trial.last, report=Course(trial, context, folder, progress).report())
    ended = replace(trial, results=(*trial.results[:-1], last), state="finished")
    return ended.kept_in(folder, Machine.here(context.device))
