"""What llama.cpp does to what goes into a product beside weights of few bits: it rounds it to 8 bits.

In blocks of 32 numbers with a scale in common, of which it knows two (ggml's `vec_dot_type`: q8_0, and q8_1 where the
weights have an offset); both round alike. Beside matrices that it stores in 16 bits it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foldsearch.model.gguf.types import rounded
from foldsearch.plan.stored import TYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = "q8_0"  # the type that inputs are rounded to
ROUNDING = tuple(name for name, stored in TYPES.items() if stored.block > 1)  # types that it does so beside


@contextmanager
def rounded_inputs(model: PreTrainedModel) -> Iterator[None]:
    """Let a model in float32 round what goes into each of its products, as llama.cpp does, until the end of the block.

    Attention's own products are left alone: these have a cache of 16 bits.
    """

    def round_input(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (in_eight_bits(given[0]), *given[1:])

    handles = [
        part.register_forward_pre_hook(round_input)
        for part in model.modules()
        if isinstance(part, nn.Linear | Conv1D)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_eight_bits(values: Tensor) -> Tensor:
    """Float32 values as they are after rounding; those whose rows are not whole blocks are left alone."""
    from gguf.constants import GGMLQuantizationType

    if values.shape[-1] % TYPES[INPUTS].block:
        return values
    kind: Any = GGMLQuantizationType[INPUTS.upper()]
    return torch.from_numpy(rounded(values.detach().contiguous().numpy(), kind))
