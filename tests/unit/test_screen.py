"""Screening gives the figures that building, healing and judging each plan by itself gives."""

from __future__ import annotations

import pytest
import torch

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
        heal(model, states, text)
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
        assert solved == computed
        assert found.blocks == expected.blocks
        assert found.values.keys() == expected.values.keys()
        assert all(torch.equal(found.values[key], value) for key, value in expected.values.items())
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
    """The kernel form of ridge regression has the solution of the normal equations; here both are solved."""
    generator = torch.Generator().manual_seed(0)
    features_MF, wanted_MD = (torch.randn(40, size, generator=generator) for size in (64, 8))
    if bias:
        features_MF[:, -1] = 1.0
    weight_M1 = torch.rand(40, 1, generator=generator)

    class Writer:
        has_bias, device, norm = bias, torch.device("cpu"), None

    tokens, moments = Tokens(Writer()), Moments(Writer())
    for part, here in (("fitted", slice(0, 15)), ("fitted", slice(15, 25)), ("held out", slice(25, 40))):
        for sums in (tokens, moments):
            sums.add(part, features_MF[here], wanted_MD[here], weight_M1[here])
    # both round products of features to float32: a relative 1e-6, which the least ridge here raises a hundredfold
    close = {"rtol": 1e-3, "atol": 1e-5}
    for parts in (("fitted",), ("fitted", "held out")):
        torch.testing.assert_close(*(sums.solved(ridge, parts) for sums in (tokens, moments)), **close)
    assert tokens.square == pytest.approx(moments.square)
    left_MD = wanted_MD[25:] - features_MF[25:] @ moments.solved(ridge, ("fitted",))
    assert tokens.error(ridge) == pytest.approx(
        float((left_MD.square() * weight_M1[25:]).sum() / 15), rel=1e-3
    )


def test_threads_are_chosen_by_what_a_position_takes(monkeypatch):
    """Oracle: a clock that one thread moves by 1 a position, and four by 3, and then the other way round."""
    now, cost = [0.0], {1: 1.0, 4: 3.0}
    used: list[int] = []
    monkeypatch.setattr(screens.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(screens.torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(screens.torch, "set_num_threads", used.append)

    class Fake:
        num_steps = 0

    fake, threads = Fake(), screens.Threads()

    def measure(steps: int) -> int:
        with threads.measuring(fake):
            choice = used[-1]
            fake.num_steps += steps
            now[0] += steps * cost[choice]
        assert used[-1] == 4  # as it was
        return choice

    assert sorted(measure(steps) for steps in (3, 5, 2, 7)) == [1, 1, 4, 4]
    assert {measure(5) for _ in range(screens.PROBED_AGAIN - 4)} == {1}
    cost.update({1: 3.0, 4: 1.0})  # another program ended
    for _ in range(2 * screens.PROBED):
        measure(5)
    assert {measure(5) for _ in range(10)} == {4}
    measure(0)  # nothing was computed: nothing is learnt
