"""Write a model as a folder that can be mapped: one safetensors file under the module's own names, in one dtype."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foldsearch.errors import ModelError, quote_error
from foldsearch.files import disk_is_full
from foldsearch.model.blocks import family_of
from foldsearch.model.checks import check_finite
from foldsearch.model.folded import key_mapping
from foldsearch.model.gguf.config import build_config
from foldsearch.model.gguf.file import GgufFile, read_gguf
from foldsearch.model.gguf.names import NAMES
from foldsearch.model.gguf.tokenizer import build_tokenizer
from foldsearch.model.gguf.weights import TensorReader, read_weights
from foldsearch.model.whole import check_text, class_name, is_whole, text_part

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "DTYPES",
    "RECORD",
    "ModelSource",
    "convert",
    "name_some",
    "quiet",
    "read_config",
    "write_error",
    "write_gguf_tokenizer",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECORD = "foldsearch.json"  # written last into a converted folder

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The files of a model as they were found; no weight was read.

    Attributes:
        reference: what the person typed.
        folder: where the files lie.
        weights: safetensors, .bin, or a .gguf (all its parts, where it has several). Empty where they are still on the
            hub, or are not there at all: `prepare` fetches them, or says what is missing.
        small: config, tokenizer, code: empty for a GGUF, which holds its own.
        trust_remote_code: whether code that came with the model may run.
        hub_id: org/name of a model of the hub, else "".
        commit: of the hub model, resolved; else "".
    """

    reference: str
    folder: Path
    weights: tuple[Path, ...]
    small: tuple[Path, ...]
    trust_remote_code: bool = False
    hub_id: str = ""
    commit: str = ""

    @property
    def gguf_file(self) -> str | None:
        """The name of the GGUF file that holds everything; None for a folder of a transformers model."""
        return self.weights[0].name if self.weights and self.weights[0].suffix == ".gguf" else None

    @property
    def place(self) -> Path:
        """What a person would look at: the GGUF file, or the folder."""
        return self.folder / self.gguf_file if self.gguf_file else self.folder


def convert(source: ModelSource, config: PretrainedConfig, target: Path, dtype: str, say: Say) -> None:
    """Write `target` from `source`, a model of `config`; the caller holds the lock of `target`.

    Raises:
        ModelError: the weights cannot be read, do not fill the model, are no numbers, or do not fit on the disk.
    """
    # Under the lock nobody else works on this target: what a killed process left behind can go.
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    say(f"converting {source.reference} to {dtype} (once; kept in {target})")
    file = read_gguf(source.weights) if source.gguf_file else None
    config, tensors = _read_gguf(file, dtype, say) if file else _read_checkpoint(source, config, dtype, say)
    check_finite(source.reference, tensors.items())
    num_bytes = sum(value.numel() * value.element_size() for value in tensors.values())
    free_bytes = shutil.disk_usage(target.parent).free
    if num_bytes > free_bytes:
        raise ModelError(
            f"{source.reference}: its weights in {dtype} need {num_bytes / 1e9:.2f} GB, but {target.parent} has "
            f"{free_bytes / 1e9:.2f} GB free. Make room, or set FOLDSEARCH_CACHE to another disk."
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        _write_folder(source, config, tensors, temporary, say)
        note = _quantisation_note(file) if file else _part_note(source)
        record = {"note": note, "reference": source.reference}
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        if target.exists():  # without its record: not ours, or damaged by hand
            shutil.rmtree(target)
        os.replace(temporary, target)
    except ModelError:
        raise
    except Exception as error:
        raise write_error(target.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_gguf_tokenizer(weights: tuple[Path, ...], folder: Path) -> bool:
    """Write the tokenizer files of a GGUF into a folder; False if it holds no tokenizer."""
    tokenizer = build_tokenizer(read_gguf(weights))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer is not None


# ---------------------------------------------------------------------------------------------------------- reading


def _read_gguf(file: GgufFile, dtype: str, say: Say) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    reader = TensorReader(file)
    config = build_config(file, reader)
    tensors = read_weights(reader, config, NAMES[file.architecture], DTYPES[dtype], say)
    config.architectures = [family_of(config).stock]
    return config, tensors


def read_config(source: ModelSource) -> PretrainedConfig:
    """The config.json of a folder of a transformers model, as it is: of a model that also sees, that of the whole.

    Raises:
        OSError, ValueError and whatever else a config's own class raises.
    """
    from transformers import AutoConfig

    with quiet():
        found: PretrainedConfig = AutoConfig.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code
        )
    return found


def _read_checkpoint(
    source: ModelSource, config: PretrainedConfig, dtype: str, say: Say
) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = is_whole(stored := read_config(source))
    auto: Any = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    try:
        with quiet():
            # annotated as a model, but with output_loading_info it is a pair
            loaded: Any = auto.from_pretrained(
                source.folder,
                config=stored if whole else config,
                dtype=DTYPES[dtype],
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                key_mapping=key_mapping(_stored_names(source.folder)) or None,
            )
    except Exception as error:
        what = f"{source.reference}: its weights cannot be read"
        raise ModelError(quote_error(what, error, "If a file is damaged, fetch it again.")) from error
    model: PreTrainedModel = loaded[0]
    _check_filled(source.reference, loaded[1], say)
    if whole:
        text = text_part(model)
        check_text(source.reference, model.eval(), text)
        # Tied as the whole model's were found to be, under the names of the text model.
        tied = dict(text.all_tied_weights_keys)
        model = text
    else:
        tied = model.all_tied_weights_keys
    if getattr(model.config, "tie_word_embeddings", False) and not tied:
        model.config.tie_word_embeddings = (
            False  # the checkpoint's two matrices differ, whatever its config said
        )
    model.config.architectures = [type(model).__name__]
    tensors = {name: value for name, value in model.state_dict().items() if name not in tied}
    return model.config, tensors


def _check_filled(reference: str, info: dict[str, Any], say: Say) -> None:
    """Whether the weights of a checkpoint fill the model; what is not a part of it is told.

    Raises:
        ModelError: some are missing, or have another shape.
    """
    if info["missing_keys"] or info["mismatched_keys"]:
        lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ModelError(
            f"{reference}: the weights do not fill the model: {name_some(lacking)} are missing or have "
            "another shape. A file is damaged or incomplete, or it is not a language model (no "
            "output layer): fetch it again, or give another model."
        )
    if info["unexpected_keys"]:
        say(f"{reference}: not part of the model, left out: {name_some(sorted(info['unexpected_keys']))}")


def _stored_names(folder: Path) -> dict[str, str]:
    """The names of tensors in the files of a folded export that shares them with others, each with the model's own."""
    fold = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("fold") or {}
    return dict(fold.get("stored") or {})


# ---------------------------------------------------------------------------------------------------------- writing


def _write_folder(
    source: ModelSource,
    config: PretrainedConfig,
    tensors: dict[str, torch.Tensor],
    folder: Path,
    say: Say,
) -> None:
    from safetensors.torch import save_file

    # Not by save_pretrained, which would rename tensors back to the checkpoint's names: mapping needs the module's own
    # names, each storage once.
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    for path in source.small:
        generated = path.name == "config.json" or path.name.endswith(".index.json")
        if not generated and (path.suffix != ".py" or source.trust_remote_code):
            shutil.copyfile(path, folder / path.name)
    config.save_pretrained(folder)
    if source.gguf_file and not write_gguf_tokenizer(source.weights, folder):
        say(f"{source.reference}: the GGUF file holds no tokenizer")
    (folder / "model.safetensors").chmod(0o644)


def _quantisation_note(file: GgufFile) -> str:
    """Which of the weights were quantised, by number of values: "4-bit (Q4_1) weights, de-quantised"."""
    from math import prod

    from gguf.constants import GGMLQuantizationType

    num_values: dict[str, int] = {}
    for tensor in file.tensors.values():
        kind = GGMLQuantizationType(tensor.kind).name
        num_values[kind] = num_values.get(kind, 0) + prod(tensor.shape)
    main = max(num_values, key=lambda kind: num_values[kind])
    bits = re.match(r"I?T?Q(\d)", main)
    return f"{bits[1]}-bit ({main}) weights, de-quantised" if bits else ""


def _part_note(source: ModelSource) -> str:
    """Of what the model is a part; empty where it is the whole model."""
    stored = read_config(source)
    return f"text part of a {class_name(stored)}" if is_whole(stored) else ""


# ------------------------------------------------------------------------------------------------------------ words


@contextmanager
def quiet() -> Iterator[None]:
    """Keep bars and warnings of the libraries from the terminal: what matters is raised, or told to `progress`."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def write_error(folder: Path, error: BaseException) -> ModelError:
    """Make the error that says what could not be written under a folder, and what to do."""
    if disk_is_full(error):
        return ModelError(
            f"The disk that holds {folder} is full; nothing half-written was kept. Make room, or set FOLDSEARCH_CACHE "
            "(for downloads HF_HOME) to a folder on another disk."
        )
    remedy = "Choose another place with FOLDSEARCH_CACHE (for downloads HF_HOME)."
    return ModelError(quote_error(f"The model could not be written under {folder}", error, remedy))


def name_some(names: list[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    if not names:
        return "nothing"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
