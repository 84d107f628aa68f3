"""What `fold` refuses and keeps, the parts, the stock model, and registration with transformers.

Oracles: values that follow from definitions; the folded model (for its stock model); a subprocess that loads a saved
model by AutoModelForCausalLM (for registration).
"""

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from foldsearch.errors import InputError, ModelError, PlanError
from foldsearch.export import Shipment, export, load_exported
from foldsearch.export import folder as export_folder
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.fold import cast, fold
from foldsearch.model.parts import AbsentMLP, Borrowed, OutputNorm
from foldsearch.plan.plan import FoldPlan, Slot
from foldsearch.runtimes import folded as folded_runtime
from foldsearch.runtimes import runtime_named
from foldsearch.runtimes.stock import expand
from tests.strategies import plans
from tests.tolerances import REORDERED

NUM_BLOCKS = 4


def config(**changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return tf.LlamaConfig(**{**sizes, **changes})


def dense_model(model_config=None):
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(model_config or config()).eval()


def plan(text):
    return FoldPlan.parse(text, NUM_BLOCKS)


IDS = torch.arange(2, 26).view(2, 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


# ---- what fold keeps


def test_settings_of_the_dense_model_are_kept():
    dense = dense_model().to(torch.bfloat16)
    dense.set_attn_implementation("eager")
    dense.generation_config.max_new_tokens = 7
    model = fold(dense, plan("0 1=2+r4+n 2 3"))
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.max_new_tokens == 7
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert fold(dense.train(), plan("0 2")).training
    # what is new is trained, so it is in float32; what comes out is in the model's dtype
    new = {
        p.dtype
        for m in model.modules()
        if isinstance(m, (Borrowed, OutputNorm))
        for p in m.parameters(recurse=False)
    }
    assert new == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_tied_embeddings_stay_tied():
    model = fold(dense_model(config(tie_word_embeddings=True)), plan("0 2-3"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_new_child_runs_as_its_owner_and_its_adapter_can_learn():
    dense = dense_model()
    model = fold(dense, plan("0 1=0+r4 2-3"))
    assert torch.equal(logits(model), logits(fold(dense, plan("0 1=0 2-3"))))  # up is zero
    child = next(m for m in model.modules() if isinstance(m, Borrowed))
    child.up.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert child.up.grad.abs().max() > 0


def test_the_start_of_adapters_is_the_same_every_time():
    first, second = (fold(dense_model(), plan("0 1=0+r4 2-3")).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_state_dict_holds_shared_weights_once():
    names = fold(dense_model(), plan("0 1=0+r4+n 2-3")).state_dict()
    ours = {name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")}
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj.inner"]
    linears += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj.inner"]
    assert ours == {
        *(f"{linear}.{part}" for linear in linears for part in ("down", "up")),
        "self_attn.o_proj.gamma",
        "mlp.down_proj.gamma",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }


def test_what_is_put_in_an_owners_place_runs_in_its_children_too():
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = fold(dense_model(), plan("0 1=0 2-3"))
    owner, child = (block.mlp for block in decoder_blocks(model)[:2])
    x = torch.randn(1, 3, 16)
    before = child.up_proj(x)
    owner.up_proj = Doubled(owner.up_proj)
    assert torch.equal(child.up_proj(x), 2 * before)


def test_hidden_states_of_every_position_are_given():
    output = fold(dense_model(), plan("0 1=0 3"))(input_ids=IDS, output_hidden_states=True)
    assert len(output.hidden_states) == 3 + 1


# ---- what fold refuses


def test_refusals_of_models():
    with pytest.raises(ModelError, match=r"'bloom'.*Known: .*llama"):
        fold(
            tf.BloomForCausalLM(tf.BloomConfig(hidden_size=16, n_head=2, n_layer=2, vocab_size=32)),
            plan("0-3"),
        )
    folded = fold(dense_model(), plan("0-3"))
    with pytest.raises(ModelError, match="folded already"):
        fold(folded, plan("0-3"))
    with pytest.raises(ModelError, match="LlamaModel"):
        fold(tf.LlamaModel(config()), plan("0-3"))


def test_refusals_of_plans():
    with pytest.raises(PlanError, match="5 blocks, but this one has 4"):
        fold(dense_model(), FoldPlan.identity(5))
    with pytest.raises(PlanError, match="rank is at most the model's width"):
        fold(dense_model(), plan("0 1=0+r500 2-3"))


# ---- the stock model


@pytest.mark.parametrize("text", ["0 2-3", "0 1=3 2 3 2=2", "0 1=3+r4 2=0a3m+r2 3"])
def test_stock_equals_folded(text):
    model = fold(dense_model(config(attention_bias=True)), plan(text))
    for part in model.modules():
        if isinstance(part, Borrowed) and part.rank:
            part.up.data.normal_(0, 0.1)
    written = expand(model)
    assert type(written) is tf.LlamaForCausalLM
    assert type(written.config) is tf.LlamaConfig
    assert len(decoder_blocks(written)) == plan(text).depth
    torch.testing.assert_close(logits(written), logits(model), **REORDERED)


def test_stock_gpt2_merges_conv1d(tmp_path):
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": NUM_BLOCKS, "n_head": 2, "n_positions": 32}
    model = fold(dense_model(tf.GPT2Config(**sizes)), plan("0 1=3+r4 2-3"))
    for part in model.modules():
        if isinstance(part, Borrowed):
            part.up.data.normal_(0, 0.1)
    torch.testing.assert_close(logits(expand(model)), logits(model), **REORDERED)
    by_position = dense_model(tf.GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True))
    assert expand(fold(by_position, plan("0-2")))
    given = Shipment(plan("1-3"), "stock", "float32", IDS)
    with pytest.raises(PlanError, match="by a block's position"):
        export(fold(by_position, plan("1-3")), None, tmp_path / "out", given)


@pytest.mark.parametrize(
    ("text", "what"), [("0 1=0+n 2-3", "output norm"), ("0 1a 2m 3", "without attention")]
)
def test_stock_refuses_what_stock_blocks_cannot_do(text, what):
    with pytest.raises(PlanError, match=what):
        runtime_named("stock").check(plan(text))


@settings(max_examples=20, deadline=None, phases=[Phase.generate])
@given(plan=plans(NUM_BLOCKS), stock=st.booleans())
def test_what_is_not_refused_is_the_same_model(plan, stock):
    """Oracle: the folded model. So the criterion that a search narrows its space by lets nothing wrong through."""
    if stock:  # as many as possible pass
        slots = [
            replace(slot, norm=False) if isinstance(slot, Slot) else replace(slot, kind="layer", size=0)
            for slot in plan.slots
        ]
        plan = FoldPlan(tuple(slots), NUM_BLOCKS)
    model = fold(dense_model(), plan)
    if runtime_named("stock").refusal(plan) is not None:
        with pytest.raises(PlanError, match="Export it to folded, or "):
            runtime_named("stock").check(plan)
        return
    written = expand(model)
    assert type(written) is tf.LlamaForCausalLM
    torch.testing.assert_close(logits(written), logits(model), **REORDERED)


def test_attention_types_of_the_stock_model_follow_the_blocks():
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    model_config = tf.Qwen2Config(
        **{
            k: getattr(config(), k)
            for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        },
        num_key_value_heads=1,
        num_hidden_layers=NUM_BLOCKS,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=types,
    )
    model = fold(dense_model(model_config), plan("1 2 3=1"))
    assert expand(model).config.layer_types == types[1:]
    assert torch.equal(logits(expand(model)), logits(model))


def test_cast_keeps_buffers_and_the_original():
    """Rounded rotary frequencies would be another model: from_pretrained keeps them in float32."""
    model = fold(dense_model(), plan("0 1=0+r4+n 3"))
    shipped = cast(model, torch.bfloat16)
    assert {p.dtype for p in shipped.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in shipped.buffers()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---- arguments of export, which need no process


def test_export_refuses_before_it_writes(tmp_path):
    model = fold(dense_model(), plan("0 2-3"))
    given = Shipment(plan=plan("0 2-3"), runtime="folded", dtype="float32", ids_NT=IDS)
    out = tmp_path / "out"
    with pytest.raises(PlanError, match=r"'0 2-3', not '0-1 3'"):
        export(model, None, out, replace(given, plan=plan("0 1 3")))
    with pytest.raises(InputError, match="folded, stock, gguf, onnx, executorch; got 'tvm'"):
        export(model, None, out, replace(given, runtime="tvm"))
    with pytest.raises(InputError, match="int8"):
        export(model, None, out, replace(given, dtype="int8"))
    with pytest.raises(InputError, match="token ids"):
        export(model, None, out, replace(given, ids_NT=IDS[:, :1]))
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        export(dense_model(), None, out, given)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(InputError, match=r"exists already\. Choose another folder, or move it away"):
        export(model, None, out, given)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be made: .*Choose another folder"):
        export(model, None, tmp_path / "file" / "out", given)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_exported(out)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = fold(dense_model(), plan("0 2-3"))
    given = Shipment(plan=plan("0 2-3"), runtime="folded", dtype="float32", ids_NT=IDS)
    (tmp_path / "old").mkdir()

    def fill_the_disk(model, folder, beside):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folded_runtime, "write", fill_the_disk)
    with pytest.raises(InputError, match=r"No space left on device.*Make room"):
        export(model, None, tmp_path / "old", given, overwrite=True)
    monkeypatch.setattr(export_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(InputError, match=r"needs 0\.00 GB, but .* has 0\.00 GB free"):
        export(model, None, tmp_path / "new", given)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# ---- registration

IMPORTS = {
    "foldsearch first": "from foldsearch.model.register import register; register(); import sys; "
    "assert not {'torch', 'transformers'} & set(sys.modules)",
    "transformers first": "from transformers import AutoModelForCausalLM; "
    "from foldsearch.model.register import register; register()",
    "looked for before": "from foldsearch.model.register import register; register(); from importlib import util; "
    "util.find_spec('transformers.models.auto.modeling_auto')",
    "AutoConfig alone": "from foldsearch.model.register import register; register(); "
    "from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])",
}


@pytest.mark.parametrize(
    "order", [pytest.param(one, marks=[pytest.mark.slow] * ("first" in one)) for one in IMPORTS]
)
def test_a_folded_model_loads_by_auto_class_in_any_order_of_imports(order, tmp_path):
    model = fold(dense_model(), plan("0 1=3 3"))
    model.save_pretrained(tmp_path)
    code = (
        f"import sys; {IMPORTS[order]}; from transformers import AutoModelForCausalLM; "
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__); "
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('foldsearch')]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "FoldedLlamaForCausalLM", done.stderr


def test_an_absent_mlp_gives_zeros():
    assert AbsentMLP()(torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
