"""The nearest plan that a runtime holds.

Oracles: the law itself (held, no dearer, nothing that has room left out), plans worked out by hand for a table where
a block is 40 numbers, 10 of them its attention's, and every choice of blocks of a small model.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig

from foldsearch.model.measure import measure
from foldsearch.plan.cost import BlockCost, CostTable, Target, UnitCost, price
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.runtimes import RUNTIMES, runtime_named
from foldsearch.runtimes.nearest import nearest_held, nearest_removed, price_there
from tests.strategies import plans, tables

GGUF, STOCK = runtime_named("gguf"), runtime_named("stock")
ATTENDS = UnitCost(10, 0, 0, 10, 1, 1)
MIXES = replace(ATTENDS, context_macs=0, kind="conv")
MLP = UnitCost(30, 0, 0, 30, 0, 1)
TARGET = Target("float32", context=1)


def table_of(mixers: str, family: str = "llama") -> CostTable:
    """A block for each letter: a attends, c is a convolution. As narrow as a model can be: a network is two numbers."""
    blocks = tuple(BlockCost(ATTENDS if letter == "a" else MIXES, MLP) for letter in mixers)
    return CostTable(1, 0, 0, 0, 0, 0, 0, blocks, family=family)


@pytest.mark.parametrize(
    ("text", "nearest", "words"),
    [
        ("0-3 4-5~linear 6-9", "0-3 6-9", "without 4-5~linear"),
        ("0-5 6m 7-9", "0-5 7-9", "without 6m"),
        # four halves have 120 numbers, and so have three whole blocks
        ("0-3 4m 5m 6m 7m 8-9", "0-6 8-9", "whole blocks with weights of their own in place of 4m 5m 6m, without 7m"),
        # 30 + 10 numbers are those of one block, and 5 has more of its own than 4
        ("0-3 4a 5m 6-9", "0-3 5-9", "whole blocks with weights of their own in place of 5m, without 4a"),
        ("0-4 5=4+n 6-9", "0-4 6-9", "without 5=4+n"),
        # its adapter alone is as large as a block: what is left out makes room for the child's own weights
        ("0-4 5=4+r20+n 6-9", "0-9",
         "whole blocks with weights of their own in place of 5=4+r20+n (a child saves no bytes there)"),
        # 6 has its own attention, and 5 its own MLP, which is more; a repeat has no block to become
        ("0-4 5m 6=5m 7-9 9=9+r1+n", "0-5 7-9",
         "whole blocks with weights of their own in place of 5m, without 6=5m 9=9+r1+n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("runtime", [GGUF, STOCK], ids=lambda runtime: runtime.name)
def test_by_hand(runtime, text: str, nearest: str, words: str) -> None:
    found = nearest_held(FoldPlan.parse(text, 10), runtime, table_of("a" * 10), TARGET)
    assert found is not None
    assert (str(found.plan), found.words) == (nearest, words)


@pytest.mark.parametrize(
    ("text", "nearest", "words"),
    [
        ("0-2 4-11", "0-2 7-11", "without 4 5 6"),  # 11 stays last, and every fourth is one of 3, 7, 11
        ("0-2 4-6 8-10", "0-5 10", "3 added, without 6 8 9"),
        ("0-10 11m", "0-10", "without 11m"),
    ],
)
def test_blocks_of_two_kinds_stay_where_the_runtime_has_them(text: str, nearest: str, words: str) -> None:
    table = table_of("a" * 12, "smollm3")
    found = nearest_held(FoldPlan.parse(text, 12), GGUF, table, TARGET)
    assert found is not None
    assert (str(found.plan), found.words) == (nearest, words)


def test_where_a_dear_block_has_no_room_a_cheaper_one_behind_it_has() -> None:
    """Gemma 3's blocks of windows: against the most halves that can be whole, by brute force."""
    config = AutoConfig.for_model(
        "gemma3_text",
        hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, vocab_size=1000, sliding_window=512,
    )  # fmt: skip
    table, stock, halves = measure(config), STOCK, (5, 6, 7, 8)
    for context in (2048, 32768, 131072):
        target = Target(context=context)
        plan = FoldPlan.parse("0-4 5m 6m 7m 8m 9-25", 26)
        room = price(plan, table, target).memory_bytes
        kept = max(
            count
            for count in range(len(halves) + 1)
            for whole in combinations(halves, count)
            if price_there(
                FoldPlan.dropping([half for half in halves if half not in whole], 26), stock, table, target
            ).memory_bytes <= room
        )  # fmt: skip
        found = nearest_held(plan, stock, table, target)
        assert found is not None
        assert found.plan.depth == 22 + kept


def test_a_model_that_scales_by_position_keeps_its_first_blocks() -> None:
    table = replace(table_of("a" * 6), by_position=True)
    found = nearest_held(FoldPlan.parse("0 2-5", 6), GGUF, table, TARGET)
    assert found is not None
    assert str(found.plan) == "0-4"


@pytest.mark.parametrize(("family", "text"), [("opt", "0-2 3m"), ("llama", "0a")])
def test_where_there_is_none(family: str, text: str) -> None:
    """The runtime has no such models; half of a block has no room for another one."""
    plan = FoldPlan.parse(text, 4)
    assert nearest_held(plan, GGUF, table_of("aaaa", family), TARGET) is None


@given(st.data())
def test_it_is_held_and_no_dearer_and_leaves_nothing_out_that_has_room(data: st.DataObject) -> None:
    plan = data.draw(plans())
    table, runtime = data.draw(tables(plan.num_blocks, alike=True)), data.draw(st.sampled_from(RUNTIMES))
    target = Target(context=data.draw(st.integers(1, 300)))
    assume(all(map(table.attends, range(plan.num_blocks))))
    found = nearest_held(plan, runtime, table, target)
    if found is None:
        return
    there = replace(target, shares_weights=runtime.shares_weights)
    room = price(plan, table, target).memory_bytes
    assert runtime.holds(found.plan, table)
    assert price(found.plan, table, there).memory_bytes <= room
    homes = [slot.home for slot in plan.slots if isinstance(slot, Slot)]
    kept = [slot for slot in found.plan.slots if isinstance(slot, Slot)]
    assert {slot.home for slot in kept} <= set(homes)
    assert found.added == ()
    if not runtime.shares_weights:
        assert found.plan.only_drops or any(not isinstance(slot, Slot) for slot in found.plan.slots)
        for block in set(homes) - {slot.home for slot in kept}:
            slots = sorted(
                (*found.plan.slots, Slot(block, block, block)),
                key=lambda slot: slot.home if isinstance(slot, Slot) else slot.first,
            )
            assert price(FoldPlan(tuple(slots), plan.num_blocks), table, there).memory_bytes > room
    else:
        assert found.plan == plan


# ---- what a criterion removes

HYBRID = "ccaccac"


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize(
    ("mixers", "family"), [(HYBRID, "lfm2"), ("a" * 8, "smollm3")], ids=["hybrid", "every fourth"]
)
def test_as_much_as_can_be_of_what_a_criterion_chose_goes(mixers: str, family: str, count: int) -> None:
    """Of every choice of so many blocks: one that is held and shares most with it, and itself where it is held."""
    table, runtime = table_of(mixers, family), GGUF if family == "smollm3" else STOCK

    def is_held(gone: tuple[int, ...]) -> bool:
        plan = FoldPlan.dropping(gone, len(mixers))
        return runtime.holds(plan, table) and table.can_fold(plan)

    every = list(combinations(range(len(mixers)), count))
    held = list(filter(is_held, every))
    for gone in every:
        found = nearest_removed(set(gone), runtime, table)
        assert (found is None) == (not held)
        if found is None:
            continue
        assert is_held(found)
        ends = {min(kept := set(range(len(mixers))) - set(gone)), max(kept)}

        def rank(
            other: tuple[int, ...], gone: tuple[int, ...] = gone, ends: set[int] = ends
        ) -> tuple[int, int]:
            return -len(ends & set(other)), len(set(other) & set(gone))

        assert rank(found) == max(map(rank, held))
