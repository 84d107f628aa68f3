"""The price of a plan.

Oracles: prices of a toy table worked out by hand (each in a comment), laws over random plans and tables, and a second,
slower pricing of the stock runtime. The table itself is tested in test_measure.py.
"""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from foldsearch.codec import from_json, to_json
from foldsearch.errors import BudgetError, PlanError
from foldsearch.model.measure import measure
from foldsearch.plan.cost import (
    BlockCost,
    Budget,
    Cost,
    CostTable,
    Target,
    UnitCost,
    parse_flops,
    price,
    replacement_cost,
)
from foldsearch.plan.plan import FoldPlan, Replacement, Slot
from foldsearch.spec.study import TargetSettings
from tests.strategies import plans, tables, targets

# weights, norms, output_norm, macs, context_macs, adapter_width, kv_width, window
WIDE = BlockCost(UnitCost(100, 2, 4, 100, 3, 20, 5, 0), UnitCost(300, 2, 4, 300, 0, 30), other=1)
SLIDING = BlockCost(UnitCost(110, 2, 4, 110, 3, 22, 5, 8), UnitCost(300, 2, 4, 300, 0, 30))
# width, fixed_weights, fixed_macs, head_macs, activation_width, activation_fixed, vocabulary
TABLE = CostTable(4, 1000, 7, 64, 10, 6, 16, (WIDE, SLIDING, WIDE))
TARGET = Target("float32", context=16, batch=2, prefill_chunk=8)


def cost_of(text: str, target: Target = TARGET) -> Cost:
    return price(FoldPlan.parse(text, 3), TABLE, target)


# ---- by hand


def test_identity():
    found = cost_of("0-2")
    # 1000 fixed; blocks 405, 414, 405
    assert found.weight_bytes == 4 * (1000 + 405 + 414 + 405)
    assert found.adapter_bytes == 0
    # 5 numbers a token: 16 tokens, 8 in the window, 16; two sequences of 4 bytes a number
    assert found.kv_bytes == 5 * (16 + 8 + 16) * 2 * 4
    # a chunk of 8 tokens at 10 numbers, 6 fixed, 16 logits; two sequences
    assert found.activation_bytes == (80 + 6 + 16) * 2 * 4
    # 7 + 400 + 410 + 400, attention over the whole context in a prefill, logits of one token in 16
    assert found.prefill_macs == 1217 + 9 * 16 + 64 / 16
    # one token sees 16, 8 and 16 tokens
    assert found.decode_macs == 1217 + 3 * (16 + 8 + 16) + 64
    assert found.flops == 2 * found.decode_macs
    assert found.memory_bytes == found.stored_bytes + found.kv_bytes + found.activation_bytes
    assert found.stored_bytes == found.weight_bytes


def test_child_with_adapter_and_norm():
    dense, found = cost_of("0-2"), cost_of("0 1 2=0+r3+n")
    assert dense.weight_bytes - found.weight_bytes == 4 * (100 + 300)  # norms and `other` stay
    assert found.adapter_bytes == 4 * (3 * (20 + 30) + 4 + 4)
    assert found.decode_macs - dense.decode_macs == 3 * (20 + 30)
    assert found.prefill_macs - dense.prefill_macs == 3 * (20 + 30)
    assert found.kv_bytes == dense.kv_bytes
    # an adapter on one unit only
    assert cost_of("0 1 2=0m+r3+n").adapter_bytes == 4 * (3 * 30 + 4)


def test_units_and_windows():
    dense, no_attention, no_mlp = cost_of("0-2"), cost_of("0 1m 2"), cost_of("0 1a 2")
    assert dense.weight_bytes - no_attention.weight_bytes == 4 * (110 + 2)
    assert dense.kv_bytes - no_attention.kv_bytes == 5 * 8 * 2 * 4
    assert dense.decode_macs - no_attention.decode_macs == 110 + 3 * 8
    assert dense.prefill_macs - no_attention.prefill_macs == 110 + 3 * 16
    assert dense.weight_bytes - no_mlp.weight_bytes == 4 * (300 + 2)
    assert no_mlp.kv_bytes == dense.kv_bytes
    # a window longer than the context is no window
    short = replace(TARGET, context=4)
    assert cost_of("0", short).kv_bytes == cost_of("1", short).kv_bytes == 5 * 4 * 2 * 4


def test_what_a_child_keeps_is_its_homes():
    """Block 1 with block 0's weights still slides; block 0 with block 1's does not."""
    assert cost_of("0 1=0").kv_bytes == 5 * (16 + 8) * 2 * 4
    assert cost_of("0=1 1").kv_bytes == 5 * (16 + 8) * 2 * 4
    assert cost_of("0 2=0").kv_bytes == 5 * (16 + 16) * 2 * 4


def test_a_repeat_runs_and_caches_again():
    once, twice = cost_of("0"), cost_of("0 0=0+r1")
    assert twice.weight_bytes - once.weight_bytes == 4 * (2 + 2 + 1)  # norms of its own
    assert twice.adapter_bytes == 4 * (20 + 30)
    assert twice.kv_bytes == 2 * once.kv_bytes
    assert twice.decode_macs - once.decode_macs == 400 + 3 * 16 + 50


def test_stock_runtime_stores_again_and_merges():
    stock = replace(TARGET, shares_weights=False)
    found = cost_of("0 1=0+r3 2", stock)
    assert found.weight_bytes == 4 * (1000 + 405 + (100 + 300 + 4) + 405)
    assert found.adapter_bytes == 0
    assert found.decode_macs == cost_of("0-2", stock).decode_macs - 110 + 110  # units cost their home's
    assert cost_of("0 1=0+r3+n 2", stock).adapter_bytes == 4 * 8


def test_dtype_and_batch_scale():
    half = cost_of("0 1=0+r3+n 2", replace(TARGET, dtype="bfloat16", batch=1))
    full = cost_of("0 1=0+r3+n 2")
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.adapter_bytes == 2 * half.adapter_bytes
    assert full.kv_bytes == 4 * half.kv_bytes
    assert full.activation_bytes == 4 * half.activation_bytes
    assert (full.prefill_macs, full.decode_macs) == (half.prefill_macs, half.decode_macs)


@pytest.mark.parametrize(
    ("slot", "parameters", "macs"),
    [
        (Replacement(0, 1, "linear"), 4 * 4 + 4, 4 * 4),
        (Replacement(0, 1, "ffn"), 4 * 16 + 16 + 16 * 4 + 4, 2 * 4 * 16),
        (Replacement(0, 1, "ffn", 5), 4 * 5 + 5 + 5 * 4 + 4, 2 * 4 * 5),
        (Replacement(0, 1, "swiglu"), 3 * 4 * 16, 3 * 4 * 16),
        (Replacement(0, 1, "swiglu", 5), 3 * 4 * 5, 3 * 4 * 5),
        (Replacement(1, 2, "layer"), 414, 410),
    ],
)
def test_replacements(slot, parameters, macs):
    assert replacement_cost(slot, TABLE) == (parameters, macs)
    last = 0 if slot.first else 2
    kept = Slot(last, last, last)
    slots = (kept, slot) if slot.first else (slot, kept)
    alone, found = (price(FoldPlan(taken, 3), TABLE, TARGET) for taken in ((kept,), slots))
    assert found.weight_bytes == alone.weight_bytes
    assert found.adapter_bytes == 4 * parameters
    attention = 3 * 8 if slot.kind == "layer" else 0  # of block 1, which slides
    assert found.decode_macs - alone.decode_macs == macs + attention
    assert found.prefill_macs - alone.prefill_macs == macs + 2 * attention
    assert found.kv_bytes - alone.kv_bytes == (5 * 8 * 2 * 4 if slot.kind == "layer" else 0)


# ---- laws

few = settings(max_examples=40)  # a table is slow to draw


def terms(cost: Cost) -> tuple[float, ...]:
    return astuple(cost)


@st.composite
def priced(draw: st.DrawFn, alike: bool = False) -> tuple[FoldPlan, CostTable, Target]:
    drawn = draw(plans())
    return drawn, draw(tables(drawn.num_blocks, alike=alike)), draw(targets)


@few
@given(priced(), st.data())
def test_dropping_never_raises_a_term(drawn, data):
    plan, table, target = drawn
    position = data.draw(st.integers(0, plan.depth - 1))
    try:
        smaller = FoldPlan((*plan.slots[:position], *plan.slots[position + 1 :]), plan.num_blocks)
    except PlanError:
        assume(False)
    before, after = terms(price(plan, table, target)), terms(price(smaller, table, target))
    assert all(x <= y for x, y in zip(after, before, strict=True))


@given(st.integers(2, 8), st.data())
def test_sharing_at_rank_0_costs_nothing_and_saves_the_linears(num_blocks, data):
    """KV cache, activations and MACs stay; stored bytes fall by the child's linears, or not at all if stock."""
    table, target = data.draw(tables(num_blocks, alike=True)), data.draw(targets)
    kept = sorted(data.draw(st.sets(st.integers(0, num_blocks - 1), min_size=2)))
    plan = FoldPlan.dropping(set(range(num_blocks)) - set(kept), num_blocks)
    child, owner = data.draw(st.permutations(kept))[:2]
    before, after = price(plan, table, target), price(plan.share(child, owner), table, target)
    linears = table.blocks[child].attention.weights + table.blocks[child].mlp.weights
    size = 4 if target.dtype == "float32" else 2
    saved = 0 if not target.shares_weights else linears * size
    assert after == replace(before, weight_bytes=before.weight_bytes - saved)


@few
@given(priced())
def test_stock_stores_every_run(drawn):
    plan, table, target = drawn
    stock = price(plan, table, replace(target, shares_weights=False, dtype="float16"))
    parameters = table.fixed_weights
    for unit in ("attention", "mlp"):
        for _, slot, source, _ in plan.runs(unit):
            parameters += getattr(table.blocks[source], unit).weights
            parameters += getattr(table.blocks[slot.home], unit).norms
    parameters += sum(table.blocks[slot.home].other for slot in plan.slots if isinstance(slot, Slot))
    assert stock.weight_bytes == 2 * parameters
    folded = price(plan, table, replace(target, shares_weights=True))
    assert folded.weight_bytes <= price(plan, table, replace(target, shares_weights=False)).weight_bytes


@few
@given(priced())
def test_adapters_cost_what_they_hold(drawn):
    """From rank r to rank 2r the price grows by as much as from 0 to r, and MACs by as much as parameters."""
    plan, table, target = drawn
    target = replace(target, shares_weights=True, dtype="float16")

    def at(share: int) -> Cost:
        slots = tuple(
            replace(slot, rank=slot.rank * share) if isinstance(slot, Slot) else slot for slot in plan.slots
        )
        return price(FoldPlan(slots, plan.num_blocks), table, target)

    none, once, twice = at(0), at(1), at(2)
    grown = (once.adapter_bytes - none.adapter_bytes) // 2
    assert twice.adapter_bytes - once.adapter_bytes == 2 * grown
    assert once.decode_macs - none.decode_macs == grown
    assert once.prefill_macs - none.prefill_macs == pytest.approx(grown, abs=1e-6)
    assert once.weight_bytes == none.weight_bytes


@few
@given(priced())
def test_a_longer_context_never_costs_less_memory(drawn):
    plan, table, target = drawn
    longer = price(plan, table, replace(target, context=target.context + 1))
    here = price(plan, table, target)
    assert longer.memory_bytes >= here.memory_bytes
    assert longer.decode_macs >= here.decode_macs


def test_the_table_must_be_of_the_model():
    with pytest.raises(BudgetError, match="the plan is for 4 blocks, the model has 3"):
        price(FoldPlan.identity(4), TABLE, TARGET)


@few
@given(st.data())
def test_a_table_survives_json(data):
    table = data.draw(tables(data.draw(st.integers(1, 4))))
    assert from_json(CostTable, json.loads(json.dumps(to_json(table)))) == table


# ---- budgets

COST = Cost(1000, 200, 300, 500, 10.0, 50)  # 2000 bytes, 100 FLOPs


def test_violations_are_shares_of_the_bound():
    assert Budget().violations(COST) == {}
    assert Budget(memory_bytes=1000).violations(COST) == {"memory": 1.0}
    assert Budget(flops=125).violations(COST) == {"flops": pytest.approx(-0.2)}
    assert Budget(4000, 50).violations(COST) == {"memory": -0.5, "flops": 1.0}


def test_a_bound_itself_is_kept():
    assert Budget().admits(COST)
    assert Budget(2000, 100).admits(COST)
    assert not Budget(1999, 100).admits(COST)
    assert not Budget(2000, 99).admits(COST)


@few
@given(priced(), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_budget_admits_what_violates_nothing(drawn, memory, flops):
    cost = price(*drawn)
    for budget in (Budget(memory, flops), Budget(None, flops), Budget(memory)):
        assert budget.admits(cost) == all(share <= 0 for share in budget.violations(cost).values())


@pytest.mark.parametrize("bounds", [(0, None), (None, 0), (-5, 100)])
def test_a_bound_is_positive(bounds):
    with pytest.raises(BudgetError, match="at least 1"):
        Budget(*bounds)


@pytest.mark.parametrize(
    ("text", "flops"), [("0.8x", 80), ("1x", 100), ("2.5e8", 250_000_000), (" 90 ", 90), ("0.5x ", 50)]
)
def test_parse_flops(text, flops):
    assert parse_flops(text, COST) == flops


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "0x", "nan", "inf", "infx", "1e400", "80%", "0.8 y"])
def test_parse_flops_wants_a_positive_number(text):
    with pytest.raises(
        BudgetError, match=r"FLOPs per token at decode \(2.5e8\) or a share of dense \(0.8x\)"
    ):
        parse_flops(text, COST)


def test_less_than_one_flop_is_a_forgotten_x():
    with pytest.raises(BudgetError, match=r"0.8x"):
        parse_flops("0.8", COST)


@cache
def five_of_six_have_windows() -> CostTable:
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, sliding_window=512, max_position_embeddings=8192,
    )  # fmt: skip
    return measure(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("context", "mebibytes"), [(300, 1.5), (512, 1.5), (1000, 3.0), (2048, 3.5), (8192, 6.5)]
)
def test_windows_are_cached_as_llama_cpp_says(dtype: str, context: int, mebibytes: float) -> None:
    """By its log of such a model (llama.cpp of xllamacpp 2026.10.11549): six blocks, five of them with a window of 512,
    for which it holds 1,024 cells; 256 numbers a token and block, of 16 bits where nobody names a type. In a context of
    512 it is the context, by hand. By its log of SmolLM2, a context of 300 has 512 cells, and one of 1,000 has 1,024.
    """
    table, plan = five_of_six_have_windows(), FoldPlan.identity(6)
    target = TargetSettings(dtype=dtype, context=context, runtime="gguf").value()
    assert price(plan, table, target).kv_bytes == mebibytes * 2**20
    every = TargetSettings(dtype="float16", context=context, runtime="onnx").value()
    assert price(plan, table, every).kv_bytes == 6 * 256 * 2 * context
