"""What every kind of network in place of blocks must hold, whichever it is; `test_recipes.py` adds one to the list."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from foldsearch.errors import PlanError
from foldsearch.export import Shipment, export, load_exported
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import BlockRun
from foldsearch.model.fold import fold
from foldsearch.model.head import last_hidden
from foldsearch.model.judge import ask_dense, judge
from foldsearch.model.measure import last_logits_macs
from foldsearch.model.networks import NETWORKS
from foldsearch.model.recover import Recovery, merge
from foldsearch.model.replacements import FitSettings, fit_replacement
from foldsearch.model.starts import folded_start, new_values
from foldsearch.model.states import FitText
from foldsearch.model.training import RecoveryTraining
from foldsearch.plan.cost import Target, price
from foldsearch.plan.kinds import KINDS, Kind
from foldsearch.plan.plan import FoldPlan, Replacement
from foldsearch.spec.space import Space
from tests.tiny import CONFIGS, NUM_BLOCKS, WIDTH, dense_model, price_table, token_set
from tests.tolerances import OTHER_WAY

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
CONTEXT = 12


def words(kind: Kind) -> tuple[str, ...]:
    """The kind as plans have it."""
    return (kind.name, f"{kind.name}7") if kind.takes_size else (kind.name,)


def test_the_list():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert all(kind.source for kind in KINDS)
    # a block needs no class: it is one of the model's own
    assert set(NETWORKS) == {kind.name for kind in KINDS if not kind.is_block}


@kinds
def test_its_text_is_read_back(kind):
    for word in words(kind):
        plan = FoldPlan.parse(f"0 1-3~{word} 4", NUM_BLOCKS)
        assert str(plan) == f"0 1-3~{word} 4"
        assert plan.slots[1] == Replacement(1, 3, kind.name, 7 if word != kind.name else 0)


@kinds
def test_a_space_may_name_it(kind):
    assert Space(fates=("replace",), replace={"kinds": (kind.name,)}).replace.kinds == (kind.name,)


@kinds
def test_only_a_kind_with_a_hidden_width_takes_a_size(kind):
    if kind.takes_size:
        assert FoldPlan.parse(f"0-1 2~{kind.name}7 3-4", NUM_BLOCKS).slots[2] == Replacement(
            2, 2, kind.name, 7
        )
    else:
        with pytest.raises(PlanError, match=f"a '{kind.name}' replacement has no size to set, got 7"):
            FoldPlan.parse(f"0-1 2~{kind.name}7 3-4", NUM_BLOCKS)


@kinds
def test_its_price_is_what_the_folded_model_has(kind):
    """The oracle is the real module: its parameters are counted, its products are traced by fvcore."""
    for word in words(kind):
        plan = FoldPlan.parse(f"0 1-2~{word} 3-4", NUM_BLOCKS)
        cost = price(plan, price_table(), Target("float32", context=CONTEXT))
        model = fold(dense_model(), plan)
        assert cost.adapter_bytes == 4 * sum(value.numel() for value in new_values(model).values()) > 0
        assert cost.stored_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
        assert round(cost.prefill_macs * CONTEXT) == last_logits_macs(model, CONTEXT).total()


@kinds
@torch.no_grad()
def test_a_network_starts_as_nothing(kind):
    """So that a plan starts as the blocks that it leaves; a block starts as a copy (tests/unit/test_families.py)."""
    model = fold(dense_model(), FoldPlan.parse(f"0 1-2~{kind.name} 3-4", NUM_BLOCKS))
    other = "0-1 3-4" if kind.is_block else "0 3-4"
    expected = fold(dense_model(), FoldPlan.parse(other, NUM_BLOCKS))
    ids_NT = token_set().ids_NT
    torch.testing.assert_close(model(ids_NT).logits, expected(ids_NT).logits, atol=0, rtol=0)


@kinds
def test_a_run_that_is_such_a_network_is_fitted_without_loss(kind):
    """One block is a `layer`; the others add what a network with the fit's own features adds.

    The least ridge, 1e-6 of a mean square, shrinks the solution by about that share, and the error is the square of it:
    5e-12 was measured. The bound leaves room for features that depend on each other more than these.
    """
    dense, ids_NT = dense_model(), token_set(sequences=12).ids_NT
    slot = Replacement(1, 1, kind.name, 24 if kind.takes_size else 0)
    if kind.is_block:
        before_NTD, after_NTD = block_states(1)
    else:
        network = NETWORKS[kind.name](WIDTH, slot.size)
        network.reset_parameters(torch.Generator().manual_seed(FitSettings().seed))
        generator = torch.Generator().manual_seed(1)
        before_NTD = torch.randn(*ids_NT.shape, WIDTH, generator=generator)
        with torch.no_grad():
            network.down.copy_(torch.randn(network.down.shape, generator=generator))
            after_NTD = before_NTD + network(before_NTD)
    states = torch.stack([before_NTD, before_NTD, *[after_NTD] * (NUM_BLOCKS - 1)])
    fit = fit_replacement(dense, slot, states, ids_NT, FitSettings(epochs=0))
    assert fit.errors[fit.chosen] < 1e-9


@pytest.mark.slow
def test_a_plan_of_every_kind_is_fitted_trained_and_shipped(tmp_path):
    """Oracles: the least error of each fit; the answers of the model that was trained, here and in a fresh process."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = len(KINDS) + 1
    torch.manual_seed(0)
    dense = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    text = " ".join(f"{block}~{kind.name}" for block, kind in enumerate(KINDS))
    plan = FoldPlan.parse(f"{text} {len(KINDS)}", len(KINDS) + 1)
    tokens = token_set("recovery", sequences=8)
    fitted_to = FitText(dense, tokens.ids_NT, "of this test", tmp_path / "cache")
    model, told = folded_start(fitted_to, plan, fit=FitSettings(epochs=2, learning_rate=1e-2))
    for found in told.values():
        assert found["errors"][found["chosen"]] == min(found["errors"].values())
    fitted = {name: value.clone() for name, value in new_values(model).items()}
    targets = ask_dense(dense, tokens)
    before = judge(model, tokens, targets).kl
    recovery = Recovery(model, RecoveryTraining(learning_rate=0.2), tokens, targets, 1280)
    recovery.train(1280)
    merge(model)
    assert judge(model, tokens, targets).kl < before
    blocks = decoder_blocks(model)
    for name, value in new_values(model).items():  # a network keeps what it was fitted to, a block is trained
        position = int(name.split("layers.")[1].split(".")[0])
        is_block = hasattr(blocks[position].self_attn, "q_proj")
        assert KINDS[position].is_block == is_block
        assert torch.equal(value, fitted[name]) != is_block, name
    report = export(model, None, tmp_path / "out", Shipment(plan, "folded", "float32", tokens.ids_NT))
    assert report.loads_without_foldsearch
    again, _ = load_exported(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens.ids_NT).logits, model(tokens.ids_NT).logits, **OTHER_WAY)


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
