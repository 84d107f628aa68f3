"""Write a model of transformers as a GGUF file, by llama.cpp's own package, tensor after tensor."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from foldsearch.model.gguf.config import Description, describe
from foldsearch.model.gguf.file import MetadataValue
from foldsearch.model.gguf.names import Change
from foldsearch.model.gguf.types import kind_of, packed, rounded
from foldsearch.plan.stored import TYPES

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["as_stored", "rounded_matrix", "write_gguf"]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A parameter on its way to a file: its name here and there, its type there, and how its values are changed."""

    ours: str
    theirs: str
    kind: GGMLQuantizationType
    change: Change | None
    config: PretrainedConfig

    def made(self, values: Any) -> Any:
        """From the values here to those of the file."""
        return values if self.change is None else self.change.make(values, self.config)

    def undone(self, values: Any) -> Any:
        """The other way."""
        return values if self.change is None else self.change.undo(values, self.config)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    weights: str,
    tokenizer: dict[str, MetadataValue],
    general: dict[str, str],
) -> None:
    """Write a model that llama.cpp runs (see `describe`).

    Args:
        path: of the file.
        model: of a stock class.
        weights: the type of its matrices, a key of `TYPES`; those that hold it already are not changed by it.
        tokenizer: what the file says of it, by key; empty where it holds none.
        general: texts by key, such as "general.name".

    Raises:
        ModelError: llama.cpp runs no such model.
    """
    import gguf

    description = describe(model.config)
    writer = gguf.GGUFWriter(path, description.architecture)
    for key, text in general.items():
        writer.add_string(key, text)
    writer.add_file_type(TYPES[weights].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in description.keys.items():
        _add(writer, f"{description.architecture}.{key}", value)
    if not tokenizer:
        writer.add_tokenizer_model("none")  # llama.cpp wants to be told
    for key, (value, kind, inner) in tokenizer.items():
        writer.add_key_value(
            key, value, gguf.GGUFValueType(kind), None if inner is None else gguf.GGUFValueType(inner)
        )
    stored = list(_stored(model, description, weights))
    parameters = model.state_dict()
    for one in stored:
        shape = tuple(one.made(parameters[one.ours].to("meta")).shape)
        bytes_of_rows = gguf.quant_shape_to_byte_shape(shape, one.kind)
        writer.add_tensor_info(
            one.theirs, bytes_of_rows, numpy.dtype(numpy.uint8), math.prod(bytes_of_rows), raw_dtype=one.kind
        )
    for name, values in description.tensors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in stored:
        values = one.made(_numbers(parameters[one.ours]))
        writer.write_tensor_data(packed(numpy.ascontiguousarray(values), one.kind))
    for values in description.tensors.values():
        writer.write_tensor_data(values)
    writer.close()


@torch.no_grad()
def as_stored(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """A copy in float32 with the numbers that a file of this type holds; arguments as for `write_gguf`."""
    twin: Any = copy.deepcopy(model).float().eval()
    description = describe(model.config)
    parameters = dict(twin.named_parameters())
    for one in _stored(model, description, weights):
        values = one.made(_numbers(parameters[one.ours]))
        back = one.undone(rounded(numpy.ascontiguousarray(values), one.kind))
        parameters[one.ours].data = torch.from_numpy(numpy.ascontiguousarray(back))
    twin.config.dtype = torch.float32
    held: PreTrainedModel = twin.requires_grad_(False)
    return held


def rounded_matrix(weight_OI: Tensor, weights: str) -> Tensor:
    """What a file whose weights are of this type holds of a matrix inside the blocks; both float32."""
    kind = kind_of("", tuple(weight_OI.shape), weights, is_head=False)
    return torch.from_numpy(rounded(weight_OI.numpy(), kind))


def _stored(model: PreTrainedModel, description: Description, weights: str) -> Iterator[_Stored]:
    """Every parameter of the file, in the order of the model; tied ones once."""
    config: Any = model.config
    tied = set(model.all_tied_weights_keys)
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    for ours, parameter in model.state_dict().items():
        if ours in tied:
            continue
        stem, kind = ours.rsplit(".", 1)
        block = re.search(r"\.(\d+)\.", stem)
        rename = description.names[stem if block is None else stem.replace(block[0], ".{}.", 1)]
        theirs = f"{rename.name.format(block[1] if block else '')}.{kind}"
        shape = (
            parameter.shape
            if rename.change is None
            else rename.change.make(parameter.to("meta"), config).shape
        )
        stored_as = kind_of(theirs, tuple(shape), weights, is_head=theirs == head)
        yield _Stored(ours, theirs, stored_as, rename.change, config)


def _numbers(parameter: Tensor) -> Any:
    return parameter.detach().to("cpu", torch.float32).numpy()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
