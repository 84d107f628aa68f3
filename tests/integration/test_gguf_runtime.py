"""GGUF files of every family that llama.cpp and foldsearch share: opened, and asked in llama.cpp itself.

Oracle: llama.cpp (PyPI xllamacpp), which the files are made for. It is asked once, in a process of its own, for the
log-probabilities of every next token after prompts of several lengths: shorter and longer than the windows of the tiny
models, and than the original context of those with scaled RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foldsearch.model.source import locate, open_dense, open_tokenizer, prepare
from tests.gguf_files import build, tiny_config, write_gguf
from tests.gguf_tokenizers import TEXTS, TOKENIZERS
from tests.llama_cpp import ask_llama_cpp
from tests.tolerances import RUNTIME, RUNTIME_GELU

pytest.importorskip("xllamacpp")


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
    "smollm3": Case("smollm3"),
    "granite": Case("granite"),
    "granite-no-scales": Case(
        "granite",
        {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 8**-0.5},
        {"embedding_scale": 0.0, "residual_scale": None, "attention.scale": 0.0},
    ),
    "stablelm": Case("stablelm"),
    "stablelm-parallel": Case("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
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
