"""A trial as it stands on disk: enough to go on from its last rung, and to rebuild its model.

No plan is trained twice: a file a plan says which trial measures it. Plans whose adapters start in different ways are
different ones, so the start is part of the file's name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from foldsearch.codec import from_json, to_json
from foldsearch.context import TrialContext
from foldsearch.errors import RunError
from foldsearch.files import replace_atomically, write_json
from foldsearch.machine import Machine
from foldsearch.model.content import file_hash
from foldsearch.model.recover import saved_tokens
from foldsearch.paths import printable
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import TrialResult
from foldsearch.proposal import Proposal
from foldsearch.run import TrialFolder

WAIT_SECONDS = 0.2  # between looks at a trial that measures the same plan


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A trial as it stands on disk: enough to go on from its last rung.

    proposal: what was tried. plan: that it came to. gates: see `TrialResult`.
    """

    proposal: Proposal
    plan: FoldPlan
    gates: dict[str, Any] | None
    results: tuple[TrialResult, ...]
    machine: Machine | None = None  # that the last result was measured on
    files: Mapping[str, str] = field(
        default_factory=dict
    )  # hashes of those that the last result was measured with

    @property
    def has_trained(self) -> bool:
        """Whether any of its results is of a trained model."""
        return bool(self.results) and self.results[-1].recovery_tokens > 0

    def worth(self, other: TrialRecord) -> tuple[TrialResult, ...]:
        """The results that hold for another trial of the same plan too.

        All of them if that one would train in the same way, or if this one has reached the last rung: no plan is
        trained twice. Else (this one was stopped, or its training diverged) only those of the untrained model.
        """
        same = self.proposal.recovery == other.proposal.recovery
        last = self.results[-1]
        if same or (last.is_last_rung and not last.training_diverged):
            return self.results
        return tuple(result for result in self.results if not result.recovery_tokens)

    def write(self, folder: TrialFolder, machine: Machine) -> None:
        """Keep it in the trial's folder, with the machine that its last result was measured on."""
        paths = (folder.start, folder.recovered)
        files = {path.name: file_hash(path) for path in paths if path.exists()}
        write_json(folder.record, to_json(replace(self, machine=machine, files=files)))

    @classmethod
    def read(cls, folder: TrialFolder) -> TrialRecord | None:
        """Read what `write` kept; None where the trial has no result yet."""
        return from_json(cls, json.loads(folder.record.read_text())) if folder.record.exists() else None


def check_state(record: TrialRecord, folder: TrialFolder) -> None:
    """Check that the files from which a trial's model is rebuilt are as they were when its last result was measured.

    Raises:
        RunError: one was changed.
    """
    for path in (folder.start, folder.recovered):
        ours = record.files.get(path.name)
        if path == folder.recovered and is_ahead(record, folder):
            continue  # the trial was killed between its training and its result
        if ours is not None and path.exists() and (theirs := file_hash(path)) != ours:
            raise RunError(
                f"a trial is rebuilt only from what it was measured with: '{printable(path)}' had the hash {ours[:12]} "
                f"(sha256), but now has {theirs[:12]}. Put the old file back, or choose another trial."
            )


def is_ahead(record: TrialRecord, folder: TrialFolder) -> bool:
    """Whether the trained weights on disk have seen other tokens than the last result says."""
    try:
        return saved_tokens(folder.recovered) != record.results[-1].kept_tokens
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return False  # it cannot be read at all


def copy_state(owner: TrialFolder, folder: TrialFolder, *, trained: bool) -> None:
    """Copy the start of another trial of the same plan and, if asked, what that one trained."""
    for file in (owner.start, owner.recovered, owner.optimizer) if trained else (owner.start,):
        if file.exists():  # not every plan has a start of its own
            replace_atomically(folder.path / file.name, partial(shutil.copyfile, file))


def plan_path(context: TrialContext, record: TrialRecord) -> Path:
    """The file that says which trial measures a plan; one for each start of adapters, which is another model."""
    start = record.proposal.fold.adapter_start
    return context.run.plan(record.plan.id if start is None else f"{record.plan.id}-{start}")


@contextmanager
def hold_plan(path: Path, context: TrialContext) -> Iterator[tuple[bool, int | None]]:
    """Hold the lock of a plan, so that no two running trials measure it.

    Where another trial has begun to measure it, this waits for that one's first result.

    Yields:
        Whether the lock is held here, and the number of the trial that measures, or has measured, the plan.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lock of the system and not a file that says "mine": it is let go of when its process is killed.
    lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    try:
        while True:
            free = _is_free(lock)
            owner = json.loads(path.read_text())["trial"] if path.exists() else None
            # The first result of the other trial is enough: the lock itself is held until its last rung.
            if free or (owner is not None and TrialRecord.read(context.run.trial(owner)) is not None):
                break
            time.sleep(WAIT_SECONDS)
        yield free, owner
    finally:
        os.close(lock)  # lets go of the lock


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
