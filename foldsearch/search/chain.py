"""What a plan of dropped blocks costs in quality, learnt from plans that were measured; and the best plan by it.

The KL is taken to be a sum along the chain of blocks: one term for each block that is dropped, and one more for each
two neighbours that are dropped together. It is fitted to what was measured, as a Bayesian linear regression, so it also
knows how sure it is: a draw from it (Thompson sampling) asks for plans that look good, and for those that are not known
well. As terms reach from a block to the next only, the best plan of a draw at each count is found exactly, by a dynamic
programme over the blocks, in milliseconds. Source: ours.

Sums of the logarithm foretell worse: what a block adds to a small damage and to a large one differs less in nats than
in its share (docs/log.md).

Shapes: P plans, F features (2 L − 1 for L blocks).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NOISE = 0.3  # of a measured KL about the sum, as a share of it,
LEAST_NOISE = 0.002  # and at least, nats
BLOCK_SPREAD = 0.2  # prior standard deviations, nats: of a block's term about that of a typical block,
PAIR_SPREAD = 0.05  # and of two neighbours' about none
TYPICAL = 0.1  # nats that a block costs, where none was measured alone


@dataclass(frozen=True, slots=True)
class Chain:
    """Terms of the KL of dropping blocks, nats. blocks: one a block. pairs: one for a block and the next."""

    blocks: tuple[float, ...]
    pairs: tuple[float, ...]

    def kl(self, dropped: Iterable[int]) -> float:
        """Of dropping these blocks."""
        gone = set(dropped)
        own = sum(self.blocks[block] for block in gone)
        return own + sum(self.pairs[block] for block in gone if block + 1 in gone)

    def best(self, count: int, keep: int = 1) -> list[tuple[int, ...]]:
        """The `keep` sets of so many dropped blocks whose sums are the lowest, best first."""
        # By count and whether the block before is dropped: (sum, blocks), the lowest first.
        table: dict[tuple[int, bool], list[tuple[float, tuple[int, ...]]]] = {(0, False): [(0.0, ())]}
        for block, own in enumerate(self.blocks):
            pair = self.pairs[block - 1] if block else 0.0
            found: dict[tuple[int, bool], list[tuple[float, tuple[int, ...]]]] = {}
            for (taken, follows), sets in table.items():
                found.setdefault((taken, False), []).extend(sets)
                if taken < count:
                    added = own + (pair if follows else 0.0)
                    found.setdefault((taken + 1, True), []).extend(
                        (total + added, (*blocks, block)) for total, blocks in sets
                    )
            table = {key: sorted(sets)[:keep] for key, sets in found.items()}
        last = table.get((count, False), []) + table.get((count, True), [])
        return [blocks for _, blocks in sorted(last)[:keep]]


class ChainFit:
    """The regression: what is known of the terms after some plans were measured."""

    def __init__(self, num_blocks: int, known: Mapping[tuple[int, ...], float]) -> None:
        """`known`: the KL of each set of dropped blocks, nats per token."""
        self._num_blocks = num_blocks
        rows = [self._features(dropped) for dropped in known]
        wanted_P = np.asarray(list(known.values()), dtype=float)
        features_PF = np.asarray(rows, dtype=float).reshape(len(rows), 2 * num_blocks - 1)
        sure_P = 1 / (NOISE * np.abs(wanted_P) + LEAST_NOISE)
        alone = sorted(kl for dropped, kl in known.items() if len(dropped) == 1)
        typical = alone[len(alone) // 2] if alone else TYPICAL
        prior_F = np.asarray([typical] * num_blocks + [0.0] * (num_blocks - 1))
        spread_F = np.asarray([BLOCK_SPREAD] * num_blocks + [PAIR_SPREAD] * (num_blocks - 1))
        scaled_PF = features_PF * sure_P[:, None]
        precision_FF = scaled_PF.T @ scaled_PF + np.diag(spread_F**-2)
        self._factor_FF = np.linalg.cholesky(precision_FF)
        self._mean_F = np.linalg.solve(
            precision_FF, scaled_PF.T @ (wanted_P * sure_P) + prior_F * spread_F**-2
        )

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
        return [*blocks, *(float({block, block + 1} <= gone) for block in range(self._num_blocks - 1))]

    def _chain(self, terms: list[float]) -> Chain:
        return Chain(tuple(terms[: self._num_blocks]), tuple(terms[self._num_blocks :]))
