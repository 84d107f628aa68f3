"""The residual stream on disk.

Oracles: the dense model cut off before block i, with nothing in its final norm's place, whose last hidden states are
what block i would read; arithmetic for what fits; the file itself, byte by byte.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from foldsearch.errors import InputError
from foldsearch.model import states
from foldsearch.model.blocks import decoder_blocks, family_of
from foldsearch.model.fold import cast, fold
from foldsearch.model.heal import heal
from foldsearch.model.states import FitText, StatesInOrder, residual_states, text_to_fit
from foldsearch.plan.plan import FoldPlan
from tests.tiny import NUM_BLOCKS, WIDTH, dense_model, token_set

# plain, four norms and windows, norms after units, Conv1D, parallel residual, an MLP of flattened tokens
FAMILIES = ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "opt"]
LENGTH = 16
IDS = token_set(sequences=6, length=LENGTH).ids_NT
OF_ONE = (NUM_BLOCKS + 1) * LENGTH * WIDTH * 4  # bytes of a sequence

families = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def ask(tmp_path):
    def asked(model=None, ids_NT: Tensor = IDS, model_hash: str = "m", **rest) -> Tensor:
        model = dense_model() if model is None else model
        return residual_states(model, ids_NT, model_hash=model_hash, cache_dir=tmp_path, **rest)

    return asked


@pytest.fixture
def files(tmp_path):
    beside = (".lock", ".sum")
    return lambda: sorted(path.name for path in (tmp_path / "states").iterdir() if path.suffix not in beside)


@torch.no_grad()
def by_hand(dense, ids_NT: Tensor) -> Tensor:
    family, found = family_of(dense.config), []
    for depth in range(len(decoder_blocks(dense)) + 1):
        cut = copy.deepcopy(dense)
        cut.set_submodule(family.blocks, nn.ModuleList(list(decoder_blocks(cut))[:depth]))
        cut.set_submodule(family.final_norm, nn.Identity())
        found.append(cut.base_model(input_ids=ids_NT, use_cache=False).last_hidden_state)
    return torch.stack(found)


@families
def test_states_are_what_each_block_reads_and_the_last_one_writes(name, ask, monkeypatch):
    dense, seen = dense_model(name), []
    monkeypatch.setattr(states, "BATCH_TOKENS", 4 * LENGTH + 1)
    found = ask(dense, progress=lambda *at: seen.append(at))
    assert found.shape == (NUM_BLOCKS + 1, len(IDS), LENGTH, WIDTH)
    torch.testing.assert_close(found, by_hand(dense, IDS), atol=1e-5, rtol=1e-5)
    assert seen == [(4, 6), (6, 6)]


@families
def test_no_hook_stays_and_no_graph(name, ask):
    dense = dense_model(name)
    found = ask(dense)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in dense.modules())
    assert not found.requires_grad
    assert not found.is_inference()  # they are trained on


def test_a_sequence_longer_than_a_batch_goes_alone(ask, monkeypatch):
    whole = ask().clone()
    monkeypatch.setattr(states, "BATCH_TOKENS", LENGTH - 1)
    torch.testing.assert_close(ask(model_hash="again"), whole, atol=1e-5, rtol=1e-5)


def test_states_are_in_the_models_dtype(ask):
    model = cast(dense_model(), torch.bfloat16)
    found = ask(model)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, by_hand(model, IDS))


@pytest.mark.parametrize(("most", "count"), [(OF_ONE, 1), (3 * OF_ONE - 1, 2), (3 * OF_ONE, 3), (10**9, 6)])
def test_bytes_bound_the_sequences(ask, files, tmp_path, most, count):
    found = ask(most_bytes=most)
    torch.testing.assert_close(found, by_hand(dense_model(), IDS[:count]), atol=1e-5, rtol=1e-5)
    (file,) = files()
    assert (tmp_path / "states" / file).stat().st_size == count * OF_ONE


def test_not_one_sequence_fits(ask, tmp_path):
    with pytest.raises(
        InputError, match=f"one sequence of 16 tokens must fit {OF_ONE - 1} bytes, but take more. Use"
    ):
        ask(most_bytes=OF_ONE - 1)
    assert not list(tmp_path.iterdir())


def test_the_second_call_runs_nothing_and_is_the_same(ask, monkeypatch):
    first = ask().clone()

    def no_forward(*_):
        raise AssertionError("the states are there")

    monkeypatch.setattr(states, "last_hidden", no_forward)
    assert torch.equal(ask(), first)
    assert torch.equal(ask(ids_NT=IDS.clone()), first)


def test_other_weights_tokens_dtypes_and_shapes_have_their_own_file(ask, files):
    ask()
    ask(model_hash="other")
    ask(ids_NT=IDS.flip(0))
    ask(ids_NT=IDS[:3])
    ask(ids_NT=IDS.reshape(3, 2 * LENGTH))
    ask(cast(dense_model(), torch.bfloat16))
    assert len(files()) == 6
    ask(most_bytes=3 * OF_ONE)  # the three sequences above
    assert len(files()) == 6


def test_writing_to_them_changes_no_file_and_no_other_mapping(ask, files, tmp_path):
    first = ask()
    (file,) = files()
    before, kept = first.clone(), (tmp_path / "states" / file).read_bytes()
    second = ask()
    first.fill_(7.0)
    assert torch.equal(second, before)
    assert torch.equal(ask(), before)
    assert (tmp_path / "states" / file).read_bytes() == kept


def test_a_forward_that_fails_leaves_nothing_half_written(ask, files, monkeypatch):
    dense, calls = dense_model(), []
    forward = states.last_hidden

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(states, "last_hidden", failing)
        patch.setattr(states, "BATCH_TOKENS", 2 * LENGTH)
        with pytest.raises(RuntimeError, match="no memory"):
            ask()
    assert files() == []
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in dense.modules())
    torch.testing.assert_close(ask(), by_hand(dense, IDS), atol=1e-5, rtol=1e-5)


def test_a_full_disk_is_an_error_and_leaves_nothing(ask, files, monkeypatch):
    """A mapped file would take the room page by page, and a page without room ends the process (SIGBUS)."""
    opened = states.Path.open

    class Full:
        def __init__(self, file):
            self._file, self._writes = file, 0

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            self._writes += 1
            if self._writes > NUM_BLOCKS:
                raise OSError(28, "No space left on device")
            return self._file.write(data)

    @contextmanager
    def fill(path, mode="r"):
        with opened(path, mode) as file:
            yield Full(file) if mode == "wb" else file

    monkeypatch.setattr(states.Path, "open", fill)
    with pytest.raises(OSError, match="No space left"):
        ask()
    assert files() == []


# ---- depth after depth


@families
@torch.no_grad()
def test_states_in_order_are_those_on_disk(name, ask, monkeypatch):
    """Also where a depth is left out, asked for twice, or gone back to."""
    monkeypatch.setattr(states, "BATCH_TOKENS", 4 * LENGTH + 1)
    dense = dense_model(name)
    kept, found = ask(dense), StatesInOrder(dense, IDS)
    assert tuple(found.shape) == tuple(kept.shape)
    for depth in (0, 1, 1, 3, 1, NUM_BLOCKS, 2, 0):
        torch.testing.assert_close(found[depth], kept[depth], rtol=0, atol=1e-6)


def test_states_in_order_hold_two_depths(monkeypatch):
    """So that memory does not grow with the depth of the model; and no block runs twice."""
    ran: list[int] = []
    real = states.block_runs

    def counted(model, ids_NT):
        runs = real(model, ids_NT)
        return [lambda own, i=i, run=run: (ran.append(i), run(own))[1] for i, run in enumerate(runs)]

    monkeypatch.setattr(states, "block_runs", counted)
    found = StatesInOrder(dense_model(), IDS)
    for depth in range(NUM_BLOCKS + 1):
        _ = found[depth], found[max(0, depth - 1)], found[depth]
        assert len(found._found) <= 2
    assert ran == list(range(NUM_BLOCKS))


@torch.no_grad()
def test_a_text_that_does_not_fit_the_disk_is_healed_on_whole(tmp_path, monkeypatch):
    """Oracle: the same healing on states that were kept."""
    dense = dense_model()
    plan = FoldPlan.parse("0-1 3-4", NUM_BLOCKS)
    text = FitText(dense, IDS, "m", tmp_path)
    one, two = fold(dense, plan), fold(dense, plan)
    expected = heal(one, text.states_in_order(), IDS)
    assert isinstance(text.states_in_order(), Tensor)
    monkeypatch.setattr(states.num_kept, "__defaults__", (OF_ONE,))
    streamed = text.states_in_order()
    assert isinstance(streamed, StatesInOrder)
    found = heal(two, streamed, IDS)
    assert found.tokens == expected.tokens == IDS.numel()
    assert found.values.keys() == expected.values.keys()
    for key, value in expected.values.items():
        assert torch.dist(found.values[key], value) < 1e-3 * value.norm()


# ---- which text


@pytest.mark.parametrize(
    ("tokens", "num", "length"),
    [
        (8192, 64, 128),
        (16384, 64, 256),
        (10**6, 64, 256),
        (12000, 64, 187),
        (4096, 32, 128),
        (300, 2, 128),
        (1, 2, 128),
    ],
)
def test_many_documents_are_read_in_part(tokens, num, length):
    """As many sequences as can be, evenly cut, but none below 128 tokens; from 64 of 256."""
    ids_NT = torch.arange(64 * 256).view(64, 256)
    assert torch.equal(text_to_fit(ids_NT, tokens), ids_NT[:num, :length])


def test_short_sequences_are_not_cut():
    assert torch.equal(text_to_fit(IDS, 3 * LENGTH + 2), IDS[:3])
