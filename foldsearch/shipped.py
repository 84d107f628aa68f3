"""A model as its target stores it: with the weights of the runtime that ships, whatever it was computed with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from foldsearch.codec import to_json
from foldsearch.context import TrialContext, open_workbench
from foldsearch.errors import ModelError
from foldsearch.files import write_json
from foldsearch.machine import MACS_PER_SECOND, num_cpus
from foldsearch.model.gguf.kv_cache import round_kv_cache
from foldsearch.model.judge import judge
from foldsearch.model.workbench import Workbench
from foldsearch.plan.cost import Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.plan.stored import StoredTypes
from foldsearch.progress import CountProgress, Notice, StageProgress, silent, unheard
from foldsearch.record import DenseRival
from foldsearch.runtimes import runtime_named
from foldsearch.spec.study import TYPED, Study

# Forward passes that a token takes of a rival: two heads, as that of dense is another, and the rounding of its weights.
RIVAL = 2.0
# They compute in float32: how much longer that takes where the dense model was asked in bfloat16, as it is on AMX. The
# rivals of the demo took 36 s there, where 14 s were reckoned without it.
IN_FLOAT32 = 3.0
RIVALS = "rivals"  # where they are kept in the cache
Split = Literal["search", "report"]


def judged(
    model: PreTrainedModel,
    context: TrialContext,
    split: Split,
    target: Target,
    progress: CountProgress | None = None,
) -> Quality:
    """Quality of a model on a token set of the run, with the weights that the target stores.

    Args:
        model: a folded or a stock one; where the target `rounds`, what was trained in it is merged.
        context: of the run.
        split: of its texts.
        target: says in which type matrices are stored.
        progress: told how many sequences are done.
    """
    return judged_each(model, context, (split,), target, progress)[0]


def judged_each(
    model: PreTrainedModel,
    context: TrialContext,
    splits: Sequence[Split],
    target: Target,
    progress: CountProgress | None = None,
) -> list[Quality]:
    """See `judged`, on several token sets: weights are rounded once."""
    bench = open_workbench(context)
    held, dense = (as_stored(model, target), bench.dense) if target.rounds else (model, None)
    return [
        judge(held, getattr(bench.splits, one), getattr(bench, one), dense=dense, progress=progress)
        for one in splits
    ]


def as_stored(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """The stock model with the numbers that the target's runtime stores, in float32, those of its KV cache too.

    A target that `rounds` has a runtime that writes types of weights (see `foldsearch.spec.study`).
    """
    writer = runtime_named(target.runtime).writer
    held: Any = writer.rounded(writer.before_rounding(model)[0], target.weights)
    placed: PreTrainedModel = held.to(model.device)
    if target.kv_cache:
        round_kv_cache(placed, target.kv_cache)
    return placed


# ---- rivals


@dataclass(frozen=True, slots=True)
class _Measured:
    search: Quality
    report: Quality


def rivals_seconds(context: TrialContext) -> float:
    """Seconds that `measure_rivals` takes for what is not known yet.

    By those of asking the dense model; where its answers were known, by what a core is thought to do.
    """
    study, run, bench = context.study, context.run, open_workbench(context)
    if study.budget.gb is None:
        return 0.0
    new = [
        types
        for types in study.rivals()
        if not bench.knows(RIVALS, bench.splits.report, **_of(bench, study, types))
    ]
    tokens = (study.splits.search + study.splits.report) * study.splits.sequence_length
    slower = IN_FLOAT32 if context.files.dtype == "bfloat16" else 1.0
    thought = (run.dense.prefill_macs + run.table.head_macs) / (MACS_PER_SECOND * num_cpus())
    return slower * RIVAL * tokens * (context.token_seconds or thought) * len(new)


def _target_of(study: Study, types: StoredTypes) -> Target:
    return study.target.stored_in(types.weights, TYPED).storing(types)


def _of(bench: Workbench, study: Study, types: StoredTypes) -> dict[str, str]:
    """What the figures of a rival depend on, beside the dense model and the report texts."""
    of = {"search": bench.splits.search.content_hash, "weights": types.weights}
    cached = _target_of(study, types).kv_cache
    return of | ({"kv_cache": cached} if cached else {})


def measure_rivals(
    context: TrialContext,
    progress: StageProgress = silent,
    notice: Notice = unheard,
    is_late: Callable[[], bool] = lambda: False,
) -> tuple[DenseRival, ...]:
    """Measure the rivals that the study names, and keep them in the run's folder; none without a budget of bytes.

    Args:
        context: of the run.
        progress: told which is measured.
        notice: told where llama.cpp has no such model, and what the time leaves out.
        is_late: whether the time is up, after which no other is begun; those that are known cost none.
    """
    settings, bench = context.study.target, open_workbench(context)
    rivals = context.study.rivals()
    if context.study.budget.gb is None or not rivals:
        return ()
    try:
        runtime_named(TYPED).writer.check_model(bench.dense.config, settings.context)
    except ModelError as error:
        notice(f"the dense model is not measured in fewer bits: {error}")
        return ()
    found, left_out = [], []
    for number, types in enumerate(rivals):
        of = _of(bench, context.study, types)
        if is_late() and not bench.knows(RIVALS, bench.splits.report, **of):
            left_out.append(str(types))
            continue
        progress(f"the dense model in {types}", number / len(rivals))
        target = _target_of(context.study, types)

        def measure() -> _Measured:
            return _Measured(*judged_each(bench.dense, context, ("search", "report"), target))  # noqa: B023

        known, _ = bench.once(RIVALS, _Measured, bench.splits.report, measure, **of)
        cost = price(FoldPlan.identity(len(context.table.blocks)), context.table, target)
        found.append(DenseRival(types.weights, cost, known.search, known.report, target.kv_cache))
    if left_out:
        notice(
            f"the time is up, so the dense model is not measured in {' and '.join(left_out)}: give the run more."
        )
    write_json(context.run.rivals, [to_json(one) for one in found])
    return tuple(found)
