"""Who is next: baselines first, then the sampler and neighbours of the front, at last what a report still needs.

Baselines are each criterion of the space with nothing shared, at the fewest dropped blocks that keep the budget (a
fifth of the blocks where dense keeps it already). They are never halved, so the search is never worse than the
criteria of its space are by themselves, and a report can say by how much it is better. Where no budget cuts the space,
a start follows: the first criterion at the most blocks it may remove, the far end of the front. It may be halved.

When the trials or seconds of the study are spent, the search closes: at the most promising counts of the front (the
knee's first, then by the hypervolume that its points add; `CLOSING_COUNTS` of them), each criterion whose plan has
not reached the last rung gets a trial beyond those asked for, and it is not halved either.
"""

from __future__ import annotations

import time
from typing import Any

from ray.tune.search import Searcher

from foldsearch.plan.front import contributions, knee, normalise
from foldsearch.plan.plan import FoldPlan, Replacement, Slot
from foldsearch.plan.proposal import Criterion, Fate, Proposal
from foldsearch.search.outcome import ALIKE_FAILURES, failing_alike
from foldsearch.search.records import Record, Records, front, point
from foldsearch.spec.space import baseline_fits, first_trials, is_baseline

CLOSING_COUNTS = 2
CLOSING_ROUNDS = 2  # closing trials may move the front to other counts: look again, where time allows


class Line:
    """The line of trials of one run: hands out the next one until the search is over.

    Limits count what earlier processes of the same run did.
    """

    def __init__(self, records: Records) -> None:
        """Queues the baselines where the run is new."""
        self.records = records
        self.study = records.folder.study
        self._before = records.elapsed
        self._began = time.monotonic()
        self._failed_before = {record.number for record in records.all() if record.state == "failed"}
        if not records.all():
            folder = records.folder
            begun_with = first_trials(records.space, folder.table, folder.target, folder.budget)
            for criterion, count, origin in begun_with:
                records.queue(criterion, count, origin=origin)

    def elapsed(self) -> float:
        """Seconds of this run so far, over all its processes."""
        return self._before + time.monotonic() - self._began

    def next(self, *, num_running: int) -> tuple[int, Proposal] | None:
        """Number and proposal of the next trial; None if there is none, or none before a running one ends."""
        known = self.records.all()
        if self._failing():
            return None
        if self.records.anyone_waits or self._may_begin(known):
            return self.records.ask()
        if num_running:
            return None
        late = self.study.seconds is not None and self.elapsed() >= self.study.seconds
        most = (1 if late else CLOSING_ROUNDS) * CLOSING_COUNTS * len(self.records.space.criteria)
        missing = missing_baselines(self.records)[: max(0, most - sum(record.closing for record in known))]
        for criterion, count in missing:
            self.records.queue(criterion, count, closing=True)
        return self.records.ask() if missing else None

    def planned(self) -> int | None:
        """Trials this run will have, as far as is known now; None where only seconds (or nothing) end it."""
        if self.study.trials is None:
            return None
        known = [record for record in self.records.all() if record.is_trial]
        closing = sum(record.closing for record in known)
        return closing + max(self.study.trials, len(known) - closing)  # queued baselines are run in any case

    def remaining(self) -> float | None:
        """Seconds to the end of the search, from the mean of the trials that ended; None before the first one."""
        known = self.records.all()
        took = [record.last.seconds for record in known if record.ended and record.last is not None]
        left = None if self.study.seconds is None else max(0.0, self.study.seconds - self.elapsed())
        planned = self.planned()
        if planned is None or not took:
            return left
        begun = sum(record.is_trial for record in known if record.ended)
        expected = max(0, planned - begun) * sum(took) / len(took) / self.study.jobs
        return expected if left is None else min(expected, left)

    def end_words(self) -> str:
        """Why the search ended before its limits; empty where it did not."""
        if reason := self._failing():
            return (
                f"The search was stopped, as the last {ALIKE_FAILURES} trials failed for the same reason: {reason}\n"
                "Mend it before you go on."
            )
        return ""

    def _failing(self) -> str:
        """The reason for which trials of this process fail one after the other; earlier ones may have been mended."""
        return failing_alike([r for r in self.records.all() if r.number not in self._failed_before])

    def _may_begin(self, known: list[Record]) -> bool:
        if self.study.trials is not None:
            begun = sum(record.is_trial and not record.closing for record in known)
            if begun >= self.study.trials:
                return False
        if self.study.seconds is None:
            return True
        whole = [
            record.last.seconds for record in known if record.state == "finished" and record.last is not None
        ]
        mean = sum(whole) / len(whole) if whole else 0.0
        # This trial, and what closing would take if the search ended after it, are to fit the time that is left.
        reserve = (1 + len(missing_baselines(self.records))) * mean / self.study.jobs
        return self.elapsed() + reserve < self.study.seconds


def missing_baselines(records: Records) -> list[tuple[Criterion, int]]:
    """Criteria and counts that the front ends on, and whose plans have not reached the last rung."""
    known = records.all()
    done = {
        (record.proposal.criterion, record.proposal.num_removed)
        for record in known
        if record.proposal is not None
        if is_baseline(record.proposal, records.space, records.folder.num_blocks)
        if record.state in ("finished", "failed") or record.exempt
    }
    return [
        (criterion, count)
        for count in _promising(records, known)
        for criterion in records.space.criteria
        if (criterion, count) not in done
    ]


def _promising(records: Records, known: list[Record]) -> list[int]:
    ends = [record.last for record in front(known, records.objectives) if record.last is not None]
    if not ends:
        return []
    points = [point(last, records.objectives) for last in ends]
    added = contributions(normalise(points), [1.1] * len(points[0]))
    order = (knee(points), *sorted(range(len(points)), key=lambda i: -added[i]))
    space, folder = records.space, records.folder
    fewest, most = space.counts(folder.num_blocks)
    counts = dict.fromkeys(_num_removed(ends[i].plan, space.fates[0]) for i in order)
    terms = (folder.table, folder.target, folder.budget)
    return [c for c in counts if max(1, fewest) <= c <= most and baseline_fits(space, c, *terms)][
        :CLOSING_COUNTS
    ]


def _num_removed(plan: FoldPlan, fate: Fate) -> int:
    """How many blocks a baseline whose removed blocks meet this fate would remove to get as far as the plan."""
    replaced = sum(slot.last - slot.first + 1 for slot in plan.slots if isinstance(slot, Replacement))
    children = sum(slot.mlp not in (None, slot.home) for slot in plan.slots if isinstance(slot, Slot))
    return len(plan.dropped) + replaced + (children if fate == "share" else 0)


class Proposer(Searcher):
    """Tune's side of it: a searcher over the line. It keeps nothing that the study does not know."""

    def __init__(self, line: Line) -> None:
        """`line`: hands out the trials."""
        super().__init__()
        self._line = line
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
        self._line.records.note_tune_id(number, trial_id)
        self._running.add(trial_id)
        return {"number": number, "proposal": proposal.to_json()}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Make room for the next one; the study has been told by then."""
        self._running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
