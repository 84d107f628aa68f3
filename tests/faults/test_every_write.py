"""A search whose process is killed at any of its writes, without Ray: each write to the study or to a file is one after
which, or before which, the process may end.

Oracle: the same search undisturbed. With one job the proposals, the results, the halved trials and the line of trials
are to be the same, and no rung is executed twice but the one that was cut.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from foldsearch.record import Trial
from foldsearch.run import Run
from foldsearch.search.check import check_run
from foldsearch.search.messages import encode
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records, read_trials
from foldsearch.search.run import TRIAL, Search
from foldsearch.search.worker import TrialRunner
from foldsearch.spec.space import Space
from foldsearch.spec.study import ScreenSettings
from tests.contexts import begin_run, of_run, tiny_study
from tests.fake_driver import FAKES, study
from tests.fake_trial import TABLE, FakeContext
from tests.faults import storm

WRITES = (
    "create_new_trial",
    "set_study_user_attr",
    "set_study_system_attr",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
)
SEARCHES = {
    "tpe": (study(trials=14), {}),
    "nsga2": (study(trials=12, sampler="nsga2"), {}),
    # a baseline that is tried once more with one block less, and a trial that breaks
    "faulty": (study(trials=8, sampler="random"), {"1:0": "over budget", "5:1": "raise"}),
}


ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))  # searches of each kind


class Killed(BaseException):
    """Stands for `kill -9`: nothing in the program may hear of it."""


@dataclass
class Clock:
    """Counts writes, and kills at those that are due."""

    due: Iterator[int]
    left: int = 0
    kills: int = 0
    writes: int = 0
    at: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.left = next(self.due)

    def tick(self, what: str) -> None:
        self.writes += 1
        self.left -= 1
        if self.left <= 0:
            self.left = next(self.due)
            self.kills += 1
            self.at[what] += 1
            raise Killed


@contextmanager
def killed_by(clock: Clock) -> Iterator[None]:
    """Every write of the storage and every renaming of a file asks the clock, before it or after it."""

    def asking(write: Callable[..., Any], name: str) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            clock.tick(f"before {name}")
            found = write(*args, **kwargs)
            clock.tick(f"after {name}")
            return found

        return asked

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(
                optuna.storages.RDBStorage, name, asking(getattr(optuna.storages.RDBStorage, name), name)
            )
        patch.setattr(os, "replace", asking(os.replace, "replace"))
        yield


def run_process(run: Run, context: Any = None, trial: str = FAKES["trial"]) -> None:
    """What one process does of a search with one job: the line of trials, a worker, and the study."""
    records = Records(run)
    line = Line(records)
    search = Search(records, line, lambda event: None)
    context = context or FakeContext(run, run.path.parent / "cache", threads=1)
    while (asked := line.next(num_running=0)) is not None:
        number, proposal = asked
        worker = TrialRunner.__new__(TrialRunner)
        worker.setup({"number": number, "proposal": proposal.to_json()}, context, trial, None, None)
        search.started(number)
        try:
            while not search.judge(number, encode(worker._next())):
                pass
        finally:
            worker.cleanup()


def begin(path: Path, name: str) -> Run:
    with Run.draft(path) as draft:
        (path.parent / "faults.json").write_text(json.dumps(SEARCHES[name][1]))
        return Run(draft, SEARCHES[name][0], TABLE).begin(path)


def told(run: Run) -> list[tuple[TrialState, Any, Any, Any]]:
    """What the study of a run was told, as its own library reads it."""
    rows = Records(run).study.get_trials()
    return [(row.state, row.params, row.values, row.constraints) for row in rows]


def search_killed(run: Run, due: Iterator[int], *more: Any) -> Clock:
    """Go on with a search until it ends, however often it is killed."""
    clock = Clock(due)
    with killed_by(clock):
        while True:
            try:
                run_process(run, *more)
                return clock
            except Killed:
                continue


def without_seconds(run: Run) -> list[Trial]:
    """The trials of a run; the error of one names the time of day."""
    return [replace(trial, reason=trial.reason.partition(", after")[0]) for trial in read_trials(run)]


def check_alike(run: Run, undisturbed: Run) -> None:
    ours, theirs = without_seconds(run), without_seconds(undisturbed)
    assert [trial.proposal for trial in ours] == [trial.proposal for trial in theirs]
    assert ours == theirs
    assert told(run) == told(undisturbed)


@pytest.fixture(scope="module", params=list(SEARCHES))
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    run = begin(tmp_path_factory.mktemp("undisturbed") / "run", request.param)
    run_process(run)
    return request.param, run


def test_a_search_killed_at_its_writes_is_the_search_undisturbed(
    undisturbed: tuple[str, Run], tmp_path: Path
) -> None:
    name, other = undisturbed
    rng = random.Random(name)
    at: Counter[str] = Counter()
    for number in range(ROUNDS):
        run = begin(tmp_path / str(number) / "run", name)
        clock = search_killed(run, iter(lambda: rng.randint(1, 60), 0))
        check_alike(run, other)
        assert all(count <= 1 + clock.kills for count in executed(run).values())
        assert sum(count - 1 for count in executed(run).values()) <= clock.kills
        at += clock.at
    assert at.total() > 3 * ROUNDS
    trials = len(read_trials(other))
    print(f"\n{name}: {at.total()} kills at {len(at)} places in {ROUNDS} searches of {trials} trials")


def executed(run: Run) -> Counter[str]:
    return Counter(line.split()[0] for line in (run.path / "executed.log").read_text().splitlines())


def test_real_trials_go_on_to_the_bit(tmp_path: Path) -> None:
    """Folded, healed, trained and measured for real: also the writes of start, training, best state and record."""
    space = Space(removal=(0.2, 0.6), criteria=("window", "greedy"))
    settings = {"space": space, "rungs": (0, 64, 192), "trials": 5, "screen": ScreenSettings(plans=0)}
    context = begin_run(tiny_study(tmp_path, **settings), tmp_path / "run", cache_dir=tmp_path / "cache")
    context = replace(context, threads=1)
    fresh = Path(shutil.copytree(context.run.path, tmp_path / "fresh"))
    run_process(context.run, context, TRIAL)
    trials = read_trials(context.run)
    assert sum(trial.has_trained for trial in trials) > 3
    rng = random.Random(0)
    at: Counter[str] = Counter()
    for number in range(ROUNDS):
        path = Path(shutil.copytree(fresh, tmp_path / f"killed-{number}"))
        killed = of_run(context, path=path)
        at += search_killed(killed.run, iter(lambda: rng.randint(1, 30), 0), killed, TRIAL).at
        assert storm.without_seconds(read_trials(killed.run)) == storm.without_seconds(trials)
        # a temporary file of a killed process may lie there: nobody reads it, and `check --repair` removes it
        left = [one.words for one in check_run(killed.run, repair=False).left]
        assert [words for words in left if not words.startswith("killed processes left")] == []
        assert check_run(killed.run, repair=True).left == ()
    print(f"\nreal: {at.total()} kills at {len(at)} places in {ROUNDS} searches of {len(trials)} trials")
    assert at.total() > 3 * ROUNDS
