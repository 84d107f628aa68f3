"""Tiny models as GGUF files, written the way llama.cpp's converter writes them.

Each family is one entry: its name in llama.cpp, the keys that its converter writes, and where each tensor goes. What
the converter changes in a tensor (the order of rows, Gemma's norms plus one) is changed here in a plainer way than
foldsearch undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from transformers import PreTrainedModel

from tests.tiny import CONFIGS

# The tiny models of tests.tiny, with what no key of a GGUF can say (windows of single blocks) left out.
USUAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"layer_types": None, "use_sliding_window": False, "sliding_window": None},
    "qwen3": {"layer_types": None, "use_sliding_window": False, "sliding_window": None, "head_dim": 8},
    "gemma2": {"layer_types": None, "query_pre_attn_scalar": 8},
    # of the usual period of six, one block sees everything
    "gemma3_text": {"layer_types": None, "query_pre_attn_scalar": 12, "num_hidden_layers": 7},
}


def tiny_config(name: str, **changes: Any) -> tf.PretrainedConfig:
    """The config of a tiny model of a family, changed."""
    base = CONFIGS[name]()
    settings = base.to_dict() | USUAL.get(name, {})
    if not changes.keys() & {"rope_parameters"} and changes.keys() & {"partial_rotary_factor", "rotary_pct"}:
        settings.pop("rope_parameters", None)
    return type(base)(**(settings | changes))


def build(config: tf.PretrainedConfig) -> PreTrainedModel:
    """Random weights, always the same, large enough that the next token's distribution is far from uniform."""
    torch.manual_seed(0)
    model: PreTrainedModel = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.requires_grad_(False)


def _swap_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Row i of the first half of a head, then row i of its second half."""
    heads = values.reshape(num_heads, -1, *values.shape[1:])
    half = heads.shape[1] // 2
    order = [row for pair in range(half) for row in (pair, pair + half)]
    return heads[:, order].reshape(values.shape)


def _llama_rows(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if "q_proj" in name:
        return _swap_rows(values, config.num_attention_heads)
    if "k_proj" in name:
        return _swap_rows(values, config.num_key_value_heads)
    return values


def _gemma_norms(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    return values + 1 if name.endswith("norm.weight") else values


def _gpt2_linears(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    return values.T if values.ndim == 2 and ".h." in name else values


def _neox_rows(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if "query_key_value" not in name:
        return values
    head = config.hidden_size // config.num_attention_heads
    rows = [
        slice((3 * index + which) * head, (3 * index + which + 1) * head)
        for which in range(3)
        for index in range(config.num_attention_heads)
    ]
    return np.concatenate([values[each] for each in rows])


BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    # GPT-2
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    # GPT-NeoX
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
}


@dataclass(frozen=True)
class Family:
    arch: str
    change: Callable[[str, np.ndarray, Any], np.ndarray] = lambda name, values, config: values
    block: dict[str, str] = field(default_factory=lambda: BLOCK)
    keys: Callable[[Any], dict[str, Any]] = lambda config: {}


def _base_keys(config: Any) -> dict[str, Any]:
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }


def _rms_keys(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _base_keys(config) | {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(_rope(config)["rope_theta"]),
    }


def _rope(config: Any) -> dict[str, Any]:
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _gemma2_keys(config: Any) -> dict[str, Any]:
    return _rms_keys(config) | {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _gemma3_keys(config: Any) -> dict[str, Any]:
    keys = _rms_keys(config) | {"attention.sliding_window": config.sliding_window}
    keys["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    return keys


def _phi3_keys(config: Any) -> dict[str, Any]:
    head_dim = config.hidden_size // config.num_attention_heads
    keys = _rms_keys(config) | {
        "rope.dimension_count": int(head_dim * config.rope_parameters["partial_rotary_factor"]),
        "rope.scaling.original_context_length": config.original_max_position_embeddings,
        "attention.sliding_window": config.sliding_window or 0,
    }
    return {key: value for key, value in keys.items() if not key.endswith(("key_length", "value_length"))}


def _granite_keys(config: Any) -> dict[str, Any]:
    return _rms_keys(config) | {
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
        "attention.scale": config.attention_multiplier,
    }


def _stablelm_keys(config: Any) -> dict[str, Any]:
    head_dim = config.hidden_size // config.num_attention_heads
    return _base_keys(config) | {
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": int(head_dim * config.rope_parameters["partial_rotary_factor"]),
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "use_parallel_residual": True,  # of every model, in what early configs were converted to
    }


def _neox_keys(config: Any) -> dict[str, Any]:
    head_dim = config.hidden_size // config.num_attention_heads
    return _base_keys(config) | {
        "rope.dimension_count": int(head_dim * config.rope_parameters["partial_rotary_factor"]),
        "use_parallel_residual": config.use_parallel_residual,
        "attention.layer_norm_epsilon": config.layer_norm_eps,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _llama_rows, keys=_rms_keys),
    "mistral": Family("llama", _llama_rows, keys=_rms_keys),
    "smollm3": Family("smollm3", _llama_rows, keys=_rms_keys),
    "granite": Family("granite", _llama_rows, keys=_granite_keys),
    "stablelm": Family("stablelm", keys=_stablelm_keys),
    "qwen2": Family("qwen2", keys=_rms_keys),
    "qwen3": Family("qwen3", keys=_rms_keys),
    "gemma": Family("gemma", _gemma_norms, keys=_rms_keys),
    "gemma2": Family("gemma2", _gemma_norms, BLOCK | AFTER, _gemma2_keys),
    "gemma3_text": Family("gemma3", _gemma_norms, BLOCK | AFTER, _gemma3_keys),
    "phi3": Family("phi3", keys=_phi3_keys),
    "olmo2": Family("olmo2", block=BLOCK | AFTER, keys=_rms_keys),
    "gpt2": Family(
        "gpt2",
        _gpt2_linears,
        keys=lambda config: _base_keys(config) | {"attention.layer_norm_epsilon": config.layer_norm_epsilon},
    ),
    "gpt_neox": Family("gptneox", _neox_rows, keys=_neox_keys),
}


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under llama.cpp's name; the output only if it is not the embedding."""
    family = FAMILIES[model.config.model_type]
    tied = set(model.all_tied_weights_keys)
    for name, value in model.state_dict().items():
        if name in tied:
            continue
        stem, kind = name.rsplit(".", 1)
        theirs = WHOLE.get(stem)
        if theirs is None:
            _, index, rest = (
                stem.replace("transformer.h.", "x.")
                .replace("gpt_neox.", "")
                .replace("model.layers.", "x.")
                .replace("layers.", "x.")
                .split(".", 2)
            )
            theirs = f"blk.{index}.{family.block[rest]}"
        values = family.change(name, value.detach().float().numpy(), model.config)
        yield f"{theirs}.{kind}", np.ascontiguousarray(values)


def write_words(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """Token i is the word "wi"; <unk>, <s> and </s> come first."""
    words = ["<unk>", "<s>", "</s>"] + [f"w{index}" for index in range(3, vocabulary)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * 3 + [-float(index) for index in range(3, vocabulary)])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (vocabulary - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    general: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    tokenizer: Callable[[gguf.GGUFWriter, int], None] | None = write_words,
    tensors_a_file: int = 0,
) -> Path:
    """Write a tiny model.

    Args:
        path: of the file.
        model: of one of `FAMILIES`.
        keys: under the architecture's prefix, added or changed; a value of None leaves the key out.
        extra: tensors beside those of the model, or in their place.
        general: keys under "general.".
        leave_out: tensors that are not written.
        tokenizer: writes that of the file, given the number of tokens; None writes none.
        tensors_a_file: more than 0 writes parts, name-00001-of-00003.gguf and so on.
    """
    family = FAMILIES[model.config.model_type]
    general = {"architecture": family.arch} | (general or {})
    writer = gguf.GGUFWriter(path, general.pop("architecture"), split_max_tensors=tensors_a_file)
    for name, value in general.items():
        _add(writer, f"general.{name}", value)
    for name, value in (family.keys(model.config) | (keys or {})).items():
        if value is not None:
            _add(writer, f"{family.arch}.{name}", value)
    if tokenizer is not None:
        tokenizer(writer, model.config.vocab_size)
    for name, values in (dict(tensors_of(model)) | (extra or {})).items():
        if name not in leave_out:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
