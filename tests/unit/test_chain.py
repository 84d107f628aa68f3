"""The chain of blocks: what is fitted, what is drawn, and what is best. Oracles: all subsets, and planted terms."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from foldsearch.search.chain import Chain, ChainFit

N = 8


def planted(seed: int) -> Chain:
    rng = random.Random(seed)
    blocks = tuple(rng.uniform(0.02, 0.5) for _ in range(N))
    return Chain(blocks, tuple(rng.uniform(-0.02, 0.1) for _ in range(N - 1)))


@pytest.mark.parametrize("seed", range(5))
def test_the_best_sets_are_those_of_all_subsets(seed: int) -> None:
    chain = planted(seed)
    for count in range(1, N):
        found = chain.best(count, keep=3)
        every = sorted(itertools.combinations(range(N), count), key=chain.kl)
        assert [chain.kl(one) for one in found] == pytest.approx([chain.kl(one) for one in every[:3]])
        assert all(one == tuple(sorted(set(one))) and len(one) == count for one in found)


def test_a_sum_by_hand() -> None:
    chain = Chain((1.0, 2.0, 4.0, 8.0), (0.1, 0.2, 0.4))
    assert chain.kl((0, 1, 3)) == pytest.approx(1 + 2 + 8 + 0.1)
    assert chain.kl(()) == 0


def test_what_was_measured_is_learnt() -> None:
    """Enough plans of a planted chain: plans that were not measured are foretold."""
    chain, rng = planted(0), random.Random(1)
    every = [one for count in range(1, N) for one in itertools.combinations(range(N), count)]
    known = {one: chain.kl(one) for one in rng.sample(every, 120)}
    fit = ChainFit(N, known)
    others = [one for one in every if one not in known]
    # the noise that is allowed for is a share of each value: so is what is left of the error
    assert all(abs(fit.mean().kl(one) - chain.kl(one)) < 0.1 * chain.kl(one) + 0.02 for one in others)


def test_draws_are_as_sure_as_the_fit() -> None:
    """Their mean is the fit's, and they agree better on what was measured than on what was not."""
    chain = planted(0)
    known = {one: chain.kl(one) for one in itertools.combinations(range(N // 2), 2)}
    fit, rng = ChainFit(N, known), random.Random(0)
    draws = [fit.draw(rng) for _ in range(400)]

    def spread(dropped: tuple[int, ...]) -> tuple[float, float]:
        values = [draw.kl(dropped) for draw in draws]
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

    mean, sure = spread((0, 1))
    assert mean == pytest.approx(fit.mean().kl((0, 1)), abs=5 * sure / math.sqrt(len(draws)))
    assert spread((N - 2, N - 1))[1] > 1.5 * sure


def test_nothing_known_is_a_prior() -> None:
    draw = ChainFit(N, {}).draw(random.Random(0))
    assert len(draw.blocks) == N
    assert all(map(math.isfinite, (*draw.blocks, *draw.pairs)))
