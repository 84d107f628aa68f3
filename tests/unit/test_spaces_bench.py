"""What the bench of spaces says of a run.

Oracles: a run of fake trials whose tokens are known by hand, and boxes added up by hand.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from foldsearch.plan.plan import FoldPlan
from foldsearch.proposal import Proposal
from foldsearch.run import Run
from foldsearch.search.records import Record, front, read_records
from tests.bench.spaces import front_points, report, row_of, spent, volume
from tests.fake_driver import study
from tests.fake_trial import NUM_BLOCKS, result_of
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
    rungs = [result_of(plan, asked, rung) for rung in range(3)]
    known = [replace(result, state="known", known_from=0) for result in rungs]
    gated = [replace(result, gates={"tokens": 1000, "from_cache": True}) for result in rungs]
    window, gate = removing("window", 1), removing("gate", 1)

    def tokens(*records: tuple[Proposal, list]) -> list[int]:
        made = [Record(i, "finished", p, tuple(results)) for i, (p, results) in enumerate(records)]
        return list(spent(made).values())

    assert tokens((window, rungs)) == [400, 0, 300]
    assert tokens((window, rungs[:2])) == [100, 0, 200]  # stopped at rung 1
    assert tokens((window, rungs), (window, known)) == [400, 0, 300]
    assert tokens((window, rungs[:2]), (window, [*known[:2], rungs[2]])) == [
        400,
        0,
        300,
    ]  # goes on where 0 stopped
    assert tokens((gate, gated), (gate, known)) == [400, 1000, 300]
    other = changed(gate, setting=1.0)
    assert tokens((gate, gated), (gate, gated[:1]), (other, gated[:1])) == [400, 2000, 500]
    reported = [*rungs[:2], replace(rungs[2], report=rungs[2].quality)]
    assert tokens((window, reported)) == [400, 0, 400]
    assert tokens((window, [])) == [0, 0, 0]


def test_points_are_of_the_front_on_report_texts(run_path: Path):
    run, records = Run.open(run_path), read_records(Run.open(run_path))
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
