"""A GGUF file is opened as the model it was made of, or refused by name.

Oracle: the tiny model itself, opened by transformers, which never was a GGUF. What llama.cpp makes of the same files is
asked in tests/integration/test_gguf_runtime.py.
"""

from __future__ import annotations

import contextlib
import math
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as tf

from foldsearch.errors import ModelError
from foldsearch.model.gguf.file import model_parts, read_gguf
from foldsearch.model.gguf.inputs import in_eight_bits, rounded_inputs
from foldsearch.model.source import locate, open_config, open_dense, open_tokenizer, prepare
from tests.gguf_files import build, tensors_of, tiny_config, write_gguf

# long enough to leave every window and every original context of the tiny models
IDS_BT = torch.randint(3, 96, (2, 100), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS_BT).logits


def opened(path: Path, cache: Path) -> tf.PreTrainedModel:
    return open_dense(prepare(str(path), dtype="float32", cache_dir=cache))


# ------------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 12}),
        ("qwen3", {"attention_bias": True}),
        ("gemma", {}),
        ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
        ("gemma3_text", {}),
        ("phi3", {}),
        ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 9}),
        ("olmo2", {}),
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
        ("gpt_neox", {"hidden_act": "gelu_new"}),
        ("gpt_neox", {"hidden_act": "gelu_new", "use_parallel_residual": False, "rotary_pct": 0.5}),
    ],
)
def test_every_family_is_the_model_it_was_made_of(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(tiny_config(name, **changes))
    path = write_gguf(tmp_path / "m.gguf", model)
    again = opened(path, tmp_path / "cache")
    assert type(again) is type(model)
    # Not bit for bit: Gemma's norms are stored with one added, which rounds them.
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_mistral_with_a_window(tmp_path: Path) -> None:
    model = build(tiny_config("mistral", sliding_window=9))
    path = write_gguf(tmp_path / "m.gguf", model, keys={"attention.sliding_window": 9})
    assert torch.equal(logits(opened(path, tmp_path / "cache")), logits(model))


def test_windows_by_a_list(tmp_path: Path) -> None:
    types = [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    model = build(tiny_config("gemma3_text", num_hidden_layers=5, layer_types=types))
    keys = {"attention.sliding_window_pattern": [each == "sliding_attention" for each in types]}
    path = write_gguf(tmp_path / "m.gguf", model, keys=keys)
    torch.testing.assert_close(logits(opened(path, tmp_path / "cache")), logits(model), rtol=1e-4, atol=1e-4)


def test_gemma_3_without_a_window(tmp_path: Path) -> None:
    model = build(tiny_config("gemma3_text", layer_types=["full_attention"] * 7))
    path = write_gguf(tmp_path / "m.gguf", model, keys={"attention.sliding_window": None})
    torch.testing.assert_close(logits(opened(path, tmp_path / "cache")), logits(model), rtol=1e-4, atol=1e-4)


def test_fused_projections(tmp_path: Path) -> None:
    """Converters may store queries, keys and values as one tensor where transformers has three, and the reverse."""
    model = build(tiny_config("qwen2"))
    parts = dict(tensors_of(model))
    fused = {
        f"blk.{block}.attn_qkv.{kind}": np.concatenate(
            [parts[f"blk.{block}.attn_{one}.{kind}"] for one in "qkv"]
        )
        for block in range(5)
        for kind in ("weight", "bias")
    }
    left = tuple(
        f"blk.{block}.attn_{one}.{kind}" for block in range(5) for one in "qkv" for kind in ("weight", "bias")
    )
    path = write_gguf(tmp_path / "m.gguf", model, extra=fused, leave_out=left)
    assert torch.equal(logits(opened(path, tmp_path / "cache")), logits(model))

    model = build(tiny_config("phi3"))
    parts = dict(tensors_of(model))
    split = {
        f"blk.{block}.attn_{one}.weight": rows
        for block in range(5)
        for one, rows in zip("qkv", np.split(parts[f"blk.{block}.attn_qkv.weight"], [32, 48]), strict=True)
    }
    left = tuple(f"blk.{block}.attn_qkv.weight" for block in range(5))
    path = write_gguf(tmp_path / "p.gguf", model, extra=split, leave_out=left)
    assert torch.equal(logits(opened(path, tmp_path / "cache")), logits(model))


# --------------------------------------------------------------------------------------------------- scaled RoPE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "long_factor": [1.0, 2.0, 3.0, 5.0],
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "original_max_position_embeddings": 32,
    "attention_factor": 1.25,
}


def divisors(rope: dict[str, Any], head_dim: int = 8) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's scaling (conversion/llama.py)."""
    values = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * pair / head_dim)
        context, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength < context / high:
            values.append(1.0)
        elif wavelength > context / low:
            values.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, np.float32)


def tensor(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("name", "rope", "keys", "extra"),
    [
        pytest.param(
            "llama",
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {},
            id="linear",
        ),
        pytest.param(
            "qwen2",
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
            {"rope.scale_linear": 4.0},
            {},
            id="linear by its old key",
        ),
        pytest.param(
            "llama",
            {"rope_type": "default", "rope_theta": 500.0},
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
            {},
            id="none",
        ),
        pytest.param(
            "qwen3",
            YARN,
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.finetuned": True,
            },
            {},
            id="yarn",
        ),
        pytest.param(
            "llama",
            YARN | {"attention_factor": 1.5, "beta_fast": 4.0, "beta_slow": 2.0},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.yarn_attn_factor": 1.5,
                "rope.scaling.yarn_ext_factor": 1.0,
                "rope.scaling.yarn_beta_fast": 4.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
            {},
            id="yarn with its factors",
        ),
        pytest.param("llama", LLAMA3, {}, {"rope_freqs.weight": divisors(LLAMA3)}, id="llama3"),
        pytest.param(
            "llama",
            LONG
            | {
                "long_factor": [1.0, 1.7, 2.1, 2.2],
                "short_factor": [1.0, 1.7, 2.1, 2.2],
                "attention_factor": 1.0,
            },
            {},
            {"rope_freqs.weight": tensor([1.0, 1.7, 2.1, 2.2])},
            id="divisors that no formula gives",
        ),
        pytest.param(
            "phi3",
            LONG | {"partial_rotary_factor": 1.0},
            {
                "rope.scaling.type": "longrope",
                "rope.scaling.attn_factor": 1.25,
                "rope.scaling.original_context_length": 32,
            },
            {
                "rope_factors_long.weight": tensor(LONG["long_factor"]),
                "rope_factors_short.weight": tensor(LONG["short_factor"]),
            },
            id="longrope",
        ),
        pytest.param(
            "llama",
            LONG | {"long_factor": [4.0] * 4, "short_factor": [4.0] * 4, "attention_factor": 1.5},
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5},
            {},
            id="linear with an attention factor",
        ),
        pytest.param(
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {},
            id="linear, but not in the windows",
        ),
    ],
)
def test_scaled_rope_is_applied(
    name: str, rope: dict[str, Any], keys: dict[str, Any], extra: dict[str, np.ndarray], tmp_path: Path
) -> None:
    more = {"original_max_position_embeddings": 32} if name == "phi3" else {}
    model = build(tiny_config(name, rope_parameters=rope, **more))
    path = write_gguf(tmp_path / "m.gguf", model, keys=keys, extra=extra)
    again = opened(path, tmp_path / "cache")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    if rope.get("rope_type") == "llama3":  # by its own name, which programs know that read exports
        assert dict(again.config.rope_parameters) == LLAMA3
    plain = build(tiny_config(name))
    assert (logits(plain) - logits(model)).abs().max() > 0.01  # the scaling matters


@pytest.mark.parametrize("original", [64, 8192, 100_000])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_llama_3_scaling_is_recognised(head_dim: int, original: int, base: float) -> None:
    from foldsearch.model.gguf.rope import _llama3

    rope = LLAMA3 | {"rope_theta": base, "factor": 32.0, "original_max_position_embeddings": original}
    found = _llama3([float(value) for value in divisors(rope, head_dim)], base)
    if found is None:  # no pair turns slowly enough: then the factor is nowhere in the file
        assert divisors(rope, head_dim).max() < 32
        return
    again = divisors(rope | found, head_dim)
    np.testing.assert_allclose(again, divisors(rope, head_dim), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "keys", "extra", "message"),
    [
        ("llama", {"a.new.key": 1.0}, {}, r"llama\.a\.new\.key is 1\.0: foldsearch does not know this key"),
        ("llama", {"expert_count": 8}, {}, "a mixture of experts"),
        (
            "granite",
            {"rope.scaling.finetuned": False},
            {},
            "blocks that do not turn by position are not known here",
        ),
        ("granite", {"head_count": 3}, {}, r"granite\.head_count is 3"),
        (
            "stablelm",
            {},
            {"blk.0.attn_q_norm.weight": np.ones((4, 8), np.float32)},
            r"attn_q_norm\.weight would be left out: no part of a stablelm model",
        ),
        (
            "llama",
            {"attention.scale": 0.3},
            {},
            r"attention\.scale is 0\.3.*one over a root, which is 0\.353553",
        ),
        ("llama", {"logit_scale": 2.0}, {}, r"llama\.logit_scale is 2\.0"),
        ("llama", {"attention.causal": False}, {}, r"attention\.causal is False"),
        ("llama", {"final_logit_softcapping": 30.0}, {}, r"final_logit_softcapping is 30\.0"),
        (
            "llama",
            {"rope.dimension_count": 4},
            {},
            r"rope\.dimension_count is 4: it must be the width of a head, 8",
        ),
        ("llama", {"attention.value_length": 4}, {}, "keys and values of all blocks must have one width"),
        ("llama", {"attention.head_count": [4, 4, 2, 4, 4]}, {}, "the blocks differ in it"),
        ("llama", {"rope.scaling.type": "ntk"}, {}, "it must be none, linear, yarn or longrope"),
        ("llama", {"rope.scaling.type": "longrope"}, {}, "must hold both rope_factors_long"),
        ("llama", {"rope.scaling.alpha": 2.0}, {}, r"rope\.scaling\.alpha is 2\.0"),
        ("llama", {"rope.scaling.yarn_beta_fast": 8.0}, {}, "yarn_beta_fast is 8"),
        ("llama", {"rope.freq_base": "many"}, {}, r"rope\.freq_base is 'many': it must be a number"),
        ("llama", {"block_count": None}, {}, r"llama\.block_count is nothing: the file must say this"),
        (
            "llama",
            {},
            {"blk.0.attn_q_norm.weight": tensor([1.0] * 8)},
            r"blk\.0\.attn_q_norm\.weight would be left out",
        ),
        ("llama", {}, {"rope_freqs.weight": tensor([1.0] * 5)}, r"must hold 4 numbers above 0"),
        (
            "llama",
            {},
            {"blk.1.attn_q.weight": np.ones((32, 30), np.float32)},
            r"must have the shape \(32, 32\)",
        ),
        ("qwen2", {"attention.sliding_window": 9}, {}, r"qwen2\.attention\.sliding_window is 9"),
        ("qwen2", {}, {"output.bias": tensor([0.0] * 96)}, r"output\.bias would be left out"),
        ("olmo2", {"attention.sliding_window": 9}, {}, "with a window it is OLMo 3"),
        ("gemma2", {"rope.freq_base_swa": 9.0}, {}, "all blocks of Gemma 2 have one base"),
        ("gemma3_text", {"attention.sliding_window_pattern": [True]}, {}, "it must have 7 entries"),
        ("gpt_neox", {"attention.head_count_kv": 2}, {}, "keys must have as many heads as queries"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    name: str, keys: dict[str, Any], extra: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", build(tiny_config(name)), keys=keys, extra=extra)
    with pytest.raises(ModelError, match=message) as caught:
        prepare(str(path), dtype="float32", cache_dir=tmp_path / "cache")
    assert str(path) in str(caught.value)


def test_a_missing_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", build(tiny_config("llama")), leave_out=("blk.2.ffn_up.weight",))
    with pytest.raises(ModelError, match=r"the tensor blk\.2\.ffn_up\.weight is missing"):
        prepare(str(path), dtype="float32", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("general", "message"),
    [
        ({"type": "adapter"}, "this is a LoRA adapter, not a model. Merge it"),
        ({"type": "mmproj"}, "the vision or audio part of a model"),
        ({"type": "imatrix"}, "its general.type must be 'model'; got 'imatrix'"),
        ({"architecture": "clip"}, "the vision or audio part of a model"),
        (
            {"architecture": "mamba"},
            "its architecture is 'mamba'; of GGUF files foldsearch opens llama, qwen2",
        ),
    ],
)
def test_other_kinds_of_files(general: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", build(tiny_config("llama")), general=general)
    with pytest.raises(ModelError, match=message):
        open_config(locate(str(path)))


# -------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("whole") / "m.gguf", build(tiny_config("llama")))


def test_every_truncation_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelError, match="the GGUF file cannot be read") as caught:
            read_gguf((path,))
        assert "\n" not in str(caught.value)


def test_every_flipped_byte_of_the_header_is_a_sentence_or_harmless(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    path = tmp_path / "flipped.gguf"
    for place in range(0, 3_000, 11):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        with contextlib.suppress(ModelError):
            read_gguf((path,))


@pytest.mark.parametrize(
    ("place", "count", "message"),
    [
        (8, 1 << 60, "speaks of 1,152,921,504,606,846,976 tensors"),
        (16, 1 << 61, "metadata keys"),
        (24, 1 << 62, "bytes in a text"),
    ],
)
def test_an_absurd_size_takes_no_memory(
    whole: Path, tmp_path: Path, place: int, count: int, message: str
) -> None:
    data = bytearray(whole.read_bytes())
    data[place : place + 8] = struct.pack("<Q", count)
    path = tmp_path / "absurd.gguf"
    path.write_bytes(data)
    read_gguf((whole,))  # imports: not what is measured
    tracemalloc.start()
    with pytest.raises(ModelError, match=message):
        read_gguf((path,))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # bytes; the file has 100 kB


def test_an_absurd_tensor(tmp_path: Path) -> None:
    """A tensor of 2^40 values would need 4 TB: its end lies beyond the file's."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor_info("huge", (1 << 20, 1 << 20), np.dtype(np.float32), 1 << 42)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="it is truncated: the tensor huge ends at byte"):
        read_gguf((tmp_path / "m.gguf",))


def test_big_endian(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="the other byte order"):
        read_gguf((tmp_path / "m.gguf",))


def test_another_file_under_this_name(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("<html>Please log in</html>")
    with pytest.raises(ModelError, match="does not begin with the letters GGUF"):
        open_config(locate(str(tmp_path / "m.gguf")))


# -------------------------------------------------------------------------------------------------- several files


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    model = build(tiny_config("llama"))
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", model, tensors_a_file=20)
    return sorted(folder.iterdir())


def test_a_model_in_several_files_is_one(parts: list[Path], tmp_path: Path) -> None:
    assert [path.name for path in parts] == [f"tiny-{index:05}-of-00003.gguf" for index in (1, 2, 3)]
    expected = logits(build(tiny_config("llama")))
    for reference in (
        parts[0],
        parts[2],
        parts[0].parent,
    ):  # any part names all of them; so does their folder
        files = prepare(str(reference), dtype="float32", cache_dir=tmp_path / "cache")
        assert torch.equal(logits(open_dense(files)), expected)
        assert open_tokenizer(files).bos_token_id == 1
    one = prepare(str(parts[1]), dtype="float32", cache_dir=tmp_path / "cache")
    assert one.folder == files.folder


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"one of 3 parts.*missing tiny-00002-of-00003\.gguf"):
        locate(str(parts[0]))


def test_a_part_under_another_name(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(ModelError, match=r"says that it is part 1 of 3.*NAME-00001-of-00003\.gguf"):
        open_config(locate(str(renamed)))


def test_parts_in_the_wrong_order(parts: list[Path]) -> None:
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1])
    parts[1].with_name("x").rename(parts[2])
    with pytest.raises(ModelError, match="it says that it is part 3"):
        open_config(locate(str(parts[0])))


def test_parts_of_a_whole_file() -> None:
    assert model_parts(Path("m.gguf")) == (Path("m.gguf"),)
    assert model_parts(Path("m-00001-of-00001.gguf")) == (Path("m-00001-of-00001.gguf"),)


# ------------------------------------------------------------------------------------------------- inputs of products


def test_what_goes_into_a_product_is_rounded_to_eight_bits() -> None:
    """Oracle: q8_0's rounding, written out: the largest of 32 numbers is 127 steps, and a step is kept in 16 bits."""
    torch.manual_seed(0)
    values_TD = torch.randn(3, 64)
    blocks = values_TD.reshape(3, 2, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    expected_TD = ((blocks / step).round() * step.half().float()).reshape(3, 64)
    torch.testing.assert_close(in_eight_bits(values_TD), expected_TD)
    odd_TD = values_TD[:, :40]
    assert torch.equal(in_eight_bits(odd_TD), odd_TD)
    linear = torch.nn.Linear(64, 5).requires_grad_(False)
    before = linear(values_TD)
    with rounded_inputs(torch.nn.Sequential(linear)):  # type: ignore[arg-type]
        within = linear(values_TD)
    torch.testing.assert_close(within, expected_TD @ linear.weight.T + linear.bias)
    assert not torch.equal(within, before)
    assert torch.equal(linear(values_TD), before)
