"""The book of record: one Optuna study, in the run folder's SQLite file or in a database (see storage.py).

Every trial is a row. Its user attribute `trial` is the whole value (`foldsearch.record.Trial`); rows that were put in
line also have `origin` and `given`, which say what they are to propose. Samplers and the dashboard read what Optuna was
told:

    COMPLETE   finished                         objectives: KL, memory in GB, FLOPs per token
    PRUNED     stopped at a rung, or infeasible (its constraints say by how much)
    FAIL       crashed, diverged, or no finite numbers; or a repeat: another trial measures its plan, and its figures
               belong to that one's parameters
    RUNNING    being run, interrupted or cut: run_search goes on with it first

Optuna lets nobody change a row that has ended, so the value is written before the row is told.
"""

from __future__ import annotations

import html
import math
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from foldsearch.bound import lower_bound
from foldsearch.codec import from_json, to_json
from foldsearch.errors import BudgetError, FoldsearchError, RunError, quote_error
from foldsearch.fates import Option
from foldsearch.plan.cost import GB, Cost, price
from foldsearch.plan.neighbour import neighbour
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import rounded
from foldsearch.plan.stored import StoredTypes, widest_first
from foldsearch.plan.strip import strip
from foldsearch.proposal import Fold, Given, Origin, Proposal, fold_plan
from foldsearch.record import State, Trial, front, point
from foldsearch.run import Run
from foldsearch.search.sampler import repeatable_sampler
from foldsearch.search.storage import (
    check_study_there,
    copy_study,
    is_begun,
    open_storage,
    place_of,
    storage_errors,
    study_name,
)
from foldsearch.spec.fit import can_run, narrow, repair
from foldsearch.spec.propose import Plain, baseline, plain_answers, propose, propose_recovery, propose_types
from foldsearch.spec.space import Space
from foldsearch.spec.study import Objective

METRIC_NAMES = {
    "kl": "KL to dense (nats per token)",
    "memory": "memory (GB)",
    "flops": "FLOPs per token",
    "prompt_ms": "milliseconds for the prompt",
    "decode_ms": "milliseconds for a token",
}
TYPE_MOVES = 0.25  # of the moves around the front, where there are several types of weights
_NEIGHBOUR_TRIES = 20
_REJECTS = 100
_REDRAWS = 8  # suggestions in a row that would repeat a plan, before a neighbour is taken instead

TOLD: dict[State, TrialState] = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "repeat": TrialState.FAIL,
}

ENDED_BY_HAND = "failed: its row was ended from outside, as a dashboard can"


def read_trials(run: Run) -> list[Trial]:
    """Every trial of a run so far, by number; safe while the run goes on.

    Raises:
        RunError: the study is damaged, or cannot be reached.
    """
    return [row.trial for row in read_rows(run)]


@dataclass(frozen=True, slots=True)
class Row:
    """A trial, and what Optuna was told of it. state: the name of Optuna's state. values: objectives, if any."""

    trial: Trial
    state: str
    values: tuple[float, ...] | None

    @property
    def is_open(self) -> bool:
        """Whether it is being run, or was interrupted."""
        return self.state == TrialState.RUNNING.name


def read_rows(run: Run) -> list[Row]:
    """Every row of a run's study, by number; safe while the run goes on.

    Raises:
        RunError: the study is damaged, or cannot be reached.
    """
    with _opened_study(run) as study:
        rows = [] if study is None else study.get_trials(deepcopy=False)
    return [Row(_read(row), row.state.name, tuple(row.values) if row.values else None) for row in rows]


def write_row(run: Run, trial: Trial) -> None:
    """Put a trial into its row, which must be open; nobody else may be at work in the run."""
    with _opened_study(run) as study:
        assert study is not None, "a row is in a study"
        row = study.get_trials(deepcopy=False)[trial.number]
        study._storage.set_trial_user_attr(row._trial_id, "trial", to_json(trial))


@contextmanager
def _opened_study(run: Run) -> Iterator[optuna.Study | None]:
    """The study of a run, and its connections for so long; None where there is none yet."""
    if not is_begun(run):
        yield None
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(run)
    try:
        with storage_errors(place_of(run)):
            try:
                study = optuna.load_study(study_name=study_name(run), storage=storage)
            except KeyError:  # the file is there and the study is not yet: the run was stopped in between
                check_study_there(run, storage)
                study = None
            yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


@dataclass(frozen=True, slots=True)
class InLine:
    """A trial that is put in line. answers: to what the space asks. attributes: of its row. closing: see `Trial`."""

    answers: dict[str, Any]
    attributes: dict[str, Any]
    closing: bool = False


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
        storage = open_storage(run)
        check_study_there(run, storage)
        self.study = optuna.create_study(
            study_name=study_name(run),
            storage=storage,
            directions=["minimize"] * len(self.objectives),
            load_if_exists=True,
        )
        # The run's lock makes this process the only writer, so what it knows need not be read again.
        rows = self.study.get_trials(deepcopy=False)
        self.study.sampler = repeatable_sampler(run.study)
        self._trials = [_read(row) for row in rows]
        self._front = front(self._trials, self.objectives)
        self._rows = {
            row.number: optuna.Trial(self.study, row._trial_id)
            for row in rows
            if row.state == TrialState.RUNNING
        }
        self._interrupted = list(self._rows)
        self._elapsed = float(self.study.user_attrs.get("seconds", 0.0))
        self._redraws = self._redraws_in_a_row()
        if not rows:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names([METRIC_NAMES[name] for name in self.objectives])
        self._complete_line()
        self._settle()

    def _settle(self) -> None:
        """Tell the study of trials that had ended when the run was stopped, so that nobody waits for them."""
        ended = [number for number in self._interrupted if self.get(number).ended]
        for number in ended:
            if self.get(number).state != "cut":
                self._interrupted.remove(number)
                self.finish(number)

    def _redraws_in_a_row(self) -> int:
        """How many of the latest suggestions were drawn again, as a process that was killed would know."""
        count = 0
        for trial in self._trials:
            if trial.proposal is None:
                continue  # in line, or killed while it was proposed
            if trial.draft is None and trial.state == "repeat":
                count += 1
            elif trial.draft is not None or trial.state != "infeasible":
                count = 0
        return count

    def all(self) -> list[Trial]:
        """Every trial, by number."""
        return list(self._trials)

    def get(self, number: int) -> Trial:
        """One trial."""
        return self._trials[number]

    def front(self) -> list[Trial]:
        """The front of the trials so far."""
        return list(self._front)

    # ---- who is next

    def queue(
        self, criterion: str, num_removed: int, *, origin: Origin = "baseline", closing: bool = False
    ) -> None:
        """Put a trial first in line: a baseline of the space, with the best setting of its criterion so far."""
        self.put_in_line([self.baseline(criterion, num_removed, origin=origin, closing=closing)])

    def queue_plan(self, plan: FoldPlan) -> None:
        """Put a plan that was screened in line, recovery settings in mid-range, in the widest type that fits."""
        self.put_in_line([self.screened(plan)])

    def baseline(
        self, criterion: str, num_removed: int, *, origin: Origin = "baseline", closing: bool = False
    ) -> InLine:
        """What `queue` puts in line."""
        plain = plain_answers(self.space, criterion, num_removed, self._best_setting(criterion))
        propose(plain, self.space, self.run.num_blocks)
        return InLine(plain.answers, {"origin": origin, "removes": [criterion, num_removed]}, closing)

    def screened(self, plan: FoldPlan) -> InLine:
        """What `queue_plan` puts in line."""
        run = self.run
        fitting = [
            types
            for types in widest_first(self.space.types)
            if run.budget.admits(price(plan, run.table, run.target.storing(types)))
        ]
        plain = Plain(
            {"delta_rank": self.space.recover.middle_rank, **(asdict(fitting[0]) if fitting else {})}
        )
        propose_recovery(plain, self.space)
        propose_types(plain, self.space)
        return InLine(plain.answers, {"origin": "screened", "given": to_json(plan)})

    def put_in_line(self, trials: Sequence[InLine]) -> None:
        """Put trials in line: all of them, also if this process is killed in between, or none."""
        if len(trials) > 1:  # one is a row, and so whole or absent by itself
            told = {"first": len(self._trials), "trials": [to_json(one) for one in trials]}
            self.study.set_user_attr("line", told)
        for one in trials:
            self._enqueue(one)

    def _complete_line(self) -> None:
        """Put the others in line, where a process was killed after some of several."""
        if told := self.study.user_attrs.get("line"):
            for one in told["trials"][max(0, len(self._trials) - told["first"]) :]:
                self._enqueue(from_json(InLine, one))

    def _enqueue(self, one: InLine) -> None:
        trial = Trial(len(self._trials), "waiting", closing=one.closing)
        self.study.enqueue_trial(one.answers, user_attrs={**one.attributes, "trial": to_json(trial)})
        self._trials.append(trial)

    @property
    def num_promoted(self) -> int:
        """How many screened plans the line of trials began with."""
        found: int = self.study.user_attrs.get("promoted", 0)
        return found

    @property
    def num_screened(self) -> int:
        """How many plans this run screened before its first trial."""
        found: int = self.study.user_attrs.get("screened", 0)
        return found

    def note_screened(self, count: int, promoted: int) -> None:
        """Write down how many plans this run screened, and how many plans of a screening are to be trained."""
        self.study.set_user_attr("screened", count)
        self.study.set_user_attr("promoted", promoted)

    def _best_setting(self, criterion: str) -> float | None:
        """The setting of a criterion that led to the lowest KL; None where none did yet, or it has none."""
        tried = [
            (trial.quality.kl, removed.setting)
            for trial in self._trials
            if trial.state == "finished" and (removed := trial.removed) is not None
            if removed.criterion == criterion and removed.setting is not None
        ]
        return min(tried)[1] if tried else None

    @property
    def anyone_waits(self) -> bool:
        """Whether an interrupted or a queued trial is still to be run."""
        return bool(self._interrupted) or any(trial.state == "waiting" for trial in self._trials)

    def next_in_line(self) -> tuple[Proposal, int] | None:
        """What `ask` gives next, and the rung that it begins with: an interrupted or a queued trial; None of others."""
        if self._interrupted:
            trial = self.get(self._interrupted[0])
            return (trial.proposal, len(trial.results)) if trial.proposal is not None else None
        waiting = (trial.number for trial in self._trials if trial.state == "waiting")
        number = next(waiting, None)
        if number is None:
            return None
        attributes = self.study.get_trials(deepcopy=False)[number].user_attrs
        if "given" in attributes:
            return Proposal(Given(from_json(FoldPlan, attributes["given"]))), 0
        if "removes" in attributes:
            criterion, count = attributes["removes"]
            return baseline(self.space, criterion, count, self.run.num_blocks), 0
        return None

    def put_back(self, number: int) -> None:
        """Ask for a running trial once more, before any other: nobody is at work on it."""
        self._interrupted.append(number)

    @property
    def elapsed(self) -> float:
        """Seconds that processes of this run have worked, as last noted."""
        return self._elapsed

    def note_elapsed(self, seconds: float) -> None:
        """Write down how long this run has worked."""
        self._elapsed = seconds
        self.study.set_user_attr("seconds", seconds)

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
            self._change(number, state="running", reason="")
            if (proposal := self.get(number).proposal or self._propose(number)) is not None:
                return number, proposal
        for _ in range(_REJECTS):
            row = self.study.ask()
            self._rows[row.number] = row
            if row.number == len(self._trials):
                self._trials.append(Trial(row.number))
            else:  # one that was put in line
                self._change(row.number, state="running")
            if (proposal := self._propose(row.number)) is not None:
                return row.number, proposal
        raise BudgetError(
            f"{_REJECTS} proposals in a row could not keep the budget {self.run.budget}. "
            "Raise the budget, or widen the space (groups.max_groups, groups.adapter_ranks)."
        )

    def _propose(self, number: int) -> Proposal | None:
        run, row = self.run, self._rows[number]
        origin: Origin = row.user_attrs.get("origin", "sampler")
        drawn = self._neighbour(row) if origin == "sampler" else self._given(row)
        if drawn is None:
            suggested = propose(_Suggest(row), self.space, run.num_blocks, origin=origin)
            drawn = repair(suggested, self.space, run.table, run.target, run.budget)
            if drawn is None:
                self._reject(number, lower_bound(suggested, run.table, run.target), proposal=suggested)
                return None
            other = self.foretell(drawn) if origin == "sampler" else None
            if other is not None and self._redraws <= _REDRAWS:  # one more, where there was no neighbour
                self._redraws += 1
                # In one write: a run that is killed after the proposal alone would take it for one to be run.
                self._end(number, "repeat", f"the plan of trial {other}", proposal=drawn)
                return None
        self._redraws = 0
        self._change(number, proposal=drawn)
        return drawn

    def _given(self, row: optuna.Trial) -> Proposal | None:
        """The plan that was put in line, if it was one."""
        given = row.user_attrs.get("given")
        if given is None:
            return None
        suggest = _Suggest(row)
        recovery = propose_recovery(suggest, self.space)
        plan = Given(from_json(FoldPlan, given))
        return Proposal(plan, recovery, "screened", propose_types(suggest, self.space))

    def foretell(self, proposal: Proposal) -> int | None:
        """The trial that measures the plan which a proposal will come to, where that can be told before it is drafted.

        Recovery settings aside: no plan is trained twice.
        """
        measured = [
            trial
            for trial in self._trials
            if trial.proposal is not None
            and trial.state not in ("failed", "infeasible")
            # A repeat that was never drafted measures nothing: who did may have failed since.
            and not (trial.state == "repeat" and trial.draft is None)
        ]
        for trial in measured:
            if trial.fold == proposal.fold and trial.types == proposal.types:
                return trial.number
        plan, start = self._plan_of(proposal.fold), proposal.fold.adapter_start
        for trial in measured:
            alike = trial.results and trial.plan == plan and trial.fold.adapter_start == start
            if alike and trial.types == proposal.types:
                return trial.number
        return None

    def _plan_of(self, fold: Fold | Given) -> FoldPlan | None:
        """The plan of a proposal, where an earlier one tells which blocks its criterion removes."""
        if isinstance(fold, Given):
            return fold.plan
        if fold.removed is None or fold.attention_removed:
            return None
        for trial in self._trials:
            other = trial.removed
            if other is None or trial.draft is None or trial.state == "infeasible":
                continue
            if other.ranking == fold.removed.ranking:
                blocks, bases = other.fate.undo(trial.plan)
                if bases or not fold.removed.fate.needs_bases:
                    return fold_plan(blocks, fold, self.run.num_blocks, bases=bases)
        return None

    def _neighbour(self, row: optuna.Trial) -> Proposal | None:
        """With the space's probability, a plan near one of the front that fits and was never tried.

        In any case after too many suggestions that were repeats. Never under NSGA-II: it crosses only the parameters
        that all trials have, and a neighbour has two.
        """
        if self.run.study.sampler == "nsga2":
            return None
        rng = random.Random(f"{self.run.study.seed} {row.number}")
        if rng.random() >= self.space.neighbour_share and self._redraws < _REDRAWS:
            return None
        if not (parents := self.front()):
            return None
        tried = {(trial.plan, trial.types) for trial in self._trials if trial.draft is not None}
        tried |= {
            (trial.proposal.plan, trial.types)
            for trial in self._trials
            if trial.proposal and trial.proposal.plan
        }
        identity = FoldPlan.identity(self.run.num_blocks)
        for _ in range(_NEIGHBOUR_TRIES):
            parent = rng.choice(parents)
            plan: FoldPlan | None = parent.plan
            types = parent.types
            others = [one for one in self.space.types if _differ_in_one(one, types)]
            if others and rng.random() < TYPE_MOVES:  # the same plan in another type is near too
                types = rng.choice(others)
            else:
                plan = neighbour(parent.plan, rng)
            if plan is None or plan == identity or (plan, types) in tried:
                continue
            target = self.run.target.storing(types)
            if can_run(plan, self.run.table, target) and self.run.budget.admits(
                price(plan, self.run.table, target)
            ):
                given = Given(plan, parent.fold.adapter_start)
                # Another type than the sampler would suggest: it is told of none.
                return Proposal(given, propose_recovery(_Suggest(row), self.space), "neighbour", types)
        return None

    # ---- what became of whom

    def record(self, trial: Trial) -> None:
        """Write down a trial as its worker tells it, after a rung or at its end."""
        self._keep(replace(trial, closing=self.get(trial.number).closing))

    def finish(self, number: int) -> State:
        """Tell the study how a trial ended, by what was recorded of it.

        COMPLETE only with finite objectives at the last rung (Optuna would take an infinity for a value).
        """
        trial = self.get(number)
        if trial.state == "infeasible" and trial.draft is not None:
            self._queue_one_more(number)
            self._reject(number, trial.cost)
            return "infeasible"
        if trial.state == "stopped":
            self.stop(number, trial.reason)
            return "stopped"
        if trial.state != "finished":
            self._end(number, trial.state, trial.reason)
            return trial.state
        values = point(trial, self.objectives)
        if not all(map(math.isfinite, values)):
            return self.fail(number, "diverged: its objectives are not finite numbers")
        self._price(number, trial.cost)
        self._note(trial)
        if trial.known_from is not None and self._trained_otherwise(trial, trial.known_from):
            return self.repeat(number, trial.known_from)
        self._end(number, "finished", trial.reason, values)
        return "finished"

    def stop(self, number: int, reason: str) -> None:
        """Tell the study that halving stopped a trial: PRUNED, and never on a front."""
        trial = self.get(number)
        # Healed matrices are large, and nobody exports a trial that was stopped. Who goes on with it heals again.
        self.run.trial(number).start.unlink(missing_ok=True)
        self._price(number, trial.cost)
        self._note(trial)
        self._end(number, "stopped", reason)

    def repeat(self, number: int, other: int, reason: str = "") -> State:
        """Tell the study that another trial measures, or has measured, the plan of this one.

        FAIL: the figures are of the other one's recovery settings. A sampler that was told them beside the parameters
        of this trial would learn what is not so, and PRUNED would be bad news where there is none.
        """
        self._end(number, "repeat", reason or f"the plan of trial {other}")
        return "repeat"

    def _trained_otherwise(self, trial: Trial, other: int) -> bool:
        """Whether a plan was trained by `other`, in another way than `trial` asks for."""
        return bool(trial.last.recovery_tokens) and trial.recovery != self.get(other).recovery

    def _queue_one_more(self, number: int) -> None:
        """A baseline must not be lost: blocks differ in price, and those that its criterion chose may be a hair too
        cheap for the budget that their count was chosen for. Then it is tried with the next count.
        """
        trial = self.get(number)
        proposal, removed = trial.proposal, trial.removed
        if proposal is None or proposal.origin not in ("baseline", "start") or trial.closing:
            return
        if removed is None:
            return
        more = removed.count + self.space.step
        if more > self.space.counts(self.run.num_blocks)[1]:
            return
        if any(row.user_attrs.get("after") == number for row in self.study.get_trials(deepcopy=False)):
            return  # it was killed after this, and before the study was told
        one = self.baseline(removed.criterion, more, origin=proposal.origin)
        self.put_in_line([replace(one, attributes={**one.attributes, "after": number})])

    def cut(self, number: int, reason: str) -> None:
        """Write down that the time limit ended a trial; a run that goes on begins with it. It is on no front."""
        self._change(number, state="cut", reason=reason)

    def fail(self, number: int, reason: str) -> State:
        """Tell the study that a trial failed: a row with its reason."""
        self._end(number, "failed", reason)
        return "failed"

    def _reject(self, number: int, cost: Cost, **changes: Any) -> None:
        """PRUNED with constraints: a sampler learns from it where feasible plans end (from FAIL it would not)."""
        self._price(number, cost)
        self._end(number, "infeasible", self.run.budget.excess(cost), **changes)

    # ---- writing

    def _end(
        self,
        number: int,
        state: State,
        reason: str,
        values: Sequence[float] | None = None,
        **changes: Any,
    ) -> None:
        if not self._change(number, state=state, reason=reason, **changes):
            return
        self.study.tell(number, values, state=TOLD[state])
        copy_study(self.run)
        if state == "finished":
            # What the front dominates stays dominated, so that only the front has to be looked at again.
            nearest = sorted([*self._front, self.get(number)], key=lambda known: known.number)
            self._front = front(nearest, self.objectives)

    def _change(self, number: int, **changes: Any) -> bool:
        return self._keep(replace(self.get(number), **changes))

    def _keep(self, trial: Trial) -> bool:
        """Write a trial into its row; False where somebody else has ended the row, by which the trial has failed."""
        try:
            self._rows[trial.number].set_user_attr("trial", to_json(trial))
        except optuna.exceptions.UpdateFinishedTrialError:
            self._trials[trial.number] = replace(trial, state="failed", reason=ENDED_BY_HAND)
            return False
        self._trials[trial.number] = trial
        return True

    def _price(self, number: int, cost: Cost) -> None:
        violations = self.run.budget.violations(cost)
        row = self._rows[number]
        known = row.constraints  # of a process that was killed before it told the rest
        for name, above in violations.items():
            if name not in known:
                row.set_constraint(name, above)
        # optuna-dashboard reads the key that Optuna used before version 5.
        self.study._storage.set_trial_system_attr(row._trial_id, "constraints", list(violations.values()))

    def _note(self, trial: Trial) -> None:
        from optuna_dashboard import save_note

        save_note(self._rows[trial.number], note(trial))


def _error(value: float, form: str) -> str:
    """A standard error, where there is one: texts of a single document have none."""
    return f" ± {value:{form}}" if math.isfinite(value) else ""


def _differ_in_one(one: StoredTypes, other: StoredTypes) -> bool:
    return (one.weights != other.weights) != (one.kv_cache != other.kv_cache)


def _as_text(name: str) -> str:
    """A name that a person chose, so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~-])", r"\\\1", html.escape(name, quote=False))


def note(trial: Trial) -> str:
    """What the dashboard shows beside a trial: the plan, its strip, every cost term, quality (Markdown)."""
    cost, quality, last = trial.cost, trial.quality, trial.last
    rows = [
        ("weights", f"{cost.weight_bytes / GB:.4f} GB"),
        ("adapters", f"{cost.adapter_bytes / GB:.4f} GB"),
        ("KV cache", f"{cost.kv_bytes / GB:.4f} GB"),
        ("activations", f"{cost.activation_bytes / GB:.4f} GB"),
        ("**memory**", f"**{cost.memory_bytes / GB:.4f} GB**"),
        ("prefill", f"{2 * cost.prefill_macs:.4g} FLOPs per token"),
        ("decode", f"{cost.flops:.4g} FLOPs per token"),
        *([("prompt", f"{cost.prompt_ms:.4g} ms")] if cost.prompt_ms is not None else []),
        *([("a token", f"{cost.decode_ms:.4g} ms")] if cost.decode_ms is not None else []),
        ("rung", f"{len(trial.results) - 1}, after {last.recovery_tokens} recovery tokens"),
        ("KL to dense", f"{rounded(quality.kl, '.4f')}{_error(quality.kl_se, '.4f')} nats per token"),
        (
            "perplexity",
            f"{quality.perplexity:.2f}{_error(quality.perplexity_se, '.2f')} "
            f"(dense {quality.dense_perplexity:.2f})",
        ),
        ("agreement", f"{quality.agreement:.1%}"),
    ]
    if trial.setback_words:
        rows.append(("recovery", trial.setback_words))
    for words, measured in (("search", quality), ("report", last.report)):
        for kind in measured.shown_kinds if measured else ():
            kl = f"{rounded(kind.kl, '.4f')}{_error(kind.kl_se, '.4f')} nats per token"
            rows.append((f"KL to dense, {words} texts, {_as_text(kind.title)}", kl))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"`{trial.plan}`\n\n`{strip(trial.plan)}`\n\n| | |\n|---|---|\n{table}\n"


def _read(row: FrozenTrial) -> Trial:
    value = row.user_attrs.get("trial")  # absent where the run was stopped before the trial was proposed
    try:
        trial = Trial(row.number) if value is None else from_json(Trial, value)
    except (ValueError, KeyError, TypeError, FoldsearchError) as error:
        what = f"the row of trial {row.number} in the study of a run cannot be read"
        raise RunError(
            quote_error(what, error, "Put its copy back: foldsearch check RUN --repair")
        ) from error
    if row.state.is_finished() and trial.state not in TOLD:
        return replace(trial, state="failed", reason=ENDED_BY_HAND)
    return trial


class _Suggest:
    """Optuna's trial, as a space asks it."""

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def integer(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        return self._trial.suggest_int(name, low, high, step=step)

    def number(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._trial.suggest_float(name, low, high, log=log)

    def choice(self, name: str, options: Sequence[Option]) -> Option:
        value: Any = self._trial.suggest_categorical(name, options)
        return value  # type: ignore[no-any-return]
