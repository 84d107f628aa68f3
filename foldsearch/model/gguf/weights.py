"""The tensors of a GGUF file under transformers' names, de-quantised."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch

from foldsearch.errors import ModelError
from foldsearch.model.gguf.file import GgufFile
from foldsearch.model.gguf.names import Rename

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["TensorReader", "read_weights"]

_ROWS_AT_ONCE = 1 << 22  # values; de-quantising takes several times its result for a moment


class TensorReader:
    """Reads tensors, and remembers which ones."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def read(self, name: str) -> Any:
        """A tensor's values in float32, in torch's order of dimensions."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        entry = self.file.tensors[name]
        kind = GGMLQuantizationType(entry.kind)
        self.used.add(name)
        packed = numpy.memmap(entry.path, numpy.uint8, "r", entry.start, (entry.num_bytes,))
        num_rows = max(1, entry.num_bytes and int(numpy.prod(entry.shape[:-1], dtype=numpy.int64)))
        rows = packed.reshape(num_rows, -1)
        values = numpy.empty(entry.shape, numpy.float32)
        flat = values.reshape(num_rows, -1)
        step = max(1, _ROWS_AT_ONCE // max(1, flat.shape[1]))
        try:
            for start in range(0, num_rows, step):
                flat[start : start + step] = dequantize(rows[start : start + step], kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.file.path}: the tensor {name} is stored as {kind.name}, which cannot be turned into plain "
                "numbers here. Give a file of another quantisation."
            ) from error
        return values

    def find(self, name: str, config: PretrainedConfig) -> Any:
        """The values of a tensor, put together from or cut out of the tensors of the file; None if it has none.

        Converters may store the three projections of an attention as one tensor, or one as three.
        """
        if name in self:
            return self.read(name)
        match = re.fullmatch(r"(?P<block>.*\.attn_)(?P<which>q|k|v|qkv)\.(?P<kind>weight|bias)", name)
        if match is None:
            return None
        if match["which"] == "qkv":
            parts = [f"{match['block']}{which}.{match['kind']}" for which in "qkv"]
            if not all(part in self for part in parts):
                return None
            return numpy.concatenate([self.read(part) for part in parts])
        whole = f"{match['block']}qkv.{match['kind']}"
        if whole not in self:
            return None
        num_heads, num_kv = config.num_attention_heads, config.num_key_value_heads
        values = self.read(whole)
        head = values.shape[0] // (num_heads + 2 * num_kv)
        starts = {"q": 0, "k": num_heads * head, "v": (num_heads + num_kv) * head}
        length = (num_heads if match["which"] == "q" else num_kv) * head
        return values[starts[match["which"]] : starts[match["which"]] + length]


def read_weights(
    tensors: TensorReader,
    config: PretrainedConfig,
    names: Mapping[str, Rename],
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, torch.Tensor]:
    """All parameters of the model, tied ones once.

    Args:
        tensors: of the file.
        config: of the model that they fill.
        names: by the parameter's name without ".weight" or ".bias", with "{}" for the block.
        dtype: of the parameters.
        say: told what takes time.

    Raises:
        ModelError: a parameter has no tensor, or one of another shape; or a tensor is no part of the model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # names and shapes only
        model: Any = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    expected = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    found: dict[str, torch.Tensor] = {}
    for index, (name, shape) in enumerate(expected.items()):
        if index % 64 == 0:
            say(f"reading the GGUF file: {index} of {len(expected)} tensors")
        stem, kind = name.rsplit(".", 1)
        block = re.search(r"\.(\d+)\.", stem)
        rename = names[stem if block is None else stem.replace(block[0], ".{}.", 1)]
        theirs = f"{rename.name.format(block[1] if block else '')}.{kind}"
        values = tensors.find(theirs, config)
        if values is None and kind == "bias":
            values = numpy.zeros(shape, numpy.float32)  # a linear without a bias, in a family that has one
        if values is None:
            raise ModelError(
                f"{tensors.file.path}: the tensor {theirs} is missing. The file is damaged or incomplete: "
                "fetch it again."
            )
        if rename.change is not None:
            values = rename.change.undo(values, config)
        if values.shape != shape:
            raise ModelError(
                f"{tensors.file.path}: the tensor {theirs} must have the shape {tuple(shape)} by the file's metadata; "
                f"got {values.shape}. The file is damaged: fetch it again."
            )
        found[name] = torch.from_numpy(numpy.ascontiguousarray(values)).to(dtype)
    left = sorted(set(tensors.file.tensors) - tensors.used)
    if left:
        some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise ModelError(
            f"{tensors.file.path}: {some} would be left out: no part of a {tensors.file.architecture} model as "
            "foldsearch knows it. Give the folder of transformers that the file was converted from, or another file."
        )
    return found
