"""Where a folded model starts from.

Oracles: the fits and starts called by themselves; planted runs that add a constant, so that the start is the dense
model; the dense model's memory, address by address; the model itself, rebuilt from what it has of its own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldsearch.errors import ModelError, PlanError
from foldsearch.model import starts
from foldsearch.model.blocks import decoder_blocks, family_of
from foldsearch.model.children import start_adapters
from foldsearch.model.fold import fold
from foldsearch.model.parts import Borrowed, OutputNorm, Replaced
from foldsearch.model.replacements import FitSettings, fit_replacement
from foldsearch.model.starts import folded_start, new_values
from foldsearch.model.states import FitText, residual_states, text_to_fit
from foldsearch.plan.plan import FoldPlan, Replacement
from tests.tiny import NUM_BLOCKS, WIDTH, dense_model, token_set

# plain, four norms and windows, norms after units, Conv1D, parallel residual, an MLP of flattened tokens
NAMES = ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "opt"]
LENGTH = 16
IDS = token_set(sequences=12, length=LENGTH).ids_NT
PLANS = {
    "linear": "0 1-2~linear 3-4",
    "ffn": "0 1-2~ffn12 3-4",
    "swiglu": "0-2 3-4~swiglu12",
    "layer": "0 1-3~layer 4",
    "children": "0 1=3+r4+n 2=3a+n 3 4=0m+r2",
    "repeats": "0 1 1=1+r3+n 2-3 2a=2 4",
    "everything": "0 0=0+r2+n 1-2~ffn12 3 3=0a3m+r3 4~layer",
    "two runs": "0-1~layer 2=4+n 3~linear 4",
    "halves": "0m 1a 2-3~swiglu8 4",
}

names = pytest.mark.parametrize("name", NAMES)
every_plan = pytest.mark.parametrize(
    ("name", "label"),
    [*(("llama", label) for label in PLANS), *((name, "everything") for name in NAMES[1:])]
    + [(name, label) for name in ("gpt2", "opt") for label in ("repeats", "two runs", "halves")],
)


@pytest.fixture
def start(tmp_path):
    def started(dense, text: str, ids_NT=IDS, **rest):
        plan = FoldPlan.parse(text, NUM_BLOCKS)
        return folded_start(FitText(dense, ids_NT, "m", tmp_path), plan, **rest)

    return started


@torch.no_grad()
def logits(model) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def kl(dense, model) -> float:
    p, q = logits(dense).double().log_softmax(-1), logits(model).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def parse(text: str) -> FoldPlan:
    return FoldPlan.parse(text, NUM_BLOCKS)


@torch.no_grad()
def scattered(name: str, text: str):
    """A folded model in which everything that can be its own is random."""
    model = fold(dense_model(name), parse(text))
    generator = torch.Generator().manual_seed(2)
    for value in new_values(model).values():
        value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return model


# ---- what a folded model has of its own


@every_plan
def test_a_model_is_rebuilt_from_what_is_new_in_it(name, label, tmp_path):
    dense = dense_model(name)
    kept = [parameter.clone() for parameter in dense.parameters()]
    model = scattered(name, PLANS[label])
    save_file({key: value.contiguous() for key, value in new_values(model).items()}, tmp_path / "start")
    for values in (new_values(model), load_file(tmp_path / "start")):
        again = fold(dense, parse(PLANS[label]), start=values)
        assert torch.equal(logits(again), logits(model))
        assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not torch.equal(logits(fold(dense, parse(PLANS[label]))), logits(model))
    assert all(torch.equal(p, old) for p, old in zip(dense.parameters(), kept, strict=True))


@every_plan
def test_what_is_new_is_what_is_not_the_dense_models(name, label):
    """By its place in memory; but for a repeat's norms, which are copies until they are trained."""
    dense = dense_model(name)
    model = fold(dense, parse(PLANS[label]))
    theirs = {parameter.data_ptr() for parameter in dense.parameters()}
    own = {key for key, p in model.named_parameters() if p.data_ptr() not in theirs}
    homes = [slot.first if isinstance(slot, Replacement) else slot.home for slot in parse(PLANS[label]).slots]
    repeats = {position for position, home in enumerate(homes) if home in homes[:position]}
    blocks = family_of(model.config).blocks
    copies = {
        f"{blocks}.{position}.{path}.{key}"
        for position in repeats
        for path, module in decoder_blocks(model)[position].named_modules()
        if not isinstance(module, Borrowed | OutputNorm | Replaced)
        for key, _ in module.named_parameters(recurse=False)
    }
    found = new_values(model)
    assert set(found) == own - copies
    assert copies <= own
    parameters = dict(model.named_parameters())
    assert all(value.data_ptr() == parameters[key].data_ptr() for key, value in found.items())
    assert not any(value.requires_grad for value in found.values())


def test_nothing_is_new_in_a_plan_of_dense_blocks():
    assert new_values(fold(dense_model(), parse("0 1=0 2a 4"))) == {}


# ---- starting


@names
def test_what_was_fitted_is_what_the_model_has(name, start, tmp_path):
    """The fits and the adapters' start, called by themselves; and what they found, in plain values."""
    dense, text = dense_model(name), "0=4+r3+n 1~linear 2~swiglu8 3~layer 4"
    fit_settings = FitSettings(epochs=2, learning_rate=1e-2)
    model, found = start(dense, text, adapters="data", fit=fit_settings)
    expected = fold(dense, parse(text))
    start_adapters(expected, dense, IDS, "data")
    states = residual_states(dense, IDS, model_hash="m", cache_dir=tmp_path)
    summary = {}
    for block, slot in zip(decoder_blocks(expected), parse(text).slots, strict=True):
        if isinstance(slot, Replacement):
            fit = fit_replacement(dense, slot, states, IDS, fit_settings)
            own = [part for part in block.modules() if isinstance(part, Replaced)] or [block]
            own[0].load_state_dict(fit.values)
            summary[f"{slot.first}-{slot.last}~{slot.kind}"] = {"errors": fit.errors, "chosen": fit.chosen}
    assert found == {**summary, "adapters": "data"}
    assert torch.equal(logits(model), logits(expected))
    assert not torch.allclose(logits(model), logits(fold(dense, parse(text))), atol=1e-3)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_linear_map_may_be_left_to_healing(tmp_path):
    """It adds nothing then, and no state is asked for; other kinds are fitted as ever."""
    text = FitText(dense_model(), IDS, "x", tmp_path)
    plan = FoldPlan.parse("0 1-2~linear 3-4", NUM_BLOCKS)
    model, found = folded_start(text, plan, fit=FitSettings(linear=None))
    assert found == {}
    assert not decoder_blocks(model)[1].mlp.down.any()
    assert not any(tmp_path.rglob("*.bin"))
    plan = FoldPlan.parse("0 1-2~linear 3~ffn8 4", NUM_BLOCKS)
    _, found = folded_start(text, plan, fit=FitSettings(linear=None))
    assert list(found) == ["3-3~ffn"]


@names
@pytest.mark.parametrize("text", ["0 1-2~linear 3-4", "0 1-2~ffn 3-4", "0 1-2~layer 3-4", "0 1-2=3+r8+n 3-4"])
def test_the_start_is_written_to_nothing_of_the_dense_model(name, text, start):
    text = text.replace("1-2=3+r8+n", "1=3+r8+n 2=3+r8")
    dense = dense_model(name)
    kept = [parameter.clone() for parameter in dense.parameters()]
    model, _ = start(dense, text, adapters="data")
    assert kl(dense, model) < kl(dense, fold(dense, parse(text)))
    assert all(torch.equal(p, old) for p, old in zip(dense.parameters(), kept, strict=True))


@torch.no_grad()
def adding_constants(name: str):
    """The dense model with blocks 1 to 3 adding a constant each: the weights of what they write are zero, its biases
    are not.
    """
    dense = copy.deepcopy(dense_model(name))
    family = family_of(dense.config)
    for block in list(decoder_blocks(dense))[1:4]:
        for unit in (family.attention, family.mlp):
            writes = block.get_submodule(unit.output)
            writes.weight.zero_()
            writes.bias.mul_(4)
    return dense


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("kind", ["linear", "ffn", "layer"])
def test_a_run_that_adds_a_constant_is_replaced_without_loss(name, kind, start):
    """A layer is a block that adds a third of it, at first."""
    dense = adding_constants(name)
    dropped = kl(dense, fold(dense, FoldPlan.dropping([1, 2, 3], NUM_BLOCKS)))
    fit = FitSettings(epochs=30, learning_rate=1e-2)
    model, found = start(dense, f"0 1-3~{kind} 4", fit=fit)
    (of_run,) = found.values()
    assert dropped > 0.05
    if kind == "layer":
        assert of_run["errors"]["trained"] < 0.1 * of_run["errors"]["copy"]
        assert kl(dense, model) < 0.1 * dropped
    else:
        # A constant that float32 states hold to 6e-8 of their size; squared, and ten times that for small constants.
        assert of_run["errors"][of_run["chosen"]] < 1e-12
        assert kl(dense, model) < 1e-3 * dropped


@pytest.mark.parametrize("text", ["0 1=3 2-4", "0 1=3 2a 3-4", "0-4"])
def test_where_nothing_is_to_start_nothing_is_run(text, start, tmp_path):
    model, found = start(dense_model(), text)
    assert found == {}
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), logits(fold(dense_model(), parse(text))))


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 2), (3 * LENGTH, 3), (4 * LENGTH - 1, 3), (8192, 12)])
def test_whole_sequences_of_the_text_and_two_at_least(monkeypatch, tokens, sequences, start):
    seen = []
    fit, adapt = starts.fit_replacement, starts.start_adapters
    monkeypatch.setattr(
        starts,
        "fit_replacement",
        lambda *args: (seen.append(("fit", args[2].shape[1], len(args[3]))), fit(*args))[1],
    )
    monkeypatch.setattr(
        starts,
        "start_adapters",
        lambda *args: (seen.append(("adapt", len(args[2]))), adapt(*args))[1],
    )
    start(dense_model(), "0 1-2~linear 3 4=0+r2", text_to_fit(IDS, tokens), adapters="data")
    assert seen == [("fit", sequences, sequences), ("adapt", sequences)]


def test_two_runs_of_one_text_are_one_pass_over_it(start, tmp_path):
    one, found = start(dense_model(), "0 1-2~linear 3~ffn8 4")
    (file,) = (tmp_path / "states").glob("*.bin")
    written = file.stat().st_ino
    two, again = start(dense_model(), "0 1-2~linear 3~ffn8 4")
    start(dense_model(), "0 1-3~swiglu8 4")
    assert [path.stat().st_ino for path in (tmp_path / "states").glob("*.bin")] == [written]
    assert torch.equal(logits(one), logits(two))
    assert found == again
    assert list(found) == ["1-2~linear", "3-3~ffn"]


def test_progress_names_what_is_done(start):
    seen: dict[str, list[float]] = {}
    start(
        dense_model(),
        "0 1-2~ffn8 3 4=0+r2",
        adapters="data",
        progress=lambda stage, share: seen.setdefault(stage, []).append(share),
    )
    assert list(seen) == ["residual states", "fitting 1-2~ffn", "calibrating adapters"]
    for shares in seen.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


def test_what_fold_refuses_is_refused(start, tmp_path):
    with pytest.raises(PlanError, match="an adapter's rank is at most the model's width"):
        start(dense_model(), f"0 1=0+r{WIDTH + 1} 2-3~linear 4")
    with pytest.raises(ModelError, match="this one is folded already"):
        start(fold(dense_model(), FoldPlan.identity(NUM_BLOCKS)), "0 1-3~linear 4")
    assert not list(tmp_path.iterdir())
