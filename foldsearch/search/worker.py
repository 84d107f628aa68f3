"""What runs in a worker process: one trial after the other, a rung at a time."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray import tune

from foldsearch.errors import describe_error
from foldsearch.files import alone, disk_is_full, write_json
from foldsearch.progress import TimeUp
from foldsearch.proposal import Proposal
from foldsearch.record import Trial, read_trial
from foldsearch.run import TrialFolder
from foldsearch.search.messages import DiskIsFull, EndedEarly, Failed, Measured, Message, TimeIsUp, encode

PROGRESS_SECONDS = 1.0


def load_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, function = name.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


class TrialRunner(tune.Trainable):
    """One trial at a time in a worker process that outlives it (`reuse_actors`).

    The checkpoint of a trial is its folder: `run_trial` leaves its state there after every rung, so a new worker
    needs nothing else to go on.
    """

    def setup(  # type: ignore[override]  # tune.with_parameters adds the others
        self, config: dict[str, Any], context: Any, trial: str, deadline: float | None
    ) -> None:
        """`config`: number and proposal of the trial; the others are the same for all trials of a run.

        deadline: when the time of the run is up, in seconds since the epoch; None: never.
        """
        # Ray sets 1, and torch reads it when it is first imported.
        os.environ["OMP_NUM_THREADS"] = str(context.threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(context.threads)
        self._context, self._trial = context, load_function(trial)
        self._deadline = deadline
        self._held = ExitStack()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial."""
        self._held.close()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # others may share the device
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Close the trial that runs, if one does."""
        self._held.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Which trial folder holds the state."""
        return {"number": self._number}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load: the trial folder is looked into when the trial begins."""

    def _begin(self, config: dict[str, Any]) -> None:
        self._number = config["number"]
        self._proposal = Proposal.from_json(config["proposal"])
        self._place: TrialFolder = self._context.run.trial(self._number)
        self._steps: Iterator[Trial] | None = None

    def step(self) -> dict[str, Any]:
        """Run to the next rung.

        Errors are told, not raised: raised ones would be tried again, and most would only happen again. Only a
        worker that dies is worth another try, or one whose GPU is in a state that no later trial could use.
        """
        return {"result": encode(self._next())}

    def _next(self) -> Message:
        try:
            if self._steps is None:
                self._steps = self._start()
                # `run_trial` will not yield again what its folder has, and the study may lack it.
                if (known := read_trial(self._place)) is not None:
                    return Measured(known, again=True)
            return Measured(next(self._steps))
        except TimeUp as stop:
            return TimeIsUp(str(stop))
        except StopIteration:
            return EndedEarly()
        except Exception as error:
            if type(error).__name__ == "AcceleratorError":  # torch's; without torch there is none
                raise
            if disk_is_full(error):
                return DiskIsFull(describe_error(error))
            self._place.error.write_text(traceback.format_exc())
            return Failed(describe_error(error))

    def _start(self) -> Iterator[Trial]:
        # The worker of a driver that was killed may live a moment longer: wait until it let go.
        self._held.enter_context(alone(self._place.lock))
        progress = _ProgressFile(self._place.progress, self._deadline)
        steps: Iterator[Trial] = self._trial(
            self._proposal, self._context, number=self._number, progress=progress
        )
        if hasattr(steps, "close"):
            self._held.callback(steps.close)
        return steps


class _ProgressFile:
    """Where a trial is, for the driver to read; written about once a second. It ends a trial whose time is up.

    A trial says where it is after every step, so it ends within a step. What measures is let finish: a result is what
    the time was spent for.
    """

    def __init__(self, path: Path, deadline: float | None) -> None:
        self._path = path
        self._deadline = deadline
        self._last = ("", -1.0)
        self._called = ("", time.time())

    def __call__(self, phase: str, share: float) -> None:
        self._check_time(phase, share)
        now = time.monotonic()
        if phase != self._last[0] or now - self._last[1] >= PROGRESS_SECONDS:
            self._last = (phase, now)
            write_json(self._path, {"phase": phase, "share": share})

    def _check_time(self, phase: str, share: float) -> None:
        """The time is up where the next step, if it takes as long as this one, would end after it."""
        (before, then), now = self._called, time.time()
        self._called = (phase, now)
        step = now - then if phase == before else 0.0
        if self._deadline is not None and share < 1 and now + step > self._deadline:
            raise TimeUp(f"the time was up in its {phase}")
