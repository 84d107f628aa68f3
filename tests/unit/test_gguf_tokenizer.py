"""The tokenizer of a GGUF file: what stands around a text, how it is cut, what stays whole.

Oracles: llama.cpp's rules worked out by hand for tiny vocabularies (tests/integration/test_gguf_runtime.py asks
llama.cpp itself).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from foldsearch.errors import ModelError
from foldsearch.model.gguf.file import GgufFile
from foldsearch.model.gguf.tokenizer import build_tokenizer

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def file(model: str, words: list[str], kinds: list[int], **more: object) -> GgufFile:
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
    }
    return GgufFile(Path("m.gguf"), metadata | {f"tokenizer.{key}": value for key, value in more.items()}, {})


def sentencepiece(**more: object) -> GgufFile:
    """<unk>, <s>, </s>, then a space, a, b, " a", "ab", " ab", and <x> of the user's."""
    words = ["<unk>", "<s>", "</s>", SPACE, "a", "b", f"{SPACE}a", "ab", f"{SPACE}ab", "<x>", "  "]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * 6, USER, USER]
    scores = [0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0, 0.0, 0.0]
    return file("llama", words, kinds, **{"ggml.scores": scores} | more)


def byte_level(**more: object) -> GgufFile:
    words = ["<e>", "Ġ", "a", "b", "1", "2", "ab", "12", "Ġa", "<b>", "."]
    kinds = [CONTROL, *[NORMAL] * 8, CONTROL, NORMAL]
    return file("gpt2", words, kinds, **{"ggml.merges": ["a b", "1 2", "Ġ a"], "ggml.eos_token_id": 0} | more)


def ids(of: GgufFile, text: str, tmp_path: Path) -> list[int]:
    """As the tokenizer gives them, and as it gives them when it was saved and read again."""
    tokenizer = build_tokenizer(of)
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path / "t")
    found = tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "t")(text)["input_ids"] == found
    assert len(tokenizer) == len(of.metadata["tokenizer.ggml.tokens"])
    return found


@pytest.mark.parametrize(
    ("more", "text", "expected"),
    [
        ({}, "ab", [1, 8]),  # SentencePiece: <s> and a space, unless the file says otherwise
        ({"ggml.add_bos_token": False}, "ab", [8]),
        ({"ggml.add_eos_token": True}, "ab", [1, 8, 2]),
        ({"ggml.add_space_prefix": False}, "ab ab", [1, 7, 8]),
        ({"ggml.bos_token_id": 2}, "ab", [2, 8]),
        ({}, "a<x>a", [1, 6, 9, 6]),  # the user's token stays whole, and what follows begins anew
        ({"ggml.add_space_prefix": False}, "a  a", [1, 4, 10, 4]),
        ({"ggml.add_space_prefix": False}, "abc", [1, 7, 0]),
    ],
)
def test_sentencepiece(more: dict[str, object], text: str, expected: list[int], tmp_path: Path) -> None:
    assert ids(sentencepiece(**more), text, tmp_path) == expected


@pytest.mark.parametrize(
    ("more", "text", "expected"),
    [
        ({"ggml.pre": "gpt-2"}, "ab 12", [6, 1, 7]),  # no begin token, whatever bos_token_id is
        ({"ggml.pre": "gpt-2", "ggml.bos_token_id": 9}, "ab", [6]),
        ({"ggml.pre": "gpt-2", "ggml.bos_token_id": 9, "ggml.add_bos_token": True}, "ab", [9, 6]),
        ({"ggml.pre": "llama-bpe", "ggml.bos_token_id": 9}, "ab", [9, 6]),  # Llama 3 begins with one
        ({"ggml.pre": "llama-bpe", "ggml.bos_token_id": 9, "ggml.add_bos_token": False}, "ab", [6]),
        ({"ggml.pre": "gpt-2", "ggml.add_eos_token": True}, "ab", [6, 0]),
        ({"ggml.pre": "smollm"}, "12", [4, 5]),  # digit by digit
        ({"ggml.pre": "qwen2"}, "12", [4, 5]),
        ({"ggml.pre": "llama-bpe", "ggml.add_bos_token": False}, "12", [7]),
        ({"ggml.pre": "gpt-2", "ggml.add_space_prefix": True}, "a", [8]),
        ({}, "a.a", [2, 10, 2]),
    ],
)
def test_byte_level(more: dict[str, object], text: str, expected: list[int], tmp_path: Path) -> None:
    assert ids(byte_level(**more), text, tmp_path) == expected


def test_a_piece_that_is_a_token_needs_no_merges_where_llama_3_has_none(tmp_path: Path) -> None:
    kept = {"ggml.merges": ["1 2"], "ggml.add_bos_token": False}
    assert ids(byte_level(**kept, **{"ggml.pre": "llama-bpe"}), "ab", tmp_path) == [6]
    assert ids(byte_level(**kept, **{"ggml.pre": "gpt-2"}), "ab", tmp_path) == [2, 3]


def test_special_tokens_and_template_are_kept(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(
        sentencepiece(chat_template="{{ messages[0]['content'] }}", **{"ggml.padding_token_id": 2})
    )
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.bos_token_id, again.eos_token_id, again.unk_token_id, again.pad_token_id) == (1, 2, 0, 2)
    assert again.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert again.decode([8, 7]) == "abab"  # the space in front is not a part of the text


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (byte_level(**{"ggml.pre": "a-new-one"}), r"tokenizer\.ggml\.pre = 'a-new-one'\) is not known here"),
        (file("wordpiece", ["a"], [1]), r"must be 'llama' or 'gpt2'; got 'wordpiece'"),
        (sentencepiece(**{"ggml.eos_token_id": 11}), "eos_token_id must be one of its 11 tokens; got 11"),
        (byte_level(**{"ggml.add_bos_token": True}), "texts begin with a token"),
        (sentencepiece(**{"ggml.scores": [0.0]}), r"needs as many tokenizer\.ggml\.scores; got 1"),
        (file("gpt2", ["a"], [1]), r"needs tokenizer\.ggml\.merges"),
        (byte_level(**{"ggml.merges": ["a z"]}), "its tokenizer cannot be built"),
    ],
)
def test_refusals(of: GgufFile, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_tokenizer(of)


def test_no_tokenizer_in_the_file() -> None:
    assert build_tokenizer(file("none", [], [])) is None
