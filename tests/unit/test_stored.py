"""What weights of few bits take, and how a model with them is measured and healed.

Oracles: the package gguf (its block sizes, and files that it wrote); KL by all logits; the model that is read back from
a file; a matrix that is rounded once more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from foldsearch.bound import lower_bound
from foldsearch.errors import SpecError
from foldsearch.model.fold import fold
from foldsearch.model.gguf.config import held_families
from foldsearch.model.gguf.write import as_stored, rounded_matrix, write_gguf
from foldsearch.model.heal import heal
from foldsearch.model.judge import ask_dense, judge
from foldsearch.model.states import StatesInOrder
from foldsearch.plan.cost import Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import TYPES
from foldsearch.runtimes import exported_bytes
from foldsearch.runtimes import gguf as runtime
from foldsearch.spec.load import load_study
from tests.proposals import given, removing
from tests.tiers import some
from tests.tiny import NUM_BLOCKS, dense_model, price_table, token_set

STOCK = Target(context=64, runtime="gguf", shares_weights=False)


@pytest.mark.parametrize("weights", TYPES)
def test_a_type_takes_what_the_package_gguf_says(weights: str) -> None:
    kind = gguf.GGMLQuantizationType[weights.upper()]
    assert (TYPES[weights].block, TYPES[weights].block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    (name,) = (
        one
        for one in gguf.LlamaFileType
        if one.name
        in {f"MOSTLY_{weights.upper()}", f"ALL_{weights.upper()}", f"MOSTLY_{weights.upper()}_MOE"}
    )
    assert TYPES[weights].file_type == name


@pytest.mark.parametrize("weights", ["bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", some(("llama", "gemma3_text", "gpt2"), sorted(held_families())))
def test_a_price_is_what_the_tensors_of_a_file_take(name: str, weights: str, tmp_path: Path) -> None:
    """Rows of 40 numbers fill no whole blocks, those of 32 do."""
    dense = dense_model(name)
    table, target = price_table(name), replace(STOCK, weights=weights)
    # llama.cpp knows by heart which blocks of a SmolLM3 do not turn: plans may move none of them
    for text in ("0-4", "0-3") if name == "smollm3" else ("0-4", "0 2-4", "0 1=3 2-4"):
        plan = FoldPlan.parse(text, NUM_BLOCKS)
        model = runtime.before_rounding(fold(dense, plan))[0]
        write_gguf(tmp_path / "model.gguf", model, weights, {}, {})
        tensors = gguf.GGUFReader(tmp_path / "model.gguf").tensors
        found = sum(int(one.n_bytes) for one in tensors if not one.name.startswith("rope_"))
        assert price(plan, table, target).weight_bytes == found, text
        assert price(plan, table, target).adapter_bytes == 0


def test_only_the_weights_are_stored_in_few_bits() -> None:
    table = price_table()
    plan = FoldPlan.parse("0 2-4", NUM_BLOCKS)
    plain, few = (price(plan, table, replace(STOCK, weights=weights)) for weights in ("bf16", "q4_0"))
    assert few.weight_bytes < plain.weight_bytes
    assert replace(few, weight_bytes=0) == replace(plain, weight_bytes=0)


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_a_bound_is_the_price_where_all_blocks_are_alike(weights: str) -> None:
    table, target = price_table(), replace(STOCK, weights=weights)
    plan = FoldPlan.parse("0 3-4", NUM_BLOCKS)
    assert lower_bound(removing("uniform", 2), table, target) == price(plan, table, target)
    assert lower_bound(given(plan), table, target) == price(plan, table, target)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_model_with_a_head_of_its_own_is_judged_by_all_its_logits(name: str) -> None:
    """The mean rows that are kept of the dense model are those of its own head."""
    dense, tokens = dense_model(name), token_set()
    held = as_stored(dense, "q4_0")
    found = judge(held, tokens, ask_dense(dense, tokens), dense=dense)
    with torch.no_grad():
        p, q = (
            model(input_ids=tokens.ids_NT).logits[:, :-1].double().log_softmax(-1) for model in (dense, held)
        )
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.kl > 1e-3
    loss = -q.gather(-1, tokens.ids_NT[:, 1:, None]).mean()
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("text", ["0-4", "0 2-4"])
def test_what_is_healed_on_rounded_weights_is_what_a_file_holds(name: str, text: str) -> None:
    """Every matrix that was solved is its own rounding, and nearer on held-out text than the rounded one it was."""
    dense, tokens = dense_model(name), token_set("recovery", 16, 32)
    model = fold(as_stored(dense, "q4_0"), FoldPlan.parse(text, NUM_BLOCKS))
    states = StatesInOrder(dense, tokens.ids_NT)
    healed = heal(model, states, tokens.ids_NT, stored=lambda weight_OI: rounded_matrix(weight_OI, "q4_0"))
    changed = [block for block in healed.blocks if block.ridge is not None]
    assert changed
    assert all(block.after < block.before for block in changed)
    if text == "0-4":  # also before any gap: no position reads what the dense model's does
        assert len(healed.blocks) == 2 * NUM_BLOCKS
    values = dict(model.named_parameters())
    for path in healed.values:
        if path.endswith("weight"):
            weight = values[path].data.T if name == "gpt2" else values[path].data
            again = rounded_matrix(weight.contiguous(), "q4_0")
            torch.testing.assert_close(again, weight, rtol=1e-5, atol=1e-6)


def test_who_names_a_type_means_llama_cpp() -> None:
    study = load_study("default", {"target.weights": "q8_0"})
    assert study.target.runtime == "gguf"
    target = study.target.value()
    assert (target.weights, target.rounds, target.shares_weights) == ("q8_0", True, False)
    plain = load_study("default", {"target.runtime": "gguf"}).target.value()
    assert (plain.weights, plain.rounds) == ("bf16", False)
    assert load_study("default").target.value().weights == ""


@pytest.mark.parametrize(
    ("name", "dtype", "stored"),
    [
        ("onnx", "bfloat16", "float32"),
        ("onnx", "float16", "float16"),
        ("executorch", "bfloat16", "float32"),
        ("executorch", "float16", "float32"),
        ("stock", "bfloat16", "bfloat16"),
    ],
)
def test_a_runtime_without_a_dtype_is_priced_in_that_which_it_stores(
    name: str, dtype: str, stored: str
) -> None:
    """Oracle: numbers of the model times bytes of a number; and what an export to the runtime says that it takes."""
    target = load_study("default", {"target.runtime": name, "target.dtype": dtype}).target.value()
    table, plan = price_table(), FoldPlan.identity(NUM_BLOCKS)
    numbers = sum(parameter.numel() for parameter in dense_model().parameters())
    size = 4 if stored == "float32" else 2
    assert price(plan, table, target).weight_bytes == numbers * size
    assert exported_bytes(plan, table, target)[name] == numbers * size


def test_a_type_beside_a_runtime_without_it_is_told_by_its_option() -> None:
    typed = {"target.weights": "q4_0", "target.runtime": "stock"}
    with pytest.raises(
        SpecError, match=r"the command line: 1 fault\n  --weights: weights of a type are those of"
    ):
        load_study("default", typed, options={"target.weights": "--weights", "target.runtime": "--runtime"})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"target.weights": "q9_0"}, r"one of 'f32', .*'q4_0' or 'mxfp4'; got \"q9_0\""),
        ({"target.weights": "q4_0", "target.runtime": "stock"}, r"got 'q4_0' for the runtime 'stock'"),
        ({"target.rivals": ["int4"]}, r"rivals\[0\]: must be one of 'f32', .*; got \"int4\""),
    ],
)
def test_a_type_that_is_not_stored_is_refused(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_study("default", overrides)
