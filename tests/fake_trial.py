"""A trial without a model: KL by arithmetic on the plan, every rung logged into a file.

Its folder is kept as `foldsearch.trial` keeps one: `trial.json` holds the results so far, and a trial whose folder
holds some goes on after the last of them. A plan that was measured is not measured again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from foldsearch.codec import to_json
from foldsearch.files import write_json
from foldsearch.identity import Identity
from foldsearch.plan.cost import BlockCost, CostTable, UnitCost, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality, RungResult
from foldsearch.proposal import Proposal
from foldsearch.record import Draft, State, Trial, plan_path, read_trial
from foldsearch.run import Run
from foldsearch.spec.study import Study
from tests.proposals import ordered_plan

NUM_BLOCKS = 12
BLOCK = BlockCost(
    UnitCost(40_000, 100, 100, 40_000, 10, 900, kv_width=64), UnitCost(120_000, 100, 100, 120_000, 0, 1500)
)
TABLE = CostTable(100, 500_000, 0, 500_000, 1000, 0, 5000, (BLOCK,) * NUM_BLOCKS)
ORDERS = {
    "gate": (6, 4, 8, 2, 10, 5, 7, 3, 9, 1),
    "block_influence": (9, 8, 7, 6, 5, 4, 3, 2, 1, 10),
    "window": (5, 6, 7, 4, 8, 3, 9, 2, 10, 1),
    "greedy": (6, 8, 4, 2, 5, 7, 9, 3, 10, 1),
}


@dataclass(frozen=True)
class FakeContext:
    """run, cache_dir, threads, device: as the search expects them."""

    run: Run
    cache_dir: Path
    threads: int = 0
    device: str = "cpu"


def prepare(
    study: Study,
    run_folder: Path,
    *,
    check: Callable[[CostTable], object] = lambda table: None,
    accept: Callable[[Identity], object] = lambda made: None,
    progress: Callable[[str, float], None] | None = None,
    notice: Callable[[str], object] = lambda words: None,
) -> FakeContext:
    check(TABLE)
    if progress is not None:
        progress("pricing the dense model", 1.0)
    return FakeContext(Run(run_folder, study, TABLE), run_folder.parent / "cache")


def trial_at(
    plan: FoldPlan, study: Study, rung: int, proposal: Proposal | None = None, number: int = 0
) -> Trial:
    """A trial after a rung, with the results of all rungs until there.

    Loss grows with dropped and shared blocks, and shrinks with recovery tokens: deterministic, no two alike.
    """
    odd = sum((block * 7919) % 13 for block in plan.dropped) / 100
    children = sum(not own for _, _, _, own in plan.runs("mlp"))
    learning_rate = 1e-3 if proposal is None else proposal.recovery.learning_rate
    results = []
    for count, tokens in enumerate(study.rungs[: rung + 1], 1):
        kl = (0.1 + 0.2 * len(plan.dropped) + 0.07 * children + odd) * (
            1 + 1 / (1 + tokens / 100)
        ) + 10 * learning_rate
        results.append(RungResult(Quality(kl, kl / 20, 30 + kl, 0.5, 30.0, 0.7, 100), tokens, 0.1 * count))
    state: State = "finished" if rung == len(study.rungs) - 1 else "running"
    drafted = Draft(plan, price(plan, TABLE, study.target.value()))
    return Trial(number, state, proposal, drafted, results=tuple(results))


def with_results(trial: Trial, change: Callable[[RungResult], RungResult]) -> Trial:
    """The trial with each of its results changed."""
    return replace(trial, results=tuple(map(change, trial.results)))


def known(trial: Trial, other: int) -> Trial:
    """The trial with results that it took from another one."""
    return with_results(trial, lambda result: replace(result, known_from=other))


def run_trial(
    proposal: Proposal,
    context: FakeContext,
    *,
    number: int,
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[Trial]:
    """`faults.json` beside the run folder says what goes wrong: {"3:1": "raise"} breaks trial 3 at rung 1, and "*:1"
    all trials; other words are "exit", "slow" (a minute), "over budget", "kill" (this process, the first time),
    "kill at its end" (where the worker lets go of the trial), "disk full" and "wait for trial 1". {"seconds": 0.2} is
    how long a rung takes.
    """
    study = context.run.study
    beside = context.run.path.parent / "faults.json"
    faults = json.loads(beside.read_text()) if beside.is_file() else {}
    plan = ordered_plan(proposal, ORDERS, NUM_BLOCKS)
    place = context.run.trial(number)
    before = read_trial(place)
    measured = plan_path(context.run, trial_at(plan, study, 0, proposal, number))
    owner = json.loads(measured.read_text())["trial"] if measured.exists() else number
    if owner != number and (other := read_trial(context.run.trial(owner))) and other.state == "finished":
        for rung in range(len(study.rungs)):
            yield known(trial_at(plan, study, rung, proposal, number), owner)
        return
    write_json(measured, {"trial": number, "plan": str(plan)})
    for rung in range(len(before.results) if before else 0, len(study.rungs)):
        log = context.run.path / "executed.log"
        executed = log.read_text() if log.is_file() else ""
        with log.open("a") as file:
            file.write(f"{number}:{rung} {os.getpid()}\n")
        fault = faults.get(f"{number}:{rung}", faults.get(f"*:{rung}"))
        if fault == "exit":
            raise SystemExit(3)
        if fault == "slow":
            for step in range(600):
                time.sleep(0.1)
                assert progress is not None
                progress("recovery", step / 600)
        if fault == "over budget":
            trial = trial_at(plan, study, 0, proposal, number)
            yield replace(trial, state="infeasible", results=(), reason="it is above the budget")
            return
        if fault == "raise":
            raise RuntimeError(f"the fake breaks here, after {time.monotonic():.3f} s")
        if fault == "disk full":
            raise OSError(28, "No space left on device")
        if fault == "disk full, in words":  # safetensors
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        if fault == "wait for trial 1":
            while "1:0 " not in log.read_text():
                time.sleep(0.05)
        if fault == "kill" and f"{number}:{rung} " not in executed:
            os.kill(os.getpid(), 9)
        if progress is not None:
            progress("recovery", 0.5)
        until = time.monotonic() + faults.get("seconds", 0.0)
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(0.1, left))
            if progress is not None:
                progress("recovery", 0.5)
        trial = trial_at(plan, study, rung, proposal, number)
        place.path.mkdir(parents=True, exist_ok=True)
        for path in (place.start, *([place.recovered] if study.rungs[rung] else [])):
            path.write_bytes(b"\x02" + bytes(7) + b"{}")  # safetensors with no tensor
        write_json(place.record, to_json(trial))  # last, as a trial does: what it names is there
        try:
            yield trial
        except GeneratorExit:  # its worker is to take the next one
            if fault == "kill at its end":
                os.kill(os.getpid(), 9)
            raise
