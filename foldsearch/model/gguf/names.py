"""The tensors of a GGUF file by their names in transformers, for both ways: reading a file and writing one.

What the converters of llama.cpp change in a tensor stands beside its name, as what undoes the change and what makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["NAMES", "Change", "Rename"]


@dataclass(frozen=True, slots=True)
class Change:
    """How the values of a tensor differ between a file and transformers.

    Attributes:
        undo: from the values of the file to those of transformers, given the model's config.
        make: the other way.
    """

    undo: Callable[[Any, PretrainedConfig], Any]
    make: Callable[[Any, PretrainedConfig], Any]


@dataclass(frozen=True, slots=True)
class Rename:
    """Which tensor of the file a parameter is.

    Attributes:
        name: in the file, without ".weight" or ".bias"; "{}" stands for the block.
        change: of its values; None if they are the same.
    """

    name: str
    change: Change | None = None


def _unpermute(values: Any, num_heads: int) -> Any:
    """Undo the order in which llama.cpp turns neighbouring dimensions, (O, ...)."""
    return (
        values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def _permute(values: Any, num_heads: int) -> Any:
    """Make that order, in which the two dimensions of a pair are neighbours."""
    return (
        values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def _heads_first(values: Any, config: Any) -> Any:
    """From all queries, all keys, all values to those of one head together."""
    heads = config.num_attention_heads
    split = values.reshape(3, heads, values.shape[0] // 3 // heads, *values.shape[1:])
    return split.swapaxes(0, 1).reshape(values.shape)


def _heads_last(values: Any, config: Any) -> Any:
    """The other way."""
    heads = config.num_attention_heads
    split = values.reshape(heads, 3, values.shape[0] // 3 // heads, *values.shape[1:])
    return split.swapaxes(0, 1).reshape(values.shape)


def _turned(values: Any, config: Any) -> Any:
    return values.T if values.ndim == 2 else values


_QUERIES = Change(
    lambda values, config: _unpermute(values, config.num_attention_heads),
    lambda values, config: _permute(values, config.num_attention_heads),
)
_KEYS = Change(
    lambda values, config: _unpermute(values, config.num_key_value_heads),
    lambda values, config: _permute(values, config.num_key_value_heads),
)
# Gemma's norms multiply by 1 + w; the file holds the sum.
_PLUS_ONE = Change(lambda values, config: values - 1, lambda values, config: values + 1)
_TRANSPOSED = Change(_turned, _turned)  # GPT-2 stores its linears as (I, O)
_BY_HEADS = Change(_heads_first, _heads_last)  # GPT-NeoX stores queries, keys and values of one head together


def _named(**changes: Change) -> dict[str, Rename]:
    """The names of most families: Llama's."""
    block = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.gate_up_proj": "ffn_up",  # Phi-3: one tensor, the gate first
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return _renames(block, whole, "model.layers", **changes)


def _renames(
    block: dict[str, str], whole: dict[str, str], blocks: str, **changes: Change
) -> dict[str, Rename]:
    names = {f"{blocks}.{{}}.{ours}": f"blk.{{}}.{theirs}" for ours, theirs in block.items()} | whole
    return {ours: Rename(theirs, changes.get(theirs.rsplit(".", 1)[-1])) for ours, theirs in names.items()}


_GEMMA_NORMS = dict.fromkeys(
    (
        "attn_norm",
        "ffn_norm",
        "output_norm",
        "attn_q_norm",
        "attn_k_norm",
        "post_attention_norm",
        "post_ffw_norm",
    ),
    _PLUS_ONE,
)
_AFTER_NORMS = {
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}
_SANDWICH = _named(**_GEMMA_NORMS) | {
    ours: Rename(theirs, _PLUS_ONE)
    for ours, theirs in (
        _AFTER_NORMS | {"model.layers.{}.pre_feedforward_layernorm": "blk.{}.ffn_norm"}
    ).items()
}
_GPT2_NAMES = _renames(
    {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
    },
    "transformer.h",
    **dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _TRANSPOSED),
)
_GPT_NEOX_NAMES = _renames(
    {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    },
    {
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "lm_head": "output",
    },
    "gpt_neox.layers",
    attn_qkv=_BY_HEADS,
)

# By the architecture's name in llama.cpp.
NAMES: dict[str, Mapping[str, Rename]] = {
    "llama": _named(attn_q=_QUERIES, attn_k=_KEYS),
    "smollm3": _named(attn_q=_QUERIES, attn_k=_KEYS),
    "granite": _named(attn_q=_QUERIES, attn_k=_KEYS),
    "stablelm": _named(),
    "qwen2": _named(),
    "qwen3": _named(),
    "gemma": _named(**_GEMMA_NORMS),
    "gemma2": _SANDWICH,
    "gemma3": _SANDWICH,
    "phi3": _named(),
    "olmo2": _named() | {ours: Rename(theirs) for ours, theirs in _AFTER_NORMS.items()},
    "gpt2": _GPT2_NAMES,
    "gptneox": _GPT_NEOX_NAMES,
}
