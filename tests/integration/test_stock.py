"""A plan that drops blocks ships as a stock model: no code of ours, every list by block cut, equal to the bit.

Oracles: the folded model in this process; transformers in a process where foldsearch cannot be imported, on texts
longer than the windows of the tiny models; the dense model's own config.
"""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from foldsearch import runtimes
from foldsearch.model.blocks import FAMILIES
from foldsearch.model.fold import fold
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import stock, verify
from foldsearch.runtimes.process import ModelProcess
from tests.tiny import CONFIGS, EXPERTS, NUM_BLOCKS, WINDOW, dense_model

IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
DROPPING = ["0 2-4", "1 3", "0-3"]
# Nothing else may have an entry for each block: what transformers knows of a family is asked for below.
BY_BLOCK = {"layer_types", "no_rope_layers"}  # mlp_only_layers lists blocks by number


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with ModelProcess(tmp_path_factory.mktemp("process"), without_foldsearch=True) as alone:
        yield alone


@pytest.mark.parametrize("text", DROPPING)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_stock_transformers_loads_the_model_that_was_measured(name, text, process, tmp_path):
    assert IDS.shape[1] > 4 * WINDOW
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    model = fold(dense_model(name), plan)
    written, is_exact = stock.before_rounding(model)
    stock.write(written, tmp_path)
    assert is_exact == (name not in EXPERTS)  # whose products sum by where weights lie, which is alike here
    logits_BTV = verify.compared_logits(model, IDS)
    tensors = tmp_path / "tensors"
    save_file({"ids_NT": IDS, "logits_BTV": logits_BTV.contiguous()}, tensors)
    answer = process.ask(
        "load", folder=str(tmp_path), dtype="float32", attention=model.config._attn_implementation,
        threads=torch.get_num_threads(), tensors=str(tensors),
    )  # fmt: skip
    assert answer["wrong_keys"] == []
    assert answer["logits_max_difference"] == 0
    assert answer["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    kept = [slot.home for slot in plan.slots]
    said = json.loads((tmp_path / "config.json").read_text())
    theirs = dense_model(name).config.to_dict()
    assert (said["model_type"], said["architectures"]) == (name, [FAMILIES[name].stock])
    assert said.get("n_layer", said.get("num_hidden_layers")) == len(kept)
    for key in said:
        if isinstance(theirs.get(key), list) and len(theirs[key]) == NUM_BLOCKS:
            assert key in BY_BLOCK
            assert said[key] == [theirs[key][home] for home in kept]
    assert not {"fold", "auto_map", "kv_sharing_modes", "sliding_window_pattern"} & set(said)
    assert list(tmp_path.glob("*.py")) == []


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_count_of_blocks_without_a_window_follows_too(name):
    """Programs other than transformers read Qwen's windows from this count, not from the list."""
    settings = CONFIGS[name].keywords | {"layer_types": None, "max_window_layers": 3}
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name].func(**settings))
    written = stock.expand(fold(model, FoldPlan.parse("0 2-4", NUM_BLOCKS)))
    assert written.config.max_window_layers == 2
    again = type(written.config)(**(written.config.to_dict() | {"layer_types": None}))
    assert again.layer_types == written.config.layer_types


def test_a_period_of_windows_is_not_told_of_a_model_that_breaks_it(tmp_path):
    settings = CONFIGS["gemma3_text"].keywords | {"layer_types": None}
    model = tf.AutoModelForCausalLM.from_config(tf.Gemma3TextConfig(**settings, sliding_window_pattern=2))
    stock.expand(fold(model, FoldPlan.parse("0 2-4", NUM_BLOCKS))).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in said if key.endswith("sliding_window_pattern")]
    assert said["layer_types"] == [model.config.layer_types[home] for home in (0, 2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-4", "stock"),
        ("0 2-4", "stock"),
        ("0 1-2~layer 3-4", "stock"),  # a block with weights of its own
        ("0 1=0 2-4", "folded"),  # written out it would take the bytes of five blocks
        ("0-4 4=4", "folded"),
        ("0 1a 2-4", "folded"),
        ("0 1-2~linear 3-4", "folded"),
    ],
)
def test_a_plan_ships_as_the_stock_model_where_that_is_the_same_in_as_few_bytes(text, expected):
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    assert runtimes.runtime_for(plan, "folded", by_position=False).name == expected
    assert runtimes.runtime_for(plan, "stock", by_position=False).name == "stock"


def test_blocks_that_are_scaled_by_position_stay_where_they_are_in_a_stock_model():
    plan = FoldPlan.parse("0 2-4", NUM_BLOCKS)
    assert runtimes.runtime_for(plan, "folded", by_position=True).name == "folded"
    plan = FoldPlan.parse("0-3", NUM_BLOCKS)
    assert runtimes.runtime_for(plan, "folded", by_position=True).name == "stock"
