"""Tensors that a trial keeps on disk, with a sum over them, so that a damaged file is told from a whole one.

A killed process leaves files whole or absent (`foldsearch.files`); a machine that loses its power or a failing disk
may not. The sum is a CRC-32: it finds damage, and does not protect from people.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldsearch.errors import RunError, quote_error
from foldsearch.files import replace_atomically
from foldsearch.paths import printable

WORDS = "foldsearch"  # the name of our metadata
_EARLIER = {"tokens", "found"}  # names in the metadata of earlier versions, which kept no sum


class DamagedFileError(RunError):
    """A file that was kept cannot be read, or is not as it was written."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
    """Keep tensors by name, and words by name: whole or not at all."""
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    told = {"words": dict(words), "tensors": _sum(kept), "sum": _sum_of_words(words)}
    # One entry: safetensors writes several in any order, and the same state is to be the same file.
    metadata = {WORDS: json.dumps(told, sort_keys=True)}
    replace_atomically(path, partial(save_file, kept, metadata=metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that `write_tensors` kept, on the CPU.

    Raises:
        DamagedFileError: the file is damaged.
    """
    known = _read_metadata(path).get("tensors")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except _CANNOT_BE_READ as error:
        raise _damaged(path, error) from error
    if known is not None and known != (found := _sum(tensors)):  # earlier versions kept none
        raise _damaged(path, ValueError(f"its tensors have the sum {found}, and had {known}"))
    return tensors


def read_words(path: Path) -> dict[str, str]:
    """The words that `write_tensors` kept beside the tensors, which are not read.

    Raises:
        DamagedFileError: the file is damaged.
    """
    words: dict[str, str] = _read_metadata(path)["words"]
    return words


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        if WORDS not in metadata and metadata.keys() <= _EARLIER:
            return {"words": metadata}
        told = json.loads(metadata[WORDS])
        if told["sum"] != _sum_of_words(told["words"]):
            raise ValueError("its metadata are not as they were written")
    except _CANNOT_BE_READ as error:
        raise _damaged(path, error) from error
    return dict(told)


_REMEDY = "Put back a copy of it, or let `foldsearch check RUN --repair` say what can be done."


_CANNOT_BE_READ = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _damaged(path: Path, error: Exception) -> DamagedFileError:
    return DamagedFileError(quote_error(f"'{printable(path)}' cannot be read", error, _REMEDY))


def _sum_of_words(words: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(dict(words), sort_keys=True).encode()):08x}"


def _sum(tensors: Mapping[str, Tensor]) -> str:
    found = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), found)
        found = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
