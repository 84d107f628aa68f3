"""A run folder with as many trials as wanted, in a real Optuna study in SQLite, written in one transaction.

What stands in it is made up: plans of 30 blocks, priced as they are, and a KL that grows with what they lack.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState, create_trial

from foldsearch.codec import to_json
from foldsearch.plan.cost import CostTable, price
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.plan.result import Quality, TrialResult
from foldsearch.proposal import Proposal
from foldsearch.run import Run
from foldsearch.search.records import Records, point
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
    results = list(_results(plan, known, rng, study, table))
    attributes = {
        "origin": proposal.origin,
        "closing": False,
        "proposal": proposal.to_json(),
        "tune_id": f"{number:08x}",
        "plan": str(plan),
    }
    if number % 50 == 49:
        return _row(TrialState.FAIL, attributes | {"reason": "crashed: out of paper"}, results[:1])
    if number % 10 == 9 and proposal.origin != "baseline":
        attributes |= {"stopped_at_rung": 1, "reason": "rank 3 of 4"}
        return _row(TrialState.PRUNED, attributes, results[:2])
    values = point(results[-1], study.objectives)
    return _row(TrialState.COMPLETE, attributes, results, values)


def _row(
    state: TrialState,
    attributes: dict[str, object],
    results: list[TrialResult],
    values: tuple[float, ...] | None = None,
) -> FrozenTrial:
    rungs = {f"rung {result.rung}": to_json(result) for result in results}
    trial: FrozenTrial = create_trial(state=state, values=values, user_attrs=attributes | rungs)
    return trial


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


def _results(
    plan: FoldPlan, known: int | None, rng: random.Random, study: Study, table: CostTable
) -> list[TrialResult]:
    missing = len(plan.dropped) + 0.4 * sum(not own for _, _, _, own in plan.runs("mlp"))
    noise = rng.lognormvariate(0, 0.3)
    found = []
    for rung, tokens in enumerate(study.rungs):
        kl = 0.03 * missing**1.3 * noise * (1 + 1 / (1 + tokens / 100))
        quality = Quality(kl, kl / 20, 30 + kl, 0.5, 30.0, 0.7, 100)
        last = rung == len(study.rungs) - 1
        found.append(
            TrialResult(
                plan=plan,
                cost=price(plan, table, study.target.value()),
                quality=quality,
                rung=rung,
                is_last_rung=last,
                recovery_tokens=tokens,
                seconds=12.5 * (rung + 1),
                state="measured" if known is None else "known",
                known_from=known,
                report=replace(quality, kl=1.1 * kl) if last else None,
            )
        )
    return found
