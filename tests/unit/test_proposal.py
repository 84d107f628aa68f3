"""Proposals become lawful plans, and are never priced above them.

Oracles: FoldPlan's own laws (checked on construction), `price` of the real plan, and a brute-force count of slots.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldsearch.bound import lower_bound
from foldsearch.criteria.random import random_blocks
from foldsearch.criteria.uniform import uniform_blocks
from foldsearch.errors import PlanError
from foldsearch.fates import Drop, Replace, Share
from foldsearch.fates.replace import runs
from foldsearch.model.training import Trained
from foldsearch.plan.cost import BlockCost, Cost, CostTable, Target, UnitCost, price
from foldsearch.plan.kinds import kind_names
from foldsearch.plan.latency import Latency, Line
from foldsearch.plan.neighbour import neighbour
from foldsearch.plan.plan import FoldPlan, Replacement, Slot
from foldsearch.proposal import Fold, Given, Groups, Proposal, RecoveryChoice, Removed, fold_plan
from tests.proposals import changed, count_of, removing

small = st.integers(0, 1000)
latencies = st.builds(
    Latency,
    st.just("folded"),
    st.just(""),
    st.integers(1, 300),
    *[st.builds(Line, small, small)] * 2,
    st.just(()),
    st.just("here"),
)
NO_UNIT = UnitCost(0, 0, 0, 0, 0, 0)


@st.composite
def tables(draw: st.DrawFn, num_blocks: int) -> CostTable:
    """Tables whose blocks differ from each other, some with sliding windows."""
    attention = st.builds(
        UnitCost, small, small, small, small, small, small, kv_width=small, window=st.sampled_from([0, 4, 64])
    )
    mlp = st.builds(UnitCost, small, small, small, small, st.just(0), small)
    blocks = tuple(BlockCost(draw(attention), draw(mlp), draw(small)) for _ in range(num_blocks))
    return CostTable(8, *(draw(small) for _ in range(6)), blocks, latencies=(draw(latencies),))


@st.composite
def proposals(draw: st.DrawFn, num_blocks: int) -> Proposal:
    """Folds in counts; what replaces blocks, children and groups among them."""
    fates = st.one_of(
        st.just(Drop()),
        st.builds(Share, st.integers(0, 4), st.sampled_from(["zero", "svd", "data"])),
        st.builds(Replace, st.sampled_from(kind_names())),
    )
    count, criterion = draw(st.integers(0, num_blocks - 1)), draw(st.sampled_from(["gate", "window"]))
    removed = Removed(criterion, count, draw(fates), 0.1 if criterion == "gate" else None) if count else None
    sizes = st.integers(0, num_blocks + 1)
    groups = st.builds(
        Groups, st.integers(1, num_blocks), sizes.map(lambda size: size + 2), sizes, st.integers(0, 4)
    )
    with_groups = removed is None or removed.fate.has_groups
    thinned = draw(st.integers(0, num_blocks - count - 1))
    recovery = RecoveryChoice(0.05, 8, draw(st.sampled_from(get_args(Trained))))
    return Proposal(Fold(removed, draw(st.none() | groups) if with_groups else None, thinned), recovery)


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
    removed, kept = order[: count_of(proposal)], order[count_of(proposal) :]
    bases = {block: data.draw(st.sampled_from(kept)) for block in removed}
    thin = data.draw(st.permutations(range(num_blocks)))
    plan = fold_plan(removed, proposal.fold, num_blocks, bases=bases, attention_order=thin)
    slots = [slot for slot in plan.slots if isinstance(slot, Slot)]
    fate = proposal.removed.fate if proposal.removed else Drop()
    assert fate.undo(plan) == (tuple(sorted(removed)), bases if isinstance(fate, Share) else {})
    if isinstance(fate, Drop):
        assert set(plan.dropped) == set(removed)
    elif isinstance(fate, Share):
        assert {slot.home: slot.mlp for slot in slots if slot.home in bases} == bases
        assert not plan.dropped
    else:
        assert {slot.home for slot in slots} == set(kept)
        assert not plan.dropped
    halves = [slot.home for slot in slots if slot.attention is None]
    assert len(halves) <= proposal.fold.attention_removed
    assert halves == sorted(sorted(halves, key=thin.index)[: proposal.fold.attention_removed])
    bound, exact = lower_bound(proposal, table, target), price(plan, table, target)
    for field in fields(Cost):
        assert getattr(bound, field.name) <= getattr(exact, field.name), field.name


@given(st.data(), st.integers(1, 12))
def test_the_bound_is_exact_where_all_blocks_cost_the_same(data: st.DataObject, num_blocks: int) -> None:
    block = BlockCost(UnitCost(90, 9, 7, 80, 3, 5, kv_width=4), UnitCost(120, 8, 6, 110, 0, 4), 2)
    times = data.draw(latencies)
    table = CostTable(8, 1, 2, 3, 4, 5, 6, (block,) * num_blocks, latencies=(times,))
    proposal = data.draw(proposals(num_blocks))
    proposal = replace(proposal, fold=replace(proposal.fold, attention_removed=0))
    if proposal.removed and proposal.removed.fate == Replace(
        "layer"
    ):  # its KV cache is left out of the bound
        proposal = replace(proposal, fold=replace(proposal.fold, removed=None))
    removed = range(count_of(proposal))
    plan = fold_plan(removed, proposal.fold, num_blocks, bases=dict.fromkeys(removed, num_blocks - 1))
    assert lower_bound(proposal, table, Target()) == price(plan, table, Target())


def test_groups_are_read_off_the_retained_blocks() -> None:
    proposal = removing("greedy", 3, groups=Groups(2, 3, start=1, rank=4))
    assert str(fold_plan([2, 5, 6], proposal.fold, 10)) == "0-1 3=1+r4+n 4=1+r4+n 7 8=7+r4+n 9=7+r4+n"
    cut = removing("greedy", 4, groups=Groups(2, 3, start=1, rank=4))
    assert str(fold_plan([2, 5, 6, 9], cut.fold, 10)) == "0-1 3=1+r4+n 4=1+r4+n 7 8=7+r4+n"
    assert str(fold_plan([2, 5, 6], removing("greedy", 3).fold, 10)) == "0-1 3-4 7-9"


def test_what_becomes_of_removed_blocks() -> None:
    bases = {2: 1, 5: 7, 6: 7}
    shared = removing("window", 3, Share(4)).fold
    assert str(fold_plan([2, 5, 6], shared, 9, bases=bases)) == "0-1 2=1+r4+n 3-4 5=7+r4+n 6=7+r4+n 7-8"
    replaced = removing("window", 3, Replace("ffn")).fold
    assert str(fold_plan([2, 5, 6], replaced, 9)) == "0-1 2~ffn 3-4 5-6~ffn 7-8"
    thin = removing("window", 3, Share(4), attention=2).fold  # 7 owns and 6 is a child: they are passed over
    plan = fold_plan([2, 5, 6], thin, 9, bases=bases, attention_order=[7, 6, 4, 8, 0])
    assert str(plan) == "0-1 2=1+r4+n 3 4m 5=7+r4+n 6=7+r4+n 7 8m"
    assert list(runs([7, 2, 3, 9, 8])) == [(2, 3), (7, 9)]


def test_a_given_plan_is_the_plan() -> None:
    plan = FoldPlan.parse("0 1=0 2", 4)
    proposal = Proposal(Given(plan), origin="hand")
    table = CostTable(8, 1, 2, 3, 4, 5, 6, (BlockCost(NO_UNIT, NO_UNIT),) * 4)
    assert fold_plan([], proposal.fold, 4) == plan
    assert lower_bound(proposal, table, Target()) == price(plan, table, Target())


@given(st.data(), st.integers(1, 12))
def test_json_round_trip(data: st.DataObject, num_blocks: int) -> None:
    for proposal in (
        data.draw(proposals(num_blocks)),
        Proposal(Given(data.draw(lawful_plans(num_blocks))), origin="neighbour"),
    ):
        assert Proposal.from_json(json.loads(json.dumps(proposal.to_json()))) == proposal


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Removed("gate", 1), "names gate_eps exactly where its criterion has it"),
        (lambda: Removed("window", 1, setting=0.1), "exactly where its criterion has it"),
        (lambda: Removed("magic", 1), "a criterion is one of"),
        (lambda: Removed("window", 0), "count of removed blocks is 1 or more, got 0"),
        (lambda: removing("window", 1, Share(), groups=Groups(1, 2)), "no groups beside it"),
        (lambda: Groups(0, 2), "count of groups is 1 or more, got 0"),
        (lambda: Groups(1, 1), "group's size is 2 or more, got 1"),
        (lambda: Share(-1), "rank of an adapter is 0 or more, got -1"),
        (lambda: RecoveryChoice(learning_rate=0.0), "positive number"),
        (lambda: RecoveryChoice(delta_rank=-1), "recovery deltas is 0 or more"),
    ],
)
def test_proposals_that_make_no_sense_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make()


def test_a_bound_needs_a_block_and_an_attention() -> None:
    table = CostTable(8, 1, 2, 3, 4, 5, 6, (BlockCost(NO_UNIT, NO_UNIT),) * 4)
    with pytest.raises(PlanError, match="Keep one"):
        lower_bound(removing("window", 4), table, Target())
    blind = removing("window", 1, attention=3)
    words = "3 of the 3 blocks that are kept lose their attention. Leave one"
    with pytest.raises(PlanError, match=words):
        lower_bound(blind, table, Target())
    with pytest.raises(PlanError, match=words):
        fold_plan([2], blind.fold, 4, attention_order=range(4))


# ---- equal proposals ask for the same thing


def test_what_is_not_used_does_not_exist() -> None:
    """Without adapters only "data" starts the output norms in a way of its own; without children nothing starts."""
    assert Share(0, "svd") == Share(0, "zero")
    assert Share(0, "data") != Share(0, "zero")
    assert Share(4, "svd") != Share(4, "zero")
    assert Fold(None, Groups(1, 2)).adapter_start == "zero"
    assert Fold(None, Groups(1, 2, rank=4)).adapter_start == "svd"
    assert removing("window", 2).fold.adapter_start is None
    assert removing("window", 2, Replace("linear")).fold.adapter_start is None
    assert Given(FoldPlan.parse("0 2", 4), "zero") == Given(FoldPlan.parse("0 2", 4))
    assert Given(FoldPlan.parse("0 1=0+r4", 4), "data") != Given(FoldPlan.parse("0 1=0+r4", 4))


def test_what_a_proposal_uses_makes_it_another() -> None:
    child, grouped = removing("window", 2, Share(4)), removing("window", 2, groups=Groups(1, 2, rank=4))
    assert child.fold == replace(child, recovery=RecoveryChoice(0.01, 2), origin="baseline").fold
    for other in (Share(8), Share(4, "data"), Drop(), Replace("linear")):
        assert changed(child, fate=other).fold != child.fold
    assert grouped != replace(grouped, fold=replace(grouped.fold, groups=Groups(1, 2, start=1, rank=4)))
    assert child != changed(child, criterion="greedy")


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
def test_uniform_blockss_by_hand(count: int, num_blocks: int, expected: tuple[int, ...]) -> None:
    assert uniform_blocks(count, num_blocks) == expected


@given(st.integers(3, 60), st.data())
def test_uniform_blockss_keep_both_ends_and_even_distances(num_blocks: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_blocks - 2))
    dropped = uniform_blocks(count, num_blocks)
    assert len(set(dropped)) == count
    assert dropped[0] > 0
    assert dropped[-1] < num_blocks - 1
    distances = {b - a for a, b in pairwise(dropped)}
    assert len(distances) <= 2
    assert max(distances, default=0) - min(distances, default=0) <= 1


def test_random_blockss_are_even_and_of_the_seed() -> None:
    assert random_blocks(4, 9, 3) == random_blocks(4, 9, 3)
    drawn = Counter(random_blocks(2, 4, seed) for seed in range(1200))
    assert set(drawn) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    assert all(150 < times < 250 for times in drawn.values())


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
