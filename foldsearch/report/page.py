"""Pictures and a page of a run: one HTML file that needs nothing else, and PNG files for documents."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.files import replace_atomically
from foldsearch.paths import printable
from foldsearch.plan.cost import GB, Cost
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.report.colours import DROPPED, PAIRS, REPLACED, paint
from foldsearch.report.terminal import budget_words
from foldsearch.report.view import NO_ERROR, Entry, RunView, author, flops_unit, gb, has_errors, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from foldsearch.model.evidence import Evidence

INK = "#1f2430"
FAINT = "#8b93a1"
BASELINES = {  # name and marker of each
    "block_influence": ("Block Influence", "s"),
    "window": ("cosine window", "D"),
    "linear_window": ("linear window", "d"),
    "greedy": ("greedy", "^"),
    "evolution": ("evolution", "v"),
    "uniform": ("uniform", "P"),
    "random": ("random", "X"),
}
DPI = 160


def draw_front(view: RunView, path: Path) -> None:
    """The front as a PNG: KL against memory, coloured by FLOPs, its plans as strips beside it."""
    _save(_front_figure(view), path)


def draw_evidence(evidence: Evidence, path: Path, *, title: str) -> None:
    """FoldGPT's Fig. 2 for a model, as a PNG: both cosines by block, and the windows' cosines as a map."""
    _save(_evidence_figure(evidence, title), path)


def write_page(view: RunView, path: Path) -> None:
    """The run as one HTML file: the picture, the front, the criteria, every trial with its plan."""
    page = _page(view)
    replace_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


# ---- pictures


def _figure(width: float, height: float) -> Figure:
    # Figure alone, without pyplot: no window system, no global state, safe in any thread.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color="#e8ebf0", linewidth=0.8)
    axes.set_axisbelow(True)


def _front_figure(view: RunView) -> Figure:
    front = view.front
    height = max(4.6, 1.7 + 0.27 * len(front))
    figure = _figure(11.5, height)
    grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
    axes, strips = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    _plain(axes)
    _draw_points(view, figure, axes)
    _draw_strips(view, strips, front)
    note = f" ({view.note})" if view.note else ""
    figure.suptitle(
        f"{view.model}{note} on {view.data}: KL to dense on the search texts, against memory",
        fontsize=11, color=INK, x=0.01, ha="left", parse_math=False,
    )  # fmt: skip
    return figure


def _draw_points(view: RunView, figure: Figure, axes: Axes) -> None:
    front = {entry.number for entry in view.front}
    finished = view.finished
    dense, budget = view.folder.dense, view.folder.budget
    flops = [entry.cost.flops for entry in finished]
    unit, size = flops_unit(dense)
    scale: dict[str, Any] = {
        "cmap": "viridis",
        "vmin": min([*flops, dense.flops]) / size,
        "vmax": dense.flops / size,
    }
    points: Any = None
    for entry in finished:
        quality, cost = entry.quality, entry.cost
        x, y = cost.memory_bytes / GB, quality.kl
        on_front = entry.number in front
        marker = BASELINES[entry.baseline][1] if entry.baseline else "o"
        if has_errors(quality):
            axes.errorbar(x, y, yerr=quality.kl_se, fmt="none", ecolor="#b6bcc8", elinewidth=1, zorder=2)
        points = axes.scatter(
            x, y, c=[cost.flops / size], marker=marker, s=72 if on_front else 38,
            alpha=1.0 if on_front else 0.75, linewidths=1.1 if on_front else 0.4,
            edgecolors=INK if on_front else "white", zorder=4 if on_front else 3, **scale,
        )  # fmt: skip
        if on_front:
            axes.annotate(
                str(entry.number), (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color=INK
            )
    if (knee := view.knee) is not None:
        axes.scatter(
            knee.cost.memory_bytes / GB, knee.quality.kl, s=230, facecolors="none", edgecolors=REPLACED,
            linewidths=1.8, zorder=5, label="knee",
        )  # fmt: skip
    axes.scatter(
        dense.memory_bytes / GB, 0, marker="*", s=170, c=[dense.flops / size],
        edgecolors=INK, linewidths=0.9, zorder=5, label="dense", **scale,
    )  # fmt: skip
    for criterion in dict.fromkeys(entry.baseline for entry in finished if entry.baseline):
        axes.scatter(
            [], [], marker=BASELINES[criterion][1], c="white", edgecolors=INK, s=42,
            label=f"{BASELINES[criterion][0]} (baseline)",
        )  # fmt: skip
    axes.scatter([], [], marker="o", c="white", edgecolors=INK, s=42, label="found by the search")
    if budget.memory_bytes is not None:
        axes.axvline(budget.memory_bytes / GB, color=FAINT, linestyle="--", linewidth=1.1, zorder=1)
        axes.text(
            budget.memory_bytes / GB, 0.99, " budget ", transform=axes.get_xaxis_transform(), fontsize=8,
            color=FAINT, ha="left", va="top",
        )  # fmt: skip
    if points is not None:
        bar = figure.colorbar(points, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
        bar.set_label(f"{unit}FLOPs per token at decode", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=8, colors=INK)
        bar.outline.set_visible(False)
    axes.set_xlabel("GB: weights + adapters + KV cache + activations", fontsize=9, color=INK)
    axes.set_ylabel("KL to dense, nats per token (± one standard error)", fontsize=9, color=INK)
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
    axes.margins(x=0.06)
    # Quality falls with memory: where there is much of both, there is no point to hide.
    axes.legend(
        fontsize=8, frameon=True, facecolor="white", edgecolor="none", framealpha=0.85, loc="center right"
    )


def _draw_strips(view: RunView, axes: Axes, shown: Sequence[Entry]) -> None:
    from matplotlib.patches import Rectangle

    num_cells = max([view.folder.num_blocks, *(len(paint(entry.plan)) for entry in shown)])
    rows: list[tuple[str, str, FoldPlan]] = [("dense", "", FoldPlan.identity(view.folder.num_blocks))]
    knee = view.knee
    for entry in shown:
        mark = " ◆" if entry == knee else ""
        rows.append((f"{entry.number}{mark}", f"{entry.quality.kl:.3f}  {entry.authors[0]}", entry.plan))
    for row, (left, right, plan) in enumerate(rows):
        for column, (_, attention, mlp) in enumerate(paint(plan)):
            if attention is None and mlp is None:
                axes.plot(column + 0.5, row + 0.5, marker=".", markersize=2, color=DROPPED)
            for top, colour in ((row + 0.14, attention), (row + 0.5, mlp)):
                if colour is not None:
                    axes.add_patch(Rectangle((column + 0.06, top), 0.88, 0.36, color=colour, linewidth=0))
        axes.text(-0.6, row + 0.5, left, ha="right", va="center", fontsize=8, color=INK)
        axes.text(num_cells + 0.6, row + 0.5, right, ha="left", va="center", fontsize=8, color=INK)
    axes.set_xlim(-3, num_cells + 11)
    axes.set_ylim(len(rows) + 0.2, -0.6)
    axes.set_xticks([block + 0.5 for block in range(0, view.folder.num_blocks, 5)])
    axes.set_xticklabels([str(block) for block in range(0, view.folder.num_blocks, 5)], fontsize=8, color=INK)
    axes.set_yticks([])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, pad=1)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "plans of the front, by block; upper half attention, lower half MLP\ncolour: shared weights, "
        "children in the light tone; dot: dropped; pink: replaced",
        fontsize=8, color=INK, loc="left",
    )  # fmt: skip


def _evidence_figure(evidence: Evidence, title: str) -> Figure:
    figure = _figure(11.5, 4.3)
    grid = figure.add_gridspec(1, 2, width_ratios=[1.5, 1])
    axes, windows = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    blocks = range(len(evidence.block_cosine))
    _plain(axes)
    for values, style, colour, label in (
        (evidence.block_cosine, "o-", PAIRS[0][0], "block's input and output"),
        (evidence.start_cosine, "s-", PAIRS[1][0], "model's start and block's output"),
    ):
        axes.plot(blocks, values, style, color=colour, markersize=4, label=label)
    axes.set_xlabel("block", fontsize=9, color=INK)
    axes.set_ylabel("mean cosine over tokens", fontsize=9, color=INK)
    axes.legend(fontsize=8, frameon=False)
    num_blocks = len(evidence.window_cosine)
    drawn = [[float("nan")] * num_blocks for _ in range(num_blocks)]
    for first, row in enumerate(evidence.window_cosine):
        for length, value in enumerate(row[: num_blocks - first]):
            drawn[first][first + length] = value
    image = windows.imshow(
        drawn, cmap="viridis", origin="lower", vmin=min(map(min, evidence.window_cosine)), vmax=1
    )
    windows.set_xlabel("last block of the window", fontsize=9, color=INK)
    windows.set_ylabel("first block of the window", fontsize=9, color=INK)
    windows.tick_params(colors=INK, labelsize=9)
    windows.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=windows, shrink=0.9)
    bar.set_label("cosine of its input and output", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    title = f"{printable(title)}, {evidence.tokens:,} tokens"
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left", parse_math=False)
    return figure


def _save(figure: Figure, path: Path) -> None:
    picture = _png(figure)
    replace_atomically(path, lambda temporary: temporary.write_bytes(picture))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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


def _page(view: RunView) -> str:
    esc = html.escape
    picture = base64.b64encode(_png(_front_figure(view))).decode() if view.finished else ""
    target = view.folder.target
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{esc(view.name)} · foldsearch</title><style>{_STYLE}</style>",
        f"<h1>{esc(view.model)} folded</h1>",
        f"<p>{esc(view.note) + '. ' if view.note else ''}Text: {esc(view.data)}. Priced for {target.dtype}, a context "
        f"of {target.context:,} tokens, batch {target.batch}, {target.runtime} weights; "
        f"{esc(budget_words(view.folder))}.</p>",
    ]
    if not view.finished:
        parts.append("<p>No trial has reached the last rung yet.</p>")
        return "\n".join(parts)
    parts += [
        f"<img alt='KL against memory' src='data:image/png;base64,{picture}'>",
        "<h2>Front and baselines</h2>",
        "<p>KL to dense in nats per token, ± one standard error by document: on the search texts, and on the report "
        "texts, which no choice was made on. Perplexity and ΔKL are of the report texts. ΔKL: against the best "
        "baseline of about the same cost or less. GB are decimal; FLOPs per token.</p>",
        _trial_table(view),
    ]
    first = view.finished[0]
    if not has_errors(first.quality, first.final):
        parts.append(f"<p>{NO_ERROR}</p>")
    if counts := view.by_count():
        parts += [
            "<h2>Which criterion was best</h2>",
            "<p>KL on the report texts, plans that only drop blocks.</p>",
        ]
        parts.append(_criteria(counts))
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
    front = {entry.number for entry in view.front}
    rows = [
        "<tr><th>trial<th class=l>plan<th>search KL<th>report KL<th>perplexity<th>ΔKL<th class=l>chosen by"
        "<th>weights<th>adapters<th>KV<th>activations<th>GB<th>prefill<th>decode"
    ]
    dense, perplexity = view.folder.dense, view.dense_perplexity
    rows.append(
        f"<tr class=dense><td>dense<td class=l>{_svg(FoldPlan.identity(view.folder.num_blocks))}<td>0<td>0"
        f"<td>{'' if perplexity is None else f'{perplexity:.2f}'}<td><td class=l>{_cost_cells(dense, dense)}"
    )
    for entry in view.front_and_baselines:
        gain = view.gain(entry)
        shade = "" if gain is None else " class=better" if gain < 0 else " class=worse"
        by = html.escape(", ".join(entry.authors))
        if entry.is_baseline:
            by += " <span class=baseline>baseline</span>"
        if entry == view.knee:
            by += " <span class=knee>◆ knee</span>"
        if setback := entry.result.setback_words:
            by += f" <span class=worse>{html.escape(setback)}</span>"
        final = entry.final
        rows.append(
            f"<tr{' class=front' if entry.number in front else ''}><td>{entry.number}<td class=l>{_svg(entry.plan)}"
            f"<td>{_kl(entry.quality)}<td>{_kl(final)}"
            f"<td>{with_error(final.perplexity, final.perplexity_se, '.2f')}"
            f"<td{shade}>{'—' if gain is None else f'{gain:+.3f}'}<td class=l>{by}{_cost_cells(entry.cost, dense)}"
        )
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _kl(quality: Quality) -> str:
    return with_error(quality.kl, quality.kl_se, ".3f")


def _cost_cells(cost: Cost, dense: Cost) -> str:
    unit, size = flops_unit(dense)
    sizes = (cost.weight_bytes, cost.adapter_bytes, cost.kv_bytes, cost.activation_bytes)
    cells = [gb(n, dense) for n in sizes]
    cells.append(f"<b>{gb(cost.memory_bytes, dense)}</b>")
    cells += [f"{2 * cost.prefill_macs / size:.1f} {unit}", f"{cost.flops / size:.1f} {unit}"]
    return "<td>" + "<td>".join(cells)


def _criteria(counts: dict[int, dict[str, Entry]]) -> str:
    names = list(dict.fromkeys(name for row in counts.values() for name in row))
    rows = ["<tr><th>dropped<th>" + "<th>".join(html.escape(name.replace("_", " ")) for name in names)]
    for count, row in counts.items():
        best = min(entry.final.kl for entry in row.values())
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
    for record in view.records:
        by = "" if record.proposal is None else html.escape(author(record.proposal))
        state = record.state + (f": {html.escape(record.reason)}" if record.reason else "")
        if record.state == "finished" and record.last is not None and record.last.state == "known":
            state += f": same plan as trial {record.last.known_from}"
        if record.last is not None and (setback := record.last.setback_words):
            state += f"; {html.escape(setback)}"
        row = f"<tr><td>{record.number}<td class=l>{by}<td class='l why'>{state}"
        if (result := record.last) is not None:
            kl = "—" if result.quality is None else f"{result.quality.kl:.3f}"
            memory = gb(result.cost.memory_bytes, view.folder.dense)
            row += (
                f"<td>{result.rung}<td>{result.recovery_tokens:,}<td>{kl}<td>{memory}<td>{result.seconds:.0f}"
            )
            row += f"<td class=l><code>{html.escape(str(result.plan))}</code>"
        rows.append(row)
    return f"<div class=wide><table>{''.join(rows)}</table></div>"
