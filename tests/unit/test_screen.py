"""Screening gives the figures that building, healing and judging each plan by itself gives."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from foldsearch.errors import ModelError
from foldsearch.model import heal as healing
from foldsearch.model import screen as screens
from foldsearch.model.fold import fold
from foldsearch.model.heal import Healer, heal
from foldsearch.model.judge import ask_dense, judge
from foldsearch.model.ridge import Moments, Tokens
from foldsearch.model.screen import Screen
from foldsearch.model.states import FitText, residual_states
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.plan import FoldPlan
from tests.tiny import NUM_BLOCKS, VOCABULARY, as_tokens, dense_model

PLANS = ("0-1 3-4", "0-1 3", "0-1 4", "1-4", "0 2a 3-4", "0-4", "0 4", "0-1 3-4", "0 1-2~linear 3m 4")


def ids(num: int, seed: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (num, 16), generator=torch.Generator().manual_seed(seed))


def tokens_of(ids_NT: torch.Tensor) -> TokenSet:
    return as_tokens(ids_NT)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_screened_plan_is_the_healed_and_judged_one(name, tmp_path):
    """Oracle: each plan folded, healed and judged by itself, the judged text run through the whole model."""
    dense = dense_model(name)
    text, judged = ids(8, 0), tokens_of(ids(3, 1))
    targets = ask_dense(dense, judged)
    screen = Screen(FitText(dense, text, "x", tmp_path), judged, targets)
    states = residual_states(dense, text, model_hash="x", cache_dir=tmp_path)
    for plan in (FoldPlan.parse(text, NUM_BLOCKS) for text in PLANS):
        model = fold(dense, plan)
        Healer(states, text, with_attention=False).heal(model)  # as a screening heals
        alone, found = judge(model, judged, targets), screen.measure(plan)
        assert found.kl == pytest.approx(alone.kl, abs=1e-5)
        assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-4)


def test_what_plans_have_in_common_is_computed_once_and_changes_no_bit(tmp_path, monkeypatch):
    """Block 1 is to meet block 3 in all three plans; block 3 meets block 4, or the end."""
    dense, text = dense_model(), ids(6, 0)
    states = residual_states(dense, text, model_hash="x", cache_dir=tmp_path)
    solved = []
    real = healing._heal_one

    def note(place, *rest):
        solved.append(place.position)
        return real(place, *rest)

    monkeypatch.setattr(healing, "_heal_one", note)
    healer = Healer(states, text, most_bytes=10**9)
    for plan, computed in (("0-1 3-4", [1, 2, 3]), ("0-1 3", [2]), ("0-1 3-4", [])):
        alone, shared = (fold(dense, FoldPlan.parse(plan, NUM_BLOCKS)) for _ in range(2))
        expected = heal(alone, states, text)
        solved.clear()
        found, _ = healer.heal(shared)
        assert list(dict.fromkeys(solved)) == computed  # each in two matrices
        assert found.blocks == expected.blocks
        assert found.values.keys() == expected.values.keys()
        assert all(torch.equal(found.values[key], value) for key, value in expected.values.items())
        ours, theirs = shared.state_dict(), alone.state_dict()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("first", "then"), [("0-1 2-3~linear 4", "0-1 2~linear 3-4"), ("0-1 2~linear 3-4", "0-1 2-3~linear 4")]
)
def test_a_gap_that_begins_alike_and_ends_elsewhere_has_nothing_in_common(name, first, then, tmp_path):
    """The position before it is solved for what is to come after it."""
    dense, text = dense_model(name), ids(64, 0)
    states = residual_states(dense, text, model_hash="x", cache_dir=tmp_path)
    healer = Healer(states, text, most_bytes=10**9, with_attention=False)
    healer.heal(fold(dense, FoldPlan.parse(first, NUM_BLOCKS)))
    alone, shared = (fold(dense, FoldPlan.parse(then, NUM_BLOCKS)) for _ in range(2))
    expected, _ = Healer(states, text, with_attention=False).heal(alone)
    found, _ = healer.heal(shared)
    assert found.blocks == expected.blocks
    assert any(block.ridge is not None for block in found.blocks)
    ours, theirs = shared.state_dict(), alone.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_what_is_kept_stays_in_its_bound(tmp_path):
    dense, text = dense_model("llama"), ids(6, 0)
    states = residual_states(dense, text, model_hash="x", cache_dir=tmp_path)
    healer = Healer(states, text, most_bytes=3 * states[0].nbytes)
    for plan in PLANS:
        healer.heal(fold(dense, FoldPlan.parse(plan, NUM_BLOCKS)))
        kept = sum(step.num_bytes for step in healer._kept.values())
        assert kept == healer._kept_bytes
        assert kept <= 3 * states[0].nbytes or len(healer._kept) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 100.0])
def test_few_tokens_are_solved_as_many_are(bias, ridge):
    """The kernel form of ridge regression has the solution of the normal equations; in float32 too, where they are well
    conditioned. Oracle: least squares in float64, a ridge as rows of its own.
    """
    generator = torch.Generator().manual_seed(0)
    features_MF, wanted_MD = (torch.randn(40, size, generator=generator) for size in (64, 8))
    if bias:
        features_MF[:, -1] = 1.0
    weight_M1 = torch.rand(40, 1, generator=generator)

    class Writer:
        has_bias, device, norm, num_features = bias, torch.device("cpu"), None, 64

    tokens, moments = Tokens(Writer()), Moments(Writer())
    for part, here in (("fitted", slice(0, 15)), ("fitted", slice(15, 25)), ("held out", slice(25, 40))):
        for sums in (tokens, moments):
            sums.add(part, features_MF[here], wanted_MD[here], weight_M1[here])
    # both round products of features to float32: a relative 1e-6, which the least ridge here raises a hundredfold
    close = {"rtol": 1e-3, "atol": 1e-5}
    root_M1 = weight_M1.sqrt()
    squares = (features_MF * root_M1).square().sum(0).double()
    for parts, num in ((("fitted",), 25), (("fitted", "held out"), 40)):
        weights = (ridge * squares * num / 40).sqrt()
        if bias:
            weights[-1] = 0.0  # free, and in the sums all but free
        expected = torch.linalg.lstsq(
            torch.cat(((features_MF * root_M1)[:num].double(), weights.diag())),
            torch.cat(((wanted_MD * root_M1)[:num], torch.zeros(64, 8))).double(),
        ).solution.float()
        for sums in (tokens, moments):
            torch.testing.assert_close(sums.solved(ridge, parts), expected, **close)
    assert tokens.square == pytest.approx(moments.square)
    for share in (1.0, 0.5):
        left_MD = wanted_MD[25:] - share * features_MF[25:] @ moments.solved(ridge, ("fitted",))
        assert tokens.error(ridge, share) == pytest.approx(
            float((left_MD.square() * weight_M1[25:]).sum() / 15), rel=1e-3
        )


def screen_of(tmp_path) -> Screen:
    dense, judged = dense_model(), tokens_of(ids(3, 1))
    return Screen(FitText(dense, ids(8, 0), "x", tmp_path), judged, ask_dense(dense, judged))


def test_several_at_once_have_the_figures_of_one_after_the_other(tmp_path, monkeypatch):
    """To the bit; and torch has its threads again afterwards."""
    plans = [FoldPlan.parse(text, NUM_BLOCKS) for text in PLANS]
    one, threads = screen_of(tmp_path), torch.get_num_threads()
    expected = {plan: one.measure(plan) for plan in plans}
    for at_once in (1, 2, 3):
        monkeypatch.setattr(screens, "num_at_once", lambda *_, at_once=at_once: at_once)
        many, running, most = screen_of(tmp_path), [], []
        real = many.measure

        def measure(plan, progress, real=real, running=running, most=most):
            running.append(plan)
            most.append(len(running))
            try:
                return real(plan, progress)
            finally:
                running.remove(plan)

        monkeypatch.setattr(many, "measure", measure)
        found = list(many.measure_each(plans, lambda: False))
        assert sorted(map(str, dict(found))) == sorted(set(map(str, plans)))
        assert len(found) == len(plans)
        assert dict(found) == expected
        assert 1 <= max(most) <= at_once
        assert torch.get_num_threads() == threads


def test_no_plan_is_begun_when_it_is_over(tmp_path):
    """It is asked before each; those that run then are measured to the end."""
    plans, asked = [FoldPlan.parse(text, NUM_BLOCKS) for text in PLANS[:5]], []
    found = list(screen_of(tmp_path).measure_each(plans, lambda: (asked.append(0), len(asked) > 3)[1]))
    assert len(found) == 3
    assert set(dict(found)) <= set(plans)
    assert list(screen_of(tmp_path).measure_each([], lambda: False)) == []


def test_who_stops_waits_for_no_plan(tmp_path, monkeypatch):
    """A plan that is being measured ends at its next position: of its four, it is held at the second."""
    real, steps, here = healing._heal_one, [], threading.local()
    held, stopping = threading.Event(), threading.Event()

    def step(*rest):
        here.steps = getattr(here, "steps", 0) + 1
        steps.append(threading.get_ident())
        if here.steps == 2:
            held.set()
            stopping.wait(60)
            time.sleep(0.3)  # until the pool is told
        return real(*rest)

    monkeypatch.setattr(healing, "_heal_one", step)
    told = []

    def stop() -> bool:
        told.append(0)
        if len(told) == 3:  # the short plan has ended
            held.wait(60)
            stopping.set()
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(screens, "num_at_once", lambda *_: 2)
    plans = [FoldPlan.parse(text, NUM_BLOCKS) for text in ("1-4", "0 2-4", "0-3", "0-1 3-4")]
    with pytest.raises(KeyboardInterrupt):
        list(screen_of(tmp_path).measure_each(plans, stop))
    assert sorted(map(steps.count, set(steps))) == [1, 2]  # "0-3" has one position to solve, "1-4" four
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_a_plan_without_finite_figures_is_told_as_none(tmp_path, monkeypatch):
    screen, plans = screen_of(tmp_path), [FoldPlan.parse(text, NUM_BLOCKS) for text in PLANS[:3]]
    real = screen.measure

    def measure(plan, progress):
        if plan == plans[0]:
            raise ModelError("a state is no finite number")
        quality = real(plan, progress)
        return replace(quality, kl=float("nan")) if plan == plans[1] else quality

    monkeypatch.setattr(screen, "measure", measure)
    found = dict(screen.measure_each(plans, lambda: False))
    assert [found[plan] is None for plan in plans] == [True, True, False]


def test_how_many_at_once():
    assert screens.num_at_once("cpu", 2, 8) == 2
    assert screens.num_at_once("cpu", 1, 8) == screens.num_at_once("cuda", 16, 8) == 1
    assert screens.num_at_once("cpu", 64, 8) == screens.MOST_AT_ONCE
    assert screens.num_at_once("cpu", 64, 2) == 2
