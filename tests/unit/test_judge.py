"""How near a model is to the dense one.

Oracles: the definitions of KL, loss and agreement over full logits in float64, transformers' own loss, and for standard
errors a sum over pairs and one regression in numpy.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from foldsearch.model import judge as judging
from foldsearch.model.fold import fold
from foldsearch.model.head import judged_logits
from foldsearch.model.judge import _over_kinds, ask_dense, batches, clustered_error, dense_targets, judge
from foldsearch.model.tokens import Kinds, TokenSet
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import KindQuality
from tests.tiny import NUM_BLOCKS, VOCABULARY, WIDTH, LogitRows, dense_model, token_set

# Gemma 2 has a soft-capped head, Granite one whose products are divided, GPT-2 a tied one, OPT learned positions
NAMES = ("llama", "gemma2", "granite", "gpt2", "opt")
TEXT = "0 1=3 3-4"
TOKENS = token_set(sequences=7, length=30)  # 203 predicting positions: three chunks and a rest
# Two tokens in front of each sequence, and others here and there that are of no text: documents differ in their number.
_OF_TEXT = torch.rand(7, 30, generator=torch.Generator().manual_seed(3)) < 0.7
_OF_TEXT[:, :2] = False
PARTLY_TEXT = TokenSet("search", TOKENS.ids_NT, TOKENS.document_N, TOKENS.documents, _OF_TEXT)


def folded(name: str, text: str = TEXT):
    return fold(dense_model(name), FoldPlan.parse(text, NUM_BLOCKS))


@torch.no_grad()
def log_probabilities(model, ids_NT: torch.Tensor) -> torch.Tensor:
    """Of each next token, from full logits in float64."""
    return model(input_ids=ids_NT, use_cache=False).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("tokens", [TOKENS, PARTLY_TEXT], ids=["text", "partly text"])
@pytest.mark.parametrize("name", NAMES)
def test_quality_is_what_full_logits_say(name, tokens):
    """Means over the positions whose next token is of the text, whatever stands at the positions themselves."""
    dense, model = dense_model(name), folded(name)
    p, q = log_probabilities(dense, tokens.ids_NT), log_probabilities(model, tokens.ids_NT)
    scored = tokens.text_NT[:, 1:]
    all_kl = (p.exp() * (p - q)).sum(-1)
    following = tokens.ids_NT[:, 1:, None]
    all_loss = -q.gather(-1, following)[..., 0]
    kl, loss, dense_loss = all_kl[scored], all_loss[scored], -p.gather(-1, following)[..., 0][scored]
    found = judge(model, tokens, ask_dense(dense, tokens))
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-6)
    assert found.kl > 0.01  # there is something to see
    assert found.perplexity == pytest.approx(math.exp(loss.mean()), rel=1e-5)
    assert found.dense_perplexity == pytest.approx(math.exp(dense_loss.mean()), rel=1e-5)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1))[scored].double().mean().item())
    assert 0 < found.agreement < 1
    assert found.tokens == len(kl)
    assert found.tokens == 7 * 29 or (tokens is PARTLY_TEXT and found.tokens < 7 * 28)
    assert found.kl_se == pytest.approx(clustered_error(all_kl, tokens.document_N, scored), rel=1e-3)
    assert found.perplexity_se == pytest.approx(
        found.perplexity * clustered_error(all_loss, tokens.document_N, scored), rel=1e-4
    )


# Seven sequences of four documents: two of prose, three of talk, two of code.
_KINDS = Kinds(("prose", "talk", "code"), torch.tensor([0, 0, 1, 1, 1, 2, 2]))
_APART = torch.tensor([0, 0, 1, 1, 2, 3, 3])


def of_kinds(**changes) -> TokenSet:
    kinds = replace(_KINDS, **changes)
    return TokenSet("report", TOKENS.ids_NT, _APART, ("a", "b", "c", "d"), _OF_TEXT, kinds)


def test_each_kind_is_judged_as_if_it_stood_alone_and_counts_the_same():
    """Oracle: a set of the kind's sequences alone; the mean of independent means."""
    dense, model, tokens = dense_model(), folded("llama"), of_kinds()
    found = judge(model, tokens, ask_dense(dense, tokens))
    assert [kind.name for kind in found.kinds] == ["prose", "talk", "code"]
    for kind, rows in zip(found.kinds, ([0, 1], [2, 3, 4], [5, 6]), strict=True):
        alone = TokenSet("alone", TOKENS.ids_NT[rows], _APART[rows], tokens.documents, _OF_TEXT[rows])
        theirs = judge(model, alone, ask_dense(dense, alone))
        assert (kind.kl, kind.tokens) == (pytest.approx(theirs.kl, rel=1e-5), theirs.tokens)
        assert kind.kl_se == pytest.approx(theirs.kl_se, rel=1e-5)
        assert not kind.unseen
    assert found.kl == pytest.approx(sum(kind.kl for kind in found.kinds) / 3, rel=1e-12)
    assert found.kl_se == math.inf  # prose is one document, so nobody knows how far it strays
    assert found.tokens == sum(kind.tokens for kind in found.kinds)


def test_the_error_of_a_mean_over_kinds_is_that_of_independent_means():
    kinds = [KindQuality(name, 1.0, error, 10) for name, error in (("a", 0.3), ("b", 0.4))]
    assert _over_kinds(kinds, "mean") == (1.0, pytest.approx(0.25))


def test_the_worst_kind_is_the_one_of_largest_kl():
    dense, model = dense_model(), folded("llama")
    tokens = of_kinds(over="worst")
    found = judge(model, tokens, ask_dense(dense, tokens))
    worst = max(found.kinds, key=lambda kind: kind.kl)
    assert (found.kl, found.kl_se) == (worst.kl, worst.kl_se)
    broken = [KindQuality("a", 2.0, 0.1, 10), KindQuality("b", math.nan, math.nan, 10)]
    assert math.isnan(_over_kinds(broken, "worst")[0])


def test_an_unseen_kind_is_told_and_counts_in_nothing_else():
    """Oracle: the same set without the kind's sequences."""
    dense, model, tokens = dense_model(), folded("llama"), of_kinds(unseen=("talk",))
    found, rows = judge(model, tokens, ask_dense(dense, tokens)), [0, 1, 5, 6]
    without = of_kinds().of(rows)
    expected = judge(model, without, ask_dense(dense, without))
    assert [(kind.name, kind.title, kind.unseen) for kind in found.kinds] == [
        ("prose", "prose", False),
        ("talk", "unseen: talk", True),
        ("code", "code", False),
    ]
    for name in ("kl", "perplexity", "perplexity_se", "dense_perplexity", "agreement", "tokens"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_perplexity_is_of_transformers_loss(name):
    model = folded(name)
    with torch.no_grad():
        loss = model(input_ids=TOKENS.ids_NT, labels=TOKENS.ids_NT, use_cache=False).loss
    found = judge(model, TOKENS, ask_dense(dense_model(name), TOKENS))
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_model_is_as_near_as_can_be(name):
    found = judge(folded(name, "0-4"), TOKENS, ask_dense(dense_model(name), TOKENS))
    assert abs(found.kl) < 1e-6
    assert found.agreement == 1
    assert found.perplexity == pytest.approx(found.dense_perplexity, rel=1e-6)


def test_in_bfloat16_the_dense_model_is_still_at_0():
    """What bfloat16 rounds is the same on both sides."""
    dense = dense_model("llama")
    half = type(dense)(dense.config).to(torch.bfloat16)
    half.load_state_dict(dense.state_dict())
    targets = ask_dense(half.eval(), TOKENS)
    assert abs(judge(half, TOKENS, targets).kl) < 1e-6
    model = fold(half, FoldPlan.parse(TEXT, NUM_BLOCKS))
    p, q = log_probabilities(half, TOKENS.ids_NT), log_probabilities(model, TOKENS.ids_NT)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert judge(model, TOKENS, targets).kl == pytest.approx(kl, rel=0.01)


def test_batches_and_chunks_change_nothing(monkeypatch):
    dense, model = dense_model("llama"), folded("llama")
    whole = judge(model, TOKENS, ask_dense(dense, TOKENS))
    monkeypatch.setattr(judging, "POSITIONS_AT_ONCE", 11)
    monkeypatch.setattr("foldsearch.model.head.JUDGED_AT_ONCE", 13)
    monkeypatch.setattr("foldsearch.model.head.ROWS_IN_CACHE", 3)
    monkeypatch.setattr(judging, "batches", lambda n, length: batches(n, length, 2 * length))
    told: list[tuple[int, int]] = []
    parts = judge(model, TOKENS, ask_dense(dense, TOKENS), progress=lambda *at: told.append(at))
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.agreement == whole.agreement


@given(st.integers(1, 50), st.integers(1, 300), st.integers(1, 300))
def test_batches_cover_every_sequence_once(sequences, length, tokens_at_once):
    found = list(batches(sequences, length, tokens_at_once))
    assert [index for batch in found for index in range(sequences)[batch]] == list(range(sequences))
    assert all((batch.stop - batch.start) * length <= max(tokens_at_once, length) for batch in found)


# ---- standard errors


values = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=n, max_size=n),
        st.lists(st.integers(0, 3), min_size=n, max_size=n),
        # of the three values of a sequence at least one counts, as every sequence has some text
        st.lists(st.sampled_from([(1, 1, 1), (0, 1, 1), (0, 0, 1), (1, 0, 1)]), min_size=n, max_size=n),
    )
)


@given(values)
def test_clustered_error_is_the_sandwich(drawn):
    """The variance of a mean as a sum over all pairs of values of the same document, times G / (G − 1)."""
    rows, scored = np.array(drawn[0]), np.array(drawn[2], dtype=bool)
    found = clustered_error(torch.tensor(rows), torch.tensor(drawn[1]), torch.tensor(scored))
    if scored.all():
        assert found == clustered_error(torch.tensor(rows), torch.tensor(drawn[1]))
    groups = len(set(drawn[1]))
    if groups < 2:
        assert found == math.inf
        return
    rows, documents = rows[scored], np.repeat(drawn[1], 3)[scored.ravel()]
    residual = rows - rows.mean()
    same = documents[:, None] == documents[None, :]
    variance = (np.outer(residual, residual) * same).sum() / rows.size**2 * groups / (groups - 1)
    assert found == pytest.approx(math.sqrt(max(variance, 0)), rel=1e-6, abs=1e-7)


def test_clustered_error_of_one_value_a_document_is_the_textbooks():
    generator = torch.Generator().manual_seed(0)
    one_NP = torch.randn(40, 1, generator=generator)
    expected = one_NP.std().item() / math.sqrt(40)
    assert clustered_error(one_NP, torch.arange(40)) == pytest.approx(expected)
    # the same value five times tells no more, and the order of documents is nothing
    repeated = one_NP.expand(40, 5)
    assert clustered_error(repeated, torch.arange(40)) == pytest.approx(expected)
    halves = torch.cat([one_NP, one_NP])
    assert clustered_error(halves, torch.arange(40).repeat(2)) == pytest.approx(expected)


# ---- what is kept of the dense model


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_targets_are_kept_by_content(name, tmp_path, monkeypatch):
    dense = dense_model(name)
    asked = ask_dense(dense, TOKENS)
    first = dense_targets(dense, TOKENS, model_hash="m", cache_dir=tmp_path)
    other = token_set(sequences=7, length=30, seed=1)
    for tokens, model_hash in ((other, "m"), (TOKENS, "other")):
        dense_targets(dense, tokens, model_hash=model_hash, cache_dir=tmp_path)
    assert len(list((tmp_path / "targets").glob("*.safetensors"))) == 3

    def never(*args, **kwargs):
        raise AssertionError("the dense model was asked again")

    monkeypatch.setattr(judging, "ask_dense", never)
    renamed = TokenSet("renamed", TOKENS.ids_NT, TOKENS.document_N, TOKENS.documents)
    again = dense_targets(dense, renamed, model_hash="m", cache_dir=tmp_path)
    for field in ("hidden_NPD", "mean_row_NPD", "negentropy_NP", "loss_NP", "likeliest_NP", "scored_NP"):
        assert torch.equal(getattr(again, field), getattr(asked, field))
        assert torch.equal(getattr(first, field), getattr(asked, field))
    assert judge(folded(name), TOKENS, again) == judge(folded(name), TOKENS, asked)
    with pytest.raises(AssertionError, match="asked again"):
        dense_targets(dense, token_set(seed=2), model_hash="m", cache_dir=tmp_path)


def test_full_logits_of_a_batch_are_never_made(monkeypatch):
    """The widest tensor over the vocabulary has as many rows as a chunk."""
    monkeypatch.setattr("foldsearch.model.head.JUDGED_AT_ONCE", 50)
    model, targets = folded("llama"), ask_dense(dense_model("llama"), TOKENS)
    with LogitRows() as rows:
        judge(model, TOKENS, targets)
    assert rows.most == 50


@torch.inference_mode()
def test_longer_texts_allocate_a_few_numbers_a_position(monkeypatch):
    """Rows over the vocabulary that are made and freed inside the loop leave holes in the heap."""
    monkeypatch.setattr("foldsearch.model.head.JUDGED_AT_ONCE", 50)
    model = folded("llama")

    def allocated(positions: int) -> int:
        hidden_MD, next_M = torch.randn(positions, WIDTH), torch.zeros(positions, dtype=torch.int64)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            judged_logits(model, hidden_MD, next_M, next_M)
        events = found.profiler.kineto_results.events()
        return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")

    one_row = 4 * VOCABULARY  # in float32
    assert 0 < allocated(400) - allocated(200) < 200 * one_row / 4
