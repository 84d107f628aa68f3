"""Text that the dense model writes itself.

Oracles: the same draws made again with a full forward pass at every step, without a cache; the stated rules.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from foldsearch.errors import ModelError
from foldsearch.model import own_text
from foldsearch.model.own_text import OwnText, first_tokens, kept_text, with_own_text, write_text
from foldsearch.model.tokens import Kinds, TokenSet
from tests.tiny import CONFIGS, VOCABULARY, dense_model, token_set, tokenizer

FIRST = list(range(3, VOCABULARY))


def written_slowly(dense: PreTrainedModel, wanted: OwnText) -> torch.Tensor:
    """One batch, without a cache."""
    rng = torch.Generator().manual_seed(wanted.seed)
    begun = torch.tensor(FIRST)[torch.randint(len(FIRST), (own_text.AT_ONCE, 1), generator=rng)]
    ids_BT = torch.cat((torch.tensor(wanted.front).long().expand(own_text.AT_ONCE, -1), begun), 1)
    while ids_BT.shape[1] < wanted.length:
        p_BV = (dense(input_ids=ids_BT, use_cache=False).logits[:, -1] / wanted.temperature).softmax(-1)
        ids_BT = torch.cat((ids_BT, torch.multinomial(p_BV, 1, generator=rng)), 1)
    return ids_BT[: wanted.sequences]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_is_drawn_from_what_the_model_says_of_all_before_it(name: str) -> None:
    """Longer than the sliding window. A cache rounds otherwise than a whole pass, by far less than a draw's margin."""
    wanted = OwnText(5, 14, (1,), seed=3, temperature=0.8)
    found = write_text(dense_model(name), FIRST, wanted)
    assert found.shape == (5, 14)
    assert found.dtype == torch.int64
    assert torch.equal(found, written_slowly(dense_model(name), wanted))
    assert found[:, 0].tolist() == [1] * 5


def test_a_seed_gives_one_text_and_more_of_it_begins_with_less_of_it() -> None:
    dense, few, many = dense_model(), OwnText(3, 8), OwnText(own_text.AT_ONCE + 2, 8)
    told: list[float] = []
    more = write_text(dense, FIRST, many, told.append)
    assert torch.equal(write_text(dense, FIRST, few), more[:3])
    assert not torch.equal(write_text(dense, FIRST, OwnText(3, 8, seed=1)), more[:3])
    assert (
        len(set(map(tuple, more.tolist()))) == own_text.AT_ONCE + 2
    )  # the second batch is not the first again
    assert told == pytest.approx(
        [(step + 1) / 14 for step in range(14)]
    )  # 7 tokens are drawn, in two batches


def test_a_cold_model_says_its_likeliest_token_and_a_hot_one_says_others() -> None:
    dense = dense_model()
    cold = write_text(dense, FIRST, OwnText(4, 6, temperature=1e-4))
    likeliest = dense(input_ids=cold, use_cache=False).logits.argmax(-1)
    assert torch.equal(cold[:, 1:], likeliest[:, :-1])
    hot = write_text(dense, FIRST, OwnText(4, 6, temperature=1e4))
    assert not torch.equal(hot[:, 1:], dense(input_ids=hot, use_cache=False).logits.argmax(-1)[:, :-1])


def test_a_text_begins_with_no_special_token() -> None:
    assert first_tokens(tokenizer("<s> $A"), VOCABULARY) == FIRST
    assert first_tokens(tokenizer("<s> $A"), 10) == list(range(3, 10))  # a model without rows for the others


def test_logits_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = dense_model()
    monkeypatch.setattr(
        dense.lm_head, "forward", lambda hidden: hidden.new_full((*hidden.shape[:2], 96), torch.nan)
    )
    with pytest.raises(ModelError, match="finite logits; got inf or NaN"):
        write_text(dense, FIRST, OwnText(2, 6))


def test_what_was_written_is_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, wanted = dense_model(), OwnText(3, 8)
    made = kept_text(dense, FIRST, wanted, model_hash="a", cache_dir=tmp_path)
    other = kept_text(dense, FIRST, OwnText(3, 8, seed=1), model_hash="a", cache_dir=tmp_path)
    assert not torch.equal(made, other)
    monkeypatch.setattr(own_text, "write_text", None)
    assert torch.equal(kept_text(dense, FIRST, wanted, model_hash="a", cache_dir=tmp_path), made)
    for first, changed, model_hash in (
        (FIRST, OwnText(3, 8, temperature=0.9), "a"),
        (FIRST, OwnText(3, 8, (1,)), "a"),
        (FIRST[1:], wanted, "a"),
        (FIRST, wanted, "b"),
    ):
        with pytest.raises(TypeError):  # it would be written anew
            kept_text(dense, first, changed, model_hash=model_hash, cache_dir=tmp_path)


def test_own_sequences_stand_among_the_others_each_a_document_of_its_own_kind() -> None:
    others = token_set("recovery", sequences=6, length=8)
    prose = TokenSet("recovery", others.ids_NT, others.document_N, others.documents, kinds=Kinds(("prose",)))
    own_NT = write_text(dense_model(), FIRST, OwnText(4, 8, (1,)))
    whole = with_own_text(prose, own_NT, "own", 1)
    kinds = [whole.kinds.names[index] for index in whole.kinds.of_N]
    assert (kinds.count("prose"), kinds.count("own")) == (6, 4)
    is_own = torch.tensor([kind == "own" for kind in kinds])
    assert set(map(tuple, whole.ids_NT[is_own].tolist())) == set(map(tuple, own_NT.tolist()))
    assert torch.equal(whole.ids_NT[~is_own], others.ids_NT)
    assert len(whole.document_N[is_own].unique()) == 4
    assert not whole.text_NT[is_own][:, 0].any()  # what is put in front is no text
    assert whole.text_NT[is_own][:, 1:].all()
    # of any first part two in five are own text, rounded one way or the other
    for first in range(1, 11):
        assert abs(kinds[:first].count("own") - 0.4 * first) < 1


def test_a_recovery_set_may_be_of_own_text_alone() -> None:
    empty = TokenSet(
        "recovery", torch.zeros((0, 8), dtype=torch.int64), torch.zeros(0, dtype=torch.int64), ()
    )
    own_NT = write_text(dense_model(), FIRST, OwnText(4, 8))
    whole = with_own_text(empty, own_NT, "own", 0)
    assert sorted(whole.ids_NT.tolist()) == sorted(own_NT.tolist())
    assert [whole.kinds.names[index] for index in whole.kinds.of_N] == ["own"] * 4
