"""Plans near good ones: what they are likely to cost in quality, and which of them to measure next.

The sum along the chain (`foldsearch.search.chain`) does not know that a window is better than its blocks, or that two
blocks far apart are worse together. What it misses is much the same in plans that differ in few blocks. So beside the
sum stands a Gaussian process whose covariance falls with the number of blocks that differ (kriging with a linear mean).
It also knows how sure it is: of many plans those are asked for that are expected to improve most on the best so far
(expected improvement: Jones, Schonlau and Welch 1998). Where several are asked for at once, each is taken to come out
as foretold before the next is chosen ("kriging believer": Ginsbourger, Le Riche and Carraro 2010). The kernel: ours.

Shapes: P measured plans, C candidates, F terms of the sum, L blocks, S states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldsearch.search.chain import ChainFit, Floats

MISSED = 0.15  # of a KL: what the sum misses, standard deviation
FADES = 6.0  # blocks that differ, over which its covariance falls to 1/e
UNSURE = 0.02  # of a KL: what is a plan's own, whatever is known of plans near it
MOST_KNOWN = 1000  # measured plans that are looked at: the time grows with their square
LEAST = 0.02  # nats that a plan is taken to cost at least, where shares of its KL are meant


def steps_from(code: str, states: str) -> Iterator[str]:
    """Plans that differ from one in the state of one block, or in two blocks that exchange states."""
    for block, before in enumerate(code):
        for state in states:
            if state != before:
                yield code[:block] + state + code[block + 1 :]
        for other in range(block + 1, len(code)):
            if code[other] != before:
                yield code[:block] + code[other] + code[block + 1 : other] + before + code[other + 1 :]


@dataclass(frozen=True, slots=True)
class _Told:
    """What the covariance of plans is made of.

    Attributes:
        features_CF: how often each term of the sum counts, in standard deviations of the term.
        states_CLS: 1 for the state of each block, else 0; blocks and states in one dimension.
        size_C: the KL by the sum alone, nats per token.
    """

    features_CF: Floats
    states_CLS: Floats
    size_C: Floats

    def covariance(self, other: _Told) -> Floats:
        """Of each plan here with each there, before any was measured."""
        missed = MISSED**2 * np.outer(self.size_C, other.size_C) * np.exp(-self.differ(other) / FADES)
        return np.asarray(self.features_CF @ other.features_CF.T + missed)

    def differ(self, other: _Told) -> Floats:
        """How many blocks are in other states."""
        return np.asarray(self.states_CLS[:1].sum() - self.states_CLS @ other.states_CLS.T)

    def variance(self) -> Floats:
        """Of each plan, before any was measured."""
        return np.asarray((self.features_CF**2).sum(1) + (MISSED * self.size_C) ** 2) + self.own()

    def own(self) -> Floats:
        """Of this the part that is the plan's own."""
        return np.asarray((UNSURE * self.size_C) ** 2)

    def only(self, chosen: Sequence[int] | NDArray[np.int64]) -> _Told:
        """Some of the plans."""
        return _Told(self.features_CF[chosen], self.states_CLS[chosen], self.size_C[chosen])


class Nearby:
    """What measured plans tell of others."""

    def __init__(self, fit: ChainFit, around: Sequence[str]) -> None:
        """Learn what the sum misses.

        Args:
            fit: the sum, and the plans that were measured: one at least.
            around: plans; of many that were measured those that are nearest to these are looked at.
        """
        self._fit = fit
        every = self._told(list(fit.known))
        nearest = np.argsort(every.differ(self._told(around)).min(1), kind="stable")[:MOST_KNOWN]
        self._known = every.only(nearest)
        covariance_PP = self._known.covariance(self._known) + np.diag(self._known.own())
        self._factor_PP = np.linalg.cholesky(covariance_PP)
        missed_P = np.asarray(list(fit.known.values()))[nearest] - self._expected(self._known)
        self._weights_P = np.linalg.solve(covariance_PP, missed_P)

    def foretell(self, codes: Sequence[str]) -> tuple[Floats, Floats]:
        """The KL that is expected of plans, and its standard deviation, (C,) each, nats per token."""
        told = self._told(codes)
        mean_C, known_PC = self._posterior(told)
        return mean_C, np.sqrt(told.variance() - (known_PC**2).sum(0))

    def most_promising(self, codes: Sequence[str], best_C: Floats) -> Iterator[str]:
        """Candidates in the order in which to measure them, each chosen as if those before it had been measured.

        Args:
            codes: of the candidates, each once.
            best_C: the KL that each has to beat, nats per token.
        """
        told = self._told(codes)
        mean_C, known_PC = self._posterior(told)
        variance_C = told.variance() - (known_PC**2).sum(0)
        left_C = np.ones(len(codes), dtype=bool)
        while left_C.any():
            gain_C = _improvement(best_C, mean_C, np.sqrt(variance_C))
            found = int(np.argmax(np.where(left_C, gain_C, -np.inf)))
            left_C[found] = False
            yield codes[found]
            # one more row of the triangular factor, as if the plan had been measured and had come out as foretold
            row_C = told.covariance(told.only([found]))[:, 0] - known_PC[:, found] @ known_PC
            row_C /= math.sqrt(variance_C[found])
            known_PC = np.vstack((known_PC, row_C))
            variance_C = np.maximum(variance_C - row_C**2, told.own())

    def _posterior(self, told: _Told) -> tuple[Floats, Floats]:
        """The expected KL, (C,); and what the measured plans tell of each, whose squares its variance falls by."""
        covariance_CP = told.covariance(self._known)
        known_PC = np.linalg.solve(self._factor_PP, covariance_CP.T)
        return self._expected(told) + covariance_CP @ self._weights_P, known_PC

    def _told(self, codes: Sequence[str]) -> _Told:
        features_CF = self._fit.features(codes)
        letters_CL = np.asarray([list(code) for code in codes])
        states_CLS = np.concatenate([letters_CL == state for state in self._fit.states], axis=1)
        size_C = np.maximum(LEAST, features_CF @ self._fit.mean_F)
        return _Told(features_CF * self._fit.spread_F, states_CLS.astype(float), size_C)

    def _expected(self, told: _Told) -> Floats:
        """Before any plan was measured, (C,)."""
        return np.asarray(told.features_CF @ (self._fit.prior_F / self._fit.spread_F))


def _improvement(best_C: Floats, mean_C: Floats, deviation_C: Floats) -> Floats:
    """By how much a normal value is below the best so far, expected; nothing where it is above."""
    by_C = (best_C - mean_C) / deviation_C
    below_C = np.asarray([math.erfc(-by / math.sqrt(2)) / 2 for by in by_C])
    bell_C = np.exp(-(by_C**2) / 2) / math.sqrt(2 * math.pi)
    return np.asarray((best_C - mean_C) * below_C + deviation_C * bell_C)
