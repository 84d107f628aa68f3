"""What a plan of dropped blocks costs in quality, learnt from plans that were measured; and the best plan by it.

The logarithm of the KL is taken to be a sum along the chain of blocks: one term for each block that is dropped, one
more for each two neighbours that are dropped together, and a curve of the count. It is fitted to what was measured, as
a Bayesian linear regression, so it also knows how sure it is: a draw from it (Thompson sampling) asks for plans that
look good, and for those that are not known well. As terms reach from a block to the next only, the best plan of a draw
at each count is found exactly, by a dynamic programme over the blocks, in milliseconds. Source: ours.

Shapes: P plans, F features (2 L + 2 for L blocks).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NOISE = 0.05  # standard deviation of a measured log KL about the sum
BLOCK_SPREAD = 0.3  # prior standard deviations: of a block's term,
PAIR_SPREAD = 0.1  # of two neighbours',
CURVE_SPREAD = 3.0  # and of the two numbers of the curve of the count: level and slope
LEAST_KL = 1e-4  # what is below is noise


@dataclass(frozen=True, slots=True)
class Chain:
    """Terms of the log KL of dropping blocks. blocks: one a block. pairs: one for a block and the next."""

    blocks: tuple[float, ...]
    pairs: tuple[float, ...]
    level: float
    slope: float

    def log_kl(self, dropped: Iterable[int]) -> float:
        """Of dropping these blocks."""
        gone = set(dropped)
        own = sum(self.blocks[block] for block in gone)
        pairs = sum(self.pairs[block] for block in gone if block + 1 in gone)
        return own + pairs + self.level + self.slope * math.log(max(1, len(gone)))

    def best(self, least: int, most: int, keep: int = 1) -> dict[int, list[tuple[int, ...]]]:
        """For each count from `least` to `most`, the `keep` sets of dropped blocks of the lowest sums, best first."""
        # By count and whether the block before is dropped: (sum, blocks), the lowest first.
        table: dict[tuple[int, bool], list[tuple[float, tuple[int, ...]]]] = {(0, False): [(0.0, ())]}
        for block, own in enumerate(self.blocks):
            pair = self.pairs[block - 1] if block else 0.0
            found: dict[tuple[int, bool], list[tuple[float, tuple[int, ...]]]] = {}
            for (count, follows), sets in table.items():
                found.setdefault((count, False), []).extend(sets)
                if count < most:
                    added = own + (pair if follows else 0.0)
                    found.setdefault((count + 1, True), []).extend(
                        (total + added, (*blocks, block)) for total, blocks in sets
                    )
            table = {key: sorted(sets)[:keep] for key, sets in found.items()}
        return {
            count: [
                blocks
                for _, blocks in sorted(table.get((count, False), []) + table.get((count, True), []))[:keep]
            ]
            for count in range(max(1, least), most + 1)
        }


class ChainFit:
    """The regression: what is known of the terms after some plans were measured."""

    def __init__(self, num_blocks: int, known: Mapping[tuple[int, ...], float]) -> None:
        """`known`: the KL of each set of dropped blocks, nats per token."""
        self._num_blocks = num_blocks
        rows = [self._features(dropped) for dropped in known]
        wanted = [math.log(max(LEAST_KL, kl)) for kl in known.values()]
        spread = [BLOCK_SPREAD] * num_blocks + [PAIR_SPREAD] * (num_blocks - 1) + [CURVE_SPREAD] * 2
        features_PF = np.asarray(rows, dtype=float).reshape(len(rows), len(spread))
        precision_FF = features_PF.T @ features_PF / NOISE**2 + np.diag([1 / one**2 for one in spread])
        self._factor_FF = np.linalg.cholesky(precision_FF)
        self._mean_F = np.linalg.solve(precision_FF, features_PF.T @ np.asarray(wanted) / NOISE**2)

    def mean(self) -> Chain:
        """The likeliest terms."""
        return self._chain(self._mean_F.tolist())

    def draw(self, rng: random.Random) -> Chain:
        """Terms as likely as they are."""
        noise_F = np.asarray([rng.gauss(0.0, 1.0) for _ in self._mean_F])
        return self._chain((self._mean_F + np.linalg.solve(self._factor_FF.T, noise_F)).tolist())

    def _features(self, dropped: Sequence[int]) -> list[float]:
        gone = set(dropped)
        blocks = [float(block in gone) for block in range(self._num_blocks)]
        pairs = [float(block in gone and block + 1 in gone) for block in range(self._num_blocks - 1)]
        return [*blocks, *pairs, 1.0, math.log(max(1, len(gone)))]

    def _chain(self, terms: list[float]) -> Chain:
        num = self._num_blocks
        return Chain(tuple(terms[:num]), tuple(terms[num:-2]), terms[-2], terms[-1])
