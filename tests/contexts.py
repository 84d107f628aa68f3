"""Studies and runs of a tiny random model, and the context of trials with another run in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from foldsearch.context import TrialContext
from foldsearch.plan.result import Quality
from foldsearch.prepare import prepare_context
from foldsearch.run import Run
from foldsearch.search.records import Records
from foldsearch.shipped import judged
from foldsearch.spec.space import Space
from foldsearch.spec.study import GateSettings, RecoverySettings, SplitSettings, Study
from foldsearch.trial import run_trial
from tests.tiny import save_model, write_corpus


def tiny_study(place: Path, *, around: str = "$A", **settings: Any) -> Study:
    """A study of a tiny model and of texts that are written into `place`; `settings` are the study's own."""
    torch.set_num_threads(1)
    usual = {
        "model": save_model(place / "model", around=around),
        "data": write_corpus(place / "corpus"),
        "space": Space(),
        "device": "cpu",
        "precision": "float32",
        "rungs": (0, 64),
        "splits": SplitSettings(sequence_length=32, search=2, recovery=4, report=2),
        "gates": GateSettings(steps=2),
        "recovery": RecoverySettings(batch=2),  # a step that memory does not hold is taken in halves
    }
    return Study(**{**usual, **settings})


def tiny_context(place: Path, **settings: Any) -> TrialContext:
    """The context of trials of such a study, in `place`/run."""
    return prepare_context(tiny_study(place, **settings), place / "run", cache_dir=place / "cache")


def begin_run(study: Study, path: Path, **settings: Any) -> TrialContext:
    """A run without trials; `settings` are those of `prepare_context`."""
    with Run.draft(path) as draft:
        made = prepare_context(study, draft, **settings)
        return replace(made, run=made.run.begin(path))


def run_queued(context: TrialContext, criterion: str, count: int) -> int:
    """Run a baseline as the search would, without Ray; its number."""
    records = Records(context.run)
    records.queue(criterion, count)
    number, proposal = records.ask()
    for trial in run_trial(proposal, context, number=number):
        records.record(trial)
    records.finish(number)
    return number


def quality_of(context: TrialContext, model: PreTrainedModel) -> tuple[Quality, Quality]:
    """Quality of a model on the search and on the report texts of a run, with the weights of its target."""
    return judged(model, context, "search", context.target), judged(model, context, "report", context.target)


def of_run(context: Any, **changes: Any) -> Any:
    """The same context of a run that differs, say in its `path` or `study`."""
    return replace(context, run=replace(context.run, **changes))


def of_study(context: Any, **changes: Any) -> Any:
    """The same context of a run whose study differs."""
    return of_run(context, study=context.run.study.model_copy(update=changes))
