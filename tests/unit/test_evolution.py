"""Evolution over plans that only drop.

Oracles: models with blocks that are made exact identities, all plans of a count measured one by one, tokens counted by
hand and by what reaches `judge`, and the count law over any plan that only drops.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foldsearch.codec import from_json, to_json
from foldsearch.errors import InputError, PlanError
from foldsearch.model import evolution
from foldsearch.model.evolution import EvolutionResult, EvolutionSettings, evolve, mutate
from foldsearch.model.fold import fold
from foldsearch.model.judge import ask_dense, judge
from foldsearch.plan.plan import FoldPlan, Slot
from tests.tiny import NUM_BLOCKS, dense_model, token_set
from tests.tolerances import NO_KL

TOKENS = token_set(sequences=6, length=16)
ALL = TOKENS.num_tokens
DENSE = dense_model("llama")
TARGETS = ask_dense(DENSE, TOKENS)


def dropping(*blocks: int) -> FoldPlan:
    return FoldPlan.dropping(blocks, NUM_BLOCKS)


def kl_of(plan: FoldPlan) -> float:
    return judge(fold(DENSE, plan), TOKENS, TARGETS).kl


def planted(name: str, attentions: set[int], mlps: set[int]):
    """A copy whose units at these blocks add nothing to the residual stream."""
    model = copy.deepcopy(dense_model(name))
    with torch.no_grad():
        for block in attentions:
            model.model.layers[block].self_attn.o_proj.weight.zero_()
        for block in mlps:
            model.model.layers[block].mlp.down_proj.weight.zero_()
    return model


@st.composite
def drops(draw: st.DrawFn) -> FoldPlan:
    """Any plan that only drops."""
    num_blocks = draw(st.integers(1, 9))
    kept = [draw(st.sets(st.integers(0, num_blocks - 1))) for _ in range(2)]
    assume(kept[0])  # a plan attends somewhere
    slots = [Slot(b, *(b if b in unit else None for unit in kept)) for b in sorted(kept[0] | kept[1])]
    return FoldPlan(tuple(slots), num_blocks)


def owned(plan: FoldPlan) -> tuple[frozenset[int], frozenset[int]]:
    return plan.owners("attention"), plan.owners("mlp")


# ---- mutations


@given(drops(), st.booleans(), st.integers(0, 10**6))
def test_offspring_drop_as_many_attentions_and_mlps_as_their_parent(plan, units, seed):
    (attention, mlp), every = owned(plan), set(range(plan.num_blocks))
    whole = attention & mlp and every - attention - mlp
    single = any(unit and every - unit for unit in (attention, mlp))
    assume(whole or (units and single))
    child = mutate(plan, random.Random(seed), units=units)
    assert child.num_blocks == plan.num_blocks
    assert [len(unit) for unit in owned(child)] == [len(attention), len(mlp)]
    assert all(own for unit in ("attention", "mlp") for _, _, _, own in child.runs(unit))
    changed = [before ^ after for before, after in zip((attention, mlp), owned(child), strict=True)]
    assert all(len(unit) <= 6 for unit in changed)  # three swaps at most
    if not units:
        assert changed[0] == changed[1]  # blocks go and come back whole
        assert not changed[0] & (attention ^ mlp)  # and what was halved stays so


def test_of_a_hybrid_no_plan_is_found_in_which_no_block_attends():
    """Blocks 1 to 3 attend, so without them no model exists; evolution that begins there ends elsewhere."""
    dense, settings = dense_model("lfm2"), EvolutionSettings(generations=3, offspring=4)
    found = evolve(dense, TOKENS, ask_dense(dense, TOKENS), dropping(1, 2, 3), settings)
    assert set(found.plan.dropped) != {1, 2, 3}


def test_most_mutations_are_one_swap():
    """The lower of two even draws from 1, 2, 3 is 1 in 5 of 9 cases, 2 in 3, 3 in 1; few of many swaps undo another."""
    plan = FoldPlan.dropping(range(50, 100), 100)
    swaps = Counter(
        len(set(mutate(plan, random.Random(seed), units=False).dropped) - set(plan.dropped))
        for seed in range(900)
    )
    assert swaps[1] == pytest.approx(500, abs=50)
    assert swaps[2] == pytest.approx(300, abs=50)
    assert swaps[3] == pytest.approx(100, abs=40)


def test_units_are_swapped_alone_and_together():
    plan = FoldPlan.parse("0-3", 8)
    seen = [owned(mutate(plan, random.Random(seed), units=True)) for seed in range(100)]
    assert any(attention == {0, 1, 2, 3} != mlp for attention, mlp in seen)
    assert any(mlp == {0, 1, 2, 3} != attention for attention, mlp in seen)
    assert any(mlp == attention != {0, 1, 2, 3} for attention, mlp in seen)


# ---- what it finds


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_it_finds_the_blocks_that_do_nothing(name):
    dense = planted(name, {1, 3}, {1, 3})
    settings = EvolutionSettings(generations=12, offspring=4, tokens=(32, 64), survivors=(2, 1))
    found = evolve(dense, TOKENS, ask_dense(dense, TOKENS), dropping(0, 4), settings)
    assert found.history[0] > 0.1  # a bad start
    assert found.plan == dropping(1, 3)
    assert found.kl == pytest.approx(0, abs=NO_KL)


def test_it_finds_the_units_that_do_nothing():
    dense = planted("llama", {1, 4}, {0, 3})
    settings = EvolutionSettings(
        generations=30, offspring=6, tokens=(32, 64), survivors=(2, 1), units=True, seed=1
    )
    found = evolve(dense, TOKENS, ask_dense(dense, TOKENS), dropping(2, 3), settings)
    assert found.history[0] > 0.1
    assert str(found.plan) == "0a 1m 2 3a 4m"
    assert found.kl == pytest.approx(0, abs=NO_KL)


def test_it_finds_what_trying_every_plan_finds():
    plans = [dropping(*blocks) for blocks in itertools.combinations(range(NUM_BLOCKS), 2)]
    kls = {plan: kl_of(plan) for plan in plans}
    worst, best = max(plans, key=kls.__getitem__), min(plans, key=kls.__getitem__)
    settings = EvolutionSettings(generations=6, offspring=9, tokens=(ALL,), survivors=(1,))
    found = evolve(DENSE, TOKENS, TARGETS, worst, settings)
    assert found.plan == best
    assert found.kl == pytest.approx(kls[best], rel=1e-6)
    assert found.history[0] == pytest.approx(kls[worst], rel=1e-6)


@pytest.mark.parametrize("units", [False, True])
def test_with_all_tokens_it_never_gets_worse(units):
    settings = EvolutionSettings(generations=5, offspring=3, tokens=(ALL, ALL), survivors=(2, 1), units=units)
    for start in (dropping(2), dropping(0, 3, 4)):
        history = evolve(DENSE, TOKENS, TARGETS, start, settings).history
        assert list(history) == sorted(
            history, reverse=True
        )  # to the bit: the same sequences in the same order
        assert history[0] == kl_of(start)


def test_of_several_starts_the_best_becomes_the_parent():
    starts = [dropping(0), dropping(2), dropping(4), dropping(2)]
    settings = EvolutionSettings(generations=0, tokens=(ALL,), survivors=(1,))
    found = evolve(DENSE, TOKENS, TARGETS, starts, settings)
    assert found.plan == min(starts, key=kl_of)
    assert found.history == (found.kl,) == (min(map(kl_of, starts)),)
    assert found.evaluations == 3  # each once


# ---- how it measures


def test_tokens_are_counted_and_drawn_as_promised(monkeypatch):
    """By hand: a start on 5 sequences of 16, then 3 generations of 4 on 2 and of 2 survivors and the parent on 5."""
    seen: list[tuple[tuple[int, ...], str]] = []
    first_tokens = TOKENS.ids_NT[:, 0].tolist()
    assert len(set(first_tokens)) == len(first_tokens)  # a sequence is known by its first token

    def judged(model, part, targets):
        rows = tuple(first_tokens.index(token) for token in part.ids_NT[:, 0].tolist())
        assert torch.equal(part.ids_NT, TOKENS.ids_NT[list(rows)])
        assert torch.equal(part.document_N, TOKENS.document_N[list(rows)])
        assert torch.equal(targets.loss_NP, TARGETS.loss_NP[list(rows)])
        seen.append((rows, model.config.fold["plan"]))
        return judge(model, part, targets)

    monkeypatch.setattr(evolution, "judge", judged)
    settings = EvolutionSettings(generations=3, offspring=4, tokens=(40, 80), survivors=(2, 1))
    found = evolve(DENSE, TOKENS, TARGETS, dropping(1, 2), settings)
    assert found.evaluations == len(seen) == 1 + 3 * (4 + 3)
    assert found.tokens == sum(len(rows) * 16 for rows, _ in seen) == 80 + 3 * (4 * 32 + 3 * 80)
    draws = []
    for generation in range(3):
        few, many = seen[1 + 7 * generation :][:4], seen[5 + 7 * generation :][:3]
        assert len({rows for rows, _ in few}) == len({rows for rows, _ in many}) == 1
        assert {plan for _, plan in many[1:]} < {plan for _, plan in few}  # survivors
        assert many[0][1] not in {plan for _, plan in few}  # the parent
        assert len({plan for _, plan in few}) == 4
        draws += [few[0][0], many[0][0]]
    assert [len(rows) for rows in draws] == [2, 5] * 3
    assert len(set(draws[::2])) > 1  # another draw a generation
    assert all(len(set(rows)) == len(rows) for rows in draws)


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (31, 1), (32, 2), (10**6, 6)])
def test_a_stage_takes_whole_sequences(tokens, sequences):
    settings = EvolutionSettings(generations=0, tokens=(tokens,), survivors=(1,))
    assert evolve(DENSE, TOKENS, TARGETS, dropping(1), settings).tokens == sequences * 16


def test_the_same_seed_gives_the_same_bits():
    settings = EvolutionSettings(generations=3, offspring=3, tokens=(16, 48), survivors=(2, 1), units=True)
    random.seed(1)
    torch.manual_seed(1)
    first = evolve(DENSE, TOKENS, TARGETS, dropping(0, 2), settings)
    random.seed(2)
    torch.manual_seed(2)
    second = evolve(DENSE, TOKENS, TARGETS, dropping(0, 2), settings)
    assert first == second
    assert first.history[-1] == first.kl
    other = EvolutionSettings(**{**asdict(settings), "seed": 1})
    assert evolve(DENSE, TOKENS, TARGETS, dropping(0, 2), other).history != first.history
    assert from_json(EvolutionResult, json.loads(json.dumps(to_json(first)))) == first


def test_fewer_plans_than_offspring_is_no_trouble():
    """A model of five blocks has four other plans that keep one; each is measured once."""
    seen: list[tuple[int, int]] = []
    settings = EvolutionSettings(generations=2, offspring=50, tokens=(ALL,), survivors=(1,))
    keep_one = FoldPlan.parse("2", NUM_BLOCKS)
    found = evolve(DENSE, TOKENS, TARGETS, keep_one, settings, progress=lambda *at: seen.append(at))
    assert found.evaluations == 1 + 2 * (4 + 1)
    assert seen == [(1, 2), (2, 2)]


def test_the_model_is_as_it_was():
    before = {name: value.clone() for name, value in DENSE.state_dict().items()}
    evolve(DENSE, TOKENS, TARGETS, dropping(0), EvolutionSettings(generations=1, offspring=2))
    assert all(torch.equal(value, before[name]) for name, value in DENSE.state_dict().items())


def test_what_is_no_finite_number_is_worst(monkeypatch):
    def judged(model, part, targets):
        found = judge(model, part, targets)
        broken = model.config.fold["plan"] == str(dropping(2))
        return (
            type(found)(**{**{n: getattr(found, n) for n in found.__slots__}, "kl": float("nan")})
            if broken
            else found
        )

    monkeypatch.setattr(evolution, "judge", judged)
    settings = EvolutionSettings(generations=0, tokens=(ALL,), survivors=(1,))
    found = evolve(DENSE, TOKENS, TARGETS, [dropping(2), dropping(0)], settings)
    assert found.plan == dropping(0)


# ---- what it refuses


@pytest.mark.parametrize(
    ("texts", "units", "words"),
    [
        ([], False, "at least one plan"),
        (["0-4"], False, "From 1 to 4"),
        (["0-4"], True, "leaves nothing to swap"),
        (["0-3 4a"], False, "swaps whole blocks"),
        (["0 1=0 3-4"], True, "only drops"),
        (["0-3 3=3"], True, "only drops"),
        (["0 1-2~linear 3-4"], False, "only drops"),
        (["0-3", "0-2"], False, "keeps the count"),
        (["0-3", "0-2 3a 4a"], True, "keeps the count"),
    ],
)
def test_starts_that_cannot_be(texts, units, words):
    starts = [FoldPlan.parse(text, NUM_BLOCKS) for text in texts]
    with pytest.raises(InputError, match=words):
        evolve(DENSE, TOKENS, TARGETS, starts, EvolutionSettings(units=units))


def test_a_plan_of_another_model_is_refused():
    with pytest.raises(PlanError, match="9 blocks"):
        evolve(DENSE, TOKENS, TARGETS, FoldPlan.dropping([1], 9), EvolutionSettings())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"generations": -1}, "0 generations or more"),
        ({"offspring": 0}, "at least 1 offspring"),
        ({"tokens": (512,)}, "same length"),
        ({"tokens": (), "survivors": ()}, "same length"),
        ({"tokens": (0, 512)}, "at least the tokens"),
        ({"tokens": (2048, 512)}, "at least the tokens"),
        ({"survivors": (1, 2)}, "last one keeps 1"),
        ({"survivors": (4, 2)}, "last one keeps 1"),
    ],
)
def test_settings_that_cannot_be(arguments, words):
    with pytest.raises(InputError, match=words):
        EvolutionSettings(**arguments)


def test_too_little_text_is_refused():
    tokens = token_set(sequences=1, length=1)
    with pytest.raises(InputError, match=r"\(sequences, positions\)"):
        evolve(DENSE, tokens, TARGETS, dropping(1), EvolutionSettings())
