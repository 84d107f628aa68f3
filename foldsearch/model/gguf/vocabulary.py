"""A tokenizer of transformers as the metadata of a GGUF file.

What a file can say of a tokenizer is less than what transformers can have, so nothing is believed: the metadata are
read again by `build_tokenizer`, which cuts text as llama.cpp does, and both must give the same ids for difficult texts.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.errors import ModelError
from foldsearch.model.gguf.file import GgufFile, MetadataValue
from foldsearch.model.gguf.tokenizer import GPT2_SPLIT, build_tokenizer, ways_to_cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["describe_tokenizer"]

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # types of the format
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # of tokens
_NEVER = -1e9  # the score of a token that no merge makes

# Words with and without contractions, digits, spaces of all kinds, lines, scripts, marks, emoji, code. Composed: no
# vocabulary of llama.cpp composes what comes decomposed.
_DIFFICULT = tuple(
    unicodedata.normalize("NFC", text)
    for text in (
        "the cat's in the   hat, isn't it? WE'LL see 1234567 things!! I'd've",
        " \n\n  \t the\r\nabc  abc\n \n\n\n   x",
        "x=1.5;y<=2&&z!=~3 {a[0]} /* $100,000.50 */ #!@%^ `~|+=>",
        "Ünïcödé naïve 日本語テスト、中文。 한국어 ок ①② ½ ٣٤ 🎉🎉👩‍👩‍👧 e\u0301 ไทย हिन्दी",
        "CamelCase HTTPServer abc123def 3.14159e-10 don't_stop a.b.c -- ... ''quoted'' \"x\"",
        " leading, trailing ",
        "\tdef f(x):\n\t\treturn x**2  # 42\n",
        "",
        " ",
        "a",
    )
)


def describe_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[dict[str, MetadataValue], str]:
    """What a file says of a tokenizer, by key; and how llama.cpp differs where it does, as a sentence.

    Args:
        tokenizer: with a fast implementation.
        vocab_size: rows of the embedding; what has no word becomes an unused token.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("it has no tokenizer.json, which says how it works")
    parts: dict[str, Any] = json.loads(backend.to_str())
    if parts["model"]["type"] != "BPE":
        raise _refusal(
            f"it is of the kind {parts['model']['type']}, and llama.cpp has byte-level and SentencePiece BPE"
        )
    words, kinds = _tokens(tokenizer, parts, vocab_size)
    common = {
        "tokenizer.ggml.tokens": (words, _ARRAY, _STRING),
        "tokenizer.ggml.token_type": (kinds, _ARRAY, _INT32),
        **_special_keys(tokenizer),
    }
    best = ""
    for kind in _byte_level(parts) if _is_byte_level(parts) else _sentencepiece(parts, words):
        found = common | kind
        wrong = _first_difference(tokenizer, found, _is_byte_level(parts))
        if wrong is None:
            return found, _note(tokenizer, found)
        best = best or wrong
    raise _refusal(f"no way that llama.cpp cuts text gives its tokens for {best!r}")


def _refusal(why: str) -> ModelError:
    return ModelError(
        f"a GGUF holds a tokenizer that llama.cpp can run, but this model's cannot be converted: {why}. Export it to "
        "stock, or give a GGUF of the base model as --model: its tokenizer is kept."
    )


def _is_byte_level(parts: dict[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(parts.get("pre_tokenizer")))


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer and, where it is a sequence, all of its steps."""
    if part:
        yield part
        for key in ("pretokenizers", "normalizers", "decoders", "processors"):
            for step in part.get(key, ()):
                yield from _steps(step)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, parts: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """The words by id, and their kinds."""
    words = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for word, index in tokenizer.get_vocab().items():
        if index < vocab_size:
            words[index], kinds[index] = word, _NORMAL
            if parts["model"].get("byte_fallback") and len(word) == 6 and word.startswith("<0x"):
                kinds[index] = _BYTE
    for token in parts["added_tokens"]:
        if token["id"] < vocab_size:
            words[token["id"]] = token["content"]
            kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    unknown = parts["model"].get("unk_token")
    if unknown in words and not _is_byte_level(parts):
        kinds[words.index(unknown)] = _UNKNOWN
    return words, kinds


def _special_keys(tokenizer: PreTrainedTokenizerBase) -> dict[str, MetadataValue]:
    """The ids of special tokens, what stands around a text, and the chat template."""
    found: dict[str, MetadataValue] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = (int(index), _UINT32, None)
    around: list[int] = tokenizer("").input_ids
    begins = bool(around) and around[0] == tokenizer.bos_token_id
    ends = len(around) > (1 if begins and tokenizer.bos_token_id == tokenizer.eos_token_id else int(begins))
    found["tokenizer.ggml.add_bos_token"] = (begins, _BOOL, None)
    found["tokenizer.ggml.add_eos_token"] = (ends, _BOOL, None)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        found["tokenizer.chat_template"] = (template, _STRING, None)
    return found


def _byte_level(parts: dict[str, Any]) -> Iterator[dict[str, MetadataValue]]:
    """The ways that llama.cpp has to cut text for a byte-level vocabulary, the likeliest first."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    whole, own = bool(parts["model"].get("ignore_merges")), tuple(_expressions(parts))
    ways = sorted(ways_to_cut(), key=lambda way: (way[1] != own, way[2] != whole))
    for name, _, _ in ways:
        yield {
            "tokenizer.ggml.model": ("gpt2", _STRING, None),
            "tokenizer.ggml.pre": (name, _STRING, None),
            "tokenizer.ggml.merges": (merges, _ARRAY, _STRING),
        }


def _expressions(parts: dict[str, Any]) -> Iterator[str]:
    """What the tokenizer itself cuts text by, as far as that is regular expressions."""
    for step in _steps(parts.get("pre_tokenizer")):
        if step["type"] == "Split":
            yield str(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            yield r"\p{N}"
        elif step["type"] == "ByteLevel" and step.get("use_regex"):
            yield GPT2_SPLIT


def _sentencepiece(parts: dict[str, Any], words: list[str]) -> Iterator[dict[str, MetadataValue]]:
    """Scores in the order of the merges, with a space in front of a text and without."""
    scores = [_NEVER] * len(words)
    index_of = {word: index for index, word in enumerate(words)}
    for rank, merge in enumerate(parts["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        index = index_of.get(left + right)
        if index is not None and scores[index] == _NEVER:
            scores[index] = -float(rank)
    for word, index in index_of.items():
        if len(word) == 1 and scores[index] == _NEVER:
            scores[index] = 0.0
    prefixed = any(
        step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for part in ("normalizer", "pre_tokenizer")
        for step in _steps(parts.get(part))
    )
    for prefix in (prefixed, not prefixed):
        yield {
            "tokenizer.ggml.model": ("llama", _STRING, None),
            "tokenizer.ggml.pre": ("default", _STRING, None),
            "tokenizer.ggml.scores": (scores, _ARRAY, _FLOAT32),
            "tokenizer.ggml.add_space_prefix": (prefix, _BOOL, None),
        }


def _first_difference(
    tokenizer: PreTrainedTokenizerBase, found: dict[str, MetadataValue], byte_level: bool
) -> str | None:
    """A text that the metadata cut in another way; None if there is none among the difficult ones.

    SentencePiece puts a space in front of a text, where transformers may not do so if there is one.
    """
    theirs = _built(found)
    texts = [text for text in _DIFFICULT if byte_level or not text[:1].isspace()]
    return next((text for text in texts if tokenizer(text).input_ids != theirs(text).input_ids), None)


def _built(found: dict[str, MetadataValue]) -> Any:
    """The tokenizer that the metadata make."""
    made = build_tokenizer(
        GgufFile(Path("export.gguf"), {key: value for key, (value, *_) in found.items()}, {})
    )
    assert made is not None
    return made


def _note(tokenizer: PreTrainedTokenizerBase, found: dict[str, MetadataValue]) -> str:
    """Where llama.cpp cuts in another way: text that is not composed, and text with special tokens inside."""
    theirs = _built(found)
    special = tokenizer.eos_token or ""
    for text, what in (
        ("e\u0301 a\u0308", "letters whose accents are characters of their own"),
        (f"a {special} b{special}c", "texts with special tokens inside"),
        (" a", "texts that begin with a space"),
    ):
        if tokenizer(text).input_ids != theirs(text).input_ids:
            return f"llama.cpp cuts {what} in another way than transformers does."
    return ""
