"""Write a folded model for transformers, check it in fresh processes, and only then give it its name."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from foldsearch.export.figures import ExportReport, ModelFigures, Speed
from foldsearch.export.process import ModelProcess, ProcessError
from foldsearch.files import check_writable
from foldsearch.model.fold import cast as in_dtype
from foldsearch.paths import beside, check_path, printable
from foldsearch.plan.cost import DTYPE_BYTES, GB
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import Loader, Runtime, runtime_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What rounding alone may change, as a share of the logits' RMS. Equal weights in equal kernels give equal logits;
# merging an adapter rounds a weight once more, and decoding with a cache sums in another order.
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
LOSS_ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}  # of the mean next-token loss, in nats

# Rounds of timing, in which both models take a turn: at most so many, and no further one after so many seconds; the
# fewest of which a spread can be told.
MOST_ROUNDS, TIMED_SECONDS, FEWEST_ROUNDS = 9, 8.0, 3
ROOM = 1.1  # of disk or memory, as a multiple of the weights


@dataclass(frozen=True, slots=True)
class Shipment:
    """What is shipped of a model, and what it is held against.

    plan: of the model. runtime: its name (see `foldsearch.runtimes`). dtype: float32, bfloat16 or float16.
    ids_NT: int64 token ids, N sequences of T ≥ 2 tokens: what logits, decoding and perplexity are taken on.
    text_NT: bool, which of them are of the text (see `foldsearch.model.tokens.TokenSet`); None is all. Perplexity is
    over the positions that predict one of these.
    dense: the model it was folded from. Where it was loaded from a folder, its figures are taken too.
    details: goes into foldsearch.json and the card, as it is (JSON); "base_model" names the base model.
    """

    plan: FoldPlan
    runtime: str
    dtype: str
    ids_NT: Tensor
    text_NT: Tensor | None = None
    dense: PreTrainedModel | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

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
        ModelError: the model is not a folded one.
        PlanError: the model runs another plan, or the runtime cannot do what the plan needs.
        VerificationError: what was written is not the model that was measured; the message lists every fault.
    """
    _check_arguments(model, folder, shipment, overwrite=overwrite)
    runtime = runtime_named(shipment.runtime)
    writer = runtime.writer
    measured = _as_shipped(model, shipment.dtype)
    written, is_exact = writer.before_rounding(model)
    shipped = measured if written is model else _as_shipped(written, shipment.dtype)
    weight_bytes = _weight_bytes(shipped)
    _make_room(folder, weight_bytes)
    with _whole_or_absent(folder, weight_bytes) as temporary:
        writer.write(shipped, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        del written, shipped
        job = _Job(
            folder=temporary,
            measured=measured,
            tokens=shipment.tokens,
            runtime=runtime,
            dtype=shipment.dtype,
            tolerance=0.0 if is_exact else ROUNDING[shipment.dtype],
            weight_bytes=weight_bytes,
        )
        report = _report(job, shipment)
        (temporary / "foldsearch.json").write_text(json.dumps(to_json(report), indent=1))
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


def check_export(folder: Path, plan: FoldPlan, runtime: str, *, by_position: bool = False) -> None:
    """What can be refused before a model is opened.

    Args:
        folder: where to.
        plan: of the model.
        runtime: its name.
        by_position: whether the model scales attention by a block's position (`CostTable.by_position`).

    Raises:
        InputError: the folder exists, or cannot be written; there is no such runtime.
        PlanError: the runtime cannot do what the plan needs.
    """
    check_path(folder, "an export's path")
    _check_new(folder)
    check_writable(folder.parent, "an export")
    runtime_named(runtime).check(plan, by_position=by_position)


def load_exported(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """An exported model, whatever its runtime, in eval mode and its own dtype; and its tokenizer, where it has one.

    Raises:
        ModelError: not a model folder, or weights are missing from it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foldsearch.model.register import register

    register()
    folder = Path(folder)
    loader = _loader_of(folder)
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


def _loader_of(folder: Path) -> str:
    """The module that loads an export; empty where transformers does, as for a folder that says nothing of it."""
    try:
        name = json.loads((folder / "foldsearch.json").read_text())["runtime"]
        return runtime_named(name).loader
    except (OSError, ValueError, KeyError, TypeError):
        return ""


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
    if not overwrite:
        _check_new(folder)


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise InputError(f"{printable(folder)} exists already. Choose another folder, or move it away.")


@dataclass(frozen=True, slots=True)
class _Job:
    """An export that is written and not yet verified.

    tokens: ids_NT and text_NT. tolerance: of the logits, as a share of their RMS. weight_bytes: that were written.
    """

    folder: Path
    measured: PreTrainedModel
    tokens: dict[str, Tensor]
    runtime: Runtime
    dtype: str
    tolerance: float
    weight_bytes: int

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
    base_model = str(
        details.pop("base_model", "") or Path(str(job.measured.config.name_or_path)).name or "unknown"
    )
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
            dense_figures, dense_note, speeds = _compare(job, exported, shipment.dense, workplace)
    return ExportReport(
        runtime=job.runtime.name,
        dtype=job.dtype,
        plan=str(plan),
        num_blocks=plan.num_blocks,
        base_model=base_model,
        exported=figures,
        dense=dense_figures,
        dense_note=dense_note,
        file_bytes=_file_bytes(job),
        prompt_tokens=min(verify.PROMPT_TOKENS, job.tokens["ids_NT"].shape[1]),
        prompt=speeds["prompt"],
        decode=speeds["decode"],
        measured_perplexity=measured_perplexity,
        tokens=int(job.tokens["text_NT"].sum()),
        logits_max_difference=answer["logits_max_difference"],
        logits_difference=answer["logits_difference"],
        logits_tolerance=job.tolerance,
        decode_difference=answer["decode_difference"],
        decode_tolerance=ROUNDING[job.dtype],
        loads_without_foldsearch=stock or bool(code),
        refused_without_code=code,
        has_tokenizer=(job.folder / "tokenizer_config.json").is_file(),
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
    figures = _figures(answer, job.dtype)
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


def _compare(
    job: _Job, exported: ModelProcess, dense: PreTrainedModel | None, workplace: Path
) -> tuple[ModelFigures | None, str, dict[str, Speed]]:
    """Figures of the dense model, or why there are none; and the speeds of both.

    The dense model is written anew in the dtype that ships, by the same writer: whatever it lies in, both models are
    loaded alike. That an export is right does not depend on it, so no failure here is the export's.
    """
    note = ""
    if dense is not None:
        place = beside(job.folder, "dense")
        try:
            note = _lacks_room(job, dense)
            if not note:
                _as_shipped(dense, job.dtype).save_pretrained(place)
                tensors = workplace / "tokens.safetensors"
                save_file(job.tokens, tensors)
                with ModelProcess(workplace) as process:
                    answer = process.ask("load", **job.loading(place, tensors)) | process.ask("quality")
                    return _figures(answer, job.dtype), "", _take_turns(exported, process)
        except (ProcessError, OSError, SafetensorError) as error:
            note = f"The dense model could not be measured: {describe_error(error)}."
        finally:
            shutil.rmtree(place, ignore_errors=True)
    with _told(""):
        return None, note, _take_turns(exported)


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
    if figures.weight_bytes != job.weight_bytes:
        faults.append(f"it holds {figures.parameters} parameters, {job.weight_bytes} bytes were written")
    file_bytes = _file_bytes(job)
    if not 0 <= file_bytes - job.weight_bytes <= 1_000_000:  # names and shapes of the tensors
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


def _figures(answer: dict[str, Any], dtype: str) -> ModelFigures:
    return ModelFigures(
        parameters=answer["parameters"],
        weight_bytes=answer["parameters"] * DTYPE_BYTES[dtype],
        resident_bytes=answer["resident_bytes"],
        perplexity=answer["perplexity"],
    )


def _file_bytes(job: _Job) -> int:
    return sum(file.stat().st_size for file in job.folder.glob(job.runtime.weights))


def _as_shipped(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    twin: Any = in_dtype(model, getattr(torch, dtype))
    on_cpu: PreTrainedModel = twin.to("cpu")
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
