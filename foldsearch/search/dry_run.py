"""What a study would do: how large its space is, what fits, and about how long and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foldsearch.machine import MACS_PER_SECOND, num_cpus
from foldsearch.model.training import SCREEN_BYTES
from foldsearch.plan.cost import GB, Cost, CostTable
from foldsearch.plan.plan import FoldPlan
from foldsearch.run import Run
from foldsearch.search.screened import is_screened
from foldsearch.spec.fit import feasible_share, for_runtime, narrow, size, smallest
from foldsearch.spec.propose import first_trials
from foldsearch.spec.study import Study

GATE_STEP_TOKENS = 512  # for estimates
HEALING = (
    2.0  # forward passes that a token of healing costs, measured 1.6: its own, the sums over it, the solving
)


def dense_fits(run: Run) -> str:
    """What to say where dense keeps the budget already; "" where it does not, or there is no budget."""
    budget, dense = run.budget, run.dense
    if (budget.memory_bytes is None and budget.flops is None) or not budget.admits(dense):
        return ""
    words = [f"{dense.memory_bytes / GB:.4f} GB" if budget.memory_bytes is not None else ""]
    words += [f"{dense.flops:.4g} FLOPs per token" if budget.flops is not None else ""]
    needs = " and ".join(word for word in words if word)
    return f"the dense model keeps the budget already (it needs {needs}); searching below it."


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a study would do. size: different proposals, recovery settings and neighbours not counted.

    feasible_share: of 100,000 random proposals, as they come. counts: blocks to drop, from and to, that can fit.
    smallest: the plan that needs the least memory. trials: as asked for, or those that every run begins with. seconds,
    disk_bytes, memory_bytes: estimates of the whole run; seconds is an upper one (no trial stopped early). notice:
    where dense keeps the budget already.
    """

    size: int
    feasible_share: float
    counts: tuple[int, int]
    dense: Cost
    smallest: FoldPlan
    smallest_cost: Cost
    trials: int
    seconds: float
    disk_bytes: int
    memory_bytes: int
    notice: str


def plan_search(
    study: Study, table: CostTable, *, macs_per_second: float | None = None, num_proposals: int = 100_000
) -> DryRun:
    """What `run_search` would do, without doing it; takes a few seconds.

    Args:
        study: what to run.
        table: the dense model's costs.
        macs_per_second: of this machine in a forward pass; 3e10 a CPU where it is not known.
        num_proposals: to draw for the feasible share.

    Raises:
        BudgetError: no plan of the space can keep the budget.
    """
    run = Run(Path(), study, table)
    target, budget, num_blocks = run.target, run.budget, run.num_blocks
    space = narrow(study.space, table, target, budget)
    plan, cost = smallest(study.space, table, target)
    trials = max(study.trials or 0, len(first_trials(space, table, target, budget)))
    rate = macs_per_second or MACS_PER_SECOND * num_cpus()
    splits = study.splits
    # A training token costs about three forward passes; gates are trained once a count and a value of gate_eps.
    search_tokens = splits.search * splits.sequence_length
    healing_tokens = min(study.healing.tokens, splits.recovery * splits.sequence_length)
    tokens = len(study.rungs) * search_tokens + splits.report * splits.sequence_length + 3 * study.rungs[-1]
    tokens += round(HEALING * healing_tokens)
    fewest, most = space.counts(num_blocks)
    gates = "gate" in space.criteria and min(trials, (most - fewest + 1) * len(space.settings("gate")))
    gate_tokens = 3 * gates * study.gates.steps * GATE_STEP_TOKENS
    forward = run.dense.prefill_macs + table.head_macs
    screened = is_screened(study, space)
    screen_tokens = HEALING * study.screen.healed_tokens + study.screen.judged_tokens
    work = trials * tokens + gate_tokens + study.screen.plans * screen_tokens * screened
    seconds = forward * work / rate  # trials at a time share the processor
    if study.seconds is not None:
        seconds = min(seconds, study.seconds) if study.trials else study.seconds
    rank = max(space.recover.delta_ranks)
    trained = sum(block.attention.adapter_width + block.mlp.adapter_width for block in table.blocks)
    trained_bytes = 4 * trained * (rank + max(space.groups.adapter_ranks))
    # What healing changes is a trial's own: of each MLP the matrix that writes, which is half of its weights at most.
    healed_bytes = 4 * sum(block.mlp.weights for block in table.blocks) // 2 if healing_tokens else 0
    activations = (
        4
        * splits.sequence_length
        * study.recovery.batch
        * (num_blocks * table.activation_width + 2 * table.vocabulary)
    )
    return DryRun(
        size=size(for_runtime(study.space, table, target), num_blocks),
        feasible_share=feasible_share(study.space, table, target, budget, num_proposals=num_proposals),
        counts=space.counts(num_blocks),
        dense=run.dense,
        smallest=plan,
        smallest_cost=cost,
        trials=trials,
        seconds=seconds,
        # What was trained, and beside it the optimizer's file of a trial that was stopped: the same and two moments.
        disk_bytes=trials * (4 * trained_bytes + healed_bytes) + 10**7,
        # weights once for the machine; each trial its parameters, gradients, two moments, activations, Python
        memory_bytes=run.dense.weight_bytes
        + SCREEN_BYTES * screened
        + study.jobs * (4 * trained_bytes + healed_bytes + activations + 6 * 10**8),
        notice=dense_fits(run),
    )
