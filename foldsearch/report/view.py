"""What there is to see in a run: its trials, and the questions that every report asks of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import floor, inf, isfinite, isnan, log10
from operator import attrgetter
from pathlib import Path
from statistics import correlation
from typing import NamedTuple

from foldsearch.criteria import criterion_names, criterion_of
from foldsearch.errors import RunError
from foldsearch.paths import command, printable
from foldsearch.plan.cost import GB, Cost, no_less
from foldsearch.plan.front import knee
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality, rounded
from foldsearch.plan.stored import StoredTypes, widest_first
from foldsearch.proposal import Given, Proposal
from foldsearch.record import (
    DenseRival,
    Trial,
    best_of_plans,
    front,
    point,
    read_rivals,
    read_trial,
)
from foldsearch.run import Run
from foldsearch.runtimes import Runtime
from foldsearch.runtimes.nearest import price_there
from foldsearch.search.records import read_trials
from foldsearch.search.screened import Screened, read_screened, screened_by_count

FEWEST_TO_RANK = 4  # plans, that an order of them says something
SAME_COST = 1.02  # a baseline that costs a hair more is still the one to beat
FURTHER = "Trained further: that trial alone got more training; the figures in the tables are of the last rung for all."
NO_ERROR = "± —: no standard error, as all texts of the split, or of the kind, are one document."


@dataclass(frozen=True)  # without slots: what a report asks for many times is computed once and kept
class RunView:
    """A run as it stands: the folder, its trials by number, and what must be said beside a figure of the model.

    A plan that reached the last rung is shown as the trial that measured it; others that came to it are named there.
    """

    folder: Run
    trials: tuple[Trial, ...] = field(repr=False)
    note: str = ""

    @classmethod
    def open(cls, path: Path) -> RunView:
        """Read a run folder; safe while the run goes on.

        Raises:
            RunError: not a run folder.
        """
        folder = Run.open(path)
        return cls(folder, tuple(read_trials(folder)), folder.note)

    @property
    def name(self) -> str:
        """The run folder, as it was named; for messages and reports."""
        return printable(self.folder.path)

    @property
    def model(self) -> str:
        """The dense model, as the study names it; for messages and reports."""
        return printable(self.folder.study.model)

    @property
    def data(self) -> str:
        """The texts, as the study names them; for messages and reports."""
        names = dict.fromkeys(one.source for one in self.folder.study.all_sources())
        return ", ".join(map(printable, names))

    @property
    def tokens_words(self) -> str:
        """What the trials' models were made with: a token of healing goes forward only, one of training back too."""
        study = self.folder.study
        # the text may be shorter than a study asks for: trials tell what they had
        told = [trial.healing.tokens for trial in self.finished if trial.healing is not None]
        tokens = max(told, default=study.healed_tokens)
        healed = f"healed on {tokens:,} tokens, forward only; " if tokens else ""
        return f"{healed}trained on {study.rungs[-1]:,} tokens at most"

    @property
    def dense_perplexity(self) -> float | None:
        """Of the dense model on the report texts; None if no trial has reached the last rung yet."""
        finished = self.finished
        return finished[0].final.dense_perplexity if finished else None

    @cached_property
    def rivals(self) -> tuple[DenseRival, ...]:
        """The dense model with weights of fewer bits, where it was measured."""
        return read_rivals(self.folder.rivals)

    @cached_property
    def screened(self) -> list[Screened]:
        """The plans that were healed and measured before any was trained."""
        return read_screened(self.folder.screened)

    @property
    def num_screened(self) -> int:
        """How many plans were healed and measured before any was trained."""
        return len(self.screened)

    @cached_property
    def agreements(self) -> list[Agreement]:
        """How alike neighbouring measurements order the plans: screening and the first rung, each rung and the next.

        Only where `FEWEST_TO_RANK` plans were measured in both. A plan in other types is another model; what was
        screened is held against the widest of them, as nothing was rounded there.
        """
        widest = widest_first(self.folder.study.space.types)[0]
        told: list[tuple[str, dict[tuple[FoldPlan, StoredTypes], float]]] = [
            ("screening", {(one.plan, widest): one.quality.kl for one in self.screened})
        ]
        for rung, tokens in enumerate(self.folder.study.rungs):
            kls = {
                (trial.plan, trial.types): trial.results[rung].quality.kl
                for trial in self.trials
                if len(trial.results) > rung and trial.results[rung].known_from is None
            }
            told.append((f"{tokens:,} tokens", kls))
        found = []
        for (one, first), (other, second) in pairwise(told):
            both = [plan for plan in first if plan in second]
            if len(both) >= FEWEST_TO_RANK:
                value = rank_correlation([first[plan] for plan in both], [second[plan] for plan in both])
                found.append(Agreement(f"{one} and {other}", len(both), value))
        return found

    def screened_by_count(self) -> dict[int, dict[str, Screened]]:
        """Of these, by the number of dropped blocks, the best of each criterion and of the search."""
        return screened_by_count(self.screened)

    @cached_property
    def finished(self) -> tuple[Trial, ...]:
        """The trials that measured a plan to the last rung, each plan once, the best where it was measured twice."""
        return tuple(best_of_plans(self.trials))

    @cached_property
    def _came_to(self) -> dict[tuple[FoldPlan, StoredTypes], list[Trial]]:
        """For each plan and the types of it the trials that came to it and have a result, also of another trial."""
        found: dict[tuple[FoldPlan, StoredTypes], list[Trial]] = {}
        for trial in self.trials:
            if trial.results:
                found.setdefault((trial.plan, trial.types), []).append(trial)
        return found

    def repeats(self, trial: Trial) -> tuple[int, ...]:
        """The other trials that came to a trial's plan."""
        return tuple(
            other.number for other in self._came_to[trial.plan, trial.types] if other.number != trial.number
        )

    def proposals(self, trial: Trial) -> list[Proposal]:
        """All proposals that led to a trial's plan, by the number of the trial."""
        return [
            other.proposal for other in self._came_to[trial.plan, trial.types] if other.proposal is not None
        ]

    def authors(self, trial: Trial) -> tuple[str, ...]:
        """Who chose the blocks of a trial's plan, each once: a criterion, or who gave the plan."""
        proposed = [author(proposal) for proposal in self.proposals(trial)]
        screened = [_criterion_words(name) for name in self._screened_by.get(trial.plan, ())]
        return tuple(dict.fromkeys((*proposed, *screened)))

    def baseline(self, trial: Trial) -> str | None:
        """The first simple baseline that gives a trial's plan, or gave it to the screening; gates are not simple."""
        named = [p.removed.criterion for p in self.proposals(trial) if p.removed and p.origin == "baseline"]
        named += self._screened_by.get(trial.plan, ())
        return next((name for name in named if criterion_of(name).is_simple), None)

    @cached_property
    def _screened_by(self) -> dict[FoldPlan, tuple[str, ...]]:
        """The criteria that chose a plan which was screened."""
        names = criterion_names()
        return {one.plan: tuple(name for name in one.authors if name in names) for one in self.screened}

    @cached_property
    def front(self) -> tuple[Trial, ...]:
        """The Pareto front of the finished trials, largest memory first."""
        return tuple(sorted(front(self.finished, self.folder.study.objectives), key=by_cost))

    @cached_property
    def knee(self) -> Trial | None:
        """The front's compromise (see `foldsearch.plan.front.knee`)."""
        points = [point(trial, self.folder.study.objectives) for trial in self.front]
        return self.front[knee(points)] if points else None

    @cached_property
    def baselines(self) -> tuple[Trial, ...]:
        """The finished trials that a simple baseline leads to."""
        return tuple(trial for trial in self.finished if self.baseline(trial) is not None)

    @cached_property
    def front_and_baselines(self) -> tuple[Trial, ...]:
        """What a table shows, largest memory first."""
        return tuple(
            sorted({trial.number: trial for trial in (*self.front, *self.baselines)}.values(), key=by_cost)
        )

    @cached_property
    def further(self) -> dict[int, Trial]:
        """The finished trials that were trained beyond the last rung, by number: as they are now."""
        found = ((one.number, read_trial(self.folder.trial(one.number).further)) for one in self.finished)
        return {number: trial for number, trial in found if trial is not None}

    def latest(self, trial: Trial) -> Trial:
        """A trial with all of its training, also that beyond the last rung."""
        return self.further.get(trial.number, trial)

    def further_words(self, trial: Trial) -> str:
        """What training beyond the last rung came to, for one line of a report; empty where there was none."""
        if (now := self.further.get(trial.number)) is None:
            return ""
        tokens = f"trained further, {trial.last.recovery_tokens:,} → {now.last.recovery_tokens:,} tokens"
        if now.last.report is None:
            kls = (
                f"search KL {rounded(trial.quality.kl, '.3f')} → {rounded(now.quality.kl, '.3f')}, not ended"
            )
        else:
            kls = (
                f"report KL {rounded(trial.final.kl, '.3f')} → {rounded(now.final.kl, '.3f')}, perplexity "
                f"{trial.final.perplexity:.2f} → {now.final.perplexity:.2f}"
            )
        return f"{tokens}: {kls}" + (f"; {now.setback_words}" if now.setback_words else "")

    def gain(self, trial: Trial) -> float | None:
        """KL on the report texts, less that of the baseline to beat: below 0, the search found something better.

        The baseline to beat has the lowest KL of those that cost no more memory and no more FLOPs, give or take 2 %;
        None where there is none, or where `trial` is it.
        """
        fair = [
            other
            for other in self.baselines
            if other.cost.memory_bytes <= SAME_COST * trial.cost.memory_bytes
            and other.cost.flops <= SAME_COST * trial.cost.flops
        ]
        best = min(fair, key=report_kl, default=None)
        return None if best is None or best.number == trial.number else trial.final.kl - best.final.kl

    def by_count(self) -> dict[int, dict[str, Trial]]:
        """For each number of dropped blocks, by criterion, the plan of lowest KL on the search texts.

        Only plans that do nothing but drop blocks, at each count in the types in which most criteria reached it: a
        plan in other types is another model. Counts that only one criterion reached are left out.
        """
        rows: dict[tuple[int, StoredTypes], dict[str, Trial]] = {}
        for trial in sorted(self.finished, key=lambda trial: trial.quality.kl, reverse=True):
            if trial.plan.only_drops:
                for proposal in self.proposals(trial):
                    name = proposal.removed.criterion if proposal.removed else proposal.origin
                    rows.setdefault((len(trial.plan.dropped), trial.types), {})[name] = trial
        found: dict[int, dict[str, Trial]] = {}
        for types in widest_first({types for _, types in rows}):
            for count in sorted(count for count, of_row in rows if of_row == types):
                if len(row := rows[count, types]) > max(1, len(found.get(count, {}))):
                    found[count] = row
        return dict(sorted(found.items()))

    def best_held(self, runtime: Runtime, within: Trial) -> Trial | None:
        """The finished trial of lowest KL on the search texts, of those that a runtime holds; None where there is none.

        within: it takes no more memory than this one.
        """
        table, target = self.folder.table, self.folder.target
        fitting = [
            trial
            for trial in self.finished
            if runtime.holds(trial.plan, table)
            and price_there(trial.plan, runtime, table, target.storing(trial.types)).memory_bytes
            <= within.cost.memory_bytes
        ]
        return min(fitting, key=lambda trial: trial.quality.kl, default=None)

    def pick(
        self,
        *,
        number: int | None = None,
        max_gb: float | None = None,
        max_prompt_ms: float | None = None,
        max_decode_ms: float | None = None,
    ) -> Trial:
        """The trial a person means: by its number, or of lowest KL within all bounds that are given, or the knee.

        Raises:
            RunError: no such trial, or none that fits; or the run has no times to bound.
        """
        finished = self.finished
        if not finished:
            raise RunError(
                f"only a trial that reached the last rung can be picked, and '{self.name}' has none yet. "
                f"Go on with: {command('resume', self.folder.path)}"
            )
        if number is not None:
            return self._numbered(number)
        bounds = _bounds(max_gb, max_prompt_ms, max_decode_ms)
        if not bounds:
            assert self.knee is not None
            return self.knee
        fitting = self._keeping(finished, bounds)
        if not fitting:
            raise RunError(self._none_keeps(bounds))
        # by the search texts: the report texts stay unseen by every choice
        return min(fitting, key=lambda trial: trial.quality.kl)

    def within(
        self,
        trials: Sequence[Trial],
        *,
        max_gb: float | None = None,
        max_prompt_ms: float | None = None,
        max_decode_ms: float | None = None,
    ) -> list[Trial]:
        """Those of the trials that keep all bounds that are given.

        Raises:
            RunError: the run has no times to bound.
        """
        return self._keeping(trials, _bounds(max_gb, max_prompt_ms, max_decode_ms))

    def _keeping(self, trials: Sequence[Trial], bounds: Sequence[_Bound]) -> list[Trial]:
        for bound in bounds:
            if all(bound.term(trial.cost) is None for trial in self.finished):
                raise RunError(
                    f"--{bound.option} bounds milliseconds, which are measured before a search that bounds or lowers "
                    f"them, but in '{self.name}' they were not. Leave it out, or search anew: foldsearch run "
                    f"--{bound.of_run} MS"
                )
        return [trial for trial in trials if all(bound.admits(trial.cost) for bound in bounds)]

    def _none_keeps(self, bounds: Sequence[_Bound]) -> str:
        asked = " and ".join(f"{bound.most:g} {bound.what}" for bound in bounds)
        least = " and ".join(
            f"{no_less(min(x for trial in self.finished if (x := bound.term(trial.cost)) is not None))} {bound.what}"
            for bound in bounds
        )
        smallest = "the smallest needs" if len(bounds) == 1 else "the least of each is"
        raised, run = (
            " or ".join(f"--{getattr(bound, name)}" for bound in bounds) for name in ("option", "of_run")
        )
        return (
            f"no finished trial of '{self.name}' fits {asked}: {smallest} {least}. Raise {raised}, or run a search "
            f"with a smaller {run}."
        )

    def _numbered(self, number: int) -> Trial:
        """The finished trial of that number.

        Raises:
            RunError: there is none.
        """
        for trial in self.finished:
            if trial.number == number:
                return trial
            if number in self.repeats(trial):
                raise RunError(
                    f"trial {number} of '{self.name}' has the same plan as trial {trial.number}, which measured "
                    f"it. Name that one: --trial {trial.number}"
                )
        known = ", ".join(str(trial.number) for trial in self.finished)
        raise RunError(
            f"only a trial that reached the last rung can be picked, got {number}. "
            f"Those of '{self.name}' that did: {known}."
        )


class _Bound(NamedTuple):
    """A bound on a term of the price.

    most: the bound. what: its unit, in words. option: that sets it; of_run: that bounds the same for a search. term: of
    a price; None where it was not measured.
    """

    most: float
    what: str
    option: str
    of_run: str
    term: Callable[[Cost], float | None]

    def admits(self, cost: Cost) -> bool:
        """Whether the price keeps the bound; one without the term does not."""
        value = self.term(cost)
        return value is not None and value <= self.most


def _bounds(max_gb: float | None, max_prompt_ms: float | None, max_decode_ms: float | None) -> list[_Bound]:
    """The bounds that are given."""

    def memory(cost: Cost) -> float:
        return cost.memory_bytes / GB

    given = (
        (max_gb, "GB", "max-gb", "budget-gb", memory),
        (max_prompt_ms, "ms for a prompt", "max-prompt-ms", "max-prompt-ms", attrgetter("prompt_ms")),
        (max_decode_ms, "ms for a token", "max-decode-ms", "max-decode-ms", attrgetter("decode_ms")),
    )
    return [
        _Bound(most, what, option, of_run, term)
        for most, what, option, of_run, term in given
        if most is not None
    ]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two measurements order the plans that both have: Spearman's rank correlation, 1 for the same order."""

    between: str
    plans: int
    correlation: float


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs; 0 where all values of one are equal."""

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(values)
        return [(bisect_left(order, value) + bisect_right(order, value)) / 2 for value in values]

    one, two = ranks(first), ranks(second)
    return correlation(one, two) if len(set(one)) > 1 and len(set(two)) > 1 else 0.0


def author(proposal: Proposal) -> str:
    """Who chose the blocks of a proposal, in a word or two; what became of them where they are not dropped.

    Also in which types it is stored, where the space has several.
    """
    return ", ".join(filter(None, (_chosen_by(proposal), proposal.types.label)))


def searched_types(folder: Run) -> StoredTypes:
    """The types of the target, or all that the space has."""
    space = folder.study.space
    return folder.target.storing(StoredTypes(", ".join(space.weights), ", ".join(space.kv_cache))).types


def _chosen_by(proposal: Proposal) -> str:
    fold, removed = proposal.fold, proposal.removed
    if isinstance(fold, Given):
        return proposal.origin
    if removed is None:
        return "sharing" if fold.groups else "attention"
    name = _criterion_words(removed.criterion)
    if removed.setting is not None:
        name += f" {removed.setting:g}"
    return f"{name} → {removed.fate.title}" if removed.fate.title else name


def _criterion_words(name: str) -> str:
    return name.replace("block_influence", "influence").replace("_", " ")


def report_kl(trial: Trial) -> float:
    """KL on the report texts, to find the least; one that is no number is the worst."""
    return inf if isnan(trial.final.kl) else trial.final.kl


def by_cost(trial: Trial) -> tuple[int, int, int]:
    """Sorts by memory, then FLOPs, the largest first."""
    return -trial.cost.memory_bytes, -trial.cost.flops, trial.number


def milliseconds(value: float) -> str:
    """Three digits, and whole from a thousand on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def flops_unit(dense: Cost) -> tuple[str, float]:
    """The unit that FLOPs per token read well in, and how many FLOPs it is."""
    return ("G", 1e9) if dense.flops >= 1e10 else ("M", 1e6) if dense.flops >= 1e7 else ("k", 1e3)


def with_error(value: float, error: float, form: str) -> str:
    """A figure ± its standard error, both in the same format; ± — where it has none (see `NO_ERROR`)."""
    return f"{rounded(value, form)} ± " + (f"{error:{form}}" if isfinite(error) else "—")


def counted(number: int, noun: str) -> str:
    """1 trial, 2 trials."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def gb(size: int, dense: Cost) -> str:
    """Bytes as decimal gigabytes, with as many digits as tell apart plans of a model of this size."""
    return f"{size / GB:.{max(2, 3 - floor(log10(dense.memory_bytes / GB)))}f}"


def has_errors(*qualities: Quality | None) -> bool:
    """Whether all of them have standard errors; those of a split that is one document have none."""
    told = [quality for quality in qualities if quality is not None]
    errors = [*(quality.kl_se for quality in told), *(kind.kl_se for one in told for kind in one.shown_kinds)]
    return all(map(isfinite, errors))
