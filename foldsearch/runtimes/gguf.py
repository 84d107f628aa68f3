"""GGUF, the format of llama.cpp: one file with the weights, the tokenizer and what the model is.

What llama.cpp knows of a model is less than what transformers has; what it cannot say is refused, and what it computes
in another way is told (see `foldsearch.model.gguf.config`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foldsearch.model.blocks import FOLDED_PREFIX, family_of
from foldsearch.model.fold import stock_config
from foldsearch.model.gguf.config import as_llama_cpp_has_it, build_config, describe
from foldsearch.model.gguf.file import MetadataValue, read_gguf
from foldsearch.model.gguf.names import NAMES
from foldsearch.model.gguf.vocabulary import describe_tokenizer
from foldsearch.model.gguf.weights import TensorReader, read_weights
from foldsearch.model.gguf.write import as_stored, write_gguf
from foldsearch.runtimes import Beside, stock

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FILE = "model.gguf"


def check_model(config: PretrainedConfig, context: int) -> tuple[str, ...]:
    """What llama.cpp does in another way, in sentences (see `foldsearch.runtimes.Writer`)."""
    folded = str(config.model_type).startswith(FOLDED_PREFIX)
    return describe(stock_config(config) if folded else config, context).notes


def before_rounding(model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """The stock model with the settings that llama.cpp has."""
    is_exact = True
    if str(model.config.model_type).startswith(FOLDED_PREFIX):
        model, is_exact = stock.before_rounding(model)
    held, is_same = as_llama_cpp_has_it(model)
    # Gemma's norms are stored plus one, which rounds them
    return held, is_exact and is_same and not str(held.config.model_type).startswith("gemma")


def rounded(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """With the numbers that the file holds: matrices in its type, the rest in 32 bits."""
    return as_stored(model, weights)


def write(model: PreTrainedModel, folder: Path, beside: Beside) -> tuple[str, ...]:
    """One file; the tokenizer of a GGUF that the model came from is kept as it was."""
    notes: tuple[str, ...] = ()
    tokenizer: dict[str, MetadataValue] = {}
    if beside.gguf:
        tokenizer = read_gguf(beside.gguf).tokenizer
    elif beside.tokenizer is not None:
        tokenizer, note = describe_tokenizer(beside.tokenizer, model.config.vocab_size)
        stops, lost = _further_stops(model, tokenizer)
        tokenizer |= stops
        notes = tuple(filter(None, (note, lost)))
    general = {
        "general.name": f"{beside.base_model}, folded" if beside.plan else beside.base_model,
        **({"foldsearch.plan": beside.plan} if beside.plan else {}),
    }
    write_gguf(folder / FILE, model, beside.weights, tokenizer, general)
    return notes


def _further_stops(
    model: PreTrainedModel, tokenizer: dict[str, MetadataValue]
) -> tuple[dict[str, MetadataValue], str]:
    """The tokens that end an answer and are not the one that ends a text: chats have one or two.

    The file has two further places for them, the end of a turn and that of a message. Also what to say where they do
    not suffice.
    """
    stops: Any = getattr(model.generation_config, "eos_token_id", None)
    every = stops if isinstance(stops, list) else [] if stops is None else [stops]
    end = tokenizer.get("tokenizer.ggml.eos_token_id", (None,))[0]
    others = [int(stop) for stop in every if stop != end]
    places = ("eot", "eom")
    keys: dict[str, MetadataValue] = {
        f"tokenizer.ggml.{place}_token_id": (stop, 4, None)
        for place, stop in zip(places, others, strict=False)
    }
    lost = others[len(places) :]
    note = f"The file has no place for these tokens that end an answer: {lost}." if lost else ""
    return keys, note


def load(folder: str, dtype: str, attention: str | None) -> tuple[PreTrainedModel, list[str]]:
    """The model of the file in transformers, de-quantised; a file that does not fill it is an error.

    Raises:
        ModelError: a weight is missing, unexpected or of another shape.
    """
    from transformers import AutoModelForCausalLM

    file = read_gguf((Path(folder) / FILE,))
    reader = TensorReader(file)
    config: Any = build_config(file, reader)
    config.architectures = [family_of(config).stock]
    numbers = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    tensors = read_weights(reader, config, NAMES[file.architecture], numbers)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=numbers, attn_implementation=attention)
    wrong = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    missing = sorted(set(wrong.missing_keys) - set(model.all_tied_weights_keys))
    return model.eval(), [f"missing: {key}" for key in missing] + [
        f"unexpected: {key}" for key in wrong.unexpected_keys
    ]
