"""Write a folded model for transformers, check it in fresh processes, and only then give it its name."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from foldsearch.errors import InputError, ModelError, PlanError, VerificationError, quote_error
from foldsearch.export import verify
from foldsearch.export.card import model_card
from foldsearch.export.write import expand, write_folded
from foldsearch.model.fold import cast
from foldsearch.model.parts import Borrowed
from foldsearch.paths import beside, check_path, printable
from foldsearch.plan.cost import DTYPE_BYTES, GB
from foldsearch.plan.plan import FoldPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Form = Literal["folded", "expanded"]

# What rounding alone may change, as a share of the logits' RMS. Equal weights in equal kernels give equal logits;
# merging an adapter rounds a weight once more, and decoding with a cache sums in another order.
ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
LOSS_ROUNDING = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}  # of the mean next-token loss, in nats


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """A model folder, loaded in a fresh process.

    parameters: stored numbers. weight_bytes: theirs. disk_bytes: of the weight files. resident_bytes: growth of the
    process's resident memory from before loading to after the first forward pass. perplexity: on the given tokens.
    *_tokens_per_second: reading a prompt; decoding one sequence with the KV cache.
    """

    parameters: int
    weight_bytes: int
    disk_bytes: int
    resident_bytes: int | None
    perplexity: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was shipped, and the checks it passed.

    measured_perplexity: of the model that was measured, in the shipped dtype, on the same tokens.
    logits_max_difference, logits_difference: to that model, largest and RMS over RMS; logits_tolerance bounds the
    latter (0: equal to the bit). decode_difference: cached decoding to one full forward, RMS over RMS.
    loads_without_foldsearch: with trust_remote_code, where foldsearch cannot be imported (None: a stock model).
    refused_without_code: stock transformers refuses the folder instead of loading it wrong (None: a stock model).
    threads: of the processor, for all timings.
    """

    form: Form
    dtype: str
    plan: str
    num_blocks: int
    base_model: str
    exported: ModelFigures
    dense: ModelFigures | None
    measured_perplexity: float
    tokens: int
    logits_max_difference: float
    logits_difference: float
    logits_tolerance: float
    decode_difference: float
    decode_tolerance: float
    loads_without_foldsearch: bool | None
    refused_without_code: bool | None
    threads: int
    versions: dict[str, str]
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, as in foldsearch.json."""
        return asdict(self)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    plan: FoldPlan,
    form: Form,
    dtype: str,
    ids_NT: Tensor,
    text_NT: Tensor | None = None,
    dense: PreTrainedModel | None = None,
    details: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write `model` to `folder` and verify what was written, in fresh processes, in the dtype that ships.

    Nothing is left behind when writing or verifying fails: the folder gets its name last.

    Args:
        model: a folded model, recovered, its deltas merged; any dtype, any device. It is not changed.
        tokenizer: saved beside the weights.
        folder: where to; its parent is made.
        plan: of the model.
        form: "folded" (shared weights once; transformers with trust_remote_code, or after `import foldsearch`) or
            "expanded" (the stock architecture: shared weights again for every child, adapters merged).
        dtype: float32, bfloat16 or float16.
        ids_NT: int64 token ids, N sequences of T ≥ 2 tokens: what logits, decoding and perplexity are taken on.
        text_NT: bool, which of them are of the text (see `foldsearch.model.tokens.TokenSet`); None is all. Perplexity
            is over the positions that predict one of these.
        dense: the model it was folded from. Where it was loaded from a folder, its figures are taken too.
        details: goes into foldsearch.json and the card, as it is (JSON); "base_model" names the base model.
        overwrite: replace a folder that is there.

    Raises:
        InputError: the folder exists, an argument is unknown, the disk is full.
        ModelError: the model is not a folded one.
        PlanError: the model runs another plan, or the form cannot say what the plan needs.
        VerificationError: what was written is not the model that was measured; the message lists every fault.
    """
    _check_arguments(model, folder, plan, form, dtype, ids_NT, overwrite)
    details = dict(details or {})
    base_model = str(details.pop("base_model", "") or Path(str(model.config.name_or_path)).name or "unknown")
    ids_NT = ids_NT.detach().to("cpu")
    text_NT = torch.ones_like(ids_NT, dtype=torch.bool) if text_NT is None else text_NT.to("cpu")
    measured = _as_shipped(model, dtype)
    expanded = form == "expanded"
    # adapters are merged before weights are rounded: the sum is rounded once
    shipped = _as_shipped(expand(model), dtype) if expanded else measured
    weight_bytes = _weight_bytes(shipped)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the export goes into {printable(folder.parent)}, which cannot be made: {error.strerror}. "
            "Choose another folder."
        ) from error
    if (free := shutil.disk_usage(folder.parent).free) < 1.1 * weight_bytes:
        raise InputError(
            f"the export needs {weight_bytes / GB:.2f} GB, but {printable(folder.parent)} has {free / GB:.2f} GB free. "
            "Make room, or choose another folder."
        )
    temporary = beside(folder, "partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        if expanded:
            shipped.save_pretrained(temporary)
        else:
            write_folded(shipped, temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        merged = expanded and any(isinstance(part, Borrowed) and part.rank for part in model.modules())
        del shipped
        report = _verify(
            temporary,
            measured,
            {"ids_NT": ids_NT.contiguous(), "text_NT": text_NT.contiguous()},
            plan=plan,
            form=form,
            dtype=dtype,
            tolerance=ROUNDING[dtype] if merged else 0.0,
            weight_bytes=weight_bytes,
            dense=dense,
            base_model=base_model,
            details=details,
        )
        (temporary / "foldsearch.json").write_text(json.dumps(report.to_json(), indent=1))
        (temporary / "README.md").write_text(model_card(report.to_json()), encoding="utf-8")
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
    return report


def load_exported(folder: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """An exported model, folded or expanded, in eval mode and its own dtype; and its tokenizer, where it has one.

    Raises:
        ModelError: not a model folder, or weights are missing from it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from foldsearch.model.register import register

    register()
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{printable(folder)} is not an exported model: it has no config.json. `foldsearch export` writes one."
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if wrong := verify.wrong_keys(loaded[1]):
        raise ModelError(
            f"{printable(folder)} does not hold the weights its config asks for: {wrong[:5]}. Export it again."
        )
    model: PreTrainedModel = loaded[0].eval()
    if not (folder / "tokenizer_config.json").is_file():
        return model, None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


# ---- checks


def _check_arguments(
    model: PreTrainedModel,
    folder: Path,
    plan: FoldPlan,
    form: str,
    dtype: str,
    ids_NT: Tensor,
    overwrite: bool,
) -> None:
    fold = getattr(model.config, "fold", None)
    if not fold:
        raise ModelError(
            f"only a folded model can be exported, got a {type(model).__name__}. Fold it by a plan first."
        )
    if (fold["plan"], fold["num_blocks"]) != (str(plan), plan.num_blocks):
        raise PlanError(
            f"the model runs the plan '{fold['plan']}', not '{plan}'. Export it with its own plan."
        )
    if form not in get_args(Form):
        raise InputError(f"the form of an export is 'folded' or 'expanded', got '{form}'.")
    if dtype not in DTYPE_BYTES:
        raise InputError(f"an export's dtype is one of {', '.join(DTYPE_BYTES)}, got '{dtype}'.")
    if ids_NT.dim() != 2 or ids_NT.shape[0] < 1 or ids_NT.shape[1] < 2:
        raise InputError(
            f"verification needs token ids of shape (sequences, tokens ≥ 2), got {tuple(ids_NT.shape)}."
        )
    check_path(folder, "an export's path")
    if folder.exists() and not overwrite:
        raise InputError(f"{printable(folder)} exists already. Choose another folder, or move it away.")


def _verify(
    folder: Path,
    measured: PreTrainedModel,
    tokens: dict[str, Tensor],
    *,
    plan: FoldPlan,
    form: Form,
    dtype: str,
    tolerance: float,
    weight_bytes: int,
    dense: PreTrainedModel | None,
    base_model: str,
    details: dict[str, Any],
) -> ExportReport:
    """Load the folder in fresh processes and compare it with `measured`.

    Raises:
        VerificationError: with every fault found.
    """
    import transformers

    with tempfile.TemporaryDirectory(prefix="foldsearch-verify-") as name:
        workplace = Path(name)
        tensors = workplace / "tensors.safetensors"
        logits_BTV = verify.compared_logits(measured, tokens["ids_NT"])
        save_file({**tokens, "logits_BTV": logits_BTV.contiguous()}, tensors)
        measured_perplexity = verify.perplexity(measured, **tokens)
        request = {
            "dtype": dtype,
            "attention": measured.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "tensors": str(tensors),
        }
        here = {**request, "folder": str(folder.resolve())}
        answer = _fresh_process({**here, "measure": True}, workplace)
        figures = _figures(answer, folder, weight_bytes)
        _raise_for(_faults(answer, figures, dtype, tolerance, measured_perplexity), form)
        alone = None
        if form == "folded":
            alone = _fresh_process({**here, "measure": False}, workplace, without_foldsearch=True)
            faults = [f"without foldsearch: {fault}" for fault in _logit_faults(alone, tolerance)]
            if not alone["refused_without_code"]:
                faults.append(
                    "stock transformers loads the folder without its code, which would run another model"
                )
            _raise_for(faults, form)
        dense_figures = None
        if dense is not None and (dense_folder := Path(str(dense.config.name_or_path))).is_dir():
            save_file(tokens, tensors)
            there = {**request, "folder": str(dense_folder.resolve()), "measure": True}
            found = _fresh_process(there, workplace)
            dense_figures = _figures(found, dense_folder, found["parameters"] * DTYPE_BYTES[dtype])
    return ExportReport(
        form=form,
        dtype=dtype,
        plan=str(plan),
        num_blocks=plan.num_blocks,
        base_model=base_model,
        exported=figures,
        dense=dense_figures,
        measured_perplexity=measured_perplexity,
        tokens=int(tokens["text_NT"].sum()),
        logits_max_difference=answer["logits_max_difference"],
        logits_difference=answer["logits_difference"],
        logits_tolerance=tolerance,
        decode_difference=answer["decode_difference"],
        decode_tolerance=ROUNDING[dtype],
        loads_without_foldsearch=None if alone is None else True,
        refused_without_code=None if alone is None else alone["refused_without_code"],
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        details=details,
    )


def _raise_for(faults: list[str], form: str) -> None:
    if faults:
        raise VerificationError(
            f"the {form} export is not the model that was measured: {'; '.join(faults)}. Nothing was exported. "
            "This is a bug of foldsearch or of a library: please report it with the plan and the versions."
        )


def _faults(
    answer: dict[str, Any], figures: ModelFigures, dtype: str, tolerance: float, measured_perplexity: float
) -> list[str]:
    faults = _logit_faults(answer, tolerance)
    if not answer["decode_difference"] <= ROUNDING[dtype]:
        faults.append(
            f"decoding token by token with the KV cache is {answer['decode_difference']:.3g} of the logits' RMS away "
            f"from one full forward (tolerance {ROUNDING[dtype]:g})"
        )
    bound = LOSS_ROUNDING[dtype] if tolerance else 0.0
    if not abs(math.log(figures.perplexity) - math.log(measured_perplexity)) <= bound:
        faults.append(
            f"its perplexity is {figures.perplexity:.6g}, the measured model's is {measured_perplexity:.6g} "
            f"(tolerance {bound:g} nats of loss)"
        )
    if figures.parameters * DTYPE_BYTES[dtype] != figures.weight_bytes:
        faults.append(f"it holds {figures.parameters} parameters, {figures.weight_bytes} bytes were written")
    header = figures.disk_bytes - figures.weight_bytes
    if not 0 <= header <= 1_000_000:  # names and shapes of the tensors
        faults.append(
            f"its files have {figures.disk_bytes} bytes for {figures.weight_bytes} bytes of weights"
        )
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


def _figures(answer: dict[str, Any], folder: Path, weight_bytes: int) -> ModelFigures:
    return ModelFigures(
        parameters=answer["parameters"],
        weight_bytes=weight_bytes,
        disk_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        resident_bytes=answer["resident_bytes"],
        perplexity=answer["perplexity"],
        prefill_tokens_per_second=answer["prefill_tokens_per_second"],
        decode_tokens_per_second=answer["decode_tokens_per_second"],
    )


def _fresh_process(
    request: dict[str, Any], workplace: Path, *, without_foldsearch: bool = False
) -> dict[str, Any]:
    """Run export/verify.py on a request: as a module of foldsearch, or as a file that cannot import it.

    Raises:
        VerificationError: the process failed; the message ends with its last words.
    """
    request_file, answer_file, modules = (
        workplace / name for name in ("request.json", "answer.json", "modules")
    )
    request |= {"answer": str(answer_file), "without_foldsearch": without_foldsearch}
    request_file.write_text(json.dumps(request))
    answer_file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(modules),  # the folder's code is copied there, not to the user's cache
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    # -I: neither this folder nor PYTHONPATH is searched, as on a machine that has transformers only
    how = ["-I", str(verify.__file__)] if without_foldsearch else ["-m", verify.__name__]
    done = subprocess.run(
        [sys.executable, *how, str(request_file)],
        cwd=workplace,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not answer_file.exists():
        words = done.stderr.strip().rstrip(".").splitlines()
        raise VerificationError(
            f"the export could not be loaded in a fresh process{' without foldsearch' if without_foldsearch else ''} "
            f"(exit code {done.returncode}): {words[-1] if words else 'it said nothing'}. Nothing was exported."
        )
    answer: dict[str, Any] = json.loads(answer_file.read_text())
    return answer


def _as_shipped(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    twin: Any = cast(model, getattr(torch, dtype))
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
