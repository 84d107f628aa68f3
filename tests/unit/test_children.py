"""Which block is borrowed, and how adapters and output norms start.

Oracles: the metric's definition with whole matrices and torch.linalg.svd; planted weights whose nearest block is known;
the theorem of Eckart and Young; the optimum of the weighted problem through C^½ and random changes that are no
better; the dense model, where a child is a whole copy of its home; sums over tokens written down here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import PlanError
from foldsearch.model.blocks import decoder_blocks, family_of
from foldsearch.model.children import GAMMA_RIDGE, base_blocks, base_distances, low_rank, start_adapters
from foldsearch.model.fold import fold
from foldsearch.model.parts import Borrowed, OutputNorm
from foldsearch.model.workbench import base_rank
from foldsearch.plan.plan import FoldPlan
from tests.tiny import NUM_BLOCKS, SHARING, WIDTH, dense_model, price_table, token_set
from tests.tolerances import SOLVED

# plain, four norms and windows, norms after units, Conv1D, parallel residual, an MLP of flattened tokens
NAMES = ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "opt"]
LENGTH = 16
IDS = token_set(sequences=6, length=LENGTH).ids_NT
FULL = WIDTH  # the widest adapter that a plan may ask for; every linear's smallest side is at most this

names = pytest.mark.parametrize("name", NAMES)


def weight_OI(linear: nn.Module) -> Tensor:
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def unit_linears(block: nn.Module) -> dict[str, nn.Module]:
    return {path: part for path, part in block.named_modules() if isinstance(part, nn.Linear | Conv1D)}


def folded(name: str, text: str, dense=None):
    return fold(dense_model(name) if dense is None else dense, FoldPlan.parse(text, NUM_BLOCKS))


def borrowed(model, position: int) -> dict[str, Borrowed]:
    block = decoder_blocks(model)[position]
    return {
        path.replace(".inner", ""): part for path, part in block.named_modules() if isinstance(part, Borrowed)
    }


def output_norms(model, position: int) -> dict[str, OutputNorm]:
    block = decoder_blocks(model)[position]
    return {path: part for path, part in block.named_modules() if isinstance(part, OutputNorm)}


@torch.no_grad()
def logits(model, ids_NT: Tensor = IDS) -> Tensor:
    return model(input_ids=ids_NT, use_cache=False).logits


@cache
def equal_biases(name: str):
    """The dense model with the biases of block 3 in the linears of blocks 1 and 2: biases are borrowed as they are."""
    dense = copy.deepcopy(dense_model(name))
    owner = unit_linears(decoder_blocks(dense)[3])
    for block in (1, 2):
        for path, linear in unit_linears(decoder_blocks(dense)[block]).items():
            if linear.bias is not None:
                linear.bias.copy_(owner[path].bias)
    return dense


@torch.no_grad()
def linear_inputs(dense, ids_NT: Tensor) -> dict[nn.Module, Tensor]:
    """What each linear of the blocks reads, (M, I)."""
    found, handles = {}, []
    for block in decoder_blocks(dense):
        for linear in unit_linears(block).values():
            handles.append(
                linear.register_forward_pre_hook(
                    lambda module, args: found.__setitem__(module, args[0].flatten(0, -2))
                )
            )
    logits(dense, ids_NT)
    for handle in handles:
        handle.remove()
    return found


# ---- which block


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] @ s[:rank].diag() @ vh[:rank]


@pytest.mark.parametrize(("name", "rank"), [*((name, 3) for name in NAMES), ("llama", 1), ("llama", 8)])
def test_distances_are_those_of_the_definition(name, rank):
    """‖Ŵ_i − (Ŵ_j + Δ)‖² with Δ the rank-r approximation of Ŵ_i − Ŵ_j, over all linears."""
    dense = dense_model(name)
    blocks = [list(unit_linears(block).values()) for block in decoder_blocks(dense)]
    found = base_distances(dense, rank)
    assert found.shape == (NUM_BLOCKS, NUM_BLOCKS)
    assert found.dtype == torch.float64
    for i in range(NUM_BLOCKS):
        for j in range(NUM_BLOCKS):
            expected = 0.0
            for mine, theirs in zip(blocks[i], blocks[j], strict=True):
                hat_i, hat_j = truncated(weight_OI(mine), rank), truncated(weight_OI(theirs), rank)
                left = hat_i - (hat_j + truncated(hat_i - hat_j, rank))
                expected += float(left.square().sum())
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert torch.equal(found, found.T)
    assert not found.diagonal().any()
    assert (found + torch.eye(NUM_BLOCKS) > 0).all()


@names
def test_plain_distances_are_those_of_the_weights(name):
    blocks = [list(unit_linears(block).values()) for block in decoder_blocks(dense_model(name))]
    found = base_distances(dense_model(name), 0, "frobenius")
    for i in range(NUM_BLOCKS):
        for j in range(NUM_BLOCKS):
            pairs = zip(blocks[i], blocks[j], strict=True)
            expected = sum(float((a.weight - b.weight).double().square().sum()) for a, b in pairs)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_that_the_linears_do_not_have_is_an_error(rank):
    """Llama's keys have 16 outputs here."""
    with pytest.raises(
        PlanError, match=f"between 1 and 8, half the smallest side of the linears, got {rank}"
    ):
        base_distances(dense_model("llama"), rank)


def test_the_rank_is_one_that_every_linear_has() -> None:
    """A sixteenth of the width, or half of what one head of keys puts out."""
    wide = replace(price_table("llama"), width=1024)
    assert (base_rank(price_table("llama")), base_rank(wide)) == (WIDTH // 16, 8)


def planted_pairs(name: str, scale: float):
    """Blocks 3 and 4 differ from 1 and 2 by a matrix of rank 4, twice as large as they are; block 0 is small."""
    dense = copy.deepcopy(dense_model(name))
    blocks = [unit_linears(block) for block in decoder_blocks(dense)]
    for path in blocks[0]:
        blocks[0][path].weight.mul_(scale)
        for one, other in ((1, 3), (2, 4)):
            blocks[one][path].weight.copy_(truncated(blocks[one][path].weight, 4))
            blocks[other][path].weight.copy_(-blocks[one][path].weight)
    return dense


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_plain_distances_choose_the_smallest_block_and_low_rank_ones_do_not(name):
    dense = planted_pairs(name, 0.3)
    plain, metric = base_distances(dense, 4, "frobenius"), base_distances(dense, 4)
    plain.fill_diagonal_(torch.inf)
    metric.fill_diagonal_(torch.inf)
    assert plain.argmin(1).tolist()[1:] == [0, 0, 0, 0]
    assert metric.argmin(1).tolist()[1:] == [3, 4, 1, 2]
    for pruned in ([1, 2], [3, 4], [1, 4]):
        assert base_blocks(plain, pruned) == dict.fromkeys(pruned, 0)
        assert base_blocks(metric, pruned) == {block: (block + 1) % 4 + 1 for block in pruned}


def test_a_block_of_nothing_stands_in_for_any():
    """A limit of the metric: a reconstruction of rank r is itself what an adapter of rank r can add to nothing."""
    distances = base_distances(planted_pairs("llama", 0.0), 4)
    assert distances[0].max() < 1e-6


def test_the_nearest_kept_block_is_borrowed():
    distances = [
        [0, 1, 2, 3, 4],
        [1, 0, 5, 2, 9],
        [3, 1, 0, 1, 3],
        [9, 8, 7, 0, 1],
        [4, 4, 4, 4, 0],
    ]
    assert base_blocks(distances, [1]) == {1: 0}  # an earlier one
    assert base_blocks(distances, [3]) == {3: 4}  # a later one
    assert base_blocks(distances, [1, 0]) == {1: 3, 0: 2}  # not a pruned one
    assert base_blocks(distances, [2]) == {2: 1}  # 1 and 3 are as far in weights and in depth
    assert base_blocks(distances, [4]) == {4: 3}  # all as far: the nearest in depth
    assert base_blocks(distances, [1, 2, 3, 4]) == dict.fromkeys((1, 2, 3, 4), 0)
    assert base_blocks(torch.tensor(distances), [3, 1]) == base_blocks(distances, [3, 1])
    assert base_blocks(distances, []) == {}
    with pytest.raises(PlanError, match=r"every block is pruned\. Keep one"):
        base_blocks(distances, range(5))


# ---- low rank


def error(difference: Tensor, up: Tensor, down: Tensor, moment: Tensor | None = None) -> float:
    """‖(difference − up · down) C^½‖²."""
    left = difference.double() - up.double() @ down.double()
    moment = torch.eye(left.shape[1]).double() if moment is None else moment.double()
    return float((left @ moment @ left.T).trace())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """A difference, a rank, a second moment; of any shape, the moment of full rank or not."""
    outputs, inputs = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    rank = draw(st.integers(1, 7))
    tokens = draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    spread_I = torch.randn(inputs, generator=generator).mul(2).exp()
    x_MI = torch.randn(tokens, inputs, generator=generator) * spread_I
    return torch.randn(outputs, inputs, generator=generator), rank, x_MI.T @ x_MI


@given(problems())
def test_without_a_moment_it_is_the_truncated_svd(problem):
    """Eckart and Young: what is left has the energy of the singular values that were left out."""
    difference, rank, _ = problem
    up, down = low_rank(difference, rank)
    kept = min(rank, *difference.shape)
    assert up.shape == (difference.shape[0], kept)
    assert down.shape == (kept, difference.shape[1])
    left_out = torch.linalg.svdvals(difference.double())[kept:].square().sum()
    assert error(difference, up, down) == pytest.approx(float(left_out), rel=1e-4, abs=1e-8)
    torch.testing.assert_close((up @ down).double(), truncated(difference, kept), **SOLVED)


@settings(deadline=None)
@given(problems())
def test_with_a_moment_it_is_the_best_for_those_inputs(problem):
    """The closed form through C^½, and no change of either factor is better."""
    difference, rank, moment = problem
    up, down = low_rank(difference, rank, moment)
    values, vectors = torch.linalg.eigh(moment.double())
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    singular = torch.linalg.svdvals(difference.double() @ root)
    scale = float(singular.square().sum()) + 1e-12
    ours = error(difference, up, down, moment)
    assert ours / scale == pytest.approx(
        float(singular[min(rank, len(singular)) :].square().sum()) / scale, abs=1e-5
    )
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        other_up = up + size * torch.randn(up.shape, generator=generator)
        other_down = down + size * torch.randn(down.shape, generator=generator)
        for changed in (
            error(difference, other_up, down, moment),
            error(difference, up, other_down, moment),
            error(difference, other_up, other_down, moment),
        ):
            assert changed >= ours - 1e-5 * scale
    svd = low_rank(difference, rank)
    assert ours <= error(difference, *svd, moment) + 1e-5 * scale


@given(problems(), st.booleans())
def test_the_factors_are_balanced(problem, with_moment):
    difference, rank, moment = problem
    up, down = low_rank(difference, rank, moment if with_moment else None)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), atol=1e-4, rtol=1e-3)
    assert up.dtype == down.dtype == torch.float32


# ---- adapters


@pytest.mark.parametrize(
    ("name", "start"),
    [
        *((name, "svd") for name in sorted(SHARING)),
        *((name, "data") for name in NAMES),
    ],
)
def test_at_full_rank_a_child_is_its_home_block(name, start):
    """Owners earlier and later, both units and one; but for biases, which are the owner's."""
    dense = equal_biases(name)
    model = folded(name, f"0 1=3+r{FULL} 2=3m+r{FULL} 3 4", dense)
    before = logits(model)
    start_adapters(model, dense, IDS, start)
    wanted = logits(dense)
    torch.testing.assert_close(logits(model), wanted, **SOLVED)
    assert (before - wanted).abs().max() > 0.1
    if start == "svd":  # for any input
        ids_NT = token_set(sequences=2, length=LENGTH, seed=9).ids_NT
        torch.testing.assert_close(logits(model, ids_NT), logits(dense, ids_NT), **SOLVED)


@names
@pytest.mark.parametrize("rank", [3, FULL])
def test_svd_adapters_are_the_truncated_difference(name, rank):
    dense = dense_model(name)
    model = folded(name, f"0 1 2=0a3m+r{rank} 3 4=3+r{rank}+n")
    start_adapters(model, dense, IDS, "svd")
    for position in (2, 4):
        home = unit_linears(decoder_blocks(dense)[position])
        parts = borrowed(model, position)
        assert parts.keys() == home.keys()
        for path, part in parts.items():
            difference = weight_OI(home[path]) - weight_OI(part.owner)
            assert part.up.shape == (difference.shape[0], rank)
            torch.testing.assert_close((part.up @ part.down).double(), truncated(difference, rank), **SOLVED)


@names
def test_data_adapters_are_nearer_on_the_text_than_svd_ones(name):
    """Σ ‖(W_home − W_owner − up · down) x‖² over what the dense linear reads."""
    dense, text = dense_model(name), "0 1=3+r3 2 3 4=0+r3+n"
    errors = {}
    for start in ("zero", "svd", "data"):
        model = folded(name, text)
        start_adapters(model, dense, IDS, start)
        inputs = linear_inputs(dense, IDS)
        for position in (1, 4):
            home = unit_linears(decoder_blocks(dense)[position])
            for path, part in borrowed(model, position).items():
                left = weight_OI(home[path]) - weight_OI(part.owner) - part.up @ part.down
                errors[start, position, path] = float((inputs[home[path]] @ left.T).square().sum())
    paths = {key[1:] for key in errors}
    assert len(paths) == 2 * len(unit_linears(decoder_blocks(dense)[0]))
    for path in paths:
        assert errors[("data", *path)] <= errors[("svd", *path)] * (1 + 1e-4)
    totals = {
        start: sum(e for (s, *_), e in errors.items() if s == start) for start in ("zero", "svd", "data")
    }
    assert totals["data"] < 0.99 * totals["svd"] < 0.99 * totals["zero"]


@names
def test_data_adapters_are_the_weighted_optimum(name):
    dense = dense_model(name)
    model = folded(name, "0 1=3+r3 2 3 4")
    start_adapters(model, dense, IDS, "data")
    inputs = linear_inputs(dense, IDS)
    home = unit_linears(decoder_blocks(dense)[1])
    for path, part in borrowed(model, 1).items():
        x_MI = inputs[home[path]].double()
        difference = weight_OI(home[path]) - weight_OI(part.owner)
        singular = torch.linalg.svdvals(x_MI @ difference.double().T)
        left = error(difference, part.up, part.down, x_MI.T @ x_MI)
        assert left == pytest.approx(float(singular[3:].square().sum()), rel=1e-3)


def test_a_repeats_adapters_start_as_nothing_and_can_be_trained():
    """Its home is its owner, so there is no difference to approximate."""
    for start in ("svd", "data"):
        model = folded("llama", "0-3 3=3+r4 4")
        before = logits(model)
        start_adapters(model, dense_model(), IDS, start)
        assert torch.equal(logits(model), before)
        parts = borrowed(model, 4)
        for part in parts.values():
            part.requires_grad_(True)
        model(input_ids=IDS).logits.square().mean().backward()
        for part in parts.values():
            assert part.up.grad.norm() > 1e-6


@pytest.mark.parametrize("text", ["0 1=3+r4+n 2 3 4", "0 1 2 3 4"])
def test_zero_changes_nothing(text):
    model = folded("llama", text)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    start_adapters(model, dense_model(), IDS, "zero")
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "start"), [*((name, "data") for name in NAMES), ("llama", "zero"), ("llama", "svd")]
)
def test_only_what_children_carry_is_written(name, start):
    dense = dense_model(name)
    kept = [parameter.clone() for parameter in dense.parameters()]
    model = folded(name, "0m 1=3+r4+n 2=3a+n 3 3=3+r2+n 4=0m+r3")
    theirs = {parameter.data_ptr() for parameter in dense.parameters()}
    state = {n: p.clone() for n, p in model.named_parameters()}
    seen = []
    start_adapters(model, dense, IDS, start, lambda *at: seen.append(at))
    assert all(torch.equal(p, old) for p, old in zip(dense.parameters(), kept, strict=True))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, state[n])}
    assert {n.rpartition(".")[2] for n in changed} == {
        "zero": set(), "svd": {"up", "down"}, "data": {"up", "down", "gamma"},
    }[start]  # fmt: skip
    assert not any(p.data_ptr() in theirs for n, p in model.named_parameters() if n in changed)
    assert not any(
        module._forward_pre_hooks or module._forward_hooks
        for each in (dense, model)
        for module in each.modules()
    )
    assert seen == ([(6, 12), (12, 12)] if start == "data" else [])
    assert not any(p.requires_grad for p in model.parameters())


# ---- output norms


@torch.no_grad()
def added_by(dense, block: int) -> dict[str, Tensor]:
    """What each unit of a dense block adds to the stream, (M, D), by the name of the module that adds it."""
    family, found, handles = family_of(dense.config), {}, []
    for unit in (family.attention, family.mlp):
        module = decoder_blocks(dense)[block].get_submodule(unit.output)
        handles.append(
            module.register_forward_hook(
                lambda _, args, output, path=unit.output: found.__setitem__(path, output.flatten(0, -2))
            )
        )
    logits(dense)
    for handle in handles:
        handle.remove()
    return found


def least_squares_gamma(h_MD: Tensor, y_MD: Tensor) -> Tensor:
    """Per channel, every token's relative error counting alike."""
    h, y = h_MD.double(), y_MD.double()
    n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    weight_M1 = 1 / y.square().sum(-1, keepdim=True)
    return (weight_M1 * n * y).sum(0) / ((1 + GAMMA_RIDGE) * (weight_M1 * n * n).sum(0))


@names
def test_gamma_is_least_squares_where_the_child_is_a_copy_of_its_home(name):
    """At full rank h = y, so γ is known from what the dense units add alone."""
    dense = equal_biases(name)
    model = folded(name, f"0 1=3+r{FULL}+n 2 3 4", dense)
    start_adapters(model, dense, IDS, "data")
    wanted, norms = added_by(dense, 1), output_norms(model, 1)
    assert norms.keys() == wanted.keys()
    for path, norm in norms.items():
        expected = least_squares_gamma(wanted[path], wanted[path])
        torch.testing.assert_close(norm.gamma.double(), expected, **SOLVED)
        assert norm.gamma.min() > 0.05  # away from what it was


@pytest.mark.parametrize(("name", "batch"), [*((name, 2048) for name in NAMES), ("gpt2", 2 * LENGTH)])
def test_gamma_is_least_squares_on_what_the_child_adds(name, batch, monkeypatch):
    """Oracle: the dense block with the child's weights written into one unit's linears, run on the dense inputs."""
    monkeypatch.setattr("foldsearch.model.children.BATCH_TOKENS", batch)
    dense, family = dense_model(name), family_of(dense_model(name).config)
    model = folded(name, "0 1=3+r3+n 2 3 4")
    start_adapters(model, dense, IDS, "data")
    wanted, norms, parts = added_by(dense, 1), output_norms(model, 1), borrowed(model, 1)
    for unit in (family.attention, family.mlp):
        changed = copy.deepcopy(dense)  # only this unit: the other one adds what the dense one adds
        block = decoder_blocks(changed)[1]
        for path, linear in unit_linears(block).items():
            if any(path == module or path.startswith(f"{module}.") for module in unit.modules):
                part = parts[path]
                whole = weight_OI(part.owner) + part.up @ part.down
                linear.weight.data = whole.T.clone() if isinstance(linear, Conv1D) else whole.clone()
                if linear.bias is not None:
                    linear.bias.data = part.owner.bias.clone()
        expected = least_squares_gamma(added_by(changed, 1)[unit.output], wanted[unit.output])
        torch.testing.assert_close(norms[unit.output].gamma.double(), expected, atol=1e-4, rtol=5e-3)


def test_gamma_of_a_child_without_adapters_is_set_too():
    model = folded("llama", "0 1=3+n 2 3 4")
    start_adapters(model, dense_model(), IDS, "svd")
    assert all((norm.gamma == torch.tensor(0.01)).all() for norm in output_norms(model, 1).values())
    start_adapters(model, dense_model(), IDS, "data")
    assert all(len(set(norm.gamma.tolist())) == WIDTH for norm in output_norms(model, 1).values())


@names
def test_from_data_a_child_is_nearer_to_the_dense_model_than_from_zero(name):
    dense = dense_model(name)
    p = logits(dense).log_softmax(-1)
    kl = {}
    for start in ("zero", "data"):
        model = folded(name, "0 1=3+r8+n 2 3 4=3+r8+n")
        start_adapters(model, dense, IDS, start)
        q = logits(model).log_softmax(-1)
        kl[start] = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl["data"] < kl["zero"]
    assert math.isfinite(kl["data"])
