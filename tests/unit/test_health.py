"""Sentences on how far a search can be believed. Oracles: the fake trials' own figures, and planted ones."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from foldsearch.plan.front import hypervolume
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.record import Trial
from foldsearch.report import health as healths
from foldsearch.report.health import foretelling, health, hypervolumes
from foldsearch.report.page import write_page
from foldsearch.report.terminal import front_report
from foldsearch.report.view import Agreement, RunView
from foldsearch.search.screened import Screened, write_screened
from tests.proposals import removing
from tests.unit.test_report import text_of


@pytest.fixture
def view(run_path: Path) -> RunView:
    return RunView.open(run_path)


def with_rate(trial: Trial, rate: float) -> Trial:
    """The same trial, proposed by the sampler with this learning rate."""
    assert trial.proposal is not None
    recovery = replace(trial.recovery, learning_rate=rate)
    return replace(trial, proposal=replace(trial.proposal, recovery=recovery, origin="sampler"))


def test_the_front_is_held_against_the_baselines(view: RunView) -> None:
    others = [trial for trial in view.front if not view.baseline(trial)]
    told = [gain for gain in map(view.gain, others) if gain is not None]
    (words,) = (one for one in health(view) if "baseline" in one)
    if told:
        better = sum(gain < 0 for gain in told)
        assert f"{better} of {len(told)} {'has' if better == 1 else 'have'} a lower report KL" in words
        assert (" to " in words) is (len(told) > 1)
    elif others:
        assert f"of the {len(others)} other plans on the front, or less, was trained" in words
    else:
        assert "found nothing on the front" in words
    none = replace(view, trials=tuple(trial for trial in view.trials if trial not in view.baselines))
    assert any("No simple baseline was trained" in one for one in health(none))


def test_a_baseline_that_costs_more_says_nothing_of_the_search(view: RunView) -> None:
    dearest = max(view.baselines, key=lambda trial: trial.cost.memory_bytes)
    simple = {trial.plan for trial in view.baselines}
    cheaper = {
        trial.plan
        for trial in view.finished
        if trial.plan not in simple and 1.03 * trial.cost.memory_bytes < dearest.cost.memory_bytes
    }
    of_these = (one for one in view.trials if one.draft and one.plan in {dearest.plan, *cheaper})
    alone = replace(view, trials=tuple(of_these))
    others = [trial for trial in alone.front if not alone.baseline(trial)]
    assert others
    (words,) = (one for one in health(alone) if "baseline" in one)
    assert words.startswith(
        f"No simple baseline of about the cost of the {len(others)} other plans on the front"
    )


@pytest.mark.parametrize(("share", "words"), [(0.0, "lower end"), (1.0, "upper end"), (0.5, "")])
def test_rates_at_an_end_of_their_range_are_told(view: RunView, share: float, words: str) -> None:
    low, high = view.folder.study.space.recover.learning_rate
    rate = low * (high / low) ** share
    front = {trial.number for trial in view.front}
    trials = tuple(with_rate(trial, rate) if trial.number in front else trial for trial in view.trials)
    found = [one for one in health(replace(view, trials=trials)) if "learning rates" in one]
    if words and len(front) >= healths.FEWEST:
        assert len(found) == 1
        assert words in found[0]
        assert f"{len(front)} of {len(front)}" in found[0]
    else:
        assert found == []


def test_measurements_that_disagree_are_told(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [Agreement("screening and 0 tokens", 6, 0.4), Agreement("0 tokens and 64 tokens", 6, 0.9)]
    monkeypatch.setattr(RunView, "agreements", told)
    (words,) = (one for one in health(view) if "differently" in one)
    assert words.startswith("Screening and 0 tokens order 6 plans differently (rank correlation 0.40)")


def test_the_hypervolume_is_that_of_all_trials_so_far(view: RunView) -> None:
    volumes = hypervolumes(view, range(1, len(view.finished) + 1))
    assert volumes == sorted(volumes)
    highest, dense = max(trial.quality.kl for trial in view.finished), view.folder.dense
    points = [
        (
            trial.quality.kl / highest,
            trial.cost.memory_bytes / dense.memory_bytes,
            trial.cost.flops / dense.flops,
        )
        for trial in view.front
    ]
    assert volumes[-1] == pytest.approx(hypervolume(points, (1.0, 1.0, 1.0)))
    assert any(f"→ {volumes[-1]:.3f}" in one for one in health(view))


def test_the_hypervolume_is_in_the_runs_own_objectives(view: RunView) -> None:
    """By hand: of KL and memory alone, two numbers a point, whatever the FLOPs are."""
    study = view.folder.study.model_copy(update={"objectives": ("memory", "kl")})
    view = replace(view, folder=replace(view.folder, study=study))
    highest, dense = max(trial.quality.kl for trial in view.finished), view.folder.dense
    points = [(t.cost.memory_bytes / dense.memory_bytes, t.quality.kl / highest) for t in view.finished]
    assert hypervolumes(view, [len(points)]) == [pytest.approx(hypervolume(points, (1.0, 1.0)))]


def test_a_space_that_is_used_up_is_told_whatever_takes_the_blocks_place(view: RunView) -> None:
    smallest = min(view.front, key=lambda trial: trial.cost.memory_bytes)
    most = view.folder.study.space.counts(view.folder.num_blocks)[1]
    for count, told in ((most, True), (most - 1, False)):
        trial = replace(smallest, proposal=removing("window", count))
        trials = tuple(trial if one == smallest else one for one in view.trials)
        found = [
            one for one in health(replace(view, trials=trials)) if "as many blocks as the space allows" in one
        ]
        assert found == ([f"The smallest plan of the front removes as many blocks as the space allows ({count}): for "
                          "smaller ones raise space.removal."] if told else [])  # fmt: skip


@pytest.mark.parametrize("planted", [True, False])
def test_the_chain_is_held_against_plans_that_it_was_not_fitted_to(planted: bool) -> None:
    """Plans whose KL is a sum over blocks are foretold; those whose KL is drawn blindly are not."""
    rng, num_blocks = random.Random(0), 16
    worth = [rng.uniform(0.02, 0.5) for _ in range(num_blocks)]
    known = {FoldPlan.dropping([block], num_blocks): kl for block, kl in enumerate(worth)}
    for _ in range(60):
        gone = rng.sample(range(num_blocks), rng.randrange(5, 9))
        kl = sum(worth[block] for block in gone) if planted else rng.uniform(1.0, 3.0)
        known[FoldPlan.dropping(gone, num_blocks)] = kl
    told = foretelling(known, num_blocks)
    assert told is not None
    assert told.plans == len(known) - num_blocks
    assert (told.correlation > 0.9) == planted
    assert foretelling({plan: kl for plan, kl in known.items() if len(plan.dropped) == 1}, num_blocks) is None


def test_reports_say_it(view: RunView, tmp_path: Path) -> None:
    plans = [FoldPlan.dropping([block], view.folder.num_blocks) for block in range(3)]
    quality = view.finished[0].quality
    assert isinstance(quality, Quality)
    write_screened(view.folder.screened, [Screened(plan, ("alone",), quality) for plan in plans])
    words = health(view)
    assert words
    write_page(view, tmp_path / "index.html")
    page, text = (
        (tmp_path / "index.html").read_text(encoding="utf-8"),
        text_of(front_report(view, width=200), width=400),
    )
    for sentence in words:
        assert sentence in text
        assert sentence.replace("&", "&amp;").replace("'", "&#x27;") in page
