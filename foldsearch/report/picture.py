"""Pictures of a run and of a model, as PNG files for documents and for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from foldsearch.criteria import criterion_of
from foldsearch.files import replace_atomically
from foldsearch.paths import printable
from foldsearch.plan.cost import GB, Cost
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import rounded
from foldsearch.record import Trial
from foldsearch.report.colours import DROPPED, FAINT, INK, PAIRS, REPLACED, paint
from foldsearch.report.view import RunView, flops_unit, has_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from foldsearch.model.evidence import Evidence

FOUND = "o"  # marker of what the search found
DPI = 160
TITLE_WIDTH = 125  # characters of a line above both parts
MOST_STRIPS = 30  # plans that are drawn and numbered: a longer front would fill pages
MOST_WORDS = 6  # of the trials beyond an axis: so many are named one by one


def draw_front(view: RunView, path: Path) -> None:
    """The front as a PNG: KL against memory, coloured by FLOPs, its plans as strips beside it."""
    _save(front_png(view), path)


def front_png(view: RunView) -> bytes:
    """The bytes of the picture that `draw_front` writes."""
    return _png(_front_figure(view))


def draw_evidence(evidence: Evidence, path: Path, *, title: str) -> None:
    """FoldGPT's Fig. 2 for a model, as a PNG: both cosines by block, and the windows' cosines as a map."""
    _save(_png(_evidence_figure(evidence, title)), path)


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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _save(picture: bytes, path: Path) -> None:
    replace_atomically(path, lambda temporary: temporary.write_bytes(picture))


# ---- how much of an axis is shown


class Range(NamedTuple):
    """What an axis shows; what lies beyond is drawn at its edge, with its value in words."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value is shown where it is."""
        return self.low <= value <= self.high


FAR = 3.0  # the others then have a quarter of the axis at least


def shown_range(values: Sequence[float], most: int, *, always: float | None = None) -> Range:
    """The range of the values, without the few that would flatten all the others.

    Values at an end are left out where the gap to the next one is more than `FAR` times as wide as what is left.

    Args:
        values: at least one.
        most: so many values are left out at most, and never half of them.
        always: a value that is not left out.
    """
    ordered = sorted(values)
    for kept in range(max(2, len(ordered) // 2 + 1, len(ordered) - most), len(ordered)):
        for first in range(len(ordered) - kept + 1):
            low, high = ordered[first], ordered[first + kept - 1]
            if always is not None and not low <= always <= high:
                continue
            if high - low <= 0.05 * max(abs(low), abs(high)):
                continue  # values that hardly differ are no measure of what is far
            far = FAR * (high - low)
            below = first == 0 or low - ordered[first - 1] > far
            above = first + kept == len(ordered) or ordered[first + kept] - high > far
            if below and above:
                return Range(low, high)
    return Range(ordered[0], ordered[-1])


def bends(values: Sequence[float]) -> float | None:
    """Where an axis from 0 changes from linear to logarithmic: the lower quartile of values that have a long tail.

    None where the largest is not `TAIL` times the lower quartile: a linear axis shows them all.
    """
    ordered = sorted(value for value in values if value > 0)
    if not ordered:
        return None
    quartile = ordered[(len(ordered) - 1) // 4]
    return quartile if ordered[-1] > TAIL * quartile else None


TAIL = 10.0  # on a linear axis a quarter of the trials would share a tenth of the height


def _round_values(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high."""
    from math import floor, log10

    powers = range(floor(log10(low)), floor(log10(high)) + 1)
    rounded = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [value for value in rounded if low <= value <= high]


# ---- the front


def _front_figure(view: RunView) -> Figure:
    drawn = _drawn(view)
    figure = _figure(11.5, max(4.6, 1.7 + 0.27 * len(drawn)))
    grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
    axes, strips = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    _plain(axes)
    _draw_points(view, figure, axes, drawn)
    _draw_strips(view, strips, drawn)
    note = f" ({view.note})" if view.note else ""
    title = f"{view.model}{note} on {view.data}: KL to dense on the search texts, against memory"
    figure.suptitle(
        "\n".join(wrap(title, TITLE_WIDTH)),
        fontsize=11, color=INK, x=0.01, ha="left", parse_math=False,
    )  # fmt: skip
    return figure


def _drawn(view: RunView) -> tuple[Trial, ...]:
    """The plans of the front that get a strip and a number: all, or some at equal steps and the knee among them."""
    front = view.front
    if len(front) <= MOST_STRIPS:
        return front
    last = len(front) - 1
    chosen = {round(i * last / (MOST_STRIPS - 2)) for i in range(MOST_STRIPS - 1)}
    return tuple(trial for i, trial in enumerate(front) if i in chosen or trial == view.knee)


class _Place(NamedTuple):
    """Where a trial is drawn, and what is written beside it as it lies beyond an axis."""

    x: float
    y: float
    beyond: str


class _Frame:
    """Both axes: their ranges, scales and edges."""

    def __init__(self, view: RunView, axes: Axes) -> None:
        """`axes`: get their scale and limits."""
        entries, dense, budget = view.finished, view.folder.dense, view.folder.budget
        most = max(1, len(entries) // 10)
        marks = [dense.memory_bytes / GB]
        if budget.memory_bytes is not None:
            marks.append(budget.memory_bytes / GB)
        marks += [rival.cost.memory_bytes / GB for rival in view.rivals]
        self.x = shown_range([*(_gigabytes(trial) for trial in entries), *marks], most + len(marks))
        kls = [trial.quality.kl for trial in entries]
        self.y = shown_range([0.0, *kls], most, always=0.0)
        self.beyond = sum(not self.y.holds(kl) for kl in kls)
        shown = [kl for kl in kls if self.y.holds(kl)]
        tops = [
            t.quality.kl + t.quality.kl_se
            for t in entries
            if has_errors(t.quality) and self.y.holds(t.quality.kl)
        ]
        self._scale(axes, bends(shown), max(tops, default=0.0))
        edges = (axes.transScale + axes.transLimits).inverted().transform([(0.02, 0.5), (0.98, 0.96)])
        (self._left, _), (self._right, self._top) = edges.tolist()

    def _scale(self, axes: Axes, bend: float | None, highest_error: float) -> None:
        low, high = self.x
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_xlim(low - margin, high + margin)
        axes.ticklabel_format(axis="x", useOffset=False)
        top = max((self.y.high or 1.0) * (1.2 if self.beyond else 1.06), 1.02 * highest_error)
        words = "KL to dense, nats per token (± one standard error)"
        if bend is not None:
            axes.set_yscale("asinh", linear_width=bend)
            axes.set_yticks([0.0, *_round_values(bend / 2, top)])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
            words += f"\nlinear below {bend:.2g}, logarithmic above"
        axes.set_ylim(-0.03 * top if bend is None else -0.15 * bend, top)
        axes.set_xlabel("GB: weights + adapters + KV cache + activations", fontsize=9, color=INK)
        axes.set_ylabel(words, fontsize=9, color=INK)

    def place(self, x: float, y: float) -> _Place:
        """Where a point of `x` GB and KL `y` is drawn."""
        words = []
        if y > self.y.high:
            words.append(f"↑ KL {y:.3g}")
            y = self._top
        if x < self.x.low:
            words.append(f"← {x:.3g} GB")
            x = self._left
        elif x > self.x.high:
            words.append(f"{x:.3g} GB →")
            x = self._right
        return _Place(x, y, "  ".join(words))


def _gigabytes(trial: Trial) -> float:
    return trial.cost.memory_bytes / GB


def _draw_points(view: RunView, figure: Figure, axes: Axes, drawn: Sequence[Trial]) -> None:
    frame = _Frame(view, axes)
    dense, (value, words) = view.folder.dense, _shade(view)
    values = [value(trial.cost) for trial in view.finished]
    of_dense = value(view.folder.timed_dense)
    low, high = shown_range([*values, of_dense], max(1, len(values) // 10) + 1)
    scale: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high}
    places = {trial.number: frame.place(_gigabytes(trial), trial.quality.kl) for trial in view.finished}
    _draw_errors(view, axes, places)
    _draw_trials(view, axes, places, scale)
    _draw_words(view, axes, places, drawn)
    if (knee := view.knee) is not None:
        x, y, _ = places[knee.number]
        axes.scatter(
            x, y, s=230, facecolors="none", edgecolors=REPLACED, linewidths=1.8, zorder=5, label="knee"
        )
    star = frame.place(dense.memory_bytes / GB, 0.0)
    coloured = axes.scatter(
        star.x, star.y, marker="*", s=170, c=[of_dense], edgecolors=INK, linewidths=0.9, zorder=5,
        label="dense", **scale,
    )  # fmt: skip
    _write_beyond(axes, star)
    _draw_rivals(view, axes, frame)
    _draw_budget(view, axes, frame)
    for criterion in dict.fromkeys(filter(None, map(view.baseline, view.finished))):
        known = criterion_of(criterion)
        name, marker = known.title, known.marker
        axes.scatter([], [], marker=marker, c="white", edgecolors=INK, s=42, label=f"{name} (baseline)")
    axes.scatter([], [], marker=FOUND, c="white", edgecolors=INK, s=42, label="found by the search")
    beyond = (min(*values, of_dense) < low, max(*values, of_dense) > high)  # these have the colour of the end
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(beyond, "neither")
    bar = figure.colorbar(
        coloured, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02, extend=extend
    )
    bar.set_label(words, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    # KL falls with memory: where there is much of both, there is no point to hide.
    axes.legend(
        fontsize=8, frameon=True, facecolor="white", edgecolor="none", framealpha=0.85, loc="upper right"
    )


def _shade(view: RunView) -> tuple[Callable[[Cost], float], str]:
    """What points are coloured by, and its name: milliseconds for a token where they were measured, else FLOPs."""
    latency = view.folder.table.latency_on(view.folder.target)
    if latency is not None:
        words = f"milliseconds for a token after a prompt of {latency.tokens:,}, in {latency.where}"
        return (lambda cost: cost.decode_ms or 0.0), words
    unit, size = flops_unit(view.folder.dense)
    return (lambda cost: cost.flops / size), f"{unit}FLOPs per token at decode"


def _draw_errors(view: RunView, axes: Axes, places: Mapping[int, _Place]) -> None:
    """A standard error above and below each trial that is drawn where it is."""
    shown = [
        (places[trial.number], trial.quality.kl_se)
        for trial in view.finished
        if has_errors(trial.quality) and not places[trial.number].beyond
    ]
    axes.errorbar(
        [place.x for place, _ in shown], [place.y for place, _ in shown], yerr=[error for _, error in shown],
        fmt="none", ecolor="#b6bcc8", elinewidth=1, zorder=2,
    )  # fmt: skip


def _draw_trials(view: RunView, axes: Axes, places: Mapping[int, _Place], scale: Mapping[str, Any]) -> None:
    """One call for all trials that look alike: a call each would take seconds for a long run."""
    front = {trial.number for trial in view.front}
    value, _ = _shade(view)
    alike: dict[tuple[str, bool], list[Trial]] = {}
    for trial in view.finished:
        baseline = view.baseline(trial)
        marker = criterion_of(baseline).marker if baseline else FOUND
        alike.setdefault((marker, trial.number in front), []).append(trial)
    for (marker, on_front), entries in alike.items():
        at = [places[trial.number] for trial in entries]
        axes.scatter(
            [place.x for place in at], [place.y for place in at], c=[value(e.cost) for e in entries],
            marker=marker, s=72 if on_front else 38, alpha=1.0 if on_front else 0.75,
            linewidths=1.1 if on_front else 0.4, edgecolors=INK if on_front else "white",
            zorder=4 if on_front else 3, **scale,
        )  # fmt: skip


def _draw_words(view: RunView, axes: Axes, places: Mapping[int, _Place], drawn: Sequence[Trial]) -> None:
    """The numbers of the plans that have a strip, and the values of the trials beyond an axis."""
    for trial in drawn:
        x, y, _ = places[trial.number]
        axes.annotate(
            str(trial.number), (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color=INK
        )
    beyond = [trial for trial in view.finished if places[trial.number].beyond]
    if len(beyond) <= MOST_WORDS:
        for trial in beyond:
            _write_beyond(axes, places[trial.number])
        return
    kls = [trial.quality.kl for trial in beyond]
    axes.text(
        0.5, 1.0, f"{len(beyond)} trials lie beyond an axis: KL {min(kls):.3g} to {max(kls):.3g}",
        transform=axes.transAxes, fontsize=8, color=INK, ha="center", va="bottom",
    )  # fmt: skip


def _write_beyond(axes: Axes, place: _Place) -> None:
    if place.beyond:
        right = "→" in place.beyond
        axes.annotate(
            place.beyond, (place.x, place.y), xytext=(-7 if right else 7, -9 if "↑" in place.beyond else 10),
            textcoords="offset points",
            fontsize=8, color=INK, ha="right" if right else "left", va="center",
        )  # fmt: skip


def _draw_rivals(view: RunView, axes: Axes, frame: _Frame) -> None:
    """The dense model with weights of fewer bits: what folding costs beside rounding, at these bytes."""
    for number, rival in enumerate(view.rivals):
        place = frame.place(rival.cost.memory_bytes / GB, rival.search.kl)
        axes.scatter(
            place.x, place.y, marker="*", s=110, facecolors="white", edgecolors=INK, linewidths=1.1, zorder=5,
            label="" if number else "dense, fewer bits",
        )  # fmt: skip
        axes.annotate(
            f"{rival.types.label} {place.beyond}", (place.x, place.y), xytext=(6, 5), textcoords="offset points",
            fontsize=7, color=INK,
        )  # fmt: skip


def _draw_budget(view: RunView, axes: Axes, frame: _Frame) -> None:
    budget = view.folder.budget.memory_bytes
    if budget is None:
        return
    x, words, side = budget / GB, " budget ", "left"
    if frame.x.holds(x):
        axes.axvline(x, color=FAINT, linestyle="--", linewidth=1.1, zorder=1)
    else:
        x, _, beyond = frame.place(x, 0.0)
        words, side = f"budget {beyond} ", "right" if "→" in beyond else "left"
    # At the bottom: the legend is at the top.
    axes.text(
        x, 0.05, words, transform=axes.get_xaxis_transform(), fontsize=8, color=FAINT, ha=side, va="bottom"
    )


def _draw_strips(view: RunView, axes: Axes, shown: Sequence[Trial]) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    num_blocks = view.folder.num_blocks
    num_cells = max([num_blocks, *(len(paint(trial.plan)) for trial in shown)])
    rows: list[tuple[str, str, FoldPlan]] = [("dense", "", FoldPlan.identity(num_blocks))]
    for trial in shown:
        mark = " ◆" if trial == view.knee else ""
        rows.append(
            (
                f"{trial.number}{mark}",
                f"{rounded(trial.quality.kl, '.3f')}  {view.authors(trial)[0]}",
                trial.plan,
            )
        )
    cells: list[Rectangle] = []
    for row, (left, right, plan) in enumerate(rows):
        for column, (_, attention, mlp) in enumerate(paint(plan)):
            if attention is None and mlp is None:
                axes.plot(column + 0.5, row + 0.5, marker=".", markersize=2, color=DROPPED)
            for top, colour in ((row + 0.14, attention), (row + 0.5, mlp)):
                if colour is not None:
                    cells.append(Rectangle((column + 0.06, top), 0.88, 0.36, color=colour, linewidth=0))
        axes.text(-0.6, row + 0.5, left, ha="right", va="center", fontsize=8, color=INK)
        axes.text(num_cells + 0.6, row + 0.5, right, ha="left", va="center", fontsize=8, color=INK)
    axes.add_collection(PatchCollection(cells, match_original=True), autolim=False)
    axes.set_xlim(-3, num_cells + 11)
    axes.set_ylim(max(len(rows), 9) + 0.2, -0.6)  # few strips are no thicker than many
    axes.set_xticks([block + 0.5 for block in range(0, num_blocks, 5)])
    axes.set_xticklabels([str(block) for block in range(0, num_blocks, 5)], fontsize=8, color=INK)
    axes.set_yticks([])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False, pad=1)
    axes.spines[:].set_visible(False)
    of_all = "" if len(shown) == len(view.front) else f"{len(shown)} of {len(view.front)} "
    axes.set_xlabel(
        f"{of_all}plans of the front, by block; upper half attention, lower half MLP\ncolour: shared weights, "
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
