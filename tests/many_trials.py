"""A run folder with as many trials as wanted, in a real Optuna study in SQLite, written in one transaction.

What stands in it is made up: plans of 30 blocks, priced as they are, and a KL that grows with what they lack.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState, create_trial

from foldsearch.codec import to_json
from foldsearch.plan.cost import CostTable, price
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.plan.result import Quality, RungResult
from foldsearch.proposal import Proposal
from foldsearch.record import Draft, Trial, point
from foldsearch.run import Run
from foldsearch.search.records import Records
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study
from tests.fake_trial import BLOCK, TABLE
from tests.proposals import removing

NUM_BLOCKS = 30
CRITERIA = ("block_influence", "window", "linear_window", "greedy", "uniform", "random")
BASELINE_COUNTS = range(3, 16)


def write_run(path: Path, num_trials: int, *, seed: int = 0) -> Run:
    """Make the run; every tenth trial was stopped, every fiftieth failed, every twelfth came to a known plan."""
    table = replace(TABLE, blocks=(BLOCK,) * NUM_BLOCKS)
    study = load_study("default", {"space": "foldgpt", "rungs": [0, 100, 400], "trials": num_trials})
    with Run.draft(path) as draft:
        records = Records(Run(draft, study, table).begin(path))
    rng = random.Random(seed)
    plans: list[FoldPlan] = []
    records.study.add_trials([_trial(number, plans, rng, study, table) for number in range(num_trials)])
    return records.run


def _trial(
    number: int, plans: list[FoldPlan], rng: random.Random, study: Study, table: CostTable
) -> FrozenTrial:
    proposal, plan = _proposal(number, rng)
    known = plans.index(plan) if plan in plans else None
    if number % 12 == 11:
        known = rng.randrange(len(plans))
        plan = plans[known]
    plans.append(plan)
    results = tuple(_results(plan, known, rng, study))
    trial = Trial(
        number, "finished", proposal, Draft(plan, price(plan, table, study.target.value())), results=results
    )
    state, values = TrialState.COMPLETE, point(trial, study.objectives)
    if number % 50 == 49:
        trial = replace(trial, state="failed", results=results[:1], reason="crashed: out of paper")
        state, values = TrialState.FAIL, None
    elif number % 10 == 9 and proposal.origin != "baseline":
        trial = replace(trial, state="stopped", results=results[:2], reason="rank 3 of 4")
        state, values = TrialState.PRUNED, None
    attributes = {"origin": proposal.origin, "trial": to_json(trial)}
    row: FrozenTrial = create_trial(state=state, values=values, user_attrs=attributes)
    return row


def _proposal(number: int, rng: random.Random) -> tuple[Proposal, FoldPlan]:
    if number < len(CRITERIA) * len(BASELINE_COUNTS):
        criterion, count = CRITERIA[number % len(CRITERIA)], BASELINE_COUNTS[number // len(CRITERIA)]
        proposal = removing(criterion, count, origin="baseline")
        return proposal, FoldPlan.dropping(rng.sample(range(1, NUM_BLOCKS - 1), count), NUM_BLOCKS)
    count = rng.randint(1, 16)
    removed = sorted(rng.sample(range(1, NUM_BLOCKS), count))
    kept = [block for block in range(NUM_BLOCKS) if block not in removed]
    children = {block for block in removed if rng.random() < 0.4}
    slots = []
    for block in range(NUM_BLOCKS):
        if block in kept:
            slots.append(Slot(block, block, block))
        elif block in children:
            owner = max(other for other in kept if other < block)
            slots.append(Slot(block, owner, owner, rank=rng.choice((0, 8))))
    return removing("window", count), FoldPlan(tuple(slots), NUM_BLOCKS)


def _results(plan: FoldPlan, known: int | None, rng: random.Random, study: Study) -> Iterator[RungResult]:
    missing = len(plan.dropped) + 0.4 * sum(not own for _, _, _, own in plan.runs("mlp"))
    noise = rng.lognormvariate(0, 0.3)
    for rung, tokens in enumerate(study.rungs):
        kl = 0.03 * missing**1.3 * noise * (1 + 1 / (1 + tokens / 100))
        quality = Quality(kl, kl / 20, 30 + kl, 0.5, 30.0, 0.7, 100)
        last = rung == len(study.rungs) - 1
        report = replace(quality, kl=1.1 * kl) if last else None
        yield RungResult(quality, tokens, 12.5 * (rung + 1), report, known_from=known)
