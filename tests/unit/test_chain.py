"""The chain of blocks: what is fitted, what is drawn, and what is best. Oracles: all plans, and planted terms."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from foldsearch.errors import PlanError
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.search.chain import (
    DROPPED,
    KEPT,
    NOISE,
    STATES,
    STEPS,
    Chain,
    ChainFit,
    Prices,
    code_of,
    plan_of,
)

PLAIN = KEPT + DROPPED
N = 8


def planted(seed: int, states: str = PLAIN, num_blocks: int = N) -> Chain:
    """A chain with terms for each state, and for each two states of neighbours."""
    rng = np.random.default_rng(seed)
    own_LS = rng.uniform(0.02, 0.5, (num_blocks, len(states)))
    pairs_LSS = rng.uniform(-0.02, 0.1, (num_blocks, len(states), len(states)))
    own_LS[:, 0] = 0
    pairs_LSS[:, 0] = pairs_LSS[:, :, 0] = 0
    return Chain(states, own_LS[:, None, :] + pairs_LSS)


def price(plan: FoldPlan) -> float:
    """Attention 3, an MLP 7, a matrix in a gap 1."""
    units = {True: 3, False: 7}
    return sum(
        sum(units[unit == "attention"] for unit in ("attention", "mlp") if getattr(slot, unit) is not None)
        if isinstance(slot, Slot)
        else 1
        for slot in plan.slots
    )


def every_code(states: str, num_blocks: int) -> list[str]:
    """Every way for the blocks to be."""
    return list(map("".join, itertools.product(states, repeat=num_blocks)))


@pytest.mark.parametrize(
    "text", ["0-4", "0 2-4", "0 1a 3m 4", "0-1~linear 2a 3-4~linear", "0 2~linear 3-4", "4"]
)
def test_a_plan_is_told_by_the_states_of_its_blocks(text: str) -> None:
    plan = FoldPlan.parse(text, 5)
    code = code_of(plan)
    assert code is not None
    assert set(code) <= set(STATES)
    assert plan_of(code) == plan


@pytest.mark.parametrize(
    "text", ["0 1=0 2-4", "0 1=0a 2-4", "0-4 3=3", "0 1-2~ffn 3-4", "0 1~linear 2~linear 3-4", "0-4~layer"]
)
def test_other_plans_have_no_code(text: str) -> None:
    assert code_of(FoldPlan.parse(text, 5)) is None


def test_a_code_by_hand() -> None:
    assert code_of(FoldPlan.parse("0 2a 3m 4-5~linear 6", 8)) == "kdamllkd"
    with pytest.raises(PlanError, match="every block is dropped"):
        plan_of("ddd")
    with pytest.raises(PlanError, match="no attention"):
        plan_of("mdm")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("states", "num_blocks"), [(PLAIN, N), ("kdma", 5), ("klma", 5)])
def test_the_best_plans_are_those_of_all(seed: int, states: str, num_blocks: int) -> None:
    chain, prices = planted(seed, states, num_blocks), Prices.of(states, num_blocks, price)
    every = every_code(states, num_blocks)
    for least in (0, 1, STEPS, 2 * STEPS + 7, num_blocks * STEPS):
        wanted = sorted(chain.kl(code) for code in every if prices.saved(code) >= least)[:3]
        found = chain.best(prices, least, keep=3)
        assert [chain.kl(code) for code in found] == pytest.approx(wanted)
        assert len(set(found)) == len(found)
        assert all(code in every and prices.saved(code) >= least for code in found)
    assert chain.best(prices, num_blocks * STEPS + 1) == []


@pytest.mark.parametrize("num_blocks", [5, 2])  # of two, one matrix for both is no plan
def test_what_is_saved_is_rounded_down(num_blocks: int) -> None:
    """Oracle: the price itself; a whole block is 10, so a step is 10 / STEPS."""
    prices = Prices.of(STATES, num_blocks, price)
    for code in every_code(STATES, num_blocks):
        if set(code) & {"k", "a"}:  # something attends
            saved = price(FoldPlan.identity(num_blocks)) - price(plan_of(code))
            assert saved - num_blocks * prices.step < prices.saved(code) * prices.step <= saved + 1e-9


def test_a_sum_by_hand() -> None:
    terms = np.zeros((3, 2, 2))
    terms[:, :, 1] = [[1.0, 1.1], [2.0, 2.5], [4.0, 4.1]]
    chain = Chain(PLAIN, terms)
    assert chain.kl("dkd") == pytest.approx(1 + 4)
    assert chain.kl("kdd") == pytest.approx(2 + 4.1)
    assert chain.kl("kkk") == 0


@pytest.mark.parametrize(("states", "num_blocks"), [(PLAIN, N), ("kdma", 6)])
def test_what_was_measured_is_learnt(states: str, num_blocks: int) -> None:
    """Enough plans of a planted chain: plans that were not measured are foretold."""
    chain, rng = planted(0, states, num_blocks), random.Random(1)
    every = every_code(states, num_blocks)[1:]
    known = {code: chain.kl(code) for code in rng.sample(every, min(len(every) // 2, 600))}
    fit = ChainFit(states, num_blocks, known).mean()
    others = [code for code in every if code not in known]
    # the noise that is allowed for is a share of each value: so is what is left of the error, on average far less of it
    missed = [abs(fit.kl(code) - chain.kl(code)) / (chain.kl(code) + 0.1) for code in others]
    assert sum(missed) / len(missed) < NOISE / 4


def test_what_the_others_foretell_of_a_plan() -> None:
    """Oracle: a fit without the plan. Single blocks are left in: the median of these is what is expected of a block."""
    chain, rng = planted(0), random.Random(3)
    codes = [code for code in every_code(PLAIN, N) if code.count(DROPPED) > 1]
    known = {code: chain.kl(code) * rng.uniform(0.8, 1.2) for code in rng.sample(codes, 30)}
    for code, told in ChainFit(PLAIN, N, known).left_out().items():
        others = {other: kl for other, kl in known.items() if other != code}
        assert told == pytest.approx(ChainFit(PLAIN, N, others).mean().kl(code), rel=1e-6)


def test_draws_are_as_sure_as_the_fit() -> None:
    """Their mean is the fit's, and they agree better on what was measured than on what was not."""
    chain = planted(0)
    known = {
        code: chain.kl(code)
        for code in every_code(PLAIN, N)
        if code.count(DROPPED) == 2 and DROPPED not in code[N // 2 :]
    }
    fit, rng = ChainFit(PLAIN, N, known), random.Random(0)
    draws = [fit.draw(rng) for _ in range(400)]

    def spread(code: str) -> tuple[float, float]:
        values = [draw.kl(code) for draw in draws]
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))

    mean, sure = spread("ddkkkkkk")
    assert mean == pytest.approx(fit.mean().kl("ddkkkkkk"), abs=5 * sure / math.sqrt(len(draws)))
    assert spread("kkkkkkdd")[1] > 1.5 * sure


def test_nothing_known_is_a_prior() -> None:
    draw = ChainFit(STATES, N, {}).draw(random.Random(0))
    assert draw.terms_LSS.shape == (N, 5, 5)
    assert np.isfinite(draw.terms_LSS).all()
