"""What would fail later, or give figures of another model, is a sentence when the model is opened.

Each model is made wrong in one way; the oracle is what its own files say.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from foldsearch.errors import ModelError
from foldsearch.model import source
from foldsearch.model.checks import check_finite, check_lengths, check_tokens
from foldsearch.model.source import locate, open_config, open_tokenizer, prepare
from tests.gguf_files import build, tiny_config, write_gguf
from tests.tiny import CONFIGS, save_model, tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_model(tmp_path / "m"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", ["in place", "converted", "sharded", "bin", "gguf"])
def test_a_weight_that_is_no_number_is_named(way: str, value: float, tmp_path: Path) -> None:
    model = build(tiny_config("llama"))
    model.model.layers[3].mlp.down_proj.weight.data[5, 7] = value
    path = tmp_path / "m"
    if way == "gguf":
        path = write_gguf(tmp_path / "m.gguf", model)
    elif way == "bin":
        model.config.save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    else:
        model.save_pretrained(path, max_shard_size="20KB" if way == "sharded" else "1GB")
    dtype = "bfloat16" if way == "converted" else "float32"
    with pytest.raises(ModelError, match=r"NaN or infinity in model\.layers\.3\.mlp\.down_proj\.weight"):
        prepare(str(path), dtype=dtype, cache_dir=tmp_path / "cache")


def test_files_in_place_are_looked_at_once_for_each_content(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    read: list[object] = []
    monkeypatch.setattr(
        "foldsearch.model.checks.check_finite", lambda reference, tensors: read.append(reference)
    )
    for _ in range(2):
        prepare(str(folder), dtype="float32", cache_dir=tmp_path / "cache")
    assert len(read) == 1
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: value + 1 for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    prepare(str(folder), dtype="float32", cache_dir=tmp_path / "cache")
    assert len(read) == 2


def test_large_numbers_are_numbers() -> None:
    """Their sum overflows, but none of them is infinite."""
    check_finite("m", [("w", torch.full((4,), 3e38)), ("ids", torch.tensor([1]))])
    with pytest.raises(ModelError, match=r"a, b, c and 1 more"):
        check_finite("m", [(name, torch.tensor([float("nan")])) for name in "abcd"])


# ----------------------------------------------------------------------------------------------------------- tokens


def test_tokens_beyond_the_embedding_are_named(folder: Path, tmp_path: Path) -> None:
    more = tokenizer()
    more.add_tokens(["America", "freedom"])
    more.save_pretrained(folder)
    files = prepare(str(folder), dtype="float32", cache_dir=tmp_path / "cache")
    for place in (locate(str(folder)), files):
        with pytest.raises(ModelError, match=r"has 96;.*the token 'America' with the id 96 \(and 1 more"):
            open_tokenizer(place)


def test_a_padding_token_beyond_the_embedding(folder: Path) -> None:
    more = tokenizer()
    more.add_special_tokens({"pad_token": "<new>"})
    more.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"the token '<new>' with the id 96"):
        open_tokenizer(locate(str(folder)))


def test_a_special_token_that_no_text_becomes_is_left_alone(folder: Path) -> None:
    """As the mark of an image in the tokenizer of the text-only Gemma 3."""
    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<image>"]})
    more.save_pretrained(folder)
    opened = open_tokenizer(locate(str(folder)))
    check_tokens("m", 96, [torch.tensor(opened("w5 w6").input_ids)])
    with pytest.raises(
        ModelError, match="holds the token with the id 96, but the model's embedding has 96 rows"
    ):
        check_tokens("m", 96, [torch.tensor(opened("w5 <image>").input_ids)])


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [96, [2, 400]])
def test_special_ids_beyond_the_vocabulary(name: str, place: str, value: Any, folder: Path) -> None:
    if isinstance(value, list) and name != "eos_token_id":
        value = value[1]
    change(folder / place, **{name: value})
    wrong = value[1] if isinstance(value, list) else value
    with pytest.raises(
        ModelError, match=rf"{name} of {place} must be one of the model's 96 tokens; got {wrong}"
    ):
        open_config(locate(str(folder)))


@pytest.mark.parametrize("text", ["[1, 2]", "3", '[["eos_token_id", 400], 2]', "{"])
def test_a_generation_config_that_is_no_table_is_left_alone(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    open_config(locate(str(folder)))


def test_no_padding_token_as_the_first_llamas_said_it(folder: Path) -> None:
    change(folder / "config.json", pad_token_id=-1)
    open_config(locate(str(folder)))


# ---------------------------------------------------------------------------------------------------------- lengths


def test_sequences_longer_than_the_model_was_made_for() -> None:
    for name in ("llama", "gpt2", "opt"):
        with pytest.raises(
            ModelError, match=r"at most 128 tokens; got sequences of 129\. Set sequence_length"
        ):
            check_lengths("m", CONFIGS[name](), sequence_length=129, context=128, is_default=True)
        assert check_lengths("m", CONFIGS[name](), sequence_length=128, context=128, is_default=False) == ""


def test_a_context_longer_than_the_model_was_made_for() -> None:
    for name in ("gpt2", "opt"):
        with pytest.raises(
            ModelError, match=r"the model has 128 positions; got a context of 129 under \[target\]"
        ):
            check_lengths("m", CONFIGS[name](), sequence_length=16, context=129, is_default=False)
    words = check_lengths("m", CONFIGS["llama"](), sequence_length=16, context=129, is_default=False)
    assert words.startswith("the target's context of 129 tokens is longer than the 128")


def test_the_default_context_is_told_where_the_model_has_fewer_positions() -> None:
    for name in ("gpt2", "opt"):
        words = check_lengths("m", CONFIGS[name](), sequence_length=16, context=2048, is_default=True)
        assert "128 positions" in words
        assert "--context 128" in words
    assert check_lengths("m", CONFIGS["llama"](), sequence_length=16, context=2048, is_default=True) == ""


# ---------------------------------------------------------------------------------------------------- what lies there


def test_an_adapter_beside_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"beside the model.*not be a part of what is measured\. Merge it"):
        locate(str(folder))


@pytest.mark.parametrize("content", ['{"base_model_name_or_path": "org/base"}', "not json"])
def test_a_folder_that_holds_an_adapter_only(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    base = r" \(org/base\)" if "org" in content else ""
    with pytest.raises(
        ModelError, match=rf"an adapter only.*Merge it into its base model{base} \(merge_and_unload"
    ):
        locate(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_missing_shard_is_named(dtype: str, tmp_path: Path) -> None:
    build(tiny_config("llama")).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"every file that the index.*missing {shards[1].name}"):
        prepare(str(tmp_path / "m"), dtype=dtype, cache_dir=tmp_path / "cache")


def test_a_folded_export_is_refused_in_words(tmp_path: Path) -> None:
    from foldsearch.model.fold import fold
    from foldsearch.plan.plan import FoldPlan
    from foldsearch.runtimes import folded
    from tests.tiny import dense_model

    plan = FoldPlan.parse("0-2 3=2 4", 5)
    (tmp_path / "m").mkdir()
    folded.write(fold(dense_model(), plan), tmp_path / "m")
    with pytest.raises(
        ModelError, match=r"dense model.*the plan '0-2 3=2 4' of a model of 5 blocks.*--to stock"
    ):
        open_config(locate(str(tmp_path / "m")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_an_export_that_only_drops_blocks_is_a_dense_model(name: str, dtype: str, tmp_path: Path) -> None:
    """Oracle: the folded model itself, on a text longer than its windows."""
    from foldsearch.model.fold import fold
    from foldsearch.plan.plan import FoldPlan
    from foldsearch.runtimes import folded
    from tests.tiny import dense_model

    (tmp_path / "m").mkdir()
    folded.write(fold(dense_model(name), FoldPlan.parse("0 2-4", 5)), tmp_path / "m")
    expected = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=getattr(torch, dtype))
    assert type(expected).__name__.startswith("Folded")
    model = source.open_dense(prepare(str(tmp_path / "m"), dtype=dtype, cache_dir=tmp_path / "cache"))
    assert type(model) is type(dense_model(name))
    assert model.config.num_hidden_layers == 4
    ids_BT = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BT).logits, expected(ids_BT).logits)


def test_the_tokenizer_of_a_gguf_is_looked_at_too(tmp_path: Path) -> None:
    model = build(tiny_config("llama", vocab_size=90))
    from tests.gguf_files import write_words

    path = write_gguf(
        tmp_path / "m.gguf", model, tokenizer=lambda writer, vocabulary: write_words(writer, 96)
    )
    with pytest.raises(ModelError, match=r"has 90; the tokenizer has the token 'w90'"):
        open_tokenizer(locate(str(path)))


def test_nothing_of_this_is_said_of_a_sound_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    files = prepare(str(copy), dtype="float32", cache_dir=tmp_path / "cache")
    assert files.folder == copy
    assert isinstance(open_tokenizer(files), tf.PreTrainedTokenizerBase)
    assert source.open_dense(files).config.vocab_size == 96
