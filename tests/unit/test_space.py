"""Spaces: what they propose is lawful and in range, narrowing and repair keep what can fit.

Oracles: the laws of FoldPlan and `price` on real plans; brute force over all small proposals.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldsearch.bound import lower_bound
from foldsearch.errors import BudgetError, SpecError
from foldsearch.fates import Drop, Replace, Share
from foldsearch.fates.replace import Networks
from foldsearch.fates.share import Children
from foldsearch.plan.cost import GB, BlockCost, Budget, CostTable, Target, UnitCost, price
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.proposal import Fold, Groups, Proposal, Removed, fold_plan
from foldsearch.runtimes import runtime_named
from foldsearch.spec.fit import (
    can_run,
    feasible_share,
    for_runtime,
    held_removal,
    narrow,
    repair,
    size,
    smallest,
)
from foldsearch.spec.load import load_space, shipped
from foldsearch.spec.propose import Plain, RandomSuggest, baseline, propose, propose_recovery
from foldsearch.spec.space import GroupsTable, Recover, Space
from tests.proposals import count_of, criterion_in, groups_of

N = 10
FATES, KINDS = ("drop", "share", "replace"), ("linear", "ffn", "swiglu", "layer")
BLOCK = BlockCost(UnitCost(900, 9, 7, 800, 3, 60, kv_width=4), UnitCost(1200, 8, 6, 1100, 0, 40), 2)
TABLE = CostTable(64, 100, 20, 300, 40, 5, 60, (BLOCK,) * N)
TARGET = Target(context=64)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    low, high = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    start = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    thin = sorted((draw(st.floats(0, 0.5)), draw(st.floats(0, 0.5))))
    return Space(
        removal=(low, high),
        fates=tuple(draw(st.lists(st.sampled_from(FATES), min_size=1, unique=True))),
        attention=(thin[0], thin[1]),
        children=Children(
            ranks=tuple(draw(st.sets(st.integers(0, 8), min_size=1))), starts=("zero", "svd", "data")
        ),
        replace=Networks(kinds=tuple(draw(st.sets(st.sampled_from(KINDS), min_size=1)))),
        gate_eps=(0.1, 0.01),
        groups=GroupsTable(
            max_groups=draw(st.integers(0, 3)),
            group_sizes=tuple(draw(st.sets(st.integers(2, 5), min_size=1))),
            start=(start[0], start[1]),
            adapter_ranks=tuple(draw(st.sets(st.integers(0, 8), min_size=1))),
        ),
    )


@given(spaces(), st.integers(1, 14), st.integers(0, 10**6))
def test_proposals_are_lawful_in_range_and_never_the_dense_model(
    space: Space, num_blocks: int, seed: int
) -> None:
    proposal = propose(RandomSuggest(seed), space, num_blocks)
    fewest, most = space.counts(num_blocks)
    assert fewest <= count_of(proposal) <= most
    removed = proposal.removed
    assert removed is None or removed.fate.name in space.fates
    assert (
        removed is None or not isinstance(removed.fate, Replace) or removed.fate.kind in space.replace.kinds
    )
    assert criterion_in(proposal) in (space.criteria if removed else ("",))
    gone = range(count_of(proposal))
    bases = dict.fromkeys(gone, num_blocks - 1)
    plan = fold_plan(gone, proposal.fold, num_blocks, bases=bases, attention_order=range(num_blocks))
    assert any(slot.attention is not None for slot in plan.slots if isinstance(slot, Slot))
    low, high = space.recover.learning_rate
    assert low <= proposal.recovery.learning_rate <= high
    if num_blocks > 1:
        assert plan != FoldPlan.identity(num_blocks)


@pytest.mark.parametrize(
    ("removal", "num_blocks", "expected"),
    [
        ((0.0, 0.5), 30, (0, 15)),
        ((0.1, 0.3), 30, (3, 9)),
        ((0.31, 0.32), 10, (4, 4)),
        ((1.0, 1.0), 10, (9, 9)),
    ],
)
def test_counts_are_whole_numbers(
    removal: tuple[float, float], num_blocks: int, expected: tuple[int, int]
) -> None:
    assert Space(removal=removal, groups=GroupsTable(max_groups=1)).counts(num_blocks) == expected


def test_a_space_without_sharing_drops_at_least_one_block() -> None:
    assert Space(removal=(0.0, 0.5)).counts(30) == (1, 15)
    assert Space(removal=(0.0, 0.5)).counts(1) == (0, 0)  # there is nothing to drop


def every_proposal(space: Space) -> list[Proposal]:
    fewest, most = space.counts(N)
    low, high = space.attention
    found = []
    for count, thinned in itertools.product(range(fewest, most + 1), range(N)):
        kept_thick = max(0, min(math.floor(high * N + 1e-9), N - count - 1))  # one attention stays
        if not min(math.ceil(low * N - 1e-9), kept_thick) <= thinned <= kept_thick:
            continue
        grouped = [None, *every_group(space, N - count)]
        if not count:
            found += [Fold(None, groups, thinned) for groups in grouped if thinned or groups]
            continue
        if "share" in space.fates:
            children = (
                Share(rank, start) for rank in space.children.ranks for start in space.children.starts
            )
            found += [Fold(Removed("window", count, fate), None, thinned) for fate in children]
        bare = [Drop()] if "drop" in space.fates else []
        bare += map(Replace, space.replace.kinds) if "replace" in space.fates else []
        found += [
            Fold(Removed("window", count, fate), groups, thinned) for fate in bare for groups in grouped
        ]
    return [Proposal(fold) for fold in found]


def every_group(space: Space, num_kept: int) -> list[Groups]:
    first, last = (max(0, min(int(share * num_kept), num_kept - 2)) for share in space.groups.start)
    return [
        Groups(count, group_size, start, rank)
        for count in range(1, space.groups.max_groups + 1)
        for group_size in space.groups.group_sizes
        for rank in space.groups.adapter_ranks
        for start in range(first, last + 1)
    ]


def may_stand_in(other: Proposal, proposal: Proposal) -> bool:
    """Whether the other has the same count, fate and attention, and as many groups or more."""
    one, two = (
        (count_of(p), p.removed and p.removed.fate.name, p.fold.attention_removed) for p in (other, proposal)
    )
    (many, few) = (0 if (groups := groups_of(p)) is None else groups.count for p in (other, proposal))
    return one == two and many >= few


@settings(max_examples=60, deadline=None)
@given(spaces(), st.floats(0.2, 1.0))
def test_narrowing_loses_nothing_and_repair_ends_inside_the_budget(space: Space, share: float) -> None:
    dense = price(FoldPlan.identity(N), TABLE, TARGET)
    budget = Budget(int(share * dense.memory_bytes))
    fitting = [p for p in every_proposal(space) if budget.admits(lower_bound(p, TABLE, TARGET))]
    if not fitting:
        with pytest.raises(BudgetError, match="smallest reaches") as told:
            narrow(space, TABLE, TARGET, budget)
        # what it says is enough, as it says it
        least = re.search(r"smallest reaches (\S+) GB and (\S+) FLOPs", str(told.value))
        assert least is not None
        narrow(space, TABLE, TARGET, Budget(round(float(least[1]) * GB), int(float(least[2]))))
        return
    narrowed = narrow(space, TABLE, TARGET, budget)
    counts = {count_of(proposal) for proposal in fitting}
    assert narrowed.counts(N) == (min(counts), max(counts))
    suggest = RandomSuggest(0)
    for _ in range(30):
        proposal = propose(suggest, narrowed, N)
        repaired = repair(proposal, narrowed, TABLE, TARGET, budget)
        if repaired is None:
            assert not any(may_stand_in(other, proposal) for other in fitting)
        else:
            assert budget.admits(lower_bound(repaired, TABLE, TARGET))
            assert (count_of(repaired), criterion_in(repaired)) == (
                count_of(proposal),
                criterion_in(proposal),
            )
            if budget.admits(lower_bound(proposal, TABLE, TARGET)):
                assert repaired == proposal


@given(spaces())
def test_size_counts_every_proposal_once_a_criterion(space: Space) -> None:
    criteria = 3 + len(space.gate_eps)
    every = set(every_proposal(space))
    removing = sum(count_of(proposal) > 0 for proposal in every)
    assert size(space, N) == criteria * removing + (len(every) - removing)


@given(spaces())
def test_smallest_is_the_smallest(space: Space) -> None:
    plan, cost = smallest(space, TABLE, TARGET)
    assert price(plan, TABLE, TARGET) == cost
    removed = range(N - 1, -1, -1)
    assert cost.memory_bytes == min(
        price(
            fold_plan(
                removed[: count_of(p)], p.fold, N, bases=dict.fromkeys(removed, 0), attention_order=range(N)
            ),
            TABLE,
            TARGET,
        ).memory_bytes
        for p in every_proposal(space)
        if count_of(p) < N
    )


def test_a_budget_out_of_reach_says_the_smallest_and_its_plan() -> None:
    space = load_space("foldgpt")
    plan, cost = smallest(space, TABLE, TARGET)
    with pytest.raises(BudgetError) as error:
        narrow(space, TABLE, TARGET, Budget(1000))
    assert f"{cost.memory_bytes / 1e9:.6g} GB" in str(error.value)
    assert str(plan) in str(error.value)
    assert "batch" not in str(error.value)
    with pytest.raises(BudgetError, match=r"serve fewer sequences at once \(batch, now 64\)"):
        narrow(space, TABLE, replace(TARGET, batch=64), Budget(1000))


def test_ranks_are_shares_of_the_width_or_whole_numbers_up_to_it() -> None:
    space = Space(fates=("share",), children=Children(ranks=(0.25, 16, 0.001)))
    assert space.for_width(64).children.ranks == (16, 1)
    assert narrow(space, TABLE, TARGET, Budget()).children.ranks == (16, 1)
    for wrong in (Space(children=Children(ranks=(65,))), Space(groups=GroupsTable(adapter_ranks=(65,)))):
        with pytest.raises(SpecError, match="at most the model's width, 64"):
            narrow(wrong, TABLE, TARGET, Budget())


# ---- a runtime that cannot share

STOCK = replace(TARGET, runtime="stock", shares_weights=False)


@pytest.mark.parametrize("name", ["everything", "foldgpt", "streamline"])
def test_a_stock_runtime_is_offered_what_it_can_hold_only(name: str) -> None:
    """Oracle: the criterion that the export refuses by, on the plan of every proposal; before, few passed."""

    def held(space: Space) -> list[bool]:
        suggest, found = RandomSuggest(0), []
        for _ in range(200):
            proposal = propose(suggest, space, N)
            removed = range(1, 1 + count_of(proposal))
            plan = fold_plan(
                removed, proposal.fold, N, bases=dict.fromkeys(removed, 0), attention_order=range(N)
            )
            found.append(runtime_named("stock").refusal(plan) is None)
        return found

    space = load_space(name)
    assert not all(held(space))
    narrowed = narrow(space, TABLE, STOCK, Budget())
    assert all(held(narrowed))
    assert {
        count_of(proposal) for proposal in (propose(RandomSuggest(i), narrowed, N) for i in range(99))
    } == set(range(1, narrowed.counts(N)[1] + 1))
    plan, _ = smallest(space, TABLE, STOCK)
    assert runtime_named("stock").refusal(plan) is None
    # every plan of a folded runtime is as before
    assert narrow(space, TABLE, TARGET, Budget()).fates == space.fates


@pytest.mark.parametrize(
    "space",
    [
        load_space("flexigpt"),  # children only
        Space(fates=("replace",), replace=Networks(kinds=("linear", "swiglu"))),
        Space(removal=(0.0, 0.05), groups=GroupsTable(max_groups=2)),  # groups only
        Space(removal=(0.0, 0.0), attention=(0.1, 0.4)),
    ],
)
def test_a_space_of_which_a_stock_runtime_can_hold_nothing_is_refused(space: Space) -> None:
    assert narrow(space, TABLE, TARGET, Budget())
    with pytest.raises(SpecError, match=r"stock blocks.*has none.*or take the folded runtime"):
        narrow(space, TABLE, STOCK, Budget())


def test_a_model_that_scales_by_position_cannot_be_stock_by_a_search() -> None:
    with pytest.raises(SpecError, match="scales attention by a block's position"):
        narrow(load_space("everything"), replace(TABLE, by_position=True), STOCK, Budget())


DEEP = replace(TABLE, blocks=(BLOCK,) * 12, family="smollm3")  # every fourth is of another kind in llama.cpp
GGUF = replace(STOCK, runtime="gguf")


def test_where_every_fourth_block_is_another_kind_four_go_at_a_time() -> None:
    """Oracle: the export's own law, for whatever blocks a criterion may choose."""
    space = load_space("everything")
    narrowed = narrow(space, DEEP, GGUF, Budget())
    assert narrowed.fates == ("drop",)
    assert list(narrowed.every_count(12)) == [4]
    assert list(narrowed.model_copy(update={"removal": (0.0, 0.9)}).every_count(12)) == [4, 8]
    assert narrow(space, replace(DEEP, family="llama"), GGUF, Budget()).step == 1
    for seed in range(99):
        proposal = propose(RandomSuggest(seed), narrowed, 12)
        assert count_of(proposal) == 4
        gone = held_removal(random.Random(seed).sample(range(12), 4), DEEP, GGUF)
        plan = fold_plan(gone, proposal.fold, 12)
        assert len(plan.dropped) == 4
        assert can_run(plan, DEEP, GGUF)
    assert can_run(smallest(space, DEEP, GGUF)[0], DEEP, GGUF)
    assert size(narrowed, 12) == sum(len(narrowed.settings(one)) for one in narrowed.criteria)
    with pytest.raises(
        SpecError, match=r"removed 4 at a time, but the space 'unnamed' removes 3 of 12 at most"
    ):
        narrow(Space(removal=(0.0, 0.25)), DEEP, GGUF, Budget())


def test_the_feasible_share_is_a_share() -> None:
    space = load_space("foldgpt")
    dense = price(FoldPlan.identity(N), TABLE, TARGET)
    assert feasible_share(space, TABLE, TARGET, Budget(), num_proposals=100) == 1.0
    half = feasible_share(space, TABLE, TARGET, Budget(int(0.7 * dense.memory_bytes)), num_proposals=2000)
    assert 0.05 < half < 0.95
    assert feasible_share(space, TABLE, TARGET, Budget(1), num_proposals=100) == 0.0


def test_every_shipped_space_loads() -> None:
    assert "foldgpt" in shipped("spaces")
    for name in shipped("spaces"):
        assert load_space(name).name == name


def test_unknown_spaces_are_refused_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match="Did you mean 'foldgpt'"):
        load_space("foldgtp")


def test_the_search_chooses_what_is_trained_where_the_space_names_several() -> None:
    """Baselines take the first; where there is one, nobody is asked."""
    several = Space(recover=Recover(trains=("last", "healed")))
    found = {propose(RandomSuggest(seed), several, 12).recovery.trains for seed in range(20)}
    assert found == {"last", "healed"}
    assert baseline(several, "window", 2, 12).recovery.trains == "last"
    plain = Plain({})
    propose_recovery(plain, Space(recover=Recover(trains=("healed",))))
    assert "trains" not in plain.answers
    with pytest.raises(ValueError, match=r"recover.trains names each option once"):
        Space(recover=Recover(trains=("last", "last")))


def test_a_step_of_all_blocks_removes_none_and_is_refused() -> None:
    with pytest.raises(SpecError, match=f"{N} at a time, but the model has {N}, of which one stays"):
        for_runtime(Space(removal=(0.1, 0.6), step=N), TABLE, TARGET)
    assert for_runtime(Space(removal=(0.1, 0.6), step=N - 1), TABLE, TARGET).counts(N) == (N - 1, N - 1)
