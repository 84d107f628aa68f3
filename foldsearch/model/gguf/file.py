"""The header of a GGUF file: metadata and the table of tensors, checked before anything is believed.

The numbers in a header are not trusted: every count and size is compared with the bytes that are really there before
memory is taken for it. A model in several files (name-00001-of-00003.gguf) is read as one.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from foldsearch.errors import ModelError

__all__ = ["GgufFile", "MetadataValue", "TensorEntry", "model_parts", "part_names", "read_gguf"]

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # of a tensor, as in llama.cpp
MetadataValue = tuple[Any, int, int | None]  # the value, its type, and the type of what an array holds
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: its name in the file, such as "blk.0.attn_q.weight".
        shape: in torch's order (the slowest dimension first).
        kind: the number of its storage type, such as 8 for Q8_0.
        path: the file that holds it.
        start: of its first byte, from the beginning of that file.
        num_bytes: how many bytes it takes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    path: Path
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the header (or the headers of all parts) says: metadata by key, tensors by name.

    kinds: of the metadata: the number of a value's type and, of an array, that of what it holds.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorEntry]
    kinds: dict[str, tuple[int, int | None]] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Such as "llama": the prefix of the keys that describe the model."""
        return str(self.metadata["general.architecture"])

    @property
    def tokenizer(self) -> dict[str, MetadataValue]:
        """All that it says of its tokenizer, as it says it."""
        return {
            key: (value, *self.kinds[key])
            for key, value in self.metadata.items()
            if key.startswith("tokenizer.")
        }


def part_names(name: str) -> tuple[str, ...]:
    """The names of all parts of the model that a file with this name is a part of, in order."""
    match = _PART.fullmatch(name)
    if match is None or int(match["count"]) < 2:
        return (name,)
    count = int(match["count"])
    return tuple(f"{match['stem']}-{number + 1:05}-of-{count:05}.gguf" for number in range(count))


def model_parts(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` is a part of, in order; (path,) if it is whole.

    Raises:
        ModelError: a part is missing beside it.
    """
    names = part_names(path.name)
    if len(names) == 1:
        return (path,)
    parts = tuple(path.with_name(name) for name in names)
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(
            f"{path}: this is one of {len(parts)} parts of a model, and all must lie in one folder; "
            f"missing {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Put the missing parts beside it."
        )
    return parts


def read_gguf(paths: tuple[Path, ...]) -> GgufFile:
    """Read the headers of a model's files; no tensor is read.

    Raises:
        ModelError: a file is no GGUF, damaged, truncated, of another byte order, of a version that is not known, no
            language model, or one part of several.
    """
    metadata: dict[str, Any] = {}
    kinds: dict[str, tuple[int, int | None]] = {}
    tensors: dict[str, TensorEntry] = {}
    for number, path in enumerate(paths):
        try:
            header = _Header(path)
            found, entries = header.read()
        except OSError as error:
            raise ModelError(f"{path}: the GGUF file cannot be read: {error.strerror or error}.") from error
        _check_part(path, found, number, len(paths))
        if number == 0:
            metadata, kinds = found, header.kinds
            _check_kind(path, metadata)
        for entry in entries:
            if entry.name in tensors:
                raise ModelError(
                    f"{path}: the GGUF file cannot be read: it holds the tensor {entry.name} twice."
                )
            tensors[entry.name] = entry
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ModelError(
            f"{paths[0]}: its parts must hold {total} tensors together; got {len(tensors)}. A part is damaged or of "
            "another model: fetch them again."
        )
    return GgufFile(paths[0], metadata, tensors, kinds)


def _check_part(path: Path, metadata: dict[str, Any], number: int, count: int) -> None:
    said_count, said_number = metadata.get("split.count", 1) or 1, metadata.get("split.no", 0)
    if not isinstance(said_count, int) or not isinstance(said_number, int):
        raise ModelError(f"{path}: split.count and split.no must be whole numbers. Fetch the file again.")
    if said_count != count:
        raise ModelError(
            f"{path}: it says that it is part {said_number + 1} of {said_count}, but {count} "
            f"{'file was' if count == 1 else 'files were'} found by name. Parts must be called "
            f"NAME-00001-of-{said_count:05}.gguf and so on, and lie in one folder; give one of them."
        )
    if said_number != number:
        raise ModelError(
            f"{path}: by its name it is part {number + 1} of {count}, but it says that it is part "
            f"{said_number + 1}. A file was renamed: fetch the parts again."
        )


def _check_kind(path: Path, metadata: dict[str, Any]) -> None:
    kind = metadata.get("general.type", "model")
    if kind == "adapter":
        raise ModelError(
            f"{path}: this is a LoRA adapter, not a model. Merge it into its base model "
            "(llama-export-lora), and give the merged file."
        )
    if kind == "mmproj" or metadata.get("general.architecture") == "clip":
        raise ModelError(
            f"{path}: this is the vision or audio part of a model (mmproj), not a language model. Give the file of the "
            "language model that lies beside it."
        )
    if kind != "model":
        raise ModelError(f"{path}: its general.type must be 'model'; got {kind!r}. Give the file of a model.")
    if not isinstance(metadata.get("general.architecture"), str):
        raise ModelError(
            f"{path}: the GGUF file cannot be read: it does not say what it is (general.architecture)."
        )


class _Header:
    """A reader of one file's header, that never goes beyond the file's end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.kinds: dict[str, tuple[int, int | None]] = {}

    def read(self) -> tuple[dict[str, Any], list[TensorEntry]]:
        with self.path.open("rb") as file:
            start = file.read(24)
            if start[:4] != b"GGUF":
                self.fail("it does not begin with the letters GGUF, so it is no GGUF file")
            if len(start) < 24:
                self.fail("it is truncated")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                self.view = view
                self.size = len(view)
                return self._read_mapped()

    def _read_mapped(self) -> tuple[dict[str, Any], list[TensorEntry]]:
        self.position = 4
        (version,) = self.unpack("I")
        if version not in (2, 3):
            # a version number whose low half is empty was written the other way round
            if version & 0xFFFF == 0:
                self.fail("it was written for processors of the other byte order (big-endian)", fetch=False)
            self.fail(f"its version must be 2 or 3; got {version}", fetch=False)
        num_tensors, num_keys = self.unpack("QQ")
        self.check_count("tensors", num_tensors, least_bytes=24)
        self.check_count("metadata keys", num_keys, least_bytes=13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                self.fail(f"it holds the key {key} twice")
            metadata[key], kind, inner = self.value()
            self.kinds[key] = (kind, inner)
        table = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            self.fail(f"its general.alignment must be a multiple of 8; got {alignment!r}")
        data_start = -(-self.position // alignment) * alignment
        return metadata, [self._place(*entry, data_start, alignment) for entry in table]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (num_dimensions,) = self.unpack("I")
        if num_dimensions > _MAX_DIMENSIONS:
            self.fail(
                f"the tensor {name} has {num_dimensions} dimensions, and at most {_MAX_DIMENSIONS} are possible"
            )
        dimensions = self.unpack("Q" * num_dimensions)
        kind, offset = self.unpack("IQ")
        return name, tuple(reversed(dimensions)), kind, offset

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int, alignment: int
    ) -> TensorEntry:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in set(GGMLQuantizationType):
            self.fail(
                f"the tensor {name} is of the storage type {kind}, which the package gguf does not know"
            )
        values_a_block, bytes_a_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        row = shape[-1] if shape else 1
        if row % values_a_block:
            self.fail(f"the rows of the tensor {name} have {row} values, no multiple of {values_a_block}")
        num_bytes = prod(shape) // values_a_block * bytes_a_block
        if offset % alignment:
            self.fail(f"the tensor {name} does not begin at a multiple of {alignment} bytes")
        if data_start + offset + num_bytes > self.size:
            self.fail(
                f"it is truncated: the tensor {name} ends at byte {data_start + offset + num_bytes:,}, "
                f"but the file has {self.size:,}"
            )
        return TensorEntry(name, shape, kind, self.path, data_start + offset, num_bytes)

    def value(self) -> MetadataValue:
        (kind,) = self.unpack("I")
        if kind == _STRING:
            return self.string(), kind, None
        if kind == _ARRAY:
            values, inner = self.array()
            return values, kind, inner
        if kind not in _SCALARS:
            self.fail(f"its metadata holds a value of type {kind}, which no version of the format has")
        return self.unpack(_SCALARS[kind])[0], kind, None

    def array(self) -> tuple[list[Any], int]:
        kind, count = self.unpack("IQ")
        if kind == _STRING:
            self.check_count("strings in an array", count, least_bytes=8)
            return [self.string() for _ in range(count)], kind
        if kind not in _SCALARS:
            self.fail(f"its metadata holds an array of type {kind}, which foldsearch does not read")
        self.check_count("values in an array", count, least_bytes=struct.calcsize("<" + _SCALARS[kind]))
        return list(self.unpack(f"{count}{_SCALARS[kind]}")), kind

    def string(self) -> str:
        (length,) = self.unpack("Q")
        self.check_count("bytes in a text", length, least_bytes=1)
        start, self.position = self.position, self.position + length
        try:
            return self.view[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"a text at byte {start:,} is not UTF-8")

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        size = struct.calcsize(layout)
        if self.position + size > self.size:
            self.fail("it is truncated: it ends inside its header")
        values = struct.unpack_from(layout, self.view, self.position)
        self.position += size
        return values

    def check_count(self, what: str, count: int, *, least_bytes: int) -> None:
        left = self.size - self.position
        if count * least_bytes > left:
            self.fail(f"its header speaks of {count:,} {what}, but only {left:,} bytes follow")

    def fail(self, why: str, *, fetch: bool = True) -> NoReturn:
        remedy = "The file is damaged or incomplete: fetch it again." if fetch else "Give another file."
        raise ModelError(f"{self.path}: the GGUF file cannot be read: {why}. {remedy}")
