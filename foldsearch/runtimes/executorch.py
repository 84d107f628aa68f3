"""ExecuTorch, for phones and small devices: one program with a cache of fixed size, by the XNNPACK backend.

The exporter is that of transformers, as for ONNX. A program has its memory planned when it is made, so it holds a cache
for as many tokens as the target has, and reads up to `CHUNK` tokens at a time.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldsearch.errors import InputError, ModelError, quote_error
from foldsearch.model.fold import cast

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from foldsearch.runtimes import Beside

CHUNK = 32  # tokens that are read at a time, at most: memory is planned for the logits of all of them
USUAL_CONTEXT = 512  # tokens of the cache where nobody says how many
DECODER = "foldsearch.runtimes.executorch_decoder"  # needs executorch, so it is imported when that is known to be there


def check_model(config: PretrainedConfig, context: int) -> tuple[str, ...]:
    """Nothing is computed in another way than transformers does.

    Raises:
        InputError: what writes and runs a program is not installed.
        ModelError: blocks look at the last tokens only, for which the cache has no program.
    """
    if find_spec("executorch") is None:
        raise InputError(
            "a program is written and run by executorch, which is not installed here. Install it: pip install "
            "'foldsearch[executorch]'; where there is no wheel of it for your Python or system, take another runtime."
        )
    if has_windows(config):
        raise ModelError(
            "the executorch runtime runs blocks that look at all tokens of the context, but some of this model look at "
            "the last ones only. Export it to onnx or gguf."
        )
    return ()


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some blocks look at the last tokens only."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is not None
    return "sliding_attention" in kinds


def before_rounding(model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """The model itself; other kernels than torch's run it, which sum in another order."""
    return model, False


def rounded(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """In the dtype of that name."""
    return cast(model, getattr(torch, weights))


def write(model: PreTrainedModel, folder: Path, beside: Beside) -> tuple[str, ...]:
    """The program, the tokenizer, and a file that runs it.

    Raises:
        ModelError: the exporter cannot export the model.
    """
    decoder: Any = import_module(DECODER)
    context = beside.context or USUAL_CONTEXT
    with quiet():
        try:
            program = _exported(model, context)
        except (
            Exception
        ) as error:  # whatever torch.export meets in a model: it has no class of its own for that
            raise ModelError(
                quote_error(
                    f"a {type(model).__name__} cannot be exported to ExecuTorch",
                    error,
                    "Export it to another runtime",
                )
            ) from error
        with (folder / decoder.PROGRAM).open("wb") as file:
            program.write_to_file(file)
    settings = {
        "context": context,
        "chunk": min(CHUNK, context),
        "num_parameters": sum(one.numel() for one in model.parameters()),
    }
    if model.generation_config is not None:  # it has the tokens that end a text
        model.generation_config.save_pretrained(folder)
    (folder / decoder.SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copyfile(str(decoder.__file__), folder / Path(str(decoder.__file__)).name)
    if beside.tokenizer is not None:
        beside.tokenizer.save_pretrained(folder)
    return ()


def _exported(model: PreTrainedModel, context: int) -> Any:
    from torch.export import Dim
    from transformers import GenerationConfig
    from transformers.exporters.configs import ExecutorchConfig
    from transformers.exporters.exporter_executorch import ExecutorchExporter
    from transformers.exporters.utils import decompose_prefill_decode

    ids_BT = torch.arange(12)[None] % model.config.vocab_size
    asked = GenerationConfig(cache_implementation="static", max_cache_len=context, max_length=context)
    stages: Any = decompose_prefill_decode(
        model,
        {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)},
        generation_config=asked,
        multi_token_decode=True,
    )
    step, inputs = stages["decode"]
    length = Dim("length", min=1, max=min(CHUNK, context))
    cached = [one for layer in inputs["past_key_values"].layers for one in vars(layer).values()]
    sizes = {
        "input_ids": {1: length},
        "attention_mask": {2: length},
        "position_ids": {1: length},
        "past_key_values": [None] * sum(isinstance(one, Tensor) for one in cached),
    }
    return ExecutorchExporter().export(step, inputs, ExecutorchConfig(dynamic_shapes=sizes)).program


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints its stages, and warns of versions that it was not tried with."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class ExecutorchModel:
    """An export, called as a model of transformers is: `model(input_ids=..., past_key_values=...).logits`."""

    def __init__(self, folder: str) -> None:
        """Open it, with as many threads as torch has."""
        with quiet():
            decoder: Any = import_module(DECODER)
            self._decoder = decoder.Decoder(folder, threads=torch.get_num_threads())

    def __call__(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """Logits (B, T, V), and all that was read; several sequences are read one after the other."""
        if past_key_values is not None or len(input_ids) == 1:
            logits_BTV, past = self._decoder.read(input_ids, past_key_values)
        else:
            logits_BTV, past = (
                torch.cat([self._decoder.read(one_1T)[0] for one_1T in input_ids.split(1)]),
                None,
            )
        return SimpleNamespace(
            logits=logits_BTV[:, -logits_to_keep:], past_key_values=past if use_cache else None
        )

    def parameters(self) -> Iterator[Tensor]:
        """Their number only, as one tensor without values."""
        yield torch.empty(self._decoder.num_parameters, device="meta")

    def eval(self) -> ExecutorchModel:
        """It is never trained."""
        return self


def load(folder: str, dtype: str, attention: str | None) -> tuple[ExecutorchModel, list[str]]:
    """The export in ExecuTorch."""
    return ExecutorchModel(folder), []
