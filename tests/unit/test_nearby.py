"""Plans near good ones. Oracles: the formula of conditional normals, solved at once; integrals; planted terms."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from foldsearch.search.chain import DROPPED, KEPT, ChainFit
from foldsearch.search.nearby import MOST_KNOWN, UNSURE, Nearby, _improvement, steps_from

PLAIN = KEPT + DROPPED
N = 8


def every_code(num_blocks: int = N) -> list[str]:
    return list(map("".join, itertools.product(PLAIN, repeat=num_blocks)))


def differ(code: str, other: str) -> int:
    return sum(a != b for a, b in zip(code, other, strict=True))


def cost(code: str) -> float:
    """A sum over blocks, and what no sum knows: the first and the last block are worse together, by far."""
    each = sum(0.05 + 0.02 * block for block, state in enumerate(code) if state == DROPPED)
    return each + 0.5 * (code[0] == code[-1] == DROPPED)


@pytest.fixture(scope="module")
def known() -> dict[str, float]:
    codes = [KEPT * block + DROPPED + KEPT * (N - block - 1) for block in range(N)]
    codes += random.Random(0).sample(sorted(set(every_code()) - {KEPT * N, DROPPED * N, *codes}), 40)
    return {code: cost(code) for code in codes}


def test_steps_by_hand() -> None:
    assert sorted(steps_from("kd", PLAIN)) == ["dd", "dk", "kk"]
    assert sorted(steps_from("kdm", "kdm")) == sorted(
        ["ddm", "mdm", "kkm", "kmm", "kdk", "kdd", "dkm", "mdk", "kmd"]
    )


@pytest.mark.parametrize("code", ["kdkddkkk", "dddddddk"])
def test_steps_are_all_plans_that_near(code: str) -> None:
    """Oracle: all plans; two blocks that differ are an exchange where as many are dropped."""
    near = [
        other
        for other in every_code()
        if differ(other, code) == 1
        or (differ(other, code) == 2 and other.count(DROPPED) == code.count(DROPPED))
    ]
    assert sorted(steps_from(code, PLAIN)) == sorted(near)


def test_what_is_known_is_told_and_what_is_near_is_surer(known: dict[str, float]) -> None:
    nearby = Nearby(ChainFit(PLAIN, N, known), list(known))
    mean, deviation = nearby.foretell(list(known))
    assert mean == pytest.approx(np.asarray(list(known.values())), rel=2 * UNSURE, abs=0.01)
    others = sorted(set(every_code()) - set(known))
    mean, unknown = nearby.foretell(others)
    assert unknown.mean() > 1.5 * deviation.mean()
    # the sum alone cannot tell plans that lack both ends from others; what is near them can
    missed = np.abs(mean - [cost(code) for code in others])
    chain = ChainFit(PLAIN, N, known).mean()
    assert missed.mean() < 0.7 * np.mean([abs(chain.kl(code) - cost(code)) for code in others])


def test_one_by_one_as_if_each_had_been_measured(known: dict[str, float]) -> None:
    """Oracle: a fit with what was chosen before, at what was foretold of it."""
    codes = sorted(set(every_code()) - set(known))
    best = np.full(len(codes), 0.4)
    fit = ChainFit(PLAIN, N, known)
    chosen = list(itertools.islice(Nearby(fit, codes).most_promising(codes, best), 4))
    assert len(set(chosen)) == 4
    before = Nearby(fit, codes)
    for number, code in enumerate(chosen):
        mean, deviation = _after(fit, before, chosen[:number], codes)
        gain = _improvement(best, mean, deviation)
        gain[[codes.index(one) for one in chosen[:number]]] = -np.inf
        assert gain[codes.index(code)] == pytest.approx(gain.max(), rel=1e-6)


def _after(fit: ChainFit, nearby: Nearby, chosen: list[str], codes: list[str]) -> tuple[np.ndarray, ...]:
    """The posterior when `chosen` came out as foretold, from the whole joint covariance, solved at once."""
    told = nearby._told([*fit.known, *chosen, *codes])
    covariance = told.covariance(told) + np.diag(told.own())
    num = len(fit.known) + len(chosen)
    values = np.asarray(
        [*fit.known.values(), *nearby.foretell(chosen)[0]] if chosen else list(fit.known.values())
    )
    prior = nearby._expected(told)
    gain = covariance[num:, :num] @ np.linalg.inv(covariance[:num, :num])
    variance = np.diag(covariance[num:, num:] - gain @ covariance[:num, num:])
    return prior[num:] + gain @ (values - prior[:num]), np.sqrt(variance)


@pytest.mark.parametrize(("best", "mean", "deviation"), [(1.0, 1.0, 0.5), (0.2, 1.0, 0.4), (3.0, 1.0, 0.1)])
def test_expected_improvement_is_an_integral(best: float, mean: float, deviation: float) -> None:
    values = np.linspace(mean - 10 * deviation, mean + 10 * deviation, 200_001)
    density = np.exp(-(((values - mean) / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
    wanted = np.trapezoid(np.maximum(best - values, 0) * density, values)
    found = _improvement(np.asarray([best]), np.asarray([mean]), np.asarray([deviation]))
    assert found[0] == pytest.approx(wanted, rel=1e-5, abs=1e-9)


def test_of_many_plans_the_nearest_are_looked_at() -> None:
    """With more plans than are looked at: those far away tell nothing, those near are told as they are."""
    codes = every_code(11)[1:-1]
    around = [code for code in codes if code.startswith("d" * 5)]
    known = {code: code.count(DROPPED) / 10 for code in codes if code not in around[:3]}
    assert len(known) > MOST_KNOWN
    nearby = Nearby(ChainFit(PLAIN, 11, known), around)
    assert nearby._known.size_C.shape == (MOST_KNOWN,)
    mean, _ = nearby.foretell(around)
    assert mean == pytest.approx([code.count(DROPPED) / 10 for code in around], rel=0.05)


def test_the_best_plans_of_every_size_are_found() -> None:
    """Oracle: all plans of 12 blocks, any two of which may be worse or better together; 80 of 4,096 are measured."""
    num, sizes = 12, range(3, 7)
    rng = np.random.default_rng(0)
    own_L, pairs_LL = rng.uniform(0.05, 0.4, num), np.triu(rng.normal(0.0, 0.06, (num, num)), 1)

    def planted_cost(code: str) -> float:
        gone_L = np.asarray([state == DROPPED for state in code], dtype=float)
        return float(max(0.01, gone_L @ own_L + gone_L @ pairs_LL @ gone_L))

    every = [code for code in every_code(num) if code.count(DROPPED) in sizes]
    truth = {size: min(planted_cost(c) for c in every if c.count(DROPPED) == size) for size in sizes}
    known = {code: planted_cost(code) for code in every_code(num) if code.count(DROPPED) == 1}
    for size in sizes:  # those that the blocks alone would choose
        best = min(
            (c for c in every if c.count(DROPPED) == size),
            key=lambda c: sum(own_L[i] for i in range(num) if c[i] == DROPPED),
        )
        known[best] = planted_cost(best)
    while len(known) < 80:
        lowest = {size: min((kl, c) for c, kl in known.items() if c.count(DROPPED) == size) for size in sizes}
        codes = list(dict.fromkeys(step for _, c in lowest.values() for step in steps_from(c, PLAIN)))
        codes = [c for c in codes if c not in known and c.count(DROPPED) in sizes]
        best = np.asarray([lowest[c.count(DROPPED)][0] for c in codes])
        near = Nearby(ChainFit(PLAIN, num, known), codes)
        for code in itertools.islice(near.most_promising(codes, best), 8):
            known[code] = planted_cost(code)
    found = {size: min(kl for c, kl in known.items() if c.count(DROPPED) == size) for size in sizes}
    assert found == pytest.approx(truth)
