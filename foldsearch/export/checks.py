"""Hold an export against the model that was measured, in fresh processes: what differs is told, all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foldsearch.errors import VerificationError, quote_error
from foldsearch.export.figures import ModelFigures
from foldsearch.export.shipment import Job
from foldsearch.runtimes.process import ModelProcess, ProcessError

# What rounding alone may change, as a share of the logits' RMS. Equal weights in equal kernels give equal logits;
# merging an adapter rounds a weight once more, and decoding with a cache sums in another order.
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
LOSS_ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}  # of the mean next-token loss, in nats
# What another processor or another version of a library may change: the mean absolute difference of a token's
# log-probability, in nats. See docs/decisions/0023.
ELSEWHERE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
NAMES_BYTES = 1_000_000  # that names and shapes of tensors may take in a file, beside the weights


def check_here(
    job: Job, process: ModelProcess, tensors: Path, measured_perplexity: float
) -> tuple[dict[str, Any], ModelFigures]:
    """Load the export where foldsearch is, and hold it against what was measured."""
    with while_loading(""):
        answer = process.ask(
            "load", **job.loading(job.folder, tensors, how=job.runtime.loader)
        ) | process.ask("quality")
    figures = job.figures(job.folder, answer)
    faults = _logit_faults(answer, job.tolerance) + _faults(job, answer, figures, measured_perplexity)
    raise_for(faults, job.runtime.name)
    return answer, figures


def check_alone(job: Job, workplace: Path, tensors: Path) -> bool:
    """Load the export where foldsearch is not: with its own code, and never without."""
    with while_loading(" without foldsearch"), ModelProcess(workplace, without_foldsearch=True) as process:
        refused = process.ask("is_refused", folder=str(job.folder.resolve()))["refused"]
        answer = process.ask("load", **job.loading(job.folder, tensors, how="own code"))
    faults = [f"without foldsearch: {fault}" for fault in _logit_faults(answer, job.tolerance)]
    if not refused:
        faults.append("stock transformers loads the folder without its code, which would run another model")
    raise_for(faults, job.runtime.name)
    return True


@contextmanager
def while_loading(where: str) -> Iterator[None]:
    """Tell of a process that fails as of an export that cannot be loaded; where: words that follow "process"."""
    try:
        yield
    except ProcessError as error:
        remedy = "Nothing was exported."
        what = f"the export could not be loaded in a fresh process{where}"
        raise VerificationError(quote_error(what, error, remedy)) from error


def raise_for(faults: list[str], runtime: str) -> None:
    """Refuse an export that has faults.

    Raises:
        VerificationError: with all of them.
    """
    if faults:
        raise VerificationError(
            f"the {runtime} export is not the model that was measured: {'; '.join(faults)}. Nothing was exported. "
            "This is a bug of foldsearch or of a library: please report it with the plan and the versions."
        )


def _faults(job: Job, answer: dict[str, Any], figures: ModelFigures, measured_perplexity: float) -> list[str]:
    faults = []
    if not answer["decode_difference"] <= ROUNDING[job.dtype]:
        faults.append(
            f"decoding token by token with the KV cache is {answer['decode_difference']:.3g} of the logits' RMS away "
            f"from one full forward (tolerance {ROUNDING[job.dtype]:g})"
        )
    if not abs(math.log(answer["perplexity"]) - math.log(measured_perplexity)) <= job.loss_tolerance:
        faults.append(
            f"its perplexity is {answer['perplexity']:.6g}, the measured model's is {measured_perplexity:.6g} "
            f"(tolerance {job.loss_tolerance:g} nats of loss)"
        )
    surplus = job.file_bytes - job.weight_bytes
    if job.runtime.types:  # a file of several types: its numbers are counted, and were compared
        if figures.parameters != job.num_parameters:
            faults.append(f"it holds {figures.parameters} parameters, {job.num_parameters} were written")
        is_wrong = job.runtime.shares_weights and surplus > NAMES_BYTES
    else:
        if figures.weight_bytes != job.weight_bytes:
            faults.append(f"it holds {figures.parameters} parameters, {job.weight_bytes} bytes were written")
        is_wrong = not 0 <= surplus <= NAMES_BYTES
    if is_wrong:
        faults.append(f"its files have {job.file_bytes} bytes for {job.weight_bytes} bytes of weights")
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
