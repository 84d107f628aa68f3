"""Who is next: what screening promoted and baselines, then the sampler and neighbours of the front, at last what a
report still needs.

Where plans were screened (see `foldsearch.search.screening`) the best of them come first, then that criterion of the
space which did best there, then baselines of the criteria that were not screened: those that take minutes to answer.

Baselines are each criterion of the space with nothing shared, at the fewest dropped blocks that keep the budget (a
fifth of the blocks where dense keeps it already). They are never halved, so the search is never worse than the
criteria of its space are by themselves, and a report can say by how much it is better. Where no budget cuts the space,
a start follows: the first criterion at the most blocks it may remove, the far end of the front. It may be halved.

When the trials or seconds of the study are spent, the search closes: at the most promising counts of the front (the
knee's first, then by the hypervolume that its points add; `CLOSING_COUNTS` of them), each criterion whose plan has
not reached the last rung gets a trial beyond those asked for, and it is not halved either. Not so a criterion
that was screened: it was compared with the search at several counts.
"""

from __future__ import annotations

import math
import time
from typing import Any

from ray.tune.search import Searcher

from foldsearch.fates import fate_named
from foldsearch.machine import MACS_PER_SECOND, num_cpus
from foldsearch.paths import command
from foldsearch.plan.front import contributions, knee, normalise
from foldsearch.proposal import Proposal
from foldsearch.record import Trial, front, point
from foldsearch.search.outcome import ALIKE_FAILURES, failing_alike
from foldsearch.search.pace import Pace
from foldsearch.search.records import Records
from foldsearch.search.screened import Promoted, compared_criteria
from foldsearch.spec.propose import baseline, baseline_count, baseline_fits, first_trials, is_baseline

CLOSING_COUNTS = 2
CLOSING_ROUNDS = 2  # closing trials may move the front to other counts: look again, where time allows
BEFORE_RIVAL = 2  # promoted plans that are trained first: the best one and the knee


class Line:
    """The line of trials of one run: hands out the next one until the search is over.

    Limits count what earlier processes of the same run did. The time is that of asking the dense model and of all that
    comes after it.
    """

    def __init__(
        self,
        records: Records,
        *,
        promoted: Promoted = Promoted(),  # noqa: B008  # it is frozen
        closing: float = 0.0,
        token_seconds: float = 0.0,
    ) -> None:
        """Queues what a new run begins with: the plans that screening promoted, else the baselines.

        Args:
            records: of the run.
            promoted: what of the plans that were screened is to be trained.
            closing: seconds of its time that are kept for what comes after the last trial.
            token_seconds: see `Pace`; 0 where it is not known.
        """
        self.records = records
        run = records.run
        self.study = run.study
        self._before = records.elapsed
        self._began = time.monotonic()
        self._closing_seconds = closing
        self._failed_before = {trial.number for trial in records.all() if trial.state == "failed"}
        self.is_over = False  # a trial was cut: its next step would have ended after the time is up
        self._since: dict[int, float] = {}  # trials that run: when they began, or ended their latest rung
        job_macs = MACS_PER_SECOND * max(1.0, num_cpus() / self.study.jobs)
        self.pace = Pace(run, token_seconds or (run.dense.prefill_macs + run.table.head_macs) / job_macs)
        self.pace.look_at(records.all())
        if not records.all():
            self._begin(promoted)

    def _begin(self, promoted: Promoted) -> None:
        line = [self.records.screened(plan) for plan in promoted.plans]
        if promoted.rival is not None:
            # Criteria were compared with what was promoted: the best is trained, to see what that is worth. Early,
            # so that a run of little time says it too.
            line.insert(BEFORE_RIVAL, self.records.baseline(*promoted.rival))
        run, space = self.records.run, self.records.space
        for criterion, count, origin in first_trials(space, run.table, run.target, run.budget):
            if not promoted.plans or (origin == "baseline" and criterion not in compared_criteria(space)):
                line.append(self.records.baseline(criterion, count, origin=origin))
        self.records.put_in_line(line)

    # ---- the clock

    def elapsed(self) -> float:
        """Seconds of this run so far, over all its processes."""
        return self._before + time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until the time of trials is up."""
        if self.study.seconds is None:
            return math.inf
        return self.study.seconds - self._closing_seconds - self.elapsed()

    @property
    def deadline(self) -> float | None:
        """When the time is up, by the monotonic clock, which all processes of a machine share.

        The clock of the wall may be set while the run goes on: a trial would be cut too early, or never.
        """
        return None if self.study.seconds is None else time.monotonic() + self.left

    def began(self, number: int) -> None:
        """A trial begins, or has ended a rung."""
        self._since[number] = time.monotonic()
        self.pace.look_at(self.records.all())

    # ---- who is next

    def next(self, *, num_running: int) -> tuple[int, Proposal] | None:
        """Number and proposal of the next trial; None if there is none, or none before a running one ends.

        A trial begins if it can reach the last rung in the time that is left. The first ones begin in any case: what
        they measure until the time is up is better than nothing.
        """
        known = self.records.all()
        if self.is_over or self.left <= 0 or self._failing():
            return None
        first = not any(trial.state == "finished" for trial in known)
        if self.records.anyone_waits:
            return self.records.ask() if first or self._next_seconds() <= self.left else None
        if self._may_begin(known, first=first):
            return self.records.ask()
        if num_running and self.study.seconds is None:
            return None  # it may still move the front; where time is short, nobody waits for it
        missing = self._closing(known)
        if self.study.seconds is not None:
            missing = [one for one in missing if self._baseline_seconds(*one) <= self.left][:1]
        self.records.put_in_line([self.records.baseline(*one, closing=True) for one in missing])
        return self.records.ask() if missing else None

    def _closing(self, known: list[Trial]) -> list[tuple[str, int]]:
        most = CLOSING_ROUNDS * CLOSING_COUNTS * len(self.records.space.criteria)
        # Those that were compared before anything was trained are not compared again.
        done = compared_criteria(self.records.space) if self.records.num_promoted else frozenset()
        missing = [one for one in missing_baselines(self.records) if one[0] not in done]
        return missing[: max(0, most - sum(trial.closing for trial in known))]

    def _may_begin(self, known: list[Trial], *, first: bool) -> bool:
        if self.study.trials is not None:
            begun = sum(trial.is_trial and not trial.closing for trial in known)
            if begun >= self.study.trials:
                return False
        if self.study.seconds is None or first:
            return True
        # This trial, what runs, and what closing would take if the search ended after it, are to fit the time left.
        mine = self._typical()
        work = mine + self._under_way() + sum(self._baseline_seconds(*one) for one in self._closing(known))
        return mine <= self.left and work / self.study.jobs <= self.left

    # ---- how long it takes

    def planned(self) -> int | None:
        """Trials this run will have, as far as is known now; None where only seconds (or nothing) end it."""
        if self.study.trials is None:
            return None
        known = [trial for trial in self.records.all() if trial.is_trial]
        closing = sum(trial.closing for trial in known)
        return closing + max(self.study.trials, len(known) - closing)  # queued baselines are run in any case

    def remaining(self) -> float | None:
        """Seconds to the end of the search, at the pace measured so far; None where only Ctrl-C ends it."""
        planned = self.planned()
        if planned is None:
            return None if self.study.seconds is None else max(0.0, self.left)
        known = self.records.all()
        under_way = self._under_way()
        running = sum(trial.state == "running" for trial in known)
        to_begin = max(0, planned - running - sum(trial.is_trial and trial.ended for trial in known))
        expected = (under_way + to_begin * self._typical()) / self.study.jobs
        return max(0.0, min(max(expected, under_way / max(1, running)), self.left))

    def _next_seconds(self) -> float:
        """Of the trial that is next in line; of a typical one where that is not known."""
        known = self.records.next_in_line()
        return self._typical() if known is None else self.pace.whole(known[0], first_rung=known[1])

    def _typical(self) -> float:
        """Seconds of a trial that nobody stops: of a baseline, with its share of the gates that are trained."""
        space, run = self.records.space, self.records.run
        count = baseline_count(space, run.table, run.target, run.budget)
        count = max(1, space.counts(run.num_blocks)[0]) if count is None else count
        criteria = space.criteria
        every = [self.pace.whole(baseline(space, name, count, run.num_blocks)) for name in criteria]
        return sum(every) / len(every)

    def _baseline_seconds(self, criterion: str, count: int) -> float:
        """Of a closing trial; a plan that is known takes no time."""
        plain = baseline(self.records.space, criterion, count, self.records.run.num_blocks)
        return 0.0 if self.records.foretell(plain) is not None else self.pace.whole(plain)

    def _under_way(self) -> float:
        """Seconds that the running trials have before them."""
        total = 0.0
        for trial in self.records.all():
            if trial.state == "running" and trial.proposal is not None:
                whole = self.pace.whole(trial.proposal, first_rung=len(trial.results))
                since = time.monotonic() - self._since.get(trial.number, time.monotonic())
                total += max(whole - since, 0.1 * whole)  # longer than expected: something is still to come
        return total

    # ---- in words

    def begin_words(self) -> str:
        """What cannot be done in the time, before it begins; empty where all can."""
        seconds, again = self.study.seconds, command("resume", self.records.run.path, "--time")
        if seconds is None:
            return ""
        if self.left <= 0:
            kept = clock(self._closing_seconds) if self.elapsed() < seconds else ""
            kept = f", but for {kept} to measure the dense model in fewer bits" if kept else ""
            return f"the {clock(seconds)} of this run are spent{kept}, so nothing begins. Give it more: {again} T"
        one, rungs = self._next_seconds(), f"{self.study.rungs[-1]:,} tokens"
        if one > self.left:
            return (
                f"a whole trial takes about {clock(one)} here, but {clock(self.left)} are left: no trial is likely to "
                f"reach the last rung ({rungs}). What is measured until then is kept; give it more time ({again} T), "
                "or take smaller rungs."
            )
        fitting = int(self.left * self.study.jobs / one)
        if self.study.trials is not None and fitting < self.study.trials:
            return (
                f"a whole trial takes about {clock(one)} here, so about {fitting} of {self.study.trials} reach the "
                f"last rung in {clock(self.left)}."
            )
        return ""

    def end_words(self) -> str:
        """Why the search ended before its limits, and what the time left out; empty where neither is so."""
        if reason := self._failing():
            return (
                f"The search was stopped, as the last {ALIKE_FAILURES} trials failed for the same reason: {reason}\n"
                "Mend it before you go on."
            )
        if self.study.seconds is None:
            return ""
        known = self.records.all()
        words = []
        if cut := [str(trial.number) for trial in known if trial.state == "cut"]:
            words.append(f"trial {', '.join(cut)} did not end")
        if waiting := sum(trial.state == "waiting" for trial in known):
            words.append(f"{waiting} of those to begin with did not begin")
        elif left_out := self._closing(known):
            shown = ", ".join(f"{name.replace('_', ' ')} at {count} blocks" for name, count in left_out)
            words.append(f"of the comparison at the end this was left out: {shown}")
        if not words:
            return ""
        again = command("resume", self.records.run.path, "--time")
        return f"Not all fits into {clock(self.study.seconds)}: {'; '.join(words)}. Go on with: {again} T"

    def _failing(self) -> str:
        """The reason for which trials of this process fail one after the other; earlier ones may have been mended."""
        return failing_alike([r for r in self.records.all() if r.number not in self._failed_before])


def clock(seconds: float) -> str:
    """Minutes and seconds, 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def missing_baselines(records: Records) -> list[tuple[str, int]]:
    """Criteria and counts that the front ends on, and whose plans have not reached the last rung."""
    known = records.all()
    done = {
        (removed.criterion, removed.count)
        for trial in known
        if trial.proposal is not None and (removed := trial.removed) is not None
        if is_baseline(trial.proposal, records.space, records.run.num_blocks)
        if trial.state in ("finished", "failed") or trial.exempt
    }
    return [
        (criterion, count)
        for count in _promising(records, known)
        for criterion in records.space.criteria
        if (criterion, count) not in done
    ]


def _promising(records: Records, known: list[Trial]) -> list[int]:
    ends = front(known, records.objectives)
    if not ends:
        return []
    points = [point(trial, records.objectives) for trial in ends]
    added = contributions(normalise(points), [1.1] * len(points[0]))
    order = (knee(points), *sorted(range(len(points)), key=lambda i: -added[i]))
    space, run = records.space, records.run
    allowed = space.every_count(run.num_blocks)
    fate = fate_named(
        space.fates[0]
    )  # of the baselines: how many blocks one would remove to get as far as the plan
    counts = dict.fromkeys(len(fate.undo(ends[i].plan)[0]) for i in order)
    terms = (run.table, run.target, run.budget)
    return [c for c in counts if c and c in allowed and baseline_fits(space, c, *terms)][:CLOSING_COUNTS]


class Proposer(Searcher):
    """Tune's side of it: a searcher over the line. It keeps nothing that the study does not know."""

    def __init__(self, line: Line, probe: Proposal | None = None) -> None:
        """`line`: hands out the trials. `probe`: what the worker of the first one is to train for a step before it."""
        super().__init__()
        self._line = line
        self._probe = probe
        self._running: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """Config of the next trial; None: not now; FINISHED: never again.

        As many at a time as the study's jobs and no more: Tune would ask for one more than can run, and that one
        would be proposed without the results of those that run.
        """
        if len(self._running) >= self._line.study.jobs:
            return None
        asked = self._line.next(num_running=len(self._running))
        if asked is None:
            return None if self._running else str(Searcher.FINISHED)
        number, proposal = asked
        self._running.add(trial_id)
        probe, self._probe = self._probe, None
        return {
            "number": number,
            "proposal": proposal.to_json(),
            "probe": None if probe is None else probe.to_json(),
        }

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Make room for the next one; the study has been told by then."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
