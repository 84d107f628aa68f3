"""Extension: which blocks run again, and that an extended model starts at the base model.

Oracles: plans written by hand, laws of counting, the price of the dense model, the dense model's own logits, and the
distance between parameters before and after training.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from foldsearch.errors import PlanError
from foldsearch.model.children import start_adapters
from foldsearch.model.fold import fold
from foldsearch.model.judge import ask_dense, judge
from foldsearch.model.parts import GAMMA_START, OutputNorm
from foldsearch.model.recover import Recovery
from foldsearch.model.starts import new_values
from foldsearch.model.training import RecoveryTraining
from foldsearch.plan.cost import Target, price
from foldsearch.plan.extend import DEFAULT_RANK, PATTERNS, extended, rank_of
from foldsearch.plan.plan import UNITS, AdapterStart, FoldPlan, Replacement, Slot
from tests.strategies import plans, tables
from tests.tiny import NUM_BLOCKS, SHARING, dense_model, token_set

# ---- which blocks run again


@pytest.mark.parametrize(
    ("pattern", "depth", "text"),
    [
        ("block", 6, "0-1 1=1+n 2-4"),
        ("block", 7, "0-1 1=1+n 2 2=2+n 3-4"),
        ("block", 8, "0-1 1=1+n 2 2=2+n 3 3=3+n 4"),
        ("block", 9, "0-1 1=1+n 1=1+n 2 2=2+n 3 3=3+n 4"),
        ("block", 11, "0-1 1=1+n 1=1+n 2 2=2+n 2=2+n 3 3=3+n 3=3+n 4"),
        ("sequential", 6, "0-3 1=1+n 4"),
        ("sequential", 7, "0-3 1=1+n 2=2+n 4"),
        ("sequential", 8, "0-3 1=1+n 2=2+n 3=3+n 4"),
        ("sequential", 9, "0-3 1=1+n 2=2+n 3=3+n 1=1+n 4"),
        ("sequential", 11, "0-3 1=1+n 2=2+n 3=3+n 1=1+n 2=2+n 3=3+n 4"),
    ],
)
def test_patterns(pattern, depth, text):
    assert str(extended(FoldPlan.identity(5), 1, 3, depth, pattern)) == text


def test_every_repeat_has_its_own_adapter_and_norm():
    assert str(extended(FoldPlan.identity(3), 2, 2, 5, rank=36)) == "0-2 2=2+r36+n 2=2+r36+n"
    assert str(extended(FoldPlan.identity(2), 0, 1, 4, "sequential", 3)) == "0-1 0=0+r3+n 1=1+r3+n"


def test_thirty_blocks():
    """The example of the help: sixteen blocks once more, or six of them."""
    once = extended(FoldPlan.identity(30), 3, 18, 46, "block", 36)
    assert str(once).startswith("0-3 3=3+r36+n 4 4=4+r36+n 5 ")
    assert str(once).endswith(" 18 18=18+r36+n 19-29")
    some = extended(FoldPlan.identity(30), 3, 18, 36, "sequential", 36)
    assert str(some) == "0-18 3=3+r36+n 4=4+r36+n 5=5+r36+n 6=6+r36+n 7=7+r36+n 8=8+r36+n 19-29"


def test_a_plan_can_be_extended_too():
    """Dropped blocks, children and replacements outside the run stay as they are."""
    plan = FoldPlan.parse("0 2-3 4=3 5a 7-8~linear 9", 10)
    assert str(extended(plan, 2, 3, 9)) == "0 2 2=2+n 3 3=3+n 4=3 5a 7-8~linear 9"
    assert str(extended(plan, 2, 3, 8, "sequential")) == "0 2-3 2=2+n 4=3 5a 7-8~linear 9"


@st.composite
def extensions(draw):
    base = draw(st.one_of(plans(repeats=False), st.integers(1, 8).map(FoldPlan.identity)))
    whole = [slot.home for slot in base.slots if isinstance(slot, Slot) and slot == Slot(*[slot.home] * 3)]
    assume(whole)
    first = last = draw(st.sampled_from(whole))
    while last + 1 in whole and draw(st.booleans()):
        last += 1
    depth = base.depth + draw(st.integers(1, 20))
    pattern, rank = draw(st.sampled_from(PATTERNS)), draw(st.integers(0, 5))
    return base, first, last, pattern, rank, extended(
        base, first, last, depth, pattern, rank
    ), depth  # fmt: skip


@given(extensions())
def test_laws(drawn):
    base, first, last, pattern, rank, plan, depth = drawn
    assert plan.depth == depth
    assert FoldPlan.parse(str(plan), plan.num_blocks) == plan
    assert all(plan.owners(unit) == base.owners(unit) for unit in UNITS)
    assert plan.dropped == base.dropped
    seen, once, repeats = set(), [], []
    for slot in plan.slots:
        repeat = isinstance(slot, Slot) and slot.home in seen
        (repeats if repeat else once).append(slot)
        if isinstance(slot, Slot):
            seen.add(slot.home)
    assert tuple(once) == base.slots  # first occurrences, in order
    assert set(repeats) <= {Slot(b, b, b, rank, True) for b in range(first, last + 1)}
    counts = Counter(slot.home for slot in repeats)
    by_block = [counts[block] for block in range(first, last + 1)]
    assert sorted(by_block, reverse=True) == by_block
    assert by_block[0] - by_block[-1] <= 1
    homes = [None if isinstance(slot, Replacement) else slot.home for slot in plan.slots]
    start = homes.index(first)
    run = homes[start : start + sum(by_block) + len(by_block)]
    assert run == (
        sorted(run) if pattern == "block" else [first + i % len(by_block) for i in range(len(run))]
    )


@given(st.data())
def test_an_extension_stores_norms_and_what_is_carried_only(data):
    """Of a repeat: its norms and other parameters, copied; its adapters and γ; no linear again."""
    drawn = data.draw(extensions())
    base, rank, plan = drawn[0], drawn[4], drawn[5]
    table = data.draw(tables(base.num_blocks))
    target = Target("float32", context=data.draw(st.integers(1, 300)))
    before, after = price(base, table, target), price(plan, table, target)
    added = Counter(slot.home for slot in plan.slots if isinstance(slot, Slot)) - Counter(
        slot.home for slot in base.slots if isinstance(slot, Slot)
    )
    copied = carried = 0
    for block, times in added.items():
        cost = table.blocks[block]
        for unit in (cost.attention, cost.mlp):
            copied += times * unit.norms
            carried += times * (rank * unit.adapter_width + unit.output_norm)
        copied += times * cost.other
    assert after.weight_bytes - before.weight_bytes == 4 * copied
    assert after.adapter_bytes - before.adapter_bytes == 4 * carried
    assert after.kv_bytes >= before.kv_bytes
    assert after.decode_macs >= before.decode_macs


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ((5, 1, 3, 5), "an extension runs more positions than before: more than 5, got 5. Raise it"),
        ((5, 1, 3, 0), "more than 5, got 0"),
        ((5, 1, 3, 10**12), "an extension runs at most 10,000 positions, got 1,000,000,000,000. Lower it."),
        ((5, 3, 1, 8), "first before last: blocks go from 0 to 4, got 3-1."),
        ((5, 1, 5, 8), "blocks go from 0 to 4, got 1-5."),
        ((5, -1, 3, 8), "blocks go from 0 to 4, got -1-3."),
        ((5, 1, 3, 8, "zigzag"), "an extension's pattern is one of block, sequential, got 'zigzag'."),
        ((5, 1, 3, 8, "block", -1), "an adapter's rank is 0 or more, got -1."),
        ((0, 0, 0, 1), "a model has at least one block"),
    ],
)
def test_refusals(given_, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        extended(FoldPlan.identity(given_[0]), *given_[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-2 2=2 3-4", "only a plan without repeats can be extended, but '0-2 2=2 3-4' repeats blocks [2] already."),
        ("0 2-4", "a repeated block runs its own attention and MLP, but blocks [1] of 1-3 do not in '0 2-4'."),
        ("0-1 2=1 3a 4", "but blocks [2, 3] of 1-3 do not"),
        ("0-1 2-3~ffn 4", "but blocks [2, 3] of 1-3 do not"),
    ],
)  # fmt: skip
def test_refusals_of_plans(text, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        extended(FoldPlan.parse(text, 5), 1, 3, 9)


def test_a_rank_is_a_number_or_a_share_of_the_width():
    assert [rank_of(given_, 576) for given_ in (0, 1, 36, 576)] == [0, 1, 36, 576]
    assert [rank_of(given_, 576) for given_ in (DEFAULT_RANK, 1.0, 0.5, 1e-6)] == [36, 576, 288, 1]
    for wrong in (-1, 577, 0.0, -0.5, 1.5, float("nan"), float("inf")):
        with pytest.raises(
            PlanError, match=r"from 0 to the model's width, 576, or a share of it such as 0.0625"
        ):
            rank_of(wrong, 576)


# ---- where an extended model starts

TEXT = str(extended(FoldPlan.identity(NUM_BLOCKS), 1, 3, NUM_BLOCKS + 4, "block", 3))
TOKENS = token_set(sequences=8, length=20)


def started(text: str, start: AdapterStart, name: str = "llama") -> dict[str, torch.Tensor]:
    """What a folded model has beyond the dense one's tensors, after `start_adapters`."""
    model = fold(dense_model(name), FoldPlan.parse(text, NUM_BLOCKS))
    start_adapters(model, dense_model(name), TOKENS.ids_NT, start)
    return {key: value.clone() for key, value in new_values(model).items()}


@torch.no_grad()
def with_gamma(model: PreTrainedModel, gamma: float) -> PreTrainedModel:
    for part in model.modules():
        if isinstance(part, OutputNorm):
            part.gamma.fill_(gamma)
    return model


@pytest.mark.parametrize("start", ["zero", "svd", "data"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_repeats_keep_the_start_of_fold(name, start):
    """Nothing is to be approximated: the difference between a block and itself is zero."""
    values, as_folded = started(TEXT, start, name), started(TEXT, "zero", name)
    assert values.keys() == as_folded.keys()
    for key, value in values.items():
        assert torch.equal(value, as_folded[key]), key
        part = key.rpartition(".")[2]
        assert (part == "up") == (not value.any())
        assert part != "gamma" or value.eq(GAMMA_START).all()


@pytest.mark.parametrize("start", ["svd", "data"])
def test_other_children_beside_repeats_are_still_fitted(start):
    """Also a repeat that runs another block's weights: there is a difference. Its γ stays small all the same."""
    values = started("0-1 1=1+r3+n 2=1+r3+n 3 3=4+r3+n 4", start)
    for position, fitted in ((2, False), (3, True), (5, True)):
        ups = [value for key, value in values.items() if f"layers.{position}." in key and key.endswith(".up")]
        assert len(ups) == 7
        assert all(bool(up.any()) == fitted for up in ups)
        gammas = [v for key, v in values.items() if f"layers.{position}." in key and key.endswith("gamma")]
        assert len(gammas) == 2
        small = position != 3 or start == "svd"
        assert all(bool(gamma.eq(GAMMA_START).all()) == small for gamma in gammas)


@pytest.mark.parametrize("name", sorted(SHARING))
def test_without_gamma_an_extended_model_is_the_base_model(name):
    model = with_gamma(fold(dense_model(name), FoldPlan.parse(TEXT, NUM_BLOCKS)), 0.0)
    with torch.no_grad():
        ours, theirs = (
            one(input_ids=TOKENS.ids_NT, use_cache=False).logits for one in (model, dense_model(name))
        )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_an_extended_model_starts_near_the_base_model(name, pattern):
    """KL to the base model, nats per token, falls with γ; without output norms it is far."""
    targets = ask_dense(dense_model(name), TOKENS)

    def kl(text: str, gamma: float) -> float:
        model = fold(dense_model(name), FoldPlan.parse(text, NUM_BLOCKS))
        return judge(with_gamma(model, gamma), TOKENS, targets).kl

    text = str(extended(FoldPlan.identity(NUM_BLOCKS), 1, 3, NUM_BLOCKS + 3, pattern, 2))
    found = [kl(text, gamma) for gamma in (1.0, 0.1, GAMMA_START, 0.001)]
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.01
    assert kl(text.replace("+n", ""), 0.0) > 10 * found[2]
    assert abs(kl(text, 0.0)) < 1e-5


@pytest.mark.parametrize("start", ["svd", "data"])
def test_training_reaches_all_that_repeats_carry(start):
    model = fold(dense_model(), FoldPlan.parse(TEXT, NUM_BLOCKS))
    start_adapters(model, dense_model(), TOKENS.ids_NT, start)
    before = {key: value.clone() for key, value in new_values(model).items()}
    settings = RecoveryTraining(learning_rate=0.05, delta_rank=2, next_token=1.0, kl=0.0, tail=0.0)
    recovery = Recovery(model, settings, TOKENS, ask_dense(dense_model(), TOKENS), 400)
    recovery.train(400)
    for key, value in before.items():
        moved = (recovery.trained[key].detach() - value).abs().max()
        assert moved > 1e-4, key
