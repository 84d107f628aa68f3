"""Plan + dense model → folded model. No weight is copied: its tensors are the dense model's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foldsearch.errors import ModelError, PlanError
from foldsearch.model.blocks import FOLDED_PREFIX, Family, decoder_blocks, family_of
from foldsearch.model.folded import (
    FOLD_SCHEMA,
    folded_config_class,
    folded_model_class,
    linears,
    place_slots,
)
from foldsearch.model.parts import Borrowed, OutputNorm, Replaced
from foldsearch.plan.plan import UNITS, FoldPlan, Replacement, Slot, check_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

# Every how many blocks one sees everything (Gemma 3): a plan breaks that period, and `layer_types` says it by block.
_PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")


@torch.no_grad()
def fold(
    dense: PreTrainedModel, plan: FoldPlan, start: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """The folded model of a plan: a transformers model of class `Folded…` on the dense model's memory.

    Every tensor is the dense model's own (memory-mapped or not), so nothing may be trained in place: clone
    what you train. Only the norms of repeats and `layer` replacements are copies, and what children carry and other
    replacements are is new: adapters (down random from a fixed seed, up zero), output norms (γ small), networks that
    add nothing yet, in float32 whatever the model's dtype. All parameters are frozen; mode (eval), dtype, device,
    attention implementation and generation settings are the dense model's. The identity plan gives bit-identical
    logits.

    Args:
        start: values of what is new, by the folded model's parameter names (see foldsearch.model.starts).

    Raises:
        ModelError: the model is of an unknown family, is not a causal language model, or is folded already.
        PlanError: the plan is for another number of blocks, or an adapter is wider than the linear it sits on.
    """
    family = _family(dense)
    _check_plan(plan, decoder_blocks(dense), dense.config)
    _check_kinds(plan, decoder_blocks(dense), family)
    model_class = folded_model_class(dense.config.model_type)
    with torch.device("meta"):
        model = model_class(folded_config(dense.config, plan))
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, (Borrowed, OutputNorm, Replaced)):
            part.to_empty(device=dense.device, recurse=False).reset_parameters(generator)
    _assign(model, dense, family, plan)
    for name, value in (start or {}).items():
        holder, _, key = name.rpartition(".")
        old = model.get_parameter(name)
        assert old.shape == value.shape, f"the start of {name} is of the same plan"
        model.get_submodule(holder)._parameters[key] = nn.Parameter(value.to(old.device, old.dtype), False)
    model.generation_config = copy.deepcopy(dense.generation_config)
    model.requires_grad_(False).train(dense.training)
    return model


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with every parameter in `dtype`, frozen and in eval mode: the model as it ships.

    Buffers keep their dtype. `model.to(dtype)` would round the frequencies of the rotary embedding, which a model
    that is loaded in `dtype` has in float32.
    """
    # Each parameter is copied once, in `dtype`: a copy in the dtype of the model would be whole in memory for a moment.
    made = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for parameter in model.parameters()
    }
    twin: Any = copy.deepcopy(model, made).eval()
    twin.config.dtype = dtype
    copied: PreTrainedModel = twin.requires_grad_(False)
    return copied


def folded_config(dense: PretrainedConfig, plan: FoldPlan) -> PretrainedConfig:
    """The folded model's config: the dense model's, with the positions of the plan."""
    slots = layer_map(plan, dense.hidden_size)
    values = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "auto_map"):
        values.pop(key, None)
    config: Any = folded_config_class(dense.model_type)(**values)
    config._attn_implementation = dense._attn_implementation
    config._experts_implementation = dense._experts_implementation
    place_slots(config, slots)
    config.fold = {"schema": FOLD_SCHEMA, "plan": str(plan), "num_blocks": plan.num_blocks, "slots": slots}
    folded: PretrainedConfig = config
    return folded


def stock_config(folded: PretrainedConfig) -> PretrainedConfig:
    """The config of a stock model with a block for each position of the folded one; what goes by position follows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = folded.to_dict()
    for key in (
        *("model_type", "architectures", "fold", "auto_map", "kv_sharing_modes"),
        *_PERIODS,
    ):
        values.pop(key, None)
    config: Any = CONFIG_MAPPING[str(folded.model_type).removeprefix(FOLDED_PREFIX)](**values)
    for key in _PERIODS:
        vars(config).pop(key, None)
    stock: PretrainedConfig = config
    return stock


def layer_map(plan: FoldPlan, width: int) -> list[dict[str, Any]]:
    """One plain entry a position (see foldsearch.model.folded)."""
    entries: list[dict[str, Any]] = []
    for slot in plan.slots:
        if isinstance(slot, Slot):
            names = ("home", "attention", "mlp", "rank", "norm")
            entries.append({name: getattr(slot, name) for name in names})
            continue
        own = slot.first if slot.is_block else None
        replaced = {"last": slot.last, "kind": slot.kind, "hidden": slot.hidden(width)}
        entries.append(
            {
                "home": slot.first, "attention": own, "mlp": own, "rank": 0, "norm": False, "replaced": replaced,
            }
        )  # fmt: skip
    return entries


def _family(dense: PreTrainedModel) -> Family:
    if str(dense.config.model_type).startswith(FOLDED_PREFIX):
        raise ModelError(
            "only a dense model can be folded, but this one is folded already. Fold the model it came from."
        )
    try:
        family = family_of(dense.config)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if type(dense).__name__ != family.stock:
        raise ModelError(
            f"foldsearch folds the {family.stock} of this family, but the model is a {type(dense).__name__}. "
            "Load it with AutoModelForCausalLM."
        )
    if dense.config.is_heterogeneous:
        raise ModelError(
            "the blocks of a model must be of one shape to share weights, but this config changes some of them "
            "(per_layer_config). Such models are not supported."
        )
    return family


def _check_plan(plan: FoldPlan, blocks: nn.ModuleList, config: Any) -> None:
    if plan.num_blocks != len(blocks):
        raise PlanError(
            f"the plan is for a model of {plan.num_blocks} blocks, but this one has {len(blocks)}."
        )
    check_ranks(plan, config.hidden_size)


def _check_kinds(plan: FoldPlan, blocks: nn.ModuleList, family: Family) -> None:
    """Weights are shared among blocks of one kind, those of experts not at all; and some block attends.

    Raises:
        PlanError: the plan does otherwise.
    """
    for name in UNITS:
        for _, slot, source, own in plan.runs(name):
            if own:
                continue
            if name == "mlp" and family.experts:
                raise PlanError(
                    f"block {slot.home} runs the MLP of block {source}, but in a model with experts no MLP runs at "
                    f"another position. Share its attention only ({slot.home}={source}a), or drop the block."
                )
            here, there = (_kind(blocks[block], family, name) for block in (slot.home, source))
            if here != there:
                raise PlanError(
                    f"weights are shared among blocks of one kind, but block {slot.home} has {here[0]} and block "
                    f"{source} has {there[0]}. Share with a block of the same kind, or only the MLP "
                    f"({slot.home}={source}m)."
                )
    if family.mixer is None:
        return
    attends = [source for _, _, source, _ in plan.runs("attention")]
    attends += [slot.first for slot in plan.slots if isinstance(slot, Replacement) and slot.is_block]
    if not any(hasattr(blocks[block], family.attention.modules[0]) for block in attends):
        first = next(i for i, block in enumerate(blocks) if hasattr(block, family.attention.modules[0]))
        raise PlanError(
            f"some block attends, else no position is known when a text goes on, but '{plan}' keeps none that does. "
            f"Keep block {first}."
        )


def _kind(block: nn.Module, family: Family, name: str) -> tuple[Any, ...]:
    """Of a unit: what it is called, and its linears with their shapes."""
    unit = dict(family.units_of(block))[name]
    weights = [block.get_parameter(f"{path}.weight") for path in linears(block, unit)]
    return f"'{unit.modules[0]}'", *(tuple(weight.shape) for weight in weights)


def _assign(model: PreTrainedModel, dense: PreTrainedModel, family: Family, plan: FoldPlan) -> None:
    """Put the dense model's tensors in the folded model's places, tied where the dense model's are tied."""
    homes = [slot.home if isinstance(slot, Slot) else slot.first for slot in plan.slots]
    own = [  # positions whose tensors are copies, to train and to store
        home in homes[:position] or isinstance(plan.slots[position], Replacement)
        for position, home in enumerate(homes)
    ]
    sources = dict(dense.named_modules())
    tied: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Borrowed, OutputNorm, Replaced)) or not (
            module._parameters or module._buffers
        ):
            continue
        copied = False
        if name.startswith(f"{family.blocks}."):
            position, _, path = name.removeprefix(f"{family.blocks}.").partition(".")
            path = path.removesuffix(".inner")  # what an output norm wraps
            name = f"{family.blocks}.{homes[int(position)]}.{path}"
            copied = own[int(position)]
        source = sources[name]
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            found = source._parameters[key]
            assert found is not None
            assert found.shape == parameter.shape
            if copied:
                module._parameters[key] = nn.Parameter(found.detach().clone(), False)
            else:
                module._parameters[key] = tied.setdefault(id(found), nn.Parameter(found.detach(), False))
        for key in module._buffers:
            module._buffers[key] = source._buffers[key]
