"""What is shipped, and an export that is written and not yet called one: values that all of this package passes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldsearch.export.card import Licences, Recipe
from foldsearch.export.figures import ModelFigures, Predicted
from foldsearch.plan.cost import DTYPE_BYTES
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import Beside, Runtime
from foldsearch.runtimes.verify import PROMPT_TOKENS, as_stops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Shipment:
    """What is shipped of a model, and what it is held against.

    plan: of the model. runtime: its name (see `foldsearch.runtimes`). dtype: float32, bfloat16 or float16, in which the
    model was measured. weights: one of the runtime's types; empty stores them as the dtype is. kv_cache: the type of
    the cache that it was measured with; empty for the program's own. context: tokens that the
    model is to see.
    ids_NT: int64 token ids, N sequences of T ≥ 2 tokens: what logits, decoding and perplexity are taken on.
    text_NT: bool, which of them are of the text (see `foldsearch.model.tokens.TokenSet`); None is all. Perplexity is
    over the positions that predict one of these.
    dense: the model it was folded from. Where it was loaded from a folder, its figures are taken too.
    details: goes into the card, as it is (JSON); "base_model" names the base model.
    gguf: the files of the GGUF that the dense model was read from; none where it was no GGUF.
    whole: the folder of the model that also sees whose text part the dense model is; None where it is no part.
    predicted: its times as they were reckoned, for the same runtime and type of weights; None where nothing was.
    licences: of the model and the text. recipe: how the model is made again; None where that is not known.
    shows_text: whether the tokens of ids_NT go into the export, so that its figures can be taken again anywhere; else
    tokens at random stand in for them.
    """

    plan: FoldPlan
    runtime: str
    dtype: str
    ids_NT: Tensor
    text_NT: Tensor | None = None
    dense: PreTrainedModel | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    gguf: tuple[Path, ...] = ()
    whole: Path | None = None
    context: int = 0
    licences: Licences = Licences()  # noqa: RUF009  # it is frozen
    recipe: Recipe | None = None
    shows_text: bool = True
    predicted: Predicted | None = None
    kv_cache: str = ""

    @property
    def base_model(self) -> str:
        """The name of the dense model, as a person knows it."""
        named = str(self.details.get("base_model", ""))
        if named or self.dense is None:
            return named or "unknown"
        return Path(str(self.dense.config.name_or_path)).name or "unknown"

    @property
    def prompt_tokens(self) -> int:
        """That are read when the speed of a model is taken: as many as the prediction is of."""
        return self.predicted.tokens if self.predicted else min(PROMPT_TOKENS, self.ids_NT.shape[1])

    def in_context(self) -> Shipment:
        """The same with no more tokens of a sequence than the context: a program's cache may hold no others."""
        if not 2 <= self.context < self.ids_NT.shape[1]:
            return self
        cut_NT = None if self.text_NT is None else self.text_NT[:, : self.context]
        return replace(self, ids_NT=self.ids_NT[:, : self.context], text_NT=cut_NT)

    @property
    def tokens(self) -> dict[str, Tensor]:
        """ids_NT and text_NT, as every process is given them."""
        ids_NT = self.ids_NT.detach().to("cpu")
        text_NT = (
            torch.ones_like(ids_NT, dtype=torch.bool) if self.text_NT is None else self.text_NT.to("cpu")
        )
        return {"ids_NT": ids_NT.contiguous(), "text_NT": text_NT.contiguous()}


@dataclass(frozen=True, slots=True)
class Job:
    """An export that is written and not yet verified.

    measured: what it is held against. tokens: ids_NT and text_NT. weights: how they are stored; dtype: in which torch
    computes with them (see `foldsearch.machine.computing_dtype`). tolerance: of the logits, as a share of their RMS;
    loss_tolerance: of the mean next-token loss, in nats. weight_bytes, num_parameters: that were written, and
    rest_parameters: of these, what is not of the text part that was measured. beside: what went into it with the model.
    prompt_tokens: that are read when its speed is taken. kv_cache: see `Shipment`.
    """

    folder: Path
    measured: PreTrainedModel
    tokens: dict[str, Tensor]
    runtime: Runtime
    weights: str
    dtype: str
    tolerance: float
    loss_tolerance: float
    weight_bytes: int
    num_parameters: int
    rest_parameters: int
    beside: Beside
    prompt_tokens: int
    kv_cache: str = ""

    def loading(self, folder: Path, tensors: Path, *, how: str = "") -> dict[str, Any]:
        """How every process loads a folder: the same for all of them."""
        return {
            "folder": str(folder.resolve()),
            "dtype": self.dtype,
            "attention": self.attention,
            "threads": torch.get_num_threads(),
            "tensors": str(tensors),
            "how": how,
            "prompt_tokens": self.prompt_tokens,
        }

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer, as the measured model has them."""
        return as_stops(getattr(self.measured.generation_config, "eos_token_id", None))

    @property
    def attention(self) -> str:
        """How the measured model computes attention: the name of transformers."""
        return str(self.measured.config._attn_implementation)

    @property
    def file_bytes(self) -> int:
        """Of its weight files."""
        return file_bytes(self.runtime, self.folder)

    def figures(self, folder: Path, answer: dict[str, Any]) -> ModelFigures:
        """What a process said of a folder; where weights are of several types, their bytes are those of the file."""
        in_file = file_bytes(self.runtime, folder)
        return ModelFigures(
            parameters=answer["parameters"],
            weight_bytes=in_file if self.runtime.types else answer["parameters"] * DTYPE_BYTES[self.weights],
            resident_bytes=answer["resident_bytes"],
            perplexity=answer["perplexity"],
        )


def few_of(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first sequences: a program that is not transformers is asked about few tokens, as it is slow to ask.

    That its file holds the right numbers does not depend on them, and its quality is compared on the same ones.
    """
    kept = max(1, FEW_TOKENS // tokens["ids_NT"].shape[1])
    return {name: values_NT[:kept].contiguous() for name, values_NT in tokens.items()}


def file_bytes(runtime: Runtime, folder: Path) -> int:
    """Of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob(runtime.weights))


def on_cpu(model: Any) -> PreTrainedModel:
    """The model, moved."""
    moved: PreTrainedModel = model.to("cpu")
    return moved
