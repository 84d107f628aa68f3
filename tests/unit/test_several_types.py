"""A search over plans and types of weights, without Ray and without a model.

Oracles: prices of each plan in its own type; KL by arithmetic, to which rounding adds a known part.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from foldsearch.codec import from_json, to_json
from foldsearch.plan.cost import price
from foldsearch.plan.front import dominates
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import Matrix
from foldsearch.proposal import Proposal
from foldsearch.record import Draft, Trial, best_of_plans, plan_path, point
from foldsearch.report import terminal
from foldsearch.report.view import RunView, author
from foldsearch.run import Run
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study
from tests.fake_driver import study as small_study
from tests.fake_trial import NUM_BLOCKS, ORDERS, TABLE, trial_at, with_results
from tests.proposals import ordered_plan, removing

TYPES = ("bf16", "q4_0")
ADDED = {"bf16": 0.0, "q4_0": 0.3}  # KL by rounding


def typed_table():
    """The fake table with rows of 32 numbers."""
    (block, *_) = TABLE.blocks
    attention = replace(block.attention, matrices=(Matrix(1250, 32),))
    mlp = replace(block.mlp, matrices=(Matrix(3750, 32),))
    typed = replace(block, attention=attention, mlp=mlp)
    return replace(TABLE, blocks=(typed,) * NUM_BLOCKS, fixed_matrices=(Matrix(15625, 32, "head"),))


def study_of() -> Study:
    """With a budget that one dropped block keeps in 4 bits only, and seven in 16."""
    space = {
        "removal": [0.0, 0.7],
        "criteria": ["window", "greedy"],
        "weights": TYPES,
        "neighbour_share": 0.4,
    }
    return small_study(**{"space": space, "budget.gb": 0.0056, "trials": 40})


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Of a whole search."""
    path = tmp_path_factory.mktemp("typed") / "run"
    with Run.draft(path) as draft:
        run = Run(draft, study_of(), typed_table()).begin(path)
    records = Records(run)
    line = Line(records)
    while (asked := line.next(num_running=0)) is not None:
        number, proposal = asked
        plan = ordered_plan(proposal, ORDERS, NUM_BLOCKS)
        drafted = Draft(plan, price(plan, run.table, run.target.storing(proposal.weights)))
        trial = trial_at(plan, run.study, len(run.study.rungs) - 1, proposal, number)
        added = ADDED[proposal.weights]
        trial = with_results(
            trial,
            lambda result, more=added: replace(
                result, quality=replace(result.quality, kl=result.quality.kl + more)
            ),
        )
        records.record(replace(trial, draft=drafted))
        records.finish(number)
    return records


def finished(records: Records) -> list[Trial]:
    return [trial for trial in records.all() if trial.is_measured]


def test_every_trial_is_of_one_type_and_priced_in_it(records: Records) -> None:
    run = records.run
    assert run.target.weights == "q4_0"  # what bounds what can fit
    assert run.dense == price(FoldPlan.identity(NUM_BLOCKS), run.table, run.study.target.stored_in("bf16"))
    assert {trial.weights for trial in finished(records)} == set(TYPES)
    for trial in finished(records):
        assert trial.cost == price(trial.plan, run.table, run.target.storing(trial.weights))
        assert run.budget.admits(trial.cost)
    assert {trial.proposal.origin for trial in finished(records)} >= {"baseline", "sampler", "neighbour"}
    baselines = [trial for trial in finished(records) if trial.proposal.origin == "baseline"]
    assert {trial.weights for trial in baselines} == {"bf16"}  # the first


def test_a_plan_is_measured_once_in_each_type(records: Records) -> None:
    pairs = [(trial.plan, trial.weights) for trial in finished(records)]
    assert len(set(pairs)) == len(pairs)
    both = {plan for plan, _ in pairs if {(plan, weights) for weights in TYPES} <= set(pairs)}
    assert both
    assert len(best_of_plans(records.all())) == len(pairs)
    one, other = (trial for trial in finished(records) if trial.plan == next(iter(both)))
    assert plan_path(records.run, one) != plan_path(records.run, other)


def test_the_front_is_of_plans_and_types(records: Records) -> None:
    points = {trial.number: point(trial, records.objectives) for trial in finished(records)}
    expected = {n for n, one in points.items() if not any(dominates(two, one) for two in points.values())}
    assert {trial.number for trial in records.front()} == expected
    assert {trial.weights for trial in records.front()} == set(TYPES)


def test_a_repeat_is_foretold_in_its_own_type_only(records: Records) -> None:
    trial = finished(records)[0]
    assert trial.proposal is not None
    other = next(weights for weights in TYPES if weights != trial.weights)
    assert records.foretell(trial.proposal) == trial.number
    known = {(one.plan, one.weights): one.number for one in finished(records)}
    assert records.foretell(replace(trial.proposal, weights=other)) == known.get((trial.plan, other))


def test_a_screened_plan_is_trained_in_the_widest_type_that_fits(tmp_path: Path) -> None:
    with Run.draft(tmp_path / "run") as draft:
        run = Run(draft, study_of(), typed_table()).begin(tmp_path / "run")
    records = Records(run)
    for dropped, expected in ((1, "q4_0"), (7, "bf16")):
        plan = FoldPlan.dropping(range(2, 2 + dropped), NUM_BLOCKS)
        fits = {
            weights: run.budget.admits(price(plan, run.table, run.target.storing(weights)))
            for weights in TYPES
        }
        assert fits["q4_0"]
        assert fits["bf16"] == (expected == "bf16")
        records.queue_plan(plan)
        assert records.ask()[1].weights == expected


def test_reports_name_the_type(records: Records) -> None:
    view = RunView.open(records.run.path)
    trial = next(trial for trial in view.front if trial.weights == "q4_0")
    assert any("q4_0" in words for words in view.authors(trial))
    assert "in q4_0" in terminal.runtimes_words(view, trial.plan, trial.weights)


def test_a_proposal_keeps_its_type() -> None:
    asked = replace(removing("uniform", 2), weights="q5_0")
    assert Proposal.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    assert from_json(Trial, json.loads(json.dumps(to_json(Trial(3, proposal=asked))))).weights == "q5_0"
    assert author(asked) == "uniform, q5_0"


@pytest.mark.parametrize("overrides", [{"target.weights": "q8_0"}, {"target.runtime": "stock"}])
def test_types_are_said_once_and_for_llama_cpp(overrides: dict[str, str]) -> None:
    space = {"space": "foldgpt"}
    assert load_study("default", space).target.runtime == "folded"
    values = {**load_study("default", {**space, **overrides}).model_dump(mode="json")}
    values["space"]["weights"] = list(TYPES)
    with pytest.raises(ValueError, match="several types of weights are searched for the gguf runtime"):
        Study.model_validate_json(json.dumps(values))
