"""How long trials take on this machine, from what this run has measured: for limits that are kept and ETAs that hold.

All trials of a run train and measure on the same tokens; they differ in what a token costs in their plan. So each rung
has one duration, that of the dense model, and a trial takes it times its plan's share of the dense model's MACs. Rungs
that no trial has reached yet are reckoned from their tokens: at the pace of the others, before the first one at that of
asking the dense model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from foldsearch.bound import lower_bound
from foldsearch.plan.cost import Cost, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.proposal import Proposal
from foldsearch.record import Trial
from foldsearch.run import Run
from foldsearch.search.dry_run import GATE_STEP_TOKENS, HEALING
from foldsearch.spec.propose import baseline_count
from foldsearch.spec.space import Space
from foldsearch.spec.study import Study

# Seconds that the first round takes longer than the others, 17 to 34 in six demos on two cores: Ray begins (12), its
# workers read the libraries and the model (8), and drafts ask the dense model for residual states.
START = 35.0
LONGEST = 1.05  # of a trial's time: a round takes as long as the longest of its trials
# Of a round, what screening gives at most for one more: it is also what the last round may be late by, and then the
# time that was given is lost, as a round that would not end in time is not begun.
GIVEN = 0.25
# Of a round, what screening leaves of the time that no round fills: a trial was reckoned 13 % too long in one demo and
# 10 % too short in others, and a round that is lost for seconds costs more than those seconds of screening.
KEPT = 0.4
TRAINING = 3.0  # a token of training costs about three forward passes


def rung_work(study: Study, rung: int) -> float:
    """Tokens that a trial goes over from the rung before to the end of this one, in forward passes."""
    length, splits = study.splits.sequence_length, study.splits
    trained = study.rungs[rung] - (study.rungs[rung - 1] if rung else 0)
    healed = 0 if rung else study.healed_tokens
    report = splits.report if rung == len(study.rungs) - 1 else 0
    return HEALING * healed + TRAINING * trained + (splits.search + report) * length


def screening_seconds(study: Study, left: float, closing: float, trial: float) -> float:
    """How much of the time of a run its screening has: about its share, so that the rest holds whole rounds of trials.

    Those of a round take about as long as one another, and one that would not end in time is not begun. What is wanting
    to one more round is taken from the screening where it is little; what no round fills goes to it, but for `KEPT`.

    Args:
        study: of the run.
        left: seconds.
        closing: those of them that are kept for what comes after the last trial.
        trial: that one is thought to take; 0 where it is not known.
    """
    share = study.screen.share * left
    rest, trial = left - closing - share - START, LONGEST * trial
    if not 0 < trial <= rest:
        return share
    rounds = math.floor(rest / trial + GIVEN)
    if rounds * trial - rest > share / 2:
        rounds -= 1
    spare = rest - rounds * trial
    return share + (spare if spare < 0 else max(0.0, spare - KEPT * trial))


@dataclass(slots=True)
class _Observed:
    """Seconds, and what they were spent on."""

    seconds: float = 0.0
    shares: float = 0.0  # of the dense model's MACs, summed over trials
    work: float = 0.0  # tokens times shares


@dataclass(slots=True)
class Pace:
    """Durations of trials of one run.

    token_seconds: a forward pass of the dense model over one token, in one of the run's jobs, before any trial has
    measured it.
    """

    run: Run
    token_seconds: float
    _rungs: dict[int, _Observed] = field(default_factory=dict)
    _gates: list[float] = field(default_factory=list)
    _dense_macs: float = field(init=False)

    def __post_init__(self) -> None:
        """The dense model is priced once: its share is asked for every rung of every trial."""
        self._dense_macs = self.run.dense.prefill_macs + self.run.table.head_macs

    def look_at(self, trials: list[Trial]) -> None:
        """Learn from the results so far."""
        self._rungs, self._gates = {}, []
        study = self.run.study
        for trial in trials:
            before = 0.0
            for rung, result in enumerate(trial.results):
                took, before = result.seconds - before, result.seconds
                if result.known_from is not None:
                    continue
                if rung == 0 and (gated := trial.gated) is not None and not gated["from_cache"]:
                    self._gates.append(gated["seconds"])
                    took = max(0.0, took - gated["seconds"])
                share = self._share(trial.cost)
                observed = self._rungs.setdefault(rung, _Observed())
                observed.seconds += took
                observed.shares += share
                observed.work += share * rung_work(study, rung)

    def rung(self, number: int, cost: Cost) -> float:
        """Seconds from the rung before to the end of this one, of a plan of this cost."""
        observed = self._rungs.get(number)
        if observed is not None and observed.shares:
            return observed.seconds / observed.shares * self._share(cost)
        return self._token() * rung_work(self.run.study, number) * self._share(cost)

    def largest(self, space: Space) -> float:
        """Seconds of a trial whose plan is given, and drops no more blocks than the budget asks for."""
        run = self.run
        fewest = space.counts(run.num_blocks)[0]
        count = baseline_count(space, run.table, run.target, run.budget)
        if count is None or run.budget.admits(run.timed_dense):  # baselines drop more than they must then
            count = max(1, fewest)
        plan = FoldPlan.dropping(range(min(count, run.num_blocks - 1)), run.num_blocks)
        cost = price(plan, run.table, run.target)
        return sum(self.rung(rung, cost) for rung in range(len(run.study.rungs)))

    def whole(self, proposal: Proposal, *, first_rung: int = 0, cached_gates: bool = False) -> float:
        """Seconds that a trial of this proposal takes from a rung on, if nothing stops it."""
        cost = lower_bound(proposal, self.run.table, self.run.target)
        seconds = sum(self.rung(rung, cost) for rung in range(first_rung, len(self.run.study.rungs)))
        removed = proposal.removed
        if removed is not None and removed.criterion == "gate" and not first_rung and not cached_gates:
            seconds += self._gate()
        return seconds

    def _gate(self) -> float:
        if self._gates:
            return sum(self._gates) / len(self._gates)
        return self._token() * TRAINING * self.run.study.gates.steps * GATE_STEP_TOKENS

    def _token(self) -> float:
        work = sum(observed.work for observed in self._rungs.values())
        seconds = sum(observed.seconds for observed in self._rungs.values())
        return seconds / work if work else self.token_seconds

    def _share(self, cost: Cost) -> float:
        return (cost.prefill_macs + self.run.table.head_macs) / self._dense_macs
