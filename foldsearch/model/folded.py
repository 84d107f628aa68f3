"""A folded model: the stock transformers class with one block per executed position, and shared weights stored once.

`FoldedLlamaForCausalLM` is LlamaForCausalLM whose config says what each position runs (`config.fold`); likewise for
every family of blocks.py, under the name `Folded` + the stock name. The classes are made when they are first asked for.

This file is shipped inside folded exports, so it needs torch and transformers only and nothing of foldsearch.

`config.fold` is plain JSON:

    schema      1
    plan        the plan's text, for people
    num_blocks  blocks of the dense model
    slots       one entry a position, in execution order: {home, attention, mlp, rank, norm} and, in place of a run
                of blocks, replaced: {last, kind, hidden}
                home: the block whose norms, attention type and rotation the position keeps
                attention, mlp: the block whose weights the unit runs, or null where the unit is absent
                rank: of the low-rank adapters on the borrowed units; norm: whether their outputs are normalised
                replaced: home to last are replaced by a network of this kind (see networks.py) and hidden width, or,
                where the position has units, by the block `home` with weights of its own
    stored      only where several models share files of weights: the names of tensors in these files, each with the
                model's own name
"""

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from .blocks import (
    BY_BLOCK,
    FAMILIES,
    FOLDED_PREFIX,
    Unit,
    decoder_blocks,
    family_of,
    residual_multiplier,
)
from .networks import NETWORKS
from .parts import AbsentAttention, AbsentMLP, Borrowed, OutputNorm

if TYPE_CHECKING:  # transformers is imported where it is used: this file may run while it is being imported
    from transformers import PretrainedConfig, PreTrainedModel

FOLD_SCHEMA = 1


@cache
def folded_config_class(family_name: str) -> "type[PretrainedConfig]":
    """The config class of a family (a key of blocks.FAMILIES): the stock config plus `fold`.

    Making the first config makes its model class known to AutoModelForCausalLM, so that only the family in use is
    imported.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stock: Any = CONFIG_MAPPING[family_name]

    def post_init(self: Any, **kwargs: Any) -> None:
        from transformers import AutoModelForCausalLM

        stock.__post_init__(self, **kwargs)
        AutoModelForCausalLM.register(type(self), folded_model_class(family_name), exist_ok=True)

    return type(
        f"Folded{stock.__name__}",
        (stock,),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} plus `fold`: what each position runs.",
            "__post_init__": post_init,
            "model_type": FOLDED_PREFIX + family_name,
            "fold": None,
        },
    )


@cache
def folded_model_class(family_name: str) -> "type[PreTrainedModel]":
    """The model class of a family (a key of blocks.FAMILIES)."""
    import transformers

    stock: Any = getattr(transformers, FAMILIES[family_name].stock)

    def init(self: Any, config: "PretrainedConfig") -> None:
        stock.__init__(self, config)
        assemble(self)

    def from_pretrained(cls: Any, path: Any, /, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            where = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
            config = cls.config_class.from_pretrained(
                path, **{key: kwargs[key] for key in where if key in kwargs}
            )
        if stored := (config.fold or {}).get("stored"):
            kwargs["key_mapping"] = key_mapping(stored)
        loaded = stock.from_pretrained.__func__(cls, path, *args, config=config, **kwargs)
        if stored:  # from here on it is a model like any other, which is saved by its own names
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model._weight_conversions = None
            model.config.fold = {key: value for key, value in model.config.fold.items() if key != "stored"}
        return loaded

    return type(
        f"Folded{stock.__name__}",
        (stock,),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with the positions that `config.fold` lists.",
            "config_class": folded_config_class(family_name),
            "__init__": init,
            "from_pretrained": classmethod(from_pretrained),
        },
    )


def key_mapping(stored: dict[str, str]) -> dict[str, str]:
    """The names of `config.fold["stored"]` as transformers takes them: each as a pattern."""
    return {f"^{re.escape(name)}$": own for name, own in stored.items()}


def __getattr__(name: str) -> Any:
    """Every folded class by its name: transformers looks them up here when it loads an export."""
    for family_name, family in FAMILIES.items():
        if name == f"Folded{family.stock}":
            return folded_model_class(family_name)
        if name.startswith("Folded") and name.endswith("Config"):
            config_class = folded_config_class(family_name)
            if name == config_class.__name__:
                return config_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def place_slots(config: Any, slots: list[dict[str, Any]]) -> None:
    """Make the fields of a config that go by position follow the slots, in place.

    The config is the dense model's when it comes in. Attention types are looked up by position in the forward pass, so
    they are listed by each slot's home, and so are SmolLM3's blocks that do not turn by position; Qwen also counts the
    first ones that have no window, which other programs read.
    A position without attention gets no cache layer ("reuse" makes transformers' caches put a dummy there, and read
    lengths from the first real one).
    """
    for name in BY_BLOCK:
        entries = getattr(config, name, None)
        if entries is not None:
            setattr(config, name, [entries[slot["home"]] for slot in slots])
    whole = getattr(config, "max_window_layers", None)
    if whole is not None:
        config.max_window_layers = sum(slot["home"] < whole for slot in slots)
    if getattr(config, "full_attn_idxs", None) is not None:  # LFM2 says its list so too
        config.full_attn_idxs = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if (
        getattr(config, "mlp_only_layers", None) is not None
    ):  # Qwen's blocks without experts, listed and counted off
        step, listed = config.decoder_sparse_step, config.mlp_only_layers
        plain = [slot["home"] in listed or (slot["home"] + 1) % step != 0 for slot in slots]
        config.mlp_only_layers = [position for position, is_plain in enumerate(plain) if is_plain]
        config.decoder_sparse_step = 1
    config.num_hidden_layers = len(slots)
    if any(slot["attention"] is None for slot in slots):
        config.kv_sharing_modes = ["reuse" if slot["attention"] is None else None for slot in slots]


def assemble(model: "PreTrainedModel") -> None:
    """Turn a stock model with one whole block per position into the folded model that its config describes, in place.

    Raises:
        ValueError: the config has no `fold`, or one of another schema; or this transformers cannot cache it.
    """
    from transformers import cache_utils

    config: Any = model.config
    fold = config.fold
    if not fold or fold.get("schema") != FOLD_SCHEMA:
        raise ValueError(
            f"a folded model needs config.fold of schema {FOLD_SCHEMA}, got {fold and fold.get('schema')!r}. "
            "Load it with the version of foldsearch that wrote it."
        )
    family = family_of(config)
    blocks, slots = decoder_blocks(model), fold["slots"]
    if any(slot["attention"] is None for slot in slots) and not hasattr(cache_utils, "DummyLayer"):
        raise ValueError(
            "a position without attention needs a KV cache that can skip it, which this version of transformers does "
            "not have: decoding would be wrong. Use transformers 5.23 or later."
        )
    for block, slot in zip(blocks, slots, strict=True):
        if "replaced" in slot and slot["mlp"] is None:  # a network reads the stream itself
            for path in family.shared_norms:
                block.set_submodule(path, nn.Identity())
    # One unit after the other: a position may own its attention and borrow its MLP.
    for unit_name in ("attention", "mlp"):
        owners: dict[int, nn.Module] = {}
        borrowers: list[tuple[nn.Module, dict[str, Any]]] = []
        seen: set[int] = set()  # to tell a repeat, which borrows from the first occurrence of its block
        for block, slot in zip(blocks, slots, strict=True):
            home, source = slot["home"], slot[unit_name]
            unit = dict(family.units_of(block))[unit_name]
            if source is None:  # what replaces a run of blocks stands in the place of the MLP
                _remove(block, unit, _absent(unit) if unit_name == "attention" else _in_place(slot, config))
            elif source == home and home not in seen:
                owners[home] = block
            else:
                borrowers.append((block, slot))  # bound below, when all owners are known: one may stand later
            seen.add(home)
        for block, slot in borrowers:
            unit = dict(family.units_of(block))[unit_name]
            _borrow(block, owners[slot[unit_name]], unit, slot["rank"])
            if slot["norm"]:
                holder, name = _holder(block, unit.output)
                setattr(holder, name, OutputNorm(getattr(holder, name), config.hidden_size))
    if getattr(
        config, "scale_attn_by_inverse_layer_idx", False
    ):  # GPT-2: a scale that goes by block, not by position
        for block, slot in zip(blocks, slots, strict=True):
            attention: Any = block.get_submodule(family.attention.modules[0])
            if not isinstance(attention, AbsentAttention):
                scale = attention.head_dim**-0.5 if config.scale_attn_weights else 1.0
                attention.scaling = scale / float(slot["home"] + 1)


def linears(block: nn.Module, unit: Unit) -> list[str]:
    """Names of a unit's linears, relative to its block: what can be borrowed, and what adapters sit on."""
    from transformers.pytorch_utils import Conv1D

    return [
        name
        for path in unit.modules
        for name, module in block.get_submodule(path).named_modules(prefix=path)
        if isinstance(module, (nn.Linear, Conv1D, Borrowed))
    ]


def _borrow(block: nn.Module, owner: nn.Module, unit: Unit, rank: int) -> None:
    for path in linears(owner, unit):
        holder, name = _holder(block, path)
        weight = getattr(holder, name).weight
        outputs, inputs = weight.shape if isinstance(getattr(holder, name), nn.Linear) else weight.shape[::-1]
        setattr(holder, name, Borrowed(*_holder(owner, path), inputs, outputs, rank))


def _absent(unit: Unit) -> nn.Module:
    return AbsentMLP() if unit.gives_one else AbsentAttention()


def _in_place(slot: dict[str, Any], config: Any) -> nn.Module:
    """What stands where the slot has no MLP: the replacement of a run of blocks, or nothing."""
    replaced = slot.get("replaced")
    if replaced is None:
        return AbsentMLP()
    network = NETWORKS[replaced["kind"]](config.hidden_size, replaced["hidden"])
    network.divisor = residual_multiplier(config)
    return network


def _remove(block: nn.Module, unit: Unit, absent: nn.Module) -> None:
    for path in (*unit.modules[:-1], *unit.norms, *unit.between):
        block.set_submodule(path, nn.Identity())
    block.set_submodule(unit.modules[-1], absent)


def _holder(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, and the name there."""
    parent, _, name = path.rpartition(".")
    return block.get_submodule(parent), name
