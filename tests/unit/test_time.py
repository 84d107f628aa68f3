"""A time limit is a promise: who begins, who is cut, and what is told, on a clock that the test turns.

Oracle: a simulation of lanes whose trials take declared seconds a rung.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from foldsearch.errors import SpecError
from foldsearch.progress import TimeUp
from foldsearch.run import Run
from foldsearch.search import proposer, run, worker
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records, read_trials
from tests.fake_driver import study
from tests.fake_trial import NUM_BLOCKS, ORDERS, TABLE, trial_at
from tests.proposals import ordered_plan


class Clock(SimpleNamespace):
    """Stands for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    turned = Clock()
    monkeypatch.setattr(proposer, "time", turned)
    return turned


def new_records(path: Path, **changes: object) -> Records:
    # the tokens of these rungs take 10, 30 and 60 s where a forward pass takes 2.4 ms a token
    settings = {"jobs": 2, "sampler": "random", "halving": {"keep": 1.0}, "rungs": [0, 2730, 6830]}
    asked = study(**{**settings, **changes})
    with Run.draft(path) as draft:
        return Records(Run(draft, asked, TABLE).begin(path))


def simulate(line: Line, clock: Clock, rung_seconds: tuple[float, ...]) -> list[tuple[float, float | None]]:
    """Run to the end; returns the elapsed seconds and what was said to remain, after every event."""
    records, rungs = line.records, len(rung_seconds)
    lanes: list[tuple[float, int, int]] = []
    told = []
    while True:
        while len(lanes) < line.study.jobs and (asked := line.next(num_running=len(lanes))) is not None:
            number = asked[0]
            line.began(number)
            first = len(records.get(number).results)
            heapq.heappush(lanes, (clock.now + rung_seconds[first], number, first))
        told.append((line.elapsed(), line.remaining()))
        if not lanes:
            return told
        if line.deadline is not None and lanes[0][0] > line.deadline:
            clock.now = line.deadline
            for _, number, _ in lanes:
                records.cut(number, "the time was up in its recovery")
            lanes = []
            continue
        clock.now, number, rung = heapq.heappop(lanes)
        proposal = records.get(number).proposal
        assert proposal is not None
        plan = ordered_plan(proposal, ORDERS, NUM_BLOCKS, base=0)
        trial = trial_at(plan, line.study, rung, proposal, number)
        ends = itertools.accumulate(rung_seconds)
        results = (replace(one, seconds=end) for one, end in zip(trial.results, ends, strict=False))
        records.record(replace(trial, results=tuple(results)))
        line.began(number)
        if rung == rungs - 1:
            records.finish(number)
        else:
            heapq.heappush(lanes, (clock.now + rung_seconds[rung + 1], number, rung + 1))


@pytest.mark.parametrize("token_seconds", [1e-5, 0.0024, 1.0])  # far too quick, about right, far too slow
def test_what_begins_ends_in_time_whatever_was_thought_before(
    tmp_path: Path, clock: Clock, token_seconds: float
) -> None:
    """Two lanes, 100 s a trial, 480 s: eight trials at most; one lane may lose its last hundred seconds."""
    records = new_records(tmp_path / "run", seconds=480.0, trials=14)
    line = Line(records, token_seconds=token_seconds)
    told = simulate(line, clock, (10.0, 30.0, 60.0))
    assert told[-1][0] <= 480
    states = [record.state for record in records.all()]
    assert states.count("finished") >= 6
    assert not any(
        record.state == "cut" for record in records.all()
    )  # the pace was known when the last ones began
    # while there is much time left, nothing else is said, once a result is there to tell the pace
    ends = told[-1][0]
    for elapsed, remaining in told:
        assert remaining is not None
        if 0 < elapsed < ends - 100:
            assert remaining > 20


def test_time_is_kept_for_what_comes_after_the_trials(tmp_path: Path, clock: Clock) -> None:
    records = new_records(tmp_path / "run", seconds=480.0, trials=14)
    line = Line(records, token_seconds=0.0024, closing=130.0)
    assert line.left == 350
    told = simulate(line, clock, (10.0, 30.0, 60.0))
    assert 250 <= told[-1][0] <= 350
    assert line.elapsed() == told[-1][0]


def test_closing_trials_that_do_not_fit_are_left_out_and_said(tmp_path: Path, clock: Clock) -> None:
    records = new_records(tmp_path / "run", seconds=330.0, trials=6, budget={})
    line = Line(records, token_seconds=0.0024)
    simulate(line, clock, (10.0, 30.0, 60.0))
    assert line.elapsed() <= 330
    left_out = proposer.missing_baselines(records)
    assert left_out
    words = line.end_words()
    assert "Not all fits into 5:30: " in words
    criterion, count = left_out[0]
    assert f"{criterion.replace('_', ' ')} at {count} blocks" in words


def test_a_time_too_short_for_one_trial_is_said_and_gives_what_it_can(tmp_path: Path, clock: Clock) -> None:
    records = new_records(tmp_path / "run", seconds=60.0)
    line = Line(records, token_seconds=0.0024, spent=10.0)
    assert "no trial is likely to reach the last rung (6,830 tokens)" in line.begin_words()
    assert line.left == 50
    simulate(line, clock, (10.0, 30.0, 60.0))
    assert line.elapsed() == 60
    begun = [record for record in records.all() if record.results]
    assert [record.state for record in begun] == ["cut", "cut"]
    assert [len(record.results) for record in begun] == [2, 2]
    assert records.front() == []
    assert read_trials(records.run) == records.all()
    assert "trial 0, 1 did not end; 2 of those to begin with did not begin" in line.end_words()

    # with more time, the run goes on with them, from their last rung
    folder = records.run.with_limits(records.run.study.model_copy(update={"seconds": 1000.0}))
    again = Records(folder)
    again.note_elapsed(60.0)
    more = Line(again, token_seconds=0.0024)
    simulate(more, clock, (10.0, 30.0, 60.0))
    known = again.all()
    assert [record.state for record in known[:4]] == ["finished"] * 4
    assert not any(record.state == "cut" for record in known)
    assert {record.number for record in again.front()} & {0, 1, 2, 3}


def test_without_a_limit_all_trials_run(tmp_path: Path, clock: Clock) -> None:
    records = new_records(tmp_path / "run", trials=9)
    line = Line(records)
    simulate(line, clock, (10.0, 30.0, 60.0))
    assert sum(record.is_trial and not record.closing for record in records.all()) == 9
    assert line.begin_words() == line.end_words() == ""


def test_a_worker_ends_its_trial_within_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 3 s that would end after the deadline is not begun."""
    turned = Clock()
    monkeypatch.setattr(worker, "time", turned)
    progress = worker._Progress(lambda phase, share: None, 1010.0)
    for turned.now in (1000.0, 1003.0, 1006.0):
        progress("recovery", 0.1)
    turned.now = 1009.0
    with pytest.raises(TimeUp, match="in its recovery"):
        progress("recovery", 0.2)
    turned.now = 1009.5
    worker._Progress(lambda phase, share: None, 1010.0)("measuring", 0.0)


def test_asking_for_longer_than_the_run_may_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = Clock()
    monkeypatch.setattr(run, "time", turned)
    asking = run._Asking(60.0)
    asking.check("reading the text", 0.0)
    turned.now += 500  # what comes before is not part of it
    asking.check("asking the dense model (search)", 0.1)
    turned.now += 3
    asking.check("asking the dense model (search)", 0.2)
    turned.now += 8
    with pytest.raises(SpecError, match=r"asking takes at least 5\d s|asking takes at least [67]\d s"):
        asking.check("asking the dense model (search)", 0.25)
