"""Milliseconds as a target of a search, on a tiny model: measured, bounded, searched by, and told.

Oracles: prices by given lines; the budget; what the programs themselves did in a real calibration.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from foldsearch import api, calibrate, prepare
from foldsearch.api import ExportForm
from foldsearch.calibrate import Subject, calibrated, run_in_turns
from foldsearch.context import TrialContext
from foldsearch.errors import BudgetError
from foldsearch.export.figures import Predicted
from foldsearch.model.measure import measure
from foldsearch.plan.cost import Target, price
from foldsearch.plan.front import dominates
from foldsearch.plan.latency import Latency, Line, Timed
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import DTYPE_TYPES
from foldsearch.record import point, read_trial
from foldsearch.report import terminal
from foldsearch.report.page import write_page
from foldsearch.report.picture import front_png
from foldsearch.report.view import RunView
from foldsearch.run import Run
from foldsearch.runtimes import runtime_named
from foldsearch.search import dry_run
from foldsearch.search.proposer import Line as Queue
from foldsearch.search.records import Records
from foldsearch.search.screening import Screening
from foldsearch.spec.space import Space
from foldsearch.spec.study import BudgetSettings, ScreenSettings, SplitSettings, Study
from foldsearch.trial import run_trial
from tests.contexts import begin_run, tiny_study
from tests.gguf_tokenizers import bytes_tokenizer
from tests.tiny import CONFIGS, NUM_BLOCKS, tokenizer

IDENTITY = FoldPlan.identity(NUM_BLOCKS)


def given(subject: Subject, *args: Any, **more: Any) -> Latency:
    """In place of a calibration: 1 ms and another for each 10,000 MACs, or 4,000 bytes; the rounds differ much."""
    weights = subject.target.weights
    return Latency(
        subject.target.runtime,
        weights,
        40,
        Line(1, 1e-4),
        Line(1, 1 / 4000),
        (Timed(5, 9, 9, 0.3),),
        "the test",
    )


def text_of(shown: Any) -> str:
    console = Console(width=300, file=io.StringIO(), force_terminal=False)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


def dense_and_two_gone(study: Study) -> tuple[float, float]:
    """Milliseconds for a token, by the lines above."""
    config = CONFIGS["llama"]()
    target = study.target.value()
    table = replace(
        measure(config), latencies=(given(Subject(config, measure(config), target, 1, tokenizer)),)
    )
    costs = (price(plan, table, target) for plan in (IDENTITY, FoldPlan.dropping([1, 2], NUM_BLOCKS)))
    dense, two = (cost.decode_ms or 0.0 for cost in costs)
    return dense, two


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Whose budget is kept by who drops two of five blocks, all blocks being alike."""
    plain = tiny_study(
        tmp_path_factory.mktemp("latency"),
        space=Space(removal=(0.0, 0.8), criteria=("block_influence", "uniform"), fates=("drop",)),
        rungs=(0,),
        splits=SplitSettings(sequence_length=32, search=2, recovery=4, report=2),
        screen=ScreenSettings(plans=12, promoted=2, healed_tokens=64, judged_tokens=32),
        trials=4,
        objectives=("kl", "decode_ms"),
    )
    _, two = dense_and_two_gone(plain)
    return plain.model_copy(update={"budget": BudgetSettings(decode_ms=two * 1.01)})


@pytest.fixture(scope="module")
def context(study: Study, tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    place, told = tmp_path_factory.mktemp("run"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "calibrated", given)
        made = begin_run(study, place / "run", cache_dir=place / "cache", notice=told.append)
    assert any("30% from round to round (the test)" in words for words in told)
    return made


@pytest.fixture(scope="module")
def view(context: TrialContext) -> RunView:
    """After a whole search, without Ray."""
    records = Records(context.run)
    queue = Queue(records)
    while (asked := queue.next(num_running=0)) is not None:
        number, proposal = asked
        for trial in run_trial(proposal, context, number=number):
            records.record(trial)
        records.finish(number)
    return RunView.open(context.run.path)


def test_a_search_keeps_a_budget_of_milliseconds(context: TrialContext, view: RunView) -> None:
    bound = context.budget.decode_ms
    assert bound is not None
    assert Run.open(context.run.path).table.latencies == context.table.latencies
    assert len(view.finished) >= 3
    for trial in view.finished:
        assert trial.cost == price(trial.plan, context.table, context.target)
        assert trial.cost.decode_ms is not None
        assert trial.cost.decode_ms <= bound
        assert point(trial, view.folder.study.objectives) == (trial.quality.kl, trial.cost.decode_ms)
    baselines = [trial for trial in view.finished if view.baseline(trial)]
    assert min(len(trial.plan.dropped) for trial in baselines) == 2  # as few as the budget asks for
    points = {trial.number: point(trial, ("kl", "decode_ms")) for trial in view.finished}
    best = {n for n, one in points.items() if not any(dominates(other, one) for other in points.values())}
    assert {trial.number for trial in view.front} == best


def test_what_is_screened_keeps_it_too(context: TrialContext) -> None:
    found = Screening(context, context.study.narrowed(context.table))
    found.run()
    assert found.front()
    assert all(context.budget.admits(price(one.plan, context.table, context.target)) for one in found.front())


def test_reports_show_milliseconds(view: RunView, tmp_path: Path) -> None:
    shown = text_of(terminal.front_report(view, width=300))
    assert "prompt ms" in shown
    assert "token ms" in shown
    assert "ms for a token" in terminal.budget_words(view.folder)
    for cost in (view.folder.timed_dense, view.front[0].cost):
        assert cost.decode_ms is not None
        assert f" {cost.decode_ms:.3g}" in shown
    assert "a prompt of 40 tokens" in shown
    write_page(view, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<th>prompt, ms<th>token, ms" in page
    assert f"<td>{view.front[0].cost.decode_ms:.3g}" in page
    assert front_png(view).startswith(b"\x89PNG")
    narrow = text_of(terminal.front_report(view, width=70))
    assert "token ms" in narrow


def test_a_run_that_goes_on_keeps_its_times(
    study: Study, context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("it was measured when the run began")

    monkeypatch.setattr(prepare, "calibrated", never)
    again = prepare.prepare_context(study, context.run.path, cache_dir=context.cache_dir)
    assert again.run.table == context.run.table


def test_a_budget_that_nothing_keeps_is_refused_before_the_text_is_read(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "calibrated", given)
    monkeypatch.setattr(prepare, "make_study_splits", lambda *args, **more: pytest.fail("the text was read"))
    asked = study.model_copy(update={"budget": BudgetSettings(decode_ms=1.5)})
    with pytest.raises(
        BudgetError, match=r"keeps the budget of 1\.5 ms for a token: .* fastest takes .* ms for a token"
    ):
        prepare.prepare_context(asked, tmp_path / "run", cache_dir=tmp_path / "cache", check=asked.narrowed)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_them(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "calibrated", given)
    monkeypatch.setattr(dry_run, "feasible_share", lambda *args, **more: 0.5)  # of 100,000 proposals
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path / "cache"))
    found = api.dry_run(study)
    dense, _ = dense_and_two_gone(study)
    assert found.timed is not None
    assert found.timed.decode_ms == pytest.approx(dense)
    assert found.smallest_cost.decode_ms is not None
    shown = text_of(terminal.dry_run_table(study, found))
    assert f"{dense:.3g} ms, smallest" in " ".join(shown.split())
    assert "through 5 blocks, measured in the test (rounds differ by 30%)" in " ".join(shown.split())
    assert found.counts == (2, 4)


def test_a_prediction_is_of_the_runtime_and_type_that_were_measured(context: TrialContext) -> None:
    (trial, *_) = (read_trial(context.run.trial(number)) for number in range(1))
    assert trial is not None

    def predicted(name: str, weights: str = "") -> Predicted | None:
        return api._predicted(context, trial, runtime_named(name), ExportForm(to=name, weights=weights))

    dense = context.run.timed_dense
    times = [ms or 0.0 for cost in (trial.cost, dense) for ms in (cost.prompt_ms, cost.decode_ms)]
    expected = Predicted(40, *times)
    assert predicted("folded") == expected
    assert predicted("stock") == expected  # transformers, too
    assert predicted("gguf") is predicted("onnx") is None


# ---- measured


def in_order(subject: Subject, plans: Sequence[FoldPlan], progress: Any) -> Any:
    """Real rounds; but of such tiny models noise may be more than blocks, so in each the slowest is of the most."""
    rounds = run_in_turns(subject, plans, progress)
    assert all(speed > 0 for models in rounds for model in models for speed in model.values())
    deepest_first = sorted(range(len(plans)), key=lambda number: -plans[number].depth)
    ordered = []
    for models in rounds:
        speeds = {name: sorted(model[name] for model in models) for name in ("prompt", "decode")}
        places = {number: place for place, number in enumerate(deepest_first)}
        ordered.append([{name: speeds[name][places[i]] for name in speeds} for i in range(len(plans))])
    return ordered


def measured(runtime: str, cache_dir: Path, blocks: int = 24) -> tuple[Subject, Latency]:
    config = CONFIGS["llama"](num_hidden_layers=blocks, vocab_size=320)
    typed = DTYPE_TYPES["float32"] if runtime == "gguf" else ""
    target = Target("float32", context=64, runtime=runtime, weights=typed)
    subject, stages = Subject(config, measure(config), target, 40, bytes_tokenizer), list[tuple[str, float]]()
    found = calibrated(subject, cache_dir, lambda stage, share: stages.append((stage, share)), run=in_order)
    assert found == calibrated(subject, cache_dir, lambda *told: pytest.fail("it is in the cache"))
    shares = [share for _, share in stages]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)
    return subject, found


def check_lines(subject: Subject, found: Latency) -> None:
    """Whatever the machine does besides: times are positive, and more blocks take longer by the lines."""
    assert found.tokens == 40
    table = replace(subject.table, latencies=(found,))
    costs = [price(FoldPlan.dropping(range(n, 24), 24), table, subject.target) for n in (2, 4, 6)]
    prompts, tokens = [cost.prompt_ms or 0.0 for cost in costs], [cost.decode_ms or 0.0 for cost in costs]
    assert 0 < prompts[0] < prompts[1] < prompts[2]
    assert 0 < tokens[0] < tokens[1] < tokens[2]
    assert all(one.prompt_ms > 0 and one.decode_ms > 0 for one in found.timed)


def test_transformers_is_measured_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "SHARES", (1.0, 1 / 3))  # a process takes ten seconds to begin
    before = torch.random.get_rng_state()
    subject, found = measured("stock", tmp_path)
    assert [one.blocks for one in found.timed] == [24, 8]
    assert "transformers" in found.where
    check_lines(subject, found)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.runtimes
def test_llama_cpp_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    subject, found = measured("gguf", tmp_path)
    assert [one.blocks for one in found.timed] == [24, 16, 12, 8]
    assert "llama.cpp" in found.where
    check_lines(subject, found)
