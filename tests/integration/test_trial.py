"""One trial, rung by rung, on a tiny model in a folder and a folder of texts.

Oracles: an uninterrupted trial, the price of the plan, the quality of the model that is rebuilt, and what must not be
called (it raises).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from foldsearch import cache, criteria, prepare, rebuild, record
from foldsearch import context as contexts
from foldsearch import draft as drafts
from foldsearch import trial as trials
from foldsearch.codec import from_json, to_json
from foldsearch.context import TrialContext, close_workbench, open_workbench, read_splits
from foldsearch.criteria import evolution, greedy, linear_window
from foldsearch.errors import RunError
from foldsearch.fates import Replace, Share
from foldsearch.model import gates, states, workbench
from foldsearch.model.fold import fold
from foldsearch.model.healing import METHODS
from foldsearch.model.judge import ask_dense
from foldsearch.model.recover import Recovery
from foldsearch.model.states import residual_states
from foldsearch.model.training import HealMethod
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import RungResult
from foldsearch.prepare import prepare_context
from foldsearch.progress import TimeUp
from foldsearch.proposal import Groups, Proposal
from foldsearch.rebuild import recovered_model
from foldsearch.record import Trial, point, read_trial
from foldsearch.spec.study import BudgetSettings, HealingSettings, SplitSettings
from foldsearch.trial import run_trial
from tests.contexts import of_run, of_study, quality_of, tiny_context
from tests.proposals import changed, given, removing, retrained
from tests.tiny import NUM_BLOCKS

RUNGS = (0, 64, 128)
SHARING = removing("window", 1, groups=Groups(1, 2, rank=2), delta_rank=2)
HURTING = retrained(SHARING, learning_rate=20.0)  # finite, and worse after every rung


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> TrialContext:
    splits = SplitSettings(sequence_length=16, search=6, recovery=8, report=6)
    return tiny_context(tmp_path_factory.mktemp("prepared"), rungs=RUNGS, splits=splits)


@pytest.fixture
def context(prepared, tmp_path) -> TrialContext:
    """A run of its own, with the caches of all."""
    (tmp_path / "run").mkdir()
    shutil.copy(prepared.run.path / "tokens.safetensors", tmp_path / "run")
    return of_run(prepared, path=tmp_path / "run")


def never(*args, **kwargs):
    raise AssertionError("this is not to be called")


def measured(steps: list[Trial]) -> list[RungResult]:
    """What the latest rungs came to that does not depend on the clock or on who measured it."""
    return [replace(trial.last, seconds=0.0, known_from=None) for trial in steps]


def known_from(steps: list[Trial]) -> list[int | None]:
    """Who measured the latest rung of each."""
    return [trial.known_from for trial in steps]


def trained(context: TrialContext, number: int) -> dict[str, torch.Tensor]:
    """What the trial keeps of its training; empty where it keeps the untrained model."""
    path = context.run.trial(number).recovered
    return load_file(path) if path.exists() else {}


def run(context: TrialContext, number: int = 0, proposal: Proposal = SHARING) -> list[Trial]:
    return list(run_trial(proposal, context, number=number))


def test_what_is_measured_is_let_finish_when_the_time_is_up(context):
    """The listener raises as soon as measuring tells that it goes on, as it does in a search."""

    def late(stage: str, share: float) -> None:
        if stage.startswith("measuring") and share > 0:
            raise TimeUp(stage)

    *_, last = run_trial(SHARING, context, number=3, progress=late)
    assert last.state == "finished"
    assert last.final.kl > 0


def test_a_result_for_every_rung(context):
    told = []
    results = list(run_trial(SHARING, context, number=3, progress=lambda *at: told.append(at)))
    stages = [stage for stage, _ in told]
    assert [len(trial.results) for trial in results] == [1, 2, 3]
    assert [trial.last.recovery_tokens for trial in results] == list(RUNGS)
    assert [trial.state for trial in results] == ["running", "running", "finished"]
    assert known_from(results) == [None] * 3
    assert {result.plan for result in results} == {results[0].plan}
    plan = results[0].plan
    assert len(plan.dropped) == 1
    assert sum(not own for _, _, _, own in plan.runs("mlp")) == 1
    assert {result.cost for result in results} == {price(plan, context.table, context.target)}
    # the report's tokens are kept for the end
    assert [trial.last.report is None for trial in results] == [True, True, False]
    assert results[-1].final.kl != results[-1].quality.kl
    assert results[0].quality.tokens == 6 * 15
    # training brought it nearer, and the clock went on
    assert results[2].quality.kl < results[1].quality.kl < results[0].quality.kl
    assert 0 < results[0].last.seconds < results[1].last.seconds < results[2].last.seconds
    assert {"recovery", "measuring"} <= set(stages)
    assert [share for stage, share in told if stage == "measuring"] == [0.0, 1.0] * len(RUNGS)
    assert [share for stage, share in told if stage == "measuring on report tokens"] == [1.0]
    for step, trial in enumerate(results):
        expected = (trial.quality.kl, trial.cost.memory_bytes / 1e9, trial.cost.flops)
        assert point(results[-1], ("kl", "memory", "flops"), step) == expected
    folder = context.run.trial(3).path
    assert sorted(path.name for path in folder.iterdir()) == [
        "recovered.safetensors", "start.safetensors", "trial.json",
    ]  # fmt: skip
    assert from_json(Trial, json.loads((folder / "trial.json").read_text())) == results[-1]


def test_the_same_seed_gives_the_same_trial(context):
    first = run(context)
    shutil.rmtree(context.run.path / "plans")
    again = run(context, 1)
    assert measured(again) == measured(first)
    assert again[0].known_from is None


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Grows by one with every step of training."""
    taken: list[int] = []
    step = Recovery._step
    monkeypatch.setattr(Recovery, "_step", lambda self, rows: taken.append(1) or step(self, rows))
    return taken


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("proposal", [SHARING, HURTING], ids=["helped", "hurt"])
def test_a_closed_trial_goes_on_where_it_stopped(context, tmp_path, steps, stop, proposal):
    whole = run(context, proposal=proposal)
    other = of_run(context, path=tmp_path / "other")
    shutil.copytree(context.run.path, other.run.path, ignore=shutil.ignore_patterns("plans", "trials"))
    generator = run_trial(proposal, other, number=0)
    first = [next(generator) for _ in range(stop)]
    generator.close()
    rest = run(other, proposal=proposal)
    assert [len(trial.results) for trial in rest] == list(range(stop + 1, 4))
    assert measured(first + rest) == measured(whole)
    assert rest[-1].last.seconds > first[-1].last.seconds
    assert len(steps) == 2 * 4  # 128 tokens at 32 a step, twice: nothing was trained again
    one, two = trained(context, 0), trained(other, 0)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert run(other, proposal=proposal) == []  # nothing is left to do


@pytest.mark.parametrize(("where", "what"), [(trials, "judged"), (Trial, "kept_in")], ids=["judge", "write"])
def test_a_trial_killed_while_measuring_goes_on(context, tmp_path, monkeypatch, steps, where, what):
    """Trained and saved, but the rung was never noted."""
    whole = run(context)
    other = of_run(context, path=tmp_path / "other")
    shutil.copytree(context.run.path, other.run.path, ignore=shutil.ignore_patterns("plans", "trials"))
    generator = run_trial(SHARING, other, number=0)
    first = [next(generator), next(generator)]
    with monkeypatch.context() as patch:
        patch.setattr(where, what, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(generator)
    if what == "judged":  # as it was at the rung before
        assert quality_of(other, recovered_model(other, 0)[0])[0] == first[-1].quality
    else:
        with pytest.raises(RunError, match=r"stopped while rung 2 was measured.*Resume the run first"):
            recovered_model(other, 0)
    assert measured(first + run(other)) == measured(whole)
    assert len(steps) == 2 * 4
    one, two = trained(context, 0), trained(other, 0)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("cut_after", [1, 3])
def test_a_trial_cut_in_the_middle_of_a_rung_goes_on_from_there(context, tmp_path, steps, cut_after):
    whole = run(context)
    other = of_run(context, path=tmp_path / "other")
    shutil.copytree(context.run.path, other.run.path, ignore=shutil.ignore_patterns("plans", "trials"))
    steps.clear()

    def say(stage, share):
        if stage == "recovery" and len(steps) == cut_after:
            raise TimeUp("the time was up")

    with pytest.raises(TimeUp):
        list(run_trial(SHARING, other, number=0, progress=say))
    done = len(json.loads(other.run.trial(0).record.read_text())["results"])
    assert done == (1 if cut_after == 1 else 2)
    rest = run(other)
    assert measured(rest) == measured(whole)[done:]
    assert len(steps) == 4  # nothing was trained again
    one, two = trained(context, 0), trained(other, 0)
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- a plan is trained once


def test_a_known_plan_is_not_trained_again(context, monkeypatch):
    first = run(context, 0)
    monkeypatch.setattr(rebuild, "fold", never)
    again = run(context, 7, given(first[0].plan, learning_rate=0.02, delta_rank=1))
    assert measured(again) == measured(first)
    assert known_from(again) == [0] * 3


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("proposal", [SHARING, HURTING], ids=["helped", "hurt"])
def test_another_trial_goes_on_with_a_stopped_plan(context, tmp_path, steps, stop, proposal):
    whole = run(context, proposal=proposal)
    other = of_run(context, path=tmp_path / "other")
    shutil.copytree(context.run.path, other.run.path, ignore=shutil.ignore_patterns("plans", "trials"))
    generator = run_trial(proposal, other, number=0)
    for _ in range(stop):
        next(generator)
    generator.close()
    results = run(other, 5, proposal)
    assert known_from(results) == [0] * stop + [None] * (3 - stop)
    assert measured(results) == measured(whole)
    one, two = trained(context, 0), trained(other, 5)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(steps) == 2 * 4
    # who finished it is who knows it now
    third = run(other, 6, proposal)
    assert known_from(third) == [5] * 3
    assert measured(third) == measured(whole)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_plan_is_trained_anew_with_other_settings(context, tmp_path, steps, stop):
    """Its untrained figures hold; what was trained with other settings is nobody else's."""
    slower = retrained(SHARING, learning_rate=0.03)
    alone = of_run(context, path=tmp_path / "alone")
    shutil.copytree(context.run.path, alone.run.path)
    whole = run(alone, 5, slower)
    generator = run_trial(SHARING, context, number=0)
    for _ in range(stop):
        next(generator)
    generator.close()
    steps.clear()
    results = run(context, 5, slower)
    assert known_from(results) == [0, None, None]
    assert measured(results) == measured(whole)
    assert len(steps) == 4  # 128 tokens at 32 a step
    one, two = trained(alone, 5), trained(context, 5)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_plan_whose_adapters_start_in_another_way_is_another_one(context):
    """Oracle: each alone in a run of its own would be measured."""
    child, fitted = (removing("random", 1, Share(2, start), delta_rank=2) for start in ("zero", "data"))
    first, second = run(context, 0, child), run(context, 1, fitted)
    assert first[0].plan == second[0].plan
    assert known_from([*first, *second]) == [None] * 6
    assert first[0].quality != second[0].quality
    again = run(context, 2, fitted)
    assert known_from(again) == [1] * 3


def test_two_trials_never_measure_a_plan_at_once(context):
    """While one holds the plan, another gets what is known so far and leaves the rest to it."""
    generator = run_trial(SHARING, context, number=0)
    first = next(generator)
    results = run(context, 1)
    assert measured(results) == measured([first])
    assert known_from(results) == [0]
    assert [len(trial.results) for trial in generator] == [2, 3]


def test_a_trial_waits_for_the_first_result_of_one_that_measures_its_plan(context, monkeypatch):
    """Two that begin at the same moment: the second one must not train the plan too."""
    whole = run(context, 0)
    folder, waits = context.run.trial(0).path, []
    (folder / "trial.json").rename(folder / "later.json")
    (held,) = (context.run.path / "plans").glob(f"{whole[0].plan.id}*.lock")
    lock = held.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def measure_meanwhile(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            (folder / "later.json").rename(folder / "trial.json")

    monkeypatch.setattr(record.time, "sleep", measure_meanwhile)
    monkeypatch.setattr(rebuild, "fold", never)
    assert measured(run(context, 1)) == measured(whole)
    assert len(waits) == 3
    lock.close()


def test_a_plan_whose_training_diverged_is_trained_with_other_settings(context):
    plan = FoldPlan.dropping([2], NUM_BLOCKS)
    proposal = given(plan, learning_rate=1e30, delta_rank=2)
    assert run(context, 0, proposal)[-1].last.training_diverged
    results = run(context, 1, retrained(proposal, learning_rate=0.03))
    assert known_from(results) == [0, None, None]  # the untrained model is the same
    assert results[-1].last.kept_tokens == 128
    # who did not diverge is who knows it now
    assert known_from(run(context, 2, proposal)) == [1] * 3


# ---- what does not end well


@pytest.mark.parametrize("criterion", ["gate", "window"])
def test_what_cannot_fit_is_never_built(context, monkeypatch, criterion):
    for module, name in (
        (rebuild, "fold"),
        (rebuild, "open_workbench"),
        (trials, "open_workbench"),
        (drafts, "open_workbench"),
        (drafts, "choose_blocks"),
    ):
        monkeypatch.setattr(module, name, never)
    tight = of_study(
        context, budget=BudgetSettings(gb=context.run.dense.memory_bytes / 2 / 10**9, flops=10**9)
    )
    proposal = removing(criterion, 1)
    (trial,) = run(tight, 0, proposal)
    assert (trial.state, trial.results) == ("infeasible", ())
    assert trial.reason.startswith("above the budget: memory +")
    assert "flops" not in trial.reason
    assert trial.cost.memory_bytes > tight.budget.memory_bytes
    assert not context.run.trial(0).path.exists()
    assert from_json(Trial, json.loads(json.dumps(to_json(trial)))) == trial


def test_a_plan_typed_by_hand_is_measured_above_the_budget_too(context):
    tight = of_study(context, budget=BudgetSettings(gb=1e-9))
    plan = FoldPlan.dropping([2], NUM_BLOCKS)
    *_, last = run(tight, 0, given(plan, origin="hand"))
    assert last.is_measured


def test_a_plan_is_not_lost_because_its_training_diverged(context):
    """The untrained model is the trial's result, with the reason beside it; no rung follows."""
    first, last = results = run(context, 0, retrained(SHARING, learning_rate=1e30))
    assert known_from(results) == [None] * 2
    assert (len(last.results), last.quality, last.state) == (2, first.quality, "finished")
    assert (last.last.kept_tokens, last.last.training_diverged) == (0, True)
    assert "Lower the learning rate" in last.reason
    assert last.setback_words == "training diverged: kept untrained"
    assert_rebuilt(context, last)
    assert run(context, 0, retrained(SHARING, learning_rate=1e30)) == []  # nothing is left to do
    assert not context.run.trial(0).optimizer.exists()


def test_a_divergence_in_the_very_last_step_is_told(context):
    """The last loss was a number; the model that the step left is not."""
    study = context.study.model_copy(update={"rungs": (0, 32)})
    results = run(of_run(context, study=study), 0, retrained(SHARING, learning_rate=1e30))
    assert results[-1].last.training_diverged
    assert "KL is nan after 32 tokens" in results[-1].reason


@pytest.mark.parametrize("rungs", [(0, 64), (64, 128)])
def test_a_divergence_that_leaves_nothing_is_a_trial_without_a_result(context, monkeypatch, rungs):
    real = trials.judged
    monkeypatch.setattr(trials, "judged", lambda *args: replace(real(*args), kl=math.nan))
    study = context.study.model_copy(update={"rungs": rungs})
    (only,) = run(of_run(context, study=study))
    assert (only.state, only.results) == ("failed", ())
    assert only.reason.startswith("diverged: ")
    assert f"KL is nan after {rungs[0]} tokens" in only.reason


# ---- training that hurts


def assert_rebuilt(context: TrialContext, trial: Trial, number: int = 0) -> None:
    """The model that is exported is the one whose quality the trial tells, on both token sets."""
    model, rebuilt = recovered_model(context, number)
    assert rebuilt == from_json(Trial, json.loads(json.dumps(to_json(trial)))) == trial
    assert quality_of(context, model) == (trial.quality, trial.last.report)


def test_training_that_hurts_is_told_and_not_kept(context):
    results = run(context, proposal=HURTING)
    untrained = results[0].quality
    assert [result.quality for result in results] == [untrained] * 3
    *_, trial = results
    assert [result.recovery_tokens for result in trial.results] == list(RUNGS)
    assert [result.kept_tokens for result in trial.results] == [0] * 3
    assert trial.results[0].setback is None
    for result in trial.results[1:]:
        assert result.setback.latest.kl > untrained.kl
        assert not result.training_diverged
    assert trial.setback_words == f"training hurt (KL {trial.last.setback.latest.kl:.3f}): kept untrained"
    assert not trained(context, 0)
    assert_rebuilt(context, trial)


def test_after_training_that_hurt_it_goes_on_from_the_best_state_at_a_lower_rate(context, monkeypatch):
    taken = []
    go_back = Recovery.go_back

    def note(self, trained, rate):
        taken.append(
            (self.tokens_done, {name: value.detach().clone() for name, value in trained.items()}, rate)
        )
        go_back(self, trained, rate)

    monkeypatch.setattr(Recovery, "go_back", note)
    study = context.study.model_copy(update={"rungs": (0, 32, 64, 128)})
    results = run(of_run(context, study=study), proposal=HURTING)
    assert [trial.last.kept_tokens for trial in results[:3]] == [
        0
    ] * 3  # the last rung is slow enough to help
    assert [(tokens, rate) for tokens, _, rate in taken] == [(32, 0.25), (64, 0.0625)]
    start = load_file(context.run.trial(0).start)
    for _, trained_before, _ in taken:  # each time the untrained model
        deltas = [name for name in trained_before if name.endswith("_proj.up") and name not in start]
        assert deltas
        assert not any(trained_before[name].any() for name in deltas)
        healed = {
            name for name in start if name.endswith("_proj.weight")
        }  # what deltas sit on; not trained itself
        assert start.keys() - healed <= trained_before.keys()
        assert all(torch.equal(trained_before[name], start[name]) for name in start.keys() - healed)


def test_a_trial_killed_after_training_from_an_earlier_state_goes_on(context, tmp_path, monkeypatch, steps):
    """What is on disk is a rung ahead of the notes already: it is not gone back from twice."""
    whole = run(context, proposal=HURTING)
    other = of_run(context, path=tmp_path / "other")
    shutil.copytree(context.run.path, other.run.path, ignore=shutil.ignore_patterns("plans", "trials"))
    generator = run_trial(HURTING, other, number=0)
    first = [next(generator), next(generator)]
    with monkeypatch.context() as patch:
        patch.setattr(trials, "judged", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(generator)
    assert measured(first + run(other, proposal=HURTING)) == measured(whole)
    assert len(steps) == 2 * 4


def test_the_best_rung_is_kept(context, monkeypatch):
    """Training helps at first, and its last rung leaves noise."""
    train = Recovery.train

    def spoil(self, until_tokens, progress=None):
        train(self, until_tokens, progress)
        if until_tokens == RUNGS[-1]:
            for parameter in self.trained.values():
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))

    whole = run(context)
    shutil.rmtree(context.run.path / "plans")
    monkeypatch.setattr(Recovery, "train", spoil)
    results = run(context, 1)
    assert measured(results[:2]) == measured(whole[:2])
    trial, last = results[-1], results[-1].last
    assert (last.quality, last.recovery_tokens, last.kept_tokens) == (results[1].quality, 128, 64)
    assert trial.setback_words == f"training hurt (KL {last.setback.latest.kl:.3f}): kept after 64 tokens"
    assert_rebuilt(context, trial, 1)
    # given to another trial, it is the same
    (*_, given) = run(context, 2)
    assert given.known_from == 1
    assert measured([given]) == measured([trial])


@pytest.mark.parametrize(
    ("plan", "said", "weight"),
    [
        ("0-1 3-4", None, 0.0),
        ("0-1 1=1+n 2-4", None, 0.5),
        ("0-1 3-4", 0.3, 0.3),
        ("0-1 1=1+n 2-4", 0.0, 0.0),
    ],
)
def test_the_text_is_a_target_of_extensions_only_unless_the_study_says(
    context, monkeypatch, plan, said, weight
):
    """It draws a folded model away from the dense one; an extension is to become better than that."""
    weights = []
    begin = Recovery.__init__

    def note(self, model, settings, *rest):
        weights.append((settings.next_token, settings.kl, settings.tail))
        begin(self, model, settings, *rest)

    monkeypatch.setattr(Recovery, "__init__", note)
    settings = context.study.recovery.model_copy(update={"next_token": said})
    study = context.study.model_copy(update={"rungs": (0, 32), "recovery": settings})
    proposal = given(FoldPlan.parse(plan, NUM_BLOCKS), delta_rank=2, origin="hand")
    run(of_run(context, study=study), 0, proposal)
    assert weights == [(weight, 1.0, 0.1)]


def test_an_extension_is_compared_by_perplexity(context, monkeypatch):
    """It begins as the dense model, so its KL can only grow; it is trained to predict better."""
    plan = FoldPlan.parse("0-1 1=1+r2+n 2-4", NUM_BLOCKS)
    real, perplexities = trials.judged, iter([30.0, 20.0, 25.0])

    def judged(model, context, split, target, progress):
        quality = real(model, context, split, target)
        return quality if split == "report" else replace(quality, perplexity=next(perplexities))

    monkeypatch.setattr(trials, "judged", judged)
    results = run(context, 0, given(plan, learning_rate=0.03, delta_rank=2, origin="hand"))
    assert results[0].quality.kl < results[1].quality.kl
    assert [result.quality.perplexity for result in results] == [30.0, 20.0, 20.0]
    assert results[-1].setback_words == "training hurt (perplexity 25.000): kept after 64 tokens"


@pytest.mark.parametrize(
    "proposal", [HURTING, retrained(SHARING, learning_rate=1e30)], ids=["hurt", "diverged"]
)
def test_the_untrained_model_is_a_state_where_no_rung_measures_it(context, proposal):
    untrained = next(run_trial(retrained(proposal, learning_rate=0.03), context, number=7)).quality
    shutil.rmtree(context.run.path / "plans")
    study = context.study.model_copy(update={"rungs": (64, 128)})
    results = run(of_run(context, study=study), proposal=proposal)
    assert {result.quality for result in results} == {untrained}
    assert results[-1].is_measured
    assert_rebuilt(of_run(context, study=study), results[-1])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory: MemoryError"),
        (torch.OutOfMemoryError("Tried to allocate 3 GiB.\nmore"), "Tried to allocate 3 GiB.\n  more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
            "99 bytes",
        ),
    ],
)
def test_running_out_of_memory_is_told(context, monkeypatch, error, reason):
    def train(*args):
        raise error

    monkeypatch.setattr(Recovery, "train", train)
    results = run(context)
    assert [trial.state for trial in results] == ["running", "failed"]
    assert reason in results[-1].reason


def test_a_fault_of_our_own_is_raised(context, monkeypatch):
    def train(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Recovery, "train", train)
    generator = run_trial(SHARING, context, number=0)
    next(generator)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(generator)


# ---- which blocks go


CRITERIA = [criterion.name for criterion in criteria.CRITERIA]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria(context, criterion, monkeypatch, tmp_path):
    fresh = replace(context, cache_dir=tmp_path / "cache")
    shutil.copytree(context.cache_dir / "targets", tmp_path / "cache" / "targets")
    proposal = removing(criterion, 2, delta_rank=0)
    first = next(run_trial(proposal, fresh, number=0))
    assert len(first.plan.dropped) == 2
    if "window" in criterion:
        assert first.plan.dropped[1] == first.plan.dropped[0] + 1
    assert (first.draft.gates is None) == (criterion != "gate")
    for module, name in (
        (workbench, "measure_evidence"),
        (greedy, "greedy_order"),
        (evolution, "evolve"),
        (linear_window, "linear_window"),
        (gates, "train_gates"),
    ):
        monkeypatch.setattr(module, name, never)
    again = next(run_trial(proposal, fresh, number=1))
    assert again.plan == first.plan
    if criterion == "gate":
        assert first.draft.gates["from_cache"] is False
        assert again.draft.gates == {**first.draft.gates, "from_cache": True}
        assert first.draft.gates["steps"] == 2
        with pytest.raises(AssertionError, match="not to be called"):  # another eps is another training
            next(run_trial(changed(proposal, setting=0.25), fresh, number=2))


# ---- the model that was measured


DROPPING = given(FoldPlan.parse("0 3-4", NUM_BLOCKS), delta_rank=2, origin="hand")
FATES = [
    SHARING,
    DROPPING,
    removing("window", 2, Share(4, "data"), delta_rank=2),
    removing("window", 2, Replace("linear"), delta_rank=2),
    removing("window", 2, Replace("layer"), delta_rank=2),
    removing("random", 2, Replace("swiglu"), attention=1, delta_rank=2),
]


@pytest.mark.parametrize(
    "proposal", FATES, ids=lambda proposal: str(proposal.removed and proposal.removed.fate)
)
def test_the_recovered_model_is_the_one_that_was_measured(context, proposal):
    last = run(context, proposal=proposal)[-1]
    assert last.is_measured
    model, rebuilt = recovered_model(context, 0)
    assert rebuilt == from_json(Trial, json.loads(json.dumps(to_json(last))))
    assert quality_of(context, model) == (last.quality, last.last.report)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "proposal", FATES, ids=lambda proposal: str(proposal.removed and proposal.removed.fate)
)
def test_an_untrained_rung_is_rebuilt_too(context, proposal):
    generator = run_trial(proposal, context, number=0)
    first = next(generator)
    generator.close()
    model, result = recovered_model(context, 0)
    assert quality_of(context, model)[0] == first.quality == result.quality


def test_what_was_not_measured_cannot_be_rebuilt(context):
    with pytest.raises(RunError, match="only a trial that was measured can be rebuilt, but trial 9"):
        recovered_model(context, 9)
    run(context)
    os.unlink(context.run.trial(0).recovered)
    with pytest.raises(RunError, match=r"is gone. Run it again"):
        recovered_model(context, 0)


# ---- healing


def healed_on(
    context: TrialContext, tokens: int, method: HealMethod = "ridge", **more: object
) -> TrialContext:
    healing = HealingSettings(tokens=tokens, method=method)
    return of_study(context, healing=healing, **more)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_measured_first_is_the_fold_healed(context, method):
    """Oracle: the fold, the states and the healing called by themselves, on the recovery text's first sequences."""
    context = healed_on(context, 6 * 16 + 5, method, rungs=(0,))
    (result,) = run(context, proposal=DROPPING)
    bench = open_workbench(context)
    ids_NT = bench.splits.recovery.ids_NT[:6]
    model = fold(bench.dense, result.plan)
    states = residual_states(
        bench.dense, ids_NT, model_hash=context.files.content_hash, cache_dir=context.cache_dir
    )
    healed = METHODS[method].heal(model, states, ids_NT, None)
    assert healed.values
    assert quality_of(context, model) == (result.quality, result.last.report)
    assert result.healing is not None
    # up to two matrices a position, which is told of from before the first to after the last
    before = {block.position: block.before for block in reversed(healed.blocks)}
    after = {block.position: block.after for block in healed.blocks}
    changed = {block.position for block in healed.blocks if block.ridge is not None}
    assert (result.healing.tokens, result.healing.solved) == (6 * 16, len(after))
    assert result.healing.changed == len(changed)
    assert result.healing.method == method
    for told, errors in ((result.healing.before, before), (result.healing.after, after)):
        assert told == pytest.approx(sum(errors.values()) / len(errors), rel=1e-12)
    # rivals choose nothing on held-out text
    assert method != "ridge" or result.healing.after < result.healing.before
    stored = load_file(context.run.trial(0).start)
    assert stored.keys() == healed.values.keys()
    assert all(torch.equal(stored[name], value) for name, value in healed.values.items())
    # nothing is added: the same tensors as those of the fold as it was, of the same shapes
    plain = {name: value.shape for name, value in fold(bench.dense, result.plan).state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == plain


def test_healing_can_be_left_out(context, tmp_path):
    without = of_run(healed_on(context, 0), path=tmp_path / "without")
    shutil.copytree(context.run.path, without.run.path)
    healed, plain = next(run_trial(DROPPING, context, number=0)), next(run_trial(DROPPING, without, number=0))
    assert plain.healing is None
    assert healed.healing is not None
    assert healed.quality != plain.quality
    assert list(without.run.trial(0).path.iterdir()) == [without.run.trial(0).record]
    assert (healed.plan, healed.cost) == (plain.plan, plain.cost)


@pytest.mark.parametrize(
    "proposal", FATES, ids=lambda proposal: str(proposal.removed and proposal.removed.fate)
)
def test_a_model_that_was_healed_is_rebuilt_from_what_is_kept_and_without_it(context, monkeypatch, proposal):
    last = run(context, proposal=proposal)[-1]
    with monkeypatch.context() as patched:
        patched.setattr(rebuild, "_heal", never)
        model, result = recovered_model(context, 0)
    assert quality_of(context, model) == (last.quality, last.last.report)
    context.run.trial(0).start.unlink()
    for _ in range(2):
        again, _ = recovered_model(context, 0)
        kept = model.state_dict()
        assert all(torch.equal(kept[name], value) for name, value in again.state_dict().items())
    assert result.healing == last.healing


def test_a_stopped_trial_whose_start_was_let_go_of_goes_on(context):
    whole = run(context, 0, DROPPING)
    shutil.rmtree(context.run.path / "plans")
    generator = run_trial(DROPPING, context, number=1)
    next(generator)
    generator.close()
    context.run.trial(1).start.unlink()
    assert measured(run(context, 1, DROPPING)) == measured(whole[1:])
    assert measured(run(context, 2, DROPPING)) == measured(whole)


def test_who_goes_on_with_a_trial_whose_start_was_let_go_of_keeps_one(context):
    """So that its model is rebuilt from a file, not healed again by who exports it."""
    run(context, 0, DROPPING)
    shutil.rmtree(context.run.path / "plans")
    generator = run_trial(DROPPING, context, number=1)
    next(generator)
    generator.close()
    context.run.trial(1).start.unlink()  # as halving does
    *_, last = run(context, 2, DROPPING)
    assert last.is_measured
    assert context.run.trial(2).start.exists()
    assert last.healing is not None
    kept = read_trial(context.run.trial(2))
    assert kept is not None
    assert context.run.trial(2).start.name in kept.files


def test_where_nothing_is_trained_the_dense_model_is_not_asked_about_the_recovery_texts(context, monkeypatch):
    asked = []
    ask = contexts.dense_targets
    monkeypatch.setattr(
        contexts, "dense_targets", lambda *args, **rest: (asked.append(args[1].name), ask(*args, **rest))[1]
    )
    (result,) = run(healed_on(context, 8192, rungs=(0,)), proposal=DROPPING)
    assert result.is_measured
    assert result.healing is not None
    assert asked == ["search", "report"]


@pytest.mark.parametrize("plan", ["0-4", "0 1 1=1+n 2-4"])
def test_what_lost_nothing_is_not_healed(context, monkeypatch, plan):
    monkeypatch.setattr(rebuild, "_heal", never)
    proposal = given(FoldPlan.parse(plan, NUM_BLOCKS), origin="hand")
    assert next(run_trial(proposal, context, number=0)).healing is None


def test_states_that_are_no_numbers_fail_the_trial(context, monkeypatch):
    monkeypatch.setattr(
        states, "residual_states", lambda *args, **kwargs: residual_states(*args, **kwargs) * math.inf
    )
    (result,) = run(context, proposal=DROPPING)
    assert result.state == "failed"
    assert "healing must read finite states" in result.reason


# ---- what is shared


def test_the_dense_weights_are_never_written(context):
    files = list(Path(context.files.folder).glob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    dense = open_workbench(context).dense
    values = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    run(context)
    assert before == [path.read_bytes() for path in files]
    assert all(torch.equal(tensor, values[name]) for name, tensor in dense.state_dict().items())


def test_the_dense_model_is_asked_on_what_training_reads_and_no_more(context):
    """Two steps of two sequences read four of the recovery texts' eight, whatever healing reads of them."""
    step = 2 * 16
    bench = open_workbench(of_study(context, rungs=(0, 2 * step - 1)))
    four = bench.trained.ids_NT
    assert four.shape == (4, 16)
    torch.testing.assert_close(bench.recovery.hidden_NPD, ask_dense(bench.dense, bench.trained).hidden_NPD)
    # Who trains for less is content with that; longer training begins with the same four.
    assert open_workbench(of_study(context, rungs=(0, step))) is bench
    longer = open_workbench(of_study(context, rungs=(0, 9 * step)))
    whole = longer.splits.recovery.ids_NT
    assert torch.equal(longer.trained.ids_NT[:4], four)
    assert longer.recovery.hidden_NPD.shape[:2] == (8, 15)
    assert sorted(longer.trained.ids_NT.tolist()) == sorted(whole.tolist()) != whole.tolist()
    assert open_workbench(of_study(context, rungs=(0,))) is longer


def test_preparing_again_gives_the_same_run(prepared):
    held = (prepared.run.path / "tokens.safetensors").read_bytes()
    again = prepare_context(prepared.study, prepared.run.path, cache_dir=prepared.cache_dir)
    assert again == prepared
    assert (prepared.run.path / "tokens.safetensors").read_bytes() == held
    splits = read_splits(prepared.run)
    documents = [one.documents for one in (splits.search, splits.recovery, splits.report)]
    assert len(set().union(*documents)) == sum(map(len, documents))


def test_the_first_pace_is_that_of_asking_alone(prepared, tmp_path, monkeypatch):
    """By a clock of which each look takes a second: the median of the sets' batches, whatever was opened before."""
    ticks = count()
    monkeypatch.setattr("foldsearch.prepare.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    for expected in (1.0, 0.0):  # the second time, the answers are known
        close_workbench()
        found = prepare_context(prepared.study, tmp_path / f"run {expected}", cache_dir=tmp_path / "cache")
        splits = read_splits(found.run)
        tokens = median(one.ids_NT.numel() for one in (splits.search, splits.recovery, splits.report))
        assert found.token_seconds == pytest.approx(expected / (prepare.ASKING * tokens))
        assert found.asking_seconds > 3 * expected


def test_what_a_process_works_with_stays_in_the_cache_until_it_lets_go(prepared, tmp_path):
    """The model, which is converted here, what it said, and its states; what is read once and done with goes."""
    study = prepared.study.model_copy(update={"precision": "bfloat16"})
    bench = open_workbench(prepare_context(study, tmp_path / "run", cache_dir=tmp_path / "cache"))
    bench.fit_text(32).states()
    bench.evidence(lambda *_: None)
    assert [entry.kind for entry in cache.trim(tmp_path / "cache", 0)] == ["evidence"]
    assert {entry.kind for entry in cache.entries(tmp_path / "cache")} == {"models", "states", "targets"}
    close_workbench()  # as the process does that starts the workers, which open it again
    assert cache.trim(tmp_path / "cache", 0) == []
    cache.let_go()
    cache.trim(tmp_path / "cache", 0)
    assert cache.entries(tmp_path / "cache") == []
