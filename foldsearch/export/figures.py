"""What an export is measured by, beside the dense model: values for the report, its table and the card."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from foldsearch.runtimes import runtime_named

# Rounds that differ by more tell of the machine, not of the model: dropping a third of the blocks, which is a lot,
# makes a model 1.5 times as fast.
MOST_BUSY = 1.5
PREDICTED_WITHIN = 0.1  # of a predicted time, that a measured one should be


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """A model in the dtype that ships, loaded from files in that dtype in a fresh process.

    parameters: stored numbers. weight_bytes: theirs. resident_bytes: growth of the process's resident memory from
    before loading to after the first forward pass; None where it cannot be asked for. perplexity: on the given tokens,
    in torch; None where that was not asked.
    """

    parameters: int
    weight_bytes: int
    resident_bytes: int | None
    perplexity: float | None


class Spread(NamedTuple):
    """The median of a figure over rounds, and the range of the middle half of the rounds."""

    low: float
    median: float
    high: float

    @property
    def is_steady(self) -> bool:
        """Whether the rounds agree well enough to quote the median (see `MOST_BUSY`)."""
        return self.high <= MOST_BUSY * self.low


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, one figure a round; the dense model's were taken in turns with the exported model's.

    A machine that is busy slows both models of a round, so their ratio says more than either of them.
    """

    exported: tuple[float, ...]
    dense: tuple[float, ...]

    @property
    def ratio(self) -> Spread:
        """Exported over dense, by round."""
        return spread([ours / theirs for ours, theirs in zip(self.exported, self.dense, strict=True)])

    @property
    def unsteady(self) -> str:
        """Why no speed is quoted; empty where the rounds agree."""
        if not self.exported:  # it was not measured at all
            return ""
        found = self.ratio if self.dense else spread(self.exported)
        return (
            ""
            if found.is_steady
            else f"not measured: the machine was busy ({found.low:.2g}–{found.high:.2g})"
        )

    @property
    def words(self) -> tuple[str, str, str]:
        """For a row of a table: exported, dense, and their ratio with its spread."""
        if self.unsteady or not self.exported:
            return "—", "—", ""
        ours = _three_digits(statistics.median(self.exported))
        if not self.dense:
            return ours, "—", ""
        low, median, high = self.ratio
        return ours, _three_digits(statistics.median(self.dense)), f"{median:.2f} ({low:.2f}–{high:.2f})"


@dataclass(frozen=True, slots=True)
class Predicted:
    """The times of an export as its search reckoned them (see `foldsearch.plan.latency`).

    tokens: of the prompt. prompt_ms: to read all of it. decode_ms: to write a token after it. dense_prompt_ms,
    dense_decode_ms: those of the dense model by the same lines; None where they are not known.
    """

    tokens: int
    prompt_ms: float
    decode_ms: float
    dense_prompt_ms: float | None = None
    dense_decode_ms: float | None = None

    def words(self, prompt: Speed, decode: Speed) -> str:
        """Predicted beside measured, in a sentence or two; where they are far from each other, it says so.

        A machine's pace changes from hour to hour. Where the dense model was timed in turns with the export, both are
        also compared as shares of its times, which do not depend on the pace.
        """
        if not prompt.exported or prompt.unsteady or decode.unsteady:
            return f"{self._predicted}; its speed was not measured."
        prompt_ms, decode_ms = self._milliseconds(prompt.exported, decode.exported)
        apart = (prompt_ms / self.prompt_ms - 1, decode_ms / self.decode_ms - 1)
        words = (
            f"{self._predicted}; measured {prompt_ms:,.3g} ms ({apart[0]:+.0%}) and {decode_ms:,.3g} ms "
            f"({apart[1]:+.0%})."
        )
        if max(map(abs, apart)) <= PREDICTED_WITHIN:
            return words
        if prompt.dense and decode.dense and self.dense_prompt_ms and self.dense_decode_ms:
            of_dense = self._milliseconds(prompt.dense, decode.dense)
            pace = (of_dense[0] / self.dense_prompt_ms, of_dense[1] / self.dense_decode_ms)
            apart = ((1 + apart[0]) / pace[0] - 1, (1 + apart[1]) / pace[1] - 1)
            words += (
                f" The machine's pace is another one than it was: the dense model takes {pace[0] - 1:+.0%} and "
                f"{pace[1] - 1:+.0%}. As shares of its times, measured and predicted are {apart[0]:+.0%} and "
                f"{apart[1]:+.0%} apart."
            )
        if max(map(abs, apart)) > PREDICTED_WITHIN:
            words += (
                f" That is more than {PREDICTED_WITHIN:.0%}: the machine was busy at one of the two times, or the "
                "plan has parts whose cost the lines do not know."
            )
        return words

    def _milliseconds(self, prompt: Sequence[float], decode: Sequence[float]) -> tuple[float, float]:
        return 1000 * self.tokens / statistics.median(prompt), 1000 / statistics.median(decode)

    @property
    def _predicted(self) -> str:
        prompt = f"{self.prompt_ms:,.3g} ms for a prompt of {self.tokens:,} tokens"
        return f"Predicted {prompt} and {self.decode_ms:,.3g} ms for a token after it"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> Spread:
    """Median and middle half: a quarter of the values is left out at either end, so one hiccup does no harm."""
    ordered = sorted(values)
    out = len(ordered) // 4
    return Spread(ordered[out], statistics.median(ordered), ordered[-1 - out])


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """An export in the program that it is for (see `foldsearch.export.engine`).

    version: of what runs it. resident_bytes: growth of the process's resident memory from before loading to after a
    prompt. perplexity: over the scored tokens; log_probabilities: theirs, in nats, None where the program does not say
    it.
    """

    version: str
    resident_bytes: int
    perplexity: float
    log_probabilities: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What the program found of an export.

    name, version: of the program. tokens: that were scored; perplexity: over these; expected_perplexity: the same by
    torch, with the numbers of the file. mean_difference, max_difference: of their log-probabilities, in nats; tolerance
    bounds the mean. dense_perplexity: of the dense model in the same program; None where it was not run.
    """

    name: str
    version: str
    tokens: int
    perplexity: float
    expected_perplexity: float
    dense_perplexity: float | None
    mean_difference: float
    max_difference: float
    tolerance: float

    @property
    def row(self) -> tuple[str, str, str, str]:
        """For the table: its perplexity beside that of the dense model."""
        name, dense = f"perplexity in {self.name}, {self.tokens:,} tokens", self.dense_perplexity
        if dense is None:
            return name, f"{self.perplexity:,.2f}", "—", ""
        return name, f"{self.perplexity:,.2f}", f"{dense:,.2f}", f"{self.perplexity / dense:.2f}"

    @property
    def check(self) -> str:
        """What was compared, as a line of a list of checks."""
        return (
            f"in {self.name} ({self.version}): {self.tokens:,} log-probabilities of tokens, {self.mean_difference:.2g} "
            f"nats from torch's on average (tolerance {self.tolerance:g}), {self.max_difference:.2g} at most; "
            f"perplexity {self.perplexity:.4f}, by torch {self.expected_perplexity:.4f}"
        )


@dataclass(frozen=True, slots=True)
class ChatReport:
    """A question through the chat template of an export (see `foldsearch.export.chat`).

    prompt: the chat as text. stops: tokens that end an answer. answer: the likeliest tokens; dense: the dense model's;
    None where it was not asked. note: how the runtime reads the template in another way; empty where it does not.
    tells_time: whether the template writes the date or the time, so that the prompt is another one tomorrow.
    """

    prompt: str
    stops: tuple[int, ...]
    answer: str
    dense: str | None
    note: str = ""
    tells_time: bool = False

    @property
    def check(self) -> str:
        """What was found, as a line of a list of checks."""
        stops = ", ".join(map(str, self.stops)) or "none"
        beside = "" if self.dense is None else f"; the dense model answers {self.dense!r}"
        return f"a chat through its template; tokens that end an answer: {stops}; it answers {self.answer!r}{beside}"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was shipped, and the checks it passed.

    runtime: its name (see `foldsearch.runtimes`). weights: how they are stored: a dtype, or a type of the runtime;
    dtype: in which torch computes with them.
    dense: the model it was folded from, in the same dtype, loaded in the same way; None where there is none to
    compare with, and `dense_note` says why. file_bytes: of the export's weight files.
    prompt, decode: speed of reading a prompt of `prompt_tokens`, and of writing one token after the other with the KV
    cache.
    measured_perplexity: of the model that was measured, in the shipped dtype, on the same tokens.
    logits_max_difference, logits_difference: to that model, largest and RMS over RMS; logits_tolerance bounds the
    latter (0: equal to the bit). decode_difference: cached decoding to one full forward, RMS over RMS.
    loads_without_foldsearch: it was loaded where foldsearch cannot be imported.
    refused_without_code: stock transformers refuses the folder instead of loading it wrong (None: it needs no code).
    has_tokenizer: whether the folder holds one. threads: of the processor, for all timings.
    engine: what the program of the runtime found; None where that is transformers, or, as engine_note says, where it is
    not installed: then there are no speeds. notes: what the runtime does in another way than transformers. chat: a
    question through the chat template; None where the model has none. predicted: its times as the search reckoned
    them; None where it did not. whole: the class of the model that also sees, where the export is such a model with its
    text part folded; what is measured is then its text, and the counts and bytes are of the whole. kv_cache: the type
    of the program's cache; empty for its own.
    """

    runtime: str
    dtype: str
    plan: str
    num_blocks: int
    base_model: str
    exported: ModelFigures
    dense: ModelFigures | None
    dense_note: str
    file_bytes: int
    prompt_tokens: int
    prompt: Speed
    decode: Speed
    measured_perplexity: float
    tokens: int
    logits_max_difference: float
    logits_difference: float
    logits_tolerance: float
    decode_difference: float
    decode_tolerance: float
    loads_without_foldsearch: bool
    refused_without_code: bool | None
    has_tokenizer: bool
    threads: int
    versions: dict[str, str]
    details: dict[str, Any]
    weights: str
    engine: EngineReport | None = None
    engine_note: str = ""
    notes: tuple[str, ...] = ()
    chat: ChatReport | None = None
    predicted: Predicted | None = None
    whole: str = ""
    kv_cache: str = ""

    @property
    def latency_words(self) -> str:
        """Predicted beside measured times; empty where nothing was predicted."""
        return self.predicted.words(self.prompt, self.decode) if self.predicted else ""

    @property
    def perplexity(self) -> float:
        """Of the export, in torch."""
        assert self.exported.perplexity is not None, "an export is always asked"
        return self.exported.perplexity

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """What a table shows: name, exported, dense, and the first as a share of the second."""
        ours, theirs = self.exported, self.dense

        def row(name: str, key: str, form: str, scale: float = 1.0) -> tuple[str, str, str, str]:
            mine, other = getattr(ours, key), None if theirs is None else getattr(theirs, key)
            shown = ["—" if value is None else format(value / scale, form) for value in (mine, other)]
            return name, shown[0], shown[1], f"{mine / other:.2f}" if mine and other else ""

        where = f" in {self.engine.name}" if self.engine else ""
        own_type = runtime_named(self.runtime).types and self.weights != self.dtype
        stored = f"file in {self.weights}" if own_type else f"weights in {self.weights}"
        return [
            row("parameters, millions", "parameters", ",.1f", 1e6),
            row(f"{stored}, MB", "weight_bytes", ",.1f", 1e6),
            row(f"resident memory{where}, MB", "resident_bytes", ",.0f", 1e6),
            row(f"perplexity, {self.tokens:,} tokens", "perplexity", ",.2f"),
            *([self.engine.row] if self.engine else []),
            (f"reading{where}, tokens/s", *self.prompt.words),
            (f"writing{where}, tokens/s", *self.decode.words),
        ]

    @property
    def held_against(self) -> str:
        """What the logits were compared with, in words."""
        runtime = runtime_named(self.runtime)
        if not runtime.types or self.weights in (self.dtype, *runtime.own_types.values()):
            return f"the measured model in {self.weights}"
        return f"the measured model rounded to {self.weights}"

    @property
    def unsteady(self) -> list[str]:
        """The speeds that are not quoted, and why."""
        named = (("reading", self.prompt), ("writing", self.decode))
        return [f"{name}: {speed.unsteady}" for name, speed in named if speed.unsteady]

    @property
    def how_measured(self) -> str:
        """What the figures are of, for the lines below the table."""
        if not self.decode.exported:
            return f"Perplexity is of the report texts, in torch. Speed and memory were {self.engine_note}."
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        where = f"in a fresh process, {threads}"
        if not self.engine and self.dtype != self.weights:
            where += f", computing in {self.dtype}, as the processor has no instructions for {self.weights}"
        if self.engine:
            cached = f", its KV cache in {self.kv_cache}" if self.kv_cache else ""
            where = f"by {self.engine.name} ({self.engine.version}{cached}) {where}"
        what = (
            f"Perplexity is of the report texts. Reading is of a prompt of {self.prompt_tokens} tokens, writing of one "
            "token after the other with the KV cache:"
        )
        rounds = len(self.decode.exported)
        if self.dense is None:
            return f"Measured {where}. {what} the median of {rounds} rounds. {self.dense_note}".rstrip()
        return (
            f"Both models in {self.weights}, each loaded from files in {self.weights} {where}. {what} the median of "
            f"{rounds} rounds in turns, and of the ratio the range of the middle half of the rounds."
        )
