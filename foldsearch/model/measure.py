"""The cost table of a dense model: fvcore counts it once, on the meta device, and every plan is priced from it.

fvcore counts MACs. It skips `scaled_dot_product_attention`, so that gets a handler here, and any operation that is
neither counted nor on the list of those that do no products is an error instead of a silent zero.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis, parameter_count
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import ModelError
from foldsearch.model.blocks import Unit, decoder_blocks, family_of
from foldsearch.model.folded import linears
from foldsearch.plan.cost import EXPERTS, BlockCost, CostTable, UnitCost
from foldsearch.plan.stored import Matrix, Role

TRACED_TOKENS = (32, 64)  # two lengths tell a linear term from a quadratic one

# Operations without products of matrices: fvcore's convention counts them as nothing.
_FREE = {
    f"aten::{name}"
    for name in (
        "abs add add_ all any arange argmax bitwise_and bitwise_not bitwise_or cat ceil clamp clone "
        "chunk contiguous copy_ cos cumsum detach diff div div_ dropout embedding empty eq erf exp expand "
        "expand_as feature_dropout fill_ floor floor_divide full full_like ge gelu gt index index_select "
        "layer_norm le lift_fresh logical_and logical_not logical_or lt masked_fill masked_fill_ max "
        "mean min mul mul_ ne neg new_ones ones ones_like permute pow reciprocal relu remainder repeat "
        "repeat_interleave reshape rms_norm rsqrt rsub scalar_tensor select sigmoid silu sin slice softmax split sqrt "
        "square squeeze stack sub sub_ sum t tanh to topk transpose type_as unbind unflatten unsqueeze view where "
        "zeros zeros_like"
    ).split()
}


def _sdpa_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Both products of attention, Q·Kᵀ and A·V: heads × queries × keys × head width each, masked or not."""
    query = inputs[0].type().sizes()
    key, value = inputs[1].type().sizes(), inputs[2].type().sizes()
    pairs = math.prod(query[:-1]) * key[-2]
    return Counter(scaled_dot_product_attention=pairs * (query[-1] + value[-1]))


class _ConvolutionsInProducts(TorchFunctionMode):
    """Convolutions over the tokens, a channel by itself, as products: torch cannot trace them without values.

    What padding makes beyond the tokens is cut off again by who asks for it, and so is not made or counted.
    Shapes: B sequences, D channels, T tokens, L tokens of a window.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not nn.functional.conv1d or "weight" not in given or given.get("groups", 1) == 1:
            return func(*args, **given)
        hidden_BDT, weight_D1L, bias_D = args[0], given["weight"], given.get("bias")
        tokens, window = hidden_BDT.shape[-1], int(weight_D1L.shape[-1])
        padded = torch.cat((torch.zeros_like(hidden_BDT)[..., : window - 1], hidden_BDT), -1)
        windows_BDTL = torch.stack([padded[..., at : at + tokens] for at in range(window)], -1)
        out_BDT = (windows_BDTL @ weight_D1L.transpose(1, 2)).squeeze(-1)
        return out_BDT if bias_D is None else out_BDT + bias_D[:, None]


def _no_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter()


def count_macs(model: nn.Module, inputs: tuple[Any, ...]) -> FlopCountAnalysis:
    """fvcore's analysis of one forward pass, attention included.

    Raises:
        ModelError: the model runs an operation that fvcore does not count and that is not known to be free.
    """
    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _sdpa_macs)
    analysis.set_op_handle("aten::layer_norm", _no_macs)  # fvcore counts this kind of norm and no other
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings(), _quiet(), _ConvolutionsInProducts():
        warnings.simplefilter("ignore")
        analysis.total()  # the trace happens here
        unknown = set(analysis.unsupported_ops()) - _FREE
    if unknown:
        raise ModelError(
            f"every operation must be counted, but nothing here knows the cost of {', '.join(sorted(unknown))}. "
            "Add a handler, or list it as free, in foldsearch/model/measure.py."
        )
    return analysis


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("fvcore.nn.jit_analysis", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _LastLogits(nn.Module):
    """Tokens to the logits of the last one, with the arguments that fvcore's tracer cannot pass by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids_BT, use_cache=False, logits_to_keep=1).logits
        return logits


def last_logits_macs(model: PreTrainedModel, tokens: int) -> FlopCountAnalysis:
    """fvcore's count for reading `tokens` tokens at once, logits for the last one only."""
    ids_BT = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    with _experts_in_products(model):
        return count_macs(_LastLogits(model).eval(), (ids_BT,))


@contextmanager
def _experts_in_products(model: PreTrainedModel) -> Iterator[None]:
    """Experts as plain products of those that a token goes to, which can be counted, and need no values."""
    before = model.config._experts_implementation
    model.config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        model.config._experts_implementation = before


def measure(config: PretrainedConfig) -> CostTable:
    """The cost table of the dense model of this config; no weights are needed.

    Raises:
        ModelError: the family is unknown, or an operation cannot be counted.
    """
    try:
        family = family_of(config)
    except ValueError as error:
        raise ModelError(str(error)) from error
    config = _static_rope(config)
    with torch.device("meta"), _quiet():
        model = AutoModelForCausalLM.from_config(config).eval()
        windows = [_window(layer) for layer in DynamicCache(config=config).layers]
        kinds = [_kind(block, window) for block, window in zip(decoder_blocks(model), windows, strict=True)]
        first_of_kind = {kind: kinds.index(kind) for kind in kinds}
        # Blocks of one kind cost the same, so only as many blocks are traced as show every kind, and each of them
        # behind the first block if it stands there at all: a later one runs while the embeddings are still alive.
        later = [kinds.index(kind, 1) for kind in first_of_kind if kind in kinds[1:]]
        depth = min(max(1, *first_of_kind.values(), *later) + 1, len(kinds))
        traced = AutoModelForCausalLM.from_config(_shallow(config, depth)).eval()
    costs = _block_costs(traced, windows)
    blocks = tuple(costs[first_of_kind[kind]] for kind in kinds)

    short, _ = TRACED_TOKENS
    macs = last_logits_macs(traced, short).by_module()
    head_name = next(
        name for name, module in traced.named_modules() if module is traced.get_output_embeddings()
    )
    outside = (
        macs[""]
        - macs[f"model.{head_name}"]
        - sum(macs[f"model.{family.blocks}.{i}"] for i in range(len(costs)))
    )
    activation_width, activation_fixed = _activation_terms(traced)
    return CostTable(
        width=config.hidden_size,
        fixed_weights=parameter_count(model)[""] - sum(_block_parameters(block) for block in blocks),
        fixed_macs=outside // short,
        head_macs=macs[f"model.{head_name}"],
        activation_width=activation_width,
        activation_fixed=activation_fixed,
        vocabulary=config.vocab_size,
        blocks=blocks,
        by_position=bool(getattr(config, "scale_attn_by_inverse_layer_idx", False)),
        family=str(config.model_type),
        fixed_matrices=_fixed_matrices(model, family.blocks),
    )


def _shallow(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    if getattr(config, "layer_types", None):
        shallow.layer_types = config.layer_types[:depth]
    shallow.num_hidden_layers = depth
    shallow.pad_token_id = (
        None  # else GPT-2 looks for it among the tokens, and on the meta device they have no values
    )
    return shallow


def _window(layer: Any) -> int:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return 1  # a state, of the same size after every token
    return int(layer.sliding_window) if layer.is_sliding else 0


def _kind(block: nn.Module, window: int) -> tuple[Any, ...]:
    return window, *((name, parameter.shape) for name, parameter in block.named_parameters())


def _block_parameters(block: BlockCost) -> int:
    units = block.attention.weights + block.attention.norms + block.mlp.weights + block.mlp.norms
    return units + block.other


def _block_costs(model: PreTrainedModel, windows: list[int]) -> list[BlockCost]:
    """Cost of every block of a model on the meta device, from two fvcore traces and one run with a cache."""
    family, width = family_of(model.config), model.config.hidden_size
    short, long = TRACED_TOKENS
    macs_short = last_logits_macs(model, short).by_module()
    macs_long = last_logits_macs(model, long).by_module()

    def fit(names: list[str]) -> tuple[int, int]:
        """MACs per token and per token²: m(T) = a·T + b·T², through both traces."""
        at_short, at_long = (sum(macs[name] for name in names) for macs in (macs_short, macs_long))
        quadratic = (at_long * short - at_short * long) // (short * long * (long - short))
        return at_short // short - quadratic * short, quadratic

    result = []
    for index, (block, kv_width) in enumerate(zip(decoder_blocks(model), _kv_widths(model), strict=True)):
        units = []
        for unit, cached in ((family.attention_of(block), (kv_width, windows[index])), (family.mlp, (0, 0))):
            names = [f"model.{family.blocks}.{index}.{name}" for name in (*unit.modules, *unit.norms)]
            weights, norms, adapter_width, matrices = _unit_parameters(block, unit)
            kind = EXPERTS if unit is family.mlp and family.has_experts(block) else unit.modules[0]
            units.append(UnitCost(weights, norms, width, *fit(names), adapter_width, *cached, matrices, kind))
        attention, mlp = units
        known = _block_parameters(BlockCost(attention, mlp))
        result.append(BlockCost(attention, mlp, other=parameter_count(block)[""] - known))
    return result


def _unit_parameters(block: nn.Module, unit: Unit) -> tuple[int, int, int, tuple[Matrix, ...]]:
    adapted = [block.get_submodule(name) for name in linears(block, unit)]
    weights = sum(parameter.numel() for linear in adapted for parameter in linear.parameters())
    modules = [block.get_submodule(name) for name in (*unit.modules, *unit.norms)]
    everything = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return (
        weights,
        everything - weights,
        sum(sum(weight.shape) for linear in adapted if isinstance(weight := linear.weight, torch.Tensor)),
        tuple(_matrix(linear) for linear in adapted),
    )


def _matrix(module: nn.Module, role: Role = "inner") -> Matrix:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    outputs, inputs = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
    return Matrix(outputs, inputs, role)


def _fixed_matrices(model: PreTrainedModel, blocks: str) -> tuple[Matrix, ...]:
    """Those outside the blocks; one that looks tokens up and makes the logits counts once, as the head."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    outside = [module for name, module in model.named_modules() if not name.startswith(f"{blocks}.")]
    embeddings = [module for module in outside if isinstance(module, nn.Embedding) and module is not table]
    assert head is not None
    found = [_matrix(head, "head"), *(_matrix(module, "positions") for module in embeddings)]
    if head.weight is not table.weight:
        found.append(_matrix(table, "table"))
    return tuple(found)


def _kv_widths(model: PreTrainedModel) -> list[int]:
    """Numbers cached per token by each block, or by a state as a whole, read off the model's own cache."""
    ids_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with torch.no_grad(), _quiet(), _experts_in_products(model):
        cache: Any = model.base_model(input_ids=ids_BT, use_cache=True).past_key_values
    return [
        sum(state.numel() for state in kept_by(layer))
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        else layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3])
        for layer in cache.layers
    ]


def kept_by(layer: Any) -> list[torch.Tensor]:
    """The tensors of a layer of transformers' cache: keys and values, or states."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        found = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    else:
        found = [getattr(layer, name, None) for name in ("keys", "values")]
    return [tensor for tensor in found if tensor is not None]


class _LiveNumbers(TorchDispatchMode):
    """Peak of the numbers that live tensors hold: parameters, inputs and what `cache` keeps aside."""

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._cache = cache
        self._sizes: Any = WeakIdKeyDictionary()  # a storage leaves when the last tensor on it is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.index.Tensor and isinstance(args[0], nn.Parameter):
            return outputs  # experts' weights for each token, which only products that can be counted copy
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in before:
                storage = tensor.untyped_storage()
                self._sizes[storage] = storage.nbytes() // tensor.element_size()
        kept = [tensor for layer in self._cache.layers for tensor in kept_by(layer)]
        cached = {id(tensor.untyped_storage()) for tensor in kept}
        self.peak = max(
            self.peak, sum(size for storage, size in self._sizes.items() if id(storage) not in cached)
        )
        return outputs


def _static_rope(config: PretrainedConfig) -> PretrainedConfig:
    """Dynamic RoPE looks at the values of positions, which a model without weights has not; it costs the same."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") != "dynamic":
        return config
    config = copy.deepcopy(config)
    config.rope_parameters = {**rope, "rope_type": "default"}
    return config


def activation_numbers(model: PreTrainedModel, tokens: int) -> int:
    """Peak working set of the blocks when `tokens` tokens are read at once, in numbers, the KV cache aside."""
    ids_BT = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)  # given, because without one transformers looks at token values
    with torch.no_grad(), _quiet(), _experts_in_products(model), _LiveNumbers(cache) as live:
        model.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
    return int(live.peak)


def _fused_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The shapes of a fused kernel, which keeps no matrix of scores (torch's meta kernel would)."""
    return torch.empty_like(query).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


ALL_ATTENTION_FUNCTIONS.register("foldsearch_fused", _fused_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("foldsearch_fused", _no_mask)


def _activation_terms(model: PreTrainedModel) -> tuple[int, int]:
    """The working set as (numbers per token, numbers at any length), with fused attention."""
    model.set_attn_implementation("foldsearch_fused")
    short, long = TRACED_TOKENS
    at_short, at_long = activation_numbers(model, short), activation_numbers(model, long)
    per_token = (at_long - at_short) // (long - short)
    return per_token, max(at_short - per_token * short, 0)
