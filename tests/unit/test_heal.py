"""Healing: what kept blocks write is solved again.

Oracles: least squares by QR (torch.linalg.lstsq) on features that hooks of this file take from the folded model;
planted blocks that add what a matrix can say; the dense model's memory; the law that held-out error never grows.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from foldsearch.errors import InputError, ModelError
from foldsearch.model import heal as healing
from foldsearch.model import places as positions
from foldsearch.model.blocks import decoder_blocks, family_of, residual_multiplier
from foldsearch.model.evidence import block_runs, hidden_of
from foldsearch.model.fold import cast, fold
from foldsearch.model.heal import RIDGES, TAKEN, TAKEN_BEFORE, Healed, HealedBlock, Healer, heal
from foldsearch.model.states import residual_states
from foldsearch.plan.plan import FoldPlan
from tests.tiers import some
from tests.tiny import CONFIGS, EXPERTS, NUM_BLOCKS, SHARING, WIDTH, can_fold, dense_model, token_set

LENGTH = 16
IDS = token_set(sequences=40, length=LENGTH).ids_NT
UNSEEN = token_set(sequences=20, length=LENGTH, seed=9).ids_NT
NUM_FITTED = 30  # three quarters
NORM_AFTER = ("gemma2", "gemma3_text", "olmo2")
names = pytest.mark.parametrize("name", CONFIGS)
# One of each way to build a block; the others take minutes together.
QUICK = ("gemma2",)  # it has norms after the blocks
slowly = pytest.mark.parametrize("name", some(QUICK))


def folded(dense, text: str):
    return fold(dense, FoldPlan.parse(text, NUM_BLOCKS))


@pytest.fixture
def states_of(tmp_path):
    return lambda dense, ids_NT=IDS: residual_states(
        dense, ids_NT, model_hash=dense.config.model_type, cache_dir=tmp_path
    )


@torch.no_grad()
def kl(dense, model) -> float:
    p, q = (one(input_ids=UNSEEN, use_cache=False).logits.double().log_softmax(-1) for one in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def ran(model, module, position: int) -> tuple[Tensor, Tensor]:
    """What a module of the model reads and what the block at a position gives, over all of the text, float64."""
    read, out = [], []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2))),
        decoder_blocks(model)[position].register_forward_hook(
            lambda _, args, given: out.append(hidden_of(given).flatten(0, 1))
        ),
    ]
    model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return read[0].double(), out[0].double()


def as_weight(module, change_FD: Tensor) -> Tensor:
    """A change in the shape of the module's weights, float32."""
    return (change_FD if isinstance(module, Conv1D) else change_FD.T).float()


# ---- the solution


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in SHARING if name not in NORM_AFTER])
def test_each_matrix_takes_a_share_of_the_weighted_ridge_solution_on_the_models_own_states(name, states_of):
    """A ridge is rows of its own in least squares. Each matrix is solved after those before it, that of the attention
    of its position too, so the model that it reads from is the fold with their solutions alone.
    """
    dense, text = dense_model(name), "0-1 3-4"
    states = states_of(dense)
    healed = heal(folded(dense, text), states, IDS)
    last = family_of(dense.config).mlp.output
    place = family_of(dense.config).blocks
    meets, reads = {1: 3, 2: 4, 3: 5}, {1: 1, 2: 3, 3: 4}
    assert [block.position for block in healed.blocks] == [1, 1, 2, 2, 3, 3]
    assert [block.path == last for block in healed.blocks] == [False, True] * 3
    known: dict[str, Tensor] = {}
    for block in healed.blocks:
        if block.ridge is None:
            continue  # no change was better
        model = fold(dense, FoldPlan.parse(text, NUM_BLOCKS), start=known)
        module = decoder_blocks(model)[block.position].get_submodule(block.path)
        share = TAKEN if block.path == last else TAKEN_BEFORE
        base = f"{place}.{block.position}.{block.path}"
        h, x = ran(model, module, block.position)
        y, before = (states[depth[block.position]].flatten(0, 1).double() for depth in (meets, reads))
        size = (y - before).square().sum(-1)
        weight = 1 / size.clamp_min(0.1 * size.mean())
        bias = module.bias is not None
        inputs = h.shape[1]
        h = torch.cat((h, torch.ones(len(h), bias)), 1) * residual_multiplier(dense.config)

        def solved(rows: slice, h=h, x=x, y=y, weight=weight, ridge=block.ridge, inputs=inputs) -> Tensor:
            features = h[rows] * weight[rows, None].sqrt()
            # A ridge goes by what is read on all of the text, and a part takes its share of that.
            squares = (h[:, :inputs].square() * weight[:, None]).sum(0) * len(features) / len(h)
            squares = squares.clamp_min(
                1e-6 * squares.mean()
            )  # a unit of OPT's may be dead on all of the text
            wanted = (y - x)[rows] * weight[rows, None].sqrt()
            free = torch.eye(h.shape[1])[:inputs] * (ridge * squares).sqrt()[:, None]
            return torch.linalg.lstsq(
                torch.cat((features, free.double())), torch.cat((wanted, torch.zeros(inputs, WIDTH))).double()
            ).solution

        held_out = slice(NUM_FITTED * LENGTH, None)
        fitted = share * solved(slice(NUM_FITTED * LENGTH))
        made = y - x - h @ fitted
        if block.path != last:  # the MLP reads it: the position runs with it
            start = known | {f"{base}.weight": module.weight + as_weight(module, fitted[:inputs])}
            if bias:
                start[f"{base}.bias"] = module.bias + fitted[-1].float()
            changed = fold(dense, FoldPlan.parse(text, NUM_BLOCKS), start=start)
            made = y - ran(changed, decoder_blocks(changed)[0], block.position)[1]
        for told, left in ((block.before, y - x), (block.after, made)):
            error = (left.square().sum(-1) * weight)[held_out].mean()
            assert math.isclose(told, error, rel_tol=1e-3)
        expected = share * solved(slice(None))
        change = (healed.values[f"{base}.weight"] - module.weight).double()
        if not isinstance(module, Conv1D):
            change = change.T
        # float32 products of 2,048 tokens at a time, against QR in float64
        assert torch.dist(change, expected[:inputs]) < 1e-3 * expected[:inputs].norm()
        if bias:
            moved = (healed.values[f"{base}.bias"] - module.bias).double()
            assert torch.dist(moved, expected[-1]) < 1e-3 * expected[-1].norm() + 1e-6
        known |= {key: value for key, value in healed.values.items() if key.startswith(base)}
    assert known == healed.values
    assert len(known) > 1


@pytest.mark.parametrize("first", range(len(RIDGES)))
def test_the_ridge_is_found_from_wherever_the_search_begins(first):
    for best in range(len(RIDGES)):
        errors = [abs(number - best) + 0.1 * number for number in range(len(RIDGES))]
        assert healing._best_ridge(errors.__getitem__, first) == best


@torch.no_grad()
def test_what_the_next_state_lacks_is_found_where_the_matrix_can_say_it(states_of):
    """Planted: the dense state after a gap is what the block before it gives, and a linear function of what its
    `down_proj` reads. What is not taken of it is missed, squared.
    """
    dense = dense_model()
    states = states_of(dense)
    module = decoder_blocks(dense)[1].mlp.down_proj
    h, x = ran(dense, module, 1)
    change = torch.randn(WIDTH, h.shape[1], generator=torch.Generator().manual_seed(3))
    states[3] = (x.float() + h.float() @ change.T).view_as(states[3])
    healed, _ = Healer(states, IDS, with_attention=False).heal(folded(dense, "0-1 3-4"))
    found = healed.values["model.layers.1.mlp.down_proj.weight"] - module.weight
    first = healed.blocks[0]
    assert first.ridge == min(RIDGES)
    left = (1 - TAKEN) ** 2 * first.before
    assert math.isclose(first.after, left, rel_tol=1e-3)  # a ridge of 1e-4 moves it by about as much
    assert torch.dist(found, TAKEN * change) < 1e-2 * change.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_blocks_that_add_a_constant_are_dropped_without_loss_where_all_is_taken(name, states_of, monkeypatch):
    monkeypatch.setattr(healing, "TAKEN", 1.0)
    dense = copy.deepcopy(dense_model(name))
    family = family_of(dense.config)
    for block in list(decoder_blocks(dense))[1:4]:
        for unit in (family.attention, family.mlp):
            writes = block.get_submodule(unit.output)
            writes.weight.zero_()
            writes.bias.mul_(4)
    model = folded(dense, "0 4")
    dropped = kl(dense, model)
    # An MLP reads what an attention writes before it, so with that they are mended less exactly.
    Healer(states_of(dense), IDS, with_attention=False).heal(model)
    assert dropped > 0.05
    assert kl(dense, model) < 1e-3 * dropped


# ---- every family


PLANS = [
    "0-1 3-4", "1-4", "0-3", "0 1=2+r2+n 2-4", "0 1-2~linear 3-4", "0 1a 2m 3 4", "0-1 2~layer 4", "0 2-3~swiglu8 4",
    "0-1 1=1+r2 3 4",
]  # fmt: skip


@slowly
def test_held_out_error_never_grows_and_most_of_it_is_seen_on_other_text(name, states_of):
    dense = dense_model(name)
    states = states_of(dense)
    plans = [text for text in PLANS if can_fold(name, text)]
    for text in plans[:3] if name in EXPERTS else plans:  # a block with experts is run three times
        model = folded(dense, text)
        as_it_was = kl(dense, model)
        healed = heal(model, states, IDS)
        assert healed.tokens == IDS.numel()
        for block in healed.blocks:
            assert block.after <= block.before
            assert (block.ridge is None) == (block.after == block.before)
        assert kl(dense, model) < as_it_was


@names
def test_the_model_is_of_the_same_shape_and_the_dense_one_is_not_written(name, states_of):
    dense = dense_model(name)
    kept = [parameter.clone() for parameter in dense.parameters()]
    text = "0 1=3+r2 2a 3-4" if name in SHARING else "0 1=3a+r2 2a 3-4"
    model, plain = (folded(dense, text) for _ in range(2))
    healed = heal(model, states_of(dense), IDS)

    def shapes(one) -> dict[str, object]:
        return {key: (value.shape, value.dtype) for key, value in one.state_dict().items()}

    assert shapes(model) == shapes(plain)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(dense.parameters(), kept, strict=True))
    # what is told is what was changed, and a fold that starts from it is the healed model
    again = fold(dense, FoldPlan.parse(text, NUM_BLOCKS), start=healed.values)
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, plain.state_dict()[key])
    }
    assert changed <= set(healed.values)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", SHARING)
def test_what_is_solved_is_what_writes_to_the_stream(name):
    """Where a norm stands between, the matrix is what the norm reads."""
    model = folded(dense_model(name), "0 1a 2m 3-4")
    family = family_of(model.config)
    places = positions.places_of(model)
    for position, unit in ((0, family.mlp), (1, family.attention), (2, family.mlp)):
        writer = places[position].writer
        assert writer is not None
        assert (writer.norm is not None) == (name in NORM_AFTER)
        last = decoder_blocks(model)[position].get_submodule(unit.output)
        if writer.norm is None:
            assert last is writer.module
            continue
        given: list[Tensor] = []
        hooks = [
            writer.module.register_forward_hook(lambda _, args, out, given=given: given.append(out)),
            last.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0])),
        ]
        model(input_ids=IDS[:1], use_cache=False)
        for hook in hooks:
            hook.remove()
        assert len(given) == 2
        assert torch.equal(*given)


@torch.no_grad()
def test_before_experts_it_is_the_attention_that_is_solved_and_the_block_is_run_again(states_of):
    """Oracle: the states after the last block, of the healed model and of one that is not, on held-out sequences."""
    dense = dense_model("qwen3_moe")
    states = states_of(dense)
    model = folded(dense, "0-1 3-4")
    healed = heal(model, states, IDS)
    solved = {key.split(".layers.")[1] for key in healed.values}
    assert solved <= {"1.mlp.down_proj.weight", *(f"{i}.self_attn.o_proj.weight" for i in (1, 2, 3))}
    assert {"1.mlp.down_proj.weight", "3.self_attn.o_proj.weight"} & solved
    places = positions.places_of(model)
    assert [place.writer.is_last for place in places[1:]] == [True, False, False]
    theirs = {parameter.data_ptr() for parameter in dense.parameters()}
    kept = {name for name, parameter in model.named_parameters() if parameter.data_ptr() in theirs}
    assert {"model.layers.2.mlp.experts.down_proj", "model.layers.2.mlp.gate.weight"} <= kept
    errors = []
    for one in (model, folded(dense, "0-1 3-4")):
        ran_NTD = states[0].clone()
        for run in block_runs(one, IDS):
            ran_NTD = run(ran_NTD)
        errors.append(float((states[NUM_BLOCKS] - ran_NTD)[NUM_FITTED:].square().sum(-1).mean()))
    assert errors[0] < errors[1]


@torch.no_grad()
@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_states_that_it_ends_with_are_those_of_the_healed_model(name, with_attention, states_of):
    """Oracle: the healed model, run. A screening judges a plan by these states, without running it.

    The MLP of block 1 is none of experts in Qwen 3's kind, though those of other blocks are.
    """
    dense = dense_model(name)
    model = folded(dense, "0-1 3-4")
    healer = Healer(states_of(dense), IDS, num_led=4, with_attention=with_attention)
    _, led_NTD = healer.heal(model)
    ran_NTD = states_of(dense)[0].clone()
    for run in block_runs(model, IDS):
        ran_NTD = run(ran_NTD)
    scale = float(ran_NTD.abs().max())
    torch.testing.assert_close(led_NTD, ran_NTD[-4:], atol=1e-4 * scale, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_a_network_that_has_values_already_is_solved_on_what_it_reads(name, states_of):
    """Oracle: the states of the healed model, run. In GPT-NeoX, whose halves are parallel, it reads the states
    themselves.
    """
    dense = dense_model(name)
    model = folded(dense, "0 1-2~linear 3-4")
    network = decoder_blocks(model)[1].get_submodule(family_of(model.config).mlp.modules[-1])
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    before = network.down.clone()
    _, led_NTD = Healer(states_of(dense), IDS, num_led=4, with_attention=False).heal(model)
    assert not torch.equal(network.down, before)
    ran_NTD = states_of(dense)[0].clone()
    for run in block_runs(model, IDS):
        ran_NTD = run(ran_NTD)
    scale = float(ran_NTD.abs().max())
    torch.testing.assert_close(led_NTD, ran_NTD[-4:], atol=1e-4 * scale, rtol=0)


def test_a_position_is_told_from_before_its_attention_to_after_its_last_matrix():
    attention, mlp = "self_attn.o_proj", "mlp.down_proj"
    blocks = (
        HealedBlock(1, 0.3, 0.5, 0.4, attention),
        HealedBlock(1, None, 0.41, 0.41, mlp),
        HealedBlock(2, None, 0.6, 0.6, attention),
        HealedBlock(2, 3.0, 0.6, 0.2, mlp),
        HealedBlock(4, None, 0.1, 0.1, mlp),
    )
    assert Healed({}, blocks, 512).positions == [
        HealedBlock(1, 0.3, 0.5, 0.41),
        HealedBlock(2, 3.0, 0.6, 0.2),
        HealedBlock(4, None, 0.1, 0.1),
    ]


# ---- which positions


def test_before_a_network_that_adds_nothing_yet_a_gap_is_mended_as_an_empty_one(states_of):
    """And one that was fitted is left the gap to itself: what stands before it runs as in the dense model."""
    dense = dense_model()
    states = states_of(dense)
    empty, filled, fitted = (
        folded(dense, text) for text in ("0 3-4", "0 1-2~linear 3-4", "0 1-2~linear 3-4")
    )
    decoder_blocks(fitted)[1].mlp.down.data += 1e-3
    for model in (empty, filled, fitted):
        heal(model, states, IDS)
    first, same, dense_one = (
        decoder_blocks(model)[0].mlp.down_proj.weight for model in (empty, filled, dense)
    )
    assert torch.equal(same, first)
    assert not torch.equal(first, dense_one)
    assert torch.equal(decoder_blocks(fitted)[0].mlp.down_proj.weight, dense_one)
    assert decoder_blocks(filled)[1].mlp.down.any()


ATTENTION, MLP, NETWORK = "self_attn.o_proj", "mlp.down_proj", "mlp"
BOTH = (ATTENTION, MLP)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-4", {}),
        ("0-1 3-4", {1: BOTH, 2: BOTH, 3: BOTH}),
        ("0-3", {3: BOTH}),
        ("2-4", {0: BOTH, 1: BOTH, 2: BOTH}),
        ("0 1a 2m 3 4", {1: (ATTENTION,), 2: (MLP,), 3: BOTH, 4: BOTH}),
        ("0 1-2~linear 3-4", {0: BOTH, 1: (NETWORK,), 2: BOTH, 3: BOTH}),
        ("0 1-2~layer 3-4", {1: BOTH, 2: BOTH, 3: BOTH}),
        ("0 1=3+r2 2-4", {2: BOTH, 4: BOTH}),  # what the child runs stays
        ("0 1=3m 2-4", {2: BOTH, 4: BOTH}),
        ("0 1=3a 2-4", {1: (MLP,), 2: BOTH, 3: (MLP,), 4: BOTH}),  # it borrows the attention only
        ("0 1 2=1+n 4", {3: BOTH}),
        ("0-1 1=1+n 3-4", {3: BOTH, 4: BOTH}),
        ("0=4 1=4 2=4 3=4 4", {}),
    ],
)
def test_what_more_than_one_position_runs_is_left_alone(text, expected, states_of):
    dense = dense_model()
    found = heal(folded(dense, text), states_of(dense), IDS)
    assert [(block.position, block.path) for block in found.blocks] == [
        (position, path) for position, paths in expected.items() for path in paths
    ]


def test_a_matrix_that_two_blocks_of_the_dense_model_share_is_left_alone(states_of):
    dense = copy.deepcopy(dense_model())
    blocks = decoder_blocks(dense)
    blocks[3].mlp.down_proj.weight = blocks[4].mlp.down_proj.weight
    model = folded(dense, "0-1 3-4")
    assert [block.position for block in heal(model, states_of(dense), IDS).blocks] == [1, 1]
    assert model.model.layers[2].mlp.down_proj.weight is model.model.layers[3].mlp.down_proj.weight


# ---- the rest


def test_the_size_of_a_batch_changes_nothing_but_rounding(states_of, monkeypatch):
    dense = dense_model("gpt2")
    whole = heal(folded(dense, "0-1 3-4"), states_of(dense), IDS)
    monkeypatch.setattr(positions, "BATCH_TOKENS", 3 * LENGTH)
    parts = heal(folded(dense, "0-1 3-4"), states_of(dense), IDS)
    assert [block.ridge for block in parts.blocks] == [block.ridge for block in whole.blocks]
    for key, value in whole.values.items():
        assert torch.dist(parts.values[key], value) < 1e-3 * value.norm()


@names
def test_the_same_text_gives_the_same_bits_and_states_are_not_written(name, states_of):
    dense = dense_model(name)
    states = states_of(dense)
    kept = states.clone()
    one, two = (heal(folded(dense, "1-2 4"), states, IDS) for _ in range(2))
    assert all(torch.equal(value, two.values[key]) for key, value in one.values.items())
    assert one.blocks == two.blocks
    assert torch.equal(states, kept)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_a_model_in_bfloat16_stays_in_it(name, states_of):
    dense = cast(dense_model(name), torch.bfloat16)
    model = folded(dense, "0-1 3-4")
    dropped = kl(dense, model)
    healed = heal(model, states_of(dense), IDS)
    assert healed.values
    assert {value.dtype for value in healed.values.values()} == {torch.bfloat16}
    assert kl(dense, model) < dropped


def test_two_sequences_are_enough_and_one_is_not(states_of):
    dense = dense_model()
    heal(folded(dense, "0-1 3-4"), states_of(dense, IDS[:2]), IDS[:2])
    with pytest.raises(InputError, match=r"got 1 of 16 tokens\. Give 32 tokens or more"):
        heal(folded(dense, "0-1 3-4"), states_of(dense, IDS[:1]), IDS[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value, states_of):
    dense = dense_model()
    states = states_of(dense)
    broken = states.clone()
    broken[3, 2, 5, 7] = value
    with pytest.raises(ModelError, match="finite states, but the dense model's at depth 1 or 3"):
        heal(folded(dense, "0-1 3-4"), broken, IDS)
    model = folded(dense, "0-1 3-4")
    norm = model.model.layers[2].input_layernorm
    norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, value), False)
    with pytest.raises(ModelError, match="finite states, but the output of position 2"):
        heal(model, states, IDS)


def test_progress_counts_the_positions_from_the_first_that_is_solved(states_of):
    seen: list[tuple[int, int]] = []
    heal(folded(dense_model(), "0-1 3-4"), states_of(dense_model()), IDS, lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]
