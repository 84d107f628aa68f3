"""A search over plans, types of weights and types of the KV cache, without Ray and without a model.

Oracles: prices of each plan in its own types; KL by arithmetic, to which rounding adds a known part.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import FixedTrial

from foldsearch.bound import lower_bound
from foldsearch.codec import from_json, to_json
from foldsearch.plan.cost import GB, price
from foldsearch.plan.front import dominates
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import Matrix, StoredTypes, every_types, widest_first
from foldsearch.proposal import Proposal
from foldsearch.record import Draft, Trial, best_of_plans, plan_path, point
from foldsearch.report import terminal
from foldsearch.report.view import RunView, author
from foldsearch.run import Run
from foldsearch.runtimes import exported_bytes
from foldsearch.search.halving import Decision
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records
from foldsearch.search.run import Search
from foldsearch.search.screened import Screened
from foldsearch.search.warm import Trained, known_words
from foldsearch.spec.fit import narrow, repair
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study
from tests.fake_driver import study as small_study
from tests.fake_trial import NUM_BLOCKS, ORDERS, TABLE, trial_at, with_results
from tests.proposals import given, ordered_plan, removing

TYPES = ("bf16", "q4_0")
CACHES = ("f16", "q8_0")
ADDED = {"bf16": 0.0, "q4_0": 0.3, "": 0.0, "f16": 0.0, "q8_0": 0.02}  # KL by rounding


def typed_table():
    """The fake table with rows of 32 numbers."""
    (block, *_) = TABLE.blocks
    attention = replace(block.attention, matrices=(Matrix(1250, 32),))
    mlp = replace(block.mlp, matrices=(Matrix(3750, 32),))
    typed = replace(block, attention=attention, mlp=mlp)
    return replace(TABLE, blocks=(typed,) * NUM_BLOCKS, fixed_matrices=(Matrix(15625, 32, "head"),))


def study_of(**space: object) -> Study:
    """With a budget that one dropped block keeps in 4 bits only, and seven in 16."""
    space = {
        "removal": [0.0, 0.7],
        "criteria": ["window", "greedy"],
        "weights": TYPES,
        "neighbour_share": 0.4,
        **space,
    }
    return small_study(**{"space": space, "budget.gb": 0.0056, "trials": 40})


@pytest.fixture(scope="module", params=[(), CACHES], ids=["weights", "weights and cache"])
def records(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Records:
    """Of a whole search."""
    path = tmp_path_factory.mktemp("typed") / "run"
    with Run.draft(path) as draft:
        run = Run(draft, study_of(kv_cache=request.param), typed_table()).begin(path)
    records = Records(run)
    line = Line(records)
    while (asked := line.next(num_running=0)) is not None:
        number, proposal = asked
        plan = ordered_plan(proposal, ORDERS, NUM_BLOCKS)
        drafted = Draft(plan, price(plan, run.table, run.target.storing(proposal.types)))
        trial = trial_at(plan, run.study, len(run.study.rungs) - 1, proposal, number)
        added = ADDED[proposal.types.weights] + ADDED[proposal.types.kv_cache]
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
    assert {trial.types for trial in finished(records)} == set(run.study.space.types)
    for trial in finished(records):
        assert trial.cost == price(trial.plan, run.table, run.target.storing(trial.types))
        assert run.budget.admits(trial.cost)
    assert {trial.proposal.origin for trial in finished(records)} >= {"baseline", "sampler", "neighbour"}
    baselines = [trial for trial in finished(records) if trial.proposal.origin == "baseline"]
    assert {trial.types for trial in baselines} == {run.study.space.types[0]}


def test_a_plan_counts_once_in_each_type(records: Records) -> None:
    pairs = {(trial.plan, trial.types) for trial in finished(records)}
    assert len({plan for plan, _ in pairs}) < len(pairs)  # some plan was measured in several types
    assert len(best_of_plans(records.all())) == len(pairs)
    paths = {plan_path(records.run, trial) for trial in finished(records)}
    assert len(paths) == len(pairs)


def test_the_front_is_of_plans_and_types(records: Records) -> None:
    points = {trial.number: point(trial, records.objectives) for trial in finished(records)}
    expected = {n for n, one in points.items() if not any(dominates(two, one) for two in points.values())}
    assert {trial.number for trial in records.front()} == expected
    assert {trial.types for trial in records.front()} == set(records.run.study.space.types)


def test_halving_takes_a_plan_in_another_type_for_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Run.draft(tmp_path / "run") as draft:
        run = Run(draft, study_of(), typed_table()).begin(tmp_path / "run")
    records = Records(run)
    plans = [FoldPlan.dropping([first, first + 1], NUM_BLOCKS) for first in (3, 5)]
    for plan in plans:
        for weights in TYPES:
            number, _ = records.ask()
            proposal = replace(given(plan), types=StoredTypes(weights, ""))
            records.record(replace(trial_at(plan, run.study, 0, proposal), number=number, proposal=proposal))
    beside: list[int] = []

    def decide(point: object, others: list[object], **_: object) -> Decision:
        beside.append(len(others))
        return Decision(True, "")

    monkeypatch.setattr("foldsearch.search.run.decide", decide)
    search = Search(records, Line(records), lambda event: None)
    search._halved(records.get(0))
    assert beside == [len(plans) * len(TYPES) - 1]  # all but itself


def test_a_repeat_is_foretold_in_its_own_type_only(records: Records) -> None:
    trial = finished(records)[0]
    assert trial.proposal is not None
    assert records.foretell(trial.proposal) == trial.number
    known = {(one.plan, one.types): one.number for one in finished(records)}
    for other in records.run.study.space.types:
        assert records.foretell(replace(trial.proposal, types=other)) == known.get((trial.plan, other))


def test_a_move_changes_one_type(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    front = [(trial.plan, trial.types) for trial in records.front()]
    monkeypatch.setattr(
        "foldsearch.search.records.neighbour", lambda plan, rng: None
    )  # only types can change
    rows = (FixedTrial({"learning_rate": 0.05, "delta_rank": 8}, number=number) for number in range(100))
    moved = [one for row in rows if (one := records._neighbour(row)) is not None]
    tried = {(trial.plan, trial.types) for trial in finished(records)}
    assert moved or not records.run.study.space.kv_cache  # of two types of weights both may have been tried
    for one in moved:
        assert (one.plan, one.types) not in tried
        assert any(
            (of.weights != one.types.weights) + (of.kv_cache != one.types.kv_cache) == 1
            for plan, of in front
            if plan == one.plan
        )


def test_a_screened_plan_is_trained_in_the_widest_type_that_fits(tmp_path: Path) -> None:
    with Run.draft(tmp_path / "run") as draft:
        run = Run(draft, study_of(), typed_table()).begin(tmp_path / "run")
    records = Records(run)
    for dropped, expected in ((1, "q4_0"), (7, "bf16")):
        plan = FoldPlan.dropping(range(2, 2 + dropped), NUM_BLOCKS)
        fits = {
            weights: run.budget.admits(price(plan, run.table, run.target.storing(StoredTypes(weights))))
            for weights in TYPES
        }
        assert fits["q4_0"]
        assert fits["bf16"] == (expected == "bf16")
        records.queue_plan(plan)
        assert records.ask()[1].types.weights == expected


def test_what_is_known_within_the_budget_keeps_it_as_it_was_measured(records: Records) -> None:
    """One dropped block keeps the budget in 4 bits only."""
    plan = FoldPlan.dropping([1], NUM_BLOCKS)
    own, wide, narrow = (Trained(plan, 0.1, 64, "run", i, weights) for i, weights in enumerate(("", *TYPES)))
    words = known_words(records.run, (), [own, wide, narrow])
    narrow_target = records.run.target.storing(narrow.types)
    assert "trained: 1 plans" in words  # by its size, the narrow one
    assert f"{price(plan, records.run.table, narrow_target).memory_bytes / 1e9:.6g} GB" in words
    assert known_words(records.run, (), [own, wide]) == ""  # of its own dtype: of the wide one


def test_screened_plans_are_priced_in_the_widest_type_that_keeps_the_budget(records: Records) -> None:
    """A screening rounds nothing, so the narrowest type's bytes beside its KL were a model that does not exist."""
    run, quality = records.run, finished(records)[0].quality
    plans = {FoldPlan.dropping(range(7), NUM_BLOCKS): 2.0, FoldPlan.dropping([2], NUM_BLOCKS): 1.0}
    screened = [Screened(plan, ("window",), replace(quality, kl=kl)) for plan, kl in plans.items()]
    words = known_words(run, screened, [])
    for plan, kl in plans.items():
        prices = (price(plan, run.table, run.target.storing(types)) for types in run.study.space.types)
        widest = max(cost.memory_bytes for cost in prices if run.budget.admits(cost))
        assert f"{widest / GB:.6g} GB  KL {kl:.3f}  {plan}" in words


def test_the_dense_model_is_told_in_its_own_type(records: Records) -> None:
    view = RunView.open(records.run.path)
    columns = terminal._front_columns(view, every=False)
    (dense,) = (i for i, cell in enumerate(columns["trial"].cells) if str(cell) == "dense")
    whole = exported_bytes(
        FoldPlan.identity(NUM_BLOCKS), view.folder.table, view.folder.study.target.stored_in("")
    )
    assert str(columns["gguf MB"].cells[dense]) == terminal.megabytes(whole["gguf"] or 0)


def test_criteria_are_compared_in_one_type(records: Records) -> None:
    """One criterion's plan in 16 bits says nothing beside another's in 4."""
    for row in RunView.open(records.run.path).by_count().values():
        assert len({trial.types for trial in row.values()}) == 1


def test_what_cannot_fit_in_its_types_takes_the_widest_that_can(records: Records) -> None:
    run = records.run
    space = narrow(run.study.space, run.table, run.target, run.budget)
    for count in (1, 7):
        asked = replace(removing("window", count), types=space.types[0])
        found = repair(asked, space, run.table, run.target, run.budget)
        fitting = [
            types
            for types in widest_first(space.types)
            if run.budget.admits(lower_bound(replace(asked, types=types), run.table, run.target))
        ]
        assert found == replace(asked, types=fitting[0])
        assert (fitting[0] == space.types[0]) == (count == 7)


def test_reports_name_the_type(records: Records) -> None:
    view = RunView.open(records.run.path)
    trial = next(trial for trial in view.front if trial.types.weights == "q4_0")
    assert any(trial.types.label in words for words in view.authors(trial))
    cached = f", run with a KV cache in {trial.types.kv_cache}" if trial.types.kv_cache else ""
    assert f"in q4_0{cached} (the default)" in terminal.runtimes_words(view, trial.plan, trial.types)


def test_a_proposal_keeps_its_type() -> None:
    asked = replace(removing("uniform", 2), types=StoredTypes("q5_0", "q8_0"))
    assert Proposal.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    assert from_json(Trial, json.loads(json.dumps(to_json(Trial(3, proposal=asked))))).types == asked.types
    assert author(asked) == "uniform, q5_0, KV q8_0"


def test_a_proposal_of_a_run_that_knew_no_types_of_caches_is_read() -> None:
    told = replace(removing("uniform", 2), types=StoredTypes("q5_0")).to_json()
    del told["kv_cache"]
    assert Proposal.from_json(told).types == StoredTypes("q5_0")


def test_the_coarser_type_decides_which_is_wider() -> None:
    asked = every_types(("bf16", "q4_0"), ("f16", "q8_0"))
    assert widest_first(reversed(asked)) == [
        StoredTypes("bf16", "f16"),
        StoredTypes("bf16", "q8_0"),
        StoredTypes("q4_0", "f16"),
        StoredTypes("q4_0", "q8_0"),
    ]
    assert every_types((), ()) == [StoredTypes()]
    assert every_types((), ("f16",)) == [StoredTypes("", "f16")]


def test_the_dense_model_is_measured_with_each_cache_of_the_space() -> None:
    assert study_of().rivals() == [StoredTypes(name) for name in study_of().target.rivals]
    both = study_of(kv_cache=CACHES).rivals()
    assert both == [StoredTypes(name, cache) for name in study_of().target.rivals for cache in CACHES]
    assert small_study(**{"target.rivals": [], "space": {"kv_cache": CACHES}}).rivals() == []


@pytest.mark.parametrize("key", ["weights", "kv_cache"])
@pytest.mark.parametrize("overrides", [{"target.{key}": "q8_0"}, {"target.runtime": "stock"}])
def test_types_are_said_once_and_for_llama_cpp(overrides: dict[str, str], key: str) -> None:
    overrides = {name.format(key=key): value for name, value in overrides.items()}
    space = {"space": "foldgpt"}
    assert load_study("default", space).target.runtime == "folded"
    values = {**load_study("default", {**space, **overrides}).model_dump(mode="json")}
    values["space"][key] = ["f16", "q8_0"]
    what = {"weights": "weights", "kv_cache": "a KV cache"}[key]
    with pytest.raises(ValueError, match=f"several types of {what} are searched for the gguf runtime"):
        Study.model_validate_json(json.dumps(values))
