"""A model as its target stores it: with the weights of the runtime that ships, whatever it was computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from foldsearch.codec import to_json
from foldsearch.context import TrialContext, open_workbench
from foldsearch.errors import ModelError
from foldsearch.files import write_json
from foldsearch.model.judge import judge
from foldsearch.plan.cost import Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.progress import Notice, StageProgress, silent, unheard
from foldsearch.record import DenseRival
from foldsearch.runtimes import runtime_named
from foldsearch.spec.study import TYPED

Split = Literal["search", "report"]


def judged(model: PreTrainedModel, context: TrialContext, split: Split, target: Target) -> Quality:
    """Quality of a model on a token set of the run, with the weights that the target stores.

    Args:
        model: a folded or a stock one; where the target `rounds`, what was trained in it is merged.
        context: of the run.
        split: of its texts.
        target: says in which type matrices are stored.
    """
    bench = open_workbench(context)
    tokens, targets = getattr(bench.splits, split), getattr(bench, split)
    if not target.rounds:
        return judge(model, tokens, targets)
    return judge(as_stored(model, target), tokens, targets, dense=bench.dense)


def as_stored(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """The stock model with the numbers that the target's runtime stores, in float32.

    A target that `rounds` has a runtime that writes types of weights (see `foldsearch.spec.study`).
    """
    writer = runtime_named(target.runtime).writer
    held: Any = writer.rounded(writer.before_rounding(model)[0], target.weights)
    placed: PreTrainedModel = held.to(model.device)
    return placed


# ---- rivals


@dataclass(frozen=True, slots=True)
class _Measured:
    search: Quality
    report: Quality


def measure_rivals(
    context: TrialContext, progress: StageProgress = silent, notice: Notice = unheard
) -> tuple[DenseRival, ...]:
    """Measure the rivals that the study names, and keep them in the run's folder; none without a budget of bytes.

    Args:
        context: of the run.
        progress: told which is measured.
        notice: told where llama.cpp has no such model.
    """
    settings, bench = context.study.target, open_workbench(context)
    if context.study.budget.gb is None or not settings.rivals:
        return ()
    try:
        runtime_named(TYPED).writer.check_model(bench.dense.config, settings.context)
    except ModelError as error:
        notice(f"the dense model is not measured in fewer bits: {error}")
        return ()
    found = []
    for number, weights in enumerate(settings.rivals):
        progress(f"the dense model in {weights}", number / len(settings.rivals))
        target = settings.stored_in(weights, TYPED)

        def measure() -> _Measured:
            return _Measured(
                *(judged(bench.dense, context, split, target) for split in ("search", "report"))  # noqa: B023
            )

        texts = bench.splits.search.content_hash
        known, _ = bench.once(
            "rivals", _Measured, bench.splits.report, measure, weights=weights, search=texts
        )
        cost = price(FoldPlan.identity(len(context.table.blocks)), context.table, target)
        found.append(DenseRival(weights, cost, known.search, known.report))
    write_json(context.run.rivals, [to_json(one) for one in found])
    return tuple(found)
