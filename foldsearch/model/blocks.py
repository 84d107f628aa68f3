"""Where each model family keeps its blocks: the one place that knows.

This file is shipped inside folded exports, so it needs torch only and nothing of foldsearch.
A *unit* is the attention or the MLP of a block. Its linears (weights and biases) can be borrowed from another
block; its norms always stay with the block they belong to.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Unit:
    """Names of a unit's modules, relative to its block."""

    modules: tuple[str, ...]  # hold the linears, in the order they run
    norms: tuple[str, ...]  # run only for this unit
    output: str  # the module whose output is added to the residual stream
    between: tuple[str, ...] = ()  # modules outside them that run between the linears
    gives_one: bool = (
        False  # in place of an attention: its module gives no weights of attention beside its output
    )


@dataclass(frozen=True)
class Family:
    """Names of a family's modules, relative to its causal language model."""

    stock: str  # the transformers class
    blocks: str  # the list of blocks
    final_norm: str
    attention: Unit
    mlp: Unit
    shared_norms: tuple[str, ...] = ()  # of a block, run for both units
    mixer: Unit | None = None  # what some blocks have in place of an attention
    experts: str = ""  # what a mixture of experts has, in its unit; empty where no block is one

    def attention_of(self, block: nn.Module) -> Unit:
        """What mixes tokens in a block: its attention, or what it has in place of one."""
        has_mixer = self.mixer is not None and not hasattr(block, self.attention.modules[0])
        return self.mixer if self.mixer is not None and has_mixer else self.attention

    def units_of(self, block: nn.Module) -> tuple[tuple[str, Unit], tuple[str, Unit]]:
        """Both units of a block, by their names in a plan."""
        return ("attention", self.attention_of(block)), ("mlp", self.mlp)

    def has_experts(self, block: nn.Module) -> bool:
        """Whether the MLP of a block is a mixture of experts, which is left as it is: neither shared nor solved."""
        mlp = block.get_submodule(self.mlp.modules[-1])
        return bool(self.experts) and hasattr(mlp, self.experts)


def _pre_norm(stock: str) -> Family:
    """Llama's layout: one norm before each unit."""
    return Family(
        stock,
        "model.layers",
        "model.norm",
        Unit(("self_attn",), ("input_layernorm",), "self_attn.o_proj"),
        Unit(("mlp",), ("post_attention_layernorm",), "mlp.down_proj"),
    )


def _sandwich(stock: str) -> Family:
    """Gemma 2's layout: a norm before and after each unit."""
    return Family(
        stock,
        "model.layers",
        "model.norm",
        Unit(("self_attn",), ("input_layernorm", "post_attention_layernorm"), "post_attention_layernorm"),
        Unit(
            ("mlp",),
            ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            "post_feedforward_layernorm",
        ),
    )


FAMILIES: dict[str, Family] = {
    "llama": _pre_norm("LlamaForCausalLM"),
    "mistral": _pre_norm("MistralForCausalLM"),
    "qwen2": _pre_norm("Qwen2ForCausalLM"),
    "qwen3": _pre_norm("Qwen3ForCausalLM"),
    "smollm3": _pre_norm("SmolLM3ForCausalLM"),
    "granite": _pre_norm("GraniteForCausalLM"),
    "stablelm": _pre_norm("StableLmForCausalLM"),
    "gemma": _pre_norm("GemmaForCausalLM"),
    "phi3": _pre_norm("Phi3ForCausalLM"),
    "gemma2": _sandwich("Gemma2ForCausalLM"),
    "gemma3_text": _sandwich("Gemma3ForCausalLM"),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        "model.layers",
        "model.norm",
        Unit(("self_attn",), ("post_attention_layernorm",), "post_attention_layernorm"),
        Unit(("mlp",), ("post_feedforward_layernorm",), "post_feedforward_layernorm"),
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        "model.layers",
        "model.embedding_norm",
        Unit(("self_attn",), ("operator_norm",), "self_attn.out_proj"),
        Unit(("feed_forward",), ("ffn_norm",), "feed_forward.w2"),
        mixer=Unit(("conv",), ("operator_norm",), "conv.out_proj", gives_one=True),
    ),
    "qwen3_moe": replace(
        _pre_norm("Qwen3MoeForCausalLM"),
        mlp=Unit(("mlp",), ("post_attention_layernorm",), "mlp"),
        experts="experts",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.h",
        "transformer.ln_f",
        Unit(("attn",), ("ln_1",), "attn.c_proj"),
        Unit(("mlp",), ("ln_2",), "mlp.c_proj"),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        Unit(("attention",), ("input_layernorm",), "attention.dense"),
        Unit(("mlp",), ("post_attention_layernorm",), "mlp.dense_4h_to_h"),
    ),
    "opt": Family(
        "OPTForCausalLM",
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        Unit(("self_attn",), ("self_attn_layer_norm",), "self_attn.out_proj"),
        Unit(("fc1", "fc2"), ("final_layer_norm",), "fc2", ("activation_fn",)),
    ),
}

# Lists of a config with an entry for each block, which say what the block at that position is.
BY_BLOCK = ("layer_types", "no_rope_layers")

FOLDED_PREFIX = "foldsearch_"  # the model_type of a folded model is this and the family's


def family_of(config: Any) -> Family:
    """The family of a transformers config, dense or folded.

    Raises:
        ValueError: the family is unknown, and the message names the known ones; or its blocks do not only add.
    """
    model_type = str(config.model_type).removeprefix(FOLDED_PREFIX)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"foldsearch folds the families it knows, but this model's type is '{model_type}'. "
            f"Known: {known}. A new family is one entry in foldsearch/model/blocks.py."
        )
    if not getattr(config, "do_layer_norm_before", True):
        raise ValueError(
            "foldsearch folds blocks that add to the residual stream, but those of this model normalise the stream "
            "itself (do_layer_norm_before is false, as in OPT-350m). Take another size of the family."
        )
    family = FAMILIES[model_type]
    if model_type == "stablelm" and config.use_parallel_residual:
        # one norm, whose output both units read
        return replace(
            family,
            attention=replace(family.attention, norms=()),
            mlp=replace(family.mlp, norms=()),
            shared_norms=family.attention.norms,
        )
    return family


def residual_multiplier(config: Any) -> float:
    """What the output of a unit is multiplied by before it is added to the residual stream: 1 but for Granite."""
    return float(getattr(config, "residual_multiplier", 1.0))


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model, in execution order."""
    blocks = model.get_submodule(family_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks
