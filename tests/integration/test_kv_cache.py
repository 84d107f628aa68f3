"""Keys and values in few bits, as llama.cpp's cache holds them.

Oracles: llama.cpp (PyPI xllamacpp) with a cache of the type; the package gguf, which says what a block takes; the same
model with a cache that grows token by token.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foldsearch.bound import lower_bound
from foldsearch.cli import main
from foldsearch.context import open_workbench
from foldsearch.errors import ModelError, SpecError
from foldsearch.export import Shipment, export
from foldsearch.export.card import read_card
from foldsearch.export.recheck import recheck
from foldsearch.model.fold import fold
from foldsearch.model.gguf.config import held_families
from foldsearch.model.gguf.kv_cache import as_cached, check_kv_cache, key_order, rounded_kv_cache, turned_in
from foldsearch.model.judge import judge
from foldsearch.model.measure import measure
from foldsearch.plan.cost import CELLS, Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import CACHE_TYPES, TYPES, StoredTypes
from foldsearch.prepare import prepare_context
from foldsearch.rebuild import recovered_model
from foldsearch.runtimes import Beside
from foldsearch.runtimes import gguf as runtime
from foldsearch.shipped import measure_rivals
from foldsearch.spec.load import load_study
from foldsearch.spec.space import Space
from foldsearch.spec.study import BudgetSettings, TargetSettings
from foldsearch.trial import run_trial
from tests.contexts import begin_run, run_queued, tiny_study
from tests.gguf_files import build, write_gguf
from tests.gguf_tokenizers import bytes_tokenizer
from tests.llama_cpp import ask_llama_cpp
from tests.proposals import removing
from tests.tiers import some
from tests.tiny import CONFIGS, NUM_BLOCKS, WIDTH, tokenizer

FEW = [name for name in CACHE_TYPES if TYPES[name].block > 1]
LENGTH = 100
# How far torch may be from llama.cpp, as a share of what rounding does: forgetting the order of keys leaves 0.4, the
# rotation 1.
FLIPPED = 0.2


def wide(name: str, size: int, **changes: Any) -> PreTrainedModel:
    """A tiny model whose heads have so many numbers; windows are longer than the texts."""
    settings = CONFIGS[name].keywords | {"hidden_size": 4 * size, "head_dim": size} | changes
    settings.pop("rope_parameters", None)
    if settings.get("sliding_window"):
        settings["sliding_window"] = 512
    model = build(CONFIGS[name].func(**settings))
    for parameter in model.parameters():
        if parameter.dim() == 2:  # what a product comes to does not grow with the width
            parameter.data *= (WIDTH / (4 * size)) ** 0.5
    return model


def prompt(length: int) -> list[int]:
    ids = torch.randint(3, 96, (length - 1,), generator=torch.Generator().manual_seed(0))
    return [1, *(int(index) for index in ids)]


@torch.no_grad()
def next_token(model: PreTrainedModel, kv_cache: str = "") -> torch.Tensor:
    with rounded_kv_cache(model, kv_cache):
        return model(torch.tensor([prompt(LENGTH)]), use_cache=False).logits[0, -1].float().log_softmax(-1)


def apart(model: PreTrainedModel, kv_cache: str, theirs: torch.Tensor) -> torch.Tensor:
    """How far log-probabilities are from llama.cpp's, as a share of what the model without rounding is."""
    ours, exact = next_token(model, kv_cache), next_token(model)
    return (ours - theirs).abs().mean() / (exact - theirs).abs().mean()


def asked(folder: Path, jobs: list[tuple[PreTrainedModel, str]]) -> list[torch.Tensor]:
    """The log-probabilities of the next token, by llama.cpp."""
    pytest.importorskip("xllamacpp")
    given = []
    for number, (model, kv_cache) in enumerate(jobs):
        place = folder / str(number)
        place.mkdir()
        held = runtime.rounded(runtime.before_rounding(model)[0], "f32")
        words = (write_gguf(folder / f"{number}.gguf", build(CONFIGS["llama"]())),)
        runtime.write(held, place, Beside(weights="f32", gguf=words, plan="x"))
        file = str(place / "model.gguf")
        given.append(
            {
                "file": file,
                "prompts": [prompt(LENGTH)],
                "context": 128,
                "vocabulary": 96,
                "kv_cache": kv_cache,
            }
        )
    answers = [answer["prompts"][0] for answer in ask_llama_cpp(given)]
    return [torch.tensor([answer[str(index)] for index in range(96)]) for answer in answers]


@pytest.fixture
def rounds_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention rounds queries to 8 bits too, as llama.cpp does where keys have few bits."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, queries: torch.Tensor, *more: Any, **named: Any) -> Any:
        order, turned = key_order(module.config), turned_in(queries.shape[-1])
        rounded = torch.empty_like(queries)
        rounded[..., order] = as_cached(queries[..., order], "q8_0", turned)
        return plain(module, rounded, *more, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)


@pytest.mark.parametrize("size", [32, 64, 128, 192])
def test_llama_cpp_rounds_keys_and_values_so(size: int, rounds_queries, tmp_path: Path) -> None:
    """Heads of 32 numbers are not turned before, others are: all of 64 or 128, in thirds of 192.

    What is left are numbers that come to lie on the other side of half a step.
    """
    model = wide("llama", size)
    for kv_cache, theirs in zip(FEW, asked(tmp_path, [(model, one) for one in FEW]), strict=True):
        assert apart(model, kv_cache, theirs) < FLIPPED, kv_cache


@pytest.mark.parametrize("name", some(("gemma2", "gpt_neox", "gpt2"), sorted(held_families() - {"llama"})))
def test_every_family_hands_its_cache_keys_and_values(name: str, rounds_queries, tmp_path: Path) -> None:
    """Gemma 2's attention has a soft cap and windows, GPT-NeoX's cache another name, GPT-2's heads no rotation."""
    model = wide(name, 64)
    (theirs,) = asked(tmp_path, [(model, "q4_0")])
    assert apart(model, "q4_0", theirs) < FLIPPED


@torch.no_grad()
def test_token_by_token_is_as_all_at_once() -> None:
    """What is in the cache was rounded when it came there, and is not rounded again."""
    model, ids = wide("llama", 64), torch.tensor([prompt(20)])
    with rounded_kv_cache(model, "q4_0"):
        whole, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
        parts = [
            model(ids[:, [at]], past_key_values=cache, use_cache=True).logits for at in range(ids.shape[1])
        ]
    exact = model(ids, use_cache=False).logits
    assert (torch.cat(parts, 1) - whole).abs().mean() < FLIPPED * (whole - exact).abs().mean()


@pytest.mark.parametrize("kv_cache", CACHE_TYPES)
def test_a_cache_takes_what_the_package_gguf_says(kv_cache: str) -> None:
    kind = gguf.GGMLQuantizationType[kv_cache.upper()]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    model = wide("llama", 64)
    table = measure(model.config)
    target = Target(
        context=48, batch=3, runtime="gguf", shares_weights=False, weights="f16", kv_cache=kv_cache,
        window_cache="chunk",
    )  # fmt: skip
    plan = FoldPlan.parse("0 2-4", NUM_BLOCKS)
    numbers = 2 * 2 * 64 * CELLS * plan.depth  # keys and values of two heads; llama.cpp takes no fewer cells
    assert price(plan, table, target).kv_bytes == 3 * numbers // block * block_bytes
    assert lower_bound(removing("uniform", 1), table, target) == price(plan, table, target)
    plain = price(plan, table, replace(target, kv_cache=""))
    assert replace(price(plan, table, target), kv_bytes=0) == replace(plain, kv_bytes=0)


def test_an_export_is_run_with_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    model = wide("llama", 64, vocab_size=320)
    plan = FoldPlan.parse("0 2-4", NUM_BLOCKS)
    ids_NT = torch.randint(20, 270, (4, 40), generator=torch.Generator().manual_seed(1))
    shipment = Shipment(plan, "gguf", "float32", ids_NT, dense=model, weights="q8_0", kv_cache="q4_0")
    report = export(fold(model, plan), bytes_tokenizer(), tmp_path / "out", shipment)
    assert report.engine is not None
    assert report.engine.mean_difference <= report.engine.tolerance
    assert "its KV cache in q4_0" in report.how_measured
    card = read_card(tmp_path / "out" / "card.json")
    assert card.report.kv_cache == "q4_0"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "model.gguf --cache-type-k q4_0 --cache-type-v q4_0\n" in text
    assert "settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q4_0\n" in text
    assert recheck(tmp_path / "out").faults == []


def test_a_trial_of_a_space_of_types_is_measured_with_its_own(tmp_path: Path) -> None:
    """And the dense model with each cache; both against the file, read back, with the cache rounded beside it."""
    wide("llama", 32).save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    study = tiny_study(
        tmp_path,
        model=str(tmp_path / "dense"),
        rungs=(0,),
        target=TargetSettings(context=64, rivals=("q8_0",)),
        budget=BudgetSettings(gb=1.0),
        space=Space(weights=("q8_0", "q4_0"), kv_cache=("f16", "q4_0")),
    )
    context = prepare_context(study, tmp_path / "run", cache_dir=tmp_path / "cache")
    bench = open_workbench(context)

    def of_file(model: PreTrainedModel, types: StoredTypes) -> float:
        place = tmp_path / f"{types.weights}-{types.kv_cache}-{model.config.num_hidden_layers}"
        place.mkdir()
        held = runtime.rounded(runtime.before_rounding(model)[0], types.weights)
        runtime.write(held, place, Beside(weights=types.weights, plan="x"))
        loaded, _ = runtime.load(str(place), "float32", "eager")
        with rounded_kv_cache(loaded, types.kv_cache):
            return judge(loaded, bench.splits.report, bench.report, dense=bench.dense).kl

    found = set()
    for number, types in enumerate(study.space.types):
        (*_, trial) = run_trial(replace(removing("uniform", 1), types=types), context, number=number)
        assert trial.state == "finished", trial.reason
        assert trial.cost == price(trial.plan, context.table, study.target.value().storing(types))
        model, _ = recovered_model(context, number)
        assert trial.final.kl == pytest.approx(of_file(model, types), rel=1e-5)
        found.add(trial.final.kl)
    assert len(found) == 4  # types are other models
    rivals = measure_rivals(context)
    assert [one.types for one in rivals] == [StoredTypes("q8_0", "f16"), StoredTypes("q8_0", "q4_0")]
    assert rivals[0].report.kl < 0.1 * rivals[1].report.kl
    for one in rivals:  # KL of 1e-4 nats is a sum of terms of 1, in float32
        assert one.report.kl == pytest.approx(of_file(bench.dense, one.types), abs=1e-6)


def test_an_export_may_be_asked_with_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the verb; the card knows it, and what is made again has it too."""
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path / "cache"))
    wide("llama", 32, vocab_size=300).save_pretrained(tmp_path / "dense")
    bytes_tokenizer().save_pretrained(tmp_path / "dense")
    study = tiny_study(tmp_path, model=str(tmp_path / "dense"), rungs=(0,))
    run_queued(begin_run(study, tmp_path / "run", cache_dir=tmp_path / "cache"), "window", 1)
    words = ["export", str(tmp_path / "run"), "--trial", "0", "--out", str(tmp_path / "out")]
    for more, told in (
        (
            ["--to", "stock", "--kv-cache", "q8_0"],
            "holds keys and values as its program does; got the type 'q8_0'",
        ),
        (["--to", "gguf", "--kv-cache", "mxfp4"], "llama.cpp holds keys and values as f32, "),
        (["--to", "plan", "--kv-cache", "q8_0"], "takes no --kv-cache"),
    ):
        assert main([*words, *more]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()
    assert main([*words, "--to", "gguf", "--type", "q8_0", "--kv-cache", "q4_0"]) == 0
    card = read_card(tmp_path / "out" / "card.json")
    assert (card.report.weights, card.report.kv_cache) == ("q8_0", "q4_0")
    assert card.recipe is not None
    assert card.recipe.kv_cache == "q4_0"
    assert main(["reproduce", str(tmp_path / "out" / "card.json"), "--out", str(tmp_path / "again")]) == 0
    assert read_card(tmp_path / "again" / "card.json").report.kv_cache == "q4_0"


def test_a_cache_of_the_space_that_cannot_hold_the_heads_is_refused(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, space=Space(kv_cache=("f16", "q4_0")))
    with pytest.raises(ModelError, match=r"a KV cache in q4_0 stores the numbers of a head in blocks of 32"):
        prepare_context(study, tmp_path / "run", cache_dir=tmp_path / "cache")


def test_who_names_a_cache_means_llama_cpp() -> None:
    study = load_study("default", {"target.kv_cache": "q8_0"})
    target = study.target.value()
    assert (study.target.runtime, target.kv_cache, target.rounds) == ("gguf", "q8_0", True)
    assert str(target.types) == "bf16 and a KV cache in q8_0"
    assert study.target.stored_in("", "stock").kv_cache == ""
    assert not load_study("default", {"target.kv_cache": "f16"}).target.value().rounds


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"target.kv_cache": "mxfp4"}, r"one of 'f32', .* or 'q4_0'; got \"mxfp4\""),
        ({"target.kv_cache": "q4_0", "target.runtime": "stock"}, r"got 'q4_0' for the runtime 'stock'"),
    ],
)
def test_a_cache_that_no_runtime_has_is_refused(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_study("default", overrides)


def test_heads_without_whole_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match=r"in blocks of 32; a head of this model has 12"):
        check_kv_cache(wide("llama", 12).config, "q8_0")
    check_kv_cache(wide("llama", 12).config, "f16")
