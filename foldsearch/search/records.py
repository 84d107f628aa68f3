"""The book of record: one Optuna study in the run folder's SQLite file.

Every trial is a row, whatever became of it:

    COMPLETE   reached the last rung                        objectives: KL, memory in GB, FLOPs per token
    PRUNED     stopped at a rung (user attribute `stopped_at_rung`), or infeasible (its constraints say by how much)
    FAIL       crashed, diverged, or no finite numbers: user attribute `reason`; or a repeat: another trial measures
               its plan (`repeats`), and its figures belong to that one's parameters
    RUNNING    being run, or interrupted, also by the time limit (`cut` says where): run_search goes on with it first

User attributes: `proposal`, `closing`, `plan`, `tune_id`, `repeats`, and `rung 0`, `rung 1`, ... (TrialResults).
"""

from __future__ import annotations

import math
import random
import sqlite3
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from foldsearch.bound import lower_bound
from foldsearch.codec import from_json, to_json
from foldsearch.errors import BudgetError, RunError, quote_error
from foldsearch.fates import Option
from foldsearch.paths import printable
from foldsearch.plan.cost import GB, Cost, price
from foldsearch.plan.front import non_dominated
from foldsearch.plan.neighbour import neighbour
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import TrialResult, rounded
from foldsearch.plan.strip import strip
from foldsearch.proposal import Fold, Given, Origin, Proposal, Removed, fold_plan
from foldsearch.run import Run
from foldsearch.spec.fit import can_run, narrow, repair
from foldsearch.spec.propose import Plain, plain_answers, propose, propose_recovery
from foldsearch.spec.space import Space
from foldsearch.spec.study import Objective, Study

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

STUDY_NAME = "foldsearch"
METRIC_NAMES = {"kl": "KL to dense (nats per token)", "memory": "memory (GB)", "flops": "FLOPs per token"}
_NEIGHBOUR_TRIES = 20
_WAIT_SECONDS = 60  # for another writer of the same file
_REJECTS = 100
_REDRAWS = 8  # suggestions in a row that would repeat a plan, before a neighbour is taken instead

RecordState = Literal["waiting", "running", "finished", "stopped", "infeasible", "failed", "repeat"]


@dataclass(frozen=True, slots=True)
class Record:
    """One trial as the study knows it.

    state: "repeat": another trial measures its plan, with other recovery settings or at this moment.
    proposal: None until it is asked for. results: of its rungs so far, in order. reason: of a failure or a stop.
    cut: whether the time limit stopped it, so that a run that goes on begins with it.
    closing: whether it was added when the search had spent its trials (see `foldsearch.search.proposer`).
    """

    number: int
    state: RecordState
    proposal: Proposal | None
    results: tuple[TrialResult, ...]
    reason: str = ""
    closing: bool = False
    cut: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state not in ("waiting", "running")

    @property
    def is_trial(self) -> bool:
        """Whether it counts as a trial: not those that were rejected, or known to be a repeat, before anything ran."""
        return self.state not in ("infeasible", "repeat") or bool(self.results)

    @property
    def removed(self) -> Removed | None:
        """The blocks that its criterion was to choose, if it has one."""
        return None if self.proposal is None else self.proposal.removed

    @property
    def last(self) -> TrialResult | None:
        """Its latest result."""
        return self.results[-1] if self.results else None

    @property
    def exempt(self) -> bool:
        """Whether halving lets it through: baselines, so that reports can compare with them, and what was screened."""
        return self.proposal is not None and self.proposal.origin in ("baseline", "screened")


def front(
    records: Sequence[Record], objectives: Sequence[Objective] = ("kl", "memory", "flops")
) -> list[Record]:
    """The trials that no other dominates: feasible ones that reached the last rung, each plan once.

    A plan was measured twice where the training of the first diverged or was stopped, or where adapters start in two
    ways: the best of its results counts.
    """
    best: dict[FoldPlan, tuple[float, Record]] = {}
    for record in records:
        result = record.last
        if record.state != "finished" or result is None or result.state != "measured":
            continue
        assert result.quality is not None, "a finished trial was measured"
        kl, plan = result.quality.kl, result.plan
        if plan not in best or kl < best[plan][0]:
            best[plan] = kl, record
    candidates = [record for _, record in best.values()]
    points = [point(record.last, objectives) for record in candidates if record.last is not None]
    return [candidates[i] for i in non_dominated(points)]


def point(result: TrialResult, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """A result's objectives, in the study's order: KL in nats per token, memory in GB, FLOPs per token."""
    kl, memory_bytes, flops = result.objectives()
    values = {"kl": kl, "memory": memory_bytes / GB, "flops": flops}
    return tuple(values[name] for name in objectives)


def read_records(run: Run) -> list[Record]:
    """Every trial of a run so far, by number; safe while the run goes on.

    Raises:
        RunError: the file that holds them is damaged.
    """
    if not run.storage.is_file():
        return []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.load_study(study_name=STUDY_NAME, storage=open_storage(run))
    except KeyError:  # the file is there and the study is not yet: the run was stopped in between
        return []
    return [_record(trial) for trial in study.get_trials(deepcopy=False)]


class Records:
    """The study of a run: who is next, and what became of whom.

    space: the study's, narrowed to what can fit the budget.

    Raises:
        BudgetError: no plan of the space can keep the budget.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.objectives: tuple[Objective, ...] = run.study.objectives
        self.space: Space = narrow(run.study.space, run.table, run.target, run.budget)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=open_storage(run),
            directions=["minimize"] * len(self.objectives),
            load_if_exists=True,
        )
        # The run's lock makes this process the only writer, so what it knows need not be read again.
        trials = self.study.get_trials(deepcopy=False)
        self.study.sampler = _sampler(run.study, len(trials))
        self._records = [_record(trial) for trial in trials]
        self._front = front(self._records, self.objectives)
        self._trials = {
            trial.number: optuna.Trial(self.study, trial._trial_id)
            for trial in trials
            if trial.state == TrialState.RUNNING
        }
        self._interrupted = list(self._trials)
        self._elapsed = float(self.study.user_attrs.get("seconds", 0.0))
        self._redraws = 0
        if not trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names([METRIC_NAMES[name] for name in self.objectives])

    def all(self) -> list[Record]:
        """Every trial, by number."""
        return list(self._records)

    def get(self, number: int) -> Record:
        """One trial."""
        return self._records[number]

    def front(self) -> list[Record]:
        """The front of the trials so far."""
        return list(self._front)

    # ---- who is next

    def queue(
        self, criterion: str, num_removed: int, *, origin: Origin = "baseline", closing: bool = False
    ) -> None:
        """Put a trial first in line: a baseline of the space, with the best setting of its criterion so far."""
        plain = plain_answers(self.space, criterion, num_removed, self._best_setting(criterion))
        propose(plain, self.space, self.run.num_blocks)
        self.study.enqueue_trial(plain.answers, user_attrs={"origin": origin, "closing": closing})
        self._records.append(Record(len(self._records), "waiting", None, (), closing=closing))

    def queue_plan(self, plan: FoldPlan) -> None:
        """Put a plan that was screened in line, recovery settings in mid-range."""
        plain = Plain({"delta_rank": self.space.recover.middle_rank})
        propose_recovery(plain, self.space)
        self.study.enqueue_trial(plain.answers, user_attrs={"origin": "screened", "given": to_json(plan)})
        self._records.append(Record(len(self._records), "waiting", None, ()))

    @property
    def num_promoted(self) -> int:
        """How many screened plans the line of trials began with."""
        found: int = self.study.user_attrs.get("promoted", 0)
        return found

    @property
    def num_screened(self) -> int:
        """How many plans were screened before the first trial."""
        found: int = self.study.user_attrs.get("screened", 0)
        return found

    def note_screened(self, count: int, promoted: int) -> None:
        """Write down how many plans were screened, and how many of them are to be trained."""
        self.study.set_user_attr("screened", count)
        self.study.set_user_attr("promoted", promoted)

    def _best_setting(self, criterion: str) -> float | None:
        """The setting of a criterion that led to the lowest KL; None where none did yet, or it has none."""
        tried = [
            (record.last.quality.kl, removed.setting)
            for record in self._records
            if record.state == "finished" and record.last is not None and record.last.quality is not None
            if (removed := record.removed) is not None
            if removed.criterion == criterion and removed.setting is not None
        ]
        return min(tried)[1] if tried else None

    @property
    def anyone_waits(self) -> bool:
        """Whether an interrupted or a queued trial is still to be run."""
        return bool(self._interrupted) or any(record.state == "waiting" for record in self._records)

    @property
    def elapsed(self) -> float:
        """Seconds that processes of this run have worked, as last noted."""
        return self._elapsed

    def note_elapsed(self, seconds: float) -> None:
        """Write down how long this run has worked."""
        self._elapsed = seconds
        self.study.set_user_attr("seconds", seconds)

    def note_tune_id(self, number: int, trial_id: str) -> None:
        """Write down under which name Tune runs a trial."""
        self._write(number, tune_id=trial_id)

    def ask(self) -> tuple[int, Proposal]:
        """The next trial: one that was interrupted, a queued baseline, a neighbour of the front, or a suggestion.

        A proposal that cannot fit is repaired; if that fails it is told as infeasible, and the next one is asked
        for. So it is where the plan is one that a trial measures already, as far as that can be told; after
        `_REDRAWS` of those a neighbour of the front is taken, and where there is none, the repeat.

        Raises:
            BudgetError: a hundred proposals in a row could not fit.
        """
        while self._interrupted:
            number = self._interrupted.pop(0)
            self._change(number, state="running", reason="", cut=False)
            self._write(number, cut="")
            record = self.get(number)
            if record.results and ended(record.results[-1]):
                self.finish(number)  # only the telling was interrupted
            elif (proposal := record.proposal or self._propose(self._trials[number])) is not None:
                return number, proposal
        for _ in range(_REJECTS):
            trial = self.study.ask()
            self._trials[trial.number] = trial
            if trial.number == len(self._records):
                self._records.append(Record(trial.number, "running", None, ()))
            else:  # one that was queued
                self._change(trial.number, state="running")
            if (proposal := self._propose(trial)) is not None:
                return trial.number, proposal
        raise BudgetError(
            f"{_REJECTS} proposals in a row could not keep the budget {self.run.budget}. "
            "Raise the budget, or widen the space (groups.max_groups, groups.adapter_ranks)."
        )

    def _propose(self, trial: optuna.Trial) -> Proposal | None:
        run = self.run
        origin: Origin = trial.user_attrs.get("origin", "sampler")
        drawn = self._neighbour(trial) if origin == "sampler" else self._given(trial)
        if drawn is None:
            suggested = propose(_Suggest(trial), self.space, run.num_blocks, origin=origin)
            drawn = repair(suggested, self.space, run.table, run.target, run.budget)
            if drawn is None:
                self._set_proposal(trial.number, suggested)
                self._reject(trial.number, lower_bound(suggested, run.table, run.target))
                return None
            other = self.foretell(drawn) if origin == "sampler" else None
            if other is not None and self._redraws <= _REDRAWS:  # one more, where there was no neighbour
                self._redraws += 1
                self._set_proposal(trial.number, drawn)
                self.repeat(trial.number, other)
                return None
        self._redraws = 0
        self._set_proposal(trial.number, drawn)
        return drawn

    def _given(self, trial: optuna.Trial) -> Proposal | None:
        """The plan that was put in line, if it was one."""
        given = trial.user_attrs.get("given")
        if given is None:
            return None
        return Proposal(
            Given(from_json(FoldPlan, given)), propose_recovery(_Suggest(trial), self.space), "screened"
        )

    def _set_proposal(self, number: int, proposal: Proposal) -> None:
        self._change(number, proposal=proposal)
        self._write(number, proposal=proposal.to_json())

    def foretell(self, proposal: Proposal) -> int | None:
        """The trial that measures the plan which a proposal will come to, where that can be told before it is drafted.

        Recovery settings aside: no plan is trained twice.
        """
        measured = [
            record
            for record in self._records
            if record.proposal is not None and record.state not in ("failed", "infeasible")
        ]
        for record in measured:
            if record.proposal is not None and record.proposal.fold == proposal.fold:
                return record.number
        plan = self._plan_of(proposal.fold)
        for record in measured:
            same_start = (
                record.proposal is not None
                and record.proposal.fold.adapter_start == proposal.fold.adapter_start
            )
            if plan is not None and record.last is not None and record.last.plan == plan and same_start:
                return record.number
        return None

    def _plan_of(self, fold: Fold | Given) -> FoldPlan | None:
        """The plan of a proposal, where an earlier one tells which blocks its criterion removes."""
        if isinstance(fold, Given):
            return fold.plan
        if fold.removed is None or fold.attention_removed:
            return None
        for record in self._records:
            other, result = record.removed, record.last
            if other is None or result is None or result.state == "infeasible":
                continue
            if other.ranking == fold.removed.ranking:
                blocks, bases = other.fate.undo(result.plan)
                if bases or not fold.removed.fate.needs_bases:
                    return fold_plan(blocks, fold, self.run.num_blocks, bases=bases)
        return None

    def _neighbour(self, trial: optuna.Trial) -> Proposal | None:
        """With the space's probability, a plan near one of the front that fits and was never tried.

        In any case after too many suggestions that were repeats. Never under NSGA-II: it crosses only the parameters
        that all trials have, and a neighbour has two.
        """
        if self.run.study.sampler == "nsga2":
            return None
        rng = random.Random(f"{self.run.study.seed} {trial.number}")
        if rng.random() >= self.space.neighbour_share and self._redraws < _REDRAWS:
            return None
        records = self._records
        if not (parents := self.front()):
            return None
        tried = {record.last.plan for record in records if record.last is not None}
        tried |= {record.proposal.plan for record in records if record.proposal and record.proposal.plan}
        tried.add(FoldPlan.identity(self.run.num_blocks))
        for _ in range(_NEIGHBOUR_TRIES):
            parent = rng.choice(parents)
            assert parent.last is not None
            assert parent.proposal is not None
            plan = neighbour(parent.last.plan, rng)
            if plan is None or plan in tried or not can_run(plan, self.run.table, self.run.target):
                continue
            if self.run.budget.admits(price(plan, self.run.table, self.run.target)):
                given = Given(plan, parent.proposal.fold.adapter_start)
                return Proposal(given, propose_recovery(_Suggest(trial), self.space), "neighbour")
        return None

    # ---- what became of whom

    def record(self, number: int, result: TrialResult) -> None:
        """Write down the result of a rung."""
        earlier = tuple(known for known in self.get(number).results if known.rung < result.rung)
        if not earlier:
            self._write(number, plan=str(result.plan))
        self._write(number, **{f"rung {result.rung}": to_json(result)})
        self._change(number, results=(*earlier, result))

    def finish(self, number: int) -> RecordState:
        """Tell the study how a trial ended, by its last result.

        COMPLETE only with finite objectives at the last rung (Optuna would take an infinity for a value).
        """
        result = self.get(number).last
        if result is None:
            return self.fail(number, "it gave no result")
        if result.state == "infeasible":
            self._queue_one_more(number)
            self._reject(number, result.cost)
            return "infeasible"
        if result.state in ("diverged", "failed"):
            return self.fail(number, f"{result.state}: {result.reason}" if result.reason else result.state)
        if result.quality is None or not all(map(math.isfinite, point(result, self.objectives))):
            return self.fail(number, "diverged: its objectives are not finite numbers")
        self._price(number, result.cost)
        self._note(number, result)
        if not result.is_last_rung:
            return self.fail(number, f"it ended after rung {result.rung}, before the last one")
        if result.known_from is not None and self._trained_otherwise(number, result.known_from):
            return self.repeat(number, result.known_from)
        self._end(number, "finished", TrialState.COMPLETE, values=point(result, self.objectives))
        return "finished"

    def stop(self, number: int, reason: str) -> None:
        """Tell the study that halving stopped a trial: PRUNED, and never on a front."""
        result = self.get(number).last
        assert result is not None
        self._price(number, result.cost)
        self._note(number, result)
        self._write(number, stopped_at_rung=result.rung)
        self._end(number, "stopped", TrialState.PRUNED, reason)

    def repeat(self, number: int, other: int, reason: str = "") -> RecordState:
        """Tell the study that another trial measures, or has measured, the plan of this one.

        FAIL: the figures are of the other one's recovery settings. A sampler that was told them beside the parameters
        of this trial would learn what is not so, and PRUNED would be bad news where there is none.
        """
        self._write(number, repeats=other)
        self._end(number, "repeat", TrialState.FAIL, reason or f"the plan of trial {other}")
        return "repeat"

    def _trained_otherwise(self, number: int, other: int) -> bool:
        """Whether a plan was trained by `other`, in another way than trial `number` asks for."""
        result, mine, theirs = self.get(number).last, self.get(number).proposal, self.get(other).proposal
        assert result is not None
        return (
            bool(result.recovery_tokens)
            and mine is not None
            and theirs is not None
            and (mine.recovery != theirs.recovery)
        )

    def _queue_one_more(self, number: int) -> None:
        """A baseline must not be lost: blocks differ in price, and those that its criterion chose may be a hair too
        cheap for the budget that their count was chosen for. Then it is tried with one block more.
        """
        record = self.get(number)
        proposal, removed = record.proposal, record.removed
        if proposal is None or proposal.origin not in ("baseline", "start") or record.closing:
            return
        if removed is not None and removed.count < self.space.counts(self.run.num_blocks)[1]:
            self.queue(removed.criterion, removed.count + 1, origin=proposal.origin)

    def cut(self, number: int, reason: str) -> None:
        """Write down that the time limit ended a trial; a run that goes on begins with it. It is on no front."""
        self._write(number, cut=reason)
        self._change(number, state="stopped", reason=reason, cut=True)

    def fail(self, number: int, reason: str) -> RecordState:
        """Tell the study that a trial failed: a row with its reason."""
        self._end(number, "failed", TrialState.FAIL, reason)
        return "failed"

    def _reject(self, number: int, cost: Cost) -> None:
        """PRUNED with constraints: a sampler learns from it where feasible plans end (from FAIL it would not)."""
        self._price(number, cost)
        words = ", ".join(f"{name} {above:+.1%}" for name, above in self.run.budget.violations(cost).items())
        self._end(number, "infeasible", TrialState.PRUNED, f"above the budget: {words}")

    # ---- writing

    def _end(
        self,
        number: int,
        state: RecordState,
        told: TrialState,
        reason: str = "",
        values: Sequence[float] | None = None,
    ) -> None:
        if reason:
            self._write(number, reason=reason)
        self.study.tell(number, values, state=told)
        self._change(number, state=state, reason=reason)

    def _change(self, number: int, **changes: Any) -> None:
        record = self._records[number] = replace(self._records[number], **changes)
        if changes.get("state") == "finished":
            # What the front dominates stays dominated, so that only the front has to be looked at again.
            nearest = sorted([*self._front, record], key=lambda known: known.number)
            self._front = front(nearest, self.objectives)

    def _write(self, number: int, **attributes: Any) -> None:
        for name, value in attributes.items():
            self._trials[number].set_user_attr(name, value)

    def _price(self, number: int, cost: Cost) -> None:
        violations = self.run.budget.violations(cost)
        trial = self._trials[number]
        for name, above in violations.items():
            trial.set_constraint(name, above)
        # optuna-dashboard reads the key that Optuna used before version 5.
        self.study._storage.set_trial_system_attr(trial._trial_id, "constraints", list(violations.values()))

    def _note(self, number: int, result: TrialResult) -> None:
        from optuna_dashboard import save_note

        save_note(self._trials[number], note(result))


def ended(result: TrialResult) -> bool:
    """Whether no further rung follows, whatever halving says."""
    return result.is_last_rung or result.state in ("infeasible", "diverged", "failed")


def _error(value: float, form: str) -> str:
    """A standard error, where there is one: texts of a single document have none."""
    return f" ± {value:{form}}" if math.isfinite(value) else ""


def note(result: TrialResult) -> str:
    """What the dashboard shows beside a trial: the plan, its strip, every cost term, quality (Markdown)."""
    cost = result.cost
    rows = [
        ("weights", f"{cost.weight_bytes / GB:.4f} GB"),
        ("adapters", f"{cost.adapter_bytes / GB:.4f} GB"),
        ("KV cache", f"{cost.kv_bytes / GB:.4f} GB"),
        ("activations", f"{cost.activation_bytes / GB:.4f} GB"),
        ("**memory**", f"**{cost.memory_bytes / GB:.4f} GB**"),
        ("prefill", f"{2 * cost.prefill_macs:.4g} FLOPs per token"),
        ("decode", f"{cost.flops:.4g} FLOPs per token"),
        ("rung", f"{result.rung}, after {result.recovery_tokens} recovery tokens"),
    ]
    if result.setback_words:
        rows.append(("recovery", result.setback_words))
    if quality := result.quality:
        rows += [
            ("KL to dense", f"{rounded(quality.kl, '.4f')}{_error(quality.kl_se, '.4f')} nats per token"),
            (
                "perplexity",
                f"{quality.perplexity:.2f}{_error(quality.perplexity_se, '.2f')} "
                f"(dense {quality.dense_perplexity:.2f})",
            ),
            ("agreement", f"{quality.agreement:.1%}"),
        ]
    for words, measured in (("search", result.quality), ("report", result.report)):
        for kind in measured.shown_kinds if measured else ():
            kl = f"{rounded(kind.kl, '.4f')}{_error(kind.kl_se, '.4f')} nats per token"
            rows.append((f"KL to dense, {words} texts, {kind.title}", kl))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"`{result.plan}`\n\n`{strip(result.plan)}`\n\n| | |\n|---|---|\n{table}\n"


def _record(trial: FrozenTrial) -> Record:
    attributes = trial.user_attrs
    rungs = sorted((name for name in attributes if name.startswith("rung ")), key=lambda name: int(name[5:]))
    states: dict[TrialState, RecordState] = {
        TrialState.WAITING: "waiting",
        TrialState.RUNNING: "running",
        TrialState.COMPLETE: "finished",
        TrialState.FAIL: "repeat" if "repeats" in attributes else "failed",
        TrialState.PRUNED: "stopped" if "stopped_at_rung" in attributes else "infeasible",
    }
    state, cut = states[trial.state], attributes.get("cut", "") if trial.state == TrialState.RUNNING else ""
    return Record(
        trial.number,
        "stopped" if cut else state,
        Proposal.from_json(attributes["proposal"]) if "proposal" in attributes else None,
        tuple(from_json(TrialResult, attributes[name]) for name in rungs),
        cut or attributes.get("reason", ""),
        attributes.get("closing", False),
        bool(cut),
    )


def open_storage(run: Run) -> optuna.storages.RDBStorage:
    """The file that holds the trials of a run.

    Raises:
        RunError: it is damaged.
    """
    # Never as part of the URL: there `?`, `#` and `%` mean something, and Optuna fills in what stands in braces.
    file = run.storage.resolve()
    try:
        storage = optuna.storages.RDBStorage(
            "sqlite://",
            engine_kwargs={
                "creator": lambda: sqlite3.connect(file, timeout=_WAIT_SECONDS, check_same_thread=False),
                "poolclass": sqlalchemy.pool.QueuePool,  # that of a file; the URL alone would be one in memory
            },
        )
    except sqlalchemy.exc.DatabaseError as error:
        if isinstance(error, sqlalchemy.exc.OperationalError):  # locked, say, or the disk is full
            raise
        raise RunError(
            quote_error(
                f"the trials of a run are in its {run.storage.name}, but '{printable(run.storage)}' is damaged",
                error.orig or error,
                "Put back a copy of it, or start a new run.",
            )
        ) from error
    # Write-ahead log: what is committed survives a killed process, readers do not wait, and a commit takes 0.1 ms.
    # `NORMAL` leaves the last commits to chance only when the machine itself loses power.
    sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
    storage.engine.dispose()  # connections from before
    return storage


def _write_ahead(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _sampler(study: Study, num_trials: int) -> BaseSampler:
    # A fixed seed would repeat its suggestions after a restart, so the seed counts the trials already there.
    seed = study.seed + num_trials
    if study.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=8)
    if study.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # The liar keeps trials that run at the same time apart; alone, it only reads the storage again and again.
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=8, constant_liar=study.jobs > 1)


class _Suggest:
    """Optuna's trial, as a space asks it."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def integer(self, name: str, low: int, high: int) -> int:
        return self._trial.suggest_int(name, low, high)

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._trial.suggest_float(name, low, high, log=log)

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        value: Any = self._trial.suggest_categorical(name, options)
        return value  # type: ignore[no-any-return]
