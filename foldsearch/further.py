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
from foldsearch.model.recover import saved_tokens, saved_trains
from foldsearch.model.training import FurtherTraining
from foldsearch.paths import printable
from foldsearch.progress import StageProgress, TimeUp, silent
from foldsearch.record import Trial, read_trial
from foldsearch.run import Run, TrialFolder
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

    Nothing where it has come so far already. It may be closed or killed at any time: the same call goes on from the
    state that was written last.

    Args:
        number: of the trial.
        context: of its run.
        asked: how far, and how.
        progress: told the stage, and its share of this step.

    Raises:
        InputError: it was trained on more tokens already, or by another `trains`.
        RunError: the trial was not measured.
    """
    began = time.perf_counter()
    if context.threads:
        torch.set_num_threads(context.threads)
    deadline = None if asked.seconds is None else time.monotonic() + asked.seconds
    place = context.run.trial(number)
    # to the end of a whole step: the learning rate falls until there, and a card tells how far it came
    asked = replace(asked, tokens=_in_steps(asked.tokens, context))
    trial = standing(context.run, number, asked)
    if is_done(trial, context.run, asked):
        return
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
    splits = context.study.splits
    begin = trial.results[_rungs_of(trial, context) - 1].recovery_tokens
    step = max(SHARE_MEASURED * splits.search * splits.sequence_length, math.ceil((tokens - begin) / STEPS))
    step = _in_steps(step, context)
    done = trial.last.recovery_tokens
    return (*(mark for mark in range(begin + step, tokens, step) if mark > done), tokens)


def _in_steps(tokens: int, context: TrialContext) -> int:
    """So many tokens, up to the end of the last step that trains on them."""
    of_step = context.study.recovery.batch * context.study.splits.sequence_length
    return math.ceil(tokens / of_step) * of_step


def _rungs_of(trial: Trial, context: TrialContext) -> int:
    """How many of a trial's results are of its run."""
    known = read_trial(context.run.trial(trial.number))
    assert known is not None
    return len(known.results)


def standing(run: Run, number: int, asked: FurtherTraining) -> Trial:
    """The trial as it stands: as it was trained further, or as the run left it.

    Args:
        run: the folder of its run.
        number: of the trial.
        asked: how far it is to be trained, and how.

    Raises:
        InputError: it was trained on more tokens already, or by another `trains`.
        RunError: the trial was not measured.
    """
    place = run.trial(number)
    known, earlier = read_trial(place), read_trial(place.further)
    if known is None or known.state != "finished":
        raise RunError(
            f"only a trial that reached the last rung can be trained further, but trial {number} of "
            f"'{printable(run.path)}' did not. Name another one."
        )
    # Training that was stopped before it was measured has left its state alone.
    begun = saved_trains(place.further.optimizer) if earlier is None else earlier.recovery.trains
    if begun is not None and asked.trains not in (None, begun):
        raise InputError(
            f"training that goes on trains what it began with, and trial {number} was trained further by "
            f"'{begun}'; got '{asked.trains}'. Take that, or remove "
            f"'{printable(place.further.path)}' to begin anew."
        )
    if earlier is None:
        assert known.proposal is not None
        recovery = replace(known.recovery, trains=asked.trains or begun or known.recovery.trains)
        trial = replace(known, proposal=replace(known.proposal, recovery=recovery), files={})
    else:
        trial = earlier
    done = trial.last.recovery_tokens
    if asked.tokens <= done and not is_done(trial, run, asked):
        raise InputError(
            f"tokens are those in all, and must be more than the {done:,} that trial {number} was trained on; got "
            f"{asked.tokens:,}. Give more."
        )
    return trial


def is_done(trial: Trial, run: Run, asked: FurtherTraining) -> bool:
    """Whether a trial that was trained further has come to the end that is asked for, which is that of a whole step."""
    step = run.study.recovery.batch * run.study.splits.sequence_length
    beyond = trial.last.recovery_tokens - asked.tokens
    return run.trial(trial.number).further.record.exists() and trial.ended and 0 <= beyond < step


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
