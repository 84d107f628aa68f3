"""How long a plan takes in the program that runs it: straight pieces through a few measured models of fewer blocks.

A program reads a prompt in a time that grows with the multiplications of the blocks, and writes a token in one that
grows with the bytes that it reads for them: weights, and what is cached. What does not depend on the blocks, such as
the logits, is the constant part of a line. Source: ours; decision 0030.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from foldsearch.errors import BudgetError
from foldsearch.plan.stored import StoredTypes

UNSTEADY = 0.1  # a spread above which a person is told


class Work(NamedTuple):
    """What the positions of a plan do, without what is outside the blocks.

    prompt_macs: to read the whole prompt. decode_bytes: of weights and cached numbers, that are read to write the first
    token after it. Borrowed weights are read again at every position.
    """

    prompt_macs: float
    decode_bytes: float


@dataclass(frozen=True, slots=True)
class Line:
    """Milliseconds over work (MACs, bytes): a straight line, or straight pieces between what was measured.

    fixed_ms: without any work. unit_ms: of a unit of work. pieces: work and milliseconds of what was measured, the
    least first, both growing; where there are any, times lie on the pieces between them, the first and the last of
    which go on, and the line is not used.
    """

    fixed_ms: float
    unit_ms: float
    pieces: tuple[tuple[float, float], ...] = ()

    def at(self, work: float) -> float:
        """Milliseconds for so much work; never less for more of it, and never below zero."""
        if not self.pieces:
            return self.fixed_ms + self.unit_ms * work
        place = bisect_left([one for one, _ in self.pieces], work)
        place = min(max(place, 1), len(self.pieces) - 1)
        (before, ms), (after, later_ms) = self.pieces[place - 1 : place + 1]
        unit_ms = (later_ms - ms) / (after - before)
        if work < before and ms < unit_ms * before:  # a piece that would end below zero
            unit_ms = ms / before
        return ms + unit_ms * (work - before)


@dataclass(frozen=True, slots=True)
class Timed:
    """The dense model cut to so many blocks, as it was measured: medians over rounds.

    spread: of either time, the larger range of the middle half of the rounds as a share of its median.
    """

    blocks: int
    prompt_ms: float
    decode_ms: float
    spread: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one model on one machine, in one program, with weights and a KV cache of one type.

    Attributes:
        runtime: the target's (see `foldsearch.runtimes`).
        weights: the target's type of weights; empty where they are of its dtype.
        tokens: of the prompt that is read, after which a token is written. One sequence at a time.
        prompt: milliseconds for the whole prompt, over MACs of the blocks.
        decode: milliseconds for a token, over bytes that the blocks read.
        timed: what the lines go through.
        where: program, processor and threads, in words.
        kv_cache: the target's type of keys and values; so too.
    """

    runtime: str
    weights: str
    tokens: int
    prompt: Line
    decode: Line
    timed: tuple[Timed, ...]
    where: str
    kv_cache: str = ""

    @property
    def types(self) -> StoredTypes:
        """Of what is stored."""
        return StoredTypes(self.weights, self.kv_cache)

    def times(self, work: Work) -> tuple[float, float]:
        """Milliseconds for the prompt and for a token."""
        return self.prompt.at(work.prompt_macs), self.decode.at(work.decode_bytes)

    @property
    def spread(self) -> float:
        """The largest of the measured models."""
        return max(one.spread for one in self.timed)

    @property
    def unsteady(self) -> str:
        """What to say where the rounds differ much; empty where they do not."""
        if self.spread <= UNSTEADY:
            return ""
        return (
            f"the times that latency is reckoned from differ by {self.spread:.0%} from round to round ({self.where}): "
            "the machine was busy, and predictions are no better than that. To measure again when it is quiet: "
            "foldsearch cache --clear latencies"
        )


def fit_line(points: Sequence[tuple[float, float]], what: str) -> Line:
    """The line through (work, milliseconds) whose relative errors are least squares; it never falls below zero.

    An exact line is found exactly. Where noise makes the constant part negative, the line goes through nothing instead.
    Where the times grow from each amount of work to the next, straight pieces go through all of them.

    Args:
        points: of at least two different amounts of work.
        what: is timed, for the message.

    Raises:
        BudgetError: time does not grow with work: more noise than blocks was measured.
    """
    assert len({work for work, _ in points}) > 1, "a line goes through two points"
    weights = [1 / ms**2 for _, ms in points]
    total = sum(weights)
    mean_work = sum(w * work for w, (work, _) in zip(weights, points, strict=True)) / total
    mean_ms = sum(w * ms for w, (_, ms) in zip(weights, points, strict=True)) / total
    both = [(w, work - mean_work, ms - mean_ms) for w, (work, ms) in zip(weights, points, strict=True)]
    slope = sum(w * x * y for w, x, y in both) / sum(w * x * x for w, x, _ in both)
    if not slope > 0:
        told = ", ".join(f"{ms:.3g} ms" for _, ms in sorted(points))
        raise BudgetError(
            f"the time {what} must grow with the blocks that run; got {told} from the fewest blocks to the most. "
            "Measure again when the machine is quiet, or take the latency out of the budget and the objectives."
        )
    pieces = _growing(points)
    fixed = mean_ms - slope * mean_work
    if fixed >= 0:
        return Line(fixed, slope, pieces)
    through = sum(w * work * ms for w, (work, ms) in zip(weights, points, strict=True))
    return Line(0.0, through / sum(w * work**2 for w, (work, _) in zip(weights, points, strict=True)), pieces)


def _growing(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points, the least work first; none where some more work took no longer, which is noise."""
    ordered = tuple(sorted(points))
    grows = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(ordered))
    return ordered if grows and len(ordered) > 2 else ()  # two are a line


def timed(blocks: int, prompt_ms: Sequence[float], decode_ms: Sequence[float]) -> Timed:
    """What several rounds of one model say."""
    spread = max(_spread(prompt_ms), _spread(decode_ms))
    return Timed(blocks, statistics.median(prompt_ms), statistics.median(decode_ms), spread)


def _spread(values: Sequence[float]) -> float:
    ordered = sorted(values)
    out = len(ordered) // 4  # one hiccup does no harm
    return (ordered[-1 - out] - ordered[out]) / statistics.median(ordered)
