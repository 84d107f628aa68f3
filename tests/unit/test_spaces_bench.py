"""What the bench of spaces says of a run.

Oracles: a run of fake trials whose tokens are known by hand, and boxes added up by hand.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from foldsearch.plan.plan import FoldPlan
from foldsearch.record import Trial, front
from foldsearch.run import Run
from foldsearch.search.records import read_trials
from tests.bench.spaces import front_points, report, row_of, spent, volume
from tests.fake_driver import study
from tests.fake_trial import NUM_BLOCKS, known, trial_at
from tests.proposals import changed, removing

LIMITS = {"tokens": 1000, "trials": 50}


def test_volume_by_hand():
    """Two boxes below (4, 1, 1.05) less what they share."""
    a, b = {"kl": 1.0, "memory": 0.8, "flops": 0.85}, {"kl": 3.0, "memory": 0.5, "flops": 0.55}
    outside = {"kl": 5.0, "memory": 0.1, "flops": 0.1}
    expected = 3 * 0.2 * 0.2 + 1 * 0.5 * 0.5 - 1 * 0.2 * 0.2
    assert volume([a, b, outside]) == pytest.approx(expected)


def test_tokens_by_hand():
    """The fakes measure 100 positions a rung and train on 0, 100 and 400 tokens."""
    asked, plan = study(), FoldPlan.dropping([3], NUM_BLOCKS)
    window = trial_at(plan, asked, 2, removing("window", 1))
    gate = replace(window, proposal=removing("gate", 1))
    assert window.draft is not None
    gated = replace(gate, draft=replace(window.draft, gates={"tokens": 1000, "from_cache": True}))

    def until(trial: Trial, rung: int) -> Trial:
        return replace(trial, results=trial.results[: rung + 1])

    def tokens(*trials: Trial) -> list[int]:
        return list(spent(trials).values())

    assert tokens(window) == [400, 0, 300]
    assert tokens(until(window, 1)) == [100, 0, 200]  # stopped at rung 1
    assert tokens(window, known(window, 0)) == [400, 0, 300]
    goes_on = replace(window, results=(*known(window, 0).results[:2], window.last))
    assert tokens(until(window, 1), goes_on) == [400, 0, 300]  # where 0 stopped
    assert tokens(gated, known(gate, 0)) == [400, 1000, 300]
    other = replace(gated, proposal=changed(removing("gate", 1), setting=1.0))
    assert tokens(gated, until(gated, 0), until(other, 0)) == [400, 2000, 500]
    reported = replace(window, results=(*window.results[:2], replace(window.last, report=window.quality)))
    assert tokens(reported) == [400, 0, 400]
    assert tokens(replace(window, results=())) == [0, 0, 0]


def test_points_are_of_the_front_on_report_texts(run_path: Path):
    run, records = Run.open(run_path), read_trials(Run.open(run_path))
    points = front_points(run, records)
    assert [point["trial"] for point in points] == [record.number for record in front(records)]
    assert all(point["kl"] == pytest.approx(1.1 * point["search_kl"]) for point in points)
    assert all(0 < point["memory"] < 1 and 0 < point["flops"] <= 1.05 for point in points)
    row = row_of(run_path, "foldgpt", 0, LIMITS)
    assert row["hypervolume"] == volume(points)
    assert row["trials"]["failed"] == row["trials"]["stopped"] == 1
    assert sum(row["trials"].values()) == sum(record.is_trial for record in records)
    json.dumps(row)


def test_a_report_says_what_is_missing(tmp_path: Path):
    def write(space: str, seed: int, value: float, limits: dict[str, int] = LIMITS) -> None:
        row = {"limits": limits, "hypervolume": value, "trials": {"finished": 3}, "seconds": 9.0}
        row |= {"tokens": {"recovery": 600, "gates": 0, "measured": 500}}
        (tmp_path / f"{space}-{seed}.json").write_text(json.dumps(row))

    write("one", 0, 1.0)
    write("one", 1, 2.0)
    write("everything", 0, 1.5)
    write("everything", 1, 1.75)
    write("other", 0, 3.0, {**LIMITS, "tokens": 5})
    text = report(tmp_path, ["one", "everything", "other"], [0, 1], LIMITS)
    assert "| one | 2 of 2 | 1.500 [1.000–2.000] | 3 [3–3] | 3 [3–3] | 1,100 [1,100–1,100] | 600" in text
    assert "| other | 0 of 2 | — |" in text
    assert "missing: other-0 (run to {'tokens': 5, 'trials': 50}), other-1 (not run)" in text
    assert "everything less one: 0.125 [-0.250–0.500], at least as much for 1 of 2 seeds" in text
