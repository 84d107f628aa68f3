"""Signals that stop a program: heard once, remembered, and never in the middle of cleaning up.

Oracle: the exit codes and dispositions of a shell: 128 and the signal's number; what was ignored stays ignored.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from foldsearch import cli
from foldsearch.signals import (
    INSISTS,
    STOPS,
    Stopped,
    check_stopped,
    exit_code,
    handlers_kept,
    stops_raise,
    uninterrupted,
)

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def disposition(signum: int, handler: signal.Handlers | object) -> Iterator[None]:
    before = signal.getsignal(signum)
    signal.signal(signum, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(signum, before)


def stopped(work: Callable[[], object]) -> Stopped:
    """What ends the work while stops raise."""
    with pytest.raises(Stopped) as stop, stops_raise():
        work()
    return stop.value


@pytest.mark.parametrize("signum", STOPS)
def test_each_of_them_raises_and_is_given_back(signum: int) -> None:
    before = {signum: signal.getsignal(signum) for signum in STOPS}

    def work() -> None:
        with stops_raise():
            signal.raise_signal(signum)

    stop = stopped(work)
    assert isinstance(stop, KeyboardInterrupt)
    assert exit_code(stop) == 128 + signum
    assert {signum: signal.getsignal(signum) for signum in STOPS} == before
    check_stopped()  # it is over


def test_one_that_something_dropped_is_raised_again() -> None:
    def work() -> None:
        check_stopped()
        with suppress(KeyboardInterrupt):  # as a finaliser or a library's callback may
            signal.raise_signal(signal.SIGINT)
        check_stopped()

    assert stopped(work).signum == signal.SIGINT


def test_the_signal_is_known_where_a_library_raises_its_own_interrupt() -> None:
    """Ray does: its C++ asks Python for signals, and says KeyboardInterrupt."""

    def work() -> None:
        with suppress(Stopped):
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt

    assert stopped(work).signum == signal.SIGTERM


def test_cleaning_up_is_done_to_its_end() -> None:
    done = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)  # a second one, while the first is dealt with
                done.append("clean")

    assert stopped(work).signum == signal.SIGTERM
    assert done == ["clean"]


def test_a_stop_that_waited_is_raised_at_the_end() -> None:
    done = []

    def work() -> None:
        with uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            check_stopped()
            done.append("whole")
        done.append("never")

    stopped(work)
    assert done == ["whole"]


def test_who_insists_is_heard() -> None:
    heard = []

    def work() -> None:
        with uninterrupted():
            for _ in range(INSISTS + 1):
                heard.append(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    stopped(work)
    assert len(heard) == INSISTS


def test_what_is_ignored_stays_ignored() -> None:
    """A background job of a shell without job control ignores Ctrl-C; nohup ignores SIGHUP."""
    for signum in STOPS:
        with disposition(signum, signal.SIG_IGN), stops_raise():
            signal.raise_signal(signum)
            assert signal.getsignal(signum) is signal.SIG_IGN


def test_who_handles_a_signal_keeps_it() -> None:
    heard = []
    with disposition(signal.SIGTERM, lambda signum, frame: heard.append(signum)), stops_raise():
        signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_handlers_that_a_library_takes_are_given_back() -> None:
    with stops_raise():
        ours = signal.getsignal(signal.SIGTERM)
        with handlers_kept() as give_back:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            give_back()
            assert signal.getsignal(signal.SIGTERM) is ours
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is ours


def test_other_threads_change_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stops_raise(), uninterrupted(), handlers_kept():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# ---- verbs


SLEEPER = """
import sys, time
from pathlib import Path
import foldsearch.api as api
from foldsearch import cli

def try_plan(plan, study, *, folder, progress, notice, **others):
    (folder / "trials").mkdir(parents=True)
    print("ready", flush=True)
    for _ in range(600):  # a signal that comes just before a sleep begins is heard when it ends
        time.sleep(0.1)

api.try_plan = try_plan
cli.entry()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_verb_that_is_stopped_leaves_nothing_half_written(name: str, tmp_path: Path) -> None:
    """Asked twice, as who is in a hurry does."""
    command = [sys.executable, "-c", SLEEPER, "try", "0-3", "--out", "tried"]
    with subprocess.Popen(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert (tmp_path / "tried").is_dir()
        process.send_signal(getattr(signal, name))
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert err == "Stopped.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_dashboard_ends_by_a_signal(
    signum: int, code: int, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is how it is meant to end."""
    from foldsearch.report import board

    monkeypatch.setattr(board, "serve", lambda *args, **kwargs: signal.raise_signal(signum))
    assert cli.main(["dashboard", str(run_path)]) == code
