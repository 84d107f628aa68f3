"""What a worker makes of what an earlier one left in the folder of its trial."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from foldsearch.codec import to_json
from foldsearch.files import write_json
from foldsearch.plan.plan import FoldPlan
from foldsearch.proposal import Proposal
from foldsearch.rebuild import latest_folder
from foldsearch.record import Trial
from foldsearch.run import Run, TrialFolder
from foldsearch.search.worker import TrialRunner, _Progress
from tests.fake_driver import study
from tests.fake_trial import NUM_BLOCKS, TABLE, trial_at
from tests.proposals import given

OLD, NEW = (given(FoldPlan.dropping(removed, NUM_BLOCKS)) for removed in ([3, 4], [7, 8]))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    with Run.draft(tmp_path / "run") as draft:
        return Run(draft, study(), TABLE).begin(tmp_path / "run")


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def worker(run: Run, proposal: Proposal, place: TrialFolder, held: ExitStack) -> TrialRunner:
    """With trial 0 to run; its trial does nothing."""
    made = TrialRunner.__new__(TrialRunner)
    made._held, made._place, made._site, made._deadline = held, place, None, None
    made._proposal, made._number, made._context = proposal, 0, SimpleNamespace(run=run)
    made._trial = lambda *args, **kwargs: iter(())
    return made


def measured(run: Run, seconds: tuple[float, ...], taken: int) -> Trial:
    """A trial after some rungs, of which the first were taken from trial 7."""
    trial = trial_at(OLD.plan, run.study, len(seconds) - 1, OLD)
    results = (
        replace(result, seconds=spent, known_from=7 if rung < taken else None)
        for rung, (result, spent) in enumerate(zip(trial.results, seconds, strict=True))
    )
    return replace(trial, results=tuple(results))


@pytest.mark.parametrize(
    ("seconds", "taken", "left"),
    [((300.0,), 1, 200), ((300.0, 310.0), 1, 190), ((30.0, 50.0), 0, 150), ((30.0, 250.0), 0, 0)],
)
def test_a_trial_may_take_its_seconds_itself(
    run: Run, held: ExitStack, seconds: tuple[float, ...], taken: int, left: float
) -> None:
    """What it took from another trial came with that one's seconds. Of 200 s."""
    progress = _Progress(lambda phase, share: None, None)
    began = time.monotonic()
    worker(run, OLD, run.trial(0), held)._limit(200, measured(run, seconds, taken), progress)
    assert progress._limit is not None
    assert began + left <= progress._limit[0] <= time.monotonic() + left


def test_what_another_proposal_came_to_is_put_aside_with_all_its_training(run: Run, held: ExitStack) -> None:
    """As after a study that was begun again over the folders of the old one."""
    place, trial = run.trial(0), trial_at(OLD.plan, run.study, 2, OLD)
    for folder in (place, place.further):
        write_json(folder.record, to_json(trial))
    worker(run, NEW, place, held)._start()
    assert latest_folder(run, 0).path == place.path
    aside = TrialFolder(place.path.with_name(f"{place.path.name}.aside"))
    assert aside.record.exists()
    assert aside.further.record.exists()
