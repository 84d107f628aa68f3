"""ONNX, for onnxruntime: the decoder with its KV cache as one graph. What several blocks share is stored once.

The exporter is that of transformers, which knows what of a model torch.onnx cannot export as it stands. It traces what
a folded model computes, so the graph holds every plan, networks in place of blocks and adapters too, and needs no code
of ours.

Shapes: B sequences, T tokens, V vocabulary; O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import InputError, ModelError, quote_error
from foldsearch.model.fold import cast
from foldsearch.runtimes import onnx_decoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from foldsearch.runtimes import Beside

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NUM_PARAMETERS = "foldsearch.num_parameters"  # of the model: the exporter folds some with constants
BITS = {"int8": 8, "int4": 4}
BLOCK = 32  # numbers of a matrix that have a scale in common
SAMPLE = (2, 12)  # sequences and tokens that the graph is traced with; both sizes stay open in it


def check_model(config: PretrainedConfig, context: int) -> tuple[str, ...]:
    """Nothing is computed in another way than transformers does.

    Raises:
        InputError: what writes and runs a graph is not installed.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"a graph is written and run by {', '.join(PACKAGES)}; not installed here: {', '.join(missing)}. Install "
            "them: pip install 'foldsearch[onnx]'."
        )
    return ()


def before_rounding(model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """The model itself; other kernels than torch's run it, which sum in another order."""
    return model, False


def rounded(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """In the dtype of that name; of 8 or 4 bits the numbers that onnxruntime has, in float32."""
    if weights not in BITS:
        return cast(model, getattr(torch, weights))
    twin = cast(model, torch.float32)
    seen: set[int] = set()
    for module in twin.modules():
        # A table of embeddings and a linear keep (O, I), what GPT-2 calls Conv1D keeps (I, O): blocks are of inputs.
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                is_turned = isinstance(module, Conv1D)
                values = parameter.data.T if is_turned else parameter.data
                stored = in_blocks(values, BITS[weights])
                parameter.data = (stored.T if is_turned else stored).contiguous()
    return twin


def in_blocks(weight_OI: Tensor, bits: int) -> Tensor:
    """A matrix as onnxruntime's quantiser leaves it, (O, I): a step for each `BLOCK` neighbours of a row.

    The largest of them in size is -2^(bits-1) steps, the others are rounded to whole ones. What is rounded so already
    stays as it is.
    """
    lowest = -(2 ** (bits - 1))
    blocks = functional.pad(weight_OI, (0, -weight_OI.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    step = largest / lowest
    whole = (blocks / step.where(step != 0, torch.ones_like(step))).round().clamp(lowest, -lowest - 1)
    rounded_OI: Tensor = (whole * step).flatten(1)[:, : weight_OI.shape[1]]
    return rounded_OI


def write(model: PreTrainedModel, folder: Path, beside: Beside) -> tuple[str, ...]:
    """The graph, its weights beside it, the tokenizer, and a file that runs it.

    Raises:
        ModelError: the exporter cannot export the model.
    """
    import onnx_ir
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_prefill_decode

    ids_BT = torch.arange(SAMPLE[0] * SAMPLE[1]).view(SAMPLE) % model.config.vocab_size
    sample = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    with _quiet(), _without_stops(model):
        try:
            # One graph that reads any number of tokens after any number of others serves prompts and decoding.
            stages: Any = decompose_prefill_decode(model, sample, multi_token_decode=True)
            step, inputs = stages["decode"]
            exported = OnnxExporter().export(step, inputs, OnnxConfig(dynamic=True))
        except (
            Exception
        ) as error:  # whatever torch.export meets in a model: it has no class of its own for that
            raise ModelError(
                quote_error(
                    f"a {type(model).__name__} cannot be exported to ONNX",
                    error,
                    "Export it to another runtime",
                )
            ) from error
    program = exported.program
    _store_once(program, with_table=beside.weights in BITS)
    if beside.weights in BITS:
        program = _quantised(program, BITS[beside.weights])
    program.metadata_props[NUM_PARAMETERS] = str(sum(one.numel() for one in model.parameters()))
    graph = onnx_decoder.GRAPH
    onnx_ir.save(program, str(folder / graph), external_data=f"{graph}.data")
    shutil.copyfile(str(onnx_decoder.__file__), folder / Path(str(onnx_decoder.__file__)).name)
    settings: Any = model.generation_config
    if settings is not None:  # it has the tokens that end a text
        settings.save_pretrained(folder)
    if beside.tokenizer is not None:
        beside.tokenizer.save_pretrained(folder)
    return ()


def _quantised(program: Any, bits: int) -> Any:
    """The graph with its matrices in so many bits, by onnxruntime's own quantiser."""
    import onnx_ir
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(
        onnx_ir.to_proto(program),
        bits=bits,
        block_size=BLOCK,
        is_symmetric=True,
        op_types_to_quantize=("MatMul", "Gather")
        if bits == 4
        else ("MatMul",),  # it has tables in 4 bits only
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    with _quiet():
        quantiser.process()
    return onnx_ir.from_proto(quantiser.model.model)


def _store_once(program: Any, *, with_table: bool) -> None:
    """Weights that several positions use, as one tensor each.

    A product reads a linear's weight transposed. The exporter writes that down where one product does; where several
    do, it leaves the transposing to each of them or writes one tensor for each.

    with_table: also a table of embeddings that is the head too, which then lies there twice.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = program.graph
    turned: dict[tuple[str, tuple[int, ...]], Any] = {}
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer():
            continue
        if not with_table and any(use.node.op_type != "Transpose" for use in weight.uses()):
            continue
        order = tuple(node.attributes["perm"].as_ints())
        if (weight.name, order) not in turned:
            values = weight.const_value.numpy().transpose(order).copy()
            tensor = onnx_ir.tensor(values, name=f"{weight.name}.{'_'.join(map(str, order))}")
            turned[weight.name, order] = onnx_ir.Value(
                name=tensor.name, type=weight.type, shape=onnx_ir.Shape(values.shape), const_value=tensor
            )
            graph.register_initializer(turned[weight.name, order])
        node.outputs[0].replace_all_uses_with(turned[weight.name, order])
    RemoveUnusedNodesPass()(program)
    first: dict[tuple[Any, ...], Any] = {}
    for value in list(graph.initializers.values()):
        if len(value.const_value.shape) < 2:
            continue
        held = np.ascontiguousarray(value.const_value.numpy())
        same = first.setdefault((held.dtype, held.shape, hashlib.sha256(held.data).digest()), value)
        if same is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[value.name]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its stages, and warns of versions that it was not tried with."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _without_stops(model: PreTrainedModel) -> Iterator[None]:
    """The exporter lets the model write two tokens, and the first may not end the text."""
    settings: Any = model.generation_config
    stops, settings.eos_token_id = settings.eos_token_id, None
    try:
        yield
    finally:
        settings.eos_token_id = stops


class OnnxModel:
    """An export, called as a model of transformers is: `model(input_ids=..., past_key_values=...).logits`."""

    def __init__(self, folder: str) -> None:
        """Open it, with as many threads as torch has."""
        self._decoder = onnx_decoder.Decoder(folder, threads=torch.get_num_threads())

    def __call__(
        self,
        input_ids: Tensor,
        past_key_values: onnx_decoder.Past | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Logits (B, T, V), and all that was read."""
        logits_BTV, past = self._decoder.read(input_ids.numpy(), past_key_values)
        return SimpleNamespace(
            logits=torch.from_numpy(logits_BTV[:, -logits_to_keep:]),
            past_key_values=past if use_cache else None,
        )

    def parameters(self) -> Iterator[Tensor]:
        """Their number only, as one tensor without values."""
        told = self._decoder.session.get_modelmeta().custom_metadata_map
        yield torch.empty(int(told[NUM_PARAMETERS]), device="meta")

    def eval(self) -> OnnxModel:
        """It is never trained."""
        return self


def load(folder: str, dtype: str, attention: str | None) -> tuple[OnnxModel, list[str]]:
    """The export in onnxruntime."""
    return OnnxModel(folder), []
