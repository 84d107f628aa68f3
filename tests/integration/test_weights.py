"""Trials and rivals whose weights have few bits, on a tiny model.

Oracles: the model that is read back from a GGUF file which the exporter wrote, judged by itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from foldsearch import api, shipped
from foldsearch.context import TrialContext, open_workbench
from foldsearch.errors import PlanError
from foldsearch.model.judge import judge
from foldsearch.model.workbench import Workbench
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.rebuild import check_rebuilt, recovered_model
from foldsearch.record import read_rivals
from foldsearch.runtimes import NOTHING
from foldsearch.runtimes import gguf as runtime
from foldsearch.shipped import measure_rivals, rivals_seconds
from foldsearch.spec.study import BudgetSettings, SplitSettings, TargetSettings
from foldsearch.trial import run_trial
from tests.contexts import of_study, tiny_context
from tests.proposals import removing

WEIGHTS = "q4_0"


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    return tiny_context(
        tmp_path_factory.mktemp("weights"),
        rungs=(0, 64),
        splits=SplitSettings(sequence_length=32, search=4, recovery=8, report=4),
        target=TargetSettings.model_validate({"weights": WEIGHTS, "context": 64, "rivals": ("q8_0", "q4_0")}),
        budget=BudgetSettings(gb=1.0),
    )


def from_file(model, weights: str, folder: Path):
    """The model as an export to llama.cpp holds it."""
    folder.mkdir(parents=True)
    held = runtime.rounded(runtime.before_rounding(model)[0], weights)
    runtime.write(held, folder, dataclasses.replace(NOTHING, weights=weights))
    return runtime.load(str(folder), "float32", model.config._attn_implementation)[0]


def test_a_trial_is_measured_with_the_weights_of_its_file(context: TrialContext, tmp_path: Path) -> None:
    (*_, trial) = run_trial(removing("uniform", 1), context, number=0)
    assert trial.state == "finished"
    assert trial.cost == price(trial.plan, context.table, context.target)
    assert (
        trial.cost.weight_bytes
        < price(trial.plan, context.table, context.study.target.stored_in("f16")).weight_bytes
    )
    model, _ = recovered_model(context, 0)
    bench = open_workbench(context)
    loaded = from_file(model, WEIGHTS, tmp_path / "file")
    for split, known in (("search", trial.quality), ("report", trial.final)):
        tokens, targets = getattr(bench.splits, split), getattr(bench, split)
        found = judge(loaded, tokens, targets, dense=bench.dense)
        assert found.kl == pytest.approx(known.kl, rel=1e-5)
        assert found.perplexity == pytest.approx(known.perplexity, rel=1e-5)
        assert abs(judge(model, tokens, targets).kl - known.kl) > 1e-4  # before rounding it is another model
    assert check_rebuilt(context, 0, model).found_kl == trial.final.kl


def test_the_dense_model_is_measured_in_each_type_once(
    context: TrialContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, rounded, real = [], [], shipped.as_stored
    monkeypatch.setattr(shipped, "as_stored", lambda *words: (rounded.append(words), real(*words))[1])
    found = measure_rivals(context, progress=lambda stage, share: stages.append(stage))
    assert [rival.weights for rival in found] == ["q8_0", "q4_0"]
    assert len(stages) == len(rounded) == 2
    assert read_rivals(context.run.rivals) == found
    bench, identity = open_workbench(context), FoldPlan.identity(len(context.table.blocks))
    for rival in found:
        loaded = from_file(bench.dense, rival.weights, tmp_path / rival.weights)
        again = judge(loaded, bench.splits.report, bench.report, dense=bench.dense)
        assert rival.report.kl == pytest.approx(again.kl, rel=1e-5)
        assert rival.cost == price(identity, context.table, context.study.target.stored_in(rival.weights))
    assert 0 < found[0].report.kl < found[1].report.kl

    def never(*args: object) -> None:
        raise AssertionError("this is not to be measured again")

    monkeypatch.setattr(shipped, "judged_each", never)
    assert measure_rivals(context) == found


def test_when_the_time_is_up_no_other_is_begun(context: TrialContext, tmp_path: Path) -> None:
    """The time is up while the first of two is measured; with more time the other one is measured too."""
    bench, told, asked = open_workbench(context), list[str](), itertools.count()
    fresh = dataclasses.replace(context, cache_dir=tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "open_workbench", lambda _: dataclasses.replace(bench, cache_dir=tmp_path))
        (first,) = measure_rivals(fresh, notice=told.append, is_late=lambda: next(asked) > 0)
        assert first.weights == "q8_0"
        assert told == ["the time is up, so the dense model is not measured in q4_0: give the run more."]
        assert read_rivals(context.run.rivals) == (first,)
        assert measure_rivals(fresh, is_late=lambda: True) == (first,)  # it is known, and costs nothing
        assert [one.weights for one in measure_rivals(fresh)] == ["q8_0", "q4_0"]


def test_dense_is_priced_in_its_dtype(context: TrialContext) -> None:
    """Its KL is 0, so its bytes are not those of a few bits."""
    identity = FoldPlan.identity(len(context.table.blocks))
    assert context.run.dense == price(identity, context.table, context.study.target.stored_in("bf16"))


def test_without_a_budget_of_bytes_there_is_no_rival(context: TrialContext) -> None:
    without = of_study(context, budget=BudgetSettings(flops="0.8x"))
    assert measure_rivals(without) == ()
    assert rivals_seconds(dataclasses.replace(without, token_seconds=1.0)) == 0


def test_what_rivals_take_is_known_before_the_trials(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, over the search and the report tokens; what is in the cache takes nothing."""
    bench = open_workbench(context)
    monkeypatch.setattr(shipped, "open_workbench", lambda _: bench)
    tokens = bench.splits.search.ids_NT.numel() + bench.splits.report.ids_NT.numel()
    asked = dataclasses.replace(context, token_seconds=0.5)
    measure_rivals(context)
    assert rivals_seconds(asked) == 0
    monkeypatch.setattr(Workbench, "knows", lambda *_, **__: False)
    assert rivals_seconds(asked) == shipped.RIVAL * 0.5 * 2 * tokens
    files = dataclasses.replace(context.files, dtype="bfloat16")  # they compute in float32
    slower = rivals_seconds(dataclasses.replace(asked, files=files))
    assert slower == shipped.IN_FLOAT32 * shipped.RIVAL * 0.5 * 2 * tokens
    # The dense model's answers were known, so nothing was timed: they take their time all the same.
    assert rivals_seconds(dataclasses.replace(context, token_seconds=0.0)) > 0


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("0 1=0+r2+n 2-4", "an output norm"),
        ("0 2a 3-4", "a block without attention or without MLP"),
        ("0 1-3~linear 4", "a network"),
    ],
)
def test_a_plan_that_the_runtime_of_its_type_cannot_hold_is_refused(
    context: TrialContext, plan: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(context.cache_dir))
    with pytest.raises(PlanError, match=rf"in q4_0 is measured as the gguf runtime stores it.*({words})"):
        list(api.try_plan(plan, context.study, folder=tmp_path / "tried"))
    assert not any(tmp_path.iterdir())
