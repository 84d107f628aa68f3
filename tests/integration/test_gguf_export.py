"""Folded models as GGUF files: what they hold, and what llama.cpp computes from them.

Oracles: the folded model in torch; llama.cpp (PyPI xllamacpp), asked once in a process of its own, for the
log-probabilities of every next token and for how it cuts texts; the package gguf, which says what a file holds; the
sizes of the types' blocks.
"""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from foldsearch import runtimes
from foldsearch.errors import InputError, ModelError, PlanError, VerificationError
from foldsearch.export import Shipment, engine, export, load_exported
from foldsearch.export.card import read_card
from foldsearch.export.recheck import recheck
from foldsearch.model.blocks import FAMILIES
from foldsearch.model.fold import cast, fold
from foldsearch.model.gguf.config import held_families
from foldsearch.model.gguf.file import read_gguf
from foldsearch.model.parts import Borrowed
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import TYPES
from foldsearch.runtimes import Beside, runtime_named
from foldsearch.runtimes import gguf as runtime
from foldsearch.runtimes.process import ProcessError
from tests.gguf_files import build, write_gguf
from tests.gguf_tokenizers import bytes_tokenizer
from tests.llama_cpp import ask_llama_cpp
from tests.tiers import some
from tests.tiny import CONFIGS, NUM_BLOCKS, tokenizer
from tests.tolerances import OTHER_WAY, REORDERED, RUNTIME, RUNTIME_GELU, RUNTIME_ROUNDED

GGUF = runtime_named("gguf")
DROPPED, CHILDREN = "0 2-4", "0 1=3+r4 2-4 2=2"
HELD = {"smollm3": "0-3"}  # the plans of families that cannot have DROPPED here
NO_WINDOW: dict[str, Any] = {"layer_types": None, "use_sliding_window": False, "sliding_window": None}
THETA = {"rope_theta": 10_000.0}
LLAMA3 = THETA | {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = THETA | {
    "rope_type": "longrope", "long_factor": [1.0, 2.0, 3.0, 5.0], "short_factor": [1.0, 1.1, 1.2, 1.5],
    "original_max_position_embeddings": 300,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str  # of the family
    changes: dict[str, Any] = field(default_factory=dict)  # of its tiny config
    plan: str = DROPPED
    lengths: tuple[int, ...] = (5, 100)  # of the prompts, in tokens: the windows of tiny models have 9
    context: int = 128  # that llama.cpp takes memory for
    tolerance: float = RUNTIME


CASES = {
    "llama": Case("llama"),
    "llama-children": Case("llama", plan=CHILDREN),
    "llama-biases": Case("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads-tied": Case("llama", {"head_dim": 12, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-linear": Case("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "llama3": Case("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": Case("llama", {"rope_parameters": YARN}),
    "llama-yarn-attention": Case("llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 16.0}}),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral-window": Case("mistral", lengths=(5, 9)),
    "qwen2": Case("qwen2", NO_WINDOW, plan=CHILDREN),
    "qwen2-window": Case("qwen2", lengths=(5, 9)),
    "qwen2-tied-yarn": Case("qwen2", NO_WINDOW | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": Case("qwen3", NO_WINDOW),
    "gemma": Case("gemma", tolerance=RUNTIME_GELU),
    "gemma2": Case("gemma2", tolerance=RUNTIME_GELU),
    "gemma2-scale-cap": Case(
        "gemma2", {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}, plan=CHILDREN, tolerance=RUNTIME_GELU
    ),
    "gemma3": Case("gemma3_text", tolerance=RUNTIME_GELU),
    "gemma3-scale-cap": Case(
        "gemma3_text",
        {
            "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": THETA | {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
        tolerance=RUNTIME_GELU,
    ),
    "gemma3-full": Case("gemma3_text", {"layer_types": ["full_attention"] * NUM_BLOCKS}, tolerance=RUNTIME_GELU),
    "phi3": Case("phi3"),
    "phi3-partial": Case("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-short": Case(
        "phi3",
        {"rope_parameters": LONG, "max_position_embeddings": 1200, "original_max_position_embeddings": 300},
        lengths=(5, 250), context=256,
    ),
    "phi3-long": Case(
        "phi3",
        {"rope_parameters": LONG, "max_position_embeddings": 1200, "original_max_position_embeddings": 300},
        lengths=(301, 400), context=512,
    ),
    "olmo2": Case("olmo2"),
    # which blocks do not turn by position goes by position in llama.cpp
    "smollm3": Case("smollm3", plan="0-3"),
    "smollm3-children": Case("smollm3", {"tie_word_embeddings": False}, plan="0 1=3+r4 2-4"),
    "granite": Case("granite"),
    "granite-biases-tied": Case(
        "granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, plan=CHILDREN
    ),
    "stablelm": Case("stablelm", plan=CHILDREN),
    "stablelm-parallel": Case("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
    "gpt2": Case("gpt2", plan=CHILDREN, tolerance=RUNTIME_GELU),
    "gpt2-untied": Case("gpt2", {"tie_word_embeddings": False, "n_inner": 48}, tolerance=RUNTIME_GELU),
    "gpt-neox": Case("gpt_neox", tolerance=RUNTIME_GELU),
    "gpt-neox-sequential-partial": Case(
        "gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}, tolerance=RUNTIME_GELU
    ),
}  # fmt: skip


def dense(name: str, **changes: Any) -> PreTrainedModel:
    settings = CONFIGS[name].keywords | changes
    if not changes.keys() & {"rope_parameters"}:
        settings.pop("rope_parameters", None)
    return build(CONFIGS[name].func(**settings))


def folded(model: PreTrainedModel, text: str) -> PreTrainedModel:
    made = fold(model, FoldPlan.parse(text, NUM_BLOCKS))
    generator = torch.Generator().manual_seed(2)
    for part in made.modules():
        if isinstance(part, Borrowed) and part.rank:
            assert part.up is not None
            part.up.data = torch.randn(part.up.shape, generator=generator) * 0.1
    return made


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """A GGUF file whose tokenizer has a word for each token of the tiny models."""
    path = tmp_path_factory.mktemp("words") / "words.gguf"
    return (write_gguf(path, dense("llama")),)


def write(model: PreTrainedModel, folder: Path, weights: str, words: tuple[Path, ...]) -> PreTrainedModel:
    """As `export` does; what the file is to hold."""
    folder.mkdir(exist_ok=True)
    made, _ = runtime.before_rounding(model)
    held = runtime.rounded(made, weights)
    runtime.write(held, folder, Beside(weights=weights, gguf=words, plan="x"))
    return held


def prompt(length: int) -> list[int]:
    ids = torch.randint(3, 96, (length - 1,), generator=torch.Generator().manual_seed(0))
    return [1, *(int(index) for index in ids)]


@torch.no_grad()
def next_token(model: PreTrainedModel, length: int) -> torch.Tensor:
    return model(torch.tensor([prompt(length)])).logits[0, -1].float().log_softmax(-1)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor([prompt(40)])).logits.float()


def test_the_families_are_those_that_llama_cpp_has() -> None:
    assert GGUF.families == held_families() == set(FAMILIES) - {"opt", "lfm2", "qwen3_moe"}
    assert {case.name for case in CASES.values()} == GGUF.families


# ------------------------------------------------------------------------------------------------- reading back


@pytest.mark.parametrize("name", sorted(GGUF.families))
def test_a_file_in_32_bits_is_read_back_to_the_bit(name: str, words, tmp_path: Path) -> None:
    model = folded(dense(name), HELD.get(name, DROPPED))
    held = write(model, tmp_path, "f32", words)
    back, wrong = runtime.load(str(tmp_path), "float32", model.config._attn_implementation)
    assert wrong == []
    plus_one = name.startswith("gemma")
    ours, theirs = dict(held.named_parameters()), dict(back.named_parameters())
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        if plus_one and "norm" in key:  # the file holds 1 + w
            torch.testing.assert_close(theirs[key], value, **REORDERED)
        else:
            assert torch.equal(theirs[key], value), key
    if plus_one:
        torch.testing.assert_close(logits(back), logits(held), **OTHER_WAY)
    else:
        assert torch.equal(logits(back), logits(held))
    if name not in ("gpt_neox", "qwen2", "qwen3"):  # whose GELU and windows are others in llama.cpp
        torch.testing.assert_close(logits(held), logits(model), **OTHER_WAY)


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("name", some(("llama",), ["llama", "gpt2", "gpt_neox"]))
def test_every_type_is_read_back_as_it_was_rounded(name: str, weights: str, words, tmp_path: Path) -> None:
    model = folded(dense(name), DROPPED)
    held = write(model, tmp_path, weights, words)
    back, wrong = runtime.load(str(tmp_path), "float32", model.config._attn_implementation)
    assert wrong == []
    assert torch.equal(logits(back), logits(held))
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    head = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
    for tensor in reader.tensors:
        if len(tensor.shape) < 2 or tensor.name.startswith("position_embd"):
            assert kinds[tensor.name] == "f32", tensor.name
        elif tensor.name == head and TYPES[weights].bits < 8:
            assert kinds[tensor.name] == "q8_0"
        elif TYPES[weights].block > 1 and tensor.shape[0] % 32:  # its rows do not fill whole blocks
            assert kinds[tensor.name] == "f16", tensor.name
        else:
            assert kinds[tensor.name] == weights, tensor.name
    # A block of 32 is rounded to 2^(bits - 1) steps on each side of 0, or 2^bits - 1 steps from its least number: half
    # a step is at most this share of its largest number, and a matrix of normal numbers is off by less on average.
    worst = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127, "q5_1": 1 / 31, "q5_0": 1 / 16}
    # MXFP4's scale is a power of two: of up to 8 of its units, the largest that it has is 6.
    worst |= {"q4_1": 1 / 15, "q4_0": 1 / 8, "mxfp4": 1 / 4}
    for key, value in held.named_parameters():
        exact = runtime.before_rounding(model)[0].get_parameter(key).float()
        assert (value.float() - exact).abs().max() <= worst[weights] * exact.abs().max(), key


# ------------------------------------------------------------------------------------------------- llama.cpp


@pytest.fixture(scope="module")
def asked(
    tmp_path_factory: pytest.TempPathFactory, words
) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """The folded model of each case, and what llama.cpp makes of its file."""
    pytest.importorskip("xllamacpp")
    folder, jobs, models = tmp_path_factory.mktemp("gguf"), [], []
    for label, case in CASES.items():
        models.append(folded(dense(case.name, **case.changes), case.plan))
        write(models[-1], folder / label, "f32", words)
        jobs.append(
            {
                "file": str(folder / label / "model.gguf"),
                "prompts": [prompt(length) for length in case.lengths],
                "context": case.context,
                "vocabulary": 96,
            }
        )
    return dict(zip(CASES, zip(models, ask_llama_cpp(jobs), strict=True), strict=True))


@pytest.mark.parametrize("label", CASES)
def test_llama_cpp_runs_the_folded_model(label: str, asked) -> None:
    case, (model, answer) = CASES[label], asked[label]
    for length, expected in zip(case.lengths, answer["prompts"], strict=True):
        theirs = torch.tensor([expected[str(index)] for index in range(96)])
        found = next_token(model, length)
        assert (found - theirs).abs().max() < case.tolerance, f"after {length} tokens"
        assert theirs.std() > 20 * case.tolerance  # far from uniform, where any model would pass


@pytest.fixture(scope="module")
def rounded(
    tmp_path_factory: pytest.TempPathFactory, words
) -> dict[str, tuple[PreTrainedModel, dict[str, Any]]]:
    """A Llama in each type: what its file is to hold, and what llama.cpp makes of it."""
    pytest.importorskip("xllamacpp")
    folder, jobs, models = tmp_path_factory.mktemp("types"), [], []
    for weights in TYPES:
        models.append(write(folded(dense("llama"), DROPPED), folder / weights, weights, words))
        jobs.append(
            {
                "file": str(folder / weights / "model.gguf"),
                "prompts": [prompt(5), prompt(100)],
                "context": 128,
                "vocabulary": 96,
            }
        )
    return dict(zip(TYPES, zip(models, ask_llama_cpp(jobs), strict=True), strict=True))


@pytest.mark.parametrize("weights", TYPES)
def test_llama_cpp_reads_every_type(weights: str, rounded) -> None:
    model, answer = rounded[weights]
    tolerance = RUNTIME if weights == "f32" else RUNTIME_ROUNDED
    for length, expected in zip((5, 100), answer["prompts"], strict=True):
        theirs = torch.tensor([expected[str(index)] for index in range(96)])
        assert (next_token(cast(model, torch.float32), length) - theirs).abs().mean() < tolerance


# ------------------------------------------------------------------------------------------------- an export


IDS = torch.randint(20, 270, (4, 40), generator=torch.Generator().manual_seed(1))


def shipment(**more: Any) -> Shipment:
    return Shipment(FoldPlan.parse(DROPPED, NUM_BLOCKS), "gguf", "float32", IDS, **more)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return dense("llama", vocab_size=320)


def test_without_text_the_tolerance_is_of_the_probe_that_is_asked(base, tmp_path: Path) -> None:
    """On random tokens 8-bit inputs move a model by another amount than on the text that the export was checked on.

    Oracle: what rounding the inputs does to the model on that probe, by torch, of the file's own numbers.
    """
    pytest.importorskip("xllamacpp")
    out = tmp_path / "out"
    report = export(folded(base, DROPPED), bytes_tokenizer(), out, shipment(weights="q8_0", shows_text=False))
    card = read_card(out)
    held, _ = load_exported(out)
    with np.load(out / "check.npz") as kept:
        ids_NT, text_NT = (torch.from_numpy(kept[name]) for name in ("ids_NT", "text_NT"))
    assert runtime_named("gguf").engine is not None
    asked = engine.EngineJob(runtime_named("gguf").engine, torch.get_num_threads(), ids_NT, text_NT)
    expected = engine.tolerance_of(held.float(), asked, engine.expected(held.float(), asked), "q8_0")
    assert card.probe.engine_tolerance == pytest.approx(expected, rel=0.05)
    assert report.engine is not None
    assert card.probe.engine_tolerance != report.engine.tolerance
    assert recheck(out).faults == []


def test_an_export_is_checked_in_llama_cpp(base, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    out = tmp_path / "it's out"
    given = shipment(weights="q8_0", dense=base, details={"base_model": "tiny"})
    model, cut = folded(base, DROPPED), bytes_tokenizer()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [2, 7]
    cut.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    report = export(model, cut, out, given)
    assert (report.weights, report.dtype) == ("q8_0", "float32")
    assert report.logits_max_difference == 0  # to what the weights round to
    assert report.measured_perplexity == pytest.approx(report.exported.perplexity, rel=0.05)
    assert report.measured_perplexity != report.exported.perplexity
    found = report.engine
    assert found is not None
    assert 0 < found.mean_difference <= found.tolerance
    assert (
        engine.TOLERANCES["f16"] < found.tolerance < engine.TOLERANCES["q8_0"]
    )  # by what rounding does to it
    assert found.perplexity == pytest.approx(found.expected_perplexity, rel=found.tolerance)
    assert found.dense_perplexity != found.perplexity
    assert report.exported.resident_bytes is not None
    assert report.exported.resident_bytes > 0
    assert min(report.decode.exported + report.decode.dense + report.prompt.exported) > 0
    assert report.dense is not None
    assert report.dense.perplexity is None  # it was asked in llama.cpp
    assert report.dense.weight_bytes > report.exported.weight_bytes == report.file_bytes
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "card.json",
        "check.npz",
        "model.gguf",
    ]
    assert read_card(out).report == report
    metadata = read_gguf((out / "model.gguf",)).metadata
    assert metadata["foldsearch.plan"] == DROPPED
    assert metadata["general.name"] == "tiny, folded"
    assert report.chat is not None  # by llama.cpp's own reader of templates
    assert report.chat.prompt == "user: What is the capital of France?\nassistant:"
    assert report.chat.note == ""
    assert set(report.chat.stops) == {2, 7, metadata["tokenizer.ggml.eos_token_id"]}
    assert isinstance(report.chat.dense, str)
    found = recheck(out)
    assert found.faults == found.skipped == []
    assert any("in llama.cpp" in words for words in found.passed)
    card = (out / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "llama-quantize, which takes no file that is rounded: export with --type f16\n" in card
    assert "Q4_K_M" not in card
    assert "in llama.cpp (xllamacpp" in card
    assert "file in q8_0, MB" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_stop_tokens_that_find_no_place_are_told(base, tmp_path: Path) -> None:
    model = folded(base, DROPPED)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [5, 6, 7]
    held, _ = runtime.before_rounding(model)
    notes = runtime.write(held, tmp_path, Beside(weights="f32", tokenizer=bytes_tokenizer()))
    metadata = read_gguf((tmp_path / "model.gguf",)).metadata
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eot", "eom")] == [5, 6]
    assert any("no place for these tokens that end an answer: [7]" in note for note in notes)


def test_where_llama_cpp_is_not_installed_the_extra_is_named(base, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    report = export(folded(base, DROPPED), bytes_tokenizer(), tmp_path / "out", shipment())
    assert report.engine is None
    assert report.logits_max_difference == 0
    assert report.prompt.words == report.decode.words == ("—", "—", "")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- not checked in llama.cpp: install foldsearch[gguf]" in card
    assert (
        f"llama-quantize {shlex.quote(str(tmp_path / 'out'))}/model.gguf model-Q4_K_M.gguf Q4_K_M\n" in card
    )
    assert "Speed and memory were not checked in llama.cpp: install foldsearch[gguf]." in card


def test_a_model_that_rounding_changes_more_may_be_further_away(base) -> None:
    """Oracle: logits that are ten times as large, and so is what rounding does to them; f32 rounds nothing."""
    job = engine.EngineJob(runtimes.LLAMA_CPP, 1, IDS, torch.ones_like(IDS, dtype=torch.bool))
    loud = copy.deepcopy(base)
    loud.lm_head.weight.data.mul_(10)

    def allowed(model: PreTrainedModel, weights: str) -> float:
        return engine.tolerance_of(model, job, engine.expected(model, job), weights)

    assert allowed(base, "f32") == allowed(loud, "f32") == engine.TOLERANCES["f32"]
    quiet, more = (allowed(model, "q8_0") - engine.TOLERANCES["f16"] for model in (base, loud))
    assert 5 * quiet < more < 20 * quiet


def test_another_model_in_llama_cpp_is_no_export(base, tmp_path: Path, monkeypatch) -> None:
    """Nothing passes a tolerance of nothing: llama.cpp adds in another order than torch."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setitem(engine.TOLERANCES, "f32", 0.0)
    with pytest.raises(
        VerificationError, match=r"in llama.cpp the log-probabilities of its tokens are .* away"
    ):
        export(folded(base, DROPPED), bytes_tokenizer(), tmp_path / "out", shipment())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"weights": "q4_k_m"}, InputError, r"got the type 'q4_k_m'.*llama-quantize model.gguf"),
        ({"weights": "q8_0", "runtime": "stock"}, InputError, r"in its dtype, float32; got the type 'q8_0'"),
    ],
)  # fmt: skip
def test_a_type_that_a_runtime_lacks_is_refused(base, more, error, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        export(folded(base, DROPPED), None, tmp_path / "out", replace(shipment(), **more))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_converted_leaves_nothing(base, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be converted: it is of the kind WordLevel"):
        export(folded(base, DROPPED), tokenizer(), tmp_path / "out", shipment())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("opt", {}, "llama.cpp runs models of gemma, .*this one is of opt"),
        ("llama", {"hidden_act": "relu"}, "with hidden_act 'silu' only; got 'relu'"),
        ("qwen3", {"attention_bias": True}, "with attention_bias False only; got True"),
        ("gpt2", {"activation_function": "relu"}, "'gelu_new' or 'gelu_pytorch_tanh' only; got 'relu'"),
        ("gemma2", {"attn_logit_softcapping": None}, "with attn_logit_softcapping only; got None"),
        ("gemma", {"tie_word_embeddings": False}, "with tie_word_embeddings True only; got False"),
        ("llama", {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}}, "got rope_type 'dynamic'"),
        ("qwen2", NO_WINDOW | {"rope_parameters": LLAMA3}, "default, linear, yarn RoPE only; got rope_type 'llama3'"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "'truncate' false"),
        ("smollm3", {}, "every 4th block of a smollm3 model does not turn by position .* those are 2"),
        ("stablelm", {"qk_layernorm": True}, "with qk_layernorm False only; got True"),
        ("granite", {"embedding_multiplier": 0.0}, "with embedding_multiplier above 0 only; got 0"),
        ("qwen2", {}, r"window, 9 tokens; the target's context is 64\. Lower target\.context"),
        ("mistral", {}, r"window, 9 tokens; the target's context is 64"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_does_not_run_is_refused(
    name: str, changes, words: str, tmp_path: Path
) -> None:
    model = folded(dense(name, **changes), DROPPED)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    given = replace(shipment(), ids_NT=ids, context=64)
    with pytest.raises((ModelError, PlanError), match=words) as caught:
        export(model, None, tmp_path / "out", given)
    assert "stock" in str(caught.value) or name == "opt"
    assert list(tmp_path.iterdir()) == []


def test_where_a_block_may_move_goes_by_the_family() -> None:
    """SmolLM3: positions 3, 7, ... are for blocks 3, 7, ..., whichever of them."""
    for text, held in [
        ("0-7", True),
        ("4-11", True),
        ("0-2 7-11", True),
        ("0 2-11", False),
        ("0-2 4-11", False),
    ]:
        plan = FoldPlan.parse(text, 12)
        assert GGUF.refusal(plan, family="llama") is None
        assert (GGUF.refusal(plan, family="smollm3") is None) == held, text
    with pytest.raises(
        PlanError, match="moved in or out of each 4th position, where this model has blocks of another"
    ):
        GGUF.check(FoldPlan.parse("0 2-11", 12), family="smollm3")


def test_what_llama_cpp_does_in_another_way_is_told() -> None:
    def notes(name: str, **changes: Any) -> str:
        return " ".join(runtime.check_model(dense(name, **changes).config, 9))

    assert "without its window: for texts of more than 9 tokens it is another model" in notes("mistral")
    assert "without its window" in notes("qwen2")
    assert "approximation of its GELU by tanh" in notes("gpt_neox")
    assert "attention.sliding_window_pattern" in notes("gemma2")
    assert notes("gemma2", layer_types=None) == notes("llama") == ""


@pytest.mark.slow  # it waits for one that never answers
def test_a_server_that_does_not_answer_is_ended_and_another_one_asked(tmp_path: Path, monkeypatch) -> None:
    """The first process sleeps; the second answers."""
    monkeypatch.setenv("SLEEPS", str(tmp_path / "sleeps"))
    monkeypatch.setattr(engine, "LOADING_SECONDS", 20.0)
    (tmp_path / "sleeps").write_text("1")
    sleepy = engine.EngineJob(
        replace(runtimes.LLAMA_CPP, module="tests.sleepy"), 1, IDS, torch.ones_like(IDS).bool()
    )
    with engine.running(sleepy, tmp_path, tmp_path) as (_, figures):
        assert figures.version == "awake"
    assert len(figures.log_probabilities) == 4 * 39
    (tmp_path / "sleeps").write_text("9")
    monkeypatch.setattr(engine, "LOADING_SECONDS", 2.0)
    with (
        pytest.raises(ProcessError, match="did not answer within 2 s"),
        engine.running(sleepy, tmp_path, tmp_path),
    ):
        pass
