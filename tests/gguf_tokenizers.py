"""Small tokenizers for GGUF files, one of each kind that llama.cpp cuts text with, and texts that are hard to cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from foldsearch.model.gguf.tokenizer import _SPLITS

ALPHABET = "".join(bytes_to_unicode().values())
MERGES = [
    "t h",
    "th e",
    "Ġ the",
    "Ġ t",
    "i n",
    "Ġ a",
    "1 2",
    "12 3",
    "Ġ 1",
    "' s",
    "a b",
    "ab c",
    "! !",
    "Ċ Ċ",
    "Ġ Ġ",
]
TEXTS = [
    "the cat's in the   hat, isn't it? WE'LL see 1234567 things!!",
    " \n\n  \t the\r\nabc  abc\n \n",
    "x=1.5;y<=2&&z!=~3 {a[0]}",
    "Ünïcödé 日本語テスト 한국어 ок ①② 🎉🎉 e\u0301",
    "",
    " ",
    "CamelCase HTTPServer abc123def 3.14159e-10 $100,000.50",
    "a<x>the  <x> b",
]


def write_bytes(pre: str) -> Callable[[gguf.GGUFWriter, int], None]:
    """A byte-level tokenizer: an end token, all bytes, and a few merges."""

    def write(writer: gguf.GGUFWriter, vocabulary: int) -> None:
        words = ["<e>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
        words += [f"[PAD{index}]" for index in range(len(words), vocabulary)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(words)
        writer.add_token_types(
            [3] + [1] * (len(ALPHABET) + len(MERGES)) + [5] * (vocabulary - len(ALPHABET) - 16)
        )
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)

    return write


def write_pieces(*, prefix: bool, bos: bool) -> Callable[[gguf.GGUFWriter, int], None]:
    """A SentencePiece tokenizer with a token for each byte, some words, and two tokens of the user's."""

    def write(writer: gguf.GGUFWriter, vocabulary: int) -> None:
        words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        kinds = [2, 3, 3] + [6] * 256
        pieces = [
            "▁",
            "t",
            "h",
            "e",
            "th",
            "he",
            "the",
            "▁the",
            "▁t",
            "a",
            "b",
            "c",
            "ab",
            "▁a",
            "▁ab",
            "in",
            "i",
            "n",
            "s",
        ]
        words += [*pieces, "<x>", "  "]
        kinds += [1] * len(pieces) + [4, 4]
        pad = vocabulary - len(words)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(words + [f"[PAD{index}]" for index in range(pad)])
        writer.add_token_scores(
            [0.0] * 259 + [-float(index % 7) - index / 100 for index in range(vocabulary - 259)]
        )
        writer.add_token_types(kinds + [5] * pad)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(prefix)
        writer.add_add_bos_token(bos)

    return write


TOKENIZERS = {pre: write_bytes(pre) for pre in _SPLITS} | {
    f"pieces-{prefix}-{bos}": write_pieces(prefix=prefix, bos=bos)
    for prefix in (True, False)
    for bos in (True, False)
}

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def bytes_tokenizer(
    pre: Any = None, *, whole: bool = False, begins: bool = False, composed: bool = False
) -> Any:
    """A byte-level tokenizer of transformers, as hubs have them; GPT-2's where nothing is said."""
    words = ["<e>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=pairs, ignore_merges=whole)
    )
    if composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_added(backend, "<e>", begins=begins)


def with_added(backend: Tokenizer, end: str, *, begins: bool) -> PreTrainedTokenizerFast:
    begin = "<s>" if end == "</s>" else end
    backend.add_special_tokens([AddedToken(end, special=True), AddedToken(begin, special=True)])
    backend.add_tokens([AddedToken("<x>", special=False, normalized=False)])
    if begins:
        backend.post_processor = processors.TemplateProcessing(
            f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=begin, eos_token=end, chat_template=TEMPLATE
    )
