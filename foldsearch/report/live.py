"""A run as it happens: one line a trial when it ends, and where the running ones are.

On a terminal the running trials are bars at the bottom of the screen; in a log file there are lines only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from foldsearch.paths import printable
from foldsearch.plan.result import rounded
from foldsearch.record import Trial
from foldsearch.report.terminal import budget_words, ruler, strip_text, times_words
from foldsearch.report.view import author, counted, gb
from foldsearch.search.events import (
    Event,
    Notice,
    Preparing,
    Progress,
    RungDone,
    SearchDone,
    SearchInterrupted,
    SearchStarted,
    TrialEnded,
    TrialProgress,
    TrialRetried,
    TrialStarted,
)

if TYPE_CHECKING:
    from foldsearch.plan.cost import Cost

QUIET_SECONDS = 25  # in a log file, a line after so long without one: at least every half minute
_LOOK_SECONDS = 1.0
_SHARE_TO_ESTIMATE = 0.05  # of a stage, before its end is guessed
_BY_WIDTH = 12  # characters for who proposed a trial


class Pulse:
    """Says where the work is when nothing was said for a while; a thread of its own looks, while it is entered."""

    def __init__(
        self,
        say: Callable[[str], object],
        words: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`say`: prints a line. `words`: where the work is now. `clock`: in seconds."""
        self._say, self._words, self._clock = say, words, clock
        self._said_at = clock()
        self._over = threading.Event()

    def __enter__(self) -> Pulse:
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def said(self) -> None:
        """A line was printed by somebody."""
        self._said_at = self._clock()

    def beat(self) -> None:
        """Print a line if it is time."""
        if self._clock() - self._said_at >= QUIET_SECONDS:
            self.said()
            self._say(self._words())

    def _run(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            with suppress(OSError, ValueError):  # nobody reads on: whoever prints the results finds out
                self.beat()


class StageLines:
    """The stages of a verb as lines of a log: one when a stage begins, and at least one every half minute."""

    def __init__(self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        """`say`: prints a line. `clock`: in seconds."""
        self._say, self._clock = say, clock
        self._stage, self._share, self._began = "preparing", 0.0, clock()
        self.pulse = Pulse(say, self.words, clock)

    def __call__(self, stage: str, share: float) -> None:
        """A stage is under way, and so much of it is done."""
        if stage != self._stage:
            self._stage, self._began = stage, self._clock()
            self._say(f"{printable(stage)} ...")
            self.pulse.said()
        self._share = share

    def words(self) -> str:
        """Where the stage is: its share, how long it has taken, and about how long it will."""
        took = self._clock() - self._began
        parts = [printable(self._stage) + (f" {self._share:.0%}" if self._share else ""), duration(took)]
        if self._share >= _SHARE_TO_ESTIMATE:
            parts.append(f"about {duration(took * (1 - self._share) / self._share)} left")
        return " · ".join(parts)


class RunDisplay:
    """Prints a run's events; use it as a context manager, and pass it as `on_event`."""

    def __init__(self, console: Console) -> None:
        """`console`: where to print."""
        self._console = console
        self._live: Live | None = None
        self._dense: Cost | None = None
        self._waiting = "preparing"
        self._waiting_share = 0.0
        self._stages = StageLines(lambda words: self._print(Text(words, style="dim")))
        self._pulse = Pulse(lambda words: self._print(Text(words, style="dim")), self._where)
        self._began = time.monotonic()
        self._running: dict[int, tuple[str, float]] = {}  # number: phase and share
        self._trials: dict[int, Trial] = {}  # those that run
        self._progress = Progress(0, None, 0.0, None)
        self._progress_at = self._began

    def __enter__(self) -> RunDisplay:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self._bottom, refresh_per_second=4, transient=True
            )
            self._live.start()
        else:
            self._pulse.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pulse.__exit__()
        if self._live is not None:
            with suppress(OSError):  # the terminal may be gone
                self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Notice():
                self._print(Text(f"Note: {event.text}", style="yellow"))
            case Preparing():
                self._prepare(event)
            case SearchStarted():
                self._start(event)
            case TrialStarted(trial) | RungDone(trial):
                self._trials[trial.number] = trial
                self._running.setdefault(trial.number, ("starting", 0.0))
            case TrialProgress():
                self._running[event.number] = (event.phase, event.share)
            case TrialEnded(trial, on_front):
                self._end(trial, on_front)
            case TrialRetried():
                self._print(
                    Text(
                        f"trial {event.number} goes on in a new worker: {printable(event.reason)}",
                        style="yellow",
                    )
                )
            case Progress():
                ended = event.num_ended != self._progress.num_ended
                self._progress, self._progress_at = event, time.monotonic()
                if self._live is None and ended:
                    self._print(Text(f"      {self._overall()}", style="dim"))
            case SearchInterrupted():
                under_way = counted(event.num_running, "trial") + (
                    " was" if event.num_running == 1 else " were"
                )
                self._print(f"Stopped; nothing that was finished is lost, {under_way} under way.")
                self._console.print(f"Go on with: {event.resume}", soft_wrap=True)  # one line, to be copied
            case SearchDone():
                self._done(event)
            case _:
                raise AssertionError(f"an event without words: {event}")

    # ---- lines

    def _print(self, what: RenderableType) -> None:
        self._pulse.said()
        self._console.print(what)

    def _where(self) -> str:
        """Where the run is, on one line."""
        if self._waiting:
            return self._stages.words()
        trials = [
            f"trial {number}: {phase}" + (f" {share:.0%}" if share else "")
            for number, (phase, share) in sorted(self._running.copy().items())
        ]
        return f"      {' · '.join([self._overall(), *trials])}"

    def _prepare(self, event: Preparing) -> None:
        if self._live is None:
            self._stages(event.stage, event.share)
        self._waiting = event.stage
        self._waiting_share = event.share

    def _start(self, event: SearchStarted) -> None:
        self._waiting = ""
        self._progress, self._progress_at = (
            Progress(event.num_ended, event.planned, 0.0, None),
            time.monotonic(),
        )
        run, study = event.run, event.run.study
        self._dense = run.dense
        planned = counted(event.planned, "trial") if event.planned is not None else "trials"
        limit = f" in at most {duration(study.seconds)}" if study.seconds is not None else ""
        times = f", {times_words(run.timed_dense)}" if run.timed_dense.prompt_ms is not None else ""
        before = f", {event.num_ended} of them ended before" if event.num_ended else ""
        self._print(
            Text.assemble(
                (printable(run.path), "bold"),
                f": {planned}{limit}{before}; {budget_words(run)}, dense needs "
                f"{gb(run.dense.memory_bytes, run.dense)} GB and {run.dense.flops:.3g} FLOPs per token{times}",
            )
        )
        rungs = ", ".join(f"{tokens:,}" for tokens in study.rungs)
        healed = f"healing on some {study.healed_tokens:,} tokens and " if study.healed_tokens else ""
        words = f"after {healed}recovery on {rungs} tokens, is measured on the search texts"
        self._print(Text(f"KL to dense in nats per token, {words}"))
        heads = f"{'trial':>5}  {'by':<{_BY_WIDTH}}  {ruler(run.num_blocks):<{run.num_blocks}}  {'GB':>7}  KL"
        self._print(Text(heads, style="bold", no_wrap=True))

    def _end(self, trial: Trial, on_front: bool) -> None:
        self._running.pop(trial.number, None)
        self._trials.pop(trial.number, None)
        line = Text(f"{trial.number:>5}  {_by(trial):<{_BY_WIDTH}}  ")
        if trial.draft is not None:
            line.append_text(strip_text(trial.plan))
            line.append(f"  {gb(trial.cost.memory_bytes, self._dense or trial.cost):>7}  ")
            for rung, result in enumerate(trial.results):
                style = "bold" if rung == len(trial.results) - 1 else ""
                line.append(("" if rung == 0 else " → ") + rounded(result.quality.kl, ".3f"), style=style)
            line.append("  ")
        line.append_text(_outcome(trial, on_front))
        if setback := trial.setback_words:
            line.append(f"  {setback}", style="yellow")
        self._print(line)
        if (gated := trial.gated) is not None:
            self._print(Text(f"       gates: {gate_words(gated)}", style="dim"))

    def _done(self, event: SearchDone) -> None:
        parts = [f"{counted(event.num_finished, 'trial')} finished", f"{event.num_stopped} stopped early"]
        if event.num_cut:
            parts.append(f"{event.num_cut} cut by the time limit")
        if event.num_repeated:
            parts.append(f"{event.num_repeated} came to a plan that was known")
        if event.num_failed:
            parts.append(f"{event.num_failed} failed")
        if event.num_screened:
            parts = [
                f"{counted(event.num_screened, 'plan')} measured",
                f"{event.num_trained} trained",
                *parts[2:],
            ]
        self._print(
            f"Done in {duration(event.elapsed_seconds)}: {', '.join(parts)}, {len(event.front)} on the front."
        )
        if event.words:
            self._print(Text(printable(event.words), style="yellow"))

    # ---- the bottom of a terminal

    def _overall(self) -> str:
        p = self._progress
        since = time.monotonic() - self._progress_at
        of_all = "" if p.planned is None else f"{p.num_ended} of "
        parts = [of_all + counted(p.num_ended if p.planned is None else p.planned, "trial")]
        parts.append(duration(p.elapsed_seconds + since))
        if p.remaining_seconds is not None:
            left = max(0.0, p.remaining_seconds - since)
            parts.append(f"about {duration(left)} left" if left >= 1 else "ending")
        return " · ".join(parts)

    def _bottom(self) -> RenderableType:
        if self._waiting:
            done = f" {self._waiting_share:.0%}" if self._waiting_share else ""
            return Text(
                f"{printable(self._waiting)}{done} · {duration(time.monotonic() - self._began)}", style="dim"
            )
        table = Table.grid(padding=(0, 2, 0, 0))
        for number, (phase, share) in sorted(self._running.items()):
            by = _by(self._trials[number]) if number in self._trials else ""
            table.add_row(
                Text(f"{number:>5}"),
                Text(f"{by:<{_BY_WIDTH}}"),
                ProgressBar(total=1.0, completed=share, width=24),
                Text(phase, style="dim"),
            )
        return Group(table, Text(f"       {self._overall()}", style="bold"))


def _by(trial: Trial) -> str:
    """Who proposed a trial."""
    return author(trial.proposal) if trial.proposal is not None else ""


def _outcome(trial: Trial, on_front: bool) -> Text:
    """How a trial ended."""
    if trial.state in ("finished", "repeat") and trial.known_from is not None:
        return Text(f"same plan as trial {trial.known_from}", style="dim")
    if trial.state == "finished":
        return Text("● on the front", style="bold") if on_front else Text("dominated", style="dim")
    if trial.state == "stopped":
        return Text(f"stopped at rung {len(trial.results) - 1}: {trial.reason}", style="dim")
    return Text(printable(trial.reason), style="dim" if trial.state == "cut" else "red")


def gate_words(gates: Mapping[str, Any]) -> str:
    """The gated training behind a plan, in words; polarized: share of the gates outside [0.05, 0.95]."""
    words = (
        f"{counted(gates['steps'], 'step')}, {gates['tokens']:,} tokens, {gates['polarized']:.0%} polarized"
    )
    words += f", loss {gates['soft_loss']:.3f} gated → {gates['hard_loss']:.3f} dropped"
    return words + (" (from the cache)" if gates["from_cache"] else "")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, 1:02:05; minutes and seconds, 2:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
