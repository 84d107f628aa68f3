"""A real search whose Ray is killed under it, whose files may not grow, whose processes are suspended, whose clock is
moved, and whose dashboard is killed: the short form of `make faults`.

Oracle: the same search undisturbed, without Ray (`tests/faults/test_every_write.py:run_process`).
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from foldsearch.errors import RunError
from foldsearch.paths import command
from foldsearch.run import Run
from foldsearch.search.check import check_run
from foldsearch.search.records import read_trials
from foldsearch.search.run import Watcher
from tests.fake_driver import study
from tests.fake_trial import TABLE
from tests.faults.storm import Storm, find, make_fakes, start, without_seconds
from tests.faults.test_every_write import run_process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("alone") / "run"
    with Run.draft(path) as draft:
        run = Run(draft, study(), TABLE).begin(path)
    run_process(run)
    return run


def begun(place: Path, run: Path) -> subprocess.Popen[str]:
    """A process of a search whose worker is at work."""
    driver, until = start(place, run), time.monotonic() + 200
    while find(driver, "worker") is None or not (run / "executed.log").exists():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)
    return driver


BESIDE = ("suspend worker", "suspend raylet", "suspend driver", "clock", "dashboard")


@pytest.mark.parametrize(
    ("blows", "beside"),
    [
        (("raylet", "dashboard agent"), ()),
        pytest.param(("runtime agent",), (), marks=pytest.mark.slow),
        pytest.param(("file limit",), BESIDE, marks=pytest.mark.slow),
    ],
    ids=["its Ray was killed", "another part of its Ray", "its disk was full, and what it is not to feel"],
)
def test_a_search_goes_on_after(
    undisturbed: Run, tmp_path: Path, blows: tuple[str, ...], beside: tuple[str, ...]
) -> None:
    make_fakes(tmp_path)
    run, storm = tmp_path / "run", Storm(tmp_path, random.Random(0))
    for blow in blows:
        driver = begun(tmp_path, run)
        if blow == "file limit":
            storm.limit_files(driver)
        else:
            part = find(driver, blow)
            assert part is not None
            part.kill()
        said, _ = driver.communicate(timeout=200)
        assert driver.returncode == 2, said
        assert "Traceback" not in said
        wanted = {
            "raylet": "needs its process raylet",
            "dashboard agent": "needs its process (agent|raylet)",
            "runtime agent": "needs its process (agent|raylet)",
            "file limit": "cannot be written|could not be written",
        }
        assert re.search(wanted[blow], said), said
        assert f"Go on with: {command('resume', run)}" in said
    driver = begun(tmp_path, run)
    if beside:
        for part in ("worker", "raylet", "driver"):
            storm.suspend(driver, part, 1.0)
        storm.move_clock(tmp_path)
        storm.kill_dashboard(tmp_path, run)
        assert [storm.events[what] for what in beside] == [1] * len(beside)
    said, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, said
    found = Run.open(run)
    assert without_seconds(read_trials(found)) == without_seconds(read_trials(undisturbed))
    assert check_run(found, repair=True).left == ()


def test_a_ray_that_is_lost_is_no_fault_of_a_trial() -> None:
    """The workers end with it, and one of them may be the last that its trial gets."""
    search = Mock(check_workers=Mock(side_effect=RunError("Ray is lost")))
    dead = SimpleNamespace(trial_id="a", config={"number": 0}, num_failures=3)
    for hears in (Watcher(search).on_trial_error, Watcher(search).on_trial_recover):
        with pytest.raises(RunError, match="Ray is lost"):
            hears(0, [], dead)
    assert {call[0] for call in search.method_calls} == {"check_workers"}
