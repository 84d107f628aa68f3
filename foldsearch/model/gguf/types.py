"""The types that weights are stored in, and which tensor is stored in which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

__all__ = ["DTYPE_TYPES", "TYPES", "packed", "rounded", "type_of"]

# What the package gguf can write, by the name that llama.cpp's tools have in lower case. The number is that of
# `general.file_type`.
TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
DTYPE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_FINE = "q8_0"  # of the matrix that makes the logits, where the others have 4 or 5 bits
_ALWAYS_F32 = ("position_embd.weight",)


def type_of(name: str, shape: tuple[int, ...], weights: str, *, is_head: bool) -> GGMLQuantizationType:
    """In which type a tensor is stored.

    As in llama.cpp: norms and biases stay in 32 bits; rows that do not fill whole blocks of a type stay in 16 bits; the
    matrix of the logits is finer than 5 bits.

    Args:
        name: in the file.
        shape: in torch's order.
        weights: the type of the model, a key of `TYPES`.
        is_head: whether the tensor makes the logits.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2 or name in _ALWAYS_F32:
        return GGMLQuantizationType.F32
    if is_head and weights.startswith(("q4", "q5")):
        weights = _FINE
    kind = GGMLQuantizationType[weights.upper()]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def packed(values: Any, kind: GGMLQuantizationType) -> Any:
    """Float32 values, (..., row), as the bytes of a type."""
    from gguf.quants import quantize

    return quantize(values, kind)


def rounded(values: Any, kind: GGMLQuantizationType) -> Any:
    """What a reader gets back: float32 values of the same shape."""
    from gguf.quants import dequantize

    return dequantize(packed(values, kind), kind).reshape(values.shape)
