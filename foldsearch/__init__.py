"""foldsearch: from a decoder LLM and a device budget to folded models that were built, trained and measured.

    study = load_study("smollm2-demo", {"budget.gb": 0.28})
    run_search(study, "runs/mine")
    run = open_run("runs/mine")
    export_trial(run, run.knee.number, "exports/mine")

Each name says its shapes, units, errors and source in its own docstring:

    load_study      read a study: model, text, target, budget, space, rungs
    run_search      run a study in a folder, or go on with it
    open_run        the front, the knee and every trial of a run
    export_trial    write a trial's model and verify it in a fresh process
    ExportForm      for which runtime, and how weights are stored
    recover_trial   train a trial further, as a FurtherTraining says
    evaluate_trial  what a trial's model still knows, beside dense: questions and harness tasks
    Asked           what a model is asked: question files, tasks
    try_plan        fold, recover and measure one plan in this process
    inspect_model   how redundant the blocks of a model are
    extended        a plan that runs blocks of a small model again
    FoldPlan        what runs at each depth: a value with a text form
    fold            a plan and a dense model give a folded model
    measure         a model's cost table, by fvcore
    price           a plan's cost on a target
    CostTable, Target, Budget, Cost, Quality, Trial           values
    FoldsearchError, InputError, VerificationError            what is raised on purpose

Importing foldsearch also tells transformers about folded models, so an export loads without `trust_remote_code`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foldsearch.model.register import register
from foldsearch.version import __version__ as __version__

if TYPE_CHECKING:
    from foldsearch.api import ExportForm, export_trial, inspect_model, open_run, recover_trial, try_plan
    from foldsearch.errors import FoldsearchError, InputError, VerificationError
    from foldsearch.evaluate import Asked, evaluate_trial
    from foldsearch.model.fold import fold
    from foldsearch.model.measure import measure
    from foldsearch.model.training import FurtherTraining
    from foldsearch.plan.cost import Budget, Cost, CostTable, Target, price
    from foldsearch.plan.extend import extended
    from foldsearch.plan.plan import FoldPlan
    from foldsearch.plan.result import Quality
    from foldsearch.record import Trial
    from foldsearch.search.run import run_search
    from foldsearch.spec.load import load_study


__all__ = [
    "load_study",
    "run_search",
    "open_run",
    "ExportForm",
    "export_trial",
    "recover_trial",
    "FurtherTraining",
    "evaluate_trial",
    "Asked",
    "try_plan",
    "inspect_model",
    "extended",
    "FoldPlan",
    "fold",
    "measure",
    "price",
    "CostTable",
    "Target",
    "Budget",
    "Cost",
    "Quality",
    "Trial",
    "FoldsearchError",
    "InputError",
    "VerificationError",
]

# Where each name lives: looked up when it is first asked for, so `import foldsearch` does not wait for torch.
_HOMES = {
    "foldsearch.api": (
        "ExportForm",
        "export_trial",
        "inspect_model",
        "open_run",
        "recover_trial",
        "try_plan",
    ),
    "foldsearch.errors": ("FoldsearchError", "InputError", "VerificationError"),
    "foldsearch.evaluate": ("Asked", "evaluate_trial"),
    "foldsearch.model.fold": ("fold",),
    "foldsearch.model.measure": ("measure",),
    "foldsearch.model.training": ("FurtherTraining",),
    "foldsearch.plan.cost": ("Budget", "Cost", "CostTable", "Target", "price"),
    "foldsearch.plan.extend": ("extended",),
    "foldsearch.plan.plan": ("FoldPlan",),
    "foldsearch.plan.result": ("Quality",),
    "foldsearch.record": ("Trial",),
    "foldsearch.search.run": ("run_search",),
    "foldsearch.spec.load": ("load_study",),
}

register()


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
