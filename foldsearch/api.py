"""What the commands do, for Python: each function is the work of one verb."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.errors import RunError
from foldsearch.files import write_json
from foldsearch.plan.cost import CostTable
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.proposal import Proposal
from foldsearch.plan.result import TrialResult

if TYPE_CHECKING:
    from foldsearch.export.ship import ExportReport, Form
    from foldsearch.model.evidence import Evidence
    from foldsearch.model.source import DenseFiles
    from foldsearch.report.view import Entry, RunView
    from foldsearch.search.dry_run import DryRun
    from foldsearch.spec.study import Study

Progress = Callable[[str, float], None]
"""Called with what is being done, in words, and the share of it that is, 0 to 1."""

PICK = "pick.json"
_MANY_BLOCKS = 10_000  # more than any model has: enough to read a plan before its model is known


def _silent(stage: str, share: float) -> None:
    """Nobody listens."""


# ---- before a search


def find_model(study: Study, progress: Progress = _silent) -> DenseFiles:
    """The study's model as files that can be mapped; converted once if need be.

    Raises:
        ModelError: it cannot be found, or is not a decoder.
    """
    from foldsearch.model.source import prepare
    from foldsearch.trial import choose_device, choose_precision

    return prepare(
        study.model,
        dtype=choose_precision(study.precision, choose_device(study.device)),
        trust_remote_code=study.trust_remote_code,
        progress=lambda words: progress(words, 0.0),
    )


def measure_model(study: Study, progress: Progress = _silent) -> CostTable:
    """What the blocks of the study's model cost: parameters, and MACs per token by fvcore.

    Raises:
        ModelError: the model cannot be found, or its family is not known.
    """
    from transformers import AutoConfig

    from foldsearch.model.measure import measure

    files = find_model(study, progress)
    return measure(AutoConfig.from_pretrained(files.folder, trust_remote_code=study.trust_remote_code))


def dry_run(study: Study, progress: Progress = _silent) -> DryRun:
    """What a search would do: size of the space, feasible share, estimated seconds, disk and memory in bytes.

    Raises:
        BudgetError: no plan of the space can keep the budget.
    """
    from foldsearch.search.dry_run import plan_search

    return plan_search(study, measure_model(study, progress))


def inspect_model(study: Study, progress: Progress = _silent) -> Evidence:
    """How redundant the blocks of the study's model are on its search texts (FoldGPT, Fig. 2).

    Raises:
        ModelError, DataError: the model or the text cannot be used.
    """
    from foldsearch.model.evidence import measure_evidence
    from foldsearch.model.source import open_dense, open_tokenizer
    from foldsearch.model.tokens import make_splits
    from foldsearch.trial import choose_device

    files = find_model(study, progress)
    data = study.data if isinstance(study.data, str) else study.data.model_dump()
    splits = make_splits(
        data,
        open_tokenizer(files),
        sequence_length=study.splits.sequence_length,
        num_sequences={"search": study.splits.search, "recovery": 0, "report": 0},
        text_column=study.text_column,
        progress=lambda words: progress(words, 0.0),
    )
    device = choose_device(study.device)
    return measure_evidence(
        open_dense(files, device=device),
        splits.search.ids_NT.to(device),
        progress=lambda done, total: progress("running the text through the model", done / total),
    )


def check_plan_text(text: str) -> None:
    """Read a plan before its model is known, so that a typing error is told before a model is fetched.

    Raises:
        PlanError: it cannot be read, or breaks a law for any number of blocks.
    """
    FoldPlan.parse(text, _MANY_BLOCKS)


def try_plan(
    plan: FoldPlan | str, study: Study, *, folder: Path | None = None, progress: Progress = _silent
) -> Iterator[TrialResult]:
    """Fold, recover and measure one plan in this process; yields a result per rung of the study.

    Recovery runs at the geometric middle of the space's learning rates. A budget is reported, not enforced.

    Args:
        plan: a plan of the study's model, or its text.
        study: model, text, target, rungs and recovery settings.
        folder: where to keep token sets and trained parameters; a temporary folder if None.
        progress: told what is being done.

    Raises:
        PlanError: the plan cannot be read, breaks a law, or is for another number of blocks.
        ModelError, DataError: the model or the text cannot be used.
    """
    from foldsearch.trial import prepare_context, run_trial

    text = str(plan)
    check_plan_text(text)
    with ExitStack() as held:
        if folder is None:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="foldsearch-try-")))
        folder.mkdir(parents=True, exist_ok=True)
        context = prepare_context(study, folder, progress=progress)
        recover = study.space.recover
        proposal = Proposal(
            "given",
            plan=FoldPlan.parse(text, len(context.table.blocks)),
            learning_rate=sqrt(recover.learning_rate[0] * recover.learning_rate[1]),
            delta_rank=recover.delta_ranks[len(recover.delta_ranks) // 2],
            origin="hand",
        )
        yield from run_trial(proposal, context, number=0, progress=progress)


# ---- after a search


def open_run(path: Path | str) -> RunView:
    """A run, finished or not: its front, its knee, every trial.

    Raises:
        RunError: not a run folder of this version.
    """
    from foldsearch.report.view import RunView

    return RunView.open(Path(path))


def write_report(run: RunView) -> Path:
    """Write front.png and index.html into the run's report folder; returns the page."""
    from foldsearch.report.page import draw_front, write_page

    page = run.folder.report / "index.html"
    write_page(run, page)
    if run.finished:
        draw_front(run, run.folder.report / "front.png")
    return page


def pick(run: RunView, *, number: int | None = None, max_gb: float | None = None) -> Entry:
    """Choose a finished trial and write the choice into the run folder; the knee if neither argument is given.

    Args:
        run: the run.
        number: of the trial.
        max_gb: the best quality on the search texts within this many decimal gigabytes.

    Raises:
        RunError: no such trial, or none that fits.
    """
    entry = run.pick(number=number, max_gb=max_gb)
    write_json(run.folder.path / PICK, {"trial": entry.number, "plan": str(entry.plan)})
    return entry


def picked(run: RunView) -> Entry:
    """The trial that `pick` chose; the knee if none was chosen.

    Raises:
        RunError: no trial has reached the last rung.
    """
    import json

    path = run.folder.path / PICK
    if not path.is_file():
        return run.pick()
    try:
        number = int(json.loads(path.read_text())["trial"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"'{path}' cannot be read. Choose again: foldsearch pick {run.name} --knee") from error
    return run.pick(number=number)


def export_trial(
    run: RunView, number: int, out: Path, *, form: Form = "folded", progress: Progress = _silent
) -> ExportReport:
    """Write the model of a trial, as it was measured, and verify it in a fresh process.

    Args:
        run: the run.
        number: of a trial that reached the last rung.
        out: new folder; whole or absent.
        form: "folded" (shared weights once) or "expanded" (the stock architecture).
        progress: told what is being done.

    Raises:
        RunError: the trial was not measured. InputError: `out` exists, or the disk is full.
        PlanError: the form cannot say what the plan needs. VerificationError: what was written differs.
    """
    from foldsearch.export import export
    from foldsearch.model.source import open_tokenizer
    from foldsearch.trial import open_workbench, prepare_context, recovered_model

    entry = run.pick(number=number)
    folder = run.folder
    context = prepare_context(folder.study, folder.path, progress=progress)
    progress("rebuilding the model that was measured", 0.0)
    model, result = recovered_model(context, entry.number)
    bench = open_workbench(context)
    progress("writing and verifying in a fresh process", 0.0)
    return export(
        model,
        open_tokenizer(context.files),
        out,
        plan=result.plan,
        form=form,
        dtype=folder.target.dtype,
        ids_NT=bench.splits.report.ids_NT,
        dense=bench.dense,
        details={
            "base_model": folder.study.model,
            "note": context.files.note,
            "trial": entry.number,
            "run": folder.path.name,
            "result": result.to_json(),
        },
    )


def compare_words(run: RunView, folder: Path, prompt: str, *, num_tokens: int = 40) -> tuple[str, str]:
    """How an exported model and the dense one go on after a prompt.

    Both take the likeliest token each time (greedy), with a repetition penalty of 1.2.

    Args:
        run: the run that the export came from.
        folder: of the export.
        prompt: text to continue.
        num_tokens: to add, at most.

    Raises:
        ModelError: `folder` is no exported model.
    """
    from foldsearch.export import load_exported
    from foldsearch.model.source import open_dense, open_tokenizer

    files = find_model(run.folder.study)
    tokenizer = open_tokenizer(files)
    ids_BT = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids

    def words(model: Any) -> str:
        made_BT = model.generate(
            ids_BT,
            attention_mask=ids_BT.new_ones(ids_BT.shape),
            max_new_tokens=num_tokens,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=tokenizer.eos_token_id,
        )
        return str(tokenizer.decode(made_BT[0, ids_BT.shape[1] :], skip_special_tokens=True)).strip()

    return words(load_exported(folder)[0]), words(open_dense(files))
