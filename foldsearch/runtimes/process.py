"""A fresh process that holds a model folder and answers questions about it: the side of the one who asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from foldsearch.errors import FoldsearchError, last_lines
from foldsearch.runtimes import verify

LOADING_SECONDS = 600.0  # a process that has not loaded a model by then has stopped
TRIES = 3  # the threads of llama.cpp stop once in a while; another process goes on then


def room_for(tokens: int) -> int:
    """Tokens that a program takes memory for: of the longest text, and what is written after it."""
    return -(-(tokens + 64) // 256) * 256


class ProcessError(FoldsearchError):
    """The process could not do what was asked; the message is its own words.

    is_silence: it did not answer in time, and was ended.
    """

    is_silence = False


class ModelProcess:
    """Runs runtimes/verify.py until it is closed: as a module of foldsearch, or as a file that cannot import it."""

    def __init__(self, workplace: Path, *, without_foldsearch: bool = False, answers: str = "") -> None:
        """What runs.

        Args:
            workplace: a folder for what it writes, which is nothing that stays.
            without_foldsearch: it cannot import foldsearch.
            answers: the module whose class `Answers` is asked; empty for that of runtimes/verify.py.
        """
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(
                workplace / "modules"
            ),  # the folder's code is copied there, not to the user's cache
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
            "TOKENIZERS_PARALLELISM": "false",
            "GGML_NO_BACKTRACE": "1",  # by a debugger, of which the first lines would be lost
        }
        # -I: neither this folder nor PYTHONPATH is searched, as on a machine that has transformers only
        how = ["-I", str(verify.__file__)] if without_foldsearch else ["-m", verify.__name__]
        self._said = (workplace / f"{'alone' if without_foldsearch else id(self)}.log").open(
            "w+", encoding="utf-8"
        )
        self._child = subprocess.Popen(
            [sys.executable, *how, "alone" if without_foldsearch else "with foldsearch", answers],
            cwd=workplace,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def ask(self, what: str, *, seconds: float | None = None, **arguments: Any) -> dict[str, Any]:
        """One question and its answer (see `foldsearch.runtimes.verify.Answers`).

        seconds: after so many without an answer the process is ended; None waits.

        Raises:
            ProcessError: it failed, the process died, or did not answer in time.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        silent = threading.Event()

        def end() -> None:
            silent.set()
            self._child.kill()

        watch = threading.Timer(seconds, end) if seconds is not None else None
        if watch is not None:
            watch.start()
        try:
            self._child.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            if watch is not None:
                watch.cancel()
        if silent.is_set():
            error = ProcessError(f"the process did not answer within {seconds:.0f} s and was ended")
            error.is_silence = True
            raise error
        if not line:
            code = self._child.wait()
            self._said.seek(0)
            words = last_lines(self._said.read()) or "it said nothing"
            raise ProcessError(f"the process ended with exit code {code}: {words}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ProcessError(last_lines(answer["failed"]))
        return answer

    def __enter__(self) -> ModelProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()  # it holds nothing that has to be put away
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._said):
            if stream is not None:
                with suppress(BrokenPipeError):  # a question that the process did not live to read
                    stream.close()


def in_turns(
    processes: Sequence[ModelProcess],
    *,
    fewest: int,
    most: int,
    seconds: float,
    progress: Callable[[float], object] = lambda share: None,
    silence: float | None = None,
) -> list[list[dict[str, float]]]:
    """Tokens per second of one or several models in turns: first, second, first, second; by round, then by model.

    What the machine does besides then slows all of a round, and their ratios stay.

    Args:
        processes: that have loaded a model each.
        fewest: rounds in any case.
        most: rounds at most.
        seconds: after so many no further round begins.
        progress: told the share that is done.
        silence: seconds without an answer after which a process is ended; None waits.

    Raises:
        ProcessError: one failed, or did not answer in time.
    """
    rounds: list[list[dict[str, float]]] = []
    began = time.monotonic()
    while len(rounds) < fewest or (len(rounds) < most and time.monotonic() - began < seconds):
        rounds.append([process.ask("turn", seconds=silence) for process in processes])
        spent = (time.monotonic() - began) / seconds
        progress(min(len(rounds) / fewest, max(spent, len(rounds) / most), 1.0))
    return rounds
