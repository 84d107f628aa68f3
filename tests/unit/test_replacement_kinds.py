"""What every kind of network in place of blocks must hold; a new kind is tested here by standing in the plan's list."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from foldsearch.errors import PlanError
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import BlockRun
from foldsearch.model.fold import fold
from foldsearch.model.head import last_hidden
from foldsearch.model.measure import last_logits_macs, measure
from foldsearch.model.parts import Replaced
from foldsearch.model.replacements import FitSettings, fit_replacement
from foldsearch.model.starts import new_values
from foldsearch.plan.cost import CostTable, Target, price
from foldsearch.plan.plan import REPLACEMENT_KINDS, SIZED_KINDS, FoldPlan, Replacement
from tests.tiny import CONFIGS, NUM_BLOCKS, WIDTH, dense_model, token_set

kinds = pytest.mark.parametrize("kind", REPLACEMENT_KINDS)
CONTEXT = 12


@cache
def table() -> CostTable:
    return measure(CONFIGS["llama"]())


def sizes(kind: str) -> tuple[int, ...]:
    return (0, 7) if kind in SIZED_KINDS else (0,)


@kinds
def test_its_text_is_read_back(kind):
    for size in sizes(kind):
        text = f"0 1-3~{kind}{size or ''} 4"
        plan = FoldPlan.parse(text, NUM_BLOCKS)
        assert str(plan) == text
        assert plan.slots[1] == Replacement(1, 3, kind, size)


@kinds
def test_only_a_kind_with_a_hidden_width_takes_a_size(kind):
    if kind in SIZED_KINDS:
        assert FoldPlan.parse(f"0-1 2~{kind}7 3-4", NUM_BLOCKS).slots[2] == Replacement(2, 2, kind, 7)
    else:
        with pytest.raises(PlanError, match=f"a '{kind}' replacement has no size to set, got 7"):
            FoldPlan.parse(f"0-1 2~{kind}7 3-4", NUM_BLOCKS)


@kinds
def test_its_price_is_what_the_folded_model_has(kind):
    """The oracle is the real module: its parameters are counted, its products are traced by fvcore."""
    for size in sizes(kind):
        plan = FoldPlan.parse(f"0 1-2~{kind}{size or ''} 3-4", NUM_BLOCKS)
        cost, model = price(plan, table(), Target("float32", context=CONTEXT)), fold(dense_model(), plan)
        assert cost.adapter_bytes == 4 * sum(value.numel() for value in new_values(model).values()) > 0
        assert cost.stored_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
        assert round(cost.prefill_macs * CONTEXT) == last_logits_macs(model, CONTEXT).total()


@kinds
def test_a_run_that_is_such_a_network_is_fitted_without_loss(kind):
    """One block is a `layer`; the others add what a network with the fit's own features adds.

    The least ridge, 1e-6 of a mean square, shrinks the solution by about that share, and the error is the square of it:
    5e-12 was measured. The bound leaves room for features that depend on each other more than these.
    """
    dense, ids_NT = dense_model(), token_set(sequences=12).ids_NT
    if kind == "layer":
        before_NTD, after_NTD = block_states(1)
        slot = Replacement(1, 1, kind)
    else:
        slot = Replacement(1, 1, kind, 24 if kind in SIZED_KINDS else 0)
        network = Replaced(kind, WIDTH, slot.size)
        network.reset_parameters(torch.Generator().manual_seed(FitSettings().seed))
        generator = torch.Generator().manual_seed(1)
        before_NTD = torch.randn(*ids_NT.shape, WIDTH, generator=generator)
        with torch.no_grad():
            network.down.copy_(torch.randn(network.down.shape, generator=generator))
            after_NTD = before_NTD + network(before_NTD)
    states = torch.stack([before_NTD, before_NTD, *[after_NTD] * (NUM_BLOCKS - 1)])
    fit = fit_replacement(dense, slot, states, ids_NT, FitSettings(epochs=0))
    assert fit.errors[fit.chosen] < 1e-9


@torch.no_grad()
def block_states(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    dense, found = dense_model(), []

    def run(i, hidden_BTD, block):
        out_BTD = block(hidden_BTD)
        if i == index:
            found.extend((hidden_BTD, out_BTD))
        return out_BTD

    with BlockRun(decoder_blocks(dense), run):
        last_hidden(dense, token_set(sequences=12).ids_NT)
    return found[0], found[1]
