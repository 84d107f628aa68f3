"""The types that weights are stored in, and which tensor is stored in which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foldsearch.plan.stored import Role, type_of

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

__all__ = ["kind_of", "packed", "rounded"]

_POSITIONS = "position_embd.weight"


def kind_of(name: str, shape: tuple[int, ...], weights: str, *, is_head: bool) -> GGMLQuantizationType:
    """In which type a tensor is stored (see `foldsearch.plan.stored`).

    Args:
        name: in the file.
        shape: in torch's order.
        weights: the type of the model, one of `foldsearch.plan.stored.TYPES`.
        is_head: whether the tensor makes the logits.
    """
    from gguf.constants import GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    role: Role = "positions" if name == _POSITIONS else "head" if is_head else "inner"
    return GGMLQuantizationType[type_of(shape[-1], weights, role).upper()]


def packed(values: Any, kind: GGMLQuantizationType) -> Any:
    """Float32 values, (..., row), as the bytes of a type."""
    from gguf.quants import quantize

    return quantize(values, kind)


def rounded(values: Any, kind: GGMLQuantizationType) -> Any:
    """What a reader gets back: float32 values of the same shape."""
    from gguf.quants import dequantize

    return dequantize(packed(values, kind), kind).reshape(values.shape)
