"""What runs in a worker process: one trial after the other, a rung at a time."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from ray import cloudpickle, tune

from foldsearch.errors import describe_error, quote_error
from foldsearch.files import alone, disk_is_full, write_json
from foldsearch.machine import collect_seldom, spin_briefly
from foldsearch.progress import TimeUp, TrialTimeUp
from foldsearch.proposal import Proposal
from foldsearch.record import Trial, read_trial
from foldsearch.run import TrialFolder
from foldsearch.search.messages import (
    DiskIsFull,
    EndedEarly,
    Failed,
    Measured,
    Message,
    Probed,
    StorageLost,
    TimeIsUp,
    encode,
)
from foldsearch.search.shipping import Cargo, NodeSite
from foldsearch.store import StoreError

PROGRESS_SECONDS = 1.0
HAND_IN_SECONDS = 10.0  # that a worker which ends itself has to say so to other nodes
LEAST_GRACE = 30.0  # seconds that an overdue trial has to say where it is, before its worker ends itself


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Tune makes it; what `setup` is given is read in there, which imports torch."""
        collect_seldom()
        spin_briefly()
        super().__init__(*args, **kwargs)

    def setup(  # type: ignore[override]  # `runner_for` adds the others
        self, config: dict[str, Any], context: Any, trial: str, deadline: float | None, cargo: Cargo | None
    ) -> None:
        """`config`: number and proposal of the trial, and `probe`: a larger one, to be trained for a step before it;
        the others are the same for all trials of a run.

        deadline: when the time of the run is up, by the monotonic clock of this machine; None: never, or `cargo` says.
        cargo: what this worker needs where it may not see the run's folder; None where it does.
        """
        # Ray sets 1, and torch reads it when it is first imported.
        os.environ["OMP_NUM_THREADS"] = str(context.threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(context.threads)
        self._site = None if cargo is None else NodeSite(cargo)
        self._context = context if self._site is None else self._site.open(context)
        self._trial = load_function(trial)
        self._deadline = deadline
        self._held = ExitStack()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial."""
        self._held.close()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # others may share the device
        if self._site is not None:
            self._site.put_away(self._number)
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """Close the trial that runs, if one does."""
        self._held.close()
        if self._site is not None:
            self._site.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Which trial folder holds the state."""
        return {"number": self._number}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing to load: the trial folder is looked into when the trial begins."""

    def _begin(self, config: dict[str, Any]) -> None:
        self._number = config["number"]
        self._proposal = Proposal.from_json(config["proposal"])
        probe = config.get("probe")
        self._probe = None if probe is None else Proposal.from_json(probe)
        self._place: TrialFolder = self._context.run.trial(self._number)
        self._steps: Iterator[Trial] | None = None

    def step(self) -> dict[str, Any]:
        """Run to the next rung.

        Errors are told, not raised: raised ones would be tried again, and most would only happen again. Only a
        worker that dies is worth another try, or one whose GPU is in a state that no later trial could use.
        """
        if self._probe is not None:
            return {"result": encode(self._probed())}
        message = self._next()
        if self._site is not None:
            try:
                self._site.hand_in(self._number)
            except StoreError as error:
                message = StorageLost(str(error))
        return {"result": encode(message)}

    def _probed(self) -> Message:
        from foldsearch.probe import probe_memory  # it needs torch, which fakes do without

        probe, self._probe = self._probe, None
        assert probe is not None, "who asks has looked"
        try:
            return Probed(probe_memory(probe, self._context, self._tell))
        except Exception as error:  # the trial goes on: it may not meet the same
            return Probed(quote_error("the largest plan that may be proposed could not be probed", error))

    def _next(self) -> Message:
        try:
            if self._steps is None:
                self._steps = self._start()
                # `run_trial` will not yield again what its folder has, and the study may lack it.
                if (known := read_trial(self._place)) is not None:
                    return Measured(known, again=True)
            return Measured(next(self._steps))
        except TrialTimeUp as stop:
            return Failed(str(stop))
        except TimeUp as stop:
            return TimeIsUp(str(stop))
        except StoreError as error:
            return StorageLost(str(error))
        except StopIteration:
            return EndedEarly()
        except (Exception, SystemExit) as error:  # a plug-in may call sys.exit
            if type(error).__name__ == "AcceleratorError":  # torch's; without torch there is none
                raise
            if disk_is_full(error):
                return DiskIsFull(describe_error(error))
            self._place.error.write_text(traceback.format_exc())
            return Failed(describe_error(error))

    def _start(self) -> Iterator[Trial]:
        # The worker of a driver that was killed may live a moment longer: wait until it let go.
        self._held.enter_context(alone(self._place.lock))
        deadline = self._deadline
        if self._site is not None:
            self._site.take_up(self._number)
            left = self._site.left()
            deadline = None if left is None else time.monotonic() + left
        if (known := read_trial(self._place)) is not None and known.proposal != self._proposal:
            # Of a study that was begun again: what this proposal comes to is not there.
            aside = self._place.path.with_name(f"{self._place.path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(self._place.path, aside)
            for path in (*self._place.kept, self._place.overdue, self._place.error):
                path.unlink(missing_ok=True)
            shutil.rmtree(self._place.further.path, ignore_errors=True)
            known = None
        progress = _Progress(self._tell, deadline)
        if (seconds := self._context.run.study.trial_seconds) is not None:
            self._limit(seconds, known, progress)
        steps: Iterator[Trial] = self._trial(
            self._proposal, self._context, number=self._number, progress=progress
        )
        if hasattr(steps, "close"):
            self._held.callback(steps.close)
        return steps

    def _tell(self, phase: str, share: float) -> None:
        """Say where the trial is, for the search to read."""
        if self._site is None:
            write_json(self._place.progress, {"phase": phase, "share": share})
        else:
            self._site.tell(self._number, phase, share)

    def _limit(self, seconds: float, known: Trial | None, progress: _Progress) -> None:
        """Let the trial fail when it has taken longer than it may, and the worker end if it does not hear of that.

        Raises:
            TrialTimeUp: an earlier worker ended so.
        """
        words = f"timed out: a trial may take {seconds:g} s"
        if self._place.overdue.exists():
            self._place.overdue.unlink()
            raise TrialTimeUp(f"{words}, and this one said nothing for longer, so its worker was ended")
        spent = 0.0
        if known is not None and known.results:
            # What was taken from another trial came with that one's seconds.
            taken = (result.seconds for result in known.results if result.known_from is not None)
            spent = known.last.seconds - max(taken, default=0.0)
        left = max(0.0, seconds - spent)
        progress.limit(time.monotonic() + left, words)
        watch = threading.Timer(left + max(LEAST_GRACE, seconds / 2), self._end_overdue)
        watch.daemon = True
        watch.start()
        self._held.callback(watch.cancel)

    def _end_overdue(self) -> None:
        """End this worker, whatever it is at: it may hang in a library. The next one says why."""
        self._place.overdue.touch()
        if self._site is not None:  # the next worker may be on another node
            told = threading.Thread(target=self._site.hand_in, args=(self._number,), daemon=True)
            told.start()
            told.join(HAND_IN_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


class _Progress:
    """Where a trial is, for the search to read; told about once a second. It ends a trial whose time is up.

    A trial says where it is after every step, so it ends within a step. What measures is let finish: a result is what
    the time was spent for.
    """

    def __init__(self, tell: Callable[[str, float], None], deadline: float | None) -> None:
        self._tell = tell
        self._deadline = deadline
        self._last = ("", -1.0)
        self._called = ("", time.monotonic())
        self._limit: tuple[float, str] | None = None

    def limit(self, until: float, words: str) -> None:
        """End the trial as a failed one at a time of the monotonic clock; words: that say so."""
        self._limit = (until, words)

    def __call__(self, phase: str, share: float) -> None:
        self._check_time(phase, share)
        now = time.monotonic()
        if phase != self._last[0] or now - self._last[1] >= PROGRESS_SECONDS:
            self._last = (phase, now)
            self._tell(phase, share)

    def _check_time(self, phase: str, share: float) -> None:
        """The time is up where the next step, if it takes as long as this one, would end after it."""
        (before, then), now = self._called, time.monotonic()
        self._called = (phase, now)
        if self._limit is not None and now > self._limit[0]:
            raise TrialTimeUp(f"{self._limit[1]}, and this one was still in its {phase}")
        step = now - then if phase == before else 0.0
        if self._deadline is not None and share < 1 and now + step > self._deadline:
            raise TimeUp(f"the time was up in its {phase}")


def runner_for(**given: Any) -> type[TrialRunner]:
    """What Tune makes workers of: a `TrialRunner` with all that its `setup` is given beside the config.

    It travels with the class. Tune's own way puts it into Ray's object store, and where the raylet is lost with
    something of ours in there, Ray's C++ ends our process at once, with code 1 and without a word.
    """
    packed: bytes = cloudpickle.dumps(given)  # type: ignore[no-untyped-call]  # read in `setup`, which imports torch

    class Runner(TrialRunner):
        def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
            super().setup(config, **cloudpickle.loads(packed))

    Runner.__name__ = Runner.__qualname__ = TrialRunner.__name__  # what its process is called
    return Runner
