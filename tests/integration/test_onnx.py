"""ONNX: what onnxruntime says of an export, against torch, in every family and for every kind of slot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foldsearch.errors import InputError
from foldsearch.export import Shipment, export
from foldsearch.export.recheck import recheck
from foldsearch.model.fold import fold
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import NOTHING, Beside, onnx
from foldsearch.runtimes.onnx_decoder import Decoder
from foldsearch.runtimes.onnx_runtime import Answers
from foldsearch.spec.study import TargetSettings
from tests.tiny import CONFIGS, NUM_BLOCKS, VOCABULARY, dense_model, price_table, tokenizer

EVERY_SLOT = "0 1=4+r4+n 2a 3~linear 4 4=4"
DROPPED = "0-1 3-4"
INSTEAD = {"lfm2": "0 1=3+r4+n 2a 3 4~linear 3=3", "qwen3_moe": "0 1=4a+r4+n 2a 3~linear 4"}
# Torch and onnxruntime sum in another order: about 1e-6 of the logits' size a step, over five blocks.
ROUNDING = 1e-4


@pytest.mark.runtimes  # a minute each; `make test` exports one model below
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(family: str, tmp_path: Path) -> None:
    same_as_torch(family, INSTEAD.get(family, EVERY_SLOT), tmp_path)


@pytest.mark.runtimes
def test_dropped_blocks(tmp_path: Path) -> None:
    same_as_torch("qwen2", DROPPED, tmp_path)  # whose attention types go by block


def same_as_torch(family: str, text: str, folder: Path) -> None:
    model = fold(dense_model(family), FoldPlan.parse(text, 5))
    onnx.write(model, folder, NOTHING)
    ids_BT = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    expected_BTV = model(ids_BT).logits.numpy()
    decoder = Decoder(folder, threads=1)
    # A prompt longer than a sliding window (9 tokens) and than none of it; steps of one token across its edge.
    for chunks in ((30,), (3, *([1] * 27)), (12, 1, 4, 13)):
        past, found = None, []
        for ids in ids_BT.split(chunks, 1):
            logits_BTV, past = decoder.read(ids.numpy(), past)
            found.append(logits_BTV)
        np.testing.assert_allclose(
            np.concatenate(found, 1), expected_BTV, atol=ROUNDING * np.abs(expected_BTV).max()
        )


def test_the_cache_of_windows_is_priced_as_it_is_held(tmp_path: Path) -> None:
    """The graph keeps every token, also of blocks that see a window of 9 of them."""
    model = dense_model("gemma3_text")
    onnx.write(model, tmp_path, NOTHING)
    _, past = Decoder(tmp_path, threads=1).read(np.full((1, 100), 5, dtype=np.int64))
    target = TargetSettings(dtype="float32", context=100, runtime="onnx").value()
    cost = price(FoldPlan.identity(NUM_BLOCKS), price_table("gemma3_text"), target)
    assert sum(value.nbytes for name, value in past.state.items()) == pytest.approx(cost.kv_bytes, rel=1e-3)


def test_what_is_not_installed_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(InputError, match=r"not installed here: onnxscript. Install them: pip install"):
        onnx.check_model(dense_model().config, 128)


@pytest.mark.runtimes  # test_runtimes.py has the bytes of a plan that shares
def test_a_weight_that_blocks_share_is_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for name, text in (("owner", "0-3"), ("child", "0-3 4=3")):
        (tmp_path / name).mkdir()
        onnx.write(fold(dense_model(), FoldPlan.parse(text, 5)), tmp_path / name, NOTHING)
        sizes[name] = (tmp_path / name / "model.onnx.data").stat().st_size
    assert sizes["child"] == sizes["owner"]


@pytest.mark.runtimes
@pytest.mark.parametrize("weights", ["float16", "int8", "int4"])
def test_weights_of_fewer_bits_are_those_that_onnxruntime_has(weights: str, tmp_path: Path) -> None:
    """Torch with the rounded numbers and onnxruntime with the stored ones; float16 is computed in float16 by torch."""
    model = onnx.rounded(fold(dense_model(), FoldPlan.parse(EVERY_SLOT, 5)), weights)
    onnx.write(model, tmp_path, Beside(weights=weights))
    ids_BT = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    expected_BTV = model(ids_BT).logits.float().numpy()
    logits_BTV, _ = Decoder(tmp_path, threads=1).read(ids_BT.numpy())
    rounding = 1e-2 if weights == "float16" else ROUNDING
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=rounding * np.abs(expected_BTV).max())


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.integers(1, 70))
def test_rounding_to_few_bits(seed: int, bits: int, inputs: int) -> None:
    """Off by half a step at most (the largest of the other sign by one), and rounding again changes nothing."""
    weight_OI = torch.randn(3, inputs, generator=torch.Generator().manual_seed(seed))
    found_OI = onnx.in_blocks(weight_OI, bits)
    largest = weight_OI.abs().amax()
    assert (found_OI - weight_OI).abs().amax() <= largest / 2 ** (bits - 1) * (1 + 1e-6)
    assert torch.equal(onnx.in_blocks(found_OI, bits), found_OI)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        ("bfloat16", "int4"),
        pytest.param("bfloat16", "", marks=pytest.mark.runtimes),
        pytest.param("float32", "float16", marks=pytest.mark.runtimes),
    ],
)
def test_what_is_exported_is_run_before_it_is_called_exported(
    dtype: str, weights: str, tmp_path: Path
) -> None:
    plan = FoldPlan.parse(DROPPED, 5)
    ids_NT = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    shipment = Shipment(plan, "onnx", dtype, ids_NT, weights=weights)
    model, words = fold(dense_model(), plan), tokenizer()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [2, 7]
    words.chat_template = "{{ messages[0]['content'] }}"
    report = export(model, words, tmp_path / "out", shipment)
    assert report.weights == (weights or "float32")  # it has no bfloat16
    assert report.engine is not None
    assert report.engine.mean_difference <= report.engine.tolerance
    assert "onnx_decoder" in (tmp_path / "out" / "README.md").read_text()
    assert report.chat is not None
    assert report.chat.stops == (2, 7)  # which its Decoder has read from the folder
    assert report.chat.prompt == "What is the capital of France?"
    if weights == "int4":
        found = recheck(tmp_path / "out")
        assert found.faults == found.skipped == []
        assert any("in onnxruntime" in words for words in found.passed)


def test_it_goes_on_after_a_text_as_transformers_does(tmp_path: Path) -> None:
    model, words = fold(dense_model(), FoldPlan.parse(DROPPED, NUM_BLOCKS)), tokenizer()
    onnx.write(model, tmp_path, NOTHING)
    words.save_pretrained(tmp_path)
    ids_BT = torch.tensor([words("w5 w9 w30").input_ids])
    made_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=0,
    )
    answers = Answers()
    answers.load(str(tmp_path), 1, 64, [5, 9])
    assert answers.write("w5 w9 w30", 30) == {"text": words.decode(made_BT[0, ids_BT.shape[1] :])}
