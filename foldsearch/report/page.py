"""A page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from foldsearch.files import replace_atomically
from foldsearch.plan.cost import Cost
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality, rounded
from foldsearch.record import Trial
from foldsearch.report.colours import DROPPED, FAINT, INK, REPLACED, paint
from foldsearch.report.health import health
from foldsearch.report.terminal import budget_words, kinds_words, latency_note
from foldsearch.report.view import (
    FURTHER,
    NO_ERROR,
    RunView,
    author,
    flops_unit,
    gb,
    has_errors,
    milliseconds,
    report_kl,
    searched_types,
    with_error,
)

_STRIPS = (
    "A strip is a plan, block by block: the upper half is attention, the lower half the MLP. A colour is a shared "
    "weight, its children in the light tone; a dot is a dropped block; pink is replaced."
)


def write_page(view: RunView, path: Path, picture: bytes = b"") -> None:
    """The run as one HTML file: the picture, the front, the criteria, every trial with its plan.

    Args:
        view: the run.
        path: of the file.
        picture: a PNG, see `foldsearch.report.picture.front_png`.
    """
    page = _page(view, picture)
    replace_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


# ---- the page

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; max-width: 1180px;
  margin: 2.5rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.35rem; margin: 0; }} h2 {{ font-size: 1.05rem; margin: 2.2rem 0 .5rem; }}
p {{ color: #5b6372; margin: .3rem 0; max-width: 60rem; }}
img {{ width: 100%; height: auto; margin-top: 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th {{ text-align: right; font-weight: 600; padding: .25rem .6rem; border-bottom: 1px solid #d5dae2; }}
td {{ text-align: right; padding: .22rem .6rem; white-space: nowrap; border-bottom: 1px solid #eef1f5; }}
th.l, td.l {{ text-align: left; }}
tr.front td {{ background: #f5f8fd; }} tr.dense td {{ color: {FAINT}; }}
.better {{ color: #1a7f37; }} .worse {{ color: #b3261e; }} .knee {{ color: {REPLACED}; font-weight: 600; }}
.baseline {{ color: #9a6700; }} .best {{ font-weight: 600; }}
.why {{ white-space: pre-wrap; max-width: 40rem; }}
code {{ font: 12px ui-monospace, monospace; color: #5b6372; white-space: normal; }}
svg {{ display: block; }}
"""


def _page(view: RunView, picture: bytes = b"") -> str:
    esc = html.escape
    target = view.folder.target
    types = str(searched_types(view.folder))
    weights = f"{target.runtime} weights" + (f" in {types}" if types else "")
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{esc(view.name)} · foldsearch</title><style>{_STYLE}</style>",
        f"<h1>{esc(view.model)} folded</h1>",
        f"<p>{esc(view.note) + '. ' if view.note else ''}Text: {esc(view.data)}. Priced for {target.dtype}, a context "
        f"of {target.context:,} tokens, batch {target.batch}, {weights}; "
        f"{esc(budget_words(view.folder))}.</p>",
    ]
    if not view.finished:
        parts.append("<p>No trial has reached the last rung yet.</p>")
        return "\n".join(parts)
    if picture:
        encoded = base64.b64encode(picture).decode()
        parts.append(f"<img alt='KL against memory' src='data:image/png;base64,{encoded}'>")
    parts += [
        "<h2>Front and baselines</h2>",
        "<p>KL to dense in nats per token, ± one standard error by document: on the search texts, and on the report "
        "texts, which no choice was made on. Perplexity and ΔKL are of the report texts. ΔKL: against the best "
        "baseline of about the same cost or less. GB are decimal; FLOPs per token. "
        f"{esc(latency_note(view))}Models: {esc(view.tokens_words)}.</p>",
        _trial_table(view),
        f"<p>{_STRIPS}</p>",
    ]
    first = view.finished[0]
    if kinds := kinds_words(view.folder.study, first.final):
        parts.append(f"<p>{kinds}</p>")
    if any(view.further_words(trial) for trial in view.front_and_baselines):
        parts.append(f"<p>{FURTHER}</p>")
    if not has_errors(first.quality, first.final):
        parts.append(f"<p>{NO_ERROR}</p>")
    if counts := view.by_count():
        parts += [
            "<h2>Which criterion was best</h2>",
            "<p>KL on the report texts, plans that only drop blocks.</p>",
        ]
        parts.append(_criteria(counts))
    parts += ["<h2>How far to believe it</h2>", "<ul>"]
    parts += [*(f"<li>{esc(words)}</li>" for words in health(view)), "</ul>"]
    parts += ["<h2>Every trial</h2>", _every_trial(view)]
    return "\n".join(parts)


def _svg(plan: FoldPlan) -> str:
    width, height = 7, 16
    shapes = []
    for column, (cell, attention, mlp) in enumerate(paint(plan)):
        title = f"<title>block {cell.block}</title>"
        if attention is None and mlp is None:
            shapes.append(f"<circle cx='{column * width + 3}' cy='8' r='1' fill='{DROPPED}'>{title}</circle>")
        for y, colour in ((0, attention), (height // 2, mlp)):
            if colour is not None:
                shapes.append(
                    f"<rect x='{column * width}' y='{y}' width='{width - 1}' height='{height // 2}' fill='{colour}'>"
                    f"{title}</rect>"
                )
    total = len(paint(plan)) * width
    return (
        f"<svg role='img' aria-label='{html.escape(str(plan))}' width='{total}' height='{height}'>"
        f"{''.join(shapes)}</svg>"
    )


def _trial_table(view: RunView) -> str:
    front = {trial.number for trial in view.front}
    kinds = list(
        dict.fromkeys(kind.title for trial in view.front_and_baselines for kind in trial.final.shown_kinds)
    )
    rows = [
        "<tr><th>trial<th class=l>plan<th>search KL<th>report KL"
        + "".join(f"<th>{html.escape(kind)}" for kind in kinds)
        + "<th>perplexity<th>ΔKL<th class=l>chosen by"
        "<th>weights<th>adapters<th>KV<th>activations<th>GB<th>prefill<th>decode"
        + ("<th>prompt, ms<th>token, ms" if _time_cells(view, view.folder.dense) else "")
    ]
    dense, perplexity = view.folder.dense, view.dense_perplexity
    rows.append(
        f"<tr class=dense><td>dense<td class=l>{_svg(FoldPlan.identity(view.folder.num_blocks))}<td>0<td>0"
        + "<td>0" * len(kinds)
        + f"<td>{'' if perplexity is None else f'{perplexity:.2f}'}<td><td class=l>{_cost_cells(dense, dense)}"
        + _time_cells(view, view.folder.timed_dense)
    )
    whole = _svg(FoldPlan.identity(view.folder.num_blocks))
    for rival in view.rivals:
        rows.append(
            f"<tr class=dense><td>dense {rival.types.label}<td class=l>{whole}"
            f"{_figure_cells(rival.search, rival.report, kinds)}<td><td class=l>{_cost_cells(rival.cost, dense)}"
            f"{_time_cells(view, rival.cost)}"
        )
    for trial in view.front_and_baselines:
        gain = view.gain(trial)
        shade = "" if gain is None else " class=better" if gain < 0 else " class=worse"
        by = html.escape(", ".join(view.authors(trial)))
        if view.baseline(trial):
            by += " <span class=baseline>baseline</span>"
        if trial == view.knee:
            by += " <span class=knee>◆ knee</span>"
        if setback := trial.setback_words:
            by += f" <span class=worse>{html.escape(setback)}</span>"
        if further := view.further_words(trial):
            by += f" <span class=better>{html.escape(further)}</span>"
        change = "—" if gain is None else rounded(gain, "+.3f")
        rows.append(
            f"<tr{' class=front' if trial.number in front else ''}><td>{trial.number}<td class=l>{_svg(trial.plan)}"
            f"{_figure_cells(trial.quality, trial.final, kinds)}<td{shade}>{change}"
            f"<td class=l>{by}{_cost_cells(trial.cost, dense)}{_time_cells(view, trial.cost)}"
        )
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _figure_cells(search: Quality, report: Quality, kinds: Sequence[str]) -> str:
    """Quality on the search and on the report texts, on each kind of the latter, and perplexity."""
    by_title = {kind.title: with_error(kind.kl, kind.kl_se, ".3f") for kind in report.shown_kinds}
    by_kind = "".join(f"<td>{by_title.get(kind, '')}" for kind in kinds)
    perplexity = with_error(report.perplexity, report.perplexity_se, ".2f")
    return f"<td>{_kl(search)}<td>{_kl(report)}{by_kind}<td>{perplexity}"


def _kl(quality: Quality) -> str:
    return with_error(quality.kl, quality.kl_se, ".3f")


def _cost_cells(cost: Cost, dense: Cost) -> str:
    unit, size = flops_unit(dense)
    sizes = (cost.weight_bytes, cost.adapter_bytes, cost.kv_bytes, cost.activation_bytes)
    cells = [gb(n, dense) for n in sizes]
    cells.append(f"<b>{gb(cost.memory_bytes, dense)}</b>")
    cells += [f"{2 * cost.prefill_macs / size:.1f} {unit}", f"{cost.flops / size:.1f} {unit}"]
    return "<td>" + "<td>".join(cells)


def _time_cells(view: RunView, cost: Cost) -> str:
    """Milliseconds; no cells where the run has none, and empty ones where this cost has none."""
    if view.folder.table.latency_on(view.folder.target) is None:
        return ""
    return "".join(f"<td>{'' if ms is None else milliseconds(ms)}" for ms in (cost.prompt_ms, cost.decode_ms))


def _criteria(counts: dict[int, dict[str, Trial]]) -> str:
    names = list(dict.fromkeys(name for row in counts.values() for name in row))
    rows = ["<tr><th>dropped<th>" + "<th>".join(html.escape(name.replace("_", " ")) for name in names)]
    for count, row in counts.items():
        best = min(map(report_kl, row.values()))
        cells = []
        for name in names:
            if name not in row:
                cells.append("<td>—")
                continue
            final = row[name].final
            cells.append(f"<td{' class=best' if final.kl == best else ''}>{_kl(final)}")
        rows.append(f"<tr><td>{count}{''.join(cells)}")
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _every_trial(view: RunView) -> str:
    rows = [
        "<tr><th>trial<th class=l>chosen by<th class=l>state<th>rung<th>tokens<th>KL<th>GB<th>seconds<th class=l>plan"
    ]
    dense = view.folder.dense
    for trial in view.trials:
        by = "" if trial.proposal is None else html.escape(author(trial.proposal))
        state = trial.state + (f": {html.escape(trial.reason)}" if trial.reason else "")
        if trial.state == "finished" and trial.known_from is not None:
            state += f": same plan as trial {trial.known_from}"
        if setback := trial.setback_words:
            state += f"; {html.escape(setback)}"
        row = f"<tr><td>{trial.number}<td class=l>{by}<td class='l why'>{state}"
        if trial.draft is not None:
            measured = "<td><td><td>—"
            if trial.results:
                rung, kl = len(trial.results) - 1, rounded(trial.quality.kl, ".3f")
                measured = f"<td>{rung}<td>{trial.last.recovery_tokens:,}<td>{kl}"
            seconds = f"{trial.last.seconds:.0f}" if trial.results else ""
            row += f"{measured}<td>{gb(trial.cost.memory_bytes, dense)}<td>{seconds}"
            row += f"<td class=l><code>{html.escape(str(trial.plan))}</code>"
        rows.append(row)
    return f"<div class=wide><table>{''.join(rows)}</table></div>"
