"""Write a folded model for a runtime, check it in fresh processes, and only then give it its name."""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from foldsearch.errors import InputError, ModelError, PlanError
from foldsearch.export.card import (
    RANDOM,
    README,
    TEXT,
    Card,
    Probe,
    ProbeFigures,
    commands_for,
    files_of,
    hashes_of,
    random_tokens,
    write_card,
)
from foldsearch.export.chat import check_stops
from foldsearch.export.checks import ELSEWHERE, LOSS_ROUNDING, ROUNDING, check_alone, check_here
from foldsearch.export.dense import compare_in_engine, compare_in_torch
from foldsearch.export.engine import EngineJob, expected, tolerance_of
from foldsearch.export.figures import ExportReport
from foldsearch.export.folder import check_new, make_room, whole_or_absent
from foldsearch.export.readme import checked, loading_lines, model_card, not_checked
from foldsearch.export.shipment import Job, Shipment, few_of, on_cpu
from foldsearch.files import check_writable, scratch
from foldsearch.machine import computing_dtype
from foldsearch.model.convert import quiet
from foldsearch.model.fold import cast as in_dtype
from foldsearch.model.whole import name_in, put_back
from foldsearch.paths import check_path
from foldsearch.plan.cost import DTYPE_BYTES, CostTable
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import Beside, Runtime, runtime_named, verify
from foldsearch.runtimes.process import ModelProcess
from foldsearch.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Whose versions a card has, where they are installed: a file may be written otherwise by another one.
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf", "xllamacpp", "onnx", "onnxruntime"
)  # fmt: skip


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
    if runtime.engine is not None:
        shipment = shipment.in_context()
    writer = runtime.writer
    weights = runtime.stored_as(shipment.dtype, shipment.weights)
    notes = writer.check_model(model.config, shipment.context)
    measured = on_cpu(in_dtype(model, getattr(torch, shipment.dtype)))
    written, is_exact = writer.before_rounding(model)
    is_same = runtime.stored_as(shipment.dtype) == weights and shipment.dtype not in runtime.lacks
    if written is model and is_same:
        shipped = measured
    else:
        shipped = on_cpu(
            in_dtype(written, getattr(torch, shipment.dtype)) if is_same else writer.rounded(written, weights)
        )
    whole = shipment.whole if runtime.puts_back else None
    shipped, rest = _around(shipped, whole)
    weight_bytes = _weight_bytes(shipped)
    notes += _part_notes(shipment, runtime, rest)
    make_room(folder, weight_bytes)
    extras = Beside(
        tokenizer, weights, shipment.base_model, str(shipment.plan), shipment.gguf, shipment.context, whole
    )
    with whole_or_absent(folder, weight_bytes, overwrite=overwrite) as temporary:
        with quiet():
            notes += writer.write(shipped, temporary, extras)
        # numbers of a type that is none of torch's are held, as they are, in 32 bits
        held_in = shipment.dtype if is_same else weights if weights in DTYPE_BYTES else "float32"
        dtype = held_in if runtime.own_kernels else computing_dtype(held_in)
        is_rounded = runtime.own_kernels or (is_same and not is_exact)
        tokens = shipment.tokens if runtime.engine is None else few_of(shipment.tokens)
        unrounded = None if is_same else _perplexity_of(measured, tokens)
        job = Job(
            folder=temporary,
            # rounded to another type it is another model: it is held against what the file is to hold
            measured=_computing_in(dtype, measured if is_same else shipped),
            tokens=tokens,
            runtime=runtime,
            weights=weights,
            dtype=dtype,
            tolerance=ROUNDING[held_in] if is_rounded else 0.0,
            loss_tolerance=LOSS_ROUNDING[held_in] if is_rounded else 0.0,
            weight_bytes=weight_bytes,
            num_parameters=_num_parameters(shipped),
            rest_parameters=rest,
            beside=extras,
            prompt_tokens=shipment.prompt_tokens,
            kv_cache=shipment.kv_cache,
        )
        del written, shipped, measured
        probe = _asked(job.measured, tokens)
        report = replace(_report(job, shipment, probe), notes=notes, has_tokenizer=tokenizer is not None)
        if unrounded is not None:
            report = replace(report, measured_perplexity=unrounded)
        _write_cards(job, shipment, report, probe, folder)
    return report


def _around(text: PreTrainedModel, folder: Path | None) -> tuple[PreTrainedModel, int]:
    """The whole model around a text part, and how many parameters of it are none of the part's.

    folder: of the whole model that the part came from; None where what is shipped is no part, and is left as it is.
    """
    if folder is None:
        return text, 0
    with quiet():
        whole = put_back(text, folder)
    return whole, _num_parameters(whole) - _num_parameters(text)


def _part_notes(shipment: Shipment, runtime: Runtime, rest: int) -> tuple[str, ...]:
    """What a person should know of the export of a text part: where the rest is, of so many parameters."""
    if shipment.whole is None:
        return ()
    name = name_in(shipment.whole)
    if not runtime.puts_back:
        return (f"This is the text part of a {name} alone. {runtime.apart}",)
    return (
        f"Of this {name} only the text part was folded, and was measured, on text. The rest, {rest / 1e6:,.1f} million "
        f"parameters, has the numbers of the base model, in {shipment.dtype}.",
    )


def _computing_in(dtype: str, model: PreTrainedModel) -> PreTrainedModel:
    """The model with its numbers in a dtype that has all of them; itself, where they are in it."""
    wanted = getattr(torch, dtype)
    return model if next(model.parameters()).dtype == wanted else in_dtype(model, wanted)


def _perplexity_of(model: PreTrainedModel, tokens: dict[str, Tensor]) -> float:
    """By the numbers of its dtype, computed with in 32 bits: every processor multiplies these fast."""
    numbers = in_dtype(model, torch.float32)
    return verify.perplexity(verify.log_probabilities(numbers, tokens["ids_NT"]), tokens["text_NT"])


def _asked(model: PreTrainedModel, tokens: dict[str, Tensor]) -> Probe:
    """What the measured model says of tokens."""
    return Probe(**tokens, log_probabilities_NP=verify.log_probabilities(model, tokens["ids_NT"]))


def _write_cards(job: Job, shipment: Shipment, report: ExportReport, probe: Probe, folder: Path) -> None:
    """Write the probe, README.md and last card.json, which has the hashes of all that is there."""
    if not shipment.shows_text:
        probe = _asked(job.measured, random_tokens(shipment.ids_NT, job.measured.config.vocab_size))
    probe = probe.cut()
    probe.write(job.folder)
    # On random tokens a model is at a loss, and inputs of 8 bits move it further than on the text that was asked about.
    engine_tolerance = 0.0 if shipment.shows_text or report.engine is None else _engine_tolerance(job, probe)
    dtype = job.dtype
    card = Card(
        foldsearch=__version__,
        plan=shipment.plan,
        report=report,
        files=hashes_of(job.folder, files_of(job.folder)),
        probe=ProbeFigures(
            of=TEXT if shipment.shows_text else RANDOM,
            tokens=int(probe.text_NT[:, 1:].sum()),
            perplexity=verify.perplexity(probe.log_probabilities_NP, probe.text_NT),
            tolerance=ELSEWHERE[dtype],
            loss_tolerance=LOSS_ROUNDING[dtype],
            engine_tolerance=engine_tolerance,
        ),
        attention=job.attention,
        checked=tuple(checked(report)),
        not_checked=tuple(not_checked(report, probe)),
        licences=shipment.licences,
        loading=loading_lines(report, folder),
        commands=commands_for(shipment.recipe),
        recipe=shipment.recipe,
    )
    (job.folder / README).write_text(model_card(card, folder), encoding="utf-8")
    write_card(card, job.folder)


def _engine_tolerance(job: Job, probe: Probe) -> float:
    """How far the program that the export is for may be from torch on a probe (see `tolerance_of`)."""
    assert job.runtime.engine is not None
    asked = EngineJob(job.runtime.engine, torch.get_num_threads(), probe.ids_NT, probe.text_NT)
    held = in_dtype(job.measured, torch.float32)
    return tolerance_of(held, asked, expected(held, asked), job.weights)


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
    check_new(folder, overwrite=overwrite)
    check_writable(folder.parent, "an export")
    by_position, family = (table.by_position, table.family) if table else (False, "")
    runtime_named(runtime).check(plan, by_position=by_position, family=family)


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
    check_new(folder, overwrite=overwrite)


def _report(job: Job, shipment: Shipment, probe: Probe) -> ExportReport:
    """Load the export in fresh processes, compare it with what was measured, and measure it beside the dense model.

    Raises:
        VerificationError: with every fault found.
    """
    details = dict(shipment.details)
    details.pop("base_model", "")
    plan = shipment.plan
    logits_BTV = verify.compared_logits(job.measured, job.tokens["ids_NT"])
    measured_perplexity = verify.perplexity(probe.log_probabilities_NP, probe.text_NT)
    with scratch("verify") as workplace:
        tensors = workplace / "with logits.safetensors"
        save_file({**job.tokens, "logits_BTV": logits_BTV.contiguous()}, tensors)
        stock = job.runtime.needs_only_transformers
        with ModelProcess(workplace, without_foldsearch=stock) as exported:
            answer, figures = check_here(job, exported, tensors, measured_perplexity)
            check_stops(job)
            code = check_alone(job, workplace, tensors) if job.runtime.carries_code else None
            if job.runtime.engine is None:
                compared = compare_in_torch(job, exported, shipment.dense, workplace)
        if job.runtime.engine is not None:
            compared = compare_in_engine(job, job.runtime.engine, shipment.dense, workplace)
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
        file_bytes=job.file_bytes,
        prompt_tokens=job.prompt_tokens,
        prompt=compared.speeds["prompt"],
        decode=compared.speeds["decode"],
        measured_perplexity=measured_perplexity,
        tokens=int(job.tokens["text_NT"][:, 1:].sum()),  # that are foretold
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
        versions=_versions(),
        details=details,
        chat=compared.chat,
        predicted=shipment.predicted,
        whole=name_in(job.beside.whole) if job.beside.whole else "",
        kv_cache=job.kv_cache,
    )


def _versions() -> dict[str, str]:
    """Of what wrote the export and ran it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
