"""What a plan costs in quality, learnt from plans that were measured; and the best plans by it, of any price.

A plan is told by the states of its blocks (`STATES`), a letter each: kept, dropped, in a gap that one matrix fills,
only the MLP, only the attention. The KL is taken to be a sum along the chain of blocks: one term for each block that
is not kept, and one more for each two neighbours that are both not kept. It is fitted to what was measured, as a
Bayesian linear regression, so it also knows how sure it is: a draw from it (Thompson sampling) asks for plans that look
good, and for those that are not known well. As terms reach from a block to the next only, the best plans of a draw that
save so much are found exactly, by a dynamic programme over the blocks and what is saved, in milliseconds. Source: ours.

Sums of the logarithm foretell worse: what a block adds to a small damage and to a large one differs less in nats than
in its share (docs/log.md).

Shapes: L blocks, S states in use, P plans, F features, W steps of what is saved, K plans that are kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from foldsearch.errors import PlanError
from foldsearch.plan.plan import FoldPlan, Replacement, Slot

KEPT, DROPPED, LINEAR, MLP_ONLY, ATTENTION_ONLY = STATES = "kdlma"
HALVES = MLP_ONLY + ATTENTION_ONLY
STEPS = 32  # of what is saved, that the dearest state of a block takes

NOISE = 0.3  # of a measured KL about the sum, as a share of it,
LEAST_NOISE = 0.002  # and at least, nats
TYPICAL = 0.1  # nats that a block costs, where none was measured alone
# Terms: of a block that goes, of two neighbours that go, of a half whatever the block, of the half of a block.
WHOLE, PAIR, ALL = "whole", "pair", "all"
SPREADS = {  # prior standard deviations, nats: of a block about a typical one, of all others about none
    WHOLE: 0.2,
    PAIR: 0.05,
    ALL: 0.02,
    MLP_ONLY: 0.05,
    ATTENTION_ONLY: 0.05,
}
SHARES = {DROPPED: 1.0, LINEAR: 1.0, MLP_ONLY: 0.3, ATTENTION_ONLY: 0.8}  # of what a block costs that goes

Floats = NDArray[np.float64]


# ---- plans and the states of their blocks


def code_of(plan: FoldPlan) -> str | None:
    """The states of a plan's blocks; None where they do not say it all (children, repeats, other networks)."""
    states = [DROPPED] * plan.num_blocks
    for slot in plan.slots:
        if isinstance(slot, Replacement):
            states[slot.first : slot.last + 1] = [LINEAR] * (slot.last + 1 - slot.first)
        elif slot.attention is None:
            states[slot.home] = MLP_ONLY
        else:
            states[slot.home] = ATTENTION_ONLY if slot.mlp is None else KEPT
    code = "".join(states)
    try:
        return code if plan_of(code) == plan else None
    except PlanError:  # what attends is another network
        return None


def plan_of(code: str) -> FoldPlan:
    """The plan whose blocks are in these states; neighbours that one matrix may stand for are one gap.

    Raises:
        PlanError: nothing runs, or nothing attends.
    """
    slots: list[Slot | Replacement] = []
    for block, state in enumerate(code):
        if state == LINEAR:
            first = slots.pop().first if block and code[block - 1] == LINEAR else block  # type: ignore[union-attr]
            slots.append(Replacement(first, block, "linear"))
        elif state != DROPPED:
            attention = None if state == MLP_ONLY else block
            slots.append(Slot(block, attention, None if state == ATTENTION_ONLY else block))
    return FoldPlan(tuple(slots), len(code))


@dataclass(frozen=True, slots=True)
class Prices:
    """What the states of blocks save, in steps.

    Attributes:
        states: that are in use, kept first.
        saved_LSS: steps that a block in the last state saves after a block in the one before.
        step: the size of a step, in the unit of what was asked.
    """

    states: str
    saved_LSS: NDArray[np.int64]
    step: float

    @classmethod
    def of(cls, states: str, num_blocks: int, price: Callable[[FoldPlan], float]) -> Prices:
        """Ask a price, which adds up over blocks, of plans that differ from the dense model in a block or two."""
        dense = price(FoldPlan.identity(num_blocks))

        def saved(block: int, *found: str) -> float:
            code = KEPT * block + "".join(found)
            return dense - price(plan_of(code + KEPT * (num_blocks - len(code))))

        values_LSS = np.zeros((num_blocks, len(states), len(states)))
        for block in range(num_blocks):
            for number, state in enumerate(states[1:], 1):
                values_LSS[block, :, number] = saved(block, state)
                if state == LINEAR and block:  # one matrix for both
                    with suppress(PlanError):  # of two blocks both: nothing would attend
                        both = saved(block - 1, LINEAR, LINEAR) - saved(block - 1, LINEAR)
                        values_LSS[block, number, number] = both
        step = float(values_LSS.max()) / STEPS
        saved_LSS = np.maximum(0, np.floor(values_LSS / step + 1e-6)).astype(np.int64)
        return cls(states, saved_LSS, step)

    def saved(self, code: str) -> int:
        """Steps that a plan saves; they are rounded down for each block."""
        return int(self.saved_by([code])[0])

    def saved_by(self, codes: Sequence[str]) -> NDArray[np.int64]:
        """Steps that each of these plans saves, (P,)."""
        before_PL, after_PL = _pairs(codes, self.states, len(self.saved_LSS))
        return np.asarray(self.saved_LSS[np.arange(len(self.saved_LSS)), before_PL, after_PL].sum(1))


# ---- the sum


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Terms of the KL, nats.

    Attributes:
        states: that are in use, kept first.
        terms_LSS: of a block in the last state after a block in the one before (before the first: kept).
    """

    states: str
    terms_LSS: Floats

    def kl(self, code: str) -> float:
        """Of a plan whose blocks are in these states."""
        numbers = [self.states.index(state) for state in KEPT + code]
        return sum(
            float(self.terms_LSS[block, before, after])
            for block, (before, after) in enumerate(pairwise(numbers))
        )

    def best(self, prices: Prices, least: int, keep: int = 1) -> list[str]:
        """The `keep` plans with the lowest sums of those that save `least` steps or more, best first."""
        assert prices.states == self.states
        num_states = len(self.states)
        # By what is saved so far (all beyond `least` together) and the state of the latest block: the lowest sums.
        sums_SWK = np.full((num_states, least + 1, keep), np.inf)
        sums_SWK[0, 0, 0] = 0.0
        behind: list[NDArray[np.int64]] = []  # of every sum, which one of the block before it was made of
        sources_SWK = np.arange(sums_SWK.size).reshape(sums_SWK.shape)
        for terms_SS, saved_SS in zip(self.terms_LSS, prices.saved_LSS, strict=True):
            found = [
                _extended(sums_SWK, sources_SWK, terms_SS[:, after], saved_SS[:, after])
                for after in range(num_states)
            ]
            sums_SWK = np.stack([sums for sums, _ in found])
            behind.append(np.stack([sources for _, sources in found]))
        last_SK = sums_SWK[:, least]
        order = np.argsort(last_SK, axis=None, kind="stable")[:keep]
        ends = [np.unravel_index(int(one), last_SK.shape) for one in order if np.isfinite(last_SK.flat[one])]
        return [self._traced(behind, (int(state), least, int(rank))) for state, rank in ends]

    def _traced(self, behind: list[NDArray[np.int64]], end: tuple[int, ...]) -> str:
        letters = []
        for sources_SWK in reversed(behind):
            letters.append(self.states[end[0]])
            end = tuple(map(int, np.unravel_index(sources_SWK[end], sources_SWK.shape)))
        return "".join(reversed(letters))


def _extended(
    sums_SWK: Floats, sources_SWK: NDArray[np.int64], terms_S: Floats, saved_S: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.int64]]:
    """The lowest sums with one more block, (W, K), whatever the state before it; and what they are made of."""
    num_states, rows, keep = sums_SWK.shape
    each_WK = np.full((rows, num_states * keep), np.inf)
    of_each_WK = np.zeros(each_WK.shape, dtype=np.int64)
    beyond, of_beyond = [], []  # what saves the least that is asked for, or more
    for before in range(num_states):
        saved, columns = int(saved_S[before]), slice(before * keep, (before + 1) * keep)
        sums_WK = sums_SWK[before] + terms_S[before]
        kept = max(0, rows - saved)
        each_WK[saved:, columns] = sums_WK[:kept]
        of_each_WK[saved:, columns] = sources_SWK[before, :kept]
        beyond.append(sums_WK[max(0, rows - 1 - saved) :].ravel())
        of_beyond.append(sources_SWK[before, max(0, rows - 1 - saved) :].ravel())
    best_WK = np.argsort(each_WK, axis=1, kind="stable")[:, :keep]
    sums, sources = (np.take_along_axis(values, best_WK, axis=1) for values in (each_WK, of_each_WK))
    joined, of_joined = np.concatenate(beyond), np.concatenate(of_beyond)
    best_K = np.argsort(joined, kind="stable")[:keep]
    sums[-1], sources[-1] = joined[best_K], of_joined[best_K]
    return sums, sources


class ChainFit:
    """The regression: what is known of the terms after some plans were measured.

    Attributes:
        states: that may occur, kept first.
        known: the KL of the plans that were measured, by the states of their blocks, nats per token.
        prior_F, spread_F: what is expected of the terms before any plan is measured: mean and standard deviation.
        mean_F: what is expected of them now.
    """

    def __init__(self, states: str, num_blocks: int, known: Mapping[str, float]) -> None:
        """Fit.

        Args:
            states: that may occur, kept first.
            num_blocks: of the dense model.
            known: the KL of plans by the states of their blocks, nats per token; others are left out.
        """
        known = {code: kl for code, kl in known.items() if set(code) <= set(states)}
        self.states, self.known = states, known
        names, self._weights_LSSF = _weights(states, num_blocks)
        self._wanted_P = np.asarray(list(known.values()), dtype=float)
        sure_P = 1 / (NOISE * np.abs(self._wanted_P) + LEAST_NOISE)
        alone = sorted(kl for code, kl in known.items() if code.strip(KEPT) in (DROPPED, LINEAR))
        typical = alone[len(alone) // 2] if alone else TYPICAL
        self.prior_F = np.asarray([typical if name == WHOLE else 0.0 for name in names])
        self.spread_F = np.asarray([SPREADS[name] for name in names])
        self._features_PF = self.features(list(known))
        self._scaled_PF = self._features_PF * sure_P[:, None]
        precision_FF = self._scaled_PF.T @ self._scaled_PF + np.diag(self.spread_F**-2)
        self._factor_FF = np.linalg.cholesky(precision_FF)
        learnt_F = self._scaled_PF.T @ (self._wanted_P * sure_P)
        self.mean_F = np.linalg.solve(precision_FF, learnt_F + self.prior_F * self.spread_F**-2)

    def features(self, codes: Sequence[str]) -> Floats:
        """How often each term counts in each of these plans, (P, F)."""
        before_PL, after_PL = _pairs(codes, self.states, len(self._weights_LSSF))
        features_PF = np.zeros((len(codes), self._weights_LSSF.shape[-1]))
        for block, weights_SSF in enumerate(self._weights_LSSF):
            features_PF += weights_SSF[before_PL[:, block], after_PL[:, block]]
        return features_PF

    def mean(self) -> Chain:
        """The likeliest terms."""
        return self._chain(self.mean_F)

    def left_out(self) -> dict[str, float]:
        """Of each plan that was measured, what the others foretell."""
        told_P = self._features_PF @ self.mean_F
        # How much a plan's own figure moves what is told of it: the diagonal of the hat matrix.
        own_P = (np.linalg.solve(self._factor_FF, self._scaled_PF.T) ** 2).sum(0)
        told_P -= own_P / (1 - own_P) * (self._wanted_P - told_P)
        return dict(zip(self.known, told_P.tolist(), strict=True))

    def draw(self, rng: random.Random) -> Chain:
        """Terms as likely as they are."""
        noise_F = np.asarray([rng.gauss(0.0, 1.0) for _ in self.mean_F])
        return self._chain(self.mean_F + np.linalg.solve(self._factor_FF.T, noise_F))

    def _chain(self, terms_F: Floats) -> Chain:
        return Chain(self.states, np.asarray(self._weights_LSSF @ terms_F))


def _pairs(codes: Sequence[str], states: str, num_blocks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each block of each plan the number of the state before it (of the first: kept), and of its own, (P, L)."""
    letters_PL = np.asarray([list(KEPT + code) for code in codes], dtype="U1").reshape(-1, num_blocks + 1)
    numbers_PL = np.zeros(letters_PL.shape, dtype=np.int64)
    for number, state in enumerate(states):
        numbers_PL[letters_PL == state] = number
    return numbers_PL[:, :-1], numbers_PL[:, 1:]


def _weights(states: str, num_blocks: int) -> tuple[list[str], Floats]:
    """The names of the terms, and how often each counts for a block in one state after one in another, (L, S, S, F)."""
    found = {
        (block, i, j): list(_terms_of(block, before, after))
        for block in range(num_blocks)
        for i, before in enumerate(states)
        for j, after in enumerate(states)
    }
    every = dict.fromkeys(term for terms in found.values() for term, _ in terms)
    columns = {term: number for number, term in enumerate(every)}
    weights_LSSF = np.zeros((num_blocks, len(states), len(states), len(columns)))
    for at, terms in found.items():
        for term, weight in terms:
            weights_LSSF[(*at, columns[term])] = weight
    return [name for name, _ in columns], weights_LSSF


def _terms_of(block: int, before: str, after: str) -> Iterator[tuple[tuple[str, int], float]]:
    """The terms of a block in one state after a block in another, and their weights.

    A block in a gap has one term, whether or not a matrix fills it: a space has gaps of one kind only. Half a block
    counts as a share of the block; what differs from that is a term of the state, and one of the block in it.
    """
    if after == KEPT:
        return
    yield (WHOLE, block), SHARES[after]
    if after in (MLP_ONLY, ATTENTION_ONLY):
        yield (ALL, STATES.index(after)), 1.0
        yield (after, block), 1.0
    if before != KEPT and block:
        yield (PAIR, block), SHARES[before] * SHARES[after]
