"""Proposals become lawful plans, and are never priced above them.

Oracles: FoldPlan's own laws (checked on construction), `price` of the real plan, and a brute-force count of slots.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldsearch.errors import PlanError
from foldsearch.plan.cost import BlockCost, Cost, CostTable, Target, UnitCost, price
from foldsearch.plan.kinds import kind_names
from foldsearch.plan.plan import FoldPlan, Replacement, Slot
from foldsearch.plan.proposal import (
    Proposal,
    fold_plan,
    lower_bound,
    neighbour,
    random_drop,
    stretches,
    uniform_drop,
)

small = st.integers(0, 1000)
NO_UNIT = UnitCost(0, 0, 0, 0, 0, 0)


@st.composite
def tables(draw: st.DrawFn, num_blocks: int) -> CostTable:
    """Tables whose blocks differ from each other, some with sliding windows."""
    attention = st.builds(
        UnitCost, small, small, small, small, small, small, kv_width=small, window=st.sampled_from([0, 4, 64])
    )
    mlp = st.builds(UnitCost, small, small, small, small, st.just(0), small)
    blocks = tuple(BlockCost(draw(attention), draw(mlp), draw(small)) for _ in range(num_blocks))
    return CostTable(8, draw(small), draw(small), draw(small), draw(small), draw(small), draw(small), blocks)


@st.composite
def proposals(draw: st.DrawFn, num_blocks: int) -> Proposal:
    criterion = draw(st.sampled_from(["gate", "block_influence", "window", "greedy"]))
    fate = draw(st.sampled_from(["drop", "share", "replace"]))
    kinds = st.sampled_from(kind_names())
    num_removed = draw(st.integers(0, num_blocks - 1))
    return Proposal(
        criterion=criterion,  # type: ignore[arg-type]
        num_removed=num_removed,
        gate_eps=0.1 if criterion == "gate" else None,
        fate=fate,  # type: ignore[arg-type]
        replacement=draw(kinds) if fate == "replace" else None,  # type: ignore[arg-type]
        attention_removed=draw(st.integers(0, num_blocks - num_removed - 1)),
        group_size=draw(st.integers(1, num_blocks + 1)),
        group_start=draw(st.integers(0, num_blocks + 1)),
        num_groups=0 if fate == "share" else draw(st.integers(0, num_blocks)),
        adapter_rank=draw(st.integers(0, 4)),
    )


@st.composite
def lawful_plans(draw: st.DrawFn, num_blocks: int) -> FoldPlan:
    """Plans that several random moves lead to, some with a replacement or a repeat in them."""
    words = [str(block) for block in range(num_blocks)]
    if num_blocks > 3 and draw(st.booleans()):
        words[1:3] = ["1-2~linear"]
    if draw(st.booleans()):
        words.append("0=0+r2")
    plan = FoldPlan.parse(" ".join(words), num_blocks)
    rng = random.Random(draw(st.integers(0, 10**6)))
    for _ in range(draw(st.integers(0, 8))):
        plan = neighbour(plan, rng) or plan
    return plan


@given(st.data(), st.integers(1, 12))
def test_a_proposal_gives_a_lawful_plan_and_never_overprices_it(data: st.DataObject, num_blocks: int) -> None:
    proposal = data.draw(proposals(num_blocks))
    table = data.draw(tables(num_blocks))
    target = Target(
        dtype=data.draw(st.sampled_from(["float32", "bfloat16"])),
        context=data.draw(st.sampled_from([1, 32, 2048])),
        batch=data.draw(st.integers(1, 3)),
        shares_weights=data.draw(st.booleans()),
    )
    order = data.draw(st.permutations(range(num_blocks)))
    removed, kept = order[: proposal.num_removed], order[proposal.num_removed :]
    bases = {block: data.draw(st.sampled_from(kept)) for block in removed}
    thin = data.draw(st.permutations(range(num_blocks)))
    plan = fold_plan(removed, proposal, num_blocks, bases=bases, attention_order=thin)
    slots = [slot for slot in plan.slots if isinstance(slot, Slot)]
    if proposal.fate == "drop":
        assert set(plan.dropped) == set(removed)
    elif proposal.fate == "share":
        assert {slot.home: slot.mlp for slot in slots if slot.home in bases} == bases
        assert not plan.dropped
    else:
        assert {slot.home for slot in slots} == set(kept)
        assert not plan.dropped
    halves = [slot.home for slot in slots if slot.attention is None]
    assert len(halves) <= proposal.attention_removed
    assert halves == sorted(sorted(halves, key=thin.index)[: proposal.attention_removed])
    bound, exact = lower_bound(proposal, table, target), price(plan, table, target)
    for field in fields(Cost):
        assert getattr(bound, field.name) <= getattr(exact, field.name), field.name


@given(st.data(), st.integers(1, 12))
def test_the_bound_is_exact_where_all_blocks_cost_the_same(data: st.DataObject, num_blocks: int) -> None:
    block = BlockCost(UnitCost(90, 9, 7, 80, 3, 5, kv_width=4), UnitCost(120, 8, 6, 110, 0, 4), 2)
    table = CostTable(8, 1, 2, 3, 4, 5, 6, (block,) * num_blocks)
    proposal = replace(data.draw(proposals(num_blocks)), attention_removed=0)
    if proposal.replacement == "layer":  # its KV cache is left out of the bound
        proposal = replace(proposal, replacement="linear")
    removed = range(proposal.num_removed)
    plan = fold_plan(removed, proposal, num_blocks, bases=dict.fromkeys(removed, num_blocks - 1))
    assert lower_bound(proposal, table, Target()) == price(plan, table, Target())


def test_groups_are_read_off_the_retained_blocks() -> None:
    proposal = Proposal("greedy", num_removed=3, group_size=3, group_start=1, num_groups=2, adapter_rank=4)
    assert str(fold_plan([2, 5, 6], proposal, 10)) == "0-1 3=1+r4+n 4=1+r4+n 7 8=7+r4+n 9=7+r4+n"
    cut = replace(proposal, num_removed=4)
    assert str(fold_plan([2, 5, 6, 9], cut, 10)) == "0-1 3=1+r4+n 4=1+r4+n 7 8=7+r4+n"
    assert str(fold_plan([2, 5, 6], replace(proposal, num_groups=0), 10)) == "0-1 3-4 7-9"


def test_removed_blocks_come_back_as_children_or_give_way_to_networks() -> None:
    shared = Proposal("window", num_removed=3, fate="share", adapter_rank=4)
    bases = {2: 1, 5: 7, 6: 7}
    assert str(fold_plan([2, 5, 6], shared, 9, bases=bases)) == "0-1 2=1+r4+n 3-4 5=7+r4+n 6=7+r4+n 7-8"
    replaced = Proposal("window", num_removed=3, fate="replace", replacement="ffn")
    assert str(fold_plan([2, 5, 6], replaced, 9)) == "0-1 2~ffn 3-4 5-6~ffn 7-8"
    thin = replace(shared, attention_removed=2)  # 7 owns and 6 is a child: they are passed over
    plan = fold_plan([2, 5, 6], thin, 9, bases=bases, attention_order=[7, 6, 4, 8, 0])
    assert str(plan) == "0-1 2=1+r4+n 3 4m 5=7+r4+n 6=7+r4+n 7 8m"
    assert list(stretches([7, 2, 3, 9, 8])) == [(2, 3), (7, 9)]


def test_a_given_plan_is_the_plan() -> None:
    plan = FoldPlan.parse("0 1=0 2", 4)
    proposal = Proposal("given", plan=plan, origin="hand")
    table = CostTable(8, 1, 2, 3, 4, 5, 6, (BlockCost(NO_UNIT, NO_UNIT),) * 4)
    assert fold_plan([], proposal, 4) == plan
    assert lower_bound(proposal, table, Target()) == price(plan, table, Target())


@given(st.data(), st.integers(1, 12))
def test_json_round_trip(data: st.DataObject, num_blocks: int) -> None:
    for proposal in (
        data.draw(proposals(num_blocks)),
        Proposal("given", plan=data.draw(lawful_plans(num_blocks)), origin="neighbour"),
    ):
        assert Proposal.from_json(json.loads(json.dumps(proposal.to_json()))) == proposal


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"criterion": "given"}, "exactly when its criterion is 'given'"),
        ({"criterion": "gate"}, "gate_eps"),
        ({"criterion": "window", "gate_eps": 0.1}, "gate_eps"),
        ({"criterion": "window", "fate": "share", "num_groups": 1}, "has no groups"),
        ({"criterion": "window", "fate": "replace"}, "exactly when its fate is 'replace'"),
        ({"criterion": "window", "fate": "burn"}, "one of drop, share, replace"),
        ({"criterion": "window", "num_removed": -1}, "num_removed is 0 or more, got -1"),
        ({"criterion": "window", "learning_rate": 0.0}, "positive number"),
        ({"criterion": "none", "num_removed": 1}, "names what ranks the blocks"),
    ],
)
def test_proposals_that_say_two_things_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Proposal(**arguments)  # type: ignore[arg-type]


def test_a_bound_needs_a_block_and_an_attention() -> None:
    table = CostTable(8, 1, 2, 3, 4, 5, 6, (BlockCost(NO_UNIT, NO_UNIT),) * 4)
    with pytest.raises(PlanError, match="Keep one"):
        lower_bound(Proposal("window", num_removed=4), table, Target())
    blind = Proposal("window", num_removed=1, attention_removed=3)
    words = "3 of the 3 blocks that are kept lose their attention. Leave one"
    with pytest.raises(PlanError, match=words):
        lower_bound(blind, table, Target())
    with pytest.raises(PlanError, match=words):
        fold_plan([2], blind, 4, attention_order=range(4))


# ---- equal proposals ask for the same thing


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # adapters: nothing that is dropped or replaced carries one
        ({"num_removed": 2, "adapter_start": "zero", "adapter_rank": 8}, {"num_removed": 2}),
        (
            {"num_removed": 2, "fate": "replace", "replacement": "linear", "adapter_start": "data"},
            {"num_removed": 2, "fate": "replace", "replacement": "linear", "adapter_start": "svd"},
        ),
        (
            {"num_removed": 2, "fate": "share", "adapter_rank": 0, "adapter_start": "zero"},
            {"num_removed": 2, "fate": "share", "adapter_start": "svd"},
        ),
        # groups: none of them, or groups of one block
        ({"num_removed": 2, "group_size": 3, "group_start": 4}, {"num_removed": 2}),
        ({"num_removed": 2, "num_groups": 3, "group_start": 4, "adapter_rank": 8}, {"num_removed": 2}),
        # nothing is removed: no fate, and nothing to rank
        (
            {"fate": "replace", "replacement": "ffn", "attention_removed": 1},
            {"criterion": "gate", "gate_eps": 0.5, "attention_removed": 1},
        ),
        ({"fate": "share", "adapter_rank": 4, "attention_removed": 1}, {"attention_removed": 1}),
        # a plan says it all
        (
            {
                "criterion": "given",
                "plan": FoldPlan.parse("0 2", 4),
                "num_removed": 2,
                "adapter_start": "zero",
            },
            {"criterion": "given", "plan": FoldPlan.parse("0 2", 4)},
        ),
    ],
)
def test_what_a_proposal_does_not_use_makes_it_no_other(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = (Proposal(**{"criterion": "window", **arguments}) for arguments in (one, other))
    assert first == second
    if first.plan is None:
        removed = range(first.num_removed)
        bases = dict.fromkeys(removed, 5)
        plans = [
            fold_plan(removed, proposal, 6, bases=bases, attention_order=range(6))
            for proposal in (first, second)
        ]
        assert plans[0] == plans[1]


def test_what_a_proposal_uses_makes_it_another() -> None:
    child = Proposal("window", 2, fate="share", adapter_rank=4, adapter_start="zero")
    grouped = Proposal("window", 2, num_groups=1, group_size=2, adapter_rank=4)
    given = Proposal("given", plan=FoldPlan.parse("0 1=0+r4", 4), adapter_start="data")
    for proposal in (child, grouped, given):
        assert proposal.adapter_start is not None
        assert proposal != replace(proposal, adapter_start="svd" if proposal != grouped else "zero")
    norms = replace(child, adapter_rank=0)  # without adapters, "data" still starts the output norms
    assert norms != replace(norms, adapter_start="data")
    assert child != replace(child, adapter_rank=8)
    assert grouped != replace(grouped, group_start=1)
    assert child != replace(child, criterion="greedy")


# ---- blocks that nothing was asked about


@pytest.mark.parametrize(
    ("count", "num_blocks", "expected"),
    [
        (1, 5, (2,)),
        (2, 6, (2, 4)),
        (3, 5, (1, 2, 3)),
        (3, 11, (2, 5, 8)),
        (4, 10, (2, 4, 6, 8)),
        (6, 30, (3, 8, 12, 17, 22, 26)),  # 1 + 2.3, 7, 11.7, 16.3, 21, 25.7
        (4, 5, (1, 2, 3, 4)),  # the last one goes where it must
        (1, 2, (1,)),
    ],
)
def test_uniform_drops_by_hand(count: int, num_blocks: int, expected: tuple[int, ...]) -> None:
    assert uniform_drop(count, num_blocks) == expected


@given(st.integers(3, 60), st.data())
def test_uniform_drops_keep_both_ends_and_even_distances(num_blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_blocks - 2))
    dropped = uniform_drop(count, num_blocks)
    assert len(set(dropped)) == count
    assert dropped[0] > 0
    assert dropped[-1] < num_blocks - 1
    distances = {b - a for a, b in pairwise(dropped)}
    assert len(distances) <= 2
    assert max(distances, default=0) - min(distances, default=0) <= 1


def test_random_drops_are_even_and_of_the_seed() -> None:
    assert random_drop(4, 9, 3) == random_drop(4, 9, 3)
    drawn = Counter(random_drop(2, 4, seed) for seed in range(1200))
    assert set(drawn) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert all(150 < times < 250 for times in drawn.values())


@pytest.mark.parametrize(("count", "num_blocks"), [(0, 5), (5, 5), (1, 1), (-1, 5)])
def test_drops_leave_a_block(count: int, num_blocks: int) -> None:
    for drop in (uniform_drop, lambda *counts: random_drop(*counts, seed=0)):
        with pytest.raises(PlanError, match=f"from 1 to {num_blocks - 1} of"):
            drop(count, num_blocks)


# ---- neighbours


def difference(a: FoldPlan, b: FoldPlan) -> int:
    """Slots that are not the same in both plans, by home block and occurrence; a replacement counts once."""

    def states(plan: FoldPlan) -> dict[tuple[object, ...], object]:
        found: dict[tuple[object, ...], object] = {}
        for slot in plan.slots:
            name = slot.home if isinstance(slot, Slot) else f"replacement {slot.first}"
            found[name, sum(key[0] == name for key in found)] = slot
        return found

    left, right = states(a), states(b)
    return sum(left.get(key) != right.get(key) for key in left.keys() | right.keys())


@settings(max_examples=200)
@given(st.data(), st.integers(1, 12), st.integers(0, 10**6))
def test_a_neighbour_is_one_or_two_slots_away(data: st.DataObject, num_blocks: int, seed: int) -> None:
    plan = data.draw(lawful_plans(num_blocks))
    moved = neighbour(plan, random.Random(seed))
    if moved is None:
        assert plan == FoldPlan.parse("0~layer", 1)
        return
    assert moved != plan
    assert moved.num_blocks == num_blocks
    assert 1 <= difference(plan, moved) <= 2


@pytest.mark.parametrize("text", ["0", "0a", "0 0=0", "0 0=0+r1"])
def test_a_model_of_one_block_has_neighbours_too(text: str) -> None:
    plan = FoldPlan.parse(text, 1)
    for seed in range(20):
        moved = neighbour(plan, random.Random(seed))
        assert moved is not None
        assert moved != plan


def test_a_plan_that_nothing_lawful_is_near_has_no_neighbour() -> None:
    """The only block is replaced, and every other kind of network is without attention."""
    assert neighbour(FoldPlan.parse("0~layer", 1), random.Random(0)) is None


def test_most_neighbours_keep_the_count_and_all_kinds_occur() -> None:
    plan = FoldPlan.parse("0-4 5=4+r8+n 6-9 11-12 14a 15-19", 20)
    moved = [other for seed in range(400) if (other := neighbour(plan, random.Random(seed))) is not None]
    assert len(moved) == 400
    assert sum(other.depth == plan.depth for other in moved) > 200
    assert any(slot.rank == 16 for other in moved for slot in other.slots if isinstance(slot, Slot))
    assert {len(other.dropped) for other in moved} == {1, 2, 3}
    assert any("+n" not in str(other) for other in moved)
    assert any(str(other).count("+n") == 2 for other in moved)
    assert all(not isinstance(slot, Replacement) for other in moved for slot in other.slots)
