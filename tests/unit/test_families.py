"""Every family, on a tiny random model whose norms and biases are away from their initial values.

Oracles: the dense model itself (identity); the dense model with blocks bypassed by hooks (dropping); a copy of the
dense model whose weights were overwritten (children, adapters, output norms, repeats); one full forward (cached
decoding); the model before it was saved (reload).
"""

import copy
from functools import cache

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import PlanError
from foldsearch.model.blocks import BY_BLOCK, FAMILIES, decoder_blocks, family_of, residual_multiplier
from foldsearch.model.fold import fold
from foldsearch.model.folded import folded_model_class
from foldsearch.model.measure import kept_by
from foldsearch.model.parts import Borrowed, OutputNorm, Replaced
from foldsearch.plan.plan import FoldPlan, Slot
from tests.tiny import CONFIGS, SHARING, WIDTH
from tests.tolerances import OTHER_WAY, REORDERED

NUM_BLOCKS, TOKENS = 6, 20
SLIDING, FULL = "sliding_attention", "full_attention"
# dropping any of the first blocks shifts this list against itself
TYPES = [SLIDING, SLIDING, FULL, SLIDING, FULL, FULL]
CHANGES = {  # to the tiny models, so that all that a family can have is there once
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "phi3": {"sliding_window": 7},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 0]},
    "stablelm": {"use_parallel_residual": True, "qk_layernorm": True},
}


CHANGES["lfm2"] = {"layer_types": ["conv", FULL, FULL, FULL, FULL, "conv"]}
CHANGES["qwen3_moe"] = {"mlp_only_layers": [2, 5], "decoder_sparse_step": 1}


def config(name):
    types = {"layer_types": TYPES} if "layer_types" in CONFIGS[name].keywords else {}
    types |= CHANGES.get(name, {})
    return CONFIGS[name](num_hidden_layers=NUM_BLOCKS, **types)


MIXED = "0 1=3+r4+n 2 3 3=3+r2 4=2a0m 5=2m"
REPLACED = "0 1-2~linear 3 4-5~swiglu8"
HALVES = "0m 1a 2=3a 3 4a=3+r2 5m"
LAYER = "0 1-3~layer 4=0 5~ffn"
INSTEAD = {  # blocks share with those of their kind, and no MLP with experts
    ("lfm2", LAYER): "0 1-3~layer 4 5~ffn",
    ("qwen3_moe", MIXED): "0 1=3a+r4+n 2 3 4a=2 5a",
    ("qwen3_moe", LAYER): "0 1-3~layer 4=0a 5~ffn",
}


@cache
def dense_model(name):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@cache
def token_ids():
    return torch.randint(3, 96, (2, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=token_ids() if ids is None else ids, use_cache=False).logits


def folded(name, text):
    """A folded model whose adapters and output norms are random, so that they matter."""
    model = fold(dense_model(name), FoldPlan.parse(INSTEAD.get((name, text), text), NUM_BLOCKS))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, (Borrowed, OutputNorm, Replaced)):
                for parameter in part.parameters(recurse=False):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


families = pytest.mark.parametrize("name", sorted(FAMILIES))
sharing = pytest.mark.parametrize("name", sorted(SHARING))


def test_every_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


@families
def test_identity_is_bit_identical_and_copies_nothing(name):
    dense = dense_model(name)
    model = fold(dense, FoldPlan.identity(NUM_BLOCKS))
    assert torch.equal(logits(model), logits(dense))
    theirs = {tensor.data_ptr() for tensor in dense.parameters()}
    assert {tensor.data_ptr() for tensor in model.parameters()} == theirs
    assert not any(parameter.requires_grad for parameter in model.parameters())


@families
@pytest.mark.parametrize("dropped", [(0,), (1, 2), (2, 4), (0, 3, 5)])
def test_dropping_is_bypassing(name, dropped):
    dense = dense_model(name)

    def bypass(module, args, kwargs, output):
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    hooks = [
        decoder_blocks(dense)[block].register_forward_hook(bypass, with_kwargs=True) for block in dropped
    ]
    try:
        expected = logits(dense)
    finally:
        for hook in hooks:
            hook.remove()
    model = fold(dense, FoldPlan.dropping(dropped, NUM_BLOCKS))
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, logits(dense), atol=1e-3)


def overwrite(dense, child, owner, unit):
    """Give a block's unit another block's linears: whatever is not called a norm."""
    blocks, count = decoder_blocks(dense), 0
    for path in unit.modules:
        target = dict(blocks[child].get_submodule(path).named_parameters())
        for key, value in blocks[owner].get_submodule(path).named_parameters():
            if "norm" not in key:
                target[key].data = value.data.clone()
                count += 1
    assert count


@families
def test_a_units_output_is_what_is_added_to_the_residual_stream(name):
    """So that an output norm stands there: a block's output is its input plus both units' outputs."""
    dense = dense_model(name)
    family, block = family_of(dense.config), decoder_blocks(dense)[1]
    added_BTD, seen = [], []

    def keep(module, args, output):
        added_BTD.append(output.view(2, TOKENS, WIDTH))

    hooks = [
        block.get_submodule(unit.output).register_forward_hook(keep)
        for unit in (family.attention, family.mlp)
    ]
    hooks.append(
        block.register_forward_hook(
            lambda module, args, kwargs, output: seen.extend([args or list(kwargs.values()), output]),
            with_kwargs=True,
        )
    )
    try:
        logits(dense)
    finally:
        for hook in hooks:
            hook.remove()
    (before_BTD, *_), after_BTD = seen
    torch.testing.assert_close(before_BTD + residual_multiplier(dense.config) * sum(added_BTD), after_BTD)


@sharing
def test_a_child_runs_its_owners_linears_and_its_own_norms(name):
    expected = copy.deepcopy(dense_model(name))
    family = family_of(expected.config)
    for unit in (family.attention, family.mlp):
        overwrite(expected, 1, 3, unit)
    overwrite(expected, 4, 2, family.attention)
    overwrite(expected, 4, 0, family.mlp)
    overwrite(expected, 5, 2, family.mlp)
    model = folded(name, "0 1=3 2 3 4=2a0m 5=2m")
    assert torch.equal(logits(model), logits(expected))


@sharing
def test_adapters_and_output_norms_equal_changed_weights(name):
    """W_child = W_owner + up · down, and (h − mean) / std · γ on what the unit adds."""
    model = folded(name, "0 1=3+r4+n 2 3 4 5")
    expected = copy.deepcopy(dense_model(name))
    family = family_of(expected.config)
    for unit in (family.attention, family.mlp):
        overwrite(expected, 1, 3, unit)
    ours, theirs = decoder_blocks(model)[1], decoder_blocks(expected)[1]
    num_adapters = 0
    for path, part in ours.named_modules():
        if isinstance(part, Borrowed):
            linear = theirs.get_submodule(path.replace(".inner", ""))
            change_OI = part.up @ part.down
            linear.weight.data += change_OI.T if isinstance(linear, Conv1D) else change_OI
            num_adapters += 1
        if isinstance(part, OutputNorm):

            def normalise(module, args, output, gamma=part.gamma):
                centred = output - output.mean(-1, keepdim=True)
                return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gamma

            theirs.get_submodule(path).register_forward_hook(normalise)
    of_block = decoder_blocks(dense_model(name))[1].modules()
    assert num_adapters == len([m for m in of_block if isinstance(m, (nn.Linear, Conv1D))])
    torch.testing.assert_close(logits(model), logits(expected), **OTHER_WAY)


@sharing
def test_a_repeat_is_the_block_once_more(name):
    """Oracle: the dense model with a copy of block 2 put in its list after block 4."""
    expected = copy.deepcopy(dense_model(name))
    blocks = decoder_blocks(expected)
    blocks.insert(5, copy.deepcopy(blocks[2]))
    expected.config.num_hidden_layers = NUM_BLOCKS + 1
    for key in BY_BLOCK:
        if (entries := getattr(expected.config, key, None)) is not None:
            setattr(expected.config, key, [*entries[:5], entries[2], *entries[5:]])
    model = folded(name, "0-4 2=2 5")
    assert torch.equal(logits(model), logits(expected))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("lfm2", "0 1=0 2-5", r"block 1 has 'self_attn' and block 0 has 'conv'\. .* only the MLP \(1=0m\)"),
        ("lfm2", "0 1m 5", r"some block attends, .* but '0 1m 5' keeps none that does\. Keep block 1\."),
        ("qwen3_moe", "0 1=3+r2 2-5", r"no MLP runs at another position\. Share its attention only \(1=3a\)"),
        ("qwen3_moe", "0-5 5=5", r"block 5 runs the MLP of block 5, but in a model with experts"),
    ],
)
def test_what_blocks_of_several_kinds_cannot_do_is_refused(name, text, words):
    with pytest.raises(PlanError, match=words):
        fold(dense_model(name), FoldPlan.parse(text, NUM_BLOCKS))


@families
def test_absent_units_add_nothing(name):
    expected = copy.deepcopy(dense_model(name))
    family = family_of(expected.config)

    def silence(module, args, output):
        return torch.zeros_like(output)

    for block, unit in ((0, family.attention), (1, family.mlp), (4, family.mlp), (5, family.attention)):
        if unit is family.attention:
            unit = family.attention_of(decoder_blocks(expected)[block])
        decoder_blocks(expected)[block].get_submodule(unit.output).register_forward_hook(silence)
    model = folded(name, "0m 1a 2-3 4a 5m")
    torch.testing.assert_close(logits(model), logits(expected), **REORDERED)


@families
@pytest.mark.parametrize("kind", ["linear", "ffn12", "swiglu12"])
def test_a_replacement_is_its_formula_in_place_of_the_run(name, kind):
    """Oracle: the dense model with the first block's output set to x + f(x) by a hook, and the others bypassed."""
    model = folded(name, f"0 1-3~{kind} 4 5")
    dense = dense_model(name)
    net = next(dict(part.named_parameters()) for part in model.modules() if isinstance(part, Replaced))

    def formula(x):
        if kind == "linear":
            return x @ net["down"].T + net["bias"]
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if kind == "ffn12":
            return (x @ net["up"].T + net["up_bias"]).clamp(min=0) @ net["down"].T + net["bias"]
        gate = x @ net["gate"].T
        return (gate * torch.sigmoid(gate) * (x @ net["up"].T)) @ net["down"].T

    def stand_in(module, args, kwargs, output):
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if module is decoder_blocks(dense)[1]:
            hidden_BTD = hidden_BTD + formula(hidden_BTD)
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    hooks = [
        decoder_blocks(dense)[block].register_forward_hook(stand_in, with_kwargs=True) for block in (1, 2, 3)
    ]
    try:
        expected = logits(dense)
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(logits(model), expected, **OTHER_WAY)


@families
def test_a_new_layer_is_a_copy_of_the_first_block_it_replaces(name):
    model = fold(dense_model(name), FoldPlan.parse("0 1-3~layer 4 5", NUM_BLOCKS))
    expected = fold(dense_model(name), FoldPlan.parse("0 1 4 5", NUM_BLOCKS))
    assert torch.equal(logits(model), logits(expected))
    theirs = {tensor.data_ptr() for tensor in dense_model(name).parameters()}
    own = [p for p in decoder_blocks(model)[1].parameters() if p.data_ptr() not in theirs]
    assert len(own) == len(list(decoder_blocks(dense_model(name))[1].parameters()))


@families
@pytest.mark.parametrize("text", ["0 2-3 5", MIXED, HALVES, REPLACED, LAYER])
def test_cached_decoding_equals_one_full_forward(name, text):
    model = folded(name, text)
    full_BTV = logits(model)
    cache, steps = None, []
    with torch.no_grad():
        for token in range(TOKENS):
            output = model(input_ids=token_ids()[:, token : token + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full_BTV, **OTHER_WAY)
    filled = [bool(kept_by(layer)) for layer in cache.layers]
    assert filled == [
        slot.attention is not None if isinstance(slot, Slot) else slot.is_block
        for slot in FoldPlan.parse(INSTEAD.get((name, text), text), NUM_BLOCKS).slots
    ]


@families
@pytest.mark.parametrize("text", [MIXED, HALVES, REPLACED])
def test_generate_equals_greedy_choice_without_a_cache(name, text):
    model = folded(name, text)
    ids = token_ids()[:1]
    written = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    for _ in range(5):
        next_BV = logits(model, ids)[:, -1]
        next_BV[:, 2] = -torch.inf  # min_new_tokens forbids the end token
        ids = torch.cat([ids, next_BV.argmax(-1, keepdim=True)], 1)
    assert written.tolist() == ids.tolist()


@families
@pytest.mark.parametrize("text", [MIXED, HALVES, REPLACED])
def test_saved_and_loaded_again_it_is_the_same(name, text, tmp_path):
    model = folded(name, text)
    model.save_pretrained(tmp_path)
    model_class = folded_model_class(name)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again.eval()), logits(model))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


@families
def test_a_deep_copy_shares_nothing_with_the_original(name):
    model = folded(name, MIXED)
    before = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    blocks = set(decoder_blocks(twin).modules())
    assert all(part.owner in blocks for part in twin.modules() if isinstance(part, Borrowed))
