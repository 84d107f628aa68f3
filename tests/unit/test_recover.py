"""Recovery: what is attached, trained, merged, stored.

Oracles: the model before anything was attached; a dense model whose weights were changed by hand, folded anew; autograd
through full logits; an uninterrupted training; a schedule worked out by hand.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import InputError, bytes_asked
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.fold import fold
from foldsearch.model.judge import ask_dense, judge
from foldsearch.model.networks import NETWORKS
from foldsearch.model.parts import Borrowed, OutputNorm, Replaced
from foldsearch.model.recover import (
    Delta,
    Diverged,
    Recovery,
    attach,
    load_trained,
    merge,
    step_units,
)
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import RecoveryTraining, Trained
from foldsearch.plan.plan import FoldPlan, Slot
from tests.tiny import NUM_BLOCKS, as_tokens, dense_model, token_set

NAMES = ("llama", "gemma2", "gpt2")  # plain, soft-capped with four norms, Conv1D with biases
TEXT = "0 1=0+r3+n 2a 3 3=3+r2"
REPLACED = "0~linear 1 1=1+r2 2~layer 3~ffn8 4~swiglu8"
TEXTS = (TEXT, REPLACED)
TRAINS = get_args(Trained)
TOKENS = token_set("recovery", sequences=8, length=20)
STEP = 2 * 20  # tokens
SETTINGS = RecoveryTraining(learning_rate=0.05, delta_rank=2, batch=2, warmup=0.1)


def folded(name: str = "llama", text: str = TEXT):
    return fold(dense_model(name), FoldPlan.parse(text, NUM_BLOCKS))


def recovery(
    name: str = "llama",
    settings: RecoveryTraining = SETTINGS,
    total: int = 6 * STEP,
    text: str = TEXT,
    tokens: TokenSet = TOKENS,
):
    return Recovery(folded(name, text), settings, tokens, ask_dense(dense_model(name), tokens), total)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS.ids_NT, use_cache=False).logits


@torch.no_grad()
def scatter(trained: dict[str, nn.Parameter], seed: int = 0, scale: float = 0.1) -> None:
    """Random values everywhere, as after a long training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained.values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def checksum(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- attached


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("trains", TRAINS)
def test_nothing_changes_at_step_0(name, rank, text, trains):
    model = folded(name, text)
    before = logits(model)
    trained = attach(model, rank, trains=trains)
    assert trained
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    after = logits(model)
    if name == "gpt2" and rank:  # Conv1D's own product has another order of summation
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(after, before)
    assert not any(module.training for module in model.modules())
    for module in model.modules():
        if isinstance(module, Delta):
            module.train()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reads_slope", [True, False])
@pytest.mark.parametrize(
    "linear", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), Conv1D(7, 5)], ids=["bias", "no bias", "conv1d"]
)
def test_slopes_of_a_delta_are_those_that_autograd_finds(linear: nn.Module, reads_slope: bool):
    """x (W + up · down)' + b, written out in float64; the first block's input asks for no slope."""
    linear = linear.double().requires_grad_(False)
    delta = Delta(linear, 3, torch.Generator().manual_seed(0)).double().train()
    nn.init.normal_(delta.up)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=reads_slope)
    asked = [delta.down, delta.up, *([x] if reads_slope else [])]
    weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    y = x @ (weight + delta.up @ delta.down).T + (0 if linear.bias is None else linear.bias)
    torch.testing.assert_close(delta(x), y)
    slope = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(value, asked, slope) for value in (delta(x), y))
    torch.testing.assert_close(found, wanted)


def test_what_is_trained():
    """Own linears get deltas, children their adapters and output norms, every norm a change of its own."""
    trained = attach(folded("llama", "0 1=0+r3+n 2a"), 2)
    deltas = {name for name in trained if name.endswith((".down", ".up")) and trained[name].dim() == 2}
    own = 7 + 4  # block 0: q, k, v, o, gate, up, down; block 2: its attention
    assert len(deltas) == 2 * (own + 7)
    assert sum(name.endswith("gamma") for name in trained) == 2
    norms = [name for name in trained if name.endswith("change")]
    assert len(norms) == 2 + 2 + 1 + 1  # the last is the model's
    assert len(trained) == len(deltas) + 2 + len(norms)
    assert len({id(parameter) for parameter in trained.values()}) == len(trained)
    assert not any(".linear." in name for name in trained)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_three_blocks_are_trained_whole(name):
    """Their matrices and norms, and the final norm; of the blocks before them what children carry, and no more."""
    plain = folded(name, "0 0=0+r2 2-4")
    linears = [path for path, module in plain.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    biases = {f"{path}.bias" for path in linears}
    final = [key for key, _ in plain.base_model.named_parameters() if key.startswith(("norm.", "ln_f."))]
    expected = {
        key
        for key, _ in plain.base_model.named_parameters()
        if key in final
        or (key.split(".")[1] in ("2", "3", "4") and not any(one.endswith(key) for one in biases))
    }
    trained = attach(folded(name, "0 0=0+r2 2-4"), 2, trains="last")
    changed = {key for key in trained if key.endswith(".change")}
    found = {key.replace(".parametrizations", "").removesuffix(".0.change") for key in changed}
    assert {key.partition(".")[2] for key in found} == expected
    carried = {key for key in trained if key not in changed}
    assert carried
    assert all(key.split(".")[2] == "1" and key.endswith((".up", ".down")) for key in carried)


def test_what_healing_solves_is_trained_alone():
    """Block 0 comes before the gap, and block 1 is followed by it."""
    trained = attach(folded("llama", "0-1 3-4"), 2, trains="healed")
    paths = [f"{i}.{path}" for i in (1, 2, 3) for path in ("mlp.down_proj", "self_attn.o_proj")]
    expected = [f"model.layers.{path}.parametrizations.weight.0.change" for path in paths]
    assert sorted(trained) == expected
    with pytest.raises(InputError, match=r"nothing of this plan is healed.*trains = .deltas."):
        attach(folded("llama", "0-4"), 2, trains="healed")


@pytest.mark.parametrize("name", NAMES)
def test_a_replacement_keeps_its_fit(name):
    """Its network is not trained; a layer is like any other block, by deltas on weights of its own."""
    model = folded(name, REPLACED)
    trained = attach(model, 2)
    parts = {path: part for path, part in model.named_modules() if isinstance(part, Replaced)}
    assert [type(part) for part in parts.values()] == [NETWORKS[kind] for kind in ("linear", "ffn", "swiglu")]
    for path, part in parts.items():
        assert not list(part.children())
        assert not hasattr(part, "parametrizations")
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(key.startswith(path) for key in trained)
    layer, own = decoder_blocks(model)[3], decoder_blocks(model)[1]
    assert sum(isinstance(part, Delta) for part in layer.modules()) == sum(
        isinstance(part, Delta) for part in own.modules()
    )
    bypassed = decoder_blocks(model)[0]
    assert not any(isinstance(part, Delta) for part in bypassed.modules())


def test_attaching_is_a_function_of_the_seed():
    one, same, other = (attach(folded(), 2, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    down = next(name for name in one if name.endswith("q_proj.down") and "layers.0." in name)
    assert not torch.equal(one[down], other[down])


# ---- merged


def by_hand(name: str, model, dense, text: str):
    """The dense model with every delta and every norm's change added to its weights, folded anew.

    A repeat's norms and a layer's weights are their own: they are changed in the folded model.
    """
    changed = copy.deepcopy(dense)
    weights = dict(changed.named_modules())
    prefix = {"gpt2": "transformer.h"}.get(name, "model.layers")
    slots = FoldPlan.parse(text, NUM_BLOCKS).slots
    homes = [slot.home if isinstance(slot, Slot) else slot.first for slot in slots]
    apart = {
        str(i) for i, home in enumerate(homes) if home in homes[:i] or not isinstance(slots[i], Slot)
    }  # positions whose tensors are copies
    own, originals = {}, dict(dense.named_modules())
    for path, module in model.named_modules():
        position, home_path = None, path
        if path.startswith(f"{prefix}."):
            position, _, rest = path.removeprefix(f"{prefix}.").partition(".")
            home_path = f"{prefix}.{homes[int(position)]}.{rest}".replace(".inner", "")
        changes = {}
        if isinstance(module, Delta):
            change = (module.up @ module.down).detach()
            changes["weight"] = change.T if isinstance(module.linear, Conv1D) else change
        elif hasattr(module, "parametrizations"):
            changes = {key: found[0].change.detach() for key, found in module.parametrizations.items()}
        for key, change in changes.items():
            if position in apart:
                own[f"{path}.{key}"] = getattr(originals[home_path], key).data + change
            else:
                target = getattr(weights[home_path], key)
                target.data = target.data + change
    other = fold(changed, FoldPlan.parse(text, NUM_BLOCKS))
    ours, theirs = dict(model.named_modules()), dict(other.named_modules())
    for path, module in theirs.items():
        if isinstance(module, Borrowed | OutputNorm | Replaced):
            for key, parameter in module.named_parameters(recurse=False):
                parameter.data = getattr(ours[path], key).data
    for path, value in own.items():
        holder, _, key = path.rpartition(".")
        getattr(theirs[holder], key).data = value
    return other


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("trains", TRAINS)
@torch.no_grad()
def test_merging_is_adding_to_the_weights(name, text, trains):
    """Deltas, norms, the children that run the changed weights, adapters beside them: all as by hand."""
    dense = dense_model(name)
    untouched = checksum(dense)
    model = folded(name, text)
    before = logits(model)
    trained = attach(model, 2, trains=trains)
    scatter(trained)
    expected = logits(by_hand(name, model, dense, text))
    attached = logits(model)
    torch.testing.assert_close(attached, expected, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(attached, before, atol=0.1)
    merged = merge(model)
    assert merged is model
    if name == "gpt2":
        torch.testing.assert_close(logits(merged), attached, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(logits(merged), attached)
    assert checksum(dense) == untouched


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("trains", TRAINS)
def test_a_merged_model_is_a_plain_folded_model(name, text, trains):
    plain, model = folded(name, text), folded(name, text)
    scatter(attach(model, 2, trains=trains))
    merge(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    plain.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_train_mode_computes_the_same_function(name, text):
    model = folded(name, text)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    scatter(attach(model, 2))
    attached = logits(model)
    for block in model.modules():
        if isinstance(block, Delta):
            block.train()
    torch.testing.assert_close(logits(model), attached, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_children_follow_their_owner():
    model = folded("llama", "0 1=0 2")
    trained = attach(model, 2)
    child = model.model.layers[1].self_attn.q_proj
    x_BTI = torch.ones(1, 3, 32)
    before = child(x_BTI)
    name = next(key for key in trained if "layers.0.self_attn.q_proj" in key and key.endswith("up"))
    trained[name].fill_(0.5)
    changed = child(x_BTI)
    assert not torch.allclose(changed, before)
    merge(model)
    assert torch.equal(child(x_BTI), changed)


# ---- the loss


@pytest.mark.parametrize("front", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 0.7, 0.1)])
def test_the_gradient_is_that_of_the_plain_loss(name, weights, front, monkeypatch):
    """Chunked over positions and without full logits, against autograd through full logits.

    Of what stands in front of a text only the last token is trained on: it predicts how the text begins.
    """
    next_token, kl, tail = weights
    settings = replace(SETTINGS, next_token=next_token, kl=kl, tail=tail, clip=1e9)
    ours = recovery(name, settings, tokens=as_tokens(TOKENS.ids_NT, front))
    scatter(ours.trained, scale=0.03)
    found: dict[str, torch.Tensor] = {}

    def record() -> None:
        found.update({key: p.grad.clone() for key, p in ours.trained.items() if p.grad is not None})

    monkeypatch.setattr(ours._optimizer, "step", record)
    ours.train(STEP)

    model, dense, ids = ours.model.train(), dense_model(name), TOKENS.ids_NT[:2]
    with torch.no_grad():
        p = dense(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
        h_dense = dense.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].double()
    q = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    h = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].double()
    following, scored = ids[:, 1:, None], slice(max(front - 1, 0), None)
    p, q, h, h_dense, following = (value[:, scored] for value in (p, q, h, h_dense, following))
    losses = (
        -q.gather(-1, following).mean(),
        (p.exp() * (p - q)).sum(-1).mean(),
        (h - h_dense).square().mean() / h_dense.square().mean(),
    )
    plain = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    names = list(ours.trained)
    expected = torch.autograd.grad(plain, [ours.trained[key] for key in names], allow_unused=True)
    assert {key for key, g in zip(names, expected, strict=True) if g is not None} == set(found)
    for key, gradient in zip(names, expected, strict=True):
        if gradient is not None:
            scale = float(gradient.abs().max()) + 1e-6
            torch.testing.assert_close(found[key] / scale, gradient / scale, atol=2e-3, rtol=0, msg=key)
    assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-4


def test_the_gradient_is_clipped(monkeypatch):
    ours = recovery(settings=replace(SETTINGS, clip=1e-3))
    norms = []
    monkeypatch.setattr(
        ours._optimizer,
        "step",
        lambda: norms.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in ours.trained.values() if p.grad is not None))
        ),
    )
    ours.train(STEP)
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


# ---- training


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_training_brings_the_model_nearer(name, text):
    dense = dense_model(name)
    untouched = checksum(dense)
    ours = recovery(name, total=30 * STEP, text=text)
    started = {key: parameter.detach().clone() for key, parameter in ours.trained.items()}
    before = judge(ours.model, TOKENS, ours.targets)
    shares = []
    ours.train(30 * STEP, shares.append)
    after = judge(ours.model, TOKENS, ours.targets)
    assert after.kl < 0.9 * before.kl
    assert not any(torch.equal(parameter, started[key]) for key, parameter in ours.trained.items())
    assert ours.tokens_done == 30 * STEP
    assert shares == [pytest.approx(step / 30) for step in range(1, 31)]
    assert not ours.model.training
    assert checksum(dense) == untouched
    attached = logits(ours.model)
    torch.testing.assert_close(logits(merge(ours.model)), attached, atol=1e-5, rtol=1e-5)
    assert checksum(dense) == untouched


@pytest.mark.parametrize("text", TEXTS)
def test_rungs_change_nothing(text):
    """Trained to 2, 3 and 6 steps with a measurement in between, or to 6 at once: the same bits."""
    whole, parts = recovery(text=text), recovery(text=text)
    whole.train(6 * STEP)
    for steps in (2, 3, 6):
        parts.train(steps * STEP)
        judge(parts.model, TOKENS, parts.targets)
    assert all(torch.equal(whole.trained[key], parts.trained[key]) for key in whole.trained)


@pytest.mark.parametrize("stop", [1, 3, 5])
@pytest.mark.parametrize("text", TEXTS)
def test_a_training_goes_on_from_disk(tmp_path, stop, text):
    """Five steps go over the eight sequences more than once."""
    whole = recovery(total=8 * STEP, text=text)
    whole.train(8 * STEP)
    first = recovery(total=8 * STEP, text=text)
    first.train(stop * STEP)
    first.save(tmp_path / "state")
    second = recovery(total=8 * STEP, text=text)
    second.load(tmp_path / "state")
    assert second.tokens_done == stop * STEP
    second.train(8 * STEP)
    assert all(torch.equal(whole.trained[key], second.trained[key]) for key in whole.trained)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_dropout_is_off(name):
    """The dense answers are without it; and two trainings are the same bits, whatever random numbers came before."""
    one, two = recovery(name), recovery(name)
    assert one.model.config.to_dict().get("resid_pdrop", one.model.config.to_dict().get("dropout")) == 0.1
    one.train(2 * STEP)
    torch.rand(7)
    two.train(2 * STEP)
    assert all(torch.equal(one.trained[key], two.trained[key]) for key in one.trained)


def test_a_save_that_ran_ahead_of_its_rung_is_gone_on_from(tmp_path):
    """Killed between saving and noting the rung: what is on disk is two steps further than the notes."""
    whole = recovery()
    whole.train(6 * STEP)
    first = recovery()
    first.train(4 * STEP)
    first.save(tmp_path / "state")
    second = recovery()
    second.load(tmp_path / "state")
    assert second.tokens_done == 4 * STEP
    second.train(4 * STEP)  # the rung that is noted next: nothing is left to train
    second.train(6 * STEP)
    assert all(torch.equal(whole.trained[key], second.trained[key]) for key in whole.trained)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_saved_rebuilds_the_model(tmp_path, text):
    ours = recovery(text=text)
    ours.train(2 * STEP)
    ours.keep(tmp_path / "kept")
    again = folded(text=text)
    load_trained(attach(again, SETTINGS.delta_rank, SETTINGS.seed), tmp_path / "kept")
    assert torch.equal(logits(again), logits(ours.model))
    held = load_file(tmp_path / "kept")
    assert sum(t.numel() for t in held.values()) == sum(p.numel() for p in ours.trained.values())


def test_an_absurd_learning_rate_diverges():
    ours = recovery(settings=replace(SETTINGS, learning_rate=1e30), total=20 * STEP)
    with pytest.raises(Diverged, match=r"became nan after \d+ tokens at learning rate 1e\+30. Lower the"):
        ours.train(20 * STEP)
    assert not ours.model.training


def test_learning_rates(monkeypatch):
    """Twenty steps: up to the peak in two, then a cosine down to a tenth; each parameter in its own unit."""
    ours = recovery(settings=replace(SETTINGS, learning_rate=1.0), total=20 * STEP)
    units = step_units(ours.model)
    rates = []

    def record() -> None:
        groups = ours._optimizer.param_groups
        found = {id(group["params"][0]): group["lr"] for group in groups}
        shares = {name: found[id(parameter)] / units[name] for name, parameter in ours.trained.items()}
        assert len(found) == len(groups) == len(shares)
        rates.append(shares["model.norm.parametrizations.weight.0.change"])
        assert list(shares.values()) == [pytest.approx(rates[-1])] * len(shares)

    monkeypatch.setattr(ours._optimizer, "step", record)
    ours.train(20 * STEP)
    assert rates[:3] == [pytest.approx(0.5), pytest.approx(1.0), pytest.approx(1.0)]
    # done 0.55 of all, half of the way from 0.1 to 1: the middle between the peak and a tenth
    assert rates[11] == pytest.approx(0.55)
    assert rates[19] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 17 / 18)))
    assert rates[2:] == sorted(rates[2:], reverse=True)


@torch.no_grad()
def rms(values: torch.Tensor) -> float:
    return math.sqrt(float(values.double().square().mean()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [2, 32])
def test_steps_are_in_units_of_the_weights(name, rank):
    """Against the dense model's tensors, found by name: the merged weights' own, not the borrowed ones' twice."""
    dense, model = dict(dense_model(name).named_parameters()), folded(name)
    trained = attach(model, rank)
    units = step_units(model)
    assert units.keys() == trained.keys()
    prefix = {"gpt2": "transformer.h"}.get(name, "model.layers")

    def dense_name(path: str, homes: list[int]) -> str:
        parts = path.removeprefix(f"{prefix}.").replace(".inner", "").split(".")
        return ".".join([prefix, str(homes[int(parts[0])]), *parts[1:]]) if path.startswith(prefix) else path

    for key, unit in units.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "down":
            assert unit == pytest.approx(trained[key].shape[1] ** -0.5)
        elif leaf == "up":
            # More than 8 of a delta move by less each: together they are to do what 8 do. Not those of adapters.
            is_delta = isinstance(model.get_submodule(path), Delta)
            share = 8 / max(8, trained[key].shape[1]) if is_delta else 1.0
            weight = dense[f"{dense_name(path, [0, 0, 2, 3, 3])}.weight"]
            assert unit == pytest.approx(share * rms(weight), rel=1e-5)
        elif leaf == "gamma":
            assert unit == pytest.approx(8 / 32 * 0.1)
        else:
            where, what = path.removesuffix(".0").split(".parametrizations.")
            assert unit == pytest.approx(
                8 / 32 * max(0.1, rms(dense[f"{dense_name(where, [0, 1, 2, 3, 3])}.{what}"])), rel=1e-5
            )


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_matrix_is_moved_by_what_it_reads(name):
    """What I elements do together is to be what the 8 of a factor do, whatever the matrix's size."""
    model = folded(name, "0-1 3-4")
    linears = {path: one for path, one in model.named_modules() if isinstance(one, nn.Linear | Conv1D)}
    attach(model, 2, trains="last")
    units = {
        key: unit for key, unit in step_units(model).items() if key.split(".parametrizations")[0] in linears
    }
    assert len(units) > 3 * 3
    for key, unit in units.items():
        linear = linears[key.split(".parametrizations")[0]]
        inputs = linear.weight.shape[0] if isinstance(linear, Conv1D) else linear.in_features
        assert unit == pytest.approx(8 / inputs * rms(linear.weight), rel=1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_the_first_step_moves_by_the_learning_rate_in_units(text):
    """Adam's first step is the learning rate times the gradient's sign."""
    ours = recovery(settings=replace(SETTINGS, learning_rate=0.03, warmup=0.0), text=text)
    started = {key: parameter.detach().clone() for key, parameter in ours.trained.items()}
    ours.train(STEP)
    moved = 0
    for key, unit in step_units(folded_and_attached(text)).items():
        step = float((ours.trained[key].detach() - started[key]).abs().max())
        if step:  # down has no gradient while up is zero
            moved += 1
            assert step == pytest.approx(0.03 * unit, rel=0.02)
    assert moved > len(started) / 2


def folded_and_attached(text: str):
    model = folded(text=text)
    attach(model, 2)
    return model


def test_going_back_is_to_begin_anew_at_a_lower_rate():
    """From the start at a quarter of the rate, on the texts and at the place of the schedule that come next."""
    ours, other = recovery(total=8 * STEP), recovery(total=8 * STEP)
    started = {key: parameter.detach().clone() for key, parameter in ours.trained.items()}
    ours.train(3 * STEP)
    ours.go_back(started, 0.25)
    ours.train(6 * STEP)
    slow = replace(SETTINGS, learning_rate=SETTINGS.learning_rate / 4)
    other = recovery(settings=slow, total=8 * STEP)
    for _ in range(3 * 2):
        next(other._order)
    other.tokens_done = 3 * STEP
    other.train(6 * STEP)
    assert all(torch.equal(ours.trained[key], other.trained[key]) for key in ours.trained)


def test_every_sequence_is_seen_once_a_pass(monkeypatch):
    ours = recovery(total=8 * STEP)
    seen: list[int] = []
    step = ours._step
    monkeypatch.setattr(ours, "_step", lambda rows: seen.extend(rows) or step(rows))
    ours.train(8 * STEP)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:]


def test_half_a_batch_at_a_time_gives_the_gradients_of_the_whole() -> None:
    """The sums are the same, in another order: the loss is a mean over the whole batch, and so is its scale."""
    whole, halves = (
        recovery(settings=replace(SETTINGS, batch=4)),
        recovery(settings=replace(SETTINGS, batch=4)),
    )
    halves._parts = 2
    losses = [one._gradients([3, 0, 5, 1]) for one in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, parameter in whole.trained.items():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(halves.trained[name].grad, parameter.grad, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()]
)
def test_a_step_that_memory_does_not_hold_is_taken_in_halves(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: training that begins in halves."""
    real, sizes = Recovery._add_gradients, []
    halves = recovery(settings=SETTINGS)
    halves._parts = 2
    until = 3 * SETTINGS.batch * TOKENS.ids_NT.shape[1]
    halves.train(until)

    def lacking(self: Recovery, rows: list[int], scale: object) -> float:
        sizes.append(len(rows))
        if len(rows) > 1:
            real(self, rows[:1], scale)  # what was added before it failed does not stay
            raise error
        return real(self, rows, scale)

    monkeypatch.setattr(Recovery, "_add_gradients", lacking)
    found = recovery(settings=SETTINGS)
    found.train(until)
    assert sizes == [2, 1, 1, 1, 1, 1, 1]  # it is tried whole once
    for name, parameter in halves.trained.items():
        assert torch.equal(found.trained[name], parameter)


def test_what_half_a_step_does_not_fit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")

    monkeypatch.setattr(Recovery, "_add_gradients", lacking)
    with pytest.raises(RuntimeError, match="4096 bytes") as told:
        recovery(settings=SETTINGS).train(10**6)
    assert bytes_asked(told.value) == "4096 bytes"
