"""The cost table, and prices from it.

Oracles: fvcore on the real folded model, its parameters, the cache that it fills, the tensors that live while it runs,
and a closed form of Llama written down here.
"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from fvcore.nn import parameter_count
from hypothesis import Phase, given, settings
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP

from foldsearch.errors import ModelError, PlanError
from foldsearch.model.blocks import FAMILIES
from foldsearch.model.fold import fold
from foldsearch.model.measure import activation_numbers, last_logits_macs, measure
from foldsearch.model.starts import new_values
from foldsearch.plan.cost import Target, price
from foldsearch.plan.plan import FoldPlan
from tests.strategies import plans
from tests.tiers import some
from tests.tiny import CONFIGS, LLAMA, NUM_BLOCKS, VOCABULARY, WIDTH, WINDOW, dense_model, price_table

CONTEXT = 23  # longer than the windows, and neither of the lengths that measure() traces
TARGET = Target("float32", context=CONTEXT, batch=1, prefill_chunk=CONTEXT)
PLANS = {
    "identity": "0-4",
    "dropped": "0 3-4",
    "shared": "0 1=3 2=3 3-4",
    "adapters and output norms": "0 1=3+r3+n 2 3 4=0+r2",
    "halves": "0m 1a 2=3a+r3+n 3 4a=3",
    "repeats": "0-2 0=0+r3+n 1a=2 4",
    "everything": "0m 1=3 2=3a+r3+n 3 1a=3+r2+n",
    "linear": "0 1-2~linear 3-4",
    "ffn": "0 1-2~ffn 3-4",
    "swiglu": "0-2 3-4~swiglu7",
    "layer": "0-1~layer 2-4",
    "replaced": "0~ffn9 1=3+r3+n 2~layer 3 4~swiglu",
}
ALL_TRACED = ("gemma2", "gpt2", "lfm2", "qwen3_moe")  # a trace takes a second
TRACED = ("identity", "everything")
REPLACED_TRACED = ("llama", "gpt_neox", "opt")  # also where a unit stands elsewhere


def parse(text: str) -> FoldPlan:
    return FoldPlan.parse(text, NUM_BLOCKS)


def unique_parameters(model) -> int:
    """Numbers behind the parameters, each place in memory once."""
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


QUICK = ("llama", "gemma3_text", "gpt2", "lfm2", "qwen3_moe")


@pytest.mark.parametrize("name", some(QUICK, sorted(FAMILIES)))
def test_prices_are_what_the_real_folded_models_have(name):
    dense = dense_model(name)
    for label, text in PLANS.items():
        plan = parse(text)
        if not price_table(name).can_fold(plan):
            with pytest.raises(
                PlanError, match=r"runs the MLP of block|shared among blocks of one kind|some block attends"
            ):
                fold(dense, plan)
            continue
        cost, model = price(plan, price_table(name), TARGET), fold(dense, plan)
        assert cost.stored_bytes == 4 * unique_parameters(model) == 4 * parameter_count(model)[""], label
        traced = label in TRACED or (label == "replaced" and name in REPLACED_TRACED)
        if name in ALL_TRACED or traced:
            assert round(cost.prefill_macs * CONTEXT) == last_logits_macs(model, CONTEXT).total(), label
        assert cost.adapter_bytes == 4 * sum(value.numel() for value in new_values(model).values()), label
    weights = price(parse("0-4"), price_table(name), TARGET).weight_bytes
    assert weights == 4 * sum(p.numel() for p in dense.parameters())


@settings(max_examples=3, deadline=None, phases=[Phase.generate])  # shrinking would take minutes
@given(plan=plans(NUM_BLOCKS))
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_any_plans_price_is_what_its_model_has(name, plan):
    cost, model = price(plan, price_table(name), TARGET), fold(dense_model(name), plan)
    assert cost.stored_bytes == 4 * unique_parameters(model)
    assert round(cost.prefill_macs * CONTEXT) == last_logits_macs(model, CONTEXT).total()


@pytest.mark.parametrize("name", some(QUICK, sorted(FAMILIES)))
def test_the_cache_is_what_the_model_fills(name):
    """transformers keeps window − 1 tokens of a sliding window, because the next one is there when it is read; the
    price counts the window, so it is one token a sliding block above.
    """
    for text in PLANS.values():
        if not price_table(name).can_fold(parse(text)):
            continue
        model = fold(dense_model(name), parse(text))
        filled = DynamicCache(config=model.config)
        ids_BT = torch.full((2, CONTEXT), 5)
        with torch.no_grad():
            model(input_ids=ids_BT, past_key_values=filled, use_cache=True)
        held, sliding_token = 0, 0
        for layer in filled.layers:
            if hasattr(layer, "conv_states"):
                held += 4 * sum(state.numel() for state in layer.conv_states.values())
            elif getattr(layer, "keys", None) is not None and layer.keys.numel():
                held += 4 * (layer.keys.numel() + layer.values.numel())
                if layer.is_sliding:
                    assert layer.keys.shape[2] == WINDOW - 1
                    sliding_token += 4 * (layer.keys.numel() + layer.values.numel()) // (WINDOW - 1)
        target = Target("float32", context=CONTEXT, batch=2)
        assert price(parse(text), price_table(name), target).kv_bytes == held + sliding_token


def test_a_short_convolution_in_closed_form():
    """LFM2: in and out, the window's products, and a state of as many columns as the window, however long the text."""
    conv, attention = price_table("lfm2").blocks[0].attention, price_table("lfm2").blocks[1].attention
    assert conv.macs == conv.weights + 3 * WIDTH
    assert (conv.weights, conv.norms, conv.context_macs) == (4 * WIDTH**2, WIDTH + 3 * WIDTH, 0)
    assert (conv.kv_width, conv.window, attention.kv_width, attention.window) == (3 * WIDTH, 1, 2 * 2 * 8, 0)
    assert {block.mlp.kind for block in price_table("lfm2").blocks} == {"feed_forward"}


def test_experts_in_closed_form():
    """Memory holds all six of them; a token is multiplied by two, and by what chooses them."""
    experts, plain = price_table("qwen3_moe").blocks[0].mlp, price_table("qwen3_moe").blocks[1].mlp
    of_one = 3 * WIDTH * 16
    assert (experts.weights, experts.norms) == (0, 6 * of_one + 6 * WIDTH + WIDTH)
    assert experts.macs == 2 * of_one + 6 * WIDTH
    assert (plain.weights, plain.norms, plain.macs) == (3 * WIDTH * 40, WIDTH, 3 * WIDTH * 40)
    assert not price_table("qwen3_moe").is_uniform
    assert not price_table("lfm2").is_uniform
    assert price_table("llama").is_uniform


def test_windows_are_of_their_blocks():
    assert [block.attention.window for block in price_table("qwen3").blocks] == [WINDOW, 0, WINDOW, WINDOW, 0]
    assert {block.attention.window for block in price_table("mistral").blocks} == {WINDOW}
    assert {block.attention.window for block in price_table("gpt_neox").blocks} == {0}


@pytest.mark.parametrize(
    "name", [name for name in sorted(FAMILIES) if not getattr(CONFIGS[name](), "sliding_window", None)]
)
def test_the_working_set_is_what_lives(name):
    """On the CPU with torch's own attention. Where a window slides, a mask of tokens² comes on top of it."""
    model, found = dense_model(name), price_table(name)
    assert model.config._attn_implementation == "sdpa"
    for tokens in (CONTEXT, 50):
        assert found.activation_fixed + found.activation_width * tokens == activation_numbers(model, tokens)
    bytes_of = price(parse("0-4"), found, TARGET).activation_bytes
    assert bytes_of == 4 * (activation_numbers(model, CONTEXT) + VOCABULARY)


@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 1), (False, 2), (True, 4)])
def test_llama_in_closed_form(tied, kv_heads):
    width, heads, head_width, inner, blocks, vocabulary = 32, 4, 8, 40, 5, VOCABULARY
    found = measure(tf.LlamaConfig(**{**LLAMA, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}))
    attention = width * heads * head_width * 2 + width * kv_heads * head_width * 2  # q and o, k and v
    mlp = 3 * width * inner
    assert len(found.blocks) == blocks
    for block in found.blocks:
        assert block.attention.weights == block.attention.macs == attention
        assert block.mlp.weights == block.mlp.macs == mlp
        assert block.attention.norms == block.mlp.norms == width
        assert block.attention.output_norm == block.mlp.output_norm == width
        assert block.attention.context_macs == 2 * heads * head_width  # Q·Kᵀ and A·V
        assert block.mlp.context_macs == 0
        assert block.attention.kv_width == 2 * kv_heads * head_width
        rank_1 = 2 * (width + heads * head_width) + 2 * (width + kv_heads * head_width)
        assert block.attention.adapter_width == rank_1
        assert block.mlp.adapter_width == 3 * (width + inner)
        assert block.attention.window == block.mlp.window == block.mlp.kv_width == block.other == 0
    assert found.fixed_weights == vocabulary * width * (1 if tied else 2) + width
    assert found.head_macs == vocabulary * width
    assert found.fixed_macs == 0
    assert (found.width, found.vocabulary) == (width, vocabulary)


def test_depth_and_weights_are_not_needed():
    """A 7B shape is measured without its weights; its parameters are those its authors state."""
    config = tf.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    )
    cost = price(FoldPlan.identity(32), measure(config), Target())
    assert cost.weight_bytes == 2 * 6_738_415_616
    assert cost.kv_bytes == 2 * 32 * 2 * 4096 * 2048


def test_phi_4_is_a_phi_3():
    """The settings of microsoft/phi-4's config.json, as transformers reads them; its parameters, and its cache."""
    said = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 100352,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rms_norm_eps": 1e-05,
        "rope_theta": 250000,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 100257,
        "eos_token_id": 100265,
        "pad_token_id": 100349,
    }
    config = tf.AutoConfig.for_model(said.pop("model_type"), **said)
    cost = price(FoldPlan.identity(40), measure(config), Target())
    of_a_block = 5120 * (5120 + 2 * 1280) + 5120 * 5120 + 3 * 5120 * 17920 + 2 * 5120
    assert cost.weight_bytes == 2 * (40 * of_a_block + 2 * 100352 * 5120 + 5120)
    assert cost.kv_bytes == 2 * 40 * 2 * 1280 * 2048


@pytest.mark.parametrize("text", PLANS.values())
def test_where_both_units_read_one_norm_it_stays_with_the_position(text):
    """StableLM with a parallel residual: it is the units' together, and gone only where a network takes the place."""
    config = CONFIGS["stablelm"](use_parallel_residual=True, qk_layernorm=True)
    dense = tf.AutoModelForCausalLM.from_config(config).eval()
    found = measure(config)
    assert {block.other for block in found.blocks} == {2 * WIDTH}
    model = fold(dense, parse(text))
    assert price(parse(text), found, TARGET).stored_bytes == 4 * unique_parameters(model)


# ---- what cannot be counted is an error


@pytest.mark.parametrize("operation", ["matrix_exp", "inverse", "custom"])
def test_an_unknown_operation_is_an_error(monkeypatch, operation):
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x @ weight

    def forward(self, x):
        if operation == "custom":
            return Custom.apply(x, self.gate_proj.weight.T[:, : x.shape[-1]])
        square = self.gate_proj.weight[: x.shape[-1]]
        return x @ (torch.linalg.matrix_exp(square) if operation == "matrix_exp" else torch.inverse(square))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ModelError, match="every operation must be counted, but nothing here knows the cost"):
        measure(CONFIGS["llama"]())


def test_attention_in_plain_products_is_counted_too():
    config = CONFIGS["llama"]()
    config._attn_implementation = "eager"
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    cost = price(parse("0-4"), price_table("llama"), TARGET)
    assert last_logits_macs(model, CONTEXT).total() == round(cost.prefill_macs * CONTEXT)


def test_an_unknown_family_is_an_error():
    with pytest.raises(
        ModelError, match=r"'bloom'. Known: gemma, gemma2, gemma3_text, gpt2, gpt_neox, granite, lfm2, llama"
    ):
        measure(tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2))


def test_dynamic_rope_costs_what_plain_rope_does():
    """It looks at the values of positions, and a model without weights has none."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert measure(tf.LlamaConfig(**LLAMA, rope_parameters=rope)) == measure(tf.LlamaConfig(**LLAMA))
