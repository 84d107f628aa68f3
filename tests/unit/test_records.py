"""The book of record and the run folder, without Ray.

Oracles: Optuna's own reading of the storage file, the fake trial's arithmetic, brute-force dominance.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from optuna_dashboard._note import get_note

from foldsearch.codec import from_json, to_json
from foldsearch.errors import BudgetError, RunError
from foldsearch.fates import Replace, Share
from foldsearch.plan.cost import price
from foldsearch.plan.front import dominates
from foldsearch.plan.plan import FoldPlan
from foldsearch.proposal import Groups, Proposal, fold_plan
from foldsearch.record import Trial, front, point, read_trial
from foldsearch.run import Run
from foldsearch.runtimes import runtime_named
from foldsearch.search import dry_run
from foldsearch.search.check import check_run, mend_for_resume
from foldsearch.search.dry_run import plan_search
from foldsearch.search.proposer import Line, missing_baselines
from foldsearch.search.records import ENDED_BY_HAND, Records, note, read_trials
from foldsearch.search.storage import STUDY_NAME
from foldsearch.spec.load import shipped
from foldsearch.spec.propose import baseline_count, is_baseline
from foldsearch.spec.study import BudgetSettings, HealingSettings, Objective, ScreenSettings, Study
from tests.fake_driver import SPACE
from tests.fake_driver import study as small_study
from tests.fake_trial import NUM_BLOCKS, ORDERS, TABLE, known, trial_at
from tests.proposals import (
    changed,
    count_of,
    criterion_in,
    given,
    groups_of,
    ordered_plan,
    removing,
    retrained,
)


@pytest.fixture
def study() -> Study:
    return small_study(trials=12)


def new_run(path: Path, study: Study) -> Run:
    with Run.draft(path) as draft:
        return Run(draft, study, TABLE, note="of a tie").begin(path)


@pytest.fixture
def records(tmp_path: Path, study: Study) -> Records:
    return Records(new_run(tmp_path / "run", study))


def frozen(records: Records, number: int) -> optuna.trial.FrozenTrial:
    """The trial as another process reads it from the file."""
    url = f"sqlite:///{records.run.storage}"
    return optuna.load_study(study_name=STUDY_NAME, storage=url).get_trials()[number]


def plan_of(proposal: Proposal) -> FoldPlan:
    return ordered_plan(proposal, ORDERS, NUM_BLOCKS, base=0)


def tell(records: Records, number: int, trial: Trial) -> None:
    """What a worker tells of this trial: a plan and results as those of another one."""
    records.record(replace(trial, number=number, proposal=records.get(number).proposal))


def changed_last(trial: Trial, **changes: Any) -> Trial:
    """The trial with another quality at its last rung."""
    last = replace(trial.last, quality=replace(trial.quality, **changes))
    return replace(trial, results=(*trial.results[:-1], last))


def run_whole(records: Records, number: int, proposal: Proposal) -> None:
    study = records.run.study
    for rung in range(len(study.rungs)):
        tell(records, number, trial_at(plan_of(proposal), study, rung, proposal))
    records.finish(number)


def run_line(records: Records) -> list[Proposal]:
    line = Line(records)
    proposals = []
    while (asked := line.next(num_running=0)) is not None:
        run_whole(records, *asked)
        proposals.append(asked[1])
    return proposals


# ---- what became of whom


def test_a_trial_that_reached_the_last_rung_is_complete(records: Records, study: Study) -> None:
    number, proposal = records.ask()
    run_whole(records, number, proposal)
    trial = frozen(records, number)
    expected = trial_at(plan_of(proposal), study, 2, proposal, number)
    assert trial.state == TrialState.COMPLETE
    assert trial.values == [expected.quality.kl, expected.cost.memory_bytes / 1e9, expected.cost.flops]
    assert trial.constraints["memory"] == expected.cost.memory_bytes / 7e6 - 1
    assert trial.system_attrs["constraints"] == [trial.constraints["memory"]]  # the dashboard's key
    assert read_trials(records.run)[number] == records.get(number) == expected


def test_the_dashboard_finds_metric_names_and_notes(records: Records, study: Study) -> None:
    number, proposal = records.ask()
    run_whole(records, number, proposal)
    loaded = optuna.load_study(study_name=STUDY_NAME, storage=f"sqlite:///{records.run.storage}")
    assert loaded.metric_names == ["KL to dense (nats per token)", "memory (GB)", "FLOPs per token"]
    trial = loaded.get_trials()[number]
    text = get_note(optuna.Trial(loaded, trial._trial_id))
    assert text == note(records.get(number))
    assert str(plan_of(proposal)) in text


def test_the_front_grows_by_one_trial_at_a_time(
    records: Records, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: `front` over all records. Only the front so far is looked at again, however many trials there are."""
    looked_at: list[int] = []

    def counted(found: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
        looked_at.append(len(found))
        return front(found, objectives)

    monkeypatch.setattr("foldsearch.search.records.front", counted)
    rng = random.Random(0)
    numbers: list[int] = []
    for count in range(15):
        number, _ = records.ask()
        numbers.append(number)
        removed = rng.sample(range(1, NUM_BLOCKS), rng.randint(3, 6))
        trial = trial_at(FoldPlan.dropping(removed, NUM_BLOCKS), study, 2)
        if count % 5 == 4:  # the plan of another trial once more, now better and now worse
            trial = replace(trial, draft=records.get(numbers[-2]).draft)
        tell(records, number, changed_last(trial, kl=rng.random()))
        before = len(records.front())
        assert records.finish(number) == "finished"
        assert records.front() == front(records.all(), records.objectives)
        assert looked_at.pop() == before + 1
        assert looked_at == []
    assert 1 < before < 15


@pytest.mark.parametrize("kl", [math.inf, math.nan, -math.inf])
def test_infinite_objectives_fail(records: Records, study: Study, kl: float) -> None:
    number, proposal = records.ask()
    tell(records, number, changed_last(trial_at(plan_of(proposal), study, 2), kl=kl))
    assert records.finish(number) == "failed"
    trial = frozen(records, number)
    assert (trial.state, trial.values) == (TrialState.FAIL, None)
    assert "not finite" in read_trials(records.run)[number].reason


def test_failures_are_rows_with_their_reason(records: Records, study: Study) -> None:
    number, proposal = records.ask()
    failed = replace(trial_at(plan_of(proposal), study, 1), state="failed", reason="diverged: loss is nan")
    tell(records, number, failed)
    assert records.finish(number) == "failed"
    assert frozen(records, number).state == TrialState.FAIL
    assert read_trials(records.run)[number].reason == "diverged: loss is nan"


def test_stopped_trials_are_pruned_and_never_on_the_front(records: Records, study: Study) -> None:
    number, _ = records.ask()
    best = trial_at(FoldPlan.dropping([1, 2, 3, 4], NUM_BLOCKS), study, 1)
    tell(records, number, changed_last(best, kl=0.0))
    records.stop(number, "place 3 of 4")
    assert frozen(records, number).state == TrialState.PRUNED
    trial = read_trials(records.run)[number]
    assert (trial.state, trial.reason, len(trial.results)) == ("stopped", "place 3 of 4", 2)
    assert front([trial]) == []


def test_infeasible_trials_are_pruned_with_their_constraints(records: Records, study: Study) -> None:
    number, _ = records.ask()
    over = replace(trial_at(FoldPlan.identity(NUM_BLOCKS), study, 0), results=(), state="infeasible")
    tell(records, number, over)
    assert records.finish(number) == "infeasible"
    trial = frozen(records, number)
    assert trial.state == TrialState.PRUNED
    assert trial.constraints["memory"] == pytest.approx(over.cost.memory_bytes / 7e6 - 1)
    assert read_trials(records.run)[number].state == "infeasible"


def test_a_known_plan_is_complete_but_once_on_the_front(records: Records, study: Study) -> None:
    Line(records)  # two baselines, whose recovery settings are the same
    (first, proposal), (second, _) = records.ask(), records.ask()
    run_whole(records, first, proposal)
    know(records, second, first)
    assert records.finish(second) == "finished"
    assert frozen(records, second).values == frozen(records, first).values
    assert [record.number for record in records.front()] == [first]


def know(records: Records, number: int, other: int) -> None:
    """As `run_trial` does where another trial has measured the plan."""
    tell(records, number, known(records.get(other), other))


def test_figures_are_told_of_the_settings_that_they_came_from(records: Records) -> None:
    """A sampler learns nothing of a trial whose plan was trained with other settings than its own."""
    Line(records)
    for _ in range(4):
        run_whole(records, *records.ask())
    number, proposal = records.ask()
    assert proposal.recovery != records.get(0).proposal.recovery
    know(records, number, 0)
    assert records.finish(number) == "repeat"
    trial = frozen(records, number)
    assert (trial.state, trial.values) == (TrialState.FAIL, None)
    read = read_trials(records.run)[number]
    assert read == records.get(number)
    assert (read.state, read.reason, read.known_from, read.is_trial) == (
        "repeat", "the plan of trial 0", 0, True,
    )  # fmt: skip
    assert number not in {one.number for one in records.front()}


def test_untrained_figures_are_of_any_settings(tmp_path: Path, study: Study) -> None:
    untrained = study.model_copy(update={"rungs": (0,)})
    records = Records(new_run(tmp_path / "untrained", untrained))
    for _ in range(4):
        run_whole(records, *records.ask())
    number, _ = records.ask()
    know(records, number, 0)
    assert records.finish(number) == "finished"


def test_a_plan_counts_once_with_the_best_of_its_starts(tmp_path: Path) -> None:
    space: Any = {
        "fates": ["share"],
        "criteria": ["window"],
        "removal": [0.25, 0.25],
        "neighbour_share": 0.0,
        "children": {"ranks": [4], "starts": ["zero", "data"]},
    }
    records = Records(new_run(tmp_path / "starts", small_study(space=space, budget={}, sampler="random")))
    kl_of = {}
    while len(kl_of) < 2:
        number, proposal = records.ask()
        trial = trial_at(plan_of(proposal), records.run.study, 2)
        better = proposal.fold.adapter_start == "data"
        tell(records, number, changed_last(trial, kl=trial.quality.kl - better))
        records.finish(number)
        kl_of[proposal.fold.adapter_start] = number
    assert len({records.get(number).plan for number in kl_of.values()}) == 1
    assert [record.number for record in records.front()] == [kl_of["data"]]


# ---- no trial is spent on a plan that is known


def small_space(**more: Any) -> Any:
    space = {"criteria": ["window"], "removal": [0.2, 0.4], "neighbour_share": 0.0}
    return {**space, "groups": {"max_groups": 1, "adapter_ranks": [0]}, **more}


@pytest.mark.parametrize("sampler", ["tpe", "random", pytest.param("nsga2", marks=pytest.mark.slow)])
def test_suggestions_that_repeat_a_plan_are_drawn_again(tmp_path: Path, sampler: str) -> None:
    """The book tells which blocks a criterion removes at a count, whatever becomes of them.

    Three counts, dropped or replaced by one of two networks: nine plans in all, and nine trials. Oracle: the plans of
    what was run, none of them twice; and what was drawn again is a row without a result.
    """
    space = small_space(fates=["drop", "replace"], replace={"kinds": ["linear", "ffn"]})
    space["groups"]["max_groups"] = 0
    records = Records(
        new_run(tmp_path / "run", small_study(space=space, budget={}, trials=9, sampler=sampler))
    )
    proposals = run_line(records)
    plans = [plan_of(proposal) for proposal in proposals]
    assert records.space.counts(NUM_BLOCKS) == (3, 4)
    assert len(plans) - len(set(plans)) <= 9 - 6  # at two counts there are six plans only
    drawn_again = [record for record in records.all() if record.state == "repeat"]
    assert drawn_again
    assert not any(record.is_trial or record.results for record in drawn_again)
    for record in drawn_again:
        assert record.proposal is not None
        (of,) = {int(word) for word in record.reason.split() if word.isdigit()}
        assert records.get(of).plan == plan_of(record.proposal)


def test_what_a_criterion_removes_is_read_off_any_plan_of_it(records: Records) -> None:
    """Children that came back with their bases, a replaced run, and groups over what is kept."""
    Line(records)
    number, proposal = records.ask()
    run_whole(records, number, proposal)
    count = count_of(proposal)
    gate = replace(retrained(proposal, learning_rate=2e-3), origin="sampler")
    assert records.foretell(gate) == number  # recovery settings aside
    assert records.foretell(changed(gate, count=count + 1)) is None
    assert records.foretell(changed(gate, setting=1.0)) is None  # other gates
    assert records.foretell(given(plan_of(proposal))) == number
    replaced = changed(gate, fate=Replace("linear"))
    assert records.foretell(replaced) is None
    for other in (
        replaced,
        changed(gate, fate=Share(8)),
        changed(gate, groups=Groups(1, 2, start=1, rank=8)),
    ):
        removed = ORDERS["gate"][:count]
        bases = dict.fromkeys(removed, 0)
        plan = fold_plan(removed, other.fold, NUM_BLOCKS, bases=bases)
        assert other.removed is not None
        fate = other.removed.fate
        assert fate.undo(plan) == (tuple(sorted(removed)), bases if fate.name == "share" else {})


def test_after_many_repeats_a_neighbour_is_taken(tmp_path: Path) -> None:
    """One plan in the whole space: the second trial is near it, although the space asks for no neighbours."""
    space = small_space(removal=[0.25, 0.25])
    space["groups"]["max_groups"] = 0
    records = Records(new_run(tmp_path / "run", small_study(space=space, budget={}, trials=3)))
    first, *others = run_line(records)
    assert first.origin == "baseline"
    assert {proposal.origin for proposal in others} == {"neighbour"}
    # where no neighbours are taken, repeats are run, cheaply, and the run ends
    run = new_run(tmp_path / "nsga2", small_study(space=space, budget={}, trials=3, sampler="nsga2"))
    assert len(run_line(Records(run))) == 3


def test_a_neighbour_starts_its_adapters_as_its_parent_did(tmp_path: Path) -> None:
    space = small_space(fates=["share"], children={"ranks": [4], "starts": ["data"]}, neighbour_share=1.0)
    records = Records(new_run(tmp_path / "run", small_study(space=space, budget={}, trials=12)))
    proposals = run_line(records)
    children = [p for p in proposals if p.plan is not None and "+r" in str(p.plan)]
    assert children
    assert {proposal.fold.adapter_start for proposal in children} == {"data"}


# ---- the front


def test_the_front_is_what_nothing_dominates(records: Records, study: Study) -> None:
    run_line(records)
    finished = [record for record in records.all() if record.state == "finished"]
    points = {record.number: point(record, records.objectives) for record in finished}
    expected = {n for n, p in points.items() if not any(dominates(q, p) for q in points.values())}
    on_front = {record.number for record in records.front()}
    assert on_front <= expected
    assert {records.get(n).plan for n in expected} == {records.get(n).plan for n in on_front}


# ---- who is next


def test_each_criterion_comes_first_at_the_count_that_just_fits(records: Records) -> None:
    line = Line(records)
    folder = records.run
    count = baseline_count(records.space, folder.table, folder.target, folder.budget)
    assert count is not None
    budget = records.run.budget
    costs = {
        k: trial_at(FoldPlan.dropping(range(k), NUM_BLOCKS), records.run.study, 0).cost for k in range(1, 12)
    }
    assert count == min(k for k, cost in costs.items() if budget.admits(cost))
    first = [line.next(num_running=0) for _ in range(4)]
    criteria = [criterion_in(asked[1]) for asked in first if asked is not None]
    assert criteria == list(records.space.criteria)
    for asked in first:
        assert asked is not None
        proposal = asked[1]
        assert (count_of(proposal), groups_of(proposal), proposal.origin) == (count, None, "baseline")
        assert records.get(asked[0]).exempt


def test_without_a_budget_the_far_end_of_the_front_is_begun_with_too(tmp_path: Path, study: Study) -> None:
    free = study.model_copy(update={"budget": BudgetSettings()})
    line = Line(Records(new_run(tmp_path / "free", free)))
    proposals = [asked[1] for asked in (line.next(num_running=0) for _ in range(5)) if asked is not None]
    fewest, most = line.records.space.counts(NUM_BLOCKS)
    assert fewest < round(0.2 * NUM_BLOCKS) < most
    counts = [count_of(proposal) for proposal in proposals]
    assert counts == [round(0.2 * NUM_BLOCKS)] * 4 + [most]
    assert (criterion_in(proposals[4]), proposals[4].origin) == (line.records.space.criteria[0], "start")


def test_the_line_ends_with_what_the_front_still_needs(records: Records, study: Study) -> None:
    run_line(records)
    known = records.all()
    assert study.trials is not None
    assert sum(record.is_trial and not record.closing for record in known) == study.trials
    closing = [record for record in known if record.closing]
    assert closing == known[-len(closing) :]  # they are the last ones
    assert all(record.exempt and record.state == "finished" for record in closing)
    assert missing_baselines(records) == [] or len(closing) == 16
    assert Line(records).next(num_running=0) is None


@pytest.mark.parametrize("origin", ["baseline", "start"])
def test_a_baseline_that_misses_the_budget_is_tried_with_one_block_more(tmp_path: Path, origin: str) -> None:
    """Counts are chosen by a bound; blocks of other prices may not keep it."""
    records = Records(new_run(tmp_path / "run", small_study(trials=1)))
    Line(records)
    count = baseline_count(records.space, TABLE, records.run.target, records.run.budget)
    number, proposal = records.ask()
    if origin == "start":
        records._change(number, proposal=replace(proposal, origin="start"))
    over = replace(trial_at(FoldPlan.identity(NUM_BLOCKS), records.run.study, 0), results=())
    tell(records, number, replace(over, state="infeasible"))
    assert records.finish(number) == "infeasible"
    proposals = [records.ask()[1] for _ in range(4)]
    assert not records.anyone_waits
    assert [(criterion_in(p), count_of(p), p.origin) for p in proposals] == [
        *((criterion, count, "baseline") for criterion in records.space.criteria[1:]),
        (criterion_in(proposal), count + 1, origin),
    ]


def test_a_baseline_that_misses_the_budget_is_tried_with_the_next_count_of_the_space(tmp_path: Path) -> None:
    asked = small_study(trials=12)
    asked = asked.model_copy(update={"space": asked.space.model_copy(update={"step": 2})})
    records = Records(new_run(tmp_path / "run", asked))
    Line(records)
    number, proposal = records.ask()
    over = replace(trial_at(FoldPlan.identity(NUM_BLOCKS), asked, 0), results=())
    tell(records, number, replace(over, state="infeasible"))
    records.finish(number)
    after = [row.user_attrs["removes"] for row in records.study.get_trials() if "after" in row.user_attrs]
    assert after == [[criterion_in(proposal), count_of(proposal) + 2]]


def test_a_repeat_stands_for_nothing_once_its_trial_has_failed(records: Records) -> None:
    proposal = removing("block_influence", 3)
    first, second = (records.ask()[0] for _ in range(2))
    records._change(first, proposal=proposal)
    assert records.foretell(proposal) == first
    records._end(second, "repeat", f"the plan of trial {first}", proposal=proposal)
    assert records.foretell(proposal) == first
    records.fail(first, "crashed")
    assert records.foretell(proposal) is None


def test_the_front_is_in_the_same_order_in_a_process_that_goes_on(records: Records, study: Study) -> None:
    """By order neighbours draw their parents. A plan is measured twice where its adapters start in two ways."""
    plans = [FoldPlan.dropping(removed, NUM_BLOCKS) for removed in ([3, 4, 5, 6], [5, 6], [7, 8, 9])]
    for plan, start, kl in zip(
        (plans[0], plans[1], plans[0], plans[2]),
        ("svd", "svd", "zero", "svd"),
        (1, 0.1, 0.9, 0.5),
        strict=True,
    ):
        number, _ = records.ask()
        trial = changed_last(trial_at(plan, study, len(study.rungs) - 1), kl=kl)
        records.record(replace(trial, number=number, proposal=given(plan, start=start)))
        records.finish(number)
    assert [trial.number for trial in records.front()] == [1, 2, 3]
    assert Records(records.run).front() == records.front()


@pytest.mark.parametrize("begun", [True, False])
def test_a_row_that_a_dashboard_ended_is_a_failed_trial(records: Records, study: Study, begun: bool) -> None:
    """Its button sets the state of a row that is running, or waits."""
    number, proposal = records.ask()
    if begun:
        tell(records, number, trial_at(plan_of(proposal), study, 0, proposal))
    records.study._storage.set_trial_state_values(records._rows[number]._trial_id, TrialState.FAIL)
    tell(records, number, trial_at(plan_of(proposal), study, 1, proposal))
    assert (records.get(number).state, records.get(number).reason) == ("failed", ENDED_BY_HAND)
    assert records.finish(number) == "failed"
    assert records.front() == []
    following, other = records.ask()
    run_whole(records, following, other)
    again = Records(records.run)
    assert (again.get(number).state, again.get(number).reason) == ("failed", ENDED_BY_HAND)
    assert again.get(following).state == "finished"
    # Folders of these trials were never written, which both tell; of rows nothing is wrong.
    assert not [fault for fault in check_run(records.run, repair=False).left if "its row is" in fault.words]
    assert not [words for words in mend_for_resume(records.run) if "its row is" in words]


def test_a_baseline_at_the_most_blocks_is_not_tried_with_more(tmp_path: Path) -> None:
    records = Records(new_run(tmp_path / "run", small_study(budget={}, trials=1)))
    most = records.space.counts(NUM_BLOCKS)[1]
    Line(records)
    asked = [records.ask() for _ in records.all()]
    number = next(number for number, proposal in asked if count_of(proposal) == most)
    over = replace(trial_at(FoldPlan.identity(NUM_BLOCKS), records.run.study, 0), results=())
    tell(records, number, replace(over, state="infeasible"))
    assert records.finish(number) == "infeasible"
    assert not records.anyone_waits


def test_a_running_trial_may_still_bring_one(records: Records) -> None:
    line = Line(records)
    asked = [line.next(num_running=0) for _ in range(12)]
    assert all(one is not None for one in asked)
    assert line.next(num_running=3) is None
    assert not any(record.closing for record in records.all())


def test_seconds_end_the_search(tmp_path: Path, study: Study) -> None:
    records = Records(new_run(tmp_path / "timed", study.model_copy(update={"trials": None, "seconds": 50.0})))
    records.note_elapsed(50.0)
    assert run_line(records) == []
    assert "are spent, so nothing begins" in Line(records).begin_words()
    records.note_elapsed(records.elapsed / 2)
    words = Line(records, closing=records.run.study.seconds).begin_words()
    assert "to measure the dense model in fewer bits, so nothing begins" in words


def test_seconds_are_counted_over_processes(records: Records) -> None:
    records.note_elapsed(12.5)
    assert Records(records.run).elapsed == 12.5
    assert Line(Records(records.run)).elapsed() >= 12.5


def test_all_that_is_asked_for_fits_and_neighbours_are_among_it(tmp_path: Path, study: Study) -> None:
    study = study.model_copy(
        update={"trials": 30, "space": study.space.model_copy(update={"neighbour_share": 0.5})}
    )
    records = Records(new_run(tmp_path / "neighbours", study))
    proposals = run_line(records)
    plans = [plan_of(proposal) for proposal in proposals]
    assert all(records.run.budget.admits(trial_at(plan, study, 0).cost) for plan in plans)
    neighbours = [plan for plan, p in zip(plans, proposals, strict=True) if p.origin == "neighbour"]
    assert len(neighbours) > 5
    assert len(set(neighbours)) == len(neighbours)
    low, high = study.space.recover.learning_rate
    assert all(low <= proposal.recovery.learning_rate <= high for proposal in proposals)


@pytest.mark.parametrize("sampler", ["tpe", "random", pytest.param("nsga2", marks=pytest.mark.slow)])
def test_a_seed_gives_the_same_proposals_and_another_does_not(
    tmp_path: Path, study: Study, sampler: str
) -> None:
    def proposals(name: str, seed: int) -> list[Proposal]:
        changed = study.model_copy(update={"sampler": sampler, "seed": seed, "trials": 11})
        return run_line(Records(new_run(tmp_path / name, changed)))

    found = proposals("a", 1)
    assert found == proposals("b", 1)
    if sampler == "random":
        assert found != proposals("c", 2)


def test_reopened_it_goes_on_and_repeats_no_suggestion(records: Records, study: Study) -> None:
    study_random = study.model_copy(update={"sampler": "random"})
    assert study_random.seed == 0
    first = [records.ask() for _ in range(3)]
    run_whole(records, *first[0])
    tell(records, first[1][0], trial_at(plan_of(first[1][1]), study, 0))
    again = Records(records.run)
    assert again.all() == records.all()
    assert again.ask() == first[1]  # interrupted after its first rung
    assert again.ask() == first[2]  # interrupted before it
    number, proposal = again.ask()
    assert number == 3
    assert proposal.recovery.learning_rate not in {one.recovery.learning_rate for _, one in first}


def test_a_trial_that_was_only_not_told_is_told(records: Records, study: Study) -> None:
    number, proposal = records.ask()
    tell(records, number, trial_at(plan_of(proposal), study, 2))
    again = Records(records.run)
    assert again.ask()[0] == number + 1
    assert again.get(number).state == "finished"
    assert frozen(again, number).state == TrialState.COMPLETE


def test_a_trial_that_was_killed_while_it_was_proposed_is_proposed_again(records: Records) -> None:
    trial = records.study.ask()
    number, proposal = Records(records.run).ask()
    assert number == trial.number
    assert proposal.origin == "sampler"


def test_objectives_can_be_fewer(tmp_path: Path, study: Study) -> None:
    records = Records(new_run(tmp_path / "two", study.model_copy(update={"objectives": ("kl", "flops")})))
    number, proposal = records.ask()
    run_whole(records, number, proposal)
    trial = records.get(number)
    assert frozen(records, number).values == [trial.quality.kl, trial.cost.flops]


# ---- the run folder


def test_a_run_folder_reads_back(tmp_path: Path, study: Study) -> None:
    made = new_run(tmp_path / "run", study)
    assert Run.open(tmp_path / "run") == made
    assert read_trials(made) == []
    assert sorted(path.name for path in made.path.iterdir()) == ["study.json", "table.json"]


def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path: Path, study: Study) -> None:
    class Stop(Exception):
        pass

    def begin() -> None:
        with Run.draft(tmp_path / "run") as draft:
            (draft / "tokens").write_text("x")
            raise Stop

    with pytest.raises(Stop):
        begin()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_taken_or_no_runs_are_refused(tmp_path: Path, study: Study) -> None:
    new_run(tmp_path / "run", study)
    with pytest.raises(RunError, match="there already"), Run.draft(tmp_path / "run"):
        pass
    with pytest.raises(RunError, match=r"holds study\.json"):
        Run.open(tmp_path)
    path = tmp_path / "run" / "study.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "foldsearch": "0.0.1"}))
    with pytest.raises(RunError, match=r"a run of foldsearch 0\.0\.1"):
        Run.open(tmp_path / "run")
    path.write_text(json.dumps({**value, "schema": 7}))
    with pytest.raises(RunError, match=r"\(schema 7\), but this is .* \(schema 12\)"):
        Run.open(tmp_path / "run")
    path.write_text(json.dumps({**value, "study": {**value["study"], "sampler": "magic"}}))
    with pytest.raises(RunError, match="incomplete"):
        Run.open(tmp_path / "run")
    path.write_text(path.read_text()[:40])
    with pytest.raises(RunError, match="cannot be read"):
        Run.open(tmp_path / "run")


def test_a_resumed_run_may_change_its_limits_only(tmp_path: Path, study: Study) -> None:
    run = new_run(tmp_path / "run", study)
    changed = run.with_limits(study.model_copy(update={"trials": 50, "jobs": 2}))
    assert Run.open(run.path).study == study  # the run may yet be refused
    changed.keep_limits()
    assert Run.open(run.path).study.trials == 50
    with pytest.raises(RunError, match="seed was 0, is 1"):
        run.with_limits(study.model_copy(update={"seed": 1}))


def test_one_writer_at_a_time(tmp_path: Path, study: Study) -> None:
    run = new_run(tmp_path / "run", study)
    with run.held(), pytest.raises(RunError, match="another one is at work"), run.held():
        pass
    with run.held():
        pass


def test_a_budget_out_of_reach_is_refused(tmp_path: Path, study: Study) -> None:
    tight = study.model_copy(update={"budget": study.budget.model_copy(update={"gb": 0.001})})
    with pytest.raises(BudgetError, match="its smallest reaches"):
        Records(new_run(tmp_path / "tight", tight))


def test_a_trial_survives_json(study: Study) -> None:
    proposal = removing("window", 1, Share(2))
    trial = trial_at(FoldPlan.dropping([3], NUM_BLOCKS), study, 1, proposal, 4)
    assert from_json(Trial, json.loads(json.dumps(to_json(trial)))) == trial
    assert from_json(Trial, json.loads(json.dumps(to_json(Trial(7, "waiting"))))) == Trial(7, "waiting")


def test_a_damaged_trial_is_told(tmp_path: Path, study: Study) -> None:
    run = new_run(tmp_path / "run", study)
    assert read_trial(run.trial(3)) is None
    run.trial(3).path.mkdir(parents=True)
    for text in ("{", '{"plan": "0-2", "results": []}'):  # the second one as before schema 8
        run.trial(3).record.write_text(text)
        with pytest.raises(RunError, match=r"00003/trial\.json', cannot be read.*Put back a copy of it"):
            read_trial(run.trial(3))


# ---- the dry run


def test_a_dry_run_says_what_a_run_would_find(tmp_path: Path, study: Study) -> None:
    found = plan_search(study, TABLE, num_proposals=2000)
    records = Records(new_run(tmp_path / "run", study))
    assert found.counts == records.space.counts(NUM_BLOCKS)
    assert found.dense == records.run.dense
    assert found.smallest_cost == price(found.smallest, TABLE, study.target.value())
    assert 0 < found.feasible_share < 1
    assert found.notice == ""
    assert min(found.seconds, found.disk_bytes, found.memory_bytes) > 0
    twice = plan_search(study.model_copy(update={"trials": 24}), TABLE, num_proposals=10)
    assert twice.seconds > found.seconds
    assert plan_search(study.model_copy(update={"seconds": 0.001}), TABLE, num_proposals=10).seconds == 0.001
    untold = plan_search(
        study.model_copy(update={"screen": ScreenSettings(plans=0)}), TABLE, num_proposals=10
    )
    assert untold.seconds < found.seconds
    assert untold.memory_bytes < found.memory_bytes
    plain = plan_search(
        study.model_copy(update={"healing": HealingSettings(tokens=0)}), TABLE, num_proposals=10
    )
    assert plain.seconds < found.seconds
    assert plain.disk_bytes < found.disk_bytes
    assert plain.memory_bytes < found.memory_bytes


def test_a_dry_run_counts_the_trials_that_every_run_begins_with(tmp_path: Path, study: Study) -> None:
    few = study.model_copy(update={"trials": 1})
    line = Line(Records(new_run(tmp_path / "few", few)))
    assert plan_search(few, TABLE, num_proposals=10).trials == len(line.records.all()) == 4
    assert plan_search(study, TABLE, num_proposals=10).trials == study.trials


def test_a_budget_that_dense_keeps_is_said(study: Study) -> None:
    roomy = study.model_copy(update={"budget": study.budget.model_copy(update={"gb": 1.0})})
    dense = price(FoldPlan.identity(len(TABLE.blocks)), TABLE, study.target.value()).memory_bytes
    words = f"keeps the budget already (it needs {dense / 1e9:.6g} GB)"
    assert words in plan_search(roomy, TABLE, num_proposals=10).notice


def test_a_search_that_memory_may_not_hold_is_told(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "run", study.model_copy(update={"jobs": 2}))
    needed = dry_run.memory_needed(run, "float32")
    weights = run.dense.weight_bytes // 2  # of the target's bfloat16, in number
    assert needed - dry_run.memory_needed(run, "bfloat16") == 2 * weights
    monkeypatch.setattr(dry_run, "free_memory", lambda: needed)
    assert dry_run.lacks_memory(run, "float32") == ""
    monkeypatch.setattr(dry_run, "free_memory", lambda: needed - 1)
    words = dry_run.lacks_memory(run, "float32")
    assert f"about {needed / 1e9:.1f} GB of memory" in words
    assert "fewer jobs" in words
    assert "screen.plans = 0" in words


# ---- what a neighbour may be


def test_every_neighbour_can_be_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter wider than the model: `fold` refuses it, so it is not proposed."""
    space = {**SPACE, "criteria": ["window"], "neighbour_share": 1.0}
    records = Records(new_run(tmp_path / "run", small_study(space=space, budget={})))
    line = Line(records)
    for _ in range(2):  # the baseline, and the far end of the front
        run_whole(records, *line.next(num_running=0))
    assert records.run.table.width == 100
    moves = iter(["0-10 11=9+r128+n", "0-10 11=9+r64+n"])
    monkeypatch.setattr(
        "foldsearch.search.records.neighbour", lambda plan, rng: FoldPlan.parse(next(moves), NUM_BLOCKS)
    )
    _, proposal = line.next(num_running=0)
    assert (proposal.origin, str(proposal.plan)) == ("neighbour", "0-10 11=9+r64+n")


def test_neighbours_keep_what_the_runtime_can_hold(tmp_path: Path) -> None:
    space = {**SPACE, "neighbour_share": 1.0, "fates": ["drop", "share"]}
    target = {"runtime": "stock"}
    records = Records(new_run(tmp_path / "run", small_study(space=space, target=target, trials=24)))
    proposals = run_line(records)
    assert sum(proposal.origin == "neighbour" for proposal in proposals) > 10
    assert all(runtime_named("stock").refusal(plan_of(proposal)) is None for proposal in proposals)


def test_nsga2_takes_no_neighbours(tmp_path: Path) -> None:
    """It crosses what all trials of its population have: a neighbour's two parameters would be all that is crossed."""
    for sampler, expected in (("nsga2", False), ("random", True)):
        run = new_run(tmp_path / sampler, small_study(trials=16, sampler=sampler))
        origins = {proposal.origin for proposal in run_line(Records(run))}
        assert ("neighbour" in origins) is expected


# ---- closing


@pytest.mark.parametrize("name", [*shipped("spaces"), "thinned"])
def test_a_space_recognises_its_own_baselines(tmp_path: Path, name: str) -> None:
    """So no criterion is tried again at a count where its baseline was."""
    space: Any = {"criteria": ["window", "greedy"], "attention": [0.1, 0.3], "removal": [0.1, 0.5]}
    chosen = space if name == "thinned" else name
    records = Records(new_run(tmp_path / "run", small_study(space=chosen, budget={}, trials=1)))
    line = Line(records)
    begun_with = len(records.all())
    for _ in range(begun_with):
        asked = line.next(num_running=0)
        assert asked is not None
        number, proposal = asked
        assert proposal.origin in ("baseline", "start")
        assert is_baseline(proposal, records.space, NUM_BLOCKS)
        run_whole(records, number, proposal)
    tried = {(record.removed.criterion, record.removed.count) for record in records.all() if record.removed}
    assert len(tried) == begun_with
    assert not tried & set(missing_baselines(records))


@pytest.mark.parametrize("fate", ["drop", "share", "replace"])
def test_closing_compares_the_criteria_whatever_becomes_of_removed_blocks(tmp_path: Path, fate: str) -> None:
    space = {"criteria": ["window", "greedy"], "fates": [fate], "removal": [0.2, 0.5]}
    records = Records(new_run(tmp_path / "run", small_study(space=space, budget={}, trials=4)))
    line = Line(records)
    for _ in range(3):  # both baselines at 2 blocks, and the first criterion at 6
        number, proposal = line.next(num_running=0)
        run_whole(records, number, proposal)
    missing = missing_baselines(records)
    assert missing == [("greedy", 6)]


def test_no_closing_beyond_the_cap_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(
        new_run(tmp_path / "run", small_study(trials=12, seed=5))
    )  # its front ends on two counts
    run_line(records)
    closed = sum(record.closing for record in records.all())
    monkeypatch.setattr("foldsearch.search.proposer.CLOSING_COUNTS", 1)
    assert closed > 1 * len(records.space.criteria)  # the cap once time is up: one round
    monkeypatch.setattr("foldsearch.search.proposer.missing_baselines", lambda _: [("window", 1)] * closed)
    line = Line(records)
    line.study = line.study.model_copy(update={"seconds": 0.001})
    assert line.next(num_running=0) is None
