"""What reports show. Oracles: the fake trials' own records, brute force over them, and plans read by eye."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foldsearch.codec import from_json, to_json
from foldsearch.criteria import CRITERIA
from foldsearch.errors import RunError
from foldsearch.fates import Replace, Share
from foldsearch.plan.cost import price
from foldsearch.plan.front import dominates
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.plan.result import Healing, KindQuality, RungResult, Setback
from foldsearch.plan.strip import LEGEND, cells, strip
from foldsearch.proposal import Proposal
from foldsearch.record import DenseRival, Trial, best_of_plans, front, point
from foldsearch.report import page, picture, terminal
from foldsearch.report.colours import DROPPED, KEPT, PAIRS, REPLACED, paint
from foldsearch.report.live import RunDisplay
from foldsearch.report.view import NO_ERROR, RunView, author, counted, rank_correlation
from foldsearch.runtimes import RUNTIMES, runtime_for
from foldsearch.search import events
from foldsearch.search.records import note
from foldsearch.search.screened import Screened, write_screened
from tests.fake_trial import NUM_BLOCKS, with_results
from tests.proposals import removing


@pytest.fixture
def view(run_path: Path) -> RunView:
    return RunView.open(run_path)


def text_of(renderable: object, width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def test_every_baseline_has_a_name_and_a_marker_of_its_own() -> None:
    assert len({criterion.marker for criterion in CRITERIA}) == len(CRITERIA)


def test_who_stopped_because_another_trial_measured_the_plan_is_among_its_authors(view: RunView) -> None:
    record = next(trial for trial in view.trials if trial.is_measured)
    proposal = removing("uniform", 4, origin="baseline")
    twin = replace(record, number=99, state="repeat", proposal=proposal, results=record.results[:1])
    more = replace(view, trials=(*view.trials, twin))
    (entry,) = (entry for entry in more.finished if entry.number == record.number)
    assert "uniform" in more.authors(entry)
    assert more.baseline(entry)
    assert len(more.finished) == len(view.finished)


def test_a_plan_that_a_criterion_gave_to_the_screening_is_a_baseline(view: RunView) -> None:
    """Whoever proposed it to be trained; not one that gates gave, which are not simple, or the search itself."""
    trial = next(trial for trial in view.finished if view.baseline(trial) is None)
    for authors, found, named in (
        (("move", "block_influence"), "block_influence", True),
        (("gate",), None, True),
        (("chain", "move", "alone", "earlier run"), None, False),
    ):
        told = replace(view)
        vars(told)["screened"] = [Screened(trial.plan, authors, trial.quality)]
        assert told.baseline(trial) == found
        assert (set(told.authors(trial)) > set(view.authors(trial))) == named
        assert (trial in told.baselines) == (found is not None)


@pytest.mark.parametrize(
    ("proposal", "words"),
    [
        (removing("block_influence", 2), "influence"),
        (removing("gate", 2, Share()), "gate 0.5 → children"),
        (removing("linear_window", 2, Replace("ffn")), "linear window → ffn"),
    ],
)
def test_an_author_says_what_became_of_the_blocks(proposal: Proposal, words: str) -> None:
    assert author(proposal) == words


def test_the_dense_model_in_few_bits_stands_below_dense_everywhere(view: RunView) -> None:
    trial, dense = view.finished[0], view.folder.dense
    search, report = replace(trial.quality, kl=0.1234), replace(trial.final, kl=0.2345, perplexity=77.77)
    cost = replace(dense, weight_bytes=dense.weight_bytes // 3)
    vars(view)["rivals"] = (DenseRival("q4_0", cost, search, report),)
    table = text_of(terminal.front_report(view, width=200))
    (row,) = (line for line in table.splitlines() if "dense q4_0" in line and "77.77" in line)
    assert "0.123 ±" in row
    assert "0.234 ±" in row
    written = page._page(view)
    (cells,) = (line for line in written.split("<tr") if "dense q4_0" in line)
    assert all(figure in cells for figure in ("0.123 ±", "0.234 ±", "77.77"))
    figure = picture._front_figure(view)
    labels = [
        text.get_text()
        for axes in figure.axes
        if (legend := axes.get_legend())
        for text in legend.get_texts()
    ]
    assert "dense, fewer bits" in labels
    assert any(text.get_text().startswith("q4_0") for axes in figure.axes for text in axes.texts)


# ---- strips


@pytest.mark.parametrize(
    ("plan", "drawn"),
    [
        ("0-9", "██████████"),
        ("0 2-3 9", "█·██·····█"),
        ("0 1a 2m 9", "█▀▄······█"),
        ("0-1 2=1 3=1+r8+n 9", "██▒▒·····█"),
        ("0 1=0a 2a=0 9", "█▓░······█"),
        ("0 2-7~linear 9", "█·━━━━━━·█"),
        ("0-1 0=0 1=1 9", "██▒▒·······█"),  # repeats take cells of their own
    ],
)
def test_a_strip_has_one_cell_a_block(plan: str, drawn: str) -> None:
    assert strip(FoldPlan.parse(plan, 10)) == drawn


def test_every_glyph_of_a_strip_is_in_the_legend() -> None:
    plan = FoldPlan.parse("0 1=0 2=0a 3a 4m 5a=0 6~linear 8-9", 10)
    assert {cell.glyph for cell in cells(plan)} == set("█▒▓▀▄░━·")
    assert all(cell.glyph in LEGEND for cell in cells(plan))


def test_children_have_the_light_tone_of_their_owner_and_nobody_elses() -> None:
    painted = paint(FoldPlan.parse("0-2 3=2 4 5=4a 7~linear 9", 10))
    (first, first_light), (second, second_light) = PAIRS[:2]
    assert [cell.attention for cell in painted] == [
        KEPT[0], KEPT[0], first, first_light, second, second_light, None, REPLACED, None, KEPT[1],
    ]  # fmt: skip
    assert painted[5].mlp == KEPT[1]  # block 5 borrows the attention only
    assert DROPPED not in {cell.attention for cell in painted}


def test_the_ruler_stands_above_its_blocks() -> None:
    ruler = terminal.ruler(30)
    assert all(ruler[block:].startswith(str(block)) for block in range(0, 30, 5))
    assert len(terminal.ruler(12)) <= 12


@pytest.mark.parametrize("text", ["0-29", "0-3 3=3+n 4 4=4+n 5-29", "0-18 3=3 4=4 5=5 19-24 26-29", "10-29"])
def test_the_ruler_of_a_strip_stands_above_its_blocks(text: str) -> None:
    plan = FoldPlan.parse(text, 30)
    ruler = terminal.strip_ruler(plan)
    firsts = [index for index, cell in enumerate(cells(plan)) if cell.block % 5 == 0 and not cell.repeat]
    assert [ruler[index:].split()[0] for index in firsts] == ["0", "5", "10", "15", "20", "25"]
    if plan.depth == 30 or not any(cell.repeat for cell in cells(plan)):
        assert ruler == terminal.ruler(30)


# ---- the view


def test_the_front_is_what_brute_force_finds(view: RunView) -> None:
    points = {
        trial.number: point(trial, ("kl", "memory", "flops")) for trial in view.trials if trial.is_measured
    }
    undominated = {n for n in points if not any(dominates(other, points[n]) for other in points.values())}
    assert {entry.number for entry in view.front} == undominated
    assert [e.cost.memory_bytes for e in view.front] == sorted(
        (e.cost.memory_bytes for e in view.front), reverse=True
    )


def test_stopped_and_failed_trials_are_on_no_table(view: RunView) -> None:
    assert {view.trials[5].state, view.trials[7].state} == {"failed", "stopped"}
    assert not {5, 7} & {entry.number for entry in view.finished}


def test_a_plan_that_two_criteria_chose_is_one_row_with_both_names(view: RunView) -> None:
    assert view.trials[3].known_from == 0
    shown = {entry.number: entry for entry in view.finished}
    assert 3 not in shown
    assert shown[0].removed is not None
    assert view.authors(shown[0]) == (f"gate {shown[0].removed.setting:g}", "greedy")
    assert view.baseline(shown[0]) == "greedy"


def test_the_gain_is_against_the_best_baseline_of_no_more_cost(view: RunView) -> None:
    by_number = {entry.number: entry for entry in view.finished}
    baselines = [by_number[n] for n in (0, 1, 2)]  # four blocks dropped by each criterion: equal costs
    best = min(baselines, key=lambda entry: entry.final.kl)
    assert view.gain(best) is None
    for other in (e for e in baselines if e != best):
        assert view.gain(other) == pytest.approx(other.final.kl - best.final.kl)
    cheaper = min(view.finished, key=lambda entry: entry.cost.memory_bytes)
    assert cheaper.cost.memory_bytes * 1.02 < best.cost.memory_bytes
    assert view.gain(cheaper) is None


def test_criteria_are_compared_at_equal_counts_on_plans_that_only_drop(view: RunView) -> None:
    (count, row), *others = view.by_count().items()
    assert (count, others) == (4, [])
    assert set(row) == {"gate", "block_influence", "window", "greedy", "neighbour"}
    assert row["gate"] == row["greedy"]
    assert all(str(entry.plan).replace("-", "").replace(" ", "").isdigit() for entry in row.values())


def timed(view: RunView) -> RunView:
    """The same run, as if milliseconds had been measured: a prompt takes longer with more bytes, a token with fewer."""
    return replace(
        view,
        trials=tuple(
            trial
            if trial.draft is None
            else replace(
                trial,
                draft=replace(
                    trial.draft,
                    cost=replace(
                        trial.cost,
                        prompt_ms=trial.cost.memory_bytes / 1e5,
                        decode_ms=1e9 / trial.cost.memory_bytes,
                    ),
                ),
            )
            for trial in view.trials
        ),
    )


def test_picking_within_milliseconds(view: RunView) -> None:
    """Oracle: brute force over the finished trials, at the times of each of them."""
    for bound in ({"max_prompt_ms": 1.0}, {"max_decode_ms": 1.0}, {"max_gb": 1.0, "max_decode_ms": 1.0}):
        with pytest.raises(
            RunError, match=r"in '.*' they were not\. .*foldsearch run --max-(prompt|decode)-ms MS"
        ):
            view.pick(**bound)  # type: ignore[arg-type]
    run = timed(view)
    times = [(trial.cost.prompt_ms or 0.0, trial.cost.decode_ms or 0.0) for trial in run.finished]
    empty = 0
    for prompt, decode in itertools.product([ms for ms, _ in times], [ms for _, ms in times]):
        fitting = [
            trial
            for trial, (one, other) in zip(run.finished, times, strict=True)
            if one <= prompt and other <= decode
        ]
        if fitting:
            best = min(fitting, key=lambda trial: trial.quality.kl)
            assert run.pick(max_prompt_ms=prompt, max_decode_ms=decode) == best
            assert run.within(run.finished, max_prompt_ms=prompt, max_decode_ms=decode) == fitting
            continue
        empty += 1
        with pytest.raises(
            RunError, match=r"ms for a prompt and .*: the least of each is .* ms for a token\. Raise"
        ):
            run.pick(max_prompt_ms=prompt, max_decode_ms=decode)
    assert 0 < empty < len(times) ** 2


def test_picking(view: RunView) -> None:
    assert view.pick() == view.knee
    assert view.pick(number=2).number == 2
    largest = max(entry.cost.memory_bytes for entry in view.finished) / 1e9
    assert view.pick(max_gb=largest) == min(view.finished, key=lambda entry: entry.quality.kl)
    smallest = min(view.finished, key=lambda entry: entry.cost.memory_bytes)
    assert view.pick(max_gb=smallest.cost.memory_bytes / 1e9).cost == smallest.cost
    with pytest.raises(RunError, match=r"same plan as trial 0, .* --trial 0"):
        view.pick(number=3)
    for number in (5, 7, 99):
        with pytest.raises(RunError, match=f"reached the last rung can be picked, got {number}"):
            view.pick(number=number)
    with pytest.raises(RunError, match=r"fits 0\.001 GB: the smallest needs 0\.00") as told:
        view.pick(max_gb=0.001)
    needs = re.search(r"smallest needs (\S+) GB", str(told.value))
    assert needs is not None
    assert view.pick(max_gb=float(needs[1])).cost == smallest.cost  # what is told is enough, as it is told


def test_all_reports_together_look_for_the_front_once(
    view: RunView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(function: Callable[..., list[Trial]]) -> Callable[..., list[Trial]]:
        return lambda *args: (calls.append(function.__name__), function(*args))[1]

    monkeypatch.setattr("foldsearch.report.view.front", counted(front))
    monkeypatch.setattr("foldsearch.report.view.best_of_plans", counted(best_of_plans))
    text_of(terminal.front_report(view, width=80, every=True))
    page.write_page(view, tmp_path / "index.html")
    picture.draw_front(view, tmp_path / "front.png")
    view.pick()
    assert sorted(calls) == ["best_of_plans", "front"]


def test_a_run_without_finished_trials_says_so(view: RunView) -> None:
    empty = replace(view, trials=())
    with pytest.raises(RunError, match="foldsearch resume"):
        empty.pick()
    assert "No trial has reached the last rung yet" in text_of(terminal.front_report(empty, width=120))
    assert "No trial has reached the last rung yet" in page._page(empty)
    assert empty.knee is None
    assert empty.front == ()


# ---- the tables


@pytest.mark.parametrize("width", [80, 120, 220])
def test_the_front_shows_every_cost_term_whatever_the_width(view: RunView, width: int) -> None:
    shown = text_of(terminal.front_report(view, width=width), width=max(width, 120))
    for head in ("search KL", "report KL", "perplexity", "weights", "adapters", "KV", "activ.", "total GB"):
        assert head in shown
    assert "fake <weights>" in shown  # what must be said beside a figure of the model
    assert "budget 0.007 GB" in shown
    knee = view.knee
    assert knee is not None
    row = next(line for line in shown.splitlines() if line.startswith("◆"))
    assert f"{knee.final.kl:.3f} ± {knee.final.kl_se:.3f}" in row
    assert strip(knee.plan) in row
    assert f"{knee.cost.memory_bytes / 1e9:.6f}" in shown  # as many digits as tell such small plans apart


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 220])
@pytest.mark.parametrize("num_blocks", [12, 30, 48, 80])
def test_no_number_mark_strip_or_figure_is_cut_whatever_the_width(
    view: RunView, width: int, num_blocks: int
) -> None:
    view = _deeper(view, num_blocks)
    lines = text_of(terminal.front_report(view, width=width), width).splitlines()
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for entry in view.front_and_baselines:
        mark = "◆" if entry == view.knee else "●" if entry in view.front else ""
        mark += "○" if view.baseline(entry) else ""
        at = [i for i, line in enumerate(lines) if line[:9].split() == [mark, str(entry.number)]]
        assert len(at) == len([line for line in lines if line[:9].split() == ["dense"]])
        drawn = ""  # the strip stands under the ruler, on one line or on several
        for line in lines[at[0] : at[0] + 9]:
            cell = line[11:].split(" ")[0]
            if len(drawn) == num_blocks or not set(cell) <= set("█▒▓▀▄░━·"):
                break
            drawn += cell
        assert drawn == strip(entry.plan)
        q, final = entry.quality, entry.final
        shown = (q.kl, q.kl_se, final.kl, final.kl_se)
        assert {f"{value:.3f}" for value in shown} | {f"{final.perplexity_se:.2f}"} <= set(words)
        stored = price(entry.plan, view.folder.table, view.folder.target).stored_bytes
        assert (f"{stored / 1e6:,.0f}" if stored >= 1e8 else f"{stored / 1e6:,.1f}") in words


def test_the_front_and_a_pick_say_which_runtimes_hold_a_plan_and_at_what_size(view: RunView) -> None:
    """Oracle: the price for each runtime, and what its entry in the list says that it cannot do."""
    lines = text_of(terminal.front_report(view, width=220), 220).splitlines()
    first = next(number for number, line in enumerate(lines) if "stock MB" in line)
    assert {"folded MB", "stock MB", "gguf MB", "onnx MB"} <= set(re.split(r" {2,}", lines[first].strip()))
    table = lines[first : lines.index("", first)]
    seen = set()
    for entry in view.front_and_baselines:
        (row,) = (line for line in table if line[:9].split()[-1:] == [str(entry.number)])
        cells = row.split()[-len(RUNTIMES) :]
        words = terminal.runtimes_words(view, entry.plan)
        for runtime in RUNTIMES:  # each that is told not to hold the plan lacks what is told beside it
            if (refusal := runtime.refusal(entry.plan)) is not None:
                assert re.search(
                    rf"not to [\w ]*\b{runtime.name}\b[\w ]*, which cannot hold {re.escape(refusal[0])}",
                    words,
                )
        for cell, runtime in zip(cells, RUNTIMES, strict=True):
            held = runtime.refusal(entry.plan) is None
            seen.add(held)
            target = replace(view.folder.target, runtime=runtime.name, shares_weights=runtime.shares_weights)
            if runtime.name in ("onnx", "executorch"):  # they have no bfloat16
                target = replace(target, dtype="float32")
            if runtime.name == "gguf":  # norms stay in 32 bits
                target = replace(target, weights="bf16")
            stored = price(entry.plan, view.folder.table, target).stored_bytes / 1e6
            assert cell == (f"{stored:,.1f}" if held else "—")
            assert (f"{runtime.name} {stored:,.1f} MB" in words) == held
        usual = runtime_for(entry.plan, "folded").name
        assert re.search(rf"{usual} [\d.]+ MB \(the default\)", words)
        assert ("cannot hold" in words) == ("—" in cells)
    assert seen == {True, False}


def test_a_folded_ruler_stands_above_its_blocks(view: RunView) -> None:
    lines = text_of(terminal.front_report(_deeper(view, 80), width=60), 60).splitlines()
    last = next(i for i, line in enumerate(lines) if line.startswith("    trial"))
    for line, first in zip(lines[last - 2 : last + 1], (0, 30, 60), strict=True):
        for block in range(first, min(first + 30, 80), 5):
            assert line[11 + block - first :].startswith(str(block))


def _deeper(view: RunView, num_blocks: int) -> RunView:
    """The same run of a model with more blocks at its end."""
    folder = view.folder
    table = replace(folder.table, blocks=(folder.table.blocks[0],) * num_blocks)

    def deepen(record: Trial) -> Trial:
        if record.draft is None:
            return record
        plan = FoldPlan.parse(f"{record.plan} {more}".strip(), num_blocks)
        return replace(record, draft=replace(record.draft, plan=plan))

    more = f"12-{num_blocks - 1}" if num_blocks > 12 else ""
    return replace(view, folder=replace(folder, table=table), trials=tuple(map(deepen, view.trials)))


def test_many_criteria_stack_where_they_do_not_fit(view: RunView) -> None:
    lines = text_of(terminal.front_report(view, width=60), 60).splitlines()
    heads = [line.split() for line in lines if line.startswith("dropped")]
    assert len(heads) > 1
    assert (
        " ".join(word for head in heads for word in head[1:])
        == "gate block influence window greedy neighbour"
    )


def test_all_says_which_trials_came_to_the_same_plan(view: RunView) -> None:
    (entry,) = (entry for entry in view.finished if entry.number == 0)
    repeats = view.repeats(entry)
    assert 3 in repeats
    assert all(trial.plan == entry.plan for trial in view.trials if trial.number in repeats)
    also = "also trials" if len(repeats) > 1 else "also trial"
    words = f"({also} {', '.join(map(str, repeats))})"
    assert words in text_of(terminal.front_report(view, width=300, every=True), 300)
    assert "also trial" not in text_of(terminal.front_report(view, width=300), 300)
    assert "same plan as trial 0" in page._page(view)


def test_a_split_of_one_document_has_no_standard_error(view: RunView) -> None:
    def endless(result: RungResult) -> RungResult:
        return replace(
            result,
            quality=replace(result.quality, kl_se=math.inf, perplexity_se=math.inf),
            report=result.report and replace(result.report, kl_se=math.inf, perplexity_se=math.inf),
        )

    assert NO_ERROR not in text_of(terminal.front_report(view, width=200))
    assert NO_ERROR not in page._page(view)
    one = _changed(view, endless)
    for shown in (
        text_of(terminal.front_report(one, width=200)),
        text_of(terminal.results_table(one.trials[0])),
        page._page(one),
    ):
        assert NO_ERROR in shown
        assert " ± —" in shown.replace(NO_ERROR, "")
        assert "± inf" not in shown


def test_tokens_of_healing_and_of_training_are_both_told(view: RunView) -> None:
    trial = view.finished[0]
    assert trial.last.recovery_tokens
    most = f"{view.folder.study.rungs[-1]:,}"
    models = f"Models: healed on 16,384 tokens, forward only; trained on {most} tokens at most."
    assert models in " ".join(text_of(terminal.front_report(view, width=300), 300).split())
    assert models in page._page(view)
    healed = replace(trial, healing=Healing(8192, 20, 18, 0.5, 0.375, 41.0))
    shown = " ".join(text_of(terminal.results_table(healed), 200).split())
    assert (
        "healed in closed form on 8,192 tokens, forward only: 18 of 20 positions changed, held-out error 0.500 → 0.375"
        in shown
    )
    trained = f"trained on {trial.last.kept_tokens:,} tokens"
    assert healed.tokens_words == f"healed on 8,192 tokens (forward only), {trained}"
    assert trial.tokens_words == trained
    shorter = replace(view, trials=(healed,))  # what the study asks for is more than its text holds
    assert shorter.tokens_words.startswith("healed on 8,192 tokens, forward only; ")
    assert "healed" not in text_of(terminal.results_table(trial), 200)


KINDS = (KindQuality("prose", 0.5, 0.01, 60), KindQuality("code <x>", 1.25, 0.02, 40))
UNSEEN = KindQuality("reference", 2.75, math.inf, 30, unseen=True)


def with_kinds(view: RunView) -> RunView:
    return _changed(
        view,
        lambda result: replace(
            result,
            quality=replace(result.quality, kinds=KINDS),
            report=result.report and replace(result.report, kinds=(*KINDS, UNSEEN)),
        ),
    )


def _changed(view: RunView, change: Callable[[RungResult], RungResult]) -> RunView:
    """The run with every result of every trial changed."""
    return replace(view, trials=tuple(with_results(trial, change) for trial in view.trials))


@pytest.mark.parametrize("width", [60, 120, 300])
def test_the_front_has_a_column_for_each_kind_of_text_whatever_the_width(view: RunView, width: int) -> None:
    shown = text_of(terminal.front_report(with_kinds(view), width=width), width)
    for words in ("prose", "code <x>", "unseen: reference", "0.500 ± 0.010", "1.250 ± 0.020", "2.750 ± —"):
        assert words in shown
    assert NO_ERROR in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= width
    assert "By kind of text" not in text_of(terminal.front_report(view, width=width), width)


def test_kinds_are_told_wherever_a_trial_is(view: RunView) -> None:
    several = with_kinds(view)
    trial = several.front[0]
    assert from_json(Trial, json.loads(json.dumps(to_json(trial)))) == trial
    shown = text_of(terminal.results_table(trial))
    assert [line.split() for line in shown.splitlines() if line.startswith(("by kind", "report KL"))] == [
        "by kind of text prose code <x> unseen: reference".split(),
        "report KL 0.5000 ± 0.0100 1.2500 ± 0.0200 2.7500 ± —".split(),
    ]
    assert "<th>unseen: reference" in page._page(several)
    assert "<th>code &lt;x&gt;" in page._page(several)
    assert "| KL to dense, report texts, unseen: reference | 2.7500 nats per token |" in note(trial)
    assert "| KL to dense, search texts, prose | 0.5000 ± 0.0100 nats per token |" in note(trial)
    alone = replace(trial.last, quality=replace(trial.quality, kinds=KINDS[:1]), report=None)
    assert terminal.kinds_table(replace(trial, results=(alone,))) is None


def test_all_shows_every_finished_trial_and_the_default_only_front_and_baselines(view: RunView) -> None:
    def numbers(every: bool) -> set[str]:
        lines = text_of(terminal.front_report(view, width=300, every=every), 300).splitlines()
        words = (line.replace("●", "").replace("◆", "").replace("○", "").split() for line in lines)
        return {row[0] for row in words if row and row[0].isdigit()}

    assert numbers(True) >= {str(entry.number) for entry in view.finished}
    assert numbers(False) == {str(entry.number) for entry in view.front_and_baselines} | {"4"}  # "4 dropped"


def test_a_bar_is_as_long_as_its_share() -> None:
    assert terminal.bar(0.5, 8) == "████"
    assert terminal.bar(0.0, 8) == ""
    assert terminal.bar(1.0, 8) == "█" * 8
    assert terminal.bar(3.0, 8) == "███████▶"


# ---- the page


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.links += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_needs_nothing_from_elsewhere_and_shows_every_trial(view: RunView, tmp_path: Path) -> None:
    page.write_page(view, tmp_path / "new" / "index.html", picture.front_png(view))
    written = (tmp_path / "new" / "index.html").read_text()
    reader = _Reader()
    reader.feed(written)
    assert len(reader.links) == 1
    assert reader.links[0].startswith("data:image/png;base64,")
    assert "fake &lt;weights&gt;" in written
    assert "fake <weights>" not in written
    assert "crashed: out of paper" in written
    shown = len(view.front_and_baselines)
    assert reader.rows == (1 + 1 + shown) + (1 + len(view.by_count())) + (1 + len(view.trials))


def test_the_svg_of_a_plan_is_well_formed() -> None:
    svg = page._svg(FoldPlan.parse("0-1 2=1 3a 5~linear 9", 10))
    drawn = xml.etree.ElementTree.fromstring(svg.replace("'", '"'))
    assert sum(child.tag == "circle" for child in drawn) == 4  # blocks 4, 6, 7, 8
    assert sum(child.tag == "rect" for child in drawn) == 2 * 5 + 1  # five whole blocks, one attention


# ---- the picture


def test_pictures_are_png_files_of_a_size_to_look_at(view: RunView, tmp_path: Path) -> None:
    from PIL import Image

    picture.draw_front(view, tmp_path / "front.png")
    with Image.open(tmp_path / "front.png") as drawn:
        assert drawn.width >= 1600
        assert drawn.height >= 600
        assert len(drawn.convert("RGB").resize((200, 80)).getcolors(20_000)) > 50
    assert list(tmp_path.glob(".front*")) == []


@pytest.mark.parametrize(
    ("values", "most", "shown"),
    [
        ([0.0, 0.4, 0.5, 8.0], 1, (0.0, 0.5)),
        ([0.0, 0.4, 0.5, 1.9], 1, (0.0, 1.9)),  # the others have a quarter of the axis
        ([0.0, 0.5, 8.0, 9.0], 1, (0.0, 9.0)),  # two are not one
        ([0.0, 0.4, 0.5, 8.0, 9.0], 2, (0.0, 0.5)),
        ([0.144, 0.198, 0.211, 0.272, 0.324], 4, (0.144, 0.324)),  # a small front beside dense: all of it
        ([0.0, 0.5, 8.0, 9.0], 2, (0.0, 9.0)),  # half of them are not few
        ([0.001, 0.10, 0.11, 0.12, 0.27], 2, (0.10, 0.12)),  # both ends
        ([0.001, 0.10, 0.11, 0.12], 2, (0.10, 0.12)),
        ([0.5, 0.5, 0.5, 8.0], 1, (0.5, 8.0)),  # equal values measure nothing
        ([0.1200, 0.1201, 0.27], 1, (0.12, 0.27)),
        ([3.0], 1, (3.0, 3.0)),
        ([0.0, 0.4, 0.5, math.inf], 1, (0.0, 0.5)),
    ],
)
def test_the_range_of_an_axis_leaves_out_few_far_values(
    values: list[float], most: int, shown: tuple[float, float]
) -> None:
    assert picture.shown_range(values, most) == shown
    assert picture.shown_range(values[::-1], most) == shown


def test_the_range_of_an_axis_keeps_what_it_is_told_to_keep() -> None:
    assert picture.shown_range([0.0, 0.48, 0.5], 1) == (0.0, 0.5)  # hardly differ
    assert picture.shown_range([0.0, 0.4, 0.5], 1) == (0.4, 0.5)
    assert picture.shown_range([0.0, 0.4, 0.5], 1, always=0.0) == (0.0, 0.5)


@pytest.mark.parametrize("far", [8.0, 40.0, 1e6])
@pytest.mark.parametrize("number", [3, 7, 14])
def test_one_far_point_does_not_flatten_the_picture(view: RunView, far: float, number: int) -> None:
    """KL from 0.3 to 0.6, and one trial far above: the others keep a fifth of the height, and all are inside."""
    entries = view.finished[:number]
    kls = [0.3 + 0.3 * i / (len(entries) - 2) for i in range(len(entries) - 1)]
    axes = _drawn(_with_kls(view, dict(zip([e.number for e in entries], [far, *kls], strict=True))))
    heights = _heights(axes)
    assert len(heights) == len(entries)
    assert 0 <= min(heights) < max(heights) <= 1
    assert heights[-2] - heights[0] >= 0.2
    shown = axes.get_ylim()[1] >= far
    assert shown or f"↑ KL {far:.3g}" in [text.get_text() for text in axes.texts]


def test_without_a_far_point_the_axis_is_linear_and_nothing_is_said(view: RunView) -> None:
    numbers = [entry.number for entry in view.finished]
    axes = _drawn(_with_kls(view, {number: 0.3 + 0.1 * i for i, number in enumerate(numbers)}))
    assert axes.get_yscale() == "linear"
    assert not [text for text in axes.texts if "KL" in text.get_text()]


def test_a_long_tail_is_drawn_on_a_logarithmic_axis_with_the_dense_model_at_0(view: RunView) -> None:
    numbers = [entry.number for entry in view.finished]
    axes = _drawn(_with_kls(view, {number: 0.02 * 2.2**i for i, number in enumerate(numbers)}))
    heights = _heights(axes)
    assert axes.get_yscale() == "asinh"
    assert heights[len(heights) // 2] > 0.25
    assert axes.get_ylim()[0] <= 0 < axes.get_ylim()[1]


def test_a_dense_model_far_from_all_plans_does_not_flatten_them(view: RunView) -> None:
    """Its star stands at the edge, with its size."""
    table = replace(view.folder.table, fixed_weights=10**9)
    large = replace(view, folder=replace(view.folder, table=table))
    axes = _drawn(large)
    assert [text for text in axes.texts if "GB →" in text.get_text()]
    low, high = axes.get_xlim()
    memory = sorted(entry.cost.memory_bytes / 1e9 for entry in view.finished)
    assert low < memory[len(memory) // 2] < memory[-1] < high < 2 * memory[-1]


def test_a_picture_of_more_trials_has_no_more_parts(view: RunView) -> None:
    """So it takes no time for each trial; the legend and the numbered plans are bounded."""
    more = [
        replace(record, number=record.number + 100 * copy) for copy in range(1, 30) for record in view.trials
    ]
    long = replace(view, trials=(*view.trials, *(_moved(record, i) for i, record in enumerate(more))))
    few, many = _drawn(view), _drawn(long)
    assert len(many.collections) <= len(few.collections) + 4  # a marker that none had before
    assert len(long.front) > picture.MOST_STRIPS
    assert len(many.texts) <= picture.MOST_STRIPS + picture.MOST_WORDS + 2
    assert len(_heights(many)) == len(long.finished)
    strips = picture._front_figure(long).axes[1]
    drawn = len(picture._drawn(long))
    assert drawn in (
        picture.MOST_STRIPS - 1,
        picture.MOST_STRIPS,
    )  # the knee may be among those at equal steps
    assert f"{drawn} of {len(long.front)} plans" in strips.get_xlabel()
    assert long.knee in picture._drawn(long)


def _moved(record: Trial, index: int) -> Trial:
    """Another plan of less memory and more KL, so that the front is long."""
    plans = itertools.combinations(range(1, 12), 3)
    plan = FoldPlan.dropping(next(itertools.islice(plans, index % 165, None)), 12)
    plan = FoldPlan((*plan.slots, *(Slot(0, 0, 0) for _ in range(index // 165))), 12)

    if record.draft is None:
        return record
    cost = replace(record.cost, weight_bytes=record.cost.weight_bytes - 100 * index)
    moved = replace(record, draft=replace(record.draft, plan=plan, cost=cost))
    return with_results(
        moved, lambda result: replace(result, quality=replace(result.quality, kl=1 + 0.01 * index))
    )


def _with_kls(view: RunView, kls: dict[int, float]) -> RunView:
    """The run with these trials only, at these KLs."""

    def change(trial: Trial) -> Trial:
        kl = kls[trial.number]
        quality = replace(trial.quality, kl=kl, kl_se=kl / 50)
        return with_results(trial, lambda result: replace(result, quality=quality))

    return replace(view, trials=tuple(change(trial) for trial in view.trials if trial.number in kls))


def _drawn(view: RunView) -> Any:
    """The axes that the trials are drawn on."""
    return picture._front_figure(view).axes[0]


def _heights(axes: Any) -> list[float]:
    """Where the trials stand between the lower edge of the axes, 0, and the upper one, 1."""
    axes.figure.canvas.draw()
    trials = [c for c in axes.collections if c.get_zorder() in (3, 4)]
    points = [point for c in trials for point in c.get_offsets()]
    return sorted(float((axes.transScale + axes.transLimits).transform(point)[1]) for point in points)


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    view: RunView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "index.html"
    target.write_text("old")

    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        page.write_page(view, target)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "run") == ["index.html"]


# ---- as it happens


def test_a_log_file_gets_a_line_a_trial_with_its_gain_and_its_gates(view: RunView) -> None:
    out = io.StringIO()
    record, other = view.trials[0], view.trials[1]
    assert other.draft is not None
    told = replace(
        other, draft=replace(other.draft, gates={"asked": 4})
    )  # by a criterion that trains no gates
    with RunDisplay(Console(file=out, width=150)) as display:
        display(events.Preparing("reading the text", 0.0))
        display(events.Preparing("reading the text", 0.5))
        display(events.SearchStarted(view.folder, 0, 14))
        _play(display, record)
        display(events.TrialEnded(record, on_front=True))
        display(events.Progress(1, 14, 60.0, 780.0))
        _play(display, view.trials[7])
        display(events.TrialEnded(view.trials[7]))
        display(events.TrialEnded(view.trials[5]))
        display(events.TrialEnded(told))
        display(events.SearchInterrupted(view.folder, 1, "foldsearch resume runs/x"))
    shown = out.getvalue()
    assert shown.count("gates: ") == 1
    assert shown.count("reading the text") == 1
    line = next(line for line in shown.splitlines() if line.startswith("    0  gate 0."))
    assert " → ".join(f"{result.quality.kl:.3f}" for result in record.results) in line
    assert strip(record.plan) in line
    assert line.endswith("● on the front")
    assert "gates: 20 steps, 1,000 tokens, 90% polarized" in shown
    assert "1 of 14 trials · 1:00 · about 13:00 left" in shown
    assert "stopped at rung 1: rank 2 of 4" in shown
    assert "crashed: out of paper" in shown
    assert "foldsearch resume runs/x" in shown


def test_a_terminal_shows_where_the_running_trials_are(view: RunView) -> None:
    out = io.StringIO()
    screen = Console(file=out, width=120, force_terminal=True)
    with RunDisplay(screen) as display:
        display(events.SearchStarted(view.folder, 0, 14))
        display(events.TrialStarted(Trial(3, proposal=removing("window", 4))))
        display(events.TrialProgress(3, "recovery", 0.25))
        bottom = text_of(display._bottom())
    assert "window" in bottom
    assert "recovery" in bottom
    assert "0 of 14 trials" in bottom


def test_one_is_singular() -> None:
    assert [counted(number, "trial") for number in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]


@pytest.mark.parametrize(("number", "words"), [(1, "1 trial was under way"), (2, "2 trials were under way")])
def test_an_interruption_counts_the_running_trials(view: RunView, number: int, words: str) -> None:
    out = io.StringIO()
    with RunDisplay(Console(file=out, width=150)) as display:
        display(events.SearchInterrupted(view.folder, number, "foldsearch resume runs/x"))
    assert words in out.getvalue()


# ---- training that hurt


@pytest.mark.parametrize(
    ("kept_tokens", "latest", "words"),
    [
        (0, 1.043, "training hurt (KL 1.043): kept untrained"),
        (2048, 1.043, "training hurt (KL 1.043): kept after 2,048 tokens"),
        (2048, None, "training diverged: kept after 2,048 tokens"),
    ],
)
def test_training_that_hurt_is_said_everywhere(
    view: RunView, kept_tokens: int, latest: float | None, words: str
) -> None:
    entry = view.front[0]
    setback = Setback(kept_tokens, None if latest is None else replace(entry.quality, kl=latest))
    last = replace(entry.last, setback=setback)
    assert last.kept_tokens == kept_tokens
    hurt = replace(entry, results=(*entry.results[:-1], last))
    assert from_json(Trial, json.loads(json.dumps(to_json(hurt)))) == hurt
    more = replace(view, trials=tuple(hurt if old is entry else old for old in view.trials))
    for width in (80, 200):
        assert f"trial {entry.number}: {words}" in text_of(terminal.front_report(more, width=width), width)
    assert words not in text_of(terminal.front_report(view, width=200))
    assert page._page(more).count(words) == 2  # of the front, and of every trial
    assert words in text_of(terminal.results_table(hurt))
    assert words in note(hurt)
    out = io.StringIO()
    with RunDisplay(Console(file=out, width=200)) as display:
        display(events.SearchStarted(view.folder, 0, 14))
        _play(display, hurt)
        display(events.TrialEnded(hurt, on_front=True))
    assert words in out.getvalue().splitlines()[-2 if hurt.draft and hurt.draft.gates else -1]


def test_of_two_trials_of_one_plan_the_better_is_shown(view: RunView) -> None:
    """The second one was run because the training of the first had diverged."""
    entry = view.front[0]
    for kl in (entry.quality.kl / 2, entry.quality.kl * 2):
        result = replace(entry.last, quality=replace(entry.quality, kl=kl))
        twin = replace(entry, number=99, results=(result,))
        more = replace(view, trials=(*view.trials, twin))
        better = 99 if kl < entry.quality.kl else entry.number
        (shown,) = (other for other in more.finished if other.plan == entry.plan)
        assert shown.number == better
        assert better in {other.number for other in more.front}
        assert len(more.front) == len({other.plan for other in more.front})


def _play(display: RunDisplay, trial: Trial) -> None:
    display(events.TrialStarted(replace(trial, results=())))
    for count in range(1, len(trial.results) + 1):
        display(events.RungDone(replace(trial, results=trial.results[:count])))


# ---- what was screened


def test_ranks_by_hand() -> None:
    """1 - 6 Σd² / (n (n² - 1)) without ties; the mean of their ranks with them."""
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert rank_correlation([1, 1, 2], [5, 6, 7]) == pytest.approx(math.sqrt(3) / 2)  # ranks 1.5 1.5 3
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0


def test_screened_plans_stand_beside_the_criteria(view: RunView) -> None:
    quality = view.finished[0].quality

    def screened(dropped: list[int], author: str, kl: float) -> Screened:
        return Screened(
            FoldPlan.dropping(dropped, NUM_BLOCKS), (author,), replace(quality, kl=kl, kl_se=kl / 10)
        )

    found = [
        screened([3], "alone", 0.05),  # no criterion was asked at this count
        screened([3, 4], "chain", 0.2),
        screened([4, 5], "move", 0.1),
        screened([1, 9], "uniform", 0.3),
        screened([2, 3], "window", 0.15),
        screened([1, 2, 3], "window", 0.4),
    ]
    write_screened(view.folder.screened, found)
    try:
        shown = text_of(terminal.front_report(RunView.open(view.folder.path), width=120))
    finally:
        view.folder.screened.unlink()
    assert "KL of 6 plans that were healed and measured before any was trained" in shown
    rows = [line.split() for line in shown[shown.index("KL of 6 plans") :].splitlines()[2:4]]
    assert rows == [
        ["2", "0.100", "±", "0.010", "0.150", "±", "0.015", "window"],
        ["3", "—", "0.400", "±", "0.040", "window"],
    ]
    assert "where the least of many plans, as of the search, looks better than it is" in " ".join(
        shown.split()
    )
    assert "Rank correlation of KL between measurements" in shown
