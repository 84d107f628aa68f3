"""The search with real Ray and trials that need no model; drivers and workers are really killed.

Oracles: the log into which the fake trial writes every rung it executes, and the Optuna study as read from its file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from foldsearch import cache, cli
from foldsearch.errors import BudgetError, RunError
from foldsearch.machine import gpu_share
from foldsearch.paths import command
from foldsearch.record import Trial
from foldsearch.run import Run
from foldsearch.search import events
from foldsearch.search.records import Records, read_trials
from foldsearch.search.run import run_search
from foldsearch.search.storage import STUDY_NAME
from tests.fake_driver import FAKES, study
from tests.fake_trial import TABLE
from tests.faults.test_every_write import run_process

ROOT = Path(__file__).resolve().parents[2]


def executed(run: Path) -> Counter[str]:
    """How often each "trial:rung" was executed."""
    return Counter(line.split()[0] for line in (run / "executed.log").read_text().splitlines())


def stored(run: Path) -> list[optuna.trial.FrozenTrial]:
    link = run.parent / f"{os.getpid()}.db"  # a name that a URL takes as it is
    link.unlink(missing_ok=True)
    link.symlink_to(run / "storage.db")
    return optuna.load_study(study_name=STUDY_NAME, storage=f"sqlite:///{link}").get_trials()


def check_whole(run: Path) -> list[Trial]:
    """Laws of a run that is over: every trial ended, and every rung of it was recorded once."""
    assert {trial.state for trial in stored(run)} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    trials = read_trials(Run.open(run))
    assert all(len(trial.results) == 3 for trial in trials if trial.state == "finished")
    tokens = [0, 100, 400]
    for trial in trials:
        assert [result.recovery_tokens for result in trial.results] == tokens[: len(trial.results)]
    return trials


def test_measuring_the_rivals_is_a_part_of_a_runs_time(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what was written down before they were measured, and a pause in place of that."""
    kept: list[float] = []
    run = tmp_path / "run"

    def measure_rivals(*_: object, **__: object) -> None:
        kept.append(Records(Run.open(run)).elapsed)
        time.sleep(0.5)

    monkeypatch.setattr("foldsearch.shipped.measure_rivals", measure_rivals)
    # The fake context has no model to look at before the first trial.
    monkeypatch.setattr(
        "foldsearch.search.run._is_real",
        lambda context: run.exists() and bool(Records(Run.open(run)).front()),
    )
    run_search(study(trials=1), str(run), **FAKES)
    (before,) = kept
    assert Records(Run.open(run)).elapsed >= before + 0.5


def test_a_search_end_to_end_with_a_killed_worker_and_a_broken_trial(
    shared_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faults.json").write_text(json.dumps({"2:1": "kill", "5:1": "raise"}))
    monkeypatch.setattr(cache, "MOST_BYTES", 10)
    kept = [tmp_path / "cache" / "states" / f"{number:016x}.bin" for number in range(2)]
    for age, path in enumerate(kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(8))
        os.utime(path, (1000 + age, 1000 + age))
    run = tmp_path / "run"
    told: list[events.Event] = []
    capfd.readouterr()
    run_search(study(), run, on_event=told.append, **FAKES)
    records = check_whole(run)

    # of the cache, as much as is over its bound went, the least recently used first
    assert [path.exists() for path in kept] == [False, True]
    assert any(isinstance(event, events.Notice) and "kept within" in event.text for event in told)

    # the trial that broke is a row with its reason, and was not tried again
    assert records[5].state == "failed"
    assert records[5].reason.startswith("RuntimeError: the fake breaks here")
    assert "the fake breaks here" in (run / "trials" / "00005" / "error.txt").read_text()
    times = executed(run)
    assert times["5:1"] == 1

    # the worker that was killed was replaced, and its trial went on from its last rung
    assert [event.number for event in told if isinstance(event, events.TrialRetried)] == [2]
    assert (times["2:0"], times["2:1"], times["2:2"]) == (1, 2, 1)
    assert records[2].state == "finished"

    # what a trial starts from is large, and kept where it can be exported
    kept = {path.parent.name for path in run.glob("trials/*/start.safetensors")}
    ended = {
        state: {f"{r.number:05d}" for r in records if r.state == state and r.known_from is None}
        for state in ("finished", "stopped")
    }
    assert ended["stopped"]
    assert ended["finished"] <= kept
    assert not ended["stopped"] & kept

    assert {name: count for name, count in times.items() if count > 1} == {"2:1": 2}

    # the library and Ray print nothing
    assert capfd.readouterr().out == ""

    # who began, ended; in this order
    kinds = [type(event).__name__ for event in told]
    assert kinds[:2] == ["Preparing", "SearchStarted"]
    done = told[-1]
    assert isinstance(done, events.SearchDone)
    states = Counter(record.state for record in records)
    assert (done.num_finished, done.num_stopped, done.num_failed) == (
        states["finished"],
        states["stopped"],
        states["failed"],
    )
    ends = [event.trial.number for event in told if isinstance(event, events.TrialEnded)]
    assert sorted(ends) == list(range(len(records)))
    progress = [event for event in told if isinstance(event, events.Progress)]
    assert progress[-1].num_ended == progress[-1].planned == len(records)
    assert progress[-1].remaining_seconds == 0

    # trials were asked for as configured, and the closing ones come on top
    assert sum(not record.closing for record in records) == 9
    assert [record.proposal.origin for record in records[:4] if record.proposal] == ["baseline"] * 4

    # a run that is over can be given more trials
    run_search(study(trials=10), run, resume=True, **FAKES)
    more = check_whole(run)
    assert more[: len(records)] == records
    assert sum(not record.closing for record in more) == 10


@pytest.mark.slow
def test_the_same_seed_on_one_worker_gives_the_same_proposals(shared_ray: None, tmp_path: Path) -> None:
    """Shorter and without Ray: `test_records.py`; killed in between: `tests/faults`."""
    proposals = []
    for name in ("one", "other"):
        run_search(study(), tmp_path / name, **FAKES)
        proposals.append([record.proposal for record in check_whole(tmp_path / name)])
    assert proposals[0] == proposals[1]


def test_two_at_a_time(shared_ray: None, tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_text(json.dumps({"0:0": "wait for trial 1"}))
    run = tmp_path / "what? now 100% #1 [x] {0}"  # Ray and SQLite take URLs elsewhere
    told: list[events.Event] = []
    run_search(study(jobs=2, trials=4), run, on_event=told.append, **FAKES)
    check_whole(run)
    assert set(executed(run).values()) == {1}
    began = [event.trial.number for event in told if isinstance(event, events.TrialStarted)]
    assert began[:2] == [0, 1]
    assert min(told.index(event) for event in told if isinstance(event, events.TrialEnded)) > next(
        i
        for i, event in enumerate(told)
        if isinstance(event, events.TrialStarted) and event.trial.number == 1
    )


def test_a_worker_that_dies_between_two_trials_loses_neither(shared_ray: None, tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_text(json.dumps({"0:2": "kill at its end"}))
    run, told = tmp_path / "run", list[events.Event]()
    run_search(study(trials=4), run, on_event=told.append, **FAKES)
    records = check_whole(run)
    assert [event.number for event in told if isinstance(event, events.TrialRetried)] == [1]
    assert not any(record.state == "failed" for record in records)
    assert set(executed(run).values()) == {1}

    # undisturbed, and without Ray
    (tmp_path / "faults.json").write_text("{}")
    with Run.draft(tmp_path / "other") as draft:
        other = Run(draft, study(trials=4), TABLE).begin(tmp_path / "other")
    run_process(other)
    assert [record.proposal for record in read_trials(other)] == [r.proposal for r in records]


def test_trials_that_all_fail_alike_end_the_search_with_a_code_of_its_own(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line. The failures differ in a number only; a run that goes on may have been mended."""
    faults, run = tmp_path / "faults.json", tmp_path / "run"
    faults.write_text(json.dumps({"*:0": "raise"}))
    monkeypatch.setattr("foldsearch.search.run.run_search", partial(run_search, **FAKES))
    monkeypatch.setattr(cli, "_study", lambda args: study(trials=30))
    assert cli.main(["run", "--out", str(run)]) == 3
    records = check_whole(run)
    assert [record.state for record in records] == ["failed"] * 10
    told = capsys.readouterr()
    assert "stopped, as the last 10 trials failed for the same reason: RuntimeError: the fake" in told.out
    assert "10 failed, 0 on the front" in told.out
    assert re.search(r"error: .* none: 10 of 10 trials failed, all alike: RuntimeError: the fake", told.err)
    assert "foldsearch pick" not in told.out

    faults.write_text("{}")
    assert cli.main(["resume", str(run), "--trials", "12"]) == 0
    assert [record.state for record in check_whole(run)[10:12]].count("failed") == 0


def test_a_trial_that_the_time_cuts_is_on_no_front_and_goes_on_with_more_time(
    shared_ray: None, tmp_path: Path
) -> None:
    """Its first rung would take a minute; the run has six seconds."""
    (tmp_path / "faults.json").write_text(json.dumps({"seconds": 60}))
    run = tmp_path / "run"
    told: list[events.Event] = []
    run_search(study(seconds=6.0, trials=4), run, on_event=told.append, **FAKES)
    done = told[-1]
    assert isinstance(done, events.SearchDone)
    assert (done.num_finished, done.front) == (0, ())
    assert "Not all fits into 0:06: trial 0 did not end; 3 of those to begin with did not begin" in done.words
    record = read_trials(Run.open(run))[0]
    assert [event.trial for event in told if isinstance(event, events.TrialEnded)] == [record]
    assert (record.state, record.results) == ("cut", ())
    assert "the time was up in its recovery" in record.reason

    (tmp_path / "faults.json").write_text("{}")
    run_search(study(seconds=1000.0, trials=4), run, resume=True, **FAKES)
    records = check_whole(run)
    assert [record.state for record in records[:4]] == ["finished"] * 4


@pytest.mark.parametrize("said", ["disk full", pytest.param("disk full, in words", marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_search_and_loses_nothing(shared_ray: None, tmp_path: Path, said: str) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text(json.dumps({"2:1": said}))
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"(?s)No space left on device.*foldsearch resume"):
        run_search(study(trials=4), run, **FAKES)
    states = [record.state for record in read_trials(Run.open(run))]
    assert states == ["finished", "finished", "running", "waiting"]
    faults.write_text("{}")
    run_search(None, run, resume=True, **FAKES)
    check_whole(run)
    assert {name for name, count in executed(run).items() if count > 1} == {"2:1"}


def test_settings_that_do_not_apply_are_told_first(tmp_path: Path) -> None:
    told: list[events.Event] = []
    with pytest.raises(BudgetError):
        run_search(
            study(**{"budget.gb": 0.001, "sampler": "nsga2"}), tmp_path / "run", on_event=told.append, **FAKES
        )
    assert isinstance(told[0], events.Notice)
    assert told[0].text.startswith("space.neighbour_share does not apply")


def test_what_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="its smallest reaches"):
        run_search(study(**{"budget.gb": 0.001}), tmp_path / "run", **FAKES)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match=r"holds study\.json"):
        run_search(None, tmp_path / "run", resume=True, **FAKES)


@pytest.mark.parametrize(
    ("gpus", "jobs", "share"), [(0, 2, 0), (1, 1, 1), (1, 4, 0.25), (8, 8, 1), (8, 2, 1), (2, 3, 0.5)]
)
def test_trials_share_a_gpu_only_where_there_are_too_few(gpus: int, jobs: int, share: float) -> None:
    assert gpu_share(gpus, jobs) == share


def test_ctrl_c_before_the_first_trial_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is there, its study is not yet."""

    def interrupt(folder: Run) -> None:
        folder.storage.touch()
        signal.raise_signal(signal.SIGINT)

    run, told = tmp_path / "run", []
    with monkeypatch.context() as patch:
        patch.setattr("foldsearch.search.run.Records", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_search(study(), run, on_event=told.append, **FAKES)
    assert told[-1] == events.SearchInterrupted(Run.open(run), 0, f"foldsearch resume {run}")


# ---- drivers that are interrupted and killed


def driver(run: Path, verb: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fake_driver", str(run), verb],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """A busy machine takes a minute to start Ray alone."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def is_executing(run: Path, rung: int, least: int) -> bool:
    """Whether a trial is at work at this rung, after at least so many executed rungs."""
    if not (run / "executed.log").is_file():
        return False
    lines = (run / "executed.log").read_text().splitlines()
    return len(lines) >= least and lines[-1].split()[0].endswith(f":{rung}")


def processes_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


def check_stopped(driver: subprocess.Popen[str], run: Path, signum: int, *, twice: bool = False) -> None:
    """Laws of a driver that is asked to stop, as a terminal or a batch system asks: all of its process group."""
    children = processes_of(driver)
    os.killpg(driver.pid, signum)
    if twice:
        os.killpg(driver.pid, signum)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signum
    assert output.splitlines()[-1] == f"SearchInterrupted  {command('resume', run)}"
    assert all(hasattr(events, line.split()[0]) for line in output.splitlines()), output  # Ray says nothing
    assert psutil.wait_procs(children, timeout=0)[1] == []  # and none of its processes is left


@pytest.mark.slow  # tests/faults kills at every write, tests/e2e presses Ctrl-C
def test_interrupted_and_killed_drivers_lose_and_repeat_nothing(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faults.json").write_text(json.dumps({"seconds": 0.25}))
    (tmp_path / "tmp").mkdir()
    run = tmp_path / "what? now"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))  # too long a path for Ray's sockets

    # SIGTERM in the middle of a trial, and again while it ends: it says how to go on, and its trial can
    first = driver(run, "run")
    wait_for(lambda: is_executing(run, rung=1, least=5), first)
    check_stopped(first, run, signal.SIGTERM, twice=True)
    after_interrupt = read_trials(Run.open(run))
    assert [record.state for record in after_interrupt].count("running") == 1

    # Ctrl-C, twice, while Ray starts
    starting = driver(run, "resume")
    wait_for(lambda: any(child.name() == "gcs_server" for child in processes_of(starting)), starting)
    check_stopped(starting, run, signal.SIGINT, twice=True)
    assert read_trials(Run.open(run)) == after_interrupt

    # kill -9 in the middle of another one
    lines = len((run / "executed.log").read_text().splitlines())
    second = driver(run, "resume")
    wait_for(lambda: is_executing(run, rung=1, least=lines + 5), second)
    children = [(child, child.name()) for child in processes_of(second)]
    second.kill()
    second.communicate(timeout=60)
    after_kill = read_trials(Run.open(run))
    assert [record.state for record in after_kill].count("running") == 1

    (tmp_path / "faults.json").write_text("{}")
    run_search(None, run, resume=True, **FAKES)
    records = check_whole(run)

    # every trial that had ended is there as it was, exactly once
    for earlier in (after_interrupt, after_kill):
        for record in earlier:
            if record.ended:
                assert records[record.number] == record
    assert [record.number for record in records] == list(range(len(records)))

    # only the two rungs that were cut short were executed twice
    cut = {name for name, count in executed(run).items() if count > 1}
    assert max(executed(run).values()) <= 2
    running = {
        f"{record.number}:{len(record.results)}"
        for earlier in (after_interrupt, after_kill)
        for record in earlier
        if record.state == "running"
    }
    assert cut <= running
    assert len(running) == 2

    # no worker of the killed driver is left (Ray's own small agents take up to a minute to notice)
    _, alive = psutil.wait_procs([child for child, name in children if "Agent" not in name], timeout=20)
    assert alive == []
