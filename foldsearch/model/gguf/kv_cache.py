"""What llama.cpp does to keys and values that its cache holds in few bits: it rounds them, mostly turned first.

A head's numbers are rounded in blocks of 32 with a scale in common, as weights are; keys in the order that the file's
weights give them. Where a head has a multiple of 64 numbers they are multiplied by a Hadamard matrix before, and back
after: a rotation, which changes no product of a key and a query, and spreads what is large in one of its numbers over
all of them. Beside a cache of few bits llama.cpp also rounds queries, to 8 bits: that is left out here. Source:
llama.cpp's `llama_kv_cache`; the tests hold it against llama.cpp itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from foldsearch.errors import ModelError
from foldsearch.model.blocks import decoder_blocks, family_of
from foldsearch.model.gguf.config import describe
from foldsearch.model.gguf.types import rounded
from foldsearch.plan.stored import TYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KEYS = "model.layers.{}.self_attn.k_proj"
TURNED = 64  # numbers of a head that are turned together, at least
_ARGUMENTS = ("past_key_values", "layer_past")  # by which an attention is given its cache


def check_kv_cache(config: PretrainedConfig, kv_cache: str) -> None:
    """Whether llama.cpp can hold keys and values of a model in a type.

    Raises:
        ModelError: a head's numbers are not whole blocks of the type.
    """
    size, block = _head_size(config), TYPES[kv_cache].block
    if size % block:
        raise ModelError(
            f"a KV cache in {kv_cache} stores the numbers of a head in blocks of {block}; a head of this model has "
            f"{size}. Leave target.kv_cache out (--kv-cache), or take f16."
        )


def round_kv_cache(model: PreTrainedModel, kv_cache: str) -> list[Any]:
    """Let a stock model in float32 read keys and values as a cache of a type holds them, with a cache or without.

    Returns:
        What undoes it: each has a `remove`. Nothing where the type has 16 bits or more, which change next to nothing.

    Raises:
        ModelError: as `check_kv_cache`.
    """
    if TYPES[kv_cache].block == 1:
        return []
    check_kv_cache(model.config, kv_cache)
    family, order = family_of(model.config), key_order(model.config)

    def give_cache(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        name = next(name for name in _ARGUMENTS if name in named)
        return given, {**named, name: _Rounding(named[name], kv_cache, order)}

    return [
        block.get_submodule(family.attention_of(block).modules[0]).register_forward_pre_hook(
            give_cache, with_kwargs=True
        )
        for block in decoder_blocks(model)
    ]


@contextmanager
def rounded_kv_cache(model: PreTrainedModel, kv_cache: str) -> Iterator[None]:
    """The same until the end of the block; nothing where no type is given."""
    handles = round_kv_cache(model, kv_cache) if kv_cache else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rounding:
    """Stands before the cache of an attention, and rounds what goes into it; also where there is none."""

    def __init__(self, inner: Any, kv_cache: str, order: Tensor) -> None:
        self._inner, self._type, self._order = inner, kv_cache, order

    def update(self, keys_BHTD: Tensor, values_BHTD: Tensor, *more: Any, **named: Any) -> Any:
        """What attention reads: all keys and values so far."""
        turned = turned_in(keys_BHTD.shape[-1])
        held = as_cached(keys_BHTD[..., self._order], self._type, turned)
        keys_BHTD = torch.empty_like(held)
        keys_BHTD[..., self._order] = held
        values_BHTD = as_cached(values_BHTD, self._type, TURNED)
        if self._inner is None:
            return keys_BHTD, values_BHTD
        return self._inner.update(keys_BHTD, values_BHTD, *more, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def as_cached(numbers_BHTD: Tensor, kv_cache: str, turned: int) -> Tensor:
    """Keys or values as they are after rounding; turned: so many numbers are turned together."""
    from gguf.constants import GGMLQuantizationType

    size = numbers_BHTD.shape[-1]
    kind: Any = GGMLQuantizationType[kv_cache.upper()]
    held = numbers_BHTD.detach().to("cpu", torch.float32)

    def turn(values_BHTD: Tensor) -> Tensor:
        if size % TURNED:
            return values_BHTD
        return torch.matmul(values_BHTD.unflatten(-1, (-1, turned)), _hadamard(turned)).flatten(-2)

    found = turn(torch.from_numpy(rounded(turn(held).contiguous().numpy(), kind)))
    return found.to(numbers_BHTD)


def key_order(config: PretrainedConfig) -> Tensor:
    """Which of transformers' numbers of a key are next to each other in llama.cpp."""
    size = _head_size(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    rename = describe(config).names.get(KEYS)
    if rename is None or rename.change is None:
        return torch.arange(size)
    order = rename.change.make(numpy.arange(heads * size), config)[:size]
    return torch.tensor(order.tolist())


def turned_in(size: int) -> int:
    """Numbers of a key that are turned together: as many as a power of two allows."""
    turned = TURNED
    while size % (2 * turned) == 0:
        turned *= 2
    return turned


@cache
def _hadamard(size: int) -> Tensor:
    """Symmetric, and its own inverse."""
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    return found.mul(size**-0.5)


def _head_size(config: PretrainedConfig) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)
