"""What a run tells whoever listens, in the driver's process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foldsearch.record import Trial
from foldsearch.run import Run


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened in a run; the subclasses say what."""


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something a person should know, in words."""

    text: str


@dataclass(frozen=True, slots=True)
class Preparing(Event):
    """Before the first trial. stage: in words. share: done of the stage, 0 to 1."""

    stage: str
    share: float


@dataclass(frozen=True, slots=True)
class SearchStarted(Event):
    """Trials begin. num_ended: trials of earlier processes of this run. planned: None if only time ends it."""

    run: Run
    num_ended: int
    planned: int | None


@dataclass(frozen=True, slots=True)
class TrialStarted(Event):
    """A trial begins, or goes on after an interruption: then it may have results."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class TrialProgress(Event):
    """Where a running trial is, about once a second. phase: in words. share: done of the phase, 0 to 1."""

    number: int
    phase: str
    share: float


@dataclass(frozen=True, slots=True)
class RungDone(Event):
    """A trial reached a rung; TrialEnded follows if it was its last."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class TrialEnded(Event):
    """A trial ended in this process: its state and reason say how. on_front: whether nothing dominates it so far."""

    trial: Trial
    on_front: bool = False


@dataclass(frozen=True, slots=True)
class TrialRetried(Event):
    """The worker of a trial died; the trial goes on from its last rung in another one."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """After every trial's end. planned, remaining_seconds: None where not known."""

    num_ended: int
    planned: int | None
    elapsed_seconds: float
    remaining_seconds: float | None


@dataclass(frozen=True, slots=True)
class SearchDone(Event):
    """The run is over. front: numbers of the trials that nothing dominates. words: what else a person should know of
    its end; empty where there is nothing. num_screened: plans that were measured before the first trial. num_trained:
    trials whose plans were trained.
    """

    run: Run
    num_finished: int
    num_stopped: int
    num_cut: int
    num_repeated: int
    num_failed: int
    elapsed_seconds: float
    front: tuple[int, ...]
    words: str = ""
    num_screened: int = 0
    num_trained: int = 0


@dataclass(frozen=True, slots=True)
class SearchInterrupted(Event):
    """Ctrl-C: nothing that was finished is lost. resume: the command that goes on."""

    run: Run
    num_running: int
    resume: str


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Nobody listens."""
