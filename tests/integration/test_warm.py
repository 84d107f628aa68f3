"""What an earlier run knows is shown before any trial, and given to a search of the same model and text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from foldsearch import api
from foldsearch.context import TrialContext, close_workbench
from foldsearch.errors import RunError
from foldsearch.plan.cost import GB, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.record import front
from foldsearch.search.events import Event, Notice
from foldsearch.search.records import Records
from foldsearch.search.run import _screened, run_search
from foldsearch.search.screened import Promoted
from foldsearch.search.warm import (
    LISTED,
    Trained,
    begun_with,
    keep_trained,
    known_trained,
    known_words,
    trained_by,
    warm_plans,
)
from foldsearch.spec.space import Space
from foldsearch.spec.study import BudgetSettings, ScreenSettings, SplitSettings, Study
from tests.contexts import begin_run, run_queued, tiny_study
from tests.tiny import NUM_BLOCKS, save_model, write_corpus

SPACE = Space(removal=(0.0, 0.8), criteria=("block_influence", "uniform"))
SCREEN = ScreenSettings(plans=8, promoted=3, healed_tokens=128, judged_tokens=64)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    place = tmp_path_factory.mktemp("warm")
    splits = SplitSettings(sequence_length=32, search=4, recovery=8, report=2)
    return tiny_study(place, space=SPACE, splits=splits, screen=SCREEN)


@pytest.fixture(scope="module")
def earlier(study: Study, tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    """A run that trained plans of one and of three dropped blocks."""
    place = tmp_path_factory.mktemp("earlier")
    context = begin_run(study, place / "run", cache_dir=place / "cache")
    for count in (1, 3):
        run_queued(context, "uniform", count)
    return context


def later(earlier: TrialContext, place: Path, **settings: object) -> TrialContext:
    """A run without trials of the same model and text."""
    settings = {"warm_from": str(earlier.run.path), **settings}
    study = earlier.study.model_copy(update=settings)
    return begin_run(study, place / "later", cache_dir=earlier.cache_dir)


def between(earlier: TrialContext) -> BudgetSettings:
    """A budget that dropping three blocks keeps, and dropping one does not."""
    sizes = [trial.cost.memory_bytes for trial in Records(earlier.run).all()]
    return BudgetSettings(gb=sum(sizes) / len(sizes) / GB)


def test_a_run_that_is_named_is_found_from_any_folder(
    earlier: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that was stopped before its first trial goes on, wherever `resume` is typed."""
    monkeypatch.chdir(earlier.run.path.parent)
    begun = later(earlier, tmp_path, warm_from=earlier.run.path.name)
    found = warm_plans(begun.run)
    monkeypatch.chdir(tmp_path)
    assert warm_plans(begun.run) == found != []


def test_what_was_trained_is_taken_over_as_far_as_it_fits(earlier: TrialContext, tmp_path: Path) -> None:
    trials = Records(earlier.run).all()
    assert {one.plan for one in trained_by(earlier.run, trials)} == {one.plan for one in front(trials)}
    free = later(earlier, tmp_path / "free")
    found = warm_plans(free.run)
    assert {one.trial for one in found} == {one.number for one in front(trials)}
    assert found == sorted(found, key=lambda one: one.kl)
    bounded = later(earlier, tmp_path / "bounded", budget=between(earlier))
    (one,) = warm_plans(bounded.run)
    assert len(one.plan.dropped) == 3
    assert one.kl == trials[one.trial].quality.kl
    assert warm_plans(later(earlier, tmp_path / "none", warm_from=None).run) == []


def test_the_cache_knows_what_runs_trained(earlier: TrialContext, tmp_path: Path) -> None:
    context = later(earlier, tmp_path, budget=between(earlier), warm_from=None)
    assert known_trained(context.run, tmp_path) == []
    trials = Records(earlier.run).all()
    for _ in range(2):  # a run that goes on takes the place of what it had put there
        keep_trained(earlier.run, trials, tmp_path)
    (one,) = known_trained(context.run, tmp_path)
    assert len(one.plan.dropped) == 3
    assert {one.plan for one in known_trained(earlier.run, tmp_path)} == {one.plan for one in front(trials)}
    worst = context.study.model_copy(
        update={"kinds": context.study.kinds.model_copy(update={"objective": "worst"})}
    )
    assert (
        known_trained(begin_run(worst, tmp_path / "worst", cache_dir=earlier.cache_dir).run, tmp_path) == []
    )


def test_it_is_told_before_anything_is_screened_and_measured_first(
    earlier: TrialContext, tmp_path: Path
) -> None:
    context = later(earlier, tmp_path)
    records, known = Records(context.run), warm_plans(context.run)
    events: list[Event] = []
    promoted = begun_with(_screened(records, context, 0.0, known, events.append), known, SCREEN.promoted)
    first = next(event for event in events if isinstance(event, Notice))
    for one in known:
        assert f"KL {one.kl:.3f}  {one.plan}  trial {one.trial} of {earlier.run.path}" in first.text
    assert "screened" not in first.text  # nothing was
    best = min(known, key=lambda one: one.kl)
    assert promoted.plans[0] == best.plan
    assert len(promoted.plans) == SCREEN.promoted
    # what was screened meanwhile is there for the next run at once
    close_workbench()
    again = later(earlier, tmp_path / "again", budget=between(earlier))
    events = []
    _screened(Records(again.run), again, 0.0, [], events.append)
    first = next(event for event in events if isinstance(event, Notice))
    assert "screened, KL of little text" in first.text
    assert "trained" not in first.text
    bound = again.run.budget.memory_bytes
    assert bound is not None
    sizes = [float(line.split()[0]) for line in first.text.splitlines() if " GB " in line]
    assert sizes
    assert all(size <= bound / GB * (1 + 1e-5) for size in sizes)  # six digits are shown


def test_a_run_of_another_text_or_model_is_refused(earlier: TrialContext, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", seed=5)
    with pytest.raises(RunError, match=r"same model and texts, but .* other search tokens, recovery tokens"):
        warm_plans(later(earlier, tmp_path / "text", data=other).run)
    model = save_model(tmp_path / "model", "mistral")
    with pytest.raises(RunError, match="other config"):
        warm_plans(later(earlier, tmp_path / "weights", model=model).run)
    with pytest.raises(RunError, match="no-run', which is not there any more"):
        warm_plans(later(earlier, tmp_path / "nowhere", warm_from=str(tmp_path / "no-run")).run)


def test_half_of_what_a_run_begins_with_may_be_from_an_earlier_one() -> None:
    plans = [FoldPlan.dropping([block], NUM_BLOCKS) for block in range(NUM_BLOCKS)]
    trained = [Trained(plan, 0.1, 64, "run", 0) for plan in (plans[2], plans[1], plans[0])]  # the best first
    screened = Promoted(tuple(plans[2:]), ("uniform", 1))
    assert begun_with(screened, [], 4) == screened
    assert begun_with(screened, trained, 4) == Promoted(
        (plans[2], plans[1], plans[3], plans[4]), ("uniform", 1)
    )
    assert begun_with(Promoted(), trained, 2).plans == (plans[2], plans[1])


def test_only_the_front_is_told(earlier: TrialContext) -> None:
    """Oracle: of two plans of one size the better one."""
    run = earlier.run
    plans = [FoldPlan.dropping([block], NUM_BLOCKS) for block in (1, 2)]
    assert price(plans[0], run.table, run.target) == price(plans[1], run.table, run.target)
    words = known_words(
        run, (), [Trained(plan, kl, 64, "r", 0) for plan, kl in zip(plans, (2.0, 1.0), strict=True)]
    )
    assert "2 plans, 1 of them on their front" in words
    assert str(plans[1]) in words
    assert str(plans[0]) not in words
    assert known_words(run, (), []) == ""
    one = Trained(plans[0], 1.0, 64, "r", 0)  # a run that is named is mostly known to the cache too
    assert "trained: 1 plans" in known_words(run, (), [one, one])


def test_of_a_run_that_is_gone_only_the_figures_are_told(earlier: TrialContext, tmp_path: Path) -> None:
    one = Trained(FoldPlan.dropping([1], NUM_BLOCKS), 1.0, 64, str(earlier.run.path.absolute()), 3)
    here = later(earlier, tmp_path).run
    assert f"trial 3 of {earlier.run.path}" in known_words(here, (), [one])
    # the run that is beginning may have taken the folder of the one that is meant
    for folder in (earlier.run.path, tmp_path / "gone"):
        gone = replace(one, run=str(folder.absolute()))
        words = known_words(earlier.run, (), [gone])
        assert words.endswith(f"{one.plan}  of a run that is gone")


def test_where_the_front_is_long_some_of_it_is_told(earlier: TrialContext) -> None:
    """Oracle: the ends of the front are told, and how many of it there are."""
    run = earlier.run
    texts = ("0-4", "0-3 4a", "0-3", "0-2 3a", "0-2", "0-1 2a", "0-1")
    plans = [FoldPlan.parse(text, NUM_BLOCKS) for text in texts]
    words = known_words(run, (), [Trained(plan, float(i), 64, "r", 0) for i, plan in enumerate(plans)])
    assert f"7 plans, 7 of them on their front, {LISTED} of these here" in words
    assert words.count(" GB  KL ") == LISTED
    assert str(plans[0]) in words
    assert str(plans[-1]) in words


def test_a_run_of_another_model_or_text_is_refused_before_the_dense_model_is_asked(
    earlier: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what would ask it is not there. A dry run, which reads no weight, cannot tell other weights."""
    monkeypatch.setattr("foldsearch.prepare.open_workbench", None)
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path / "cache"))
    warm = earlier.study.model_copy(update={"warm_from": str(earlier.run.path)})
    weights = warm.model_copy(update={"model": save_model(tmp_path / "weights")})
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
        model.lm_head.weight.mul_(2)
        model.save_pretrained(tmp_path / "weights")
    shape = warm.model_copy(update={"model": save_model(tmp_path / "gpt2", "gpt2")})
    text = warm.model_copy(update={"data": write_corpus(tmp_path / "other", seed=5)})
    for number, (other, differ) in enumerate(
        ((text, "search tokens, recovery tokens"), (shape, "config"), (weights, "weights"))
    ):
        with pytest.raises(RunError, match=f"same model and texts, but .* other {differ}"):
            run_search(other, tmp_path / f"run{number}")
        assert not (tmp_path / f"run{number}").exists()
        if other is weights:
            continue
        with pytest.raises(RunError, match=f"same model and texts, but .* other {differ}"):
            api.dry_run(other)
    assert api.dry_run(warm).size > 0


def test_a_run_that_is_not_there_is_told_before_anything_is_read(study: Study, tmp_path: Path) -> None:
    """`prepare` is given what fails in another way where it is called."""
    asked = study.model_copy(update={"warm_from": str(tmp_path / "nowhere"), "model": "./no model"})
    with pytest.raises(RunError, match=r"a run folder holds study\.json, but there is no .*nowhere"):
        run_search(asked, tmp_path / "run", prepare="json:loads")
    with pytest.raises(RunError, match=r"a run folder holds study\.json, but there is no .*nowhere"):
        api.dry_run(asked)
    assert not any(tmp_path.iterdir())
