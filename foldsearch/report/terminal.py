"""Tables and strips for the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foldsearch.criteria import criterion_names
from foldsearch.paths import command, printable
from foldsearch.plan.cost import GB, Cost, CostTable, Target, price
from foldsearch.plan.latency import Latency
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.plan.result import Quality, rounded
from foldsearch.plan.stored import AS_TARGET, StoredTypes
from foldsearch.plan.strip import LEGEND, Cell, cells
from foldsearch.record import Trial
from foldsearch.report.colours import DROPPED, PAIRS, paint
from foldsearch.report.grid import GAP, Column, Grid, fold_size
from foldsearch.report.health import health
from foldsearch.report.view import (
    FURTHER,
    NO_ERROR,
    RunView,
    by_cost,
    counted,
    flops_unit,
    gb,
    has_errors,
    milliseconds,
    report_kl,
    searched_types,
    with_error,
)
from foldsearch.run import Run
from foldsearch.runtimes import exported_bytes, names, runtime_for, runtime_named

if TYPE_CHECKING:
    from pathlib import Path

    from foldsearch.cache import Entry
    from foldsearch.export.family import Family
    from foldsearch.export.figures import ExportReport
    from foldsearch.export.recheck import Rechecked
    from foldsearch.export.reproduce import Reproduced
    from foldsearch.model.choices import ChoiceQuality
    from foldsearch.model.evidence import Evidence
    from foldsearch.model.harness import TaskScore
    from foldsearch.search.check import Checked
    from foldsearch.search.dry_run import DryRun
    from foldsearch.search.screened import Screened
from foldsearch.search.screened import SEARCH
from foldsearch.spec.study import TYPED, Study

WIDTH_OF_LOGS = 120  # characters of a line where the output is no terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave to the command line what becomes of a command whose reader ended; rich would end it with code 1."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """A console that fits its terminal; in a log file lines are wide enough for every column."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_OF_LOGS
    # No mark-up: a folder may be called [red] or :smile:. What is styled is a `Text`.
    return _Console(stderr=stderr, width=width, highlight=False, soft_wrap=False, markup=False, emoji=False)


# ---- a plan as a strip


def strip_text(plan: FoldPlan) -> Text:
    """A plan as one coloured character a block (see `foldsearch.plan.strip`)."""
    text = Text(no_wrap=True)
    drawn = (_draw(*cell) for cell in paint(plan))
    for style, run in groupby(drawn, key=lambda glyph_style: glyph_style[1]):
        text.append("".join(glyph for glyph, _ in run), style=style)
    return text


def _draw(cell: Cell, attention: str | None, mlp: str | None) -> tuple[str, str]:
    """Glyph and style of a cell with the colours of its two units."""
    if attention is None and mlp is None:
        return "·", DROPPED
    if attention is not None and mlp is not None and attention != mlp:
        return "▀", f"{attention} on {mlp}"
    return cell.glyph, attention or mlp or ""


def ruler(num_blocks: int) -> str:
    """Block numbers to stand above a strip: 0    5    10   15 …"""
    return "".join(f"{block:<5}" for block in range(0, num_blocks, 5))[:num_blocks].rstrip()


def strip_ruler(plan: FoldPlan) -> str:
    """Block numbers to stand above a plan's strip, where repeats take cells of their own."""
    text = ""
    for position, cell in enumerate(cells(plan)):
        if cell.block % 5 == 0 and not cell.repeat and (not text or len(text) < position):
            text = text.ljust(position) + str(cell.block)
    return text


def legend() -> Text:
    """What the cells of a strip mean."""
    text = Text(style="dim")
    text.append(LEGEND)
    text.append("    a colour is a shared weight: ")
    dark, light = PAIRS[0]
    text.append("█", style=f"not dim {dark}")
    text.append(" owner ")
    text.append("▒", style=f"not dim {light}")
    text.append(" its children")
    return text


# ---- the front


def front_report(view: RunView, *, width: int, every: bool = False) -> Group:
    """All that `foldsearch front` prints.

    Args:
        view: the run.
        width: characters of a line; where one table does not fit, there are several.
        every: all finished trials, not only the front and the baselines.
    """
    parts: list[RenderableType] = [_heading(view), Text()]
    if not view.finished:
        parts.append(
            Text("No trial has reached the last rung yet; a front compares trials of one rung only.")
        )
        return Group(*parts)
    for grid in _front_tables(view, every, width):
        parts += [grid, Text()]
    parts += [legend(), _footnote(view), *_remarks(view, every)]
    if criteria := view.by_count():
        parts += [Text(), Text("report KL by criterion, plans that only drop blocks", style="bold")]
        for number, table in enumerate(_criteria_tables(criteria, width)):
            parts += [Text(), table] if number else [table]
    if screened := view.screened_by_count():
        head = (
            f"KL of {counted(view.num_screened, 'plan')} that were healed and measured before any was trained"
        )
        parts += [
            Text(),
            Text(head, style="bold"),
            _screened_table(screened),
            Text(_CHOSEN_HERE, style="dim"),
        ]
    if agreements := view.agreements:
        words = "; ".join(f"{one.between} {one.correlation:.2f} ({one.plans} plans)" for one in agreements)
        parts += [Text(), Text(f"Rank correlation of KL between measurements: {words}.", style="dim")]
    parts += [Text(), *(Text(f"• {words}", style="dim") for words in health(view))]
    return Group(*parts)


_KEY = ("", "trial")  # mark and number: every table has them
_PLAN = ("plan", "chosen by")
_KL = ("search KL", "report KL")
_GAIN = ("perplexity", "Δ KL")
_MEMORY = ("weights", "adapters", "KV", "activ.", "total GB")
_SPEED = ("prefill", "decode", "prompt ms", "token ms")  # the latter two where they were measured
_FILES = tuple(f"{name} MB" for name in names())  # what each runtime's file takes
_QUALITY = (_PLAN[0], *_KL, *_GAIN, _PLAN[1])
# The columns of each table, for narrower and narrower lines.
_LAYOUTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    ((*_QUALITY, *_MEMORY, *_SPEED, *_FILES),),
    (_QUALITY, (*_MEMORY, *_SPEED, *_FILES)),
    (_QUALITY, (*_MEMORY, *_SPEED), _FILES),
    ((_PLAN[0], *_KL), (*_GAIN, _PLAN[1]), (*_MEMORY, *_SPEED), _FILES),
    ((_PLAN[0], *_KL), (*_GAIN, _PLAN[1]), _MEMORY, _SPEED, _FILES),
    (_PLAN, (*_KL, *_GAIN), (*_MEMORY, *_SPEED), _FILES),
    (_PLAN, (*_KL, *_GAIN), _MEMORY, _SPEED, _FILES),
    (_PLAN, _KL, _GAIN, _MEMORY, _SPEED, _FILES),
    (_PLAN, _KL, _GAIN, _MEMORY[:3], _MEMORY[3:], _SPEED, *((name,) for name in _FILES)),
)
_AUTHORS_WIDTH = 12  # characters that a folded strip leaves for who chose the blocks


_KIND = "kind "  # before a kind's title: what names its column, apart from all others


def _layouts(kinds: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """The columns of each table, for narrower and narrower lines, with those of the kinds of text."""
    for layout in _LAYOUTS:
        first, *rest = layout
        if not kinds:
            yield layout
        elif not rest:
            place = first.index(_KL[-1]) + 1
            yield ((*first[:place], *kinds, *first[place:]),)
        else:
            yield (first, kinds, *rest)
    if kinds:
        yield (*_LAYOUTS[-1], *((kind,) for kind in kinds))


def _front_tables(view: RunView, every: bool, width: int) -> list[Grid]:
    """The front in as few tables as fit the width: no number, mark, strip or figure is cut."""
    columns = _front_columns(view, every)
    key = tuple(columns[name] for name in _KEY)
    tables: list[Grid] = []
    for layout in _layouts(tuple(name for name in columns if name.startswith(_KIND))):
        tables = [
            _plans_table(key, columns, width)
            if names == _PLAN
            else Grid((*key, *(columns[name] for name in names if name in columns)))
            for names in layout
        ]
        if all(table.width <= width for table in tables):
            break
    return tables


def _front_columns(view: RunView, every: bool) -> dict[str, Column]:
    """The columns of the front by name: the dense model, then the trials."""
    rows = _front_rows(view, every)
    unit, _ = flops_unit(view.folder.dense)
    heads = {
        "plan": ruler(view.folder.num_blocks),
        "prefill": f"prefill {unit}F",
        "decode": f"decode {unit}F",
    }
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = (row.get(name, "") for row in rows)
        texts = tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells)
        right = name not in ("", *_PLAN)  # all others are figures
        columns[name] = Column(Text(heads.get(name, name.removeprefix(_KIND))), texts, right)
    return columns


def _front_rows(view: RunView, every: bool) -> list[dict[str, str | Text]]:
    """What stands under each head: of the dense model, then of each trial."""
    shown = sorted(view.finished, key=by_cost) if every else view.front_and_baselines
    front = {trial.number for trial in view.front}
    best_kl = min(map(report_kl, shown))
    folder, perplexity = view.folder, view.dense_perplexity
    dense: dict[str, str | Text] = {
        "trial": "dense",
        "plan": strip_text(FoldPlan.identity(folder.num_blocks)),
    }
    dense |= dict.fromkeys(_KL, "0") | {"perplexity": "" if perplexity is None else f"{perplexity:.2f}"}
    kinds = dict.fromkeys(f"{_KIND}{kind.title}" for trial in shown for kind in trial.final.shown_kinds)
    dense |= dict.fromkeys(kinds, "0")
    dense |= _price(folder.dense, folder.dense) | _times(folder.timed_dense)
    rows = [dense | _files(folder, FoldPlan.identity(folder.num_blocks), folder.study.target.stored_in(""))]
    for rival in view.rivals:
        cost = _price(rival.cost, folder.dense)
        named = {"trial": f"dense {rival.types.label}", "plan": dense["plan"]}
        in_file: dict[str, str | Text] = {f"{TYPED} MB": megabytes(rival.cost.stored_bytes)}
        rows.append(named | _figures(rival.search, rival.report) | cost | in_file)
    for trial in shown:
        final, on_front = trial.final, trial.number in front
        authors = ", ".join(view.authors(trial))
        if every and (repeats := view.repeats(trial)):
            trials = "trial" if len(repeats) == 1 else "trials"
            authors += f" (also {trials} {', '.join(map(str, repeats))})"
        row: dict[str, str | Text] = {
            "": _marks(view, trial, on_front),
            "trial": Text(str(trial.number), style="bold" if on_front else "dim"),
            "plan": strip_text(trial.plan),
            **_figures(trial.quality, final),
            "Δ KL": _gain(view, trial),
            "chosen by": authors,
        }
        if final.kl == best_kl:
            row["report KL"] = Text(str(row["report KL"]), style="bold")
        files = _files(folder, trial.plan, folder.target.storing(trial.types))
        rows.append(row | _price(trial.cost, folder.dense) | files)
    return rows


def _figures(search: Quality, report: Quality) -> dict[str, str | Text]:
    """Quality on the search and on the report texts, and on each kind of the latter."""
    kinds = {f"{_KIND}{kind.title}": with_error(kind.kl, kind.kl_se, ".3f") for kind in report.shown_kinds}
    return {
        "search KL": with_error(search.kl, search.kl_se, ".3f"),
        "report KL": with_error(report.kl, report.kl_se, ".3f"),
        "perplexity": with_error(report.perplexity, report.perplexity_se, ".2f"),
        **kinds,
    }


def _plans_table(key: tuple[Column, ...], columns: Mapping[str, Column], width: int) -> Grid:
    """Strips and who chose them, both on as many lines as the width needs."""
    plan, authors = (columns[name] for name in _PLAN)
    room = width - Grid(key).width - 2 * GAP
    longest = plan.width
    if longest > room - _AUTHORS_WIDTH:
        longest = fold_size(
            longest, room - _AUTHORS_WIDTH, 5
        )  # five blocks at a time, as the ruler counts them
        plan = plan.folded(longest)
    return Grid((*key, plan, authors.wrapped(max(1, room - longest))))


def _wanted(table: Table) -> int:
    """Characters of a line that shows all of the table."""
    return Console(width=10_000).measure(table).maximum


def _price(cost: Cost, dense: Cost) -> dict[str, str | Text]:
    _, size = flops_unit(dense)
    return {
        "weights": gb(cost.weight_bytes, dense),
        "adapters": gb(cost.adapter_bytes, dense),
        "KV": gb(cost.kv_bytes, dense),
        "activ.": gb(cost.activation_bytes, dense),
        "total GB": Text(gb(cost.memory_bytes, dense), style="bold"),
        "prefill": f"{2 * cost.prefill_macs / size:.1f}",
        "decode": f"{cost.flops / size:.1f}",
        **_times(cost),
    }


def _times(cost: Cost) -> dict[str, str | Text]:
    """Milliseconds; no columns where none were measured."""
    times = {"prompt ms": cost.prompt_ms, "token ms": cost.decode_ms}
    return {name: milliseconds(ms) for name, ms in times.items() if ms is not None}


def _files(folder: Run, plan: FoldPlan, target: Target) -> dict[str, str | Text]:
    """Megabytes of an export to each runtime; a dash where it cannot hold the plan."""
    found = exported_bytes(plan, folder.table, target)
    return {
        f"{name} MB": Text("—", style="dim") if size is None else megabytes(size)
        for name, size in found.items()
    }


def megabytes(size: int) -> str:
    """Decimal megabytes, with a digit behind the point where there are few."""
    return f"{size / 1e6:,.0f}" if size >= 1e8 else f"{size / 1e6:,.1f}"


def runtimes_words(view: RunView, plan: FoldPlan, types: StoredTypes = AS_TARGET) -> str:
    """Which runtimes hold a plan, at what size, and why others do not: `foldsearch pick`.

    types: those that the plan was measured in.
    """
    table, target = view.folder.table, view.folder.target.storing(types)
    found = exported_bytes(plan, table, target)
    usual = runtime_for(plan, target.runtime, by_position=table.by_position).name
    held = []
    for name, size in found.items():
        if size is not None:
            other = " in float32" if target.dtype in runtime_named(name).lacks else ""
            if name == target.runtime and target.rounds:
                cached = f", run with a KV cache in {target.kv_cache}" if target.kv_cache else ""
                other = f" in {target.weights}{cached}"
            held.append(f"{name} {megabytes(size)} MB{other}" + (" (the default)" if name == usual else ""))
    words = f"exports in {target.dtype} to {', '.join(held)}"
    lacking: dict[str, list[str]] = {}  # runtimes by what they lack
    for name in (name for name, size in found.items() if size is None):
        refusal = runtime_named(name).refusal(plan, by_position=table.by_position, family=table.family)
        assert refusal is not None
        lacking.setdefault(refusal[0], []).append(name)
    for what, those in lacking.items():
        words += f"; not to {' or '.join(those)}, which cannot hold {what}"
    return words


def _marks(view: RunView, trial: Trial, on_front: bool) -> Text:
    text = Text()
    if on_front:
        text.append(*("◆", "bold magenta") if trial == view.knee else ("●", "bold"))
    else:
        text.append(" ")
    if view.baseline(trial):
        text.append("○", style="yellow")
    return text


def _gain(view: RunView, trial: Trial) -> Text:
    gain = view.gain(trial)
    if gain is None:
        return Text("—", style="dim")
    words = rounded(gain, "+.3f")
    return Text(words, style="dim" if words == "+0.000" else "green" if gain < 0 else "red")


def _criteria_tables(criteria: Mapping[int, Mapping[str, Trial]], width: int) -> list[Table]:
    """KL by criterion and count, as many criteria in a table as fit the width."""
    found = dict.fromkeys(name for row in criteria.values() for name in row)
    order = criterion_names()
    # after the criteria, who gave whole plans
    used = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    tables: list[Table] = []
    for size in range(len(used), 0, -1):
        tables = [
            _criteria_table(criteria, used[first : first + size]) for first in range(0, len(used), size)
        ]
        if all(_wanted(table) <= width for table in tables):
            break
    return tables


def _criteria_table(criteria: Mapping[int, Mapping[str, Trial]], used: Sequence[str]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    _columns(table, "dropped>", *(f"{name.replace('_', ' ')}>" for name in used))
    for count, row in criteria.items():
        best = min(map(report_kl, row.values()))
        cells = []
        for name in used:
            q = row[name].final if name in row else None
            text = "—" if q is None else with_error(q.kl, q.kl_se, ".3f")
            cells.append(Text(text, style="dim" if q is None else "bold green" if q.kl == best else ""))
        table.add_row(str(count), *cells)
    return table


_CHOSEN_HERE = (
    "± one standard error. Both are of the tokens that they were chosen by, where the least of many plans, as of the "
    "search, looks better than it is."
)


def _screened_table(found: Mapping[int, Mapping[str, Screened]]) -> Table:
    """For each number of dropped blocks what the search came to, and the best criterion there."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    _columns(table, "dropped>", "search>", "best criterion>", "")
    for count, row in found.items():
        name, rival = min(
            ((name, one) for name, one in row.items() if name != SEARCH), key=lambda pair: pair[1].quality.kl
        )
        ours = row.get(SEARCH)
        wins = ours is not None and ours.quality.kl < rival.quality.kl
        table.add_row(
            str(count),
            Text("—" if ours is None else _screened_kl(ours), style="bold green" if wins else ""),
            Text(_screened_kl(rival), style="" if wins else "bold green"),
            name.replace("_", " "),
        )
    return table


def _screened_kl(one: Screened) -> str:
    return with_error(one.quality.kl, one.quality.kl_se, ".3f")


def _heading(view: RunView) -> Text:
    target = view.folder.target
    text = Text()
    text.append(view.name, style="bold")
    text.append(f"  {view.model}" + (f" ({view.note})" if view.note else "") + f" on {view.data}\n")
    types = str(searched_types(view.folder))
    text.append(
        f"priced for {target.dtype}, a context of {target.context:,} tokens, batch {target.batch}, "
        f"{target.runtime} weights{f' in {types}' if types else ''}; {budget_words(view.folder)}",
        style="dim",
    )
    return text


def times_words(cost: Cost) -> str:
    """The times of a plan, where they were measured."""
    assert cost.prompt_ms is not None
    assert cost.decode_ms is not None
    return f"{milliseconds(cost.prompt_ms)} ms and {milliseconds(cost.decode_ms)} ms"


def latency_words(latency: Latency) -> str:
    """What the times are of, and what they are reckoned from."""
    counts = ", ".join(str(one.blocks) for one in latency.timed)
    return (
        f"to read a prompt of {latency.tokens:,} tokens, and to write a token after it: lines through {counts} blocks, "
        f"measured in {latency.where} (rounds differ by {latency.spread:.0%})"
    )


def budget_words(folder: Run) -> str:
    """The budget in words."""
    budget, bounds = folder.budget, []
    if budget.memory_bytes is not None:
        bounds.append(f"{budget.memory_bytes / GB:g} GB")
    if budget.flops is not None:
        bounds.append(
            f"{budget.flops:.3g} FLOPs per token ({budget.flops / folder.dense.flops:.2g}x of dense)"
        )
    if budget.prompt_ms is not None:
        bounds.append(f"{budget.prompt_ms:g} ms for a prompt")
    if budget.decode_ms is not None:
        bounds.append(f"{budget.decode_ms:g} ms for a token")
    return "budget " + " and ".join(bounds) if bounds else "no budget"


def _footnote(view: RunView) -> Text:
    first = view.finished[0]
    no_error = "" if has_errors(first.quality, first.final) else f"\n{NO_ERROR}"
    kinds = f"\n{words}" if (words := kinds_words(view.folder.study, first.final)) else ""
    return Text(
        f"● on the front (least {', '.join(view.folder.study.objectives)} on the search texts)  ◆ its knee  "
        f"○ a simple baseline\n"
        f"KL to dense in nats per token, ± one standard error by document: over {first.quality.tokens:,} tokens that "
        f"the search looked at, and over {first.final.tokens:,} of the report texts, which it did not; perplexity and "
        "Δ KL are of the latter. Δ KL: against the best baseline of about the same cost or less. GB decimal: weights + "
        "adapters + KV cache + activations. F: FLOPs per token. MB: of weights in an export to a runtime; — where it "
        f"cannot hold the plan. {latency_note(view)}\n"
        f"Models: {view.tokens_words}.{kinds}{no_error}",
        style="dim",
    )


def latency_note(view: RunView) -> str:
    """What the milliseconds of the table are; empty where there are none."""
    latency = view.folder.table.latency_on(view.folder.target)
    if latency is None:
        return ""
    dense = f" Dense is timed in {latency.weights} too." if latency.weights else ""
    return f"ms: {latency_words(latency)}.{dense} "


def kinds_words(study: Study, final: Quality) -> str:
    """How one KL is made of several kinds of text, and which are unseen; empty where there is one kind."""
    if not final.shown_kinds:
        return ""
    over = "that of the worst kind" if study.kinds.objective == "worst" else "the mean over the kinds"
    words = f"By kind of text: report KL. A KL without a kind is {over}"
    if any(kind.unseen for kind in final.kinds):
        words += "; unseen kinds do not count in it: nothing was fitted, trained or chosen on them"
    return words + "."


def _remarks(view: RunView, every: bool) -> list[Text]:
    """Of the shown trials those whose training made them worse, and those that were trained further, a line each."""
    shown = sorted(view.finished, key=by_cost) if every else view.front_and_baselines
    lines = [
        Text(f"trial {trial.number}: {words}", style=style)
        for trial in shown
        for words, style in ((trial.setback_words, "yellow"), (view.further_words(trial), "green"))
        if words
    ]
    if any(view.further_words(trial) for trial in shown):
        lines.append(Text(FURTHER, style="dim"))
    return lines


def _plain_table(*names: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    _columns(table, *names)
    return table


def _columns(table: Table, *names: str) -> None:
    """Columns by name; a trailing > aligns to the right."""
    for name in names:
        right = name.endswith(">")
        table.add_column(name.removesuffix(">"), justify="right" if right else "left", no_wrap=True)


# ---- one plan


def check_lines(found: Checked, run: Path, *, repair: bool) -> Iterator[str]:
    """What `foldsearch check` says of a run, line by line."""
    for fault in found.mended:
        yield f"mended  {fault}. {fault.remedy}."
    for fault in found.left:
        remedy = command("check", run, "--repair") + ": " if fault.mend is not None else ""
        yield f"fault   {fault}. {remedy}{fault.remedy}."
    if found.interrupted:
        numbers = ", ".join(map(str, found.interrupted))
        yield f"Interrupted, to go on from their last rung: {numbers}. {command('resume', run)}"
    if found.left:
        yield f"{len(found.left)} of what was looked at is not as it should be."
    else:
        yield f"Whole: {found.trials} trials, and their study and folders agree."


def cache_table(found: Sequence[Entry]) -> Table:
    """What the cache holds, by kind: `foldsearch cache`."""
    table = _plain_table("kind", "entries>", "GB>")
    for kind in sorted({entry.kind for entry in found}):
        sizes = [entry.size_bytes for entry in found if entry.kind == kind]
        table.add_row(kind, f"{len(sizes):,}", f"{sum(sizes) / GB:.3f}")
    table.add_row("total", f"{len(found):,}", f"{sum(entry.size_bytes for entry in found) / GB:.3f}")
    return table


def results_table(trial: Trial, rungs: int | None = None) -> Group:
    """The rungs of one trial: `foldsearch try`; results beyond so many `rungs` are marked: `foldsearch recover`."""
    table = _plain_table("rung>", "tokens>", "search KL>", "perplexity>", "agree>", "report KL>", "s>")
    for rung, result in enumerate(trial.results):
        q, report = result.quality, result.report
        beyond = 0 if rungs is None else rung + 1 - rungs
        table.add_row(
            f"+{beyond}" if beyond > 0 else str(rung),
            f"{result.recovery_tokens:,}",
            with_error(q.kl, q.kl_se, ".4f"),
            with_error(q.perplexity, q.perplexity_se, ".2f"),
            f"{q.agreement:.1%}",
            "" if report is None else with_error(report.kl, report.kl_se, ".4f"),
            f"{result.seconds:.0f}",
        )
    words = f"{trial.cost.memory_bytes / GB:.6g} GB, {trial.cost.flops:.6g} FLOPs per token at decode"
    if trial.cost.prompt_ms is not None and trial.cost.decode_ms is not None:
        prompt, token = milliseconds(trial.cost.prompt_ms), milliseconds(trial.cost.decode_ms)
        words += f", {prompt} ms for a prompt, {token} ms for a token"
    if trial.results:
        words += f"; dense has perplexity {trial.quality.dense_perplexity:.2f} on the same texts"
        if not has_errors(trial.quality, trial.last.report):
            words += f"\n{NO_ERROR}"
    if trial.healing is not None:
        words += f"\n{trial.healing.words}"
    if trial.setback_words:
        words += f"\n{trial.setback_words}"
    parts: list[RenderableType] = [
        strip_text(trial.plan),
        Text(str(trial.plan), style="dim"),
        Text(),
        table,
        Text(),
    ]
    if (by_kind := kinds_table(trial)) is not None:
        parts += [by_kind, Text()]
    return Group(*parts, Text(words))


def kinds_table(trial: Trial) -> Table | None:
    """The KL of a trial on each kind of text, a column each; None where there is one kind, or no result."""
    told = {"search KL": trial.quality, "report KL": trial.last.report} if trial.results else {}
    shown = {name: quality.shown_kinds for name, quality in told.items() if quality is not None}
    titles = dict.fromkeys(kind.title for kinds in shown.values() for kind in kinds)
    if not titles:
        return None
    table = _plain_table("by kind of text", *(f"{title}>" for title in titles))
    for name, kinds in shown.items():
        found = {kind.title: with_error(kind.kl, kind.kl_se, ".4f") for kind in kinds}
        if found:
            table.add_row(name, *(found.get(title, "") for title in titles))
    return table


def price_table(plan: FoldPlan, table: CostTable, target: Target) -> Group:
    """Every cost term of a plan beside the dense model's: `foldsearch price`."""
    dense, cost = price(FoldPlan.identity(plan.num_blocks), table, target), price(plan, table, target)
    unit, size = flops_unit(dense)
    shown = _plain_table("", "plan>", "dense>", "share>")
    for name, key in (
        ("weights", "weight_bytes"),
        ("adapters and replacements", "adapter_bytes"),
        ("KV cache", "kv_bytes"),
        ("activations", "activation_bytes"),
        ("total", "memory_bytes"),
    ):
        ours, theirs = getattr(cost, key), getattr(dense, key)
        share = f"{ours / theirs:.1%}" if theirs else ""
        style = "bold" if name == "total" else ""
        shown.add_row(f"{name}, GB", gb(ours, dense), gb(theirs, dense), share, style=style)
    for name, mine, full in (
        ("prefill", 2 * cost.prefill_macs, 2 * dense.prefill_macs),
        ("decode", cost.flops, dense.flops),
    ):
        words = f"{name}, {unit}FLOPs per token"
        shown.add_row(words, f"{mine / size:.1f}", f"{full / size:.1f}", f"{mine / full:.1%}")
    words = f"{target.dtype}, a context of {target.context:,} tokens, batch {target.batch}, {target.runtime} weights"
    words += f" in {types}" if (types := str(target.types)) else ""
    return Group(Text(strip_ruler(plan)), strip_text(plan), Text(), shown, Text(), Text(words, style="dim"))


def extension_note(plan: FoldPlan, table: CostTable, target: Target) -> Text:
    """What an extended plan repeats, and that it costs more: `foldsearch extend`."""
    base, cost = price(FoldPlan.identity(plan.num_blocks), table, target), price(plan, table, target)
    repeats = [cell for cell in cells(plan) if cell.repeat]
    rank = max(slot.rank for slot in plan.slots if isinstance(slot, Slot))
    carried = (f"an adapter of rank {rank} on every linear and " if rank else "") + "an output norm"
    more = ", ".join(
        f"{name} {ours / theirs - 1:+.1%}"
        for name, ours, theirs in (
            ("memory", cost.memory_bytes, base.memory_bytes),
            ("stored bytes", cost.stored_bytes, base.stored_bytes),
            ("KV cache", cost.kv_bytes, base.kv_bytes),
            ("FLOPs per token at decode", cost.flops, base.flops),
        )
        if theirs
    )
    are = "is a repeat, with" if len(repeats) == 1 else "are repeats, each with"
    return Text(
        f"{len(repeats)} of {plan.depth} positions {are} {carried} of its own. An extension costs "
        f"more than the base model: {more}."
    )


# ---- before a search, after an export


def dry_run_table(study: Study, found: DryRun) -> Group:
    """What a search would do: `foldsearch run --dry-run`."""
    low, high = found.counts
    minutes = counted(round(found.seconds / 60), "minute")
    trials = counted(found.trials, "trial") if study.trials else "trials"
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_row(
        "space",
        f"{printable(study.space.name)}: {found.size:,} proposals, recovery settings and neighbours not counted",
    )
    table.add_row(
        "feasible", f"{found.feasible_share:.1%} of random ones as they come; {low} to {high} blocks can go"
    )
    table.add_row(
        "dense", f"{gb(found.dense.memory_bytes, found.dense)} GB, {found.dense.flops:.4g} FLOPs per token"
    )
    table.add_row(
        "smallest",
        f"{gb(found.smallest_cost.memory_bytes, found.dense)} GB, {found.smallest_cost.flops:.4g} FLOPs per token",
    )
    table.add_row("", Text(str(found.smallest), style="dim"))
    if found.latency is not None and found.timed is not None:
        of = f"dense{f' in {found.latency.weights}' if found.latency.weights else ''}"
        table.add_row(
            "latency", f"{of} {times_words(found.timed)}, smallest {times_words(found.smallest_cost)}"
        )
        table.add_row("", Text(latency_words(found.latency), style="dim"))
    table.add_row("time", f"about {minutes} at most, {trials}, {study.jobs} at a time")
    table.add_row("disk", f"about {found.disk_bytes / GB:.2f} GB")
    table.add_row("memory", f"about {found.memory_bytes / GB:.2f} GB")
    return Group(*([Text(f"Note: {found.notice}", style="yellow")] if found.notice else []), table)


def passport_lines(value: Mapping[str, Any], file: Path) -> Group:
    """A plan as a file for other tools: `foldsearch export --to plan`."""
    parts = [Text(f"{printable(file)}", style="bold"), Text(value["plan"], style="dim"), Text()]
    tools = (
        ("transformers", "config.json"),
        ("llama_quantize", "llama-quantize"),
        ("mergekit", "mergekit-yaml"),
    )
    for key, name in tools:
        words = "in the file" if value[key] is not None else f"none: {value['why_not'][key]}"
        parts.append(Text(f"{name}: {words}"))
    return Group(*parts, Text(f"The weights are {value['weights']}."))


def export_table(report: ExportReport, folder: Path) -> Group:
    """What was shipped, beside dense: `foldsearch export`."""
    names = ("", report.runtime, "dense", "ratio")
    cells = zip(*report.rows, strict=True)
    table = Grid(
        tuple(
            Column(Text(name), tuple(map(Text, column)), right=0 < number < 3)
            for number, (name, column) in enumerate(zip(names, cells, strict=True))
        ),
        first_is_dim=False,
    )
    notes = [*(f"speed of {words}" for words in report.unsteady), report.how_measured]
    notes += filter(None, [report.latency_words])
    tolerance = f"at most {report.logits_tolerance:g} allowed" if report.logits_tolerance else "none allowed"
    checks = [
        "no weight missing or unexpected",
        f"logits differ by {report.logits_difference:.2g} of their RMS ({tolerance})",
        f"cached decoding differs from a full forward by {report.decode_difference:.2g} of the logits' RMS "
        f"(at most {report.decode_tolerance:g} allowed)",
        f"perplexity {report.perplexity:.4f}, measured {report.measured_perplexity:.4f}",
        *([report.engine.check] if report.engine else []),
        *([report.chat.check] if report.chat else []),
    ]
    if report.loads_without_foldsearch:
        code = ", with trust_remote_code=True," if report.refused_without_code else ""
        checks.append(f"loads where foldsearch is not installed{code} to the same logits")
    engine = runtime_named(report.runtime).engine
    where = engine.name if engine else "transformers"
    holds = "with a tokenizer" if report.has_tokenizer else "without a tokenizer"
    return Group(
        Text(f"{printable(folder)}", style="bold"),
        Text(f"The {report.runtime} model for {where}, {holds}. How to load it stands in its README.md."),
        Text(),
        table,
        Text(),
        *(Text(note, style="dim") for note in notes),
        Text(),
        Text(f"Verified in a fresh process against {report.held_against}:"),
        *(Padding(Text(check, style="green"), (0, 0, 0, 2)) for check in checks),
        *(
            Padding(Text(note, style="yellow"), (0, 0, 0, 2))
            for note in (report.engine_note, report.chat.note if report.chat else "", *report.notes)
            if note
        ),
    )


def family_table(family: Family, folder: Path) -> Group:
    """Points that share their weights: `foldsearch export --front`."""
    table = _plain_table("folder", "perplexity>", "alone, MB>", "plan")
    for one in family.members:
        table.add_row(one.folder, f"{one.perplexity:,.2f}", f"{one.separate_bytes / 1e6:,.1f}", one.plan)
    stored, separate = family.stored_bytes / 1e6, family.separate_bytes / 1e6
    return Group(
        Text(f"{printable(folder)}", style="bold"),
        Text(
            f"{counted(len(family.members), f'{family.runtime} model')}; each loads where it lies, beside `shared`, "
            "as its README.md says."
        ),
        Text(),
        table,
        Text(),
        Text(
            f"Weights stored: {stored:,.1f} MB; in folders of their own: {separate:,.1f} MB ({stored / separate:.0%})."
        ),
    )


def rechecked_lines(found: Rechecked, folder: Path) -> Group:
    """What checking an export again came to: `foldsearch verify`."""
    report = found.card.report
    kinds = (("green", found.passed), ("yellow", found.skipped), ("red", found.faults))
    return Group(
        Text(f"{printable(folder)}", style="bold"),
        Text(
            f"{printable(report.base_model)}, folded: {report.plan}; for {report.runtime}, in {report.weights}"
        ),
        *(Padding(Text(words, style=style), (0, 0, 0, 2)) for style, lines in kinds for words in lines),
    )


def reproduced_lines(found: Reproduced, folder: Path) -> Group:
    """What making an export again came to, beside its card: `foldsearch reproduce`."""
    table = _plain_table("", "card>", "again>", "apart>", "allowed>")
    for one in found.figures:
        shown = (f"{value:,.6g}" for value in (one.first, one.again))
        style = "" if one.is_equal else "red"
        apart = f"{abs(one.first - one.again):.2g}"
        table.add_row(Text(one.name, style=style), *shown, Text(apart, style=style), f"{one.tolerance:.2g}")
    same = "on the same kind of machine, with as many threads"
    machine = same if found.is_same_machine else "on another kind of machine, or with other threads"
    return Group(
        Text(f"{printable(folder)}", style="bold"),
        Text(f"{found.again.report.plan}, made again {machine}"),
        Text(),
        table,
        Text(),
        Text(f"Files with the same hash: {', '.join(map(printable, found.equal)) or 'none'}"),
        Text(f"Files with another hash: {', '.join(map(printable, found.other)) or 'none'}"),
    )


def evaluation_table(asked: Mapping[str, ChoiceQuality], scores: Sequence[TaskScore]) -> Group:
    """What a folded model still knows, beside dense: question files by their names, and tasks."""
    parts: list[RenderableType] = []
    if asked:
        table = _plain_table("questions", "items>", "dense accuracy>", "folded accuracy>", "agreement>")
        _columns(table, "stability>", "eff. items>")
        for name, quality in asked.items():
            table.add_row(
                name,
                f"{quality.items:,}",
                with_error(quality.dense_accuracy, quality.dense_accuracy_se, ".1%"),
                with_error(quality.accuracy, quality.accuracy_se, ".1%"),
                f"{quality.agreement:.1%}",
                f"{quality.stability:.1%}",
                f"{quality.effective_items:,.1f}",
            )
        words = (
            "± one standard error. agreement: share of questions that both get right or both get wrong. stability: the "
            "same, weighted by how far apart dense's perplexities of the options are; eff. items: what those weights "
            "are worth in questions of equal weight."
        )
        if not all(isfinite(quality.accuracy_se) for quality in asked.values()):
            words += " ± —: no standard error, as there is one question."
        parts += [table, Text(), Text(words, style="dim")]
    if scores:
        table = _plain_table("task", "metric", "items>", "dense>", "folded>", "agreement>")
        for score in scores:
            table.add_row(
                score.task,
                score.metric,
                f"{score.items:,}",
                _with_error(score.dense, score.dense_se),
                _with_error(score.folded, score.folded_se),
                "—" if score.agreement is None else f"{score.agreement:.1%}",
            )
        parts += [*([Text()] if parts else []), table]
    return Group(*parts)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else with_error(value, error, ".4f")


def words_table(prompt: str, words: Mapping[str, str]) -> Group:
    """What models add to a prompt, side by side."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, added in words.items():
        table.add_row(Text(name, style="dim"), Text(" ".join(added.split())))
    return Group(Text(f"{prompt} ...", style="bold"), table)


# ---- what the dense model tells


def evidence_table(evidence: Evidence) -> RenderableType:
    """FoldGPT's Fig. 2 for a model: both cosines, and Block Influence with a bar and its rank (1: least)."""
    table = _plain_table("block>", "cos(in, out)>", "cos(start, out)>", "influence>", "rank>", "")
    influence = [1 - cosine for cosine in evidence.block_cosine]
    ranking = sorted(range(len(influence)), key=lambda i: (influence[i], i))
    full = 3 * median(influence)  # the first and the last blocks would flatten all the others
    for i, (near, far) in enumerate(zip(evidence.block_cosine, evidence.start_cosine, strict=True)):
        rank = ranking.index(i) + 1
        style = "bold" if rank <= max(1, len(influence) // 5) else ""
        table.add_row(
            str(i),
            f"{near:.4f}",
            f"{far:+.4f}",
            Text(f"{influence[i]:.4f}", style=style),
            Text(str(rank), style=style),
            Text(bar(influence[i] / full), style=PAIRS[0][0]),
        )
    return table


def bar(share: float, cells: int = 24) -> str:
    """A horizontal bar; a share above 1 ends in an arrow."""
    if share > 1:
        return "█" * (cells - 1) + "▶"
    full, rest = divmod(round(max(share, 0.0) * 8 * cells), 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()
