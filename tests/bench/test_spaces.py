"""The bench of spaces ends a run when its tokens are spent, and goes on with it when there are more.

Oracle: the laws of the limit, over the records of a real search of fake trials.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from foldsearch.errors import RunError
from foldsearch.record import Trial
from foldsearch.run import Run
from foldsearch.search.records import read_trials
from foldsearch.search.run import run_search
from tests.bench.spaces import report, run_row, spent, volume
from tests.fake_driver import FAKES, study

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_ends_with_the_trial_that_spends_its_tokens_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = study().model_copy(update={"trials": None, "seconds": None})
    searches: list[bool] = []

    def search(*arguments: object, resume: bool, **named: object) -> None:
        searches.append(resume)
        run_search(*arguments, resume=resume, **named, **FAKES)  # type: ignore[arg-type]

    run = partial(run_row, tmp_path, "fake", 0, asked, search=search)
    # Each search has a Ray of its own, as in the bench: one that ends as by Ctrl-C leaves its worker to Ray's end.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # workers import the fakes
    few = run({"tokens": 1500, "trials": 50})
    check(tmp_path / "fake-0", 1500)
    more = run({"tokens": 4000, "trials": 50})
    check(tmp_path / "fake-0", 4000)
    again = run({"tokens": 4000, "trials": 50})
    capped = run_row(tmp_path, "fake", 1, asked, {"tokens": 10**9, "trials": 2}, search=search)
    assert searches == [False, True, False]
    assert again == more
    assert few["front"] != more["front"] or few["trials"] != more["trials"]
    assert [row["ended_by"] for row in (few, more, capped)] == ["tokens", "tokens", "trials"]
    assert sum(capped["trials"].values()) == 2
    assert more["hypervolume"] == volume(more["front"]) >= few["hypervolume"] > 0
    assert more["seconds"] > few["seconds"] > 0
    assert "| fake | 1 of 1 |" in report(tmp_path, ["fake"], [0], {"tokens": 4000, "trials": 50})
    with pytest.raises(RunError, match="larger limits"):
        run({"tokens": 1500, "trials": 50})
    with pytest.raises(RunError, match="other settings"):
        run_row(tmp_path, "fake", 0, asked.model_copy(update={"seed": 7}), {"tokens": 4000, "trials": 50})


def check(path: Path, tokens: int) -> None:
    """The last trial spends the last of the tokens; nothing runs any more, and nothing closes the search."""
    trials: list[Trial] = read_trials(Run.open(path))
    begun = [trial for trial in trials if trial.state != "waiting"]
    assert all(trial.ended and not trial.closing for trial in begun)
    assert sum(spent(begun[:-1]).values()) < tokens <= sum(spent(begun).values())
