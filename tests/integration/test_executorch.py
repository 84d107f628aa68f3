"""ExecuTorch: what its runtime says of an export, against torch. `make runtimes` installs it; else it is skipped."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from foldsearch.errors import InputError, ModelError
from foldsearch.export import Shipment, export
from foldsearch.export.recheck import recheck
from foldsearch.model.fold import fold
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import Beside, executorch, runtime_named
from tests.tiny import CONFIGS, VOCABULARY, dense_model, tokenizer

NOT_INSTALLED = find_spec("executorch") is None
EVERY_SLOT = "0 1=4+r4+n 2a 3~linear 4 4=4"
DROPPED = "0-1 3-4"
CONTEXT = 64
HELD = runtime_named("executorch").families
WINDOWED = [name for name, config in CONFIGS.items() if executorch.has_windows(config())]
# Torch and XNNPACK sum in another order: about 1e-6 of the logits' size a step, over five blocks.
ROUNDING = 1e-4
# Of GELU by tanh XNNPACK has an approximation of its own: with SiLU in its place a Gemma is 4e-7 away, with it 2e-4.
GELU = {"gemma": 1e-3}


def in_executorch(test):
    """A test that needs it, and takes minutes."""
    skipped = pytest.mark.skipif(NOT_INSTALLED, reason="executorch is not installed: make runtimes")
    patient = pytest.mark.timeout(1800)(pytest.mark.runtimes(skipped(test)))
    # what it brings warns of things to come when it is imported
    return pytest.mark.filterwarnings("ignore")(patient)


@in_executorch
@pytest.mark.parametrize("family", [name for name in CONFIGS if name in HELD and name not in WINDOWED])
def test_every_family_without_windows(family: str, tmp_path: Path) -> None:
    same_as_torch(family, DROPPED, tmp_path)


@in_executorch
def test_every_kind_of_slot(tmp_path: Path) -> None:
    same_as_torch("llama", EVERY_SLOT, tmp_path)


def same_as_torch(family: str, text: str, folder: Path) -> None:
    from foldsearch.runtimes.executorch_decoder import Decoder

    model = fold(dense_model(family), FoldPlan.parse(text, 5))
    executorch.write(model, folder, Beside(context=CONTEXT))
    ids_BT = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))
    expected_BTV = model(ids_BT).logits.numpy()
    decoder = Decoder(folder, threads=1)
    # More than are read at a time; one by one; and steps of other sizes.
    for chunks in ((40,), (3, *([1] * 37)), (12, 1, 4, 23)):
        past, found = None, []
        for ids in ids_BT.split(chunks, 1):
            logits_BTV, past = decoder.read(ids, past)
            found.append(logits_BTV.numpy())
        tolerance = GELU.get(family, ROUNDING) * np.abs(expected_BTV).max()
        np.testing.assert_allclose(np.concatenate(found, 1), expected_BTV, atol=tolerance)
    with pytest.raises(ValueError, match="room for 64 tokens, and 40 were read; got 40 more"):
        decoder.read(ids_BT, past)


@in_executorch
def test_what_is_exported_is_run_before_it_is_called_exported(tmp_path: Path) -> None:
    plan = FoldPlan.parse(DROPPED, 5)
    ids_NT = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    shipment = Shipment(plan, "executorch", "bfloat16", ids_NT, context=CONTEXT)
    report = export(fold(dense_model(), plan), tokenizer(), tmp_path / "out", shipment)
    assert report.weights == "float32"  # it has no bfloat16
    assert report.engine is not None
    assert report.engine.mean_difference <= report.engine.tolerance
    assert "executorch_decoder" in (tmp_path / "out" / "README.md").read_text()


@in_executorch
@pytest.mark.parametrize("shows_text", [True, False])
def test_texts_longer_than_its_cache_are_asked_up_to_there(shows_text: bool, tmp_path: Path) -> None:
    plan = FoldPlan.parse(DROPPED, 5)
    ids_NT = torch.randint(3, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    shipment = Shipment(plan, "executorch", "float32", ids_NT, context=16, shows_text=shows_text)
    words = tokenizer()
    words.chat_template = "{{ 'w5 ' * 17 }}"  # a question for which there is no room
    report = export(fold(dense_model(), plan), words, tmp_path / "out", shipment)
    assert report.tokens == 3 * 15  # that are foretold
    assert report.chat is not None
    assert report.chat.answer == ""
    assert recheck(tmp_path / "out").faults == []


@in_executorch
def test_it_goes_on_after_a_text_as_transformers_does(tmp_path: Path) -> None:
    from foldsearch.runtimes.executorch_runtime import Answers

    model, words = fold(dense_model(), FoldPlan.parse(DROPPED, 5)), tokenizer()
    executorch.write(model, tmp_path, Beside(context=CONTEXT))
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
    answers.load(str(tmp_path), 1, CONTEXT, [5, 9])
    assert answers.write("w5 w9 w30", 30) == {"text": words.decode(made_BT[0, ids_BT.shape[1] :])}


def test_what_is_not_installed_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"executorch, which is not installed here. Install it: pip install"):
        executorch.check_model(dense_model().config, 128)


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match=r"look at the last ones only. Export it to onnx or gguf"):
        executorch.check_model(dense_model(family).config, 128)
