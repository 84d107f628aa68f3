"""GGUF files of every family that llama.cpp and foldsearch share: opened, and asked in llama.cpp itself.

Oracle: llama.cpp (PyPI xllamacpp), which the files are made for. It is asked once, in a process of its own, for the
log-probabilities of every next token after prompts of several lengths: shorter and longer than the windows of the tiny
models, and than the original context of those with scaled RoPE.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from foldsearch.model.gguf.tokenizer import _SPLITS
from foldsearch.model.source import locate, open_dense, open_tokenizer, prepare
from tests.gguf_files import build, tiny_config, write_gguf
from tests.tolerances import RUNTIME, RUNTIME_GELU

pytest.importorskip("xllamacpp")

PROCESSES = 5
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    name: str  # of the family
    changes: dict[str, Any] = field(default_factory=dict)  # of its tiny config
    keys: dict[str, Any] = field(default_factory=dict)  # of the file
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    lengths: tuple[int, ...] = (5, 100)  # of the prompts, in tokens
    context: int = 128  # that llama.cpp takes memory for
    tolerance: float = RUNTIME


def tensor(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


LONG = {"rope_factors_long.weight": tensor(1, 2, 3, 5), "rope_factors_short.weight": tensor(1, 1.1, 1.2, 1.5)}
LONG_KEYS = {
    "rope.scaling.type": "longrope",
    "rope.scaling.attn_factor": 1.25,
    "rope.scaling.original_context_length": 300,
}
LONG_CHANGES = {"max_position_embeddings": 1200, "original_max_position_embeddings": 300}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
LIST = [False, True, True, False, True]

CASES = {
    "llama": Case("llama"),
    "llama-tied-eps": Case("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": Case("llama", {"head_dim": 12}),
    "llama-linear": Case("llama", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-scale-linear": Case("llama", keys={"rope.scale_linear": 4.0}),
    "llama-no-scaling": Case("llama", keys={"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "llama-yarn": Case("llama", keys=YARN),
    "llama-yarn-attention": Case("llama", keys=YARN | {"rope.scaling.attn_factor": 1.3}),
    "llama-linear-attention": Case("llama", keys={"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.3}),
    "llama3": Case("llama", extra={"rope_freqs.weight": tensor(1, 1, 3.2, 8)}),
    "llama3-linear": Case(
        "llama", keys={"rope.scaling.factor": 2.0}, extra={"rope_freqs.weight": tensor(1, 1.7, 2.1, 8)}
    ),
    "llama-base": Case("llama", keys={"rope.freq_base": 500.0}),
    "mistral": Case("mistral"),
    "qwen2": Case("qwen2"),
    "qwen2-tied-yarn": Case("qwen2", {"tie_word_embeddings": True}, YARN),
    "qwen3": Case("qwen3"),
    "qwen3-wide-heads": Case("qwen3", {"head_dim": 12}),
    "gemma": Case("gemma", tolerance=RUNTIME_GELU),
    "gemma2": Case("gemma2", tolerance=RUNTIME_GELU),
    "gemma2-caps": Case(
        "gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, tolerance=RUNTIME_GELU
    ),
    "gemma2-list": Case("gemma2", keys={"attention.sliding_window_pattern": LIST}, tolerance=RUNTIME_GELU),
    "gemma2-default-caps": Case(
        "gemma2", keys={"attn_logit_softcapping": None, "final_logit_softcapping": None}, tolerance=RUNTIME_GELU
    ),
    "gemma3": Case("gemma3_text", tolerance=RUNTIME_GELU),
    "gemma3-period": Case("gemma3_text", keys={"attention.sliding_window_pattern": 2}, tolerance=RUNTIME_GELU),
    "gemma3-linear": Case(
        "gemma3_text",
        keys={
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "rope.freq_base": 5e3,
            "rope.freq_base_swa": 3e2,
        },
        tolerance=RUNTIME_GELU,
    ),
    "gemma3-yarn": Case("gemma3_text", keys=YARN, tolerance=RUNTIME_GELU),
    "gemma3-no-window": Case("gemma3_text", keys={"attention.sliding_window": None}, tolerance=RUNTIME_GELU),
    "gemma3-cap": Case("gemma3_text", keys={"final_logit_softcapping": 3.0}, tolerance=RUNTIME_GELU),
    "phi3": Case("phi3"),
    "phi3-partial": Case("phi3", {"partial_rotary_factor": 0.5}),
    # llama.cpp takes the short factors where the context that it takes memory for is at most the original one
    "phi3-short": Case("phi3", LONG_CHANGES, LONG_KEYS, LONG, lengths=(5, 250), context=256),
    "phi3-long": Case("phi3", LONG_CHANGES, LONG_KEYS, LONG, lengths=(301, 400), context=512),
    "olmo2": Case("olmo2"),
    "gpt2": Case("gpt2", tolerance=RUNTIME_GELU),
    "gpt2-untied-eps": Case("gpt2", {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2}, tolerance=RUNTIME_GELU),
    "gpt-neox": Case("gpt_neox", tolerance=RUNTIME_GELU),
    "gpt-neox-sequential-partial": Case(
        "gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}, tolerance=RUNTIME_GELU
    ),
}  # fmt: skip


def prompt(length: int) -> list[int]:
    ids = torch.randint(3, 96, (length - 1,), generator=torch.Generator().manual_seed(0))
    return [1, *(int(index) for index in ids)]


def ask_llama_cpp(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What llama.cpp answers; see tests/ask_llama_cpp.py."""
    answers: list[dict[str, Any]] = []
    said = b""
    # A server of its has stopped answering once, after dozens of models in one process: another process goes on then.
    for _ in range(PROCESSES):
        try:
            done = subprocess.run(
                [sys.executable, str(ROOT / "tests" / "ask_llama_cpp.py")],
                input="\n".join(json.dumps(job) for job in jobs[len(answers) :]).encode(),
                capture_output=True,
                check=False,
                timeout=90,
            )
            output, said = done.stdout, done.stderr
        except subprocess.TimeoutExpired as stuck:
            output, said = stuck.stdout or b"", stuck.stderr or b""
        answers += [
            json.loads(line) for line in output.splitlines() if line.startswith(b"{") and line.endswith(b"}")
        ]
        if len(answers) == len(jobs):
            return answers
    raise AssertionError(said[-3000:].decode(errors="replace"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The file of each case, and what llama.cpp makes of it."""
    folder = tmp_path_factory.mktemp("gguf")
    jobs = []
    for label, case in CASES.items():
        path = folder / f"{label}.gguf"
        model = build(tiny_config(case.name, **case.changes))
        write_gguf(path, model, keys=case.keys, extra=case.extra)
        prompts = [prompt(length) for length in case.lengths]
        jobs.append({"file": str(path), "prompts": prompts, "context": case.context, "vocabulary": 96})
    answers = ask_llama_cpp(jobs)
    return {
        label: (Path(job["file"]), answer) for label, job, answer in zip(CASES, jobs, answers, strict=True)
    }


@pytest.mark.parametrize("label", CASES)
def test_next_tokens_are_those_of_llama_cpp(label: str, asked, tmp_path: Path) -> None:
    case, (path, answer) = CASES[label], asked[label]
    model = open_dense(prepare(str(path), dtype="float32", cache_dir=tmp_path))
    for length, expected in zip(case.lengths, answer["prompts"], strict=True):
        assert len(expected) == 96
        with torch.no_grad():
            found = model(torch.tensor([prompt(length)])).logits[0, -1].log_softmax(-1)
        theirs = torch.tensor([expected[str(index)] for index in range(96)])
        assert (found - theirs).abs().max() < case.tolerance, f"after {length} tokens"
        assert theirs.std() > 20 * case.tolerance  # far from uniform, where any model would pass


SAYS_NOTHING_NEW = {"llama-no-scaling", "gemma2-default-caps", "phi3-short", "phi3-long"}


@pytest.mark.parametrize("label", [label for label, case in CASES.items() if case.keys or case.extra])
def test_the_metadata_matters(label: str, asked) -> None:
    """A key that changes nothing would test nothing: llama.cpp's own answers are others than for the plain file."""
    case = CASES[label]
    plain = {"gemma3_text": "gemma3"}.get(case.name, case.name)
    if label in SAYS_NOTHING_NEW:
        return
    own, other = asked[label][1]["prompts"][-1], asked[plain][1]["prompts"][-1]
    assert max(abs(own[key] - other[key]) for key in own) > 5 * case.tolerance


# ------------------------------------------------------------------------------------------------- tokenizers

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


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """The file of each tokenizer, and how llama.cpp cuts the texts."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = build(tiny_config("llama", vocab_size=288, num_hidden_layers=1))
    jobs = []
    for label, tokenizer in TOKENIZERS.items():
        path = write_gguf(folder / f"{label}.gguf", model, tokenizer=tokenizer)
        jobs.append(
            {
                "file": str(path),
                "prompts": [],
                "texts": TEXTS,
                "context": 128,
                "vocabulary": 288,
            }
        )
    answers = ask_llama_cpp(jobs)
    return {
        label: (Path(job["file"]), answer["texts"])
        for label, job, answer in zip(TOKENIZERS, jobs, answers, strict=True)
    }


@pytest.mark.parametrize("label", TOKENIZERS)
def test_texts_are_cut_as_llama_cpp_cuts_them(label: str, cut) -> None:
    path, expected = cut[label]
    tokenizer = open_tokenizer(locate(str(path)))
    assert len(tokenizer) == 288
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer(text).input_ids == ids, text
