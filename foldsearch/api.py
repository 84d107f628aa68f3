"""What the commands do, for Python: each function is the work of one verb."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.errors import InputError, PlanError, RunError, quote_error
from foldsearch.files import check_writable, replace_atomically, write_json
from foldsearch.paths import check_path, command, printable
from foldsearch.plan.cost import GB, CostTable, Target, price
from foldsearch.plan.plan import MOST_BLOCKS, FoldPlan, check_ranks
from foldsearch.plan.result import rounded
from foldsearch.plan.stored import StoredTypes
from foldsearch.progress import Notice, StageProgress, silent, unheard
from foldsearch.record import Trial, read_trial
from foldsearch.run import Run, RunFolder
from foldsearch.runtimes import ALL_CAN, STOCK, Runtime, exported_bytes, runtime_for, runtime_named
from foldsearch.runtimes.nearest import nearest_held, price_there

if TYPE_CHECKING:
    from foldsearch.context import TrialContext
    from foldsearch.export.family import Family
    from foldsearch.export.figures import ExportReport, Predicted
    from foldsearch.export.recheck import Rechecked
    from foldsearch.export.reproduce import Reproduced
    from foldsearch.model.evidence import Evidence
    from foldsearch.model.source import DenseFiles
    from foldsearch.model.training import FurtherTraining, Trained
    from foldsearch.proposal import Proposal
    from foldsearch.report.view import RunView
    from foldsearch.search.check import Checked
    from foldsearch.search.dry_run import DryRun
    from foldsearch.spec.study import Study

_TRIED = 0  # number of the only trial in the folder of `try_plan`
_LARGE_NUMBER = re.compile(r"[0-9]{5}")  # which has no place in a model of that many


# ---- before a search


def find_model(
    study: Study, progress: StageProgress = silent, *, run_folder: Path | None = None
) -> DenseFiles:
    """The study's model as files that can be mapped; converted once if need be.

    Args:
        study: names the model.
        progress: told what is being done.
        run_folder: of a run that was made with the model.

    Raises:
        ModelError: it cannot be found, or is not a decoder.
        RunError: it is another one than the run was made with.
    """
    from foldsearch.prepare import open_source, prepare_model

    found = open_source(study, progress, run_folder=run_folder)
    return prepare_model(study, found, run_folder=run_folder, progress=progress)[0]


def measure_model(study: Study, progress: StageProgress = silent, notice: Notice = unheard) -> CostTable:
    """What the blocks of the study's model cost: parameters, and MACs per token by fvcore. No weight is read.

    `notice` is told where the model is a part of another one.

    Raises:
        ModelError: the model cannot be found, or its family is not known.
    """
    from foldsearch.model.source import open_config
    from foldsearch.prepare import cost_table, open_source, say_part

    found = open_source(study, progress)
    table = cost_table(found, open_config(found))
    say_part(study, found, table, notice)
    return table


@dataclass(frozen=True, slots=True)
class ExportForm:
    """How a model is exported.

    to: the name of the runtime (see `foldsearch.runtimes`); None takes the one that `runtime_for` names.
    weights: one of the types in which that runtime stores weights; empty stores them as the target does, where it is
    the target's runtime, else as the target's dtype is.
    overwrite: replace an export that is there. shows_text: whether tokens of the report texts go into the export, so
    that its figures can be taken again anywhere. compares: whether the dense model is measured beside it.
    kv_cache: the type in which the runtime is to hold keys and values; empty as for the weights.
    """

    to: str | None = None
    weights: str = ""
    overwrite: bool = False
    shows_text: bool = True
    compares: bool = True
    kv_cache: str = ""

    def runtime(self, plan: FoldPlan, target: Target, table: CostTable) -> Runtime:
        """What a plan is exported to."""
        if self.to:
            return runtime_named(self.to)
        return runtime_for(plan, target.runtime, by_position=table.by_position)

    def stored(self, runtime: Runtime, target: Target) -> str:
        """In which type the runtime is to store weights; empty for the dtype's own."""
        ours = target.weights if target.rounds and runtime.name == target.runtime else ""
        return self.weights or ours

    def cached(self, runtime: Runtime, target: Target) -> str:
        """In which type the runtime is to hold keys and values; empty for its own.

        Raises:
            InputError: it holds them in its own way only, or has no such type.
        """
        if self.kv_cache:
            runtime.check_cache_type(self.kv_cache)
        return self.kv_cache or (target.kv_cache if runtime.name == target.runtime else "")


def dry_run(study: Study, progress: StageProgress = silent, notice: Notice = unheard) -> DryRun:
    """What a search would do: size of the space, feasible share, estimated seconds, disk and memory in bytes.

    The model's config and tokenizer and the text are read, no weight; `notice` is told where the text is not as it was
    asked for.

    Raises:
        BudgetError: no plan of the space can keep the budget.
        ModelError, DataError: the model or the text cannot be used.
        RunError: there is no run as the study is to begin with.
    """
    from foldsearch.machine import choose_device
    from foldsearch.model.source import check_cache, default_cache_dir, open_config, open_tokenizer
    from foldsearch.prepare import (
        check_data,
        check_study_shapes,
        cost_table,
        make_study_splits,
        open_source,
        say_part,
        say_unused,
        with_times,
    )
    from foldsearch.search.dry_run import plan_search
    from foldsearch.search.warm import check_warm
    from foldsearch.spec.unused import unused_settings

    for words in unused_settings(study):
        notice(words)
    choose_device(study.device)
    check_warm(study)
    check_data(study)
    found = open_source(study, progress)
    say_unused(study, found, notice)
    config = open_config(found)
    if words := check_study_shapes(study, config):
        notice(words)
    table = cost_table(found, config)
    say_part(study, found, table, notice)
    study.narrowed(table)  # refused before the text is read
    check_warm(study, table)
    if study.has_times:
        cache_dir = default_cache_dir()
        check_cache(cache_dir)
        table = with_times(study, found, config, table, cache_dir, (progress, notice))
        study.narrowed(table)
    splits = make_study_splits(study, open_tokenizer(found), progress, notice=notice)
    tokens = splits.hashes()
    if study.own_text()[1]:
        del tokens["recovery"]  # the text that the model writes itself is not among them yet
    check_warm(study, table, tokens)
    progress("counting proposals", 0.0)
    return plan_search(study, table)


def inspect_model(study: Study, progress: StageProgress = silent, notice: Notice = unheard) -> Evidence:
    """How redundant the blocks of the study's model are on its search texts (FoldGPT, Fig. 2).

    Args:
        study: model and text.
        progress: told what is being done.
        notice: told, in words, where the text is not as it was asked for.

    Raises:
        ModelError, DataError: the model or the text cannot be used.
    """
    from foldsearch.machine import choose_device
    from foldsearch.model.checks import check_tokens
    from foldsearch.model.evidence import measure_evidence
    from foldsearch.model.source import open_config, open_dense, open_tokenizer
    from foldsearch.prepare import (
        check_data,
        check_study_shapes,
        make_study_splits,
        open_source,
        prepare_model,
        say_unused,
    )

    device = choose_device(study.device)
    check_data(study)
    found = open_source(study, progress)
    say_unused(study, found, notice)
    config = open_config(found)  # refused before the text is read
    if words := check_study_shapes(study, config):
        notice(words)
    splits = make_study_splits(study, open_tokenizer(found), progress, search_only=True, notice=notice)
    check_tokens(study.model, config.vocab_size, [splits.search.ids_NT])
    files, _ = prepare_model(study, found, progress=progress)
    return measure_evidence(
        open_dense(files, device=device),
        splits.search,
        progress=lambda done, total: progress("running the text through the model", done / total),
    )


def check_plan_text(text: str) -> None:
    """Read a plan before its model is known, so that a typing error is told before a model is fetched.

    A block that no model has is left to the model, whose number of blocks the message then says.

    Raises:
        PlanError: it cannot be read, or breaks a law for any number of blocks.
    """
    if not _LARGE_NUMBER.search(text):
        FoldPlan.parse(text, MOST_BLOCKS)


def try_plan(
    plan: FoldPlan | str,
    study: Study,
    *,
    folder: Path | str | None = None,
    trains: Trained | None = None,
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> Iterator[Trial]:
    """Fold, recover and measure one plan in this process; yields the trial as it stands after each rung.

    Recovery runs at the geometric middle of the space's learning rates. A budget is reported, not enforced.

    Args:
        plan: a plan of the study's model, or its text.
        study: model, text, target, rungs and recovery settings.
        folder: where to keep token sets and trained parameters; a temporary folder if None. A plan that was not tried
            there last begins anew.
        trains: what is trained (see `foldsearch.model.recover`); the first that the space names if None.
        progress: told what is being done.
        notice: told, in words, what a person should know.

    Raises:
        PlanError: the plan cannot be read, breaks a law, or is for another number of blocks.
        ModelError, DataError: the model or the text cannot be used.
        RunError: `folder` is that of a run, or was made with another model or text.
    """
    from foldsearch.prepare import prepare_context
    from foldsearch.proposal import Given, Proposal
    from foldsearch.spec.propose import Plain, propose_recovery
    from foldsearch.spec.unused import unused_settings
    from foldsearch.trial import run_trial

    text = str(plan)
    check_plan_text(text)
    folder = None if folder is None else Path(folder)
    if folder is not None and RunFolder(folder).study_file.exists():
        raise RunError(
            f"a plan is tried in a folder of its own, but '{printable(folder)}' is a run. Name another one."
        )
    for words in unused_settings(study, only=("recovery",)):
        notice(words)
    with ExitStack() as held:
        if folder is None:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="foldsearch-try-")))
        context = prepare_context(  # it makes the folder, once all can be used
            study,
            folder,
            check=lambda table: _check_tried(FoldPlan.parse(text, len(table.blocks)), table, study),
            progress=progress,
            notice=notice,
        )
        given = Given(FoldPlan.parse(text, len(context.table.blocks)))
        recovery = propose_recovery(Plain({"delta_rank": study.space.recover.middle_rank}), study.space)
        proposal = Proposal(given, replace(recovery, trains=trains or recovery.trains), "hand")
        _forget_others(context.run, proposal)
        known = read_trial(context.run.trial(_TRIED))
        if known is not None and known.state == "finished":
            yield known
        else:
            yield from run_trial(proposal, context, number=_TRIED, progress=progress)


def _forget_others(run: Run, proposal: Proposal) -> None:
    """Remove what another proposal, or another study, came to in the folder of `try_plan`; note which this is."""
    asked = {"proposal": proposal.to_json(), "study": run.study.model_dump(mode="json")}
    note = run.path / "tried.json"
    with suppress(OSError, ValueError, RecursionError):
        if json.loads(note.read_text()) == json.loads(json.dumps(asked)):
            return
    for path in (run.trial(_TRIED).path, run.path / "plans"):
        shutil.rmtree(path, ignore_errors=True)
    write_json(note, asked)


def _check_tried(plan: FoldPlan, table: CostTable, study: Study) -> None:
    """What can be refused of a plan when the model's shape is known.

    Raises:
        PlanError: it cannot be folded, or the runtime that is to store its weights in few bits cannot hold it.
    """
    check_ranks(plan, table.width)
    target = study.narrowest()
    runtime = runtime_named(target.runtime)
    refusal = runtime.refusal(plan, by_position=table.by_position, family=table.family)
    if target.rounds and refusal is not None:
        what, remedy = refusal
        if (found := nearest_held(plan, runtime, table, target)) is not None:
            remedy = f"try the nearest plan that it holds, '{found.plan}': {found.words}"
        raise PlanError(
            f"a model with weights in {target.types} is measured as the {runtime.name} runtime stores it, which has "
            f"{runtime.blocks} only, but the plan '{plan}' has {what}. Leave the type of weights out, or {remedy}."
        )


def export_tried(
    study: Study,
    folder: Path,
    out: Path,
    *,
    form: ExportForm | None = None,
    progress: StageProgress = silent,
) -> ExportReport:
    """Write the model that `try_plan` measured last in `folder`, and verify it in a fresh process.

    Args:
        study, folder: as `try_plan` was given them.
        out, form, progress: see `export_trial`.

    Raises:
        RunError: nothing was measured there. Else as `export_trial`.
    """
    from foldsearch.prepare import prepare_context

    context = prepare_context(study, folder, progress=progress)
    return _export(context, _TRIED, out, form or ExportForm(), None, progress)


# ---- after a search


def open_run(path: Path | str) -> RunView:
    """A run, finished or not: its front, its knee, every trial.

    Raises:
        RunError: not a run folder of this version.
    """
    from foldsearch.report.view import RunView

    return RunView.open(Path(path))


def check_run(path: Path | str, *, repair: bool = False) -> Checked:
    """Whether everything that a run keeps is whole, and its study and its folders agree.

    Args:
        path: of the run folder.
        repair: mend what has a second source.

    Raises:
        RunError: not a run folder of this version, or somebody is at work in it.
    """
    from foldsearch.search.check import check_run as look

    return look(Run.open(Path(path)), repair=repair)


def write_report(run: RunView) -> Path:
    """Write front.png and index.html into the run's report folder; returns the page."""
    from foldsearch.report.page import write_page
    from foldsearch.report.picture import front_png

    page = run.folder.page
    picture = front_png(run) if run.finished else b""
    write_page(run, page, picture)
    if picture:
        replace_atomically(run.folder.picture, lambda path: path.write_bytes(picture))
    return page


def pick(
    run: RunView,
    *,
    number: int | None = None,
    max_gb: float | None = None,
    max_prompt_ms: float | None = None,
    max_decode_ms: float | None = None,
) -> Trial:
    """Choose a finished trial and write the choice into the run folder; the knee if no other argument is given.

    Args:
        run: the run.
        number: of the trial.
        max_gb: the best quality on the search texts within this many decimal gigabytes.
        max_prompt_ms: and within this many milliseconds to read a prompt, where the run has measured them.
        max_decode_ms: and to write a token after it.

    Raises:
        RunError: no such trial, or none that fits; or milliseconds were not measured.
    """
    trial = run.pick(number=number, max_gb=max_gb, max_prompt_ms=max_prompt_ms, max_decode_ms=max_decode_ms)
    write_json(run.folder.pick, {"trial": trial.number, "plan": str(trial.plan)})
    return trial


def picked(run: RunView) -> Trial:
    """The trial that `pick` chose; the knee if none was chosen.

    Raises:
        RunError: no trial has reached the last rung.
    """
    from foldsearch.codec import from_json

    path = run.folder.pick
    if not path.is_file():
        return run.pick()
    try:
        number = from_json(int, json.loads(path.read_text())["trial"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = f"Choose again: {command('pick', run.folder.path, '--knee')}"
        raise RunError(quote_error(f"'{printable(path)}' cannot be read", error, remedy)) from error
    return run.pick(number=number)


def recover_trial(
    run: RunView,
    number: int,
    asked: FurtherTraining,
    *,
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> Iterator[Trial]:
    """Train a trial beyond the last rung of its run; yields it, with all of its results, after every step.

    The same call goes on from the state that was written last, whatever stopped it. In the run, the trial stays what it
    was; `export_trial` ships the best of all its states.

    Args:
        run: the run.
        number: of a trial that reached the last rung.
        asked: how far, and how.
        progress: told what is being done.
        notice: told what a person should know.

    Raises:
        RunError: the trial was not measured, or somebody else is at work in the run, or the model or the tokens are
            others than the run was made with.
        InputError: it was trained on more tokens already, or by another `trains`.
    """
    from foldsearch.context import read_splits
    from foldsearch.further import is_done, recover_further, standing
    from foldsearch.prepare import prepare_context

    trial, folder = run.pick(number=number), run.folder
    with folder.held():
        if is_done(standing(folder, number, asked), folder, asked):
            notice(f"trial {number} was trained on {asked.tokens:,} tokens already.")
            return
        held = read_splits(folder).recovery.ids_NT.numel()
        if asked.tokens > held:
            notice(
                f"the recovery texts hold {held:,} tokens, so {asked.tokens:,} go through them "
                f"{asked.tokens / held:.1f} times, each time in a new order. For more text: [splits] recovery, in a "
                "new run."
            )
        context = prepare_context(folder.study, folder.path, progress=progress, notice=notice)
        yield from recover_further(trial.number, context, asked, progress=progress)


def export_trial(
    run: RunView,
    number: int,
    out: Path | str,
    *,
    form: ExportForm | None = None,
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> ExportReport:
    """Write the model of a trial, as it was measured, and verify it in a fresh process.

    The model is rebuilt from what the run kept, judged on the report tokens, and compared with what was recorded of it.

    Args:
        run: the run.
        number: of a trial that reached the last rung.
        out: new folder; whole or absent.
        form: for which runtime, and how weights are stored.
        progress: told what is being done.
        notice: told what a person should know.

    Raises:
        RunError: the trial was not measured, or the model or the tokens are others than the run was made with.
        InputError: `out` exists, or the disk is full. PlanError: the runtime cannot do what the plan needs.
        VerificationError: the rebuilt model, or what was written, is not the model that was measured.
    """
    from foldsearch.export import check_export
    from foldsearch.prepare import prepare_context

    out, trial = Path(out), run.pick(number=number)
    folder = run.folder
    form = form or ExportForm()
    runtime = form.runtime(trial.plan, folder.target, folder.table)
    runtime.stored_as(folder.target.dtype, form.stored(runtime, folder.target.storing(trial.types)))
    form.cached(runtime, folder.target)
    _check_held(run, trial, runtime)
    check_export(out, trial.plan, runtime.name, table=folder.table, overwrite=form.overwrite)
    if trial.number in run.further:
        words = run.further[trial.number].tokens_words
        notice(f"trial {number} was trained further; what ships is its best state: {words}.")
    context = prepare_context(folder.study, folder.path, progress=progress, notice=notice)
    return _export(context, trial.number, out, form, trial, progress)


def _check_held(run: RunView, trial: Trial, runtime: Runtime) -> None:
    """Whether a runtime can hold the plan of a trial.

    Raises:
        PlanError: it cannot; the message says the nearest plan that it can, and the best trial that is as small.
    """
    table, path = run.folder.table, run.folder.path
    refusal = runtime.refusal(trial.plan, by_position=table.by_position, family=table.family)
    if refusal is None:
        return
    what, remedy = refusal
    target, better = run.folder.target.storing(trial.types), run.best_held(runtime, trial)

    def gb(plan: FoldPlan) -> str:
        return f"{price_there(plan, runtime, table, target).memory_bytes / GB:.4f} GB"

    words = f"{runtime.refused(trial.plan, what)} Export it to {ALL_CAN}, or "
    nearest = nearest_held(trial.plan, runtime, table, target)
    if nearest is None:
        words += f"{remedy}."
    else:
        words += (
            f"take the nearest plan that it holds, '{nearest.plan}': {nearest.words}; {gb(nearest.plan)}, this one "
            f"{trial.cost.memory_bytes / GB:.4f}."
        )
        if better is None or better.plan != nearest.plan:
            words += f" Measure it: {command('try', str(nearest.plan), '--study', path)}"
    if better is not None:
        told = command("export", path, "--trial", str(better.number), "--to", runtime.name, "--out", "DIR")
        words += (
            f" Of the trials that it holds and that are as small, number {better.number} is the best: "
            f"'{better.plan}', {gb(better.plan)}, KL {rounded(better.final.kl, '.3f')}, this one "
            f"{rounded(trial.final.kl, '.3f')}: {told}"
        )
    raise PlanError(words)


def export_front(
    run: RunView,
    numbers: Sequence[int],
    out: Path,
    *,
    form: ExportForm | None = None,
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> Family:
    """Write several trials into one folder that stores each tensor once; each of them loads where it lies.

    Each is exported and verified as by `export_trial`, without the dense model beside it, and checked once more when
    its weights lie with those of the others. Until then the disk holds all of them in full.

    Args:
        run: the run.
        numbers: of trials that reached the last rung, each once.
        out: new folder; whole or absent.
        form: for which runtime, `folded` or `stock`; where none is named, `stock` if that is what each would get alone.
        progress: told what is being done.
        notice: told what a person should know.

    Raises:
        InputError: another runtime, or `out` exists. Else as `export_trial`.
    """
    from foldsearch.export.family import FAMILY, member_name, pool
    from foldsearch.export.folder import check_new, whole_or_absent

    form, folder = form or ExportForm(), run.folder
    trials = [run.pick(number=number) for number in dict.fromkeys(numbers)]
    runtimes = [form.runtime(trial.plan, folder.target, folder.table).name for trial in trials]
    name = runtimes[0] if len(set(runtimes)) == 1 else ALL_CAN
    if name not in (STOCK, ALL_CAN):
        raise InputError(
            f"points share files of weights in exports to {STOCK} and {ALL_CAN}; got {name}. Name one of these by --to."
        )
    for trial in trials:
        _check_held(run, trial, runtime_named(name))
    check_path(out, "a path of exports")
    check_new(out, overwrite=form.overwrite, marks=(FAMILY,))
    check_writable(out.parent, "exports")
    out.parent.mkdir(parents=True, exist_ok=True)
    one = replace(form, to=name, overwrite=False, compares=False)
    separate = sum(exported_bytes(trial.plan, folder.table, folder.target)[name] or 0 for trial in trials)
    with whole_or_absent(out, separate, overwrite=form.overwrite, marks=(FAMILY,)) as temporary:
        for trial in trials:
            notice(f"trial {trial.number}: {trial.plan}")
            place = temporary / member_name(trial.number)
            export_trial(run, trial.number, place, form=one, progress=progress, notice=notice)
        return pool(temporary, [trial.number for trial in trials], out, progress)


def write_passport(
    run: RunView, number: int, out: Path, *, overwrite: bool = False, progress: StageProgress = silent
) -> dict[str, Any]:
    """Write the plan of a trial as a small JSON file that other tools take (see `foldsearch.export.passport`).

    Args:
        run: the run.
        number: of a trial that reached the last rung.
        out: new file.
        overwrite: replace one that is there.
        progress: told what is being done.

    Raises:
        RunError: the trial was not measured, or the model is another one than the run was made with.
        InputError: the file exists, or cannot be written.
    """
    from foldsearch.export.passport import is_passport, passport
    from foldsearch.model.source import open_config, whole_config
    from foldsearch.model.whole import class_name
    from foldsearch.prepare import open_source

    trial, folder = run.pick(number=number), run.folder
    check_path(out, "a plan's path")
    if out.exists() and (out.is_dir() or not overwrite):
        or_force = "" if out.is_dir() else ", or overwrite it with --force"
        raise InputError(f"{printable(out)} exists already. Choose another file, or move it away{or_force}.")
    if out.exists() and not is_passport(out):
        raise InputError(
            f"only a plan is overwritten, but {printable(out)} is none that foldsearch wrote. Choose another file, or "
            "move it away."
        )
    check_writable(out.parent, "a plan")
    changes = [
        *(["healed in closed form"] if trial.healing is not None and trial.healing.changed else []),
        *([f"trained on {trial.last.kept_tokens:,} tokens"] if trial.last.kept_tokens else []),
    ]
    source = open_source(folder.study, progress, run_folder=folder.path)
    value = passport(
        trial.plan,
        open_config(source),
        base_model=folder.study.model,
        dtype=folder.target.dtype,
        weights_changed=" and ".join(changes),
        part_of="" if (whole := whole_config(source)) is None else class_name(whole),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, value)
    return value


def _export(
    context: TrialContext,
    number: int,
    out: Path,
    form: ExportForm,
    recorded: Trial | None,
    progress: StageProgress,
) -> ExportReport:
    """Rebuild a trial's model and ship it.

    recorded: the trial as the run's study has it; None outside a run.
    """
    from foldsearch.context import open_workbench
    from foldsearch.export import Shipment, export
    from foldsearch.export.recipe import licences_of, recipe_of
    from foldsearch.model.gguf.kv_cache import check_kv_cache
    from foldsearch.model.source import open_tokenizer
    from foldsearch.rebuild import check_rebuilt, recovered_model

    if form.kv_cache:
        check_kv_cache(open_workbench(context).dense.config, form.kv_cache)
    progress("rebuilding the model that was measured", 0.0)
    model, trial = recovered_model(context, number)
    progress("comparing it with what was recorded", 0.0)
    rebuilt = check_rebuilt(context, number, model, recorded)
    bench = open_workbench(context)
    progress("writing and verifying in a fresh process", 0.0)
    target = context.target.storing(trial.types)
    runtime = form.runtime(trial.plan, target, context.table)
    shipment = Shipment(
        plan=trial.plan,
        runtime=runtime.name,
        weights=form.stored(runtime, target),
        kv_cache=form.cached(runtime, target),
        gguf=context.files.gguf,
        whole=context.files.whole,
        context=context.target.context,
        dtype=context.target.dtype,
        ids_NT=bench.splits.report.ids_NT,
        text_NT=bench.splits.report.text_NT,
        dense=bench.dense if form.compares else None,
        licences=licences_of(context),
        recipe=recipe_of(
            context, number, trial, StoredTypes(form.weights, form.kv_cache), shows_text=form.shows_text
        ),
        shows_text=form.shows_text,
        predicted=_predicted(context, trial, runtime, form),
        details={
            "base_model": context.study.model,
            "note": context.files.note,
            **({"run": context.run.path.name} if recorded else {}),
            "rebuilt": asdict(rebuilt),
        },
    )
    tokenizer = open_tokenizer(context.files)
    return export(model, tokenizer, out, shipment, overwrite=form.overwrite)


def _predicted(context: TrialContext, trial: Trial, runtime: Runtime, form: ExportForm) -> Predicted | None:
    """The times that were reckoned of a trial, where it is exported to what they are of; else None."""
    from foldsearch.export.figures import Predicted

    target = context.target.storing(trial.types)
    latency, cost = context.table.latency_on(target), price(trial.plan, context.table, target)
    priced, stored = runtime_named(target.runtime), form.stored(runtime, target)
    is_same = runtime.engine == priced.engine and runtime.stored_as(target.dtype, stored) == priced.stored_as(
        target.dtype, target.weights if priced.types else ""
    )
    is_same = is_same and form.cached(runtime, target) == target.kv_cache
    if latency is None or cost.prompt_ms is None or cost.decode_ms is None or not is_same:
        return None
    dense = price(FoldPlan.identity(len(context.table.blocks)), context.table, target)
    return Predicted(latency.tokens, cost.prompt_ms, cost.decode_ms, dense.prompt_ms, dense.decode_ms)


def verify_export(folder: Path, progress: StageProgress = silent) -> Iterator[tuple[Path, Rechecked]]:
    """Check an export again, wherever it lies, by its card (see `foldsearch.export.recheck`).

    Args:
        folder: of the export, or of several points; or the card in the folder of one.
        progress: told what is being done.

    Yields:
        The folder, and what was found; of a folder of several points each of them.

    Raises:
        InputError: the folder is no export. Of several points, raised after all others were checked.
    """
    from foldsearch.export.card import CARD
    from foldsearch.export.family import exports_in
    from foldsearch.export.recheck import recheck

    no_export: InputError | None = None
    for place in exports_in(folder.parent if folder.name == CARD and folder.is_file() else folder):
        try:
            found = recheck(place, progress)
        except InputError as error:
            no_export = no_export or error
        else:
            yield place, found
    if no_export is not None:
        raise no_export


def reproduce_export(
    card: Path,
    out: Path,
    *,
    moved: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> Reproduced:
    """Make an export again from its card, and compare both (see `foldsearch.export.reproduce`).

    Args:
        card: path of card.json, or of the folder that holds it.
        out: new folder; whole or absent.
        moved: where the model and the texts lie now, by what the card calls them.
        overwrite: replace an export that is there.
        progress: told what is being done.
        notice: told what a person should know.

    Raises:
        InputError: it is no card, it cannot be followed, or `out` exists.
        VerificationError: what was written is not the model that was measured.
    """
    from foldsearch.export import check_export
    from foldsearch.export.card import Recipe, read_card
    from foldsearch.export.reproduce import NUMBER, check_out, reproduce

    read = read_card(card)
    check_out(card, out)
    check_export(out, read.plan, read.report.runtime, overwrite=overwrite)

    def write(context: TrialContext, recipe: Recipe) -> None:
        form = ExportForm(
            read.report.runtime,
            recipe.weights,
            overwrite,
            recipe.shows_text,
            read.report.dense is not None,
            recipe.kv_cache,
        )
        _export(context, NUMBER, out, form, None, progress)

    return reproduce(card, out, write, moved=moved or {}, progress=progress, notice=notice)


def compare_words(run: RunView, folder: Path, prompt: str, *, num_tokens: int = 40) -> tuple[str, str]:
    """How an exported model and the dense one go on after a prompt.

    Both take the likeliest token each time (greedy), with a repetition penalty of 1.2, in the export's dtype. An export
    for another program than transformers is asked in that program, where it is installed.

    Args:
        run: the run that the export came from.
        folder: of the export.
        prompt: text to continue.
        num_tokens: to add, at most.

    Raises:
        ModelError: `folder` is no exported model.
        InputError: the tokenizer makes nothing of the prompt, or the program cannot go on after it.
    """
    import torch

    from foldsearch.export import load_exported
    from foldsearch.export.engine import write_in
    from foldsearch.export.folder import runtime_of
    from foldsearch.model.fold import cast
    from foldsearch.model.source import open_dense, open_tokenizer
    from foldsearch.model.tokens import begun
    from foldsearch.runtimes.process import ProcessError

    files = find_model(run.folder.study, run_folder=run.folder.path)
    tokenizer = open_tokenizer(files)
    ids_BT = torch.tensor([begun(tokenizer, prompt)], dtype=torch.long)
    if not ids_BT.numel():
        raise InputError(
            f"a prompt has one token at least, but the model's tokenizer makes none of {prompt!r}."
        )

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

    runtime = runtime_of(folder)
    if runtime is not None and runtime.engine is not None and runtime.engine.is_installed:
        try:
            theirs = write_in(runtime.engine, folder, prompt, num_tokens, context=ids_BT.numel() + num_tokens)
        except ProcessError as error:
            what = f"{printable(folder)} is written, but {runtime.engine.name} did not go on after the prompt"
            raise InputError(quote_error(what, error, "Try a shorter one.")) from error
        return theirs, words(open_dense(files))
    exported, _ = load_exported(folder)
    # the dense model lies in the precision that trials compute in; both are to write in the one that ships
    return words(exported), words(cast(open_dense(files), exported.dtype))
