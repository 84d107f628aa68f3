"""One trial, rung by rung: draft → fold → heal → measure → recover a little → measure → recover more.

It knows neither Optuna nor Ray and can run alone in one process. What it learnt is on disk after every rung (see
`foldsearch.record`), so a trial that was stopped or killed goes on from its last rung when it is run again. What is
reported, rebuilt and exported is the best state so far, so that recovery never makes a result worse; and where it hurt,
training goes on from that state too, at a lower learning rate.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from foldsearch.context import TrialContext, open_workbench
from foldsearch.draft import draft
from foldsearch.errors import InputError, bytes_asked, describe_error, is_out_of_memory
from foldsearch.machine import Machine
from foldsearch.model.recover import Diverged, Recovery, load_trained, merge, saved_of
from foldsearch.model.training import RecoveryTraining
from foldsearch.plan.cost import Target
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality, RungResult, Setback, trained_for
from foldsearch.progress import CountProgress, StageProgress, TimeUp, silent
from foldsearch.proposal import Proposal, RecoveryChoice
from foldsearch.rebuild import (
    attached,
    check_state,
    folded_model,
    healing_of,
    kept_model,
    trained_before,
)
from foldsearch.record import FolderPeers, Trial, begun_as, read_trial
from foldsearch.run import TrialFolder
from foldsearch.shipped import judged
from foldsearch.spec.study import Study

EXTENSION_NEXT_TOKEN = 0.5  # weight of the next-token loss for extensions, where the study does not say
MEASURING, REPORTING = "measuring", "measuring on report tokens"  # stages
SAVE_SECONDS = 60  # of training, after which its state is written: so much is lost where it is killed
RATE_AFTER_SETBACK = 0.25  # of the learning rate, where training left the model worse than it was


def run_trial(
    proposal: Proposal, context: TrialContext, *, number: int, progress: StageProgress = silent
) -> Iterator[Trial]:
    """Run one trial; yields it as it stands after every rung, and may be closed at any yield.

    A trial whose folder holds earlier rungs goes on after the last of them and yields only what is new. A plan that
    another trial has measured is not trained again: its results are taken, and if that trial was stopped early, or its
    training diverged, this one goes on: from where that one stopped if it would train in the same way, else from the
    untrained model, with its own settings. What cannot fit or runs out of memory ends the trial with a state that says
    so. Where the training diverges, the best state before it is the trial's result; where there is none, it failed.

    Args:
        proposal: what to try. number: of the trial; names its folder.
        progress: told the stage and its share.
    """
    began = time.perf_counter()
    if context.threads:
        torch.set_num_threads(context.threads)
    folder = context.run.trial(number)
    trial = read_trial(folder)
    if trial is None:
        drafted, excess = draft(proposal, context, progress)
        trial = Trial(number, "infeasible" if excess else "running", proposal, drafted, reason=excess)
        if trial.ended:
            yield trial
            return
    peers = context.peers or FolderPeers(context.run)
    with peers.hold(trial) as (free, known):
        if known is not None and known.results:
            taken = list(_take(trial, known, all_of_them=not free))
            yield from taken
            trial = taken[-1] if taken else trial
            if not free or trial.ended:
                return
            trained = bool(trial.results) and trial.last.recovery_tokens > 0
            state = (folder.start, folder.recovered, folder.optimizer) if trained else (folder.start,)
            peers.copy(known.number, folder, [path.name for path in state])
            # What the owner has let go of is made again here, and kept: it is this trial's from now on.
            files = {name: digest for name, digest in known.files.items() if (folder.path / name).exists()}
            trial = replace(trial, files=files)
        # The plan is this trial's from here on, also where another one began it and was stopped.
        if free:
            peers.take(trial)
        if trial.ended:
            return  # nothing is left to do
        yield from go_on(trial, context, folder, progress, began)


def go_on(
    trial: Trial, context: TrialContext, folder: TrialFolder, progress: StageProgress, began: float
) -> Iterator[Trial]:
    """Train a trial from its latest result to the last rung of the study; yields it after every rung.

    Args:
        trial: as it stands.
        context: of its run.
        folder: that holds its state, and is given the new one.
        progress: told the stage and its share.
        began: when the work on it began, by `time.perf_counter`.
    """
    spent = trial.last.seconds if trial.results else 0.0
    try:
        course = Course(trial, context, folder, progress)
        if not trial.results:
            trial = replace(trial, healing=healing_of(folder))
        while not trial.ended:
            result, reason = course.to_rung(len(trial.results))
            result = replace(result, seconds=spent + time.perf_counter() - began)
            is_last = bool(reason) or len(trial.results) + 1 == len(context.study.rungs)
            trial = replace(
                trial,
                results=(*trial.results, result),
                state="finished" if is_last else "running",
                reason=reason,
            ).kept_in(folder, Machine.here(context.device))
            if is_last and folder.before is None:
                folder.optimizer.unlink(missing_ok=True)
            yield trial
    except (Diverged, InputError, MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        yield replace(trial, state="failed", reason=_reason(error))


def _take(trial: Trial, known: Trial, *, all_of_them: bool) -> Iterator[Trial]:
    """The trial with what another one of the same plan has measured, rung by rung: what holds for it, or all."""
    told = known.results if all_of_them else known.worth(trial)
    whole = known.state == "finished" and len(told) == len(known.results)
    for count in range(1, len(told) + 1):
        yield replace(
            trial,
            healing=known.healing,
            results=tuple(replace(result, known_from=known.number) for result in told[:count]),
            state="finished" if whole and count == len(told) else "running",
            reason=known.reason if whole and count == len(told) else "",
        )


def _reason(error: BaseException) -> str:
    """Why a trial could not go on; anything that is our own fault is raised again."""
    if isinstance(error, Diverged):
        return f"diverged: {error}"
    if is_out_of_memory(error):
        asked = bytes_asked(error)
        return f"failed: out of memory{f', asking for {asked}' if asked else ''}: {describe_error(error)}"
    if isinstance(error, InputError):
        return f"failed: {error}"
    raise error


def training_of(study: Study, plan: FoldPlan, choice: RecoveryChoice) -> RecoveryTraining:
    """How the model of a plan is trained in a study, with what its proposal chose."""
    wanted = study.recovery.next_token
    if wanted is None:
        # Text draws a model away from the dense one, most of all where that is at a loss: wrong for a folded
        # model, which is to be like it, and right for an extension, which is to become better.
        wanted = EXTENSION_NEXT_TOKEN if plan.is_extension else 0.0
    return RecoveryTraining(
        learning_rate=choice.learning_rate,
        delta_rank=choice.delta_rank,
        trains=choice.trains,
        next_token=wanted,
        kl=study.recovery.kl,
        tail=study.recovery.tail,
        batch=study.recovery.batch,
        seed=study.seed,
    )


class Course:
    """The model of one trial on its way through the rungs: trained, measured, and the best of its states kept.

    Best is by `trained_for`, on the search tokens; of equals the first. The folder's `recovered` holds the best state,
    unless that is untrained; its `optimizer` the latest, which training goes on from if it is the best. If it
    is not, the learning rate was too high for this model: training goes on from the best state at a quarter of the
    rate. (To go on from the worse one was worse in every case tried, and so was the old rate; see docs/decisions/0010.)
    """

    def __init__(self, trial: Trial, context: TrialContext, folder: TrialFolder, say: StageProgress) -> None:
        self._trial, self._context, self._folder, self._say = trial, context, folder, say
        self._bench = open_workbench(context, say)
        random.seed(context.study.seed)
        torch.manual_seed(context.study.seed)
        self._model = folded_model(trial, context, folder, say)
        self._recovery: Recovery | None = None
        self._best: Quality | None = None
        self._before = trained_before(folder)
        self._kept_tokens = 0
        self._saved_at = time.monotonic()
        self._results = list(trial.results)
        if self._results:
            self._best, self._kept_tokens = trial.quality, trial.last.kept_tokens
            check_state(trial, folder)
        elif context.study.rungs[0] > 0:
            # No rung measures the untrained model, but training is not to end worse than it.
            untrained = self._measure()
            self._best = untrained if math.isfinite(untrained.kl) else None

    def to_rung(self, rung: int) -> tuple[RungResult, str]:
        """Train until the rung: the best state so far, and how the training diverged, empty where it did not.

        Raises:
            Diverged: there is no state with a finite KL.
        """
        latest: Quality | None = None
        diverged = ""
        try:
            latest = self._latest(self._context.study.rungs[rung])
        except Diverged as error:
            if self._best is None:
                raise
            diverged = _reason(error)
        assert self._best is not None, "what was measured has a finite KL"
        done = self._tokens_done
        is_last = bool(diverged) or rung == len(self._context.study.rungs) - 1
        report = self.report() if is_last else None
        if self._recovery is not None and self._kept_tokens == done:
            # Last, so that a trial killed before its result is noted can nearly always be rebuilt at the rung before.
            self._recovery.keep(self._folder.recovered)
        setback = None if self._kept_tokens == done else Setback(self._kept_tokens, latest)
        result = RungResult(self._best, done, 0.0, report, setback)  # the caller knows the seconds
        self._results.append(result)
        return result, diverged

    @property
    def _target(self) -> Target:
        """With the weights that the trial is stored in."""
        return self._context.target.storing(self._trial.types)

    @property
    def _rate(self) -> float:
        """Share of the proposal's learning rate to train at: less with every rung that hurt."""
        return RATE_AFTER_SETBACK ** sum(result.setback is not None for result in self._results)

    @property
    def _tokens_done(self) -> int:
        return self._recovery.tokens_done if self._recovery else self._before

    def _latest(self, tokens: int) -> Quality:
        """Quality after so many recovery tokens; the state is kept if it is the best one."""
        if tokens > self._before:
            self._train(tokens)
        quality = self._measure()
        if not math.isfinite(quality.kl):
            raise Diverged(
                f"the folded model's KL is {quality.kl} after {tokens} tokens of recovery at learning rate "
                f"{self._trial.recovery.learning_rate:g}. Lower the learning rate, or compute in float32."
            )
        plan = self._trial.plan
        if self._best is None or trained_for(plan, quality) < trained_for(plan, self._best):
            self._best, self._kept_tokens = quality, self._tokens_done
        return quality

    def _train(self, tokens: int) -> None:
        study, trial = self._context.study, self._trial
        if self._recovery is None:
            training = training_of(study, trial.plan, trial.recovery)
            bench = self._bench
            assert bench.recovery is not None, "the study has a rung that trains"
            self._recovery = Recovery(
                self._model, training, bench.trained, bench.recovery, study.rungs[-1], self._before
            )
            self._recovery.of = begun_as(trial)
            if saved_of(self._folder.optimizer) == self._recovery.of:
                self._recovery.load(self._folder.optimizer)  # it may be ahead of the record
            self._recovery.rate = self._rate
        last = self._results[-1] if self._results else None
        # What was saved last before training diverged lies before the tokens of the result.
        if last is not None and last.setback is not None and self._tokens_done <= last.recovery_tokens:
            self._go_back(self._recovery)
        try:
            self._recovery.train(tokens, self._after_step)
        except TimeUp:  # in the middle of a rung: a resumed run goes on from here
            self._recovery.save(self._folder.optimizer)
            raise
        self._recovery.save(self._folder.optimizer)

    def _after_step(self, share: float) -> None:
        self._say("recovery", share)
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            assert self._recovery is not None
            self._recovery.save(self._folder.optimizer)
            self._saved_at = time.monotonic()

    def _go_back(self, recovery: Recovery) -> None:
        """Take up the kept state: the untrained one as it is attached anew, another one as it was written."""
        model = folded_model(self._trial, self._context, self._folder, silent)
        kept = attached(model, self._trial, self._context)
        if self._kept_tokens > self._before:
            load_trained(kept, self._folder.recovered)
        recovery.go_back(kept, self._rate)

    def _measure(self) -> Quality:
        self._say(MEASURING, 0.0)
        model = self._merged() if self._target.rounds else self._model
        return judged(model, self._context, "search", self._target, self._measured(MEASURING))

    def _measured(self, stage: str) -> CountProgress:
        """A listener to a measurement, which is let finish when the time is up: it is what that was spent for."""

        def say(done: int, total: int) -> None:
            with suppress(TimeUp):
                self._say(stage, done / total)

        return say

    def _merged(self) -> PreTrainedModel:
        """The model as it is now, what is trained merged: built again, as merging cannot be undone."""
        model = folded_model(self._trial, self._context, self._folder, silent)
        if self._recovery is not None:
            for name, value in attached(model, self._trial, self._context).items():
                value.data.copy_(self._recovery.trained[name].data)
        return merge(model)

    def report(self) -> Quality:
        """Quality of the kept state on the report tokens."""
        if self._kept_tokens != self._tokens_done:
            model = kept_model(self._trial, self._context, self._folder, self._kept_tokens)
            model = merge(model) if self._target.rounds else model
        else:
            model = self._merged() if self._target.rounds else self._model
        return judged(model, self._context, "report", self._target, self._measured(REPORTING))
