"""How a GGUF file stores weights: the types of llama.cpp, which tensor is of which, and the bytes that it takes.

A type stores blocks of neighbours of a row, which have a scale in common. As in llama.cpp: vectors (norms, biases) and
learned positions stay in 32 bits; a row that does not fill whole blocks stays in 16; the matrix of the logits is finer
than 5 bits. Source: ggml's block structs; the tests hold the bytes against the package gguf.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

__all__ = [
    "AS_TARGET",
    "CACHE_TYPES",
    "DTYPE_TYPES",
    "TYPES",
    "Matrix",
    "Role",
    "StoredType",
    "StoredTypes",
    "cache_bytes",
    "every_types",
    "type_of",
    "widest_first",
]

Role = Literal["inner", "table", "head", "positions"]
_FINE = "q8_0"  # of the matrix of the logits, where the others have 4 or 5 bits
_COARSE = ("q5_1", "q5_0", "q4_1", "q4_0", "mxfp4")
VECTOR_BYTES = 4  # a number of a norm or a bias


@dataclass(frozen=True, slots=True)
class StoredType:
    """One type. block: numbers that have a scale in common. block_bytes: that they take, scale included.

    file_type: the number of `general.file_type` in a file.
    """

    block: int
    block_bytes: int
    file_type: int

    @property
    def bits(self) -> float:
        """A weight's, its share of the scale included."""
        return 8 * self.block_bytes / self.block


# What the package gguf can write, by the name that llama.cpp's tools have in lower case, the widest first.
TYPES = {
    "f32": StoredType(1, 4, 0),
    "f16": StoredType(1, 2, 1),
    "bf16": StoredType(1, 2, 32),
    "q8_0": StoredType(32, 34, 7),
    "q5_1": StoredType(32, 24, 9),
    "q5_0": StoredType(32, 22, 8),
    "q4_1": StoredType(32, 20, 3),
    "q4_0": StoredType(32, 18, 2),
    "mxfp4": StoredType(32, 17, 38),
}
DTYPE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CACHE_TYPES = tuple(name for name in TYPES if name != "mxfp4")  # what llama.cpp stores keys and values in


@dataclass(frozen=True, slots=True)
class StoredTypes:
    """The types in which a model is stored: its weights, and the keys and values of its cache.

    An empty one is the target's. As text: in words, empty where both are.
    """

    weights: str = ""
    kv_cache: str = ""

    def __str__(self) -> str:
        cached = f"a KV cache in {self.kv_cache}" if self.kv_cache else ""
        return " and ".join(filter(None, (self.weights, cached)))

    @property
    def label(self) -> str:
        """The same for the rows of a table and the marks of a picture: "q4_0, KV q8_0"."""
        return ", ".join(filter(None, (self.weights, f"KV {self.kv_cache}" if self.kv_cache else "")))


AS_TARGET = StoredTypes()


def every_types(weights: Sequence[str], kv_cache: Sequence[str]) -> list[StoredTypes]:
    """All pairs of one of each; where one of the two lists is empty, the target's."""
    return [StoredTypes(*pair) for pair in product(weights or ("",), kv_cache or ("",))]


def widest_first(types: Iterable[StoredTypes]) -> list[StoredTypes]:
    """By the coarser one of the two, which is where the loss comes from; then by the other one."""

    def width(each: StoredTypes) -> list[float]:
        return sorted(TYPES[name].bits if name else float("inf") for name in (each.weights, each.kv_cache))

    return sorted(types, key=width, reverse=True)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of a model, as a file stores it.

    rows, length: its numbers; a row's are those that make one output. role: "table" looks tokens up, "head" makes the
    logits (also where it is the table too), "positions" are learned ones.
    """

    rows: int
    length: int
    role: Role = "inner"

    @property
    def numbers(self) -> int:
        """How many."""
        return self.rows * self.length

    def stored_bytes(self, weights: str) -> int:
        """In a file whose weights are of this type."""
        stored = TYPES[type_of(self.length, weights, self.role)]
        return self.numbers // stored.block * stored.block_bytes


def type_of(length: int, weights: str, role: Role = "inner") -> str:
    """In which type a matrix is stored.

    Args:
        length: of its rows.
        weights: the type of the model, a key of `TYPES`.
        role: of the matrix.
    """
    if role == "positions":
        return "f32"
    if role == "head" and weights in _COARSE:
        weights = _FINE
    return "f16" if length % TYPES[weights].block else weights


def cache_bytes(numbers: int, kind: str) -> int:
    """Of keys and values that a cache of this type holds, in whole blocks."""
    stored = TYPES[kind]
    return -(-numbers // stored.block) * stored.block_bytes
