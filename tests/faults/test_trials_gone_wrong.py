"""Trials that go wrong by themselves: a row each with its reason, no second try where that would only fail again.

Oracle: the log into which the fake trial writes every rung that it begins.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from foldsearch.progress import TimeUp
from foldsearch.run import Run
from foldsearch.search import worker
from foldsearch.search.messages import Failed, Measured
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records, read_trials
from foldsearch.search.worker import TrialRunner
from tests.fake_driver import FAKES, study
from tests.fake_trial import TABLE, FakeContext
from tests.faults.test_every_write import executed, run_process


def begin(place: Path, faults: dict[str, Any], **settings: Any) -> Run:
    (place / "faults.json").write_text(json.dumps(faults))
    with Run.draft(place / "run") as draft:
        return Run(draft, study(**settings), TABLE).begin(place / "run")


def worker_of(run: Run, number: int, proposal: Any) -> TrialRunner:
    runner = TrialRunner.__new__(TrialRunner)
    config = {"number": number, "proposal": proposal.to_json()}
    runner.setup(config, FakeContext(run, run.path.parent / "cache", threads=1), FAKES["trial"], None, None)
    return runner


def test_each_is_a_row_with_its_reason_and_is_not_tried_again(tmp_path: Path) -> None:
    faults = {"0:1": "raise", "1:0": "exit", "2:1": "slow"}
    run = begin(tmp_path, faults, trials=5, trial_seconds=0.5)
    run_process(run)
    trials = read_trials(run)
    assert [trial.state for trial in trials[:4]] == ["failed", "failed", "failed", "finished"]
    assert trials[0].reason.startswith("RuntimeError: the fake breaks here")
    assert trials[1].reason == "SystemExit: 3"
    assert trials[2].reason == "timed out: a trial may take 0.5 s, and this one was still in its recovery"
    assert [len(trial.results) for trial in trials[:4]] == [1, 0, 1, 3]
    assert "in run_trial" in run.trial(1).error.read_text()
    assert set(executed(run).values()) == {1}


def test_a_worker_whose_trial_hangs_ends_itself_and_the_next_one_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that says nothing cannot be told to stop: it may wait inside of a library."""
    run = begin(tmp_path, {}, trials=5, trial_seconds=0.05)
    number, proposal = Records(run).ask()
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *told: killed.append(told))
    monkeypatch.setattr(worker, "LEAST_GRACE", 0.1)
    hanging = worker_of(run, number, proposal)
    assert isinstance(hanging._next(), Measured)
    until = time.monotonic() + 20
    while not killed and time.monotonic() < until:
        time.sleep(0.05)
    assert killed == [(os.getpid(), signal.SIGKILL)]
    hanging.cleanup()  # as the kernel lets go of a killed worker's lock
    told = worker_of(run, number, proposal)._next()
    assert isinstance(told, Failed)
    assert "this one said nothing for longer, so its worker was ended" in told.reason
    assert not run.trial(number).overdue.exists()


def test_a_trial_that_ends_in_time_leaves_no_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path, {}, trials=5, trial_seconds=0.1)
    monkeypatch.setattr(worker, "LEAST_GRACE", 0.1)
    monkeypatch.setattr(os, "kill", lambda *told: pytest.fail("the watch was left"))
    number, proposal = Records(run).ask()
    runner = worker_of(run, number, proposal)
    runner._next()
    runner.cleanup()
    time.sleep(0.4)


def test_the_clock_of_the_wall_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day on, or back: nobody is cut, and the time that is left stays what it is."""
    run = begin(tmp_path, {}, trials=5, seconds=1000.0)
    line = Line(Records(run))
    before = line.left
    for hours in (24, -24):
        real = time.time()
        monkeypatch.setattr(time, "time", lambda real=real, hours=hours: real + 3600 * hours)
        assert before - 100 < line.left <= before
        progress = worker._Progress(lambda phase, share: None, line.deadline)
        progress("recovery", 0.1)
        progress("recovery", 0.2)
    over = worker._Progress(lambda phase, share: None, time.monotonic() - 1)
    with pytest.raises(TimeUp):
        over("recovery", 0.3)
