"""A runtime of the tests: the stock model in another layout, which transformers alone does not find.

It is what the recipe of CONTRIBUTING asks for: this file, and `ENTRY` in the list.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from foldsearch.runtimes import Beside, Runtime
from foldsearch.runtimes.stock import before_rounding, check_model, rounded

__all__ = ["ENTRY", "before_rounding", "check_model", "load", "rounded", "write"]

ENTRY = Runtime(
    name="split",
    title="the stock architecture, in small files",
    blocks="stock blocks",
    shares_weights=False,
    cannot=frozenset({"network", "norm", "half block", "moved block"}),
    file="tests.split_runtime",
    carries_code=False,
    card="Its weights lie in small files in `stock/`.",
    loader="tests.split_runtime",
    weights="stock/*.safetensors",
)


def write(model: PreTrainedModel, folder: Path, beside: Beside) -> tuple[str, ...]:
    """Many small files, one folder down."""
    model.save_pretrained(folder / "stock", max_shard_size=8_000)
    if beside.tokenizer is not None:
        beside.tokenizer.save_pretrained(folder)
    return ()


def load(folder: str, dtype: str, attention: str | None) -> tuple[PreTrainedModel, list[str]]:
    """From where `write` put it."""
    model, info = AutoModelForCausalLM.from_pretrained(
        Path(folder) / "stock",
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=attention,
        output_loading_info=True,
    )
    return model, [str(key) for keys in info.values() for key in keys]
