"""Ask the program that an export is for, in a process of its own: is it the same model there, and how fast is it?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from foldsearch.export.figures import EngineFigures, EngineReport
from foldsearch.files import scratch
from foldsearch.model.gguf.inputs import ROUNDING, rounded_inputs
from foldsearch.runtimes import Engine
from foldsearch.runtimes.process import LOADING_SECONDS, TRIES, ModelProcess, ProcessError, room_for
from foldsearch.runtimes.verify import PROMPT_TOKENS, prompt_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SCORED_TOKENS = 256  # whose log-probabilities are compared: llama.cpp is asked once for each
SCORED_SEQUENCE = 128  # of which at most so many follow each other
# How far a program may be from torch, in nats a token on average: llama.cpp rounds what goes into a product to 16 bits
# beside 16-bit weights and in its cache, and to 8 bits beside others: 0.002 and 0.06 were seen on SmolLM2. What the
# latter does is measured on each model that is exported (`tolerance_of`); the figure here is of who has it not at hand.
TOLERANCES = {
    "float32": 1e-3,  # onnxruntime computes in it
    "float16": 0.02,
    **dict.fromkeys(("int8", "int4"), 1e-3),  # in float32, from the same numbers
    "f32": 0.02,
    "f16": 0.02,
    "bf16": 0.05,
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4"), 0.2),
}
# By how much llama.cpp may be further from torch than torch is from itself with inputs rounded to 8 bits. Both are as
# far from the same figures by chance of rounding: 0.96 and 1.12 times as far were seen on SmolLM2, dense and with its
# last five blocks dropped and nothing healed, which is 0.27 nats away in q8_0 and 0.005 in f32 (docs/decisions/0020).
TIMES_ROUNDING = 2.0
ANSWER_SECONDS = 600.0  # a server that has not answered by then has stopped


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What the program is asked about.

    threads: of it. ids_NT, text_NT: tokens, and which are of the text. prompt_tokens: that are read in a turn; 0
    for the first sequence, or as much of it as a turn reads. kv_cache: the type of its cache; empty for its own.
    """

    engine: Engine
    threads: int
    ids_NT: Tensor
    text_NT: Tensor
    prompt_tokens: int = 0
    kv_cache: str = ""

    @property
    def prompt(self) -> list[int]:
        """Of the first tokens, what is read in a turn."""
        length = self.prompt_tokens or min(PROMPT_TOKENS, self.ids_NT.shape[1])
        return prompt_of(self.ids_NT.flatten().tolist(), length)

    @property
    def scored(self) -> list[tuple[list[int], int]]:
        """Sequences of tokens, and from which on they are scored: the first that is of the text and has one before."""
        return [(tokens, first) for _, tokens, first in self._scored_rows()]

    def _scored_rows(self) -> Iterator[tuple[int, list[int], int]]:
        left = SCORED_TOKENS
        for row, (ids_T, text_T) in enumerate(zip(self.ids_NT, self.text_NT, strict=True)):
            first = max(1, int(text_T.int().argmax()))
            last = min(len(ids_T), first + min(SCORED_SEQUENCE, left))
            if last > first:
                yield row, ids_T[:last].tolist(), first
                left -= last - first
            if not left:
                break

    def told_by(self, log_probabilities_NP: Tensor) -> list[float]:
        """Of those of all tokens, the log-probabilities of the scored ones, in their order."""
        found: list[float] = []
        for row, tokens, first in self._scored_rows():
            found += log_probabilities_NP[row, first - 1 : len(tokens) - 1].tolist()
        return found

    @property
    def context(self) -> int:
        """Tokens that memory is taken for: of the longest text, and what is written after it."""
        return room_for(max(self.ids_NT.shape[1], self.prompt_tokens))


@torch.no_grad()
def expected(model: PreTrainedModel, job: EngineJob) -> list[float]:
    """The log-probabilities, in nats, that the program is to find, by a model with the numbers of its file."""
    found: list[float] = []
    for tokens, first in job.scored:
        ids_BT = torch.tensor([tokens])
        logits_TV = model(input_ids=ids_BT, use_cache=False).logits[0, first - 1 : -1].float()
        found += logits_TV.log_softmax(-1).gather(1, ids_BT[0, first:, None])[:, 0].tolist()
    return found


def tolerance_of(model: PreTrainedModel, job: EngineJob, theirs: list[float], weights: str) -> float:
    """How far the program may be from torch on average, in nats a token.

    Where it rounds what goes into products to 8 bits, that changes a model which is at a loss by more than a good one,
    and no one number suits both: so torch rounds the same, and tells by how much that changes this model.

    Args:
        model: in float32, with the numbers of the file.
        job: whose tokens it is asked about.
        theirs: what it says of them (`expected`).
        weights: the type that they are stored in.
    """
    if weights not in ROUNDING:
        return TOLERANCES[weights]
    with rounded_inputs(model):
        other = expected(model, job)
    moved = statistics.fmean(abs(a - b) for a, b in zip(theirs, other, strict=True))
    return TOLERANCES["f16"] + TIMES_ROUNDING * moved  # its cache has 16 bits too


@contextmanager
def running(job: EngineJob, folder: Path, workplace: Path) -> Iterator[tuple[ModelProcess, EngineFigures]]:
    """The program with an export loaded and scored, and the figures of that.

    Raises:
        ProcessError: it could not be run, in as many tries as it gets.
    """
    for attempt in range(TRIES):
        with ModelProcess(workplace, answers=job.engine.module) as process:
            try:
                figures = _scored(job, process, folder)
            except ProcessError as error:
                if attempt + 1 == TRIES or not error.is_silence:
                    raise
                continue
            yield process, figures
            return


def _scored(job: EngineJob, process: ModelProcess, folder: Path) -> EngineFigures:
    loaded = process.ask(
        "load",
        seconds=LOADING_SECONDS,
        folder=str(folder.resolve()),
        threads=job.threads,
        context=job.context,
        tokens=job.prompt,
        **({"kv_cache": job.kv_cache} if job.kv_cache else {}),
    )
    found: list[float | None] = []
    for tokens, first in job.scored:
        found += process.ask("score", seconds=ANSWER_SECONDS, tokens=tokens, first=first)["log_probabilities"]
    told = [value for value in found if value is not None]
    return EngineFigures(
        version=loaded["version"],
        resident_bytes=loaded["resident_bytes"],
        perplexity=math.exp(-statistics.fmean(told)) if told else math.nan,
        log_probabilities=tuple(found),
    )


def write_in(engine: Engine, folder: Path, prompt: str, num_tokens: int, *, context: int = 0) -> str:
    """How an export goes on after a text, in the program that it is for; context: tokens that it has to hold, about.

    Raises:
        ProcessError: the program failed, or did not answer.
    """
    with scratch("write") as workplace:
        for attempt in range(TRIES):
            with ModelProcess(workplace, answers=engine.module) as process:
                try:
                    given = {
                        "threads": torch.get_num_threads(),
                        "context": max(1024, 2 * context),
                        "tokens": [0],
                    }
                    process.ask("load", seconds=LOADING_SECONDS, folder=str(folder.resolve()), **given)
                    answer = process.ask("write", seconds=ANSWER_SECONDS, text=prompt, num_tokens=num_tokens)
                    return str(answer["text"]).strip()
                except ProcessError as error:
                    if attempt + 1 == TRIES or not error.is_silence:
                        raise
    raise AssertionError("the last try returns or raises")


def compare(engine: Engine, figures: EngineFigures, theirs: list[float], tolerance: float) -> EngineReport:
    """What the program found of an export, beside what it was to find; of the dense model nothing yet."""
    pairs = [
        (ours, other)
        for ours, other in zip(figures.log_probabilities, theirs, strict=True)
        if ours is not None
    ]
    differences = [abs(ours - other) for ours, other in pairs]
    return EngineReport(
        name=engine.name,
        version=figures.version,
        tokens=len(pairs),
        perplexity=figures.perplexity,
        expected_perplexity=math.exp(-statistics.fmean(other for _, other in pairs)),
        dense_perplexity=None,
        mean_difference=statistics.fmean(differences),
        max_difference=max(differences),
        tolerance=tolerance,
    )


def fault_of(report: EngineReport) -> str:
    """Why the program does not run the model that was measured; empty where it does."""
    if report.mean_difference <= report.tolerance:
        return ""
    return (
        f"in {report.name} the log-probabilities of its tokens are {report.mean_difference:.3g} nats away on average "
        f"(tolerance {report.tolerance:g})"
    )
