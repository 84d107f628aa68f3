"""Screening a real tiny model: what is asked for, what comes of it, and what the run then trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from foldsearch import criteria
from foldsearch.context import TrialContext, close_workbench, open_workbench
from foldsearch.criteria import CRITERIA, Choice, Criterion, Request, Setting
from foldsearch.errors import ModelError
from foldsearch.fates.replace import Networks
from foldsearch.model.screen import Screen
from foldsearch.model.tokens import Kinds
from foldsearch.plan.cost import GB, price
from foldsearch.plan.front import dominates, knee
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.run import Run
from foldsearch.search import screening as screenings
from foldsearch.search.chain import MLP_ONLY, code_of
from foldsearch.search.events import Event, Preparing, SearchDone
from foldsearch.search.records import Records, read_trials
from foldsearch.search.run import Search, run_search
from foldsearch.search.screened import (
    Promoted,
    compared_criteria,
    is_screened,
    read_screened,
    screened_by_count,
    screened_states,
    write_screened,
)
from foldsearch.search.screening import Screening
from foldsearch.spec.space import GroupsTable, Space
from foldsearch.spec.study import BudgetSettings, HealingSettings, ScreenSettings, SplitSettings, Study
from tests.contexts import of_study, tiny_study
from tests.tiny import NUM_BLOCKS, as_tokens

SPACE = Space(removal=(0.0, 0.8), criteria=("block_influence", "uniform"), attention=(0.0, 0.4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("screening")


@pytest.fixture(scope="module")
def study(place: Path) -> Study:
    return tiny_study(
        place,
        space=SPACE,
        splits=SplitSettings(sequence_length=32, search=4, recovery=8, report=2),
        trials=4,
        screen=ScreenSettings(plans=24, promoted=3, healed_tokens=128, judged_tokens=64),
    )


QUICK = {criterion.name for criterion in CRITERIA if criterion.is_quick}


@pytest.fixture(scope="module")
def context(study: Study, place: Path) -> TrialContext:
    return prepare_context(study, place / "run", cache_dir=place / "cache")


@pytest.fixture(scope="module")
def screened(context: TrialContext) -> Screening:
    screening = Screening(context, SPACE)
    screening.run()
    return screening


def test_what_is_asked_for(screened: Screening) -> None:
    found = screened.found
    assert len(found) == 24
    assert len({one.plan for one in found}) == 24
    alone = [one.plan for one in found if "alone" in one.authors]
    assert len(alone) == NUM_BLOCKS
    assert set(alone) == {FoldPlan.dropping([block], NUM_BLOCKS) for block in range(NUM_BLOCKS)}
    begin = [set(one.authors) & QUICK for one in found]
    assert sorted(map(bool, begin), reverse=True) == [*map(bool, begin)]  # who has little time has the rivals
    assert {"alone", "uniform", "chain", "move"} <= {author for one in found for author in one.authors}
    assert all(one.plan.adds_nothing for one in found)
    assert all(one.quality.tokens == 2 * 31 for one in found)


def test_the_front_is_what_brute_force_finds(screened: Screening, context: TrialContext) -> None:
    points = {
        one.plan: (
            one.quality.kl,
            *((cost := price(one.plan, context.table, context.target)).memory_bytes, cost.flops),
        )
        for one in screened.found
    }
    undominated = {plan for plan in points if not any(dominates(o, points[plan]) for o in points.values())}
    assert {one.plan for one in screened.front()} == undominated
    promoted = screened.promoted()
    assert len(promoted.plans) == 3 == len(set(promoted.plans))
    assert set(promoted.plans) <= undominated
    lowest = min(undominated, key=lambda plan: points[plan][0])
    assert promoted.plans[0] == lowest
    plans = sorted(undominated, key=lambda plan: points[plan][0])
    middle = len(plans[knee([points[plan] for plan in plans])].dropped)
    at_count = {
        (abs(len(one.plan.dropped) - middle), one.quality.kl): (author, len(one.plan.dropped))
        for one in screened.found
        for author in one.authors
        if author in SPACE.criteria
        and one.plan not in promoted.plans  # else it would tell nothing of the search
    }
    assert promoted.rival == at_count[min(at_count)]


def test_what_is_known_is_there_at_once_and_not_measured_again(
    screened: Screening, context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later run has all that was measured before it measures anything, and another budget's part of it too."""
    known = {one.plan: (one.quality, set(one.authors)) for one in screened.found}
    real, measured = Screen.measure, []

    def note(self: Screen, plan: FoldPlan, *rest: Any) -> Any:
        measured.append(plan)
        return real(self, plan, *rest)

    monkeypatch.setattr(Screen, "measure", note)
    again = Screening(
        of_study(context, screen=ScreenSettings(plans=2, healed_tokens=128, judged_tokens=64)), SPACE
    )
    found = {one.plan: (one.quality, set(one.authors)) for one in again.run()}
    assert known.items() <= found.items()
    assert set(measured) == found.keys() - known.keys()
    assert len(measured) == 2 == again.num_new  # what is known is told apart from what is measured
    out_of_time = Screening(context, SPACE, seconds=1e-9)
    assert {one.plan for one in out_of_time.run()} >= known.keys()


@pytest.mark.parametrize(
    ("fates", "attention", "states"),
    [
        (("drop", "replace"), (0.0, 0.0), "kd"),
        (("replace",), (0.0, 0.0), "kl"),
        (("replace",), (0.0, 0.4), "klma"),
    ],
)
def test_plans_are_of_what_the_space_has(
    context: TrialContext, tmp_path: Path, fates: tuple[str, ...], attention: tuple[float, float], states: str
) -> None:
    """And those that are asked for reach every state in the space."""
    space = Space(removal=(0.0, 0.8), criteria=("uniform",), fates=fates, attention=attention)
    settings = ScreenSettings(plans=40, promoted=3, healed_tokens=128, judged_tokens=64)
    screening = Screening(replace(of_study(context, screen=settings), cache_dir=tmp_path), space)
    codes = [code_of(one.plan) for one in screening.run()]
    assert all(codes)
    assert set("".join(filter(None, codes))) == set(states)
    promoted = screening.promoted()
    assert promoted.plans
    assert all(set(code_of(plan) or "?") <= set(states) for plan in promoted.plans)


def test_a_damaged_entry_is_begun_again(context: TrialContext, tmp_path: Path) -> None:
    fresh = Screening(replace(context, cache_dir=tmp_path), SPACE)
    fresh._measure({FoldPlan.parse("0-3", NUM_BLOCKS): ("move",)})
    fresh._path.parent.mkdir(parents=True)
    fresh._path.write_text('[{"plan": {"pl')
    fresh._keep()
    assert [one["plan"]["plan"] for one in json.loads(fresh._path.read_text())["value"]] == ["0-3"]


def test_two_runs_add_to_what_is_known(screened: Screening, context: TrialContext) -> None:
    """Neither loses what the other measured meanwhile."""
    path = screened._path
    first, second = (Screening(context, SPACE) for _ in range(2))
    plans = [FoldPlan.parse(text, NUM_BLOCKS) for text in ("0a 1-4", "0-3 4a")]
    for one, plan in zip((first, second), plans, strict=True):
        one._measure({plan: ("move",)})
    first._keep()
    second._keep()
    kept = {one["plan"]["plan"] for one in json.loads(path.read_text())["value"]}
    assert {str(plan) for plan in plans} <= kept
    assert len(kept) >= len(screened.found) + 2


def test_a_budget_is_kept_by_all_that_is_promoted(context: TrialContext) -> None:
    dense = context.run.dense.memory_bytes
    tight = Screening(of_study(context, budget=BudgetSettings(gb=0.8 * dense / GB)), SPACE)
    tight.run()
    promoted = tight.promoted().plans
    assert promoted
    assert all(price(plan, context.table, context.target).memory_bytes <= 0.8 * dense for plan in promoted)
    unreachable = Screening(of_study(context, budget=BudgetSettings(gb=1 / GB)), SPACE)
    unreachable.run()
    assert unreachable.promoted() == Promoted()


def test_it_ends_when_its_time_is_up(
    context: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(screenings.time, "monotonic", lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    told: list[tuple[str, float]] = []
    fresh = replace(context, cache_dir=tmp_path)
    short = Screening(fresh, SPACE, seconds=6.0, progress=lambda *words: told.append(words))
    assert len(short.run()) == 5
    shares = [share for stage, share in told if stage == screenings.STAGE]
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_what_was_screened_is_read_again(screened: Screening, tmp_path: Path) -> None:
    write_screened(tmp_path / "screened.json", screened.found)
    assert read_screened(tmp_path / "screened.json") == screened.found
    assert read_screened(tmp_path / "none") == []


def test_the_best_by_count_are_those_of_all(screened: Screening) -> None:
    table = screened_by_count(screened.found)
    assert table
    for count, row in table.items():
        mine = [one for one in screened.found if one.plan.only_drops and len(one.plan.dropped) == count]
        assert min(one.quality.kl for one in row.values()) == min(one.quality.kl for one in mine)
        assert row.keys() & set(SPACE.criteria)


@pytest.mark.slow
def test_a_screening_that_was_stopped_goes_on_with_what_it_has(
    study: Study, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time counts, and what it measured is not measured again."""
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache of a stopped run"))
    close_workbench()

    def stop(event: Event) -> None:
        if isinstance(event, Preparing) and event.stage == screenings.STAGE and event.share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_search(study, place / "stopped", on_event=stop)
    run = Run.open(place / "stopped")
    assert read_trials(run) == []
    assert Records(run).elapsed > 0
    measured = []
    real = Screen.measure
    monkeypatch.setattr(
        Screen, "measure", lambda self, plan, *rest: (measured.append(plan), real(self, plan, *rest))[1]
    )
    run_search(None, place / "stopped", resume=True)
    found = [one.plan for one in read_screened(run.screened)]
    assert len(set(found)) == len(found) > len(measured)
    assert any(record.state == "finished" for record in read_trials(run))


@pytest.mark.slow
def test_the_baselines_follow_where_no_criterion_of_the_space_is_quick(
    study: Study, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the default space; and what another trial trained is not counted as trained twice."""
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache of a slow run"))
    close_workbench()
    events: list[Event] = []
    slow = study.model_copy(update={"space": SPACE.model_copy(update={"criteria": ("greedy",)}), "trials": 5})
    run_search(slow, place / "slow", on_event=events.append)
    records = read_trials(Run.open(place / "slow"))
    proposals = [record.proposal for record in records if record.proposal is not None]
    assert [one.origin for one in proposals[:4]] == ["screened"] * 3 + ["baseline"]
    assert proposals[3].removed is not None
    assert proposals[3].removed.criterion == "greedy"
    (done,) = (event for event in events if isinstance(event, SearchDone))
    trained = {one.plan for one in records if one.results and one.last.recovery_tokens}
    assert 0 < done.num_trained <= len(trained)


def test_what_needs_no_fit_is_screened(study: Study) -> None:
    assert is_screened(study, SPACE)
    assert is_screened(study, Space(fates=("share", "replace"), groups=GroupsTable(max_groups=1)))
    networks = Networks(kinds=("ffn", "layer"))
    assert not is_screened(study, Space(fates=("share", "replace"), replace=networks, attention=(0.0, 0.5)))
    assert screened_states(SPACE) == "kdma"
    assert screened_states(Space()) == "kd"
    assert screened_states(Space(fates=("replace",))) == "kl"
    assert screened_states(Space(fates=("replace", "drop"))) == "kd"
    assert not is_screened(study.model_copy(update={"screen": ScreenSettings(plans=0)}), SPACE)
    assert not is_screened(study.model_copy(update={"healing": HealingSettings(tokens=0)}), SPACE)
    assert compared_criteria(SPACE) == {"block_influence", "uniform"}
    assert compared_criteria(Space(fates=("replace", "drop"), criteria=("window",))) == frozenset()


@pytest.mark.parametrize("kinds", [1, 4, 5])
def test_every_kind_of_text_is_among_what_is_screened_on(kinds: int) -> None:
    """Sequences of a mixture stand in turns; those at even distances of the whole could all be of one kind."""
    length, num = screenings.LENGTH, 20
    tokens = as_tokens(torch.arange(num)[:, None].expand(num, 2 * length).contiguous())
    tokens = replace(tokens, kinds=Kinds(tuple(map(str, range(kinds))), torch.arange(num) % kinds))
    for wanted in (1, 512, 768, 10**6):
        some = screenings._some(tokens, wanted)
        found = some.kinds.of_N.bincount(minlength=kinds)
        assert found.min() >= 1
        assert found.max() - found.min() <= 1
        assert len(some.ids_NT) == min(max(2, kinds, wanted // length), 2 * num)
        if wanted < 10**6:  # of different documents while there are others
            assert len(set(some.ids_NT[:, 0].tolist())) == len(some.ids_NT)


def test_the_kl_of_another_objective_is_another_figure(context: TrialContext, tmp_path: Path) -> None:
    """Kept figures are of the mean over kinds or of the worst kind; one is never taken for the other."""
    bench, paths = open_workbench(context), set()
    for over in ("mean", "worst"):
        search = replace(bench.splits.search, kinds=replace(bench.splits.search.kinds, over=over))
        other = replace(bench, splits=replace(bench.splits, search=search))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(screenings, "open_workbench", lambda *_, other=other: other)
            paths.add(Screening(replace(context, cache_dir=tmp_path), SPACE)._path)
    assert len(paths) == 2


def test_a_plan_that_two_ask_for_is_both_ones(context: TrialContext, tmp_path: Path) -> None:
    fresh = Screening(replace(context, cache_dir=tmp_path), SPACE)
    plan = FoldPlan.dropping([2], NUM_BLOCKS)
    for author in ("alone", "uniform", "alone"):
        fresh._measure({plan: (author,)})
    (one,) = fresh.found
    assert one.authors == ("alone", "uniform")
    assert screened_by_count([one]) == {1: {"search": one, "uniform": one}}
    fresh._keep()
    other = Screening(replace(context, cache_dir=tmp_path), SPACE)
    other._measure({plan: ("chain",)})
    other._keep()
    assert other.found[0].authors == ("chain", "alone")  # what was chosen there may be of another seed


def test_nothing_outside_the_space_is_promoted(screened: Screening, context: TrialContext) -> None:
    """What earlier runs of other spaces measured is known, but not trained."""
    narrow = SPACE.model_copy(update={"removal": (0.4, 0.6)})
    screening = Screening(context, narrow)
    screening.run()
    assert {len(one.plan.dropped) for one in screening.found} - {2, 3}
    assert {len(plan.dropped) for plan in screening.promoted().plans} <= {2, 3}
    alone = Screening(context, SPACE.model_copy(update={"removal": (0.8, 0.8), "attention": (0.0, 0.0)}))
    alone.take_over()
    assert alone.promoted().rival is None
    alone.run()
    assert alone.promoted().rival is None or alone.promoted().rival[1] == 4


def test_a_run_that_is_killed_before_a_trial_ends_has_spent_its_screening(
    study: Study, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache of the killed"))
    close_workbench()
    began: list[float] = []

    def killed(search: Search, *_: Any) -> None:
        began.append(search.line.elapsed())
        raise ZeroDivisionError

    monkeypatch.setattr(Search, "run_trials", killed)
    with pytest.raises(ZeroDivisionError):
        run_search(study, place / "killed")
    noted = Records(Run.open(place / "killed")).elapsed
    assert 0 < noted == pytest.approx(began[0], abs=0.5)  # the clock goes on between the two


def test_the_dense_model_is_never_what_was_found(context: TrialContext, tmp_path: Path) -> None:
    """Where nothing bounds what is kept, a step back from one dropped block leads to it, and nothing beats its KL."""
    free = of_study(
        replace(context, cache_dir=tmp_path),
        screen=ScreenSettings(plans=40, healed_tokens=128, judged_tokens=64),
    )
    screening = Screening(free, SPACE)
    screening.run()
    dense = FoldPlan.identity(NUM_BLOCKS)
    assert dense not in {one.plan for one in screening.found}
    screening._measure({dense: ("earlier run",)})  # by a screening before this was so
    assert dense not in {one.plan for one in screening.front()}
    assert dense not in screening.promoted().plans


def test_what_another_seed_chose_is_not_this_one_s(
    study: Study, context: TrialContext, tmp_path: Path
) -> None:
    """Oracle: a run that shares no cache."""
    random = SPACE.model_copy(update={"criteria": ("random", "uniform"), "attention": (0.0, 0.0)})

    def rivals(seed: int, cache: str) -> dict[FoldPlan, set[str]]:
        of = of_study(replace(context, cache_dir=tmp_path / cache), seed=seed)
        screening = Screening(of, random)
        screening.run()
        return {one.plan: set(one.authors) & QUICK for one in screening.found if set(one.authors) & QUICK}

    alone = rivals(0, "own")
    assert rivals(5, "shared") != alone
    assert rivals(0, "shared") == alone


def test_what_keeps_more_attentions_than_the_space_is_not_promoted(
    context: TrialContext, tmp_path: Path
) -> None:
    thin = SPACE.model_copy(update={"attention": (0.4, 0.4)})
    screening = Screening(replace(context, cache_dir=tmp_path), thin)
    screening.run()
    assert screening.found
    for plan in screening.promoted().plans:
        least, _ = thin.attention_counts(NUM_BLOCKS, NUM_BLOCKS - len(plan.slots))
        assert (code_of(plan) or "").count(MLP_ONLY) >= least


def test_each_criterion_that_chose_a_plan_has_it(context: TrialContext, tmp_path: Path) -> None:
    """The block with the least influence is the best window of one block, too."""
    screening = Screening(replace(context, cache_dir=tmp_path), SPACE)
    screening.run()
    (one,) = (
        found
        for found in screening.found
        if {"block_influence", "window"} <= set(found.authors) and len(found.plan.dropped) == 1
    )
    row = screened_by_count(screening.found)[1]
    assert row["block_influence"] == row["window"] == one


def test_a_quick_criterion_is_asked_with_the_middle_of_its_setting(
    context: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the space does not name it."""
    asked = []

    def choose(request: Request) -> Choice:
        asked.append(request.setting)
        return Choice(tuple(range(request.count)))

    first = Criterion(
        "first", "first blocks", "*", "ours", setting=Setting("gate_eps", (0.1,)), is_quick=True
    )
    every = [*CRITERIA, first]
    monkeypatch.setattr(criteria, "CRITERIA", every)
    monkeypatch.setattr("foldsearch.search.screening.CRITERIA", every)
    monkeypatch.setattr(Criterion, "choose", lambda self, request: choose(request))
    list(Screening(replace(context, cache_dir=tmp_path), SPACE)._rivals())
    assert SPACE.gate_eps[len(SPACE.gate_eps) // 2] in asked


def test_where_no_plan_has_finite_figures_it_ends_and_says_why(
    context: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ModelError("the output of position 4 is not a finite number")

    monkeypatch.setattr(Screen, "measure", fails)
    with pytest.raises(ModelError, match=r"none of \d+ has: the output of position 4"):
        Screening(replace(context, cache_dir=tmp_path), SPACE).run()


def test_a_rival_that_is_promoted_is_no_rival(context: TrialContext, tmp_path: Path) -> None:
    """A space of one plan."""
    space = SPACE.model_copy(
        update={"removal": (0.8, 0.8), "criteria": ("uniform",), "attention": (0.0, 0.0)}
    )
    screening = Screening(replace(context, cache_dir=tmp_path), space)
    plan = next(plan for plan, author in screening._rivals() if author == "uniform")
    screening._measure({plan: ("uniform",)})
    assert screening.promoted() == Promoted((plan,), None)


def test_a_run_begins_with_what_was_promoted(
    shared_ray: None, study: Study, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the best criterion beside it; a run that goes on does not screen again."""
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache of the run"))
    close_workbench()
    events: list[Event] = []
    run_search(study, place / "searched", on_event=events.append)
    records = read_trials(Run.open(place / "searched"))
    origins = [record.proposal.origin for record in records if record.proposal is not None]
    assert origins[:4] == ["screened", "screened", "baseline", "screened"]
    found = read_screened(Run.open(place / "searched").screened)
    assert len(found) == 24
    plans = {one.plan for one in found}
    trained = [record for record in records if record.proposal and record.proposal.origin == "screened"]
    assert all(record.state == "finished" and record.proposal.plan in plans for record in trained)
    assert any(isinstance(event, Preparing) and event.stage.startswith("screening") for event in events)
    (done,) = (event for event in events if isinstance(event, SearchDone))
    assert done.num_screened == 24

    def never(*_: Any) -> None:
        raise AssertionError("screened again")

    monkeypatch.setattr(Screening, "run", never)
    more = study.model_copy(update={"trials": 5})
    run_search(more, place / "searched", resume=True)
    assert len([r for r in read_trials(Run.open(place / "searched")) if r.is_trial]) >= 5
