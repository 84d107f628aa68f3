"""A trial as a value: what its folder, the study's row, the messages of workers and reports all hold.

A trial's folder keeps it after every rung, so that it can go on from there and its model can be rebuilt. The study
keeps the same value (see `foldsearch.search.records`). What is told of several trials, such as their front, is computed
from a list of them.

No plan is trained twice: a file a plan says which trial measures it. Plans whose adapters start in different ways are
different ones, so the start is part of the file's name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from foldsearch.codec import from_json, to_json
from foldsearch.errors import FoldsearchError, RunError, quote_error
from foldsearch.files import replace_atomically, write_json
from foldsearch.machine import Machine
from foldsearch.model.content import file_hash
from foldsearch.paths import printable
from foldsearch.plan.cost import GB, Cost
from foldsearch.plan.front import non_dominated
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Healing, Quality, RungResult, rounded, trained_for
from foldsearch.plan.stored import AS_TARGET, StoredTypes
from foldsearch.proposal import Fold, Given, Proposal, RecoveryChoice, Removed
from foldsearch.run import Run, TrialFolder
from foldsearch.spec.study import Objective

WAIT_SECONDS = 0.2  # between looks at a trial that measures the same plan

State = Literal["waiting", "running", "cut", "finished", "stopped", "infeasible", "failed", "repeat"]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a proposal came to.

    plan: which blocks run. cost: its price on the target. gates: what the criterion that chose its blocks has told of
    how (see `foldsearch.criteria.Choice`); of gated training steps, tokens, polarized, ranking, whether from the cache.
    """

    plan: FoldPlan
    cost: Cost
    gates: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """All that is known of one trial.

    Attributes:
        number: of the trial.
        state: "waiting" in line; "running" also where it was interrupted; "cut": the time limit interrupted it, and a
            run that goes on begins with it; "finished": it reached the last rung, or its training diverged after a
            state that is kept; "stopped" by halving; "infeasible": above the budget, never built; "failed"; "repeat":
            another trial measures its plan, with other recovery settings or at this moment.
        proposal: what is tried; None until it is asked for.
        draft: what the proposal came to; None until its blocks are chosen.
        healing: of the untrained model; None where nothing was healed.
        results: of its rungs so far, in order.
        reason: of a failure, a stop or a divergence, in words.
        closing: whether it was added when the search had spent its trials (see `foldsearch.search.proposer`).
        machine: that the latest result was measured on; None where the trial itself measured nothing.
        files: hashes of those that the latest result was measured with, by their names.
    """

    number: int
    state: State = "running"
    proposal: Proposal | None = None
    draft: Draft | None = None
    healing: Healing | None = None
    results: tuple[RungResult, ...] = ()
    reason: str = ""
    closing: bool = False
    machine: Machine | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    # ---- what it is

    @property
    def plan(self) -> FoldPlan:
        """The plan that its proposal came to, which must be known."""
        assert self.draft is not None, f"trial {self.number} has no plan yet"
        return self.draft.plan

    @property
    def gated(self) -> Mapping[str, Any] | None:
        """Of the gated training that chose its blocks; None where another criterion did, or none."""
        if self.draft is None or self.proposal is None or self.proposal.removed is None:
            return None
        return self.draft.gates if self.proposal.removed.criterion == "gate" else None

    @property
    def cost(self) -> Cost:
        """What its plan costs on the target; the plan must be known."""
        assert self.draft is not None, f"trial {self.number} has no plan yet"
        return self.draft.cost

    @property
    def fold(self) -> Fold | Given:
        """How its model is folded; it must have been proposed."""
        assert self.proposal is not None, f"trial {self.number} is not proposed yet"
        return self.proposal.fold

    @property
    def recovery(self) -> RecoveryChoice:
        """How its model is trained; it must have been proposed."""
        assert self.proposal is not None, f"trial {self.number} is not proposed yet"
        return self.proposal.recovery

    @property
    def types(self) -> StoredTypes:
        """Those that its model is stored in and measured with."""
        return AS_TARGET if self.proposal is None else self.proposal.types

    @property
    def removed(self) -> Removed | None:
        """The blocks that its criterion was to choose, if it has one."""
        return None if self.proposal is None else self.proposal.removed

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it in this process."""
        return self.state not in ("waiting", "running")

    @property
    def is_trial(self) -> bool:
        """Whether it counts as a trial: not those that were rejected, or known to be a repeat, before anything ran."""
        return self.state not in ("infeasible", "repeat") or self.draft is not None

    @property
    def exempt(self) -> bool:
        """Whether halving lets it through: baselines, so that reports can compare with them, and what was screened."""
        return self.proposal is not None and self.proposal.origin in ("baseline", "screened")

    # ---- what it measured

    @property
    def last(self) -> RungResult:
        """Its latest result; it must have one."""
        return self.results[-1]

    @property
    def quality(self) -> Quality:
        """On the search texts, which the search looks at, at its latest rung."""
        return self.last.quality

    @property
    def final(self) -> Quality:
        """On the report texts, which the search does not look at; on the search texts before the last rung."""
        return self.last.report or self.last.quality

    @property
    def known_from(self) -> int | None:
        """The trial that its latest result was taken from; None where it measured it itself, or has none."""
        return self.results[-1].known_from if self.results else None

    @property
    def is_measured(self) -> bool:
        """Whether it reached the last rung itself: what another trial had measured is that one's."""
        return self.state == "finished" and self.known_from is None

    @property
    def has_trained(self) -> bool:
        """Whether it trained its plan itself."""
        return any(result.recovery_tokens and result.known_from is None for result in self.results)

    def worth(self, other: Trial) -> tuple[RungResult, ...]:
        """The results that hold for another trial of the same plan too.

        All of them if that one would train in the same way, or if this one has reached the last rung: no plan is
        trained twice. Else (this one was stopped, or its training diverged) only those of the untrained model.
        """
        if self.recovery == other.recovery or (self.state == "finished" and not self.last.training_diverged):
            return self.results
        return tuple(result for result in self.results if not result.recovery_tokens)

    # ---- in words

    @property
    def tokens_words(self) -> str:
        """What the kept state was made with: a token of healing goes forward only, one of training back too."""
        healed = f"healed on {self.healing.tokens:,} tokens (forward only), " if self.healing else ""
        return f"{healed}trained on {self.last.kept_tokens:,} tokens"

    @property
    def setback_words(self) -> str:
        """How training hurt and what is kept, for one line of a report; empty where it did not."""
        setback = self.results[-1].setback if self.results else None
        if setback is None:
            return ""
        kept = f"after {setback.kept_tokens:,} tokens" if setback.kept_tokens else "untrained"
        if setback.latest is None:
            return f"training diverged: kept {kept}"
        measure = "perplexity" if self.plan.is_extension else "KL"
        return (
            f"training hurt ({measure} {rounded(trained_for(self.plan, setback.latest), '.3f')}): kept {kept}"
        )

    @property
    def step_words(self) -> str:
        """What its latest step of training came to, for one line of progress."""
        last, setback = self.last, self.setback_words
        kept = setback or "the best so far"
        return (
            f"{last.recovery_tokens:,} tokens, {last.seconds:.0f} s: search KL {rounded(last.quality.kl, '.4f')}, "
            f"perplexity {last.quality.perplexity:.2f}; {kept}"
        )

    # ---- in its folder

    def kept_in(self, folder: TrialFolder, machine: Machine) -> Trial:
        """Write the trial into its folder, with the machine and the files that its latest result was measured with."""
        paths = (folder.start, folder.recovered)
        files = {path.name: file_hash(path) for path in paths if path.exists()}
        kept = replace(self, machine=machine, files=files)
        write_json(folder.record, to_json(kept))
        return kept


def read_trial(folder: TrialFolder) -> Trial | None:
    """The trial that `Trial.kept_in` wrote; None where the folder has no result yet.

    Raises:
        RunError: the file is damaged.
    """
    if not folder.record.exists():
        return None
    try:
        return from_json(Trial, json.loads(folder.record.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FoldsearchError) as error:
        whole = (
            f"remove '{printable(folder.path)}': `recover` then begins anew"
            if folder.before
            else "start a new run"
        )
        remedy = f"Put back a copy of it, or {whole}."
        raise RunError(
            quote_error(f"what a trial learnt, '{printable(folder.record)}', cannot be read", error, remedy)
        ) from error


# ---- rivals


@dataclass(frozen=True, slots=True)
class DenseRival:
    """The dense model with weights of fewer bits: what a folded model of as many bytes has to beat.

    weights: the type. cost: of the model on the target, in llama.cpp. search, report: on the texts of the trials.
    kv_cache: the type of keys and values; empty for the dtype's own.
    """

    weights: str
    cost: Cost
    search: Quality
    report: Quality
    kv_cache: str = ""

    @property
    def types(self) -> StoredTypes:
        """Of what is stored."""
        return StoredTypes(self.weights, self.kv_cache)


def read_rivals(path: Path) -> tuple[DenseRival, ...]:
    """What `measure_rivals` kept; nothing where nothing was measured.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return ()
    try:
        return tuple(from_json(DenseRival, value) for value in json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, RecursionError, FoldsearchError) as error:
        what = f"the dense model in fewer bits, '{printable(path)}', cannot be read"
        remedy = "Put back a copy of it, or remove it: `foldsearch resume` measures it again."
        raise RunError(quote_error(what, error, remedy)) from error


# ---- of several trials


def point(trial: Trial, objectives: Sequence[Objective], rung: int = -1) -> tuple[float, ...]:
    """A trial's objectives at a rung, in the given order (see `point_of`)."""
    return point_of(trial.results[rung].quality.kl, trial.cost, objectives)


def point_of(kl: float, cost: Cost, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """Objectives in the given order: KL in nats per token, memory in GB, FLOPs per token, milliseconds."""
    values = {
        "kl": kl,
        "memory": cost.memory_bytes / GB,
        "flops": float(cost.flops),
        "prompt_ms": cost.prompt_ms,
        "decode_ms": cost.decode_ms,
    }
    found = [value for name in objectives if (value := values[name]) is not None]
    assert len(found) == len(objectives), "what is an objective was measured before the search"
    return tuple(found)


def best_of_plans(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that measured a plan to the last rung, each plan once in the same types, by number.

    A plan was measured twice where the training of the first diverged or was stopped, or where adapters start in two
    ways: the best of its results counts.
    """
    best: dict[tuple[FoldPlan, StoredTypes], Trial] = {}
    for trial in trials:
        if trial.is_measured:
            known = best.setdefault((trial.plan, trial.types), trial)
            if trial.quality.kl < known.quality.kl:
                best[trial.plan, trial.types] = trial
    return sorted(best.values(), key=lambda trial: trial.number)


def front(
    trials: Sequence[Trial], objectives: Sequence[Objective] = ("kl", "memory", "flops")
) -> list[Trial]:
    """The trials that no other dominates: feasible ones that reached the last rung, each plan once."""
    candidates = best_of_plans(trials)
    return [candidates[i] for i in non_dominated([point(trial, objectives) for trial in candidates])]


# ---- who measures a plan


def begun_as(trial: Trial) -> str:
    """What the files of a trial's model are of: its plan, and how its adapters start."""
    return f"{trial.plan} {trial.fold.adapter_start or ''}".strip()


def plan_path(run: Run, trial: Trial) -> Path:
    """The file that says which trial measures a plan.

    One for each start of adapters and each pair of types, which are other models.
    """
    cached = f"kv-{trial.types.kv_cache}" if trial.types.kv_cache else ""
    parts = (trial.plan.id, trial.fold.adapter_start or "", trial.types.weights, cached)
    return run.plan("-".join(part for part in parts if part))


class Peers(Protocol):
    """The other trials of a run, as one of them sees them."""

    def hold(self, trial: Trial) -> AbstractContextManager[tuple[bool, Trial | None]]:
        """Hold the plan of a trial, so that no two running trials measure it.

        Where another trial has begun to measure it, this waits for that one's first result.

        Yields:
            Whether the plan is held here, and the other trial that measures, or has measured, it.
        """

    def take(self, trial: Trial) -> None:
        """Note that a trial measures its plan, which it holds."""

    def copy(self, number: int, folder: TrialFolder, names: Sequence[str]) -> None:
        """Copy those of another trial's files that are there into a folder, whole or not at all."""


class FolderPeers:
    """The other trials where all of them are in one run folder, on one machine."""

    def __init__(self, run: Run) -> None:
        """`run`: whose trials they are."""
        self._run = run

    @contextmanager
    def hold(self, trial: Trial) -> Iterator[tuple[bool, Trial | None]]:
        """See `Peers`; the lock is the system's."""
        with hold_plan(plan_path(self._run, trial), self._run) as (free, owner):
            is_other = owner is not None and owner != trial.number
            yield free, read_trial(self._run.trial(owner)) if is_other and owner is not None else None

    def take(self, trial: Trial) -> None:
        """See `Peers`."""
        note_owner(self._run, trial)

    def copy(self, number: int, folder: TrialFolder, names: Sequence[str]) -> None:
        """See `Peers`."""
        for name in names:
            if (file := self._run.trial(number).path / name).exists():
                replace_atomically(folder.path / name, partial(shutil.copyfile, file))


def note_owner(run: Run, trial: Trial) -> None:
    """Write down that a trial measures its plan."""
    write_json(plan_path(run, trial), {"trial": trial.number, "plan": str(trial.plan)})


@contextmanager
def hold_plan(path: Path, run: Run) -> Iterator[tuple[bool, int | None]]:
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
            owner = owner_of(path, run)
            # The first result of the other trial is enough: the lock itself is held until its last rung.
            if free or (owner is not None and read_trial(run.trial(owner)) is not None):
                break
            time.sleep(WAIT_SECONDS)
        yield free, owner
    finally:
        os.close(lock)  # lets go of the lock


def owner_of(path: Path, run: Run) -> int | None:
    """The trial that a plan's file names; None where there is no file, or that trial is of another plan by now.

    Raises:
        RunError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        number = from_json(int, json.loads(path.read_text())["trial"])
        # A study that was begun again gave the number to another plan.
        known = read_trial(run.trial(number))
        return (
            None
            if known is not None and known.draft is not None and plan_path(run, known) != path
            else number
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"which trial measured a plan, '{printable(path)}', cannot be read"
        raise RunError(quote_error(what, error, "Mend it: foldsearch check RUN --repair")) from error


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
