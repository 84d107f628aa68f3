"""A plan as a file for other tools is what these tools understand by it.

Oracles: transformers, given the settings and the kept blocks' weights; a reader of mergekit's slices written here by
its documentation (sources, a model and a half-open range of layers, passed through in order); the list of blocks that
llama-quantize leaves out.
"""

import json
import re

import pytest
import torch
import transformers as tf
import yaml

from foldsearch.export.passport import is_passport, passport
from foldsearch.model.fold import fold
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import stock
from tests.tiny import CONFIGS, NUM_BLOCKS, dense_model


def made(text, name="llama", changed=""):
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    value = passport(
        plan, dense_model(name).config, base_model="org/x", dtype="float32", weights_changed=changed
    )
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_settings_and_the_kept_blocks_are_the_folded_model(name):
    text = "0 2-4"
    value, dense = made(text, name), dense_model(name)
    expected = stock.expand(fold(dense, FoldPlan.parse(text, NUM_BLOCKS)))
    config = type(dense.config)(**(dense.config.to_dict() | value["transformers"]))
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    weights = {}
    for key, tensor in dense.state_dict().items():
        block = re.search(r"(?<=\.)\d+(?=\.)", key)
        if block is None:
            weights[key] = tensor
        elif int(block[0]) in value["kept_blocks"]:
            new = value["kept_blocks"].index(int(block[0]))
            weights[key.replace(f".{block[0]}.", f".{new}.", 1)] = tensor
    model.load_state_dict(weights)
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("text", "blocks"), [("0 2-4", [0, 2, 3, 4]), ("0-4 3=3", [0, 1, 2, 3, 4, 3]), ("1", [1])]
)
def test_mergekit_passes_the_same_blocks_through(text, blocks):
    merge = yaml.safe_load(made(text)["mergekit"])
    assert (merge["merge_method"], merge["dtype"]) == ("passthrough", "float32")
    passed = []
    for part in merge["slices"]:
        (source,) = part["sources"]
        assert source["model"] == "org/x"
        passed += range(*source["layer_range"])
    assert passed == blocks


def test_llama_quantize_leaves_out_what_is_dropped():
    assert made("0 2 4")["llama_quantize"] == "llama-quantize --prune-layers 1,3 BASE.gguf FOLDED.gguf F16"
    assert made("0-4")["llama_quantize"] == "llama-quantize BASE.gguf FOLDED.gguf F16"


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("0 1=0 2-4", {"transformers", "llama_quantize", "mergekit"}),
        ("0 1a 2-4", {"transformers", "llama_quantize", "mergekit"}),
        ("0 1-2~linear 3-4", {"transformers", "llama_quantize", "mergekit"}),
        ("0-4 3=3+r2", {"transformers", "llama_quantize", "mergekit"}),
        ("0-4 3=3", {"transformers", "llama_quantize"}),
        ("0 2-4", set()),
    ],
)
def test_what_a_tool_cannot_do_is_said(text, without):
    value = made(text)
    assert {tool for tool in ("transformers", "llama_quantize", "mergekit") if value[tool] is None} == without
    assert set(value["why_not"]) == without
    assert value["plan"] == text


@pytest.mark.parametrize("name", CONFIGS)
def test_mergekit_does_not_cut_lists_by_block(name):
    """Seen with mergekit 0.1.5: no model where a config has such a list, the right one where it has none."""
    config = dense_model(name).config
    lists = [key for key in ("layer_types", "mlp_only_layers") if getattr(config, key, None)]
    value = made("0 2-4", name)
    assert (value["mergekit"] is None) == bool(lists)
    assert all(key in value["why_not"]["mergekit"] for key in lists[:1])


def test_weights_that_differ_are_told():
    assert made("0 2-4")["weights"].startswith("those of the base model")
    told = made("0 2-4", changed="healed in closed form")["weights"]
    assert told.startswith("others than the base model's: healed in closed form. ")
    assert "another model, and a worse one" in told


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("precious", False),
        ("[1]", False),
        ('{"plan": "0-3"}', False),
        (json.dumps(made("0 2-4")), True),
    ],
)
def test_only_a_plan_is_overwritten(text, ours, tmp_path):
    (tmp_path / "file").write_text(text)
    assert is_passport(tmp_path / "file") == ours
