"""Write a folded model for transformers, check it in fresh processes, and only then give it its name."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from foldsearch.codec import to_json
from foldsearch.errors import (
    InputError,
    ModelError,
    PlanError,
    VerificationError,
    describe_error,
    quote_error,
)
from foldsearch.export import verify
from foldsearch.export.card import model_card
from foldsearch.export.engine import TOLERANCES, EngineJob, compare, expected, fault_of, running
from foldsearch.export.figures import EngineReport, ExportReport, ModelFigures, Speed
from foldsearch.export.process import ModelProcess, ProcessError
from foldsearch.files import check_writable
from foldsearch.model.fold import cast as in_dtype
from foldsearch.paths import beside, check_path, printable
from foldsearch.plan.cost import DTYPE_BYTES, GB, CostTable
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import Beside, Engine, Loader, Runtime, runtime_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What rounding alone may change, as a share of the logits' RMS. Equal weights in equal kernels give equal logits;
# merging an adapter rounds a weight once more, and decoding with a cache sums in another order.
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
LOSS_ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}  # of the mean next-token loss, in nats

# Rounds of timing, in which both models take a turn: at most so many, and no further one after so many seconds; the
# fewest of which a spread can be told.
MOST_ROUNDS, TIMED_SECONDS, FEWEST_ROUNDS = 9, 8.0, 3
NO_SPEED = Speed((), ())
REPORT = "foldsearch.json"  # in every export
NAMES_BYTES = 1_000_000  # that names and shapes of tensors may take in a file, beside the weights
ROOM = 1.1  # of disk or memory, as a multiple of the weights


@dataclass(frozen=True, slots=True)
class Shipment:
    """What is shipped of a model, and what it is held against.

    plan: of the model. runtime: its name (see `foldsearch.runtimes`). dtype: float32, bfloat16 or float16, in which the
    model was measured. weights: one of the runtime's types; empty stores them as the dtype is. context: tokens that the
    model is to see.
    ids_NT: int64 token ids, N sequences of T ≥ 2 tokens: what logits, decoding and perplexity are taken on.
    text_NT: bool, which of them are of the text (see `foldsearch.model.tokens.TokenSet`); None is all. Perplexity is
    over the positions that predict one of these.
    dense: the model it was folded from. Where it was loaded from a folder, its figures are taken too.
    details: goes into foldsearch.json and the card, as it is (JSON); "base_model" names the base model.
    gguf: the files of the GGUF that the dense model was read from; none where it was no GGUF.
    """

    plan: FoldPlan
    runtime: str
    dtype: str
    ids_NT: Tensor
    text_NT: Tensor | None = None
    dense: PreTrainedModel | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    gguf: tuple[Path, ...] = ()
    context: int = 0

    @property
    def base_model(self) -> str:
        """The name of the dense model, as a person knows it."""
        named = str(self.details.get("base_model", ""))
        if named or self.dense is None:
            return named or "unknown"
        return Path(str(self.dense.config.name_or_path)).name or "unknown"

    @property
    def tokens(self) -> dict[str, Tensor]:
        """ids_NT and text_NT, as every process is given them."""
        ids_NT = self.ids_NT.detach().to("cpu")
        text_NT = (
            torch.ones_like(ids_NT, dtype=torch.bool) if self.text_NT is None else self.text_NT.to("cpu")
        )
        return {"ids_NT": ids_NT.contiguous(), "text_NT": text_NT.contiguous()}


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    shipment: Shipment,
    *,
    overwrite: bool = False,
) -> ExportReport:
    """Write `model` to `folder` and verify what was written, in fresh processes, in the dtype that ships.

    Nothing is left behind when writing or verifying fails: the folder gets its name last.

    Args:
        model: a folded model, recovered, its deltas merged; any dtype, any device. It is not changed.
        tokenizer: saved beside the weights.
        folder: where to; its parent is made.
        shipment: the plan, the runtime, and what the export is held against.
        overwrite: replace a folder that is there.

    Raises:
        InputError: the folder exists, an argument is unknown, the disk is full.
        ModelError: the model is not a folded one, or the runtime has no such model or tokenizer.
        PlanError: the model runs another plan, or the runtime cannot do what the plan needs.
        VerificationError: what was written is not the model that was measured; the message lists every fault.
    """
    _check_arguments(model, folder, shipment, overwrite=overwrite)
    runtime = runtime_named(shipment.runtime)
    writer = runtime.writer
    weights = runtime.stored_as(shipment.dtype, shipment.weights)
    notes = writer.check_model(model.config, shipment.context)
    measured = _on_cpu(in_dtype(model, getattr(torch, shipment.dtype)))
    written, is_exact = writer.before_rounding(model)
    is_same = runtime.stored_as(shipment.dtype) == weights and shipment.dtype not in runtime.lacks
    if written is model and is_same:
        shipped = measured
    else:
        shipped = _on_cpu(
            in_dtype(written, getattr(torch, shipment.dtype)) if is_same else writer.rounded(written, weights)
        )
    weight_bytes = _weight_bytes(shipped)
    _make_room(folder, weight_bytes)
    extras = Beside(tokenizer, weights, shipment.base_model, str(shipment.plan), shipment.gguf)
    with _whole_or_absent(folder, weight_bytes) as temporary:
        notes += writer.write(shipped, temporary, extras)
        # processors multiply few types fast: numbers of another type are computed with in 32 bits, as they are
        other = weights if weights in DTYPE_BYTES else "float32"
        dtype = shipment.dtype if is_same else other
        measured_perplexity = None if is_same else verify.perplexity(measured, **shipment.tokens)
        job = _Job(
            folder=temporary,
            # rounded to another type it is another model: it is held against what the file is to hold
            measured=measured if is_same else shipped,
            tokens=shipment.tokens,
            runtime=runtime,
            weights=weights,
            dtype=dtype,
            tolerance=ROUNDING[dtype] if runtime.own_kernels or (is_same and not is_exact) else 0.0,
            weight_bytes=weight_bytes,
            num_parameters=sum(parameter.numel() for parameter in shipped.parameters()),
            beside=extras,
        )
        del written, shipped, measured
        report = replace(_report(job, shipment), notes=notes, has_tokenizer=tokenizer is not None)
        if measured_perplexity is not None:
            report = replace(report, measured_perplexity=measured_perplexity)
        (temporary / REPORT).write_text(json.dumps(to_json(report), indent=1))
        (temporary / "README.md").write_text(model_card(report, folder), encoding="utf-8")
    return report


@contextmanager
def _whole_or_absent(folder: Path, weight_bytes: int) -> Iterator[Path]:
    """A folder to write in, which gets its name when all went well, and else is removed."""
    temporary = beside(folder, "partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        _rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            quote_error(
                f"the export could not be written to {printable(folder.parent)}",
                error,
                f"It needs {weight_bytes / GB:.2f} GB. Make room, or choose another folder.",
            )
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_room(folder: Path, weight_bytes: int) -> None:
    """Make the folder that the export goes into, and refuse a disk that cannot hold it."""
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the export goes into {printable(parent)}, which cannot be made: {error.strerror}. "
            "Choose another folder."
        ) from error
    if (free := shutil.disk_usage(parent).free) < ROOM * weight_bytes:
        raise InputError(
            f"the export needs {weight_bytes / GB:.2f} GB, but {printable(parent)} has {free / GB:.2f} GB free. "
            "Make room, or choose another folder."
        )


def check_export(
    folder: Path, plan: FoldPlan, runtime: str, *, table: CostTable | None = None, overwrite: bool = False
) -> None:
    """What can be refused before a model is opened.

    Args:
        folder: where to.
        plan: of the model.
        runtime: its name.
        table: of the model's costs, which says what its blocks are; None where nothing is known of them.
        overwrite: whether an export that is there may be replaced.

    Raises:
        InputError: the folder exists, or cannot be written; there is no such runtime.
        PlanError: the runtime cannot do what the plan needs.
    """
    check_path(folder, "an export's path")
    _check_new(folder, overwrite=overwrite)
    check_writable(folder.parent, "an export")
    by_position, family = (table.by_position, table.family) if table else (False, "")
    runtime_named(runtime).check(plan, by_position=by_position, family=family)


def load_exported(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """An exported model, whatever its runtime, in eval mode and its own dtype; and its tokenizer, where it has one.

    Raises:
        ModelError: not a model folder, or weights are missing from it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foldsearch.model.register import register

    register()
    folder = Path(folder)
    runtime = runtime_of(folder)
    loader = runtime.loader if runtime else ""
    if not loader and not (folder / "config.json").is_file():
        raise ModelError(
            f"{printable(folder)} is not an exported model: it has no config.json. `foldsearch export` writes one."
        )
    if loader:
        loaded, wrong = cast("Loader", import_module(loader)).load(str(folder), "auto", None)
    else:
        auto: Any = AutoModelForCausalLM
        loaded, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
        wrong = verify.wrong_keys(info)
    if wrong:
        raise ModelError(
            f"{printable(folder)} does not hold the weights its config asks for: {wrong[:5]}. Export it again."
        )
    model: PreTrainedModel = loaded.eval()
    if not (folder / "tokenizer_config.json").is_file():
        return model, None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def runtime_of(folder: Path) -> Runtime | None:
    """What an export is run by; None of a folder that does not say it."""
    try:
        return runtime_named(json.loads((folder / REPORT).read_text())["runtime"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- checks


def _check_arguments(model: PreTrainedModel, folder: Path, shipment: Shipment, *, overwrite: bool) -> None:
    plan, dtype, ids_NT = shipment.plan, shipment.dtype, shipment.ids_NT
    fold = getattr(model.config, "fold", None)
    if not fold:
        raise ModelError(
            f"only a folded model can be exported, got a {type(model).__name__}. Fold it by a plan first."
        )
    if (fold["plan"], fold["num_blocks"]) != (str(plan), plan.num_blocks):
        raise PlanError(
            f"the model runs the plan '{fold['plan']}', not '{plan}'. Export it with its own plan."
        )
    by_position = bool(getattr(model.config, "scale_attn_by_inverse_layer_idx", False))
    runtime_named(shipment.runtime).check(plan, by_position=by_position)
    if dtype not in DTYPE_BYTES:
        raise InputError(f"an export's dtype is one of {', '.join(DTYPE_BYTES)}, got '{dtype}'.")
    if ids_NT.dim() != 2 or ids_NT.shape[0] < 1 or ids_NT.shape[1] < 2:
        raise InputError(
            f"verification needs token ids of shape (sequences, tokens ≥ 2), got {tuple(ids_NT.shape)}."
        )
    check_path(folder, "an export's path")
    _check_new(folder, overwrite=overwrite)


def _check_new(folder: Path, *, overwrite: bool) -> None:
    """An export is replaced where that was asked for; nothing else is."""
    if not folder.exists():
        return
    ours = (folder / REPORT).is_file() or (folder.is_dir() and not any(folder.iterdir()))
    if overwrite and not ours:
        raise InputError(
            f"only an export is overwritten, but {printable(folder)} holds no {REPORT}. Choose another folder, or move "
            "it away."
        )
    if not overwrite:
        or_force = ", or overwrite it with --force" if ours else ""
        raise InputError(
            f"{printable(folder)} exists already. Choose another folder, or move it away{or_force}."
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """An export that is written and not yet verified.

    measured: what it is held against. tokens: ids_NT and text_NT. weights: how they are stored; dtype: in which torch
    holds them. tolerance: of the logits, as a share of their RMS. weight_bytes, num_parameters: that
    were written. beside: what went into it with the model.
    """

    folder: Path
    measured: PreTrainedModel
    tokens: dict[str, Tensor]
    runtime: Runtime
    weights: str
    dtype: str
    tolerance: float
    weight_bytes: int
    num_parameters: int
    beside: Beside

    def loading(self, folder: Path, tensors: Path, *, how: str = "") -> dict[str, Any]:
        """How every process loads a folder: the same for all of them."""
        return {
            "folder": str(folder.resolve()),
            "dtype": self.dtype,
            "attention": self.measured.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "tensors": str(tensors),
            "how": how,
        }


def _report(job: _Job, shipment: Shipment) -> ExportReport:
    """Load the export in fresh processes, compare it with what was measured, and measure it beside the dense model.

    Raises:
        VerificationError: with every fault found.
    """
    import transformers

    details = dict(shipment.details)
    details.pop("base_model", "")
    plan = shipment.plan
    logits_BTV = verify.compared_logits(job.measured, job.tokens["ids_NT"])
    measured_perplexity = verify.perplexity(job.measured, **job.tokens)
    with tempfile.TemporaryDirectory(prefix="foldsearch-verify-") as name:
        workplace = Path(name)
        tensors = workplace / "with logits.safetensors"
        save_file({**job.tokens, "logits_BTV": logits_BTV.contiguous()}, tensors)
        stock = job.runtime.needs_only_transformers
        with ModelProcess(workplace, without_foldsearch=stock) as exported:
            answer, figures = _verify(job, exported, tensors, measured_perplexity)
            code = _verify_alone(job, workplace, tensors) if job.runtime.carries_code else None
            if job.runtime.engine is None:
                compared = _compare(job, exported, shipment.dense, workplace)
        if job.runtime.engine is not None:
            compared = _compare_in_engine(job, job.runtime.engine, shipment.dense, workplace)
            figures = replace(figures, resident_bytes=compared.resident_bytes)
    return ExportReport(
        runtime=job.runtime.name,
        dtype=job.dtype,
        weights=job.weights,
        plan=str(plan),
        num_blocks=plan.num_blocks,
        base_model=shipment.base_model,
        exported=figures,
        dense=compared.dense,
        dense_note=compared.note,
        file_bytes=_file_bytes(job.runtime, job.folder),
        prompt_tokens=min(verify.PROMPT_TOKENS, job.tokens["ids_NT"].shape[1]),
        prompt=compared.speeds["prompt"],
        decode=compared.speeds["decode"],
        measured_perplexity=measured_perplexity,
        tokens=int(job.tokens["text_NT"].sum()),
        logits_max_difference=answer["logits_max_difference"],
        logits_difference=answer["logits_difference"],
        logits_tolerance=job.tolerance,
        decode_difference=answer["decode_difference"],
        decode_tolerance=ROUNDING[job.dtype],
        loads_without_foldsearch=stock or bool(code),
        refused_without_code=code,
        has_tokenizer=False,
        engine=compared.engine,
        engine_note=compared.engine_note,
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        details=details,
    )


def _verify(
    job: _Job, process: ModelProcess, tensors: Path, measured_perplexity: float
) -> tuple[dict[str, Any], ModelFigures]:
    """Load the export where foldsearch is, and hold it against what was measured."""
    with _told(""):
        answer = process.ask(
            "load", **job.loading(job.folder, tensors, how=job.runtime.loader)
        ) | process.ask("quality")
    figures = _figures(job, job.folder, answer)
    faults = _logit_faults(answer, job.tolerance) + _faults(job, answer, figures, measured_perplexity)
    _raise_for(faults, job.runtime.name)
    return answer, figures


def _verify_alone(job: _Job, workplace: Path, tensors: Path) -> bool:
    """Load the export where foldsearch is not: with its own code, and never without."""
    with _told(" without foldsearch"), ModelProcess(workplace, without_foldsearch=True) as process:
        refused = process.ask("is_refused", folder=str(job.folder.resolve()))["refused"]
        answer = process.ask("load", **job.loading(job.folder, tensors, how="own code"))
    faults = [f"without foldsearch: {fault}" for fault in _logit_faults(answer, job.tolerance)]
    if not refused:
        faults.append("stock transformers loads the folder without its code, which would run another model")
    _raise_for(faults, job.runtime.name)
    return True


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except ProcessError as error:
        remedy = "Nothing was exported."
        what = f"the export could not be loaded in a fresh process{where}"
        raise VerificationError(quote_error(what, error, remedy)) from error


# ---- beside the dense model


@dataclass(frozen=True, slots=True)
class _Compared:
    """An export beside the dense model.

    dense: its figures; None where there are none, and note says why. speeds: of both, by "prompt" and "decode". engine:
    what the program of the runtime found, and resident_bytes: of the export in it; engine_note: why it was not asked.
    """

    dense: ModelFigures | None
    note: str
    speeds: dict[str, Speed]
    engine: EngineReport | None = None
    engine_note: str = ""
    resident_bytes: int | None = None


def _compare(job: _Job, exported: ModelProcess, dense: PreTrainedModel | None, workplace: Path) -> _Compared:
    """Figures of the dense model, or why there are none; and the speeds of both.

    The dense model is written anew in the dtype that ships, by the same writer: whatever it lies in, both models are
    loaded alike. That an export is right does not depend on it, so no failure here is the export's.
    """
    note = ""
    if dense is not None:
        with _dense_beside(job) as place:
            try:
                note = _lacks_room(job, dense)
                if not note:
                    with _loaded_dense(job, dense, place, workplace) as (process, figures):
                        return _Compared(figures, "", _take_turns(exported, process))
            except (ProcessError, OSError, SafetensorError) as error:
                note = f"The dense model could not be measured: {describe_error(error)}."
    with _told(""):
        return _Compared(None, note, _take_turns(exported))


def _compare_in_engine(
    job: _Job, engine: Engine, dense: PreTrainedModel | None, workplace: Path
) -> _Compared:
    """The same where another program runs the export: whether it is the same model there, memory and speeds.

    Raises:
        VerificationError: it is another model in the program.
    """
    figures, note = None, ""
    with _dense_beside(job) as place:
        if dense is not None and not (note := _lacks_room(job, dense)):
            try:
                with _loaded_dense(job, dense, place, workplace) as (_, in_torch):
                    figures = replace(in_torch, resident_bytes=None)
            except (ProcessError, OSError) as error:
                note = f"The dense model could not be measured: {describe_error(error)}."
        why = "" if engine.is_installed else engine.absence
        if not why and not (job.beside.tokenizer or job.beside.gguf):
            why = f"not checked in {engine.name}, which needs a tokenizer: the model was exported without one"
        if why:
            return _Compared(figures, note, {"prompt": NO_SPEED, "decode": NO_SPEED}, engine_note=why)
        asked = EngineJob(engine, torch.get_num_threads(), **job.tokens)
        theirs = expected(in_dtype(job.measured, torch.float32), asked)
        with ExitStack() as stack, _told(f" of {engine.name}"):
            process, found = stack.enter_context(running(asked, job.folder, workplace))
            other = stack.enter_context(running(asked, place, workplace)) if figures else None
            report = compare(engine, found, theirs, TOLERANCES[job.weights], other[1] if other else None)
            _raise_for([fault] if (fault := fault_of(report)) else [], job.runtime.name)
            speeds = _take_turns(process, *([other[0]] if other else []))
    if figures and other:
        figures = replace(figures, resident_bytes=other[1].resident_bytes)
    return _Compared(figures, note, speeds, report, resident_bytes=found.resident_bytes)


@contextmanager
def _dense_beside(job: _Job) -> Iterator[Path]:
    """Where the dense model lies for a while."""
    place = beside(job.folder, "dense")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _loaded_dense(
    job: _Job, dense: PreTrainedModel, place: Path, workplace: Path
) -> Iterator[tuple[ModelProcess, ModelFigures]]:
    """The dense model as the runtime has it, in a process of its own."""
    if job.runtime.types:  # weights are rounded in its own way
        writer = job.runtime.writer
        place.mkdir()
        written, _ = writer.before_rounding(dense)
        writer.write(_on_cpu(writer.rounded(written, job.weights)), place, replace(job.beside, plan=""))
        del written
    else:
        _on_cpu(in_dtype(dense, getattr(torch, job.dtype))).save_pretrained(place)
    tensors = workplace / "tokens.safetensors"
    save_file(job.tokens, tensors)
    how = job.runtime.loader if job.runtime.types else ""
    with ModelProcess(workplace) as process:
        answer = process.ask("load", **job.loading(place, tensors, how=how)) | process.ask("quality")
        yield process, _figures(job, place, answer)


def _lacks_room(job: _Job, dense: PreTrainedModel) -> str:
    """Why the dense model cannot be measured beside the export; empty where it can."""
    import psutil

    needed = ROOM * sum(parameter.numel() for parameter in dense.parameters()) * DTYPE_BYTES[job.dtype]
    for what, free in (
        ("disk", shutil.disk_usage(job.folder.parent).free),
        ("memory", psutil.virtual_memory().available),
    ):
        if free < needed:
            return (
                f"The dense model was not measured: it needs {needed / GB:.2f} GB of {what} beside the export, and "
                f"{free / GB:.2f} GB are free."
            )
    return ""


def _take_turns(*processes: ModelProcess) -> dict[str, Speed]:
    """Speeds of one model, or of two in turns: first, second, first, second.

    What the machine does besides then slows both of a round, and their ratio stays.
    """
    for process in processes:
        process.ask("turn")  # caches are cold, memory is not yet given out
    rounds: list[list[dict[str, float]]] = []
    began = time.monotonic()
    while len(rounds) < FEWEST_ROUNDS or (
        len(rounds) < MOST_ROUNDS and time.monotonic() - began < TIMED_SECONDS
    ):
        rounds.append([process.ask("turn") for process in processes])
    return {
        what: Speed(
            exported=tuple(turns[0][what] for turns in rounds),
            dense=tuple(turns[1][what] for turns in rounds if len(turns) > 1),
        )
        for what in ("prompt", "decode")
    }


# ---- faults


def _raise_for(faults: list[str], runtime: str) -> None:
    if faults:
        raise VerificationError(
            f"the {runtime} export is not the model that was measured: {'; '.join(faults)}. Nothing was exported. "
            "This is a bug of foldsearch or of a library: please report it with the plan and the versions."
        )


def _faults(
    job: _Job, answer: dict[str, Any], figures: ModelFigures, measured_perplexity: float
) -> list[str]:
    faults = []
    if not answer["decode_difference"] <= ROUNDING[job.dtype]:
        faults.append(
            f"decoding token by token with the KV cache is {answer['decode_difference']:.3g} of the logits' RMS away "
            f"from one full forward (tolerance {ROUNDING[job.dtype]:g})"
        )
    bound = LOSS_ROUNDING[job.dtype] if job.tolerance else 0.0
    if not abs(math.log(figures.perplexity) - math.log(measured_perplexity)) <= bound:
        faults.append(
            f"its perplexity is {figures.perplexity:.6g}, the measured model's is {measured_perplexity:.6g} "
            f"(tolerance {bound:g} nats of loss)"
        )
    file_bytes = _file_bytes(job.runtime, job.folder)
    surplus = file_bytes - job.weight_bytes
    if job.runtime.types:  # a file of several types: its numbers are counted, and were compared
        if figures.parameters != job.num_parameters:
            faults.append(f"it holds {figures.parameters} parameters, {job.num_parameters} were written")
        is_wrong = job.runtime.shares_weights and surplus > NAMES_BYTES
    else:
        if figures.weight_bytes != job.weight_bytes:
            faults.append(f"it holds {figures.parameters} parameters, {job.weight_bytes} bytes were written")
        is_wrong = not 0 <= surplus <= NAMES_BYTES
    if is_wrong:
        faults.append(f"its files have {file_bytes} bytes for {job.weight_bytes} bytes of weights")
    return faults


def _logit_faults(answer: dict[str, Any], tolerance: float) -> list[str]:
    faults = []
    if answer["wrong_keys"]:
        faults.append(f"weights are missing, unexpected or of another shape: {answer['wrong_keys'][:5]}")
    if not answer["logits_difference"] <= tolerance:
        faults.append(
            f"its logits are {answer['logits_difference']:.3g} of their RMS away (tolerance {tolerance:g}, largest "
            f"difference {answer['logits_max_difference']:.3g})"
        )
    return faults


def _figures(job: _Job, folder: Path, answer: dict[str, Any]) -> ModelFigures:
    """What a process said of a folder; where weights are of several types, their bytes are those of the file."""
    in_file = _file_bytes(job.runtime, folder)
    return ModelFigures(
        parameters=answer["parameters"],
        weight_bytes=in_file if job.runtime.types else answer["parameters"] * DTYPE_BYTES[job.dtype],
        resident_bytes=answer["resident_bytes"],
        perplexity=answer["perplexity"],
    )


def _file_bytes(runtime: Runtime, folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(runtime.weights))


def _on_cpu(model: Any) -> PreTrainedModel:
    on_cpu: PreTrainedModel = model.to("cpu")
    return on_cpu


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _rename(temporary: Path, folder: Path) -> None:
    """Put the finished folder in its place; an old one goes only after the new one is there."""
    old = beside(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)
