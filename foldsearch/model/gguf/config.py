"""Which models a GGUF file may hold, and how its metadata becomes a config and a config metadata: one entry a kind.

The numbers of a model are what llama.cpp computes from the same file (src/models/*.cpp), except where the file says
something of the original model that llama.cpp does not apply: the windows of Phi-3 and Mistral, YaRN's own factors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from foldsearch.errors import ModelError, quote_error
from foldsearch.model.gguf.file import GgufFile
from foldsearch.model.gguf.keys import ModelKeys
from foldsearch.model.gguf.names import NAMES, Rename
from foldsearch.model.gguf.rope import describe_rope, rope_parameters
from foldsearch.model.gguf.weights import TensorReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Description",
    "architecture_of",
    "as_llama_cpp_has_it",
    "build_config",
    "describe",
    "held_families",
]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model of llama.cpp.

    Attributes:
        settings: the model type of transformers, and the settings of its config beside those that all have.
        describers: by model type of transformers, what adds to a description all that not every model has.
    """

    settings: Callable[[_Reading], tuple[str, dict[str, Any]]]
    describers: Mapping[str, Callable[[_Describing], None]]


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
            period = self.keys.integer("attention.sliding_window_pattern", default_period)
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


# ---------------------------------------------------------------------------------------------------------- describing


@dataclass(frozen=True, slots=True)
class Description:
    """What a GGUF file says of a model beside its parameters and its tokenizer.

    Attributes:
        architecture: of llama.cpp.
        keys: under the architecture's prefix.
        tensors: that are no parameters: the divisors of RoPE.
        names: which tensor each parameter is.
        notes: what llama.cpp computes in another way than transformers, in sentences.
    """

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, Any]
    names: Mapping[str, Rename]
    notes: tuple[str, ...]


def held_families() -> frozenset[str]:
    """The model types of transformers that llama.cpp has."""
    return frozenset(name for entry in ARCHITECTURES.values() for name in entry.describers)


def describe(config: PretrainedConfig, context: int = 0) -> Description:
    """What a file says of a model; `build_config` reads it.

    Args:
        config: of a stock model.
        context: tokens that the model is to see; windows that llama.cpp leaves out must be as wide.

    Raises:
        ModelError: llama.cpp does not run such a model.
    """
    for name, entry in ARCHITECTURES.items():
        if (add := entry.describers.get(config.model_type)) is not None:
            found = _Describing(config, context, _common_keys(config), {}, [])
            add(found)
            return Description(name, found.keys, found.tensors, NAMES[name], tuple(found.notes))
    raise ModelError(
        f"llama.cpp runs models of {', '.join(sorted(held_families()))}; this one is of {config.model_type}. "
        "Export it to stock."
    )


def _common_keys(config: Any) -> dict[str, Any]:
    width, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
    }


@dataclass(frozen=True, slots=True)
class _Describing:
    """What is at hand while a description is made."""

    config: Any
    context: int
    keys: dict[str, Any]
    tensors: dict[str, Any]
    notes: list[str]

    def must_be(self, setting: str, *allowed: Any) -> None:
        value = getattr(self.config, setting, None)
        if value not in allowed:
            raise ModelError(
                f"llama.cpp runs a {self.config.model_type} model with {setting} "
                f"{' or '.join(map(repr, allowed))} only; got {value!r}. Export it to stock."
            )

    def rms(self, **activation: str) -> None:
        """Keys of the models with RMS norms; `activation` is the setting that names it, and what it must be."""
        for setting, name in activation.items():
            self.must_be(setting, name)
        head_dim = _head_dim(self.config)
        self.keys.update(
            {
                "attention.layer_norm_rms_epsilon": float(self.config.rms_norm_eps),
                "attention.key_length": head_dim,
                "attention.value_length": head_dim,
            }
        )

    def rope(self, *kinds: str, layer_type: str | None = None, partial: bool = False) -> None:
        rope = self.config.rope_parameters
        share = (rope[layer_type] if layer_type else rope).get("partial_rotary_factor") or 1.0
        if share != 1 and not partial:
            raise ModelError(
                f"llama.cpp turns whole heads of a {self.config.model_type} model; its partial_rotary_factor is "
                f"{share}. Export it to stock."
            )
        keys, tensors = describe_rope(self.config, kinds, layer_type)
        self.keys.update({"rope.dimension_count": int(_head_dim(self.config) * share)} | keys)
        self.tensors.update(tensors)

    def windows_by_block(self, default_period: int) -> None:
        """Gemma: which blocks have a window, where that is not the usual period."""
        sliding = [kind == "sliding_attention" for kind in self.config.layer_types]
        self.keys["attention.sliding_window"] = int(self.config.sliding_window)
        if sliding != [block % default_period < default_period - 1 for block in range(len(sliding))]:
            self.keys["attention.sliding_window_pattern"] = sliding
            self.notes.append(
                "Which blocks have a window is said block by block (attention.sliding_window_pattern): a llama.cpp "
                f"that is too old to read it computes another model beyond {self.config.sliding_window:,} tokens."
            )

    def leaves_out_window(self, window: int | None) -> None:
        """A window that llama.cpp does not apply: the same model for as many tokens."""
        if not window or window >= self.config.max_position_embeddings:
            return
        if window < self.context:
            raise ModelError(
                f"llama.cpp runs {self.config.model_type} models without windows, so a text may be no longer than the "
                f"window, {window:,} tokens; the target's context is {self.context:,}. Lower target.context, or export "
                "it to stock."
            )
        self.notes.append(
            f"llama.cpp runs it without its window: for texts of more than {window:,} tokens it is another model."
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def as_llama_cpp_has_it(model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """The same model with the settings that llama.cpp has, and whether it computes the same to the bit.

    llama.cpp knows some settings by heart. The scale of Gemma's attention goes by the number of blocks: where it is
    another one, the queries are multiplied by the difference. The GELU of GPT-NeoX is the approximation by tanh. Qwen
    has no windows. `model` is not changed.

    Raises:
        ModelError: llama.cpp does not run such a model.
    """
    config: Any = copy.deepcopy(model.config)
    factor = 1.0
    if (largest := _LARGEST_GEMMA.get(config.model_type)) is not None:
        scalar = _known_scalar(config, largest)
        factor, config.query_pre_attn_scalar = (scalar / config.query_pre_attn_scalar) ** 0.5, scalar
    is_exact = factor == 1 and getattr(config, "hidden_act", None) != "gelu"
    if config.model_type == "gpt_neox" and config.hidden_act in _GELUS:
        config.hidden_act = "gelu_new"
    if config.model_type in ("qwen2", "qwen3"):
        config.use_sliding_window, config.sliding_window = False, None
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    if config.to_dict() == model.config.to_dict() and factor == 1:
        return model, True
    with torch.device("meta"):
        twin: Any = type(model)(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        holder, _, key = name.rpartition(".")
        twin.get_submodule(holder)._buffers[key] = buffer
    twin.tie_weights()
    if factor != 1:
        _scale_queries(twin, factor)
    twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.eval().requires_grad_(False), is_exact


@torch.no_grad()
def _scale_queries(model: PreTrainedModel, factor: float) -> None:
    """Multiply all queries; a norm on them, which multiplies by 1 + w, would undo it in the projection."""
    for block in model.get_submodule("model.layers").children():
        attention: Any = block.get_submodule("self_attn")
        if hasattr(attention, "q_norm"):
            weight = attention.q_norm.weight
            attention.q_norm.weight = torch.nn.Parameter((1 + weight.float()) * factor - 1, False)
            continue
        for key, value in attention.q_proj._parameters.items():
            if value is not None:
                attention.q_proj._parameters[key] = torch.nn.Parameter(value * factor, False)


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


def _describe_llama(found: _Describing) -> None:
    found.rms(hidden_act="silu")
    found.rope("default", "linear", "yarn", "llama3", "longrope")


def _describe_mistral(found: _Describing) -> None:
    _describe_llama(found)
    if found.config.sliding_window:
        found.keys["attention.sliding_window"] = int(found.config.sliding_window)
        found.leaves_out_window(found.config.sliding_window)


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


def _describe_qwen(found: _Describing) -> None:
    if found.config.model_type == "qwen3":
        found.must_be("attention_bias", False)
    found.rms(hidden_act="silu")
    found.rope("default", "linear", "yarn")
    if "sliding_attention" in found.config.layer_types:
        found.leaves_out_window(found.config.sliding_window)


def _gemma(reading: _Reading) -> tuple[str, dict[str, Any]]:
    _scale_is(reading, reading.common["head_dim"])
    settings = _rms(reading, "gelu_pytorch_tanh") | {"rope_parameters": reading.rope()}
    return "gemma", settings | {"attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias")}


def _describe_gemma(found: _Describing) -> None:
    found.must_be("hidden_act", "gelu_pytorch_tanh")
    found.must_be("tie_word_embeddings", True)
    found.rms()
    found.rope("default", "linear", "yarn")


# No key has the scale of attention. As in llama.cpp, the largest model of a generation, which has another one than the
# others, is known by its number of blocks.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _known_scalar(config: Any, largest: int) -> int:
    """What llama.cpp divides Gemma's attention by, under a root."""
    if config.num_hidden_layers == largest:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


def _gemma_query_scalar(reading: _Reading, family: str) -> int:
    scalar = _known_scalar(SimpleNamespace(**reading.common), _LARGEST_GEMMA[family])
    _scale_is(reading, scalar)
    return scalar


def _gemma2(reading: _Reading) -> tuple[str, dict[str, Any]]:
    settings = _rms(reading, "gelu_pytorch_tanh")
    rope = reading.rope()
    reading.keys.must_equal("rope.freq_base_swa", rope["rope_theta"], "all blocks of Gemma 2 have one base")
    settings["hidden_activation"] = settings.pop("hidden_act")
    return "gemma2", settings | {
        "rope_parameters": rope,
        "query_pre_attn_scalar": _gemma_query_scalar(reading, "gemma2"),
        "sliding_window": reading.keys.integer("attention.sliding_window", 4096),
        "layer_types": reading.layer_types(2),
        "attn_logit_softcapping": reading.keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reading.keys.number("final_logit_softcapping", 30.0),
        "attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias"),
    }


def _describe_gemma2(found: _Describing) -> None:
    found.must_be("tie_word_embeddings", True)
    found.rms(hidden_activation="gelu_pytorch_tanh")
    found.rope("default", "linear", "yarn")
    found.windows_by_block(2)
    for setting in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not (cap := getattr(found.config, setting)):
            raise ModelError(
                f"llama.cpp runs a gemma2 model with {setting} only; got {cap!r}. Export it to stock."
            )
        found.keys[setting] = float(cap)


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
        "query_pre_attn_scalar": _gemma_query_scalar(reading, "gemma3_text"),
        "sliding_window": window or 4096,
        "layer_types": types if window else ["full_attention"] * len(types),
        "final_logit_softcapping": reading.keys.number("final_logit_softcapping", 0.0) or None,
        "attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias"),
    }


def _describe_gemma3(found: _Describing) -> None:
    config = found.config
    found.must_be("tie_word_embeddings", True)
    found.must_be("attn_logit_softcapping", None)
    found.must_be("use_bidirectional_attention", None, False)
    found.rms(hidden_activation="gelu_pytorch_tanh")
    found.rope("default", "linear", "yarn", layer_type="full_attention")
    local = config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise ModelError(
            "llama.cpp turns positions in the windows of a gemma3_text model by default RoPE only; got "
            f"'{local['rope_type']}'. Export it to stock."
        )
    found.keys["rope.freq_base_swa"] = float(local["rope_theta"])
    if "sliding_attention" in config.layer_types:
        found.windows_by_block(6)
    if config.final_logit_softcapping:
        found.keys["final_logit_softcapping"] = float(config.final_logit_softcapping)


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


def _describe_phi3(found: _Describing) -> None:
    config = found.config
    found.rms(hidden_act="silu")
    found.rope("default", "longrope", partial=True)
    found.keys["rope.scaling.original_context_length"] = int(config.original_max_position_embeddings)
    if config.sliding_window:
        found.keys["attention.sliding_window"] = int(config.sliding_window)
        found.leaves_out_window(config.sliding_window)


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


def _describe_olmo2(found: _Describing) -> None:
    found.rms(hidden_act="silu")
    found.rope("default", "linear", "yarn")


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


def _describe_gpt2(found: _Describing) -> None:
    found.must_be("activation_function", "gelu_new", "gelu_pytorch_tanh")
    found.must_be("scale_attn_weights", True)
    found.must_be("scale_attn_by_inverse_layer_idx", False)
    found.must_be("add_cross_attention", False)
    found.keys["attention.layer_norm_epsilon"] = float(found.config.layer_norm_epsilon)


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


def _describe_gpt_neox(found: _Describing) -> None:
    found.must_be("hidden_act", *_GELUS)
    found.must_be("attention_bias", True)
    if found.config.hidden_act == "gelu":
        found.notes.append("llama.cpp takes the approximation of its GELU by tanh.")
    found.rope("default", "linear", "yarn", partial=True)
    found.keys["attention.layer_norm_epsilon"] = float(found.config.layer_norm_eps)
    found.keys["use_parallel_residual"] = bool(found.config.use_parallel_residual)


# llama.cpp knows by heart which blocks of SmolLM3 do not turn by position: the last of each so many.
SMOLLM3_PERIOD = 4


def _smollm3(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    _scale_is(reading, reading.common["head_dim"])
    settings = _rms(reading, "silu") | {"rope_parameters": reading.rope()}
    del settings["head_dim"]
    return "smollm3", settings | {
        "attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias", "attn_output.bias"),
        "mlp_bias": reading.has_any("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
        "no_rope_layer_interval": SMOLLM3_PERIOD,
    }


def _describe_smollm3(found: _Describing) -> None:
    config = found.config
    turns = [bool(turns) for turns in config.no_rope_layers[: config.num_hidden_layers]]
    if turns != [(block + 1) % SMOLLM3_PERIOD != 0 for block in range(len(turns))]:
        still = ", ".join(str(block) for block, does in enumerate(turns) if not does) or "none"
        raise ModelError(
            f"llama.cpp knows by heart that every {SMOLLM3_PERIOD}th block of a smollm3 model does not turn by "
            f"position (no_rope_layers); of this model those are {still}. Drop blocks so that these keep their places "
            "in the period, or export it to stock."
        )
    found.must_be("use_sliding_window", False)
    found.rms(hidden_act="silu")
    found.rope("default", "linear", "yarn")


_GRANITE_SCALES = {  # by the key, the setting
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _granite(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    settings = _rms(reading, "silu") | {"rope_parameters": reading.rope()}
    usual = settings.pop("head_dim") ** -0.5
    if reading.keys.anything("rope.scaling.finetuned") is False:  # a switch of all rotation in Granite 4
        raise reading.keys.error(
            "rope.scaling.finetuned", "blocks that do not turn by position are not known here"
        )
    scales = {
        setting: reading.keys.number(key, 0.0) or 1.0  # 0 says: none
        for key, setting in _GRANITE_SCALES.items()
    }
    return "granite", settings | scales | {
        "attention_multiplier": reading.keys.number("attention.scale", 0.0) or usual,
        "attention_bias": reading.has_any("attn_q.bias", "attn_qkv.bias", "attn_output.bias"),
        "mlp_bias": reading.has_any("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
    }


def _describe_granite(found: _Describing) -> None:
    found.rms(hidden_act="silu")
    found.rope("default", "linear", "yarn")
    for key, setting in (_GRANITE_SCALES | {"attention.scale": "attention_multiplier"}).items():
        if not (scale := float(getattr(found.config, setting))) > 0:
            raise ModelError(
                f"llama.cpp runs a granite model with {setting} above 0 only; got {scale:g}. Export it to stock."
            )
        found.keys[key] = scale


def _stablelm(reading: _Reading) -> tuple[str, dict[str, Any]]:
    reading.must_have_usual_heads()
    _scale_is(reading, reading.common["head_dim"])
    reading.keys.anything(
        "use_parallel_residual"
    )  # llama.cpp goes by the tensors, and converters wrote it wrong
    settings = reading.common | {
        "hidden_act": "silu",
        "rope_parameters": reading.rope(partial=True),
        "layer_norm_eps": reading.keys.number("attention.layer_norm_epsilon"),
        "use_qkv_bias": reading.has_any("attn_q.bias", "attn_qkv.bias"),
        "use_parallel_residual": not reading.has_any("ffn_norm.weight"),
    }
    del settings["head_dim"]
    return "stablelm", settings


def _describe_stablelm(found: _Describing) -> None:
    found.must_be("hidden_act", "silu")
    found.must_be("qk_layernorm", False)  # a tensor a head here, one for all of them there
    found.rope("default", "linear", "yarn", partial=True)
    found.keys["attention.layer_norm_epsilon"] = float(found.config.layer_norm_eps)
    found.keys["use_parallel_residual"] = bool(found.config.use_parallel_residual)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, {"llama": _describe_llama, "mistral": _describe_mistral}),  # and SmolLM2
    "qwen2": Architecture(_qwen2, {"qwen2": _describe_qwen}),
    "qwen3": Architecture(_qwen3, {"qwen3": _describe_qwen}),
    "gemma": Architecture(_gemma, {"gemma": _describe_gemma}),
    "gemma2": Architecture(_gemma2, {"gemma2": _describe_gemma2}),
    "gemma3": Architecture(_gemma3, {"gemma3_text": _describe_gemma3}),
    "phi3": Architecture(_phi3, {"phi3": _describe_phi3}),
    "olmo2": Architecture(_olmo2, {"olmo2": _describe_olmo2}),
    "gpt2": Architecture(_gpt2, {"gpt2": _describe_gpt2}),
    "gptneox": Architecture(_gpt_neox, {"gpt_neox": _describe_gpt_neox}),
    "smollm3": Architecture(_smollm3, {"smollm3": _describe_smollm3}),
    "granite": Architecture(_granite, {"granite": _describe_granite}),
    "stablelm": Architecture(_stablelm, {"stablelm": _describe_stablelm}),
}
