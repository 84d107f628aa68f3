"""What a study would do: how large its space is, what fits, and about how long and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foldsearch.machine import (
    MACS_PER_SECOND,
    choose_device,
    choose_precision,
    free_memory,
    num_cpus,
)
from foldsearch.model.training import SCREEN_BYTES
from foldsearch.plan.cost import GB, Cost, CostTable, Target, price
from foldsearch.plan.latency import Latency
from foldsearch.plan.plan import FoldPlan
from foldsearch.run import Run
from foldsearch.search.screened import is_screened
from foldsearch.spec.fit import feasible_share, for_runtime, narrow, size, smallest
from foldsearch.spec.largest import smaller_steps
from foldsearch.spec.propose import first_trials
from foldsearch.spec.study import Study

GATE_STEP_TOKENS = 512  # for estimates
HEALING = 2.0  # forward passes that a token of healing costs: its own, the sums over it, the solving
SCREENED = 1.3  # the same where what attentions write stays as it is, as in a screening
TIGHT = 0.5  # of the free memory: an estimate may be wrong by so much


def dense_fits(run: Run) -> str:
    """What to say where dense, stored as the target says, keeps the budget already; "" where not, or there is none."""
    budget, dense = run.budget, price(FoldPlan.identity(run.num_blocks), run.table, run.target)
    if budget.is_open or not budget.admits(dense):
        return ""
    words = [f"{dense.memory_bytes / GB:.6g} GB" if budget.memory_bytes is not None else ""]
    words += [f"{dense.flops:.6g} FLOPs per token" if budget.flops is not None else ""]
    words += [f"{dense.prompt_ms:.4g} ms for the prompt" if budget.prompt_ms and dense.prompt_ms else ""]
    words += [f"{dense.decode_ms:.4g} ms for a token" if budget.decode_ms and dense.decode_ms else ""]
    needs = " and ".join(word for word in words if word)
    stored = f" in {run.target.types}" if run.target.rounds else ""
    return f"the dense model{stored} keeps the budget already (it needs {needs}); searching below it."


def lacks_memory(run: Run, dtype: str) -> str:
    """What to say where a search takes more memory than is free here; "" where there is enough.

    It is an estimate, and files that are mapped can be read again, so the search may do all the same.

    Args:
        run: to search.
        dtype: that trials compute in.
    """
    needed, free = memory_needed(run, dtype), free_memory()
    if needed <= free:
        return ""
    jobs, screens = run.study.jobs, is_screened(run.study, run.study.space)
    remedies = ["fewer jobs"] * (jobs > 1) + ["no screening (screen.plans = 0)"] * screens
    remedies += smaller_steps(run.study)
    return (
        f"this search takes about {needed / GB:.1f} GB of memory, and {free / GB:.1f} GB are free: it may be slow, or "
        f"end for lack of it. Less is taken by {', '.join(remedies)}."
    )


def is_tight(run: Run, dtype: str) -> bool:
    """Whether a search may come near to the memory that is free here; see `memory_needed`."""
    return memory_needed(run, dtype) > TIGHT * free_memory()


def memory_needed(run: Run, dtype: str) -> int:
    """Bytes of memory that a search takes, about.

    The dense model once, as it is mapped; of each trial its parameters, their gradients and two moments, what healing
    changed, what a step of training keeps, Python with its libraries; what a screening keeps.
    """
    study, table = run.study, run.table
    weights = price(FoldPlan.identity(run.num_blocks), table, Target(dtype)).weight_bytes
    step = 4 * study.splits.sequence_length * study.recovery.batch
    activations = step * (run.num_blocks * table.activation_width + 2 * table.vocabulary)
    of_trial = 4 * _trained_bytes(run) + _healed_bytes(run) + activations + 6 * 10**8
    return weights + SCREEN_BYTES * is_screened(study, study.space) + study.jobs * of_trial


def _trained_bytes(run: Run) -> int:
    """Of what recovery trains at most, float32."""
    space = run.study.space
    width = sum(block.attention.adapter_width + block.mlp.adapter_width for block in run.table.blocks)
    return 4 * width * (max(space.recover.delta_ranks) + max(space.groups.adapter_ranks))


def _healed_bytes(run: Run) -> int:
    """Of what healing changes: of each unit the matrix that writes, which is half of its weights at most; float32."""
    weights = sum(block.attention.weights + block.mlp.weights for block in run.table.blocks)
    return 4 * weights // 2 if run.study.healing.tokens else 0


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a study would do. size: different proposals, recovery settings and neighbours not counted.

    feasible_share: of 100,000 random proposals, as they come. counts: blocks to drop, from and to, that can fit.
    smallest: the plan that needs the least memory. trials: as asked for, or those that every run begins with. seconds,
    disk_bytes, memory_bytes: estimates of the whole run; seconds is an upper one (no trial stopped early). notice:
    where dense keeps the budget already. latency: what times are reckoned from, and timed: dense in its type of
    weights; None where no time is asked for.
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
    latency: Latency | None = None
    timed: Cost | None = None


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
    tokens = len(study.rungs) * search_tokens + splits.report * splits.sequence_length + 3 * study.rungs[-1]
    tokens += round(HEALING * study.healed_tokens)
    fewest, most = space.counts(num_blocks)
    gates = "gate" in space.criteria and min(trials, (most - fewest + 1) * len(space.settings("gate")))
    gate_tokens = 3 * gates * study.gates.steps * GATE_STEP_TOKENS
    forward = run.dense.prefill_macs + table.head_macs
    screened = is_screened(study, space)
    screen_tokens = SCREENED * study.screen.healed_tokens + study.screen.judged_tokens
    work = trials * tokens + gate_tokens + study.screen.plans * screen_tokens * screened
    seconds = forward * work / rate  # trials at a time share the processor
    if study.seconds is not None:
        seconds = min(seconds, study.seconds) if study.trials else study.seconds
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
        disk_bytes=trials * (4 * _trained_bytes(run) + _healed_bytes(run)) + 10**7,
        memory_bytes=memory_needed(run, choose_precision(study.precision, choose_device(study.device))),
        notice=dense_fits(run),
        latency=table.latency_on(target),
        timed=price(FoldPlan.identity(num_blocks), table, target) if table.latency_on(target) else None,
    )
