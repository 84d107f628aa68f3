"""What replaces a run of blocks, fitted to states before and after it.

Oracles: weighted ridge and least squares by numpy in float64; every ridge tried by brute force; planted maps that a
kind can say exactly, and targets that nobody can; the dense block itself; the folded model that the values are put in.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from foldsearch.errors import ModelError
from foldsearch.model import replacements
from foldsearch.model.blocks import FAMILIES, decoder_blocks
from foldsearch.model.evidence import hidden_of
from foldsearch.model.fold import cast, fold
from foldsearch.model.networks import NETWORKS
from foldsearch.model.parts import Replaced
from foldsearch.model.replacements import (
    RIDGES,
    Fit,
    FitSettings,
    align_channels,
    fit_replacement,
    rotation,
    solve_down,
)
from foldsearch.model.states import residual_states
from foldsearch.plan.plan import FoldPlan, Replacement
from tests.tiny import NUM_BLOCKS, WIDTH, dense_model, token_set
from tests.tolerances import SOLVED

LENGTH = 16
IDS = token_set(sequences=12, length=LENGTH).ids_NT
HELD = 3  # of twelve sequences, by default
KINDS = ("linear", "ffn", "swiglu")
TRAINED = FitSettings(epochs=4, learning_rate=1e-2)
CLOSED = FitSettings(epochs=0)


@cache
def real_states(name: str) -> Tensor:
    with TemporaryDirectory() as folder:
        found = residual_states(dense_model(name), IDS, model_hash=name, cache_dir=Path(folder))
        return found.clone()


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def planted(before_NTD: Tensor, added_NTD: Tensor) -> Tensor:
    """States of five blocks in which blocks 1 and 2 add `added`, and no others anything."""
    after_NTD = before_NTD + added_NTD
    return torch.stack([before_NTD, before_NTD, (before_NTD + after_NTD) / 2, *[after_NTD] * 3])


def fitted(
    kind: str,
    states: Tensor,
    settings: FitSettings | None = None,
    *,
    last: int = 2,
    size: int = 0,
    name: str = "llama",
    **rest,
) -> Fit:
    slot = Replacement(1, last, kind, size)
    return fit_replacement(dense_model(name), slot, states, IDS[: states.shape[1]], settings, **rest)


def rms_normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def features_by_hand(kind: str, values: dict[str, Tensor], x: Tensor) -> Tensor:
    if kind == "linear":
        return x
    n = rms_normed(x)
    up = n @ values["up"].T
    if kind == "ffn":
        return (up + values["up_bias"]).clamp(min=0)
    gate = n @ values["gate"].T
    return gate / (1 + (-gate).exp()) * up


def error_by_hand(kind: str, values: dict[str, Tensor], states: Tensor, last: int = 2) -> float:
    """On the held-out sequences."""
    before, after = states[1, -HELD:].double(), states[last + 1, -HELD:].double()
    values = {name: value.double() for name, value in values.items()}
    made = features_by_hand(kind, values, before) @ values["down"].T + values.get("bias", 0.0)
    wanted = after - before
    return float(((made - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def ridge_by_numpy(features_MH: Tensor, added_MD: Tensor, ridge: float, *, bias: bool) -> np.ndarray:
    """(H, D), or (H + 1, D) with the bias last, which is free."""
    f, r = features_MH.double().numpy(), added_MD.double().numpy()
    weight_M1 = 1 / (r**2).sum(-1, keepdims=True)
    penalty_H = np.full(f.shape[1], ridge * (weight_M1 * f**2).sum() / f.shape[1])
    if bias:
        f, penalty_H = np.hstack([f, np.ones_like(f[:, :1])]), np.append(penalty_H, 0.0)
    return np.linalg.solve(f.T @ (weight_M1 * f) + np.diag(penalty_H), f.T @ (weight_M1 * r))


# ---- closed form


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_linear_is_the_weighted_ridge_solution(monkeypatch, name, ridge):
    monkeypatch.setattr(replacements, "RIDGES", (ridge,))
    before, after = real_states(name)[1], real_states(name)[3]
    net = NETWORKS["linear"](WIDTH, WIDTH)
    assert solve_down(net, (before[:-HELD], after[:-HELD]), (before[-HELD:], after[-HELD:])) == ridge
    train, added = before[:-HELD].flatten(0, 1), (after - before)[:-HELD].flatten(0, 1)
    expected = ridge_by_numpy(train, added, ridge, bias=True)
    np.testing.assert_allclose(net.down.detach().T, expected[:-1], atol=SOLVED["atol"])
    np.testing.assert_allclose(net.bias.detach(), expected[-1], atol=SOLVED["atol"])


def test_without_a_ridge_linear_is_weighted_least_squares(monkeypatch):
    monkeypatch.setattr(replacements, "RIDGES", (1e-9,))
    scale_NT1 = normal(12, LENGTH, 1, seed=5).mul(0.1).exp()  # tokens of different sizes
    x = normal(12, LENGTH, WIDTH) * scale_NT1
    added = x @ normal(WIDTH, WIDTH, seed=1, scale=0.3) + normal(12, LENGTH, WIDTH, seed=2) * scale_NT1
    fit = fitted("linear", planted(x, added))
    assert fit.chosen == "closed form"
    weight_M1 = 1 / added[:-HELD].flatten(0, 1).norm(dim=-1, keepdim=True)
    with_one = torch.cat((x[:-HELD].flatten(0, 1), torch.ones(len(weight_M1), 1)), 1)
    expected = torch.linalg.lstsq(
        (with_one * weight_M1).double(), (added[:-HELD].flatten(0, 1) * weight_M1).double()
    ).solution.float()
    torch.testing.assert_close(fit.values["down"].T, expected[:-1], **SOLVED)
    torch.testing.assert_close(fit.values["bias"], expected[-1], **SOLVED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [2048, 3 * LENGTH])
def test_the_ridge_is_the_best_on_held_out_states(monkeypatch, kind, chunk):
    """Brute force over all ridges, at noises that call for weak ones and strong ones."""
    monkeypatch.setattr(replacements, "CHUNK", chunk)
    monkeypatch.setattr(replacements, "LEAST_SIZE", 0.0)  # the floor has a test of its own
    chosen = set()
    for noise in (0.003, 0.1, 1.0, 10.0):
        net = NETWORKS[kind](WIDTH, 40)
        x = normal(8, LENGTH, WIDTH)
        values = dict(net.named_parameters())
        features = features_by_hand(kind, values, x).detach()
        truth = normal(features.shape[-1], WIDTH, seed=1, scale=0.3)
        added = features @ truth + normal(8, LENGTH, WIDTH, seed=2, scale=noise)
        after, bias = x + added, kind != "swiglu"

        solutions, errors = {}, {}
        held = features[4:].flatten(0, 1).double().numpy()
        wanted = added[4:].flatten(0, 1).double().numpy()
        for ridge in RIDGES:
            found = ridge_by_numpy(
                features[:4].flatten(0, 1), added[:4].flatten(0, 1), ridge, bias=bias
            )  # 64 tokens for 40 features
            made = held @ found[: held.shape[1]] + (found[-1] if bias else 0.0)
            solutions[ridge] = found
            errors[ridge] = (((made - wanted) ** 2).sum(-1) / (wanted**2).sum(-1)).mean()
        best = min(errors, key=errors.__getitem__)

        assert solve_down(net, (x[:4], after[:4]), (x[4:], after[4:])) == best
        np.testing.assert_allclose(net.down.detach().T, solutions[best][: held.shape[1]], atol=SOLVED["atol"])
        if bias:
            np.testing.assert_allclose(net.bias.detach(), solutions[best][-1], atol=SOLVED["atol"])
        chosen.add(best)
    assert len(chosen) >= 3


@pytest.mark.parametrize("chunk", [2048, 3 * LENGTH])
def test_a_weak_ridge_is_not_lost_in_rounding(monkeypatch, chunk):
    """More features than tokens: all but the ridge is rounding there. Oracle: numpy in float64."""
    monkeypatch.setattr(replacements, "RIDGES", (1e-6,))
    monkeypatch.setattr(replacements, "CHUNK", chunk)
    net = NETWORKS["ffn"](WIDTH, 4 * WIDTH)
    net.reset_parameters(torch.Generator().manual_seed(0))
    before, after = normal(4, LENGTH, WIDTH), normal(4, LENGTH, WIDTH, seed=1)
    solve_down(net, (before, after), (before, after))
    features = net.features(before.flatten(0, 1)).detach()
    expected = ridge_by_numpy(features, (after - before).flatten(0, 1), 1e-6, bias=True)
    made = (features @ net.down.T + net.bias).detach()
    wanted = features.double().numpy() @ expected[:-1] + expected[-1]
    # Features are float32, 6e-8 of their size; in a direction that only the ridge holds, that is 6e-8 / sqrt(1e-6).
    np.testing.assert_allclose(made, wanted, atol=6e-5 * float(np.abs(wanted).max()))


def test_an_affine_run_is_found_exactly():
    x = normal(12, LENGTH, WIDTH)
    map_DD, bias_D = normal(WIDTH, WIDTH, seed=1), normal(WIDTH, seed=2)
    fit = fitted("linear", planted(x, x @ map_DD + bias_D))
    assert fit.chosen == "closed form"
    assert fit.errors["closed form"] < 1e-8
    torch.testing.assert_close(fit.values["down"], map_DD.T, **SOLVED)
    torch.testing.assert_close(fit.values["bias"], bias_D, **SOLVED)


@pytest.mark.parametrize("size", [0, 64])
def test_ffn_holds_every_linear_map_of_the_normed_states(size):
    """relu(n) and relu(−n) are among its features, where it is twice as wide as the model."""
    x = normal(40, LENGTH, WIDTH) * normal(40, LENGTH, 1, seed=3).exp()
    states = planted(x, rms_normed(x) @ normal(WIDTH, WIDTH, seed=1) + normal(WIDTH, seed=2))
    fit = fit_replacement(
        dense_model(), Replacement(1, 2, "ffn", size), states, torch.zeros(40, LENGTH).long(), CLOSED
    )
    assert fit.chosen == "closed form"
    assert fit.errors["closed form"] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_helps_nothing_is_chosen(kind):
    """What is added has nothing to do with the states, and there are few of them."""
    states = planted(normal(4, LENGTH, WIDTH), normal(4, LENGTH, WIDTH, seed=1))
    fit = fitted(kind, states, FitSettings(epochs=20, learning_rate=1e-2))
    assert fit.errors["nothing"] == 1.0
    assert min(error for name, error in fit.errors.items() if name != "nothing") > 1.0
    assert fit.chosen == "nothing"
    net = NETWORKS[kind](WIDTH, 4 * WIDTH)
    net.load_state_dict(fit.values)
    assert not net(states[1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_adds_nothing_is_replaced_by_nothing(kind):
    states = planted(normal(8, LENGTH, WIDTH), torch.zeros(8, LENGTH, WIDTH))
    fit = fitted(kind, states, TRAINED)
    net = NETWORKS[kind](WIDTH, 4 * WIDTH)
    net.load_state_dict(fit.values)
    assert fit.errors[fit.chosen] == 0.0
    assert not net(states[1]).any()


# ---- the choice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [CLOSED, FitSettings(), TRAINED, FitSettings(learning_rate=1e30)])
def test_the_least_error_on_held_out_states_is_chosen(kind, settings):
    states = real_states("llama")
    fit = fitted(kind, states, settings)
    tried = {"nothing", "closed form"} | ({"trained"} if kind != "linear" and settings.epochs else set())
    assert set(fit.errors) == tried
    finite = [error for error in fit.errors.values() if np.isfinite(error)]
    assert fit.errors[fit.chosen] == min(finite)
    assert error_by_hand(kind, fit.values, states) == pytest.approx(fit.errors[fit.chosen], rel=1e-3)
    assert {value.dtype for value in fit.values.values()} == {torch.float32}
    assert not any(value.requires_grad for value in fit.values.values())


@pytest.mark.parametrize("kind", ["ffn", "swiglu"])
def test_training_finds_what_a_linear_solve_cannot(kind):
    """Another network of the kind, half as wide: its features are not among the random ones."""
    teacher = NETWORKS[kind](WIDTH, 16)
    x = normal(60, LENGTH, WIDTH)
    with torch.no_grad():
        teacher.down.copy_(normal(WIDTH, 16, seed=7))
        states = planted(x, teacher(x))
    settings = FitSettings(epochs=30, learning_rate=1e-2)
    ids_NT = torch.zeros(60, LENGTH).long()
    fit = fit_replacement(dense_model(), Replacement(1, 2, kind, 32), states, ids_NT, settings)
    assert fit.chosen == "trained"
    assert fit.errors["trained"] < 0.5 * min(1.0, fit.errors["closed form"])


@pytest.mark.parametrize("kind", [*KINDS, "layer"])
def test_held_out_sequences_are_never_fitted_to(monkeypatch, kind):
    """Other held-out states, and what stands before the choice is the same to the bit."""
    monkeypatch.setattr(replacements, "RIDGES", (1e-1,))  # the one thing that is chosen on them
    settings = TRAINED if kind != "linear" else CLOSED
    states = real_states("llama")
    added = states[3] - states[1]
    others = states.clone()
    others[1, -HELD:] = others[1, -HELD:].flip(0)
    others[3, -HELD:] = others[1, -HELD:] + 1.001 * added[-HELD:].flip(0)
    one, two = fitted(kind, states, settings), fitted(kind, others, settings)
    assert one.chosen == two.chosen == ("closed form" if kind == "linear" else "trained")
    assert one.errors != two.errors
    assert all(torch.equal(one.values[name], two.values[name]) for name in one.values)
    others = states.clone()
    others[3, 0] += 1.0  # but a training sequence matters
    assert any(not torch.equal(one.values[n], v) for n, v in fitted(kind, others, settings).values.items())


@pytest.mark.parametrize(("share", "held"), [(0.25, 3), (0.01, 1), (0.5, 6)])
def test_how_many_sequences_are_held_out(monkeypatch, share, held):
    seen = []
    solve = replacements.solve_down
    monkeypatch.setattr(
        replacements,
        "solve_down",
        lambda net, train, test: (seen.append((len(train[0]), len(test[0]))), solve(net, train, test)),
    )
    fitted("linear", real_states("llama"), FitSettings(held_out=share))
    assert seen == [(12 - held, held)]


@pytest.mark.parametrize("kind", [*KINDS, "layer"])
def test_one_sequence_is_fitted_and_judged_on_itself(kind):
    fit = fitted(kind, real_states("llama")[:, :1], TRAINED)
    assert fit.errors[fit.chosen] <= 1.0 or kind == "layer"
    assert fit.errors[fit.chosen] == min(fit.errors.values())


@pytest.mark.parametrize("kind", [*KINDS, "layer"])
def test_a_fit_is_a_function_of_the_seed_and_writes_nothing(kind):
    dense, states = dense_model(), real_states("llama")
    before, kept = states.clone(), [p.clone() for p in dense.parameters()]
    seen = []
    one = fitted(kind, states, TRAINED, progress=lambda *at: seen.append(at))
    two = fitted(kind, states, TRAINED)
    assert one.errors == two.errors
    assert all(torch.equal(one.values[name], two.values[name]) for name in one.values)
    assert torch.equal(states, before)
    assert all(torch.equal(p, old) for p, old in zip(dense.parameters(), kept, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in dense.parameters())
    assert not any(module._forward_pre_hooks for module in dense.modules())
    steps = 4 * 5  # epochs of nine sequences, two at a time
    assert seen == ([] if kind == "linear" else [(step, steps) for step in range(1, steps + 1)])


# ---- size


@pytest.mark.parametrize(
    ("kind", "size"), [("ffn", 0), ("ffn", 7), ("swiglu", 0), ("swiglu", 70), ("linear", 0)]
)
def test_sizes(kind, size):
    fit = fitted(kind, real_states("llama"), size=size)
    hidden = size or 4 * WIDTH
    shapes = {"down": (WIDTH, hidden), "up": (hidden, WIDTH)}
    expected = {
        "linear": {"down": (WIDTH, WIDTH), "bias": (WIDTH,)},
        "ffn": {**shapes, "bias": (WIDTH,), "up_bias": (hidden,)},
        "swiglu": {**shapes, "gate": (hidden, WIDTH)},
    }[kind]
    assert {name: tuple(value.shape) for name, value in fit.values.items()} == expected


@pytest.mark.parametrize("kind", ["ffn", "swiglu"])
def test_too_many_features_are_trained_from_nothing(monkeypatch, kind):
    monkeypatch.setattr(replacements, "MOST_FEATURES", 4 * WIDTH - 1)
    states = real_states("llama")
    assert fitted(kind, states, CLOSED).errors == {"nothing": 1.0}
    still = fitted(kind, states, FitSettings(learning_rate=0.0))
    assert still.errors == {"nothing": 1.0, "trained": pytest.approx(1.0, abs=1e-6)}
    fit = fitted(kind, states, FitSettings(epochs=10, learning_rate=3e-3))
    assert fit.chosen == "trained"
    assert fit.errors["trained"] < 0.9
    monkeypatch.setattr(replacements, "MOST_FEATURES", 4 * WIDTH)
    assert "closed form" in fitted(kind, states, CLOSED).errors


# ---- a layer


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("block", [0, 1])  # a sliding window and full attention, where a family has both
def test_in_place_of_one_block_a_layer_is_the_block(name, block, attention):
    dense, states = dense_model(name), real_states(name)
    if attention == "eager":
        dense = copy.deepcopy(dense)
        dense.set_attn_implementation("eager")
    fit = fit_replacement(dense, Replacement(block, block, "layer"), states, IDS, FitSettings(batch=5))
    assert fit.errors["copy"] < 1e-9
    assert fit.chosen == "copy"
    for name_, value in decoder_blocks(dense)[block].named_parameters():
        assert torch.equal(fit.values[name_], value)
        assert fit.values[name_].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_layer_in_bfloat16_keeps_the_dtype(name, tmp_path):
    dense = cast(dense_model(name), torch.bfloat16)
    states = residual_states(dense, IDS, model_hash="m", cache_dir=tmp_path)
    same = fit_replacement(dense, Replacement(1, 1, "layer"), states, IDS, CLOSED)
    assert same.errors["copy"] < 1e-2  # the states themselves are rounded
    fit = fit_replacement(dense, Replacement(1, 3, "layer"), states, IDS, TRAINED)
    assert {value.dtype for value in fit.values.values()} == {torch.bfloat16}
    for kind in KINDS:
        fit = fit_replacement(dense, Replacement(1, 3, kind), states, IDS, TRAINED)
        assert {value.dtype for value in fit.values.values()} == {torch.float32}


FITTED = ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "opt"]


@pytest.mark.parametrize("name", FITTED)
def test_a_trained_layer_is_nearer_than_the_copy(name):
    states = real_states(name)
    fit = fitted("layer", states, TRAINED, last=3, name=name)
    assert set(fit.errors) == {"copy", "trained"}
    assert fit.chosen == "trained"
    assert fit.errors["trained"] < fit.errors["copy"]
    alone = fitted("layer", states, CLOSED, last=3, name=name)
    assert alone.chosen == "copy"
    assert alone.errors == {"copy": fit.errors["copy"]}


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("kind", [*KINDS, "layer"])
def test_the_error_is_that_of_the_folded_model(name, kind):
    """What the slot of the real folded model adds, against what the run of the dense model added."""
    states, dense = real_states(name), dense_model(name)
    fit = fitted(kind, states, TRAINED, last=3, name=name)
    model = fold(dense, FoldPlan.parse(f"0 1-3~{kind} 4", NUM_BLOCKS))
    block = decoder_blocks(model)[1]
    parts = [part for part in block.modules() if isinstance(part, Replaced)] or [block]
    parts[0].load_state_dict(fit.values)
    found = []
    handle = block.register_forward_hook(lambda module, args, output: found.append(hidden_of(output)))
    with torch.no_grad():
        model(input_ids=IDS[-HELD:])
    handle.remove()
    wanted, made = (after - states[1, -HELD:] for after in (states[4, -HELD:], found[0]))
    error = functional.mse_loss(made, wanted, reduction="none").sum(-1) / wanted.square().sum(-1)
    assert float(error.mean()) == pytest.approx(fit.errors[fit.chosen], rel=1e-3)


def test_a_token_to_which_the_run_adds_nothing_does_not_outweigh_the_others():
    x = normal(12, LENGTH, WIDTH)
    added = x @ normal(WIDTH, WIDTH, seed=1, scale=0.3)
    added[:, 0] = 0  # as rounding does where states are very large
    values = fitted("linear", planted(x, added)).values
    made = x @ values["down"].T + values["bias"]
    others = (made - added)[-HELD:, 1:].square().sum() / added[-HELD:, 1:].square().sum()
    assert others < 0.7  # 1 is nothing fitted; without a floor it is


# ---- LinearPatch


@pytest.mark.parametrize("width", [1, 7, 16, 48, 576])
def test_a_rotation_is_orthogonal_and_of_numbers_of_one_size(width):
    turn = rotation(width)
    torch.testing.assert_close(turn @ turn.T, torch.eye(width), rtol=0, atol=1e-5)
    assert float(turn.abs().max()) <= math.sqrt(2 / width) + 1e-6
    if width == 16:
        torch.testing.assert_close(turn.abs(), torch.full((16, 16), 0.25))


def test_a_patch_aligns_the_sizes_of_rotated_channels():
    """The law of LinearPatch: after it every rotated channel is as large in the mean as it is after the run."""
    generator = torch.Generator().manual_seed(0)
    before_NTD = torch.randn(6, 8, WIDTH, generator=generator)
    after_NTD = before_NTD * torch.linspace(0.5, 3, WIDTH) + torch.randn(6, 8, WIDTH, generator=generator)
    patch_DD = align_channels(before_NTD, after_NTD, torch.device("cpu"))
    torch.testing.assert_close(patch_DD, patch_DD.T, rtol=0, atol=1e-5)
    turn = rotation(WIDTH)
    patched_NTD = before_NTD + before_NTD @ patch_DD.T
    sizes = [(states @ turn).abs().mean((0, 1)) for states in (patched_NTD, after_NTD)]
    torch.testing.assert_close(*sizes, rtol=1e-4, atol=1e-5)


def test_a_patch_is_taken_whatever_its_error():
    dense, ids_NT = dense_model(), token_set(sequences=8).ids_NT
    states = torch.randn(NUM_BLOCKS + 1, *ids_NT.shape, WIDTH, generator=torch.Generator().manual_seed(0))
    fit = fit_replacement(dense, Replacement(1, 2, "linear"), states, ids_NT, FitSettings(linear="patch"))
    assert fit.chosen == "patch"
    expected = align_channels(states[1][:6], states[3][:6], torch.device("cpu"))
    torch.testing.assert_close(fit.values["down"], expected)
    assert not fit.values["bias"].any()
    ridge = fit_replacement(dense, Replacement(1, 2, "linear"), states, ids_NT)
    assert ridge.chosen != "patch"


def test_features_that_are_all_zero_are_told() -> None:
    """A network whose gain nobody has set."""
    net = NETWORKS["ffn"](WIDTH, 4 * WIDTH)
    net.features = lambda x: x.new_zeros(*x.shape[:-1], 4 * WIDTH)
    before, after = normal(4, LENGTH, WIDTH), normal(4, LENGTH, WIDTH, seed=1)
    with pytest.raises(ModelError, match=r"features of .* are all zero"):
        solve_down(net, (before, after), (before, after))
