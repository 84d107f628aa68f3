"""Ctrl-C, SIGTERM and SIGHUP end what runs in one way: by an exception in the main thread, so that all is closed.

A program that is asked to stop by a terminal, a batch system or a container ends alike: nothing half-written stays,
no process is left, and its exit code is 128 and the signal's number, as shells have it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
INSISTS = 4  # so many signals end even what should not be cut short
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop. signum: its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(slots=True)
class _Stop:
    """asked: the signal that came first, 0 if none did. times: how often one came. raised: whether the program has been
    told. held: by how many `uninterrupted`. handlers: who had the signals before.
    """

    asked: int = 0
    times: int = 0
    raised: bool = False
    held: int = 0
    handlers: dict[int, Any] = field(default_factory=dict)


_stop: _Stop | None = None


@contextmanager
def stops_raise() -> Iterator[None]:
    """While entered, each of STOPS raises `Stopped` in the main thread; within another one it changes nothing.

    A signal that is ignored (a job in the background, `nohup`) or that somebody handles keeps what it has.
    """
    global _stop  # noqa: PLW0603  # signals are the process's own
    if _stop is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _stop = _Stop(handlers={s: signal.getsignal(s) for s in STOPS if signal.getsignal(s) in _DEFAULTS})
    try:
        for signum in _stop.handlers:
            signal.signal(signum, _on_stop)
        yield
    except KeyboardInterrupt as error:
        if _stop.asked and not isinstance(error, Stopped):  # a library made its own of it
            raise Stopped(_stop.asked) from error
        raise
    finally:
        for signum, handler in _stop.handlers.items():
            signal.signal(signum, handler)
        _stop = None


def check_stopped() -> None:
    """Raise `Stopped` once more where a signal came and somebody dropped the exception.

    Finalisers and callbacks of libraries do, and the program would go on as if nobody had asked it to stop.
    """
    if _stop is not None and _stop.asked and not _stop.held:
        _raise(_stop)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While entered, a stop waits: what closes and cleans up is done to its end. Who insists is heard (`INSISTS`)."""
    stop = _stop
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    stop.held += 1
    try:
        yield
    finally:
        stop.held -= 1
    if stop.asked and not stop.raised and not stop.held:
        _raise(stop)


@contextmanager
def handlers_kept() -> Iterator[Callable[[], None]]:
    """Give STOPS back to whom they belong after a library took them for its own.

    Yields:
        What gives them back, to be called where they must not wait for the end.
    """
    before = {signum: signal.getsignal(signum) for signum in STOPS}

    def give_back() -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # which alone may
        for signum, handler in before.items():
            if handler is not None:  # None: not set from Python, and so not to be set from Python
                signal.signal(signum, handler)

    try:
        yield give_back
    finally:
        give_back()


def ignore_stops() -> None:
    """From here to the end of the process there is nothing left to stop."""
    for signum in STOPS:
        with suppress(ValueError):  # not the main thread
            signal.signal(signum, signal.SIG_IGN)


def exit_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a program that ends by a signal: 129 (SIGHUP), 130 (Ctrl-C), 143 (SIGTERM)."""
    if _stop is not None and _stop.asked:
        return 128 + _stop.asked
    return 128 + (stop.signum if isinstance(stop, Stopped) else signal.SIGINT)


def _on_stop(signum: int, frame: object) -> None:
    assert _stop is not None
    _stop.asked = _stop.asked or signum
    _stop.times += 1
    if not _stop.held or _stop.times >= INSISTS:
        _raise(_stop)


def _raise(stop: _Stop) -> None:
    stop.raised = True
    raise Stopped(stop.asked)
