"""What there is to see in a run: its records, and the questions that every report asks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import floor, isfinite, log10
from pathlib import Path
from statistics import correlation

from foldsearch.criteria import criterion_of
from foldsearch.errors import RunError
from foldsearch.paths import command, printable
from foldsearch.plan.cost import GB, Cost
from foldsearch.plan.front import knee
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality, TrialResult, rounded
from foldsearch.proposal import Given, Proposal
from foldsearch.run import Run
from foldsearch.search.records import Record, front, point, read_records
from foldsearch.search.screened import Screened, read_screened, screened_by_count

FEWEST_TO_RANK = 4  # plans, that an order of them says something
SAME_COST = 1.02  # a baseline that costs a hair more is still the one to beat
NO_ERROR = "± —: no standard error, as all texts of the split, or of the kind, are one document."


@dataclass(frozen=True, slots=True)
class Entry:
    """A trial that reached the last rung: one row of a table, one point of a picture.

    proposals: all those that led to its plan, its own first. quality: on the search texts, which the search looked
    at. final: on the report texts, which it did not. repeats: other trials that came to the same plan.
    """

    number: int
    proposals: tuple[Proposal, ...]
    result: TrialResult
    quality: Quality
    final: Quality
    repeats: tuple[int, ...] = ()

    @property
    def plan(self) -> FoldPlan:
        """What was built."""
        return self.result.plan

    @property
    def cost(self) -> Cost:
        """What it costs on the target."""
        return self.result.cost

    @property
    def is_baseline(self) -> bool:
        """Whether one of the simple baselines gives this plan; gates are not one."""
        return self.baseline is not None

    @property
    def baseline(self) -> str | None:
        """The first simple baseline that gives this plan."""
        baselines = [p.removed.criterion for p in self.proposals if p.removed and p.origin == "baseline"]
        names = [name for name in baselines if criterion_of(name).is_simple]
        return names[0] if names else None

    @property
    def authors(self) -> tuple[str, ...]:
        """Who chose the blocks, each once: a criterion, or who gave the plan."""
        return tuple(dict.fromkeys(author(proposal) for proposal in self.proposals))


@dataclass(frozen=True)  # without slots: what a report asks for many times is computed once and kept
class RunView:
    """A run as it stands: the folder, its records by number, and what must be said beside a figure of the model."""

    folder: Run
    records: tuple[Record, ...]
    note: str = ""

    @classmethod
    def open(cls, path: Path) -> RunView:
        """Read a run folder; safe while the run goes on.

        Raises:
            RunError: not a run folder.
        """
        folder = Run.open(path)
        return cls(folder, tuple(read_records(folder)), folder.note)

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
        healed = f"healed on {study.healing.tokens:,} tokens, forward only; " if study.healing.tokens else ""
        return f"{healed}trained on {study.rungs[-1]:,} tokens at most"

    @property
    def dense_perplexity(self) -> float | None:
        """Of the dense model on the report texts; None if no trial has reached the last rung yet."""
        finished = self.finished
        return finished[0].final.dense_perplexity if finished else None

    @cached_property
    def _screened(self) -> list[Screened]:
        return read_screened(self.folder.screened)

    @property
    def num_screened(self) -> int:
        """How many plans were healed and measured before any was trained."""
        return len(self._screened)

    def agreements(self) -> list[Agreement]:
        """How alike neighbouring measurements order the plans: screening and the first rung, each rung and the next.

        Only where `FEWEST_TO_RANK` plans were measured in both.
        """
        told: list[tuple[str, dict[FoldPlan, float]]] = [
            ("screening", {one.plan: one.quality.kl for one in self._screened})
        ]
        for rung, tokens in enumerate(self.folder.study.rungs):
            kls = {
                result.plan: result.quality.kl
                for record in self.records
                for result in record.results
                if result.rung == rung and result.state == "measured" and result.quality is not None
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
        return screened_by_count(self._screened)

    @cached_property
    def finished(self) -> tuple[Entry, ...]:
        """The plans that reached the last rung, each once, by the number of the trial that measured it."""
        proposals: dict[FoldPlan, list[Proposal]] = {}
        numbers: dict[FoldPlan, list[int]] = {}
        measured: dict[FoldPlan, tuple[int, TrialResult, Quality]] = {}
        for record in self.records:
            result = record.last
            if result is None or result.quality is None:
                continue
            numbers.setdefault(result.plan, []).append(record.number)
            if record.proposal is not None:  # also of a trial that left the plan to another one
                proposals.setdefault(result.plan, []).append(record.proposal)
            if record.state == "finished" and result.state == "measured":
                known = measured.get(result.plan)
                # Twice, where the first was stopped or diverged, or where adapters start in two ways: the best counts.
                if known is None or result.quality.kl < known[2].kl:
                    measured[result.plan] = (record.number, result, result.quality)
        return tuple(
            Entry(
                number,
                tuple(proposals.get(plan, ())),
                result,
                quality,
                result.report or quality,
                repeats=tuple(other for other in numbers[plan] if other != number),
            )
            for plan, (number, result, quality) in measured.items()
        )

    @cached_property
    def front(self) -> tuple[Entry, ...]:
        """The Pareto front of the finished trials, largest memory first."""
        numbers = {record.number for record in front(self.records, self.folder.study.objectives)}
        return tuple(sorted((e for e in self.finished if e.number in numbers), key=by_cost))

    @cached_property
    def knee(self) -> Entry | None:
        """The front's compromise (see `foldsearch.plan.front.knee`)."""
        entries = self.front
        points = [point(entry.result, self.folder.study.objectives) for entry in entries]
        return entries[knee(points)] if entries else None

    @cached_property
    def baselines(self) -> tuple[Entry, ...]:
        """The finished trials that a simple baseline leads to."""
        return tuple(entry for entry in self.finished if entry.is_baseline)

    @cached_property
    def front_and_baselines(self) -> tuple[Entry, ...]:
        """What a table shows, largest memory first."""
        numbers = {entry.number for entry in self.front}
        shown = (entry for entry in self.finished if entry.is_baseline or entry.number in numbers)
        return tuple(sorted(shown, key=by_cost))

    def gain(self, entry: Entry) -> float | None:
        """KL on the report texts, less that of the baseline to beat: below 0, the search found something better.

        The baseline to beat has the lowest KL of those that cost no more memory and no more FLOPs, give or take 2 %;
        None where there is none, or where `entry` is it.
        """
        fair = [
            other
            for other in self.baselines
            if other.cost.memory_bytes <= SAME_COST * entry.cost.memory_bytes
            and other.cost.flops <= SAME_COST * entry.cost.flops
        ]
        best = min(fair, key=_final_kl, default=None)
        return None if best is None or best.number == entry.number else _final_kl(entry) - _final_kl(best)

    def by_count(self) -> dict[int, dict[str, Entry]]:
        """For each number of dropped blocks, by criterion, the plan of lowest KL on the search texts.

        Only plans that do nothing but drop blocks. Counts that only one criterion reached are left out.
        """
        found: dict[int, dict[str, Entry]] = {}
        for entry in sorted(self.finished, key=_kl, reverse=True):
            if entry.plan.only_drops:
                for proposal in entry.proposals:
                    name = proposal.removed.criterion if proposal.removed else proposal.origin
                    found.setdefault(len(entry.plan.dropped), {})[name] = entry
        return {count: row for count, row in sorted(found.items()) if len(row) > 1}

    def pick(self, *, number: int | None = None, max_gb: float | None = None) -> Entry:
        """The trial a person means: by its number, or of lowest KL within `max_gb`, or the knee.

        Raises:
            RunError: no such trial, or none that fits.
        """
        finished = self.finished
        if not finished:
            raise RunError(
                f"only a trial that reached the last rung can be picked, and '{self.name}' has none yet. "
                f"Go on with: {command('resume', self.folder.path)}"
            )
        if number is not None:
            for entry in finished:
                if entry.number == number:
                    return entry
                if number in entry.repeats:
                    raise RunError(
                        f"trial {number} of '{self.name}' has the same plan as trial {entry.number}, which measured "
                        f"it. Name that one: --trial {entry.number}"
                    )
            known = ", ".join(str(entry.number) for entry in finished)
            raise RunError(
                f"only a trial that reached the last rung can be picked, got {number}. "
                f"Those of '{self.name}' that did: {known}."
            )
        if max_gb is None:
            chosen = self.knee
            assert chosen is not None
            return chosen
        fitting = [entry for entry in finished if entry.cost.memory_bytes <= max_gb * GB]
        if not fitting:
            least = min(entry.cost.memory_bytes for entry in finished) / GB
            raise RunError(
                f"no finished trial of '{self.name}' fits {max_gb:g} GB: the smallest needs {least:.4f} GB. "
                "Raise --max-gb, or run a search with a smaller --budget-gb."
            )
        # by the search texts: the report texts stay unseen by every choice
        return min(fitting, key=_kl)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two measurements order the plans that both have: Spearman's rank correlation, 1 for the same order."""

    between: str
    plans: int
    correlation: float


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing theirs; 0 where all values of one are equal."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2
            for value in values
        ]

    one, two = ranks(first), ranks(second)
    return correlation(one, two) if len(set(one)) > 1 and len(set(two)) > 1 else 0.0


def author(proposal: Proposal) -> str:
    """Who chose the blocks of a proposal, in a word or two, and what became of them where they are not dropped."""
    fold, removed = proposal.fold, proposal.removed
    if isinstance(fold, Given):
        return proposal.origin
    if removed is None:
        return "sharing" if fold.groups else "attention"
    name = removed.criterion.replace("block_influence", "influence").replace("_", " ")
    if removed.setting is not None:
        name += f" {removed.setting:g}"
    return f"{name} → {removed.fate.title}" if removed.fate.title else name


def by_cost(entry: Entry) -> tuple[int, int, int]:
    """Sorts by memory, then FLOPs, the largest first."""
    return -entry.cost.memory_bytes, -entry.cost.flops, entry.number


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


def _kl(entry: Entry) -> float:
    return entry.quality.kl


def _final_kl(entry: Entry) -> float:
    return entry.final.kl
