"""A tokenizer of transformers in a GGUF file cuts texts as before: in our reader, and in llama.cpp itself.

Oracles: the tokenizer in transformers; llama.cpp (PyPI xllamacpp), asked once in a process of its own.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foldsearch.errors import ModelError
from foldsearch.model.gguf.file import read_gguf
from foldsearch.model.gguf.tokenizer import _LLAMA3, _QWEN2, _SPLITS
from foldsearch.model.gguf.vocabulary import describe_tokenizer
from foldsearch.model.source import locate, open_tokenizer
from foldsearch.runtimes import Beside
from foldsearch.runtimes import gguf as runtime
from tests.gguf_files import build, tiny_config, write_gguf
from tests.gguf_tokenizers import TEMPLATE, TEXTS, TOKENIZERS, bytes_tokenizer, with_added
from tests.llama_cpp import ask_llama_cpp
from tests.tiny import tokenizer as words_tokenizer

VOCABULARY = 320
PLAIN = [unicodedata.normalize("NFC", text) for text in TEXTS if "<x>" not in text]
WITH_SPECIAL = "the<x>cat<e> in"


def pieces(normalizer: Any, pre: Any = None, *, begins: bool = True) -> PreTrainedTokenizerFast:
    """A SentencePiece vocabulary as converters write it: byte fallback, merges by score."""
    parts = [
        "▁",
        "t",
        "h",
        "e",
        "a",
        "b",
        "c",
        "i",
        "n",
        "s",
        "th",
        "he",
        "the",
        "▁the",
        "▁t",
        "ab",
        "▁a",
        "▁ab",
        "in",
    ]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [
        (word[:cut], word[cut:])
        for word in ("th", "the", "▁the", "in", "▁a", "ab", "▁t", "▁ab", "he")
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizer
    if pre is not None:
        backend.pre_tokenizer = pre
    return with_added(backend, "</s>", begins=begins)


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPACES = normalizers.Replace(" ", "▁")
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: bytes_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: bytes_tokenizer(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "llama-bpe": lambda: bytes_tokenizer(split(_LLAMA3), whole=True, begins=True),
    "qwen2": lambda: bytes_tokenizer(split(_QWEN2), composed=True),
    "llama-2": lambda: pieces(normalizers.Sequence([normalizers.Prepend("▁"), SPACES])),
    "gemma": lambda: pieces(SPACES),
    "mistral": lambda: pieces(
        None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False), begins=False
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """The file with each tokenizer, and how llama.cpp cuts the texts."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("vocabularies")
    model = build(tiny_config("llama", vocab_size=VOCABULARY, num_hidden_layers=1))
    jobs = []
    for label, kind in KINDS.items():
        (folder / label).mkdir()
        runtime.write(model, folder / label, Beside(tokenizer=kind(), weights="f32"))
        jobs.append(
            {
                "file": str(folder / label / "model.gguf"),
                "prompts": [],
                "texts": [*PLAIN, WITH_SPECIAL],
                "context": 128,
                "vocabulary": VOCABULARY,
            }
        )
    answers = ask_llama_cpp(jobs)
    return {
        label: (Path(job["file"]), answer["texts"])
        for label, job, answer in zip(KINDS, jobs, answers, strict=True)
    }


@pytest.mark.parametrize("label", KINDS)
def test_llama_cpp_cuts_texts_as_transformers_does(label: str, cut) -> None:
    path, answers = cut[label]
    theirs, ours = KINDS[label](), open_tokenizer(locate(str(path)))
    for text, ids in zip(PLAIN, answers, strict=False):
        assert ours(text).input_ids == ids, text
        if label != "mistral" or not text.startswith(" "):  # where transformers puts no second space in front
            assert theirs(text).input_ids == ids, text
    assert ours(WITH_SPECIAL).input_ids == answers[-1]
    if label not in ("llama-2", "mistral"):  # which put a space in front, and llama.cpp after <x> too
        assert theirs(WITH_SPECIAL).input_ids == answers[-1]
    assert ours.chat_template == TEMPLATE
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_the_names_of_the_ways_are_those_of_llama_cpp() -> None:
    names = {
        label: describe_tokenizer(kind(), VOCABULARY)[0]["tokenizer.ggml.pre"][0]
        for label, kind in KINDS.items()
    }
    assert {label: name for label, name in names.items() if label in _SPLITS} == {
        label: label for label in KINDS if label in _SPLITS
    }
    assert {names["llama-2"], names["gemma"], names["mistral"]} == {"default"}


def test_what_llama_cpp_does_not_do_is_told() -> None:
    _, note = describe_tokenizer(KINDS["qwen2"](), VOCABULARY)
    assert note == (
        "llama.cpp cuts letters whose accents are characters of their own in another way than transformers does."
    )
    assert describe_tokenizer(KINDS["gpt-2"](), VOCABULARY)[1] == ""


@pytest.mark.parametrize("label", ["smollm", "pieces-True-True"])
def test_the_tokenizer_of_a_gguf_is_kept_as_it_came(label: str, tmp_path: Path) -> None:
    model = build(tiny_config("llama", vocab_size=VOCABULARY, num_hidden_layers=1))
    path = write_gguf(tmp_path / "came.gguf", model, tokenizer=TOKENIZERS[label])
    (tmp_path / "out").mkdir()
    tokenizer = open_tokenizer(locate(str(path)))
    runtime.write(model, tmp_path / "out", Beside(tokenizer, "f32", gguf=(path,)))
    came = read_gguf((path,)).tokenizer
    assert came
    assert read_gguf((tmp_path / "out" / "model.gguf",)).tokenizer == came


def odd() -> PreTrainedTokenizerFast:
    """Byte-level, but cut at vowels."""
    return bytes_tokenizer(split("[aeiou]"))


def prefixed() -> PreTrainedTokenizerFast:
    """With a space in front of every text, which no way of llama.cpp has."""
    return bytes_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True))


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (prefixed, "no way that llama.cpp cuts text gives its tokens"),
        (words_tokenizer, "it is of the kind WordLevel, and llama.cpp has byte-level and SentencePiece BPE"),
        (odd, "no way that llama.cpp cuts text gives its tokens for \"the cat's in"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tokenizer, why: str) -> None:
    with pytest.raises(ModelError, match="cannot be converted") as caught:
        describe_tokenizer(tokenizer(), VOCABULARY)
    assert why in str(caught.value)
    assert str(caught.value).endswith(
        "Export it to stock, or give a GGUF of the base model as --model: its tokenizer is kept."
    )


def test_a_chat_ends_with_its_own_token(tmp_path: Path) -> None:
    model = build(tiny_config("llama", vocab_size=VOCABULARY, num_hidden_layers=1))
    model.generation_config.eos_token_id = [0, 7]
    runtime.write(model, tmp_path, Beside(KINDS["gpt-2"](), "f32"))
    metadata = read_gguf((tmp_path / "model.gguf",)).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    assert metadata["tokenizer.ggml.eot_token_id"] == 7
