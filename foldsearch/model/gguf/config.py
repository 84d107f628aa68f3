"""Which models a GGUF file may hold, and how its metadata becomes a config: one entry a kind of model.

The numbers of a model are what llama.cpp computes from the same file (src/models/*.cpp), except where the file says
something of the original model that llama.cpp does not apply: the windows of Phi-3 and Mistral, YaRN's own factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foldsearch.errors import ModelError, quote_error
from foldsearch.model.gguf.file import GgufFile
from foldsearch.model.gguf.keys import ModelKeys
from foldsearch.model.gguf.rope import rope_parameters
from foldsearch.model.gguf.weights import Rename, TensorReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "build_config"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model of llama.cpp.

    Attributes:
        settings: the model type of transformers, and the settings of its config beside those that all have.
        names: where each parameter of transformers' model comes from.
    """

    settings: Callable[[_Reading], tuple[str, dict[str, Any]]]
    names: Mapping[str, Rename]


@dataclass(frozen=True, slots=True)
class _Reading:
    """What is at hand while a config is built."""

    file: GgufFile
    keys: ModelKeys
    tensors: TensorReader
    common: dict[str, Any]  # settings that every model has, and the width of a head

    def has_any(self, *endings: str) -> bool:
        return any(name.endswith(endings) for name in self.file.tensors)

    def rope(self, *, partial: bool = False) -> dict[str, Any]:
        """`rope_parameters`; `partial` where a part of a head may turn."""
        head_dim = self.common["head_dim"]
        num_rotated = self.keys.integer("rope.dimension_count", head_dim)
        if num_rotated != head_dim and not partial:
            raise self.keys.error("rope.dimension_count", f"it must be the width of a head, {head_dim}")
        if not 0 < num_rotated <= head_dim or num_rotated % 2:
            raise self.keys.error("rope.dimension_count", f"it must be even, above 0 and at most {head_dim}")
        found = rope_parameters(
            self.keys,
            self.tensors,
            num_rotated=num_rotated,
            context_length=self.common["max_position_embeddings"],
        )
        if partial:
            found["partial_rotary_factor"] = num_rotated / head_dim
        return found

    def layer_types(self, default_period: int) -> list[str]:
        """Which blocks see a window only: the file's list, or all but the last of each period."""
        num_layers = self.common["num_hidden_layers"]
        pattern = self.keys.anything("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            if len(pattern) != num_layers:
                raise self.keys.error(
                    "attention.sliding_window_pattern", f"it must have {num_layers} entries"
                )
            sliding = [bool(entry) for entry in pattern]
        else:
            period = default_period if pattern is None else int(pattern)
            sliding = [period == 0 or block % period < period - 1 for block in range(num_layers)]
        return ["sliding_attention" if entry else "full_attention" for entry in sliding]

    def must_have_usual_heads(self) -> None:
        """For families whose heads always divide the width."""
        usual = self.common["hidden_size"] // self.common["num_attention_heads"]
        if self.common["head_dim"] != usual:
            raise self.keys.error(
                "attention.key_length", f"it must be the width divided by the heads, {usual}"
            )


def architecture_of(file: GgufFile) -> Architecture:
    """The kind of model that the file holds.

    Raises:
        ModelError: it is none that foldsearch folds.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: its architecture is {name!r}; of GGUF files foldsearch opens {', '.join(ARCHITECTURES)}. "
            "Give the model as a folder of transformers, or another one."
        )
    return ARCHITECTURES[name]


def build_config(file: GgufFile, tensors: TensorReader) -> PretrainedConfig:
    """The config of the model that the file holds; of its tensors only the divisors of RoPE are read.

    Raises:
        ModelError: the file holds no model that foldsearch folds, lacks a key, or says what is not understood.
    """
    from transformers import AutoConfig

    architecture = architecture_of(file)
    keys = ModelKeys(file)
    reading = _Reading(file, keys, tensors, _common(file, keys))
    model_type, settings = architecture.settings(reading)
    keys.finish()
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # its checks raise plain exceptions
        what = f"{file.path}: the metadata make no {model_type} model"
        raise ModelError(quote_error(what, error)) from error
    assert config.model_type == model_type
    return config


def _common(file: GgufFile, keys: ModelKeys) -> dict[str, Any]:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(
            f"{file.path}: the tensor token_embd.weight is missing. The file is damaged: fetch it again."
        )
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    num_kv = keys.integer("attention.head_count_kv", num_heads)
    num_layers, context_length = keys.integer("block_count"), keys.integer("context_length")
    if min(hidden_size, num_heads, num_kv, num_layers, context_length) < 1:
        raise keys.error("block_count", "blocks, heads, widths and the context length must be above 0")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    for name in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        keys.must_equal(name, head_dim, "keys and values of all blocks must have one width")
    keys.must_equal("embedding_length_out", hidden_size, "it must be the width of the stream")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_special_ids(file),
    }


def _special_ids(file: GgufFile) -> dict[str, int | None]:
    # llama.cpp's ids for SentencePiece vocabularies that name none
    defaults = {"bos": 1, "eos": 2} if file.metadata.get("tokenizer.ggml.model") == "llama" else {}
    return {
        f"{ours}_token_id": file.metadata.get(f"tokenizer.ggml.{theirs}_token_id", defaults.get(theirs))
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def _scale_is(reading: _Reading, squared: float) -> None:
    """The attention's scale, where the file gives it, must be 1 / sqrt(squared)."""
    reading.keys.must_equal("attention.scale", squared**-0.5, "attention is scaled by one over a root")


# ------------------------------------------------------------------------------------------------------ the families


def _llama(reading: _Reading) -> tuple[str, dict[str, Any]]:
    settings = _rms(reading, "silu") | {"rope_parameters": reading.rope()}
    _scale_is(reading, reading.common["head_dim"])
    biased = reading.has_any("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias", "attn_output.bias")
    mlp_biased = reading.has_any("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
    window = reading.keys.integer("attention.sliding_window", 0)
    if not window:
        return "llama", settings | {"attention_bias": biased, "mlp_bias": mlp_biased}
    if biased or mlp_biased or "attention.sliding_window_pattern" in reading.keys:
        raise reading.keys.error("attention.sliding_window", "with it no biases and no pattern are known")
    return "mistral", settings | {"sliding_window": window}


def _rms(reading: _Reading, activation: str) -> dict[str, Any]:
    epsilon = reading.keys.number("attention.layer_norm_rms_epsilon")
    reading.keys.must_equal("attention.layer_norm_epsilon", epsilon, "its norms are of one kind")
    return reading.common | {"rms_norm_eps": epsilon, "hidden_act": activation}


def _qwen2(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    _scale_is(reading, reading.common["head_dim"])
    settings = _rms(reading, "silu") | {"rope_parameters": reading.rope(), "use_sliding_window": False}
    del settings["head_dim"]
    return "qwen2", settings


def _qwen3(reading: _Reading) -> tuple[str, dict[str, Any]]:
    _scale_is(reading, reading.common["head_dim"])
    settings = _rms(reading, "silu") | {"rope_parameters": reading.rope(), "use_sliding_window": False}
    return "qwen3", settings | {"attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias")}


def _gemma(reading: _Reading) -> tuple[str, dict[str, Any]]:
    _scale_is(reading, reading.common["head_dim"])
    settings = _rms(reading, "gelu_pytorch_tanh") | {"rope_parameters": reading.rope()}
    return "gemma", settings | {"attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias")}


def _gemma_query_scalar(reading: _Reading, largest: int) -> int:
    # No key has it. As in llama.cpp, the largest model of a generation is known by its number of blocks.
    common = reading.common
    is_largest = common["num_hidden_layers"] == largest
    scalar = common["hidden_size"] // common["num_attention_heads"] if is_largest else common["head_dim"]
    _scale_is(reading, scalar)
    return int(scalar)


def _gemma2(reading: _Reading) -> tuple[str, dict[str, Any]]:
    settings = _rms(reading, "gelu_pytorch_tanh")
    rope = reading.rope()
    reading.keys.must_equal("rope.freq_base_swa", rope["rope_theta"], "all blocks of Gemma 2 have one base")
    settings["hidden_activation"] = settings.pop("hidden_act")
    return "gemma2", settings | {
        "rope_parameters": rope,
        "query_pre_attn_scalar": _gemma_query_scalar(reading, 46),
        "sliding_window": reading.keys.integer("attention.sliding_window", 4096),
        "layer_types": reading.layer_types(2),
        "attn_logit_softcapping": reading.keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reading.keys.number("final_logit_softcapping", 30.0),
        "attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias"),
    }


def _gemma3(reading: _Reading) -> tuple[str, dict[str, Any]]:
    settings = _rms(reading, "gelu_pytorch_tanh")
    settings["hidden_activation"] = settings.pop("hidden_act")
    window = reading.keys.integer("attention.sliding_window", 0)
    types = reading.layer_types(6)
    local = reading.keys.number("rope.freq_base_swa", 10_000.0)
    return "gemma3_text", settings | {
        "rope_parameters": {
            "full_attention": reading.rope(),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},  # a window is never scaled
        },
        "query_pre_attn_scalar": _gemma_query_scalar(reading, 62),
        "sliding_window": window or 4096,
        "layer_types": types if window else ["full_attention"] * len(types),
        "final_logit_softcapping": reading.keys.number("final_logit_softcapping", 0.0) or None,
        "attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias"),
    }


def _phi3(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    _scale_is(reading, reading.common["head_dim"])
    rope = reading.rope(partial=True)
    original = reading.keys.integer(
        "rope.scaling.original_context_length", reading.common["max_position_embeddings"]
    )
    if rope["rope_type"] not in ("default", "longrope"):
        raise reading.keys.error("rope.scaling.type", "Phi-3 has only plain RoPE and longrope")
    settings = _rms(reading, "silu") | {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": reading.keys.integer("attention.sliding_window", 0) or None,
    }
    del settings["head_dim"]
    return "phi3", settings


def _olmo2(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    _scale_is(reading, reading.common["head_dim"])
    settings = _rms(reading, "silu") | {"rope_parameters": reading.rope()}
    del settings["head_dim"]
    if reading.keys.integer("attention.sliding_window", 0):
        raise reading.keys.error(
            "attention.sliding_window", "with a window it is OLMo 3, which is no family of foldsearch's"
        )
    reading.keys.anything("attention.sliding_window_pattern")  # says nothing without a window
    return "olmo2", settings | {"attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias")}


def _gpt2(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    common = reading.common
    reading.keys.must_equal(
        "attention.head_count_kv", common["num_attention_heads"], "keys have as many heads"
    )
    _scale_is(reading, common["head_dim"])
    return "gpt2", {
        "vocab_size": common["vocab_size"],
        "n_positions": common["max_position_embeddings"],
        "n_embd": common["hidden_size"],
        "n_layer": common["num_hidden_layers"],
        "n_head": common["num_attention_heads"],
        "n_inner": common["intermediate_size"],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": reading.keys.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": common["tie_word_embeddings"],
        **_special_ids(reading.file),
    }


def _gpt_neox(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    settings = dict(reading.common)
    heads = settings.pop("num_key_value_heads")
    if heads != settings["num_attention_heads"]:
        raise reading.keys.error("attention.head_count_kv", "keys must have as many heads as queries")
    _scale_is(reading, settings.pop("head_dim"))
    return "gpt_neox", settings | {
        "rope_parameters": reading.rope(partial=True),
        "layer_norm_eps": reading.keys.number("attention.layer_norm_epsilon"),
        "use_parallel_residual": reading.keys.flag("use_parallel_residual"),
        # the file does not say which GELU; llama.cpp takes the approximation by tanh
        "hidden_act": "gelu_new",
        "attention_bias": True,
    }


# ------------------------------------------------------------------------------------------------- names of tensors


def _unpermute(values: Any, num_heads: int) -> Any:
    """Undo the order in which llama.cpp turns neighbouring dimensions, (O, ...)."""
    return (
        values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def _queries(values: Any, config: Any) -> Any:
    return _unpermute(values, config.num_attention_heads)


def _keys(values: Any, config: Any) -> Any:
    return _unpermute(values, config.num_key_value_heads)


def _minus_one(values: Any, config: Any) -> Any:
    """Gemma's norms multiply by 1 + w; the file holds the sum."""
    return values - 1


def _transpose(values: Any, config: Any) -> Any:
    """GPT-2 stores its linears as (I, O)."""
    return values.T if values.ndim == 2 else values


def _by_heads(values: Any, config: Any) -> Any:
    """GPT-NeoX stores queries, keys and values of one head together; the file all queries first."""
    heads = config.num_attention_heads
    split = values.reshape(3, heads, values.shape[0] // 3 // heads, *values.shape[1:])
    return split.swapaxes(0, 1).reshape(values.shape)


def _named(**undo: Callable[[Any, Any], Any]) -> dict[str, Rename]:
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
    return _renames(block, whole, "model.layers", **undo)


def _renames(
    block: dict[str, str], whole: dict[str, str], blocks: str, **undo: Callable[[Any, Any], Any]
) -> dict[str, Rename]:
    names = {f"{blocks}.{{}}.{ours}": f"blk.{{}}.{theirs}" for ours, theirs in block.items()} | whole
    return {ours: Rename(theirs, undo.get(theirs.rsplit(".", 1)[-1])) for ours, theirs in names.items()}


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
    _minus_one,
)
_AFTER_NORMS = {
    "model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm",
    "model.layers.{}.post_feedforward_layernorm": "blk.{}.post_ffw_norm",
}
_SANDWICH = _named(**_GEMMA_NORMS) | {
    ours: Rename(theirs, _minus_one)
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
    **dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), _transpose),
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
    attn_qkv=_by_heads,
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _named(attn_q=_queries, attn_k=_keys)),  # Mistral and SmolLM2 too
    "qwen2": Architecture(_qwen2, _named()),
    "qwen3": Architecture(_qwen3, _named()),
    "gemma": Architecture(_gemma, _named(**_GEMMA_NORMS)),
    "gemma2": Architecture(_gemma2, _SANDWICH),
    "gemma3": Architecture(_gemma3, _SANDWICH),
    "phi3": Architecture(_phi3, _named()),
    "olmo2": Architecture(_olmo2, _named() | {ours: Rename(theirs) for ours, theirs in _AFTER_NORMS.items()}),
    "gpt2": Architecture(_gpt2, _GPT2_NAMES),
    "gptneox": Architecture(_gpt_neox, _GPT_NEOX_NAMES),
}
