"""Token sets, and how a sequence begins.

Oracles: the stated rules, as ids written down by hand.
"""

from __future__ import annotations

import pytest
import torch

from foldsearch.errors import DataError
from foldsearch.model.tokens import SPLITS, Kinds, Splits, TokenSet, begun, front_of
from tests.tiny import tokenizer

# ------------------------------------------------------------------------------------------------ how a text begins


@pytest.mark.parametrize(
    ("around", "front"),
    [
        ("$A", ()),
        ("<s> $A", (1,)),  # Gemma, Llama, Mistral
        ("</s> $A", (2,)),  # OPT begins with its end token
        ("$A </s>", ()),  # what comes after a text is not how it begins
        ("<s> $A </s>", (1,)),
        ("</s> <s> $A", (2, 1)),
    ],
)
def test_the_front_is_what_the_tokenizer_puts_before_a_text(around: str, front: tuple[int, ...]) -> None:
    given = tokenizer(around)
    assert front_of(given) == front
    assert begun(given, "w5 w6") == [*front, 5, 6]


def test_a_text_that_is_begun_already_is_not_begun_twice() -> None:
    """As a chat template writes it."""
    given = tokenizer("<s> $A")
    assert begun(given, "<s> w5 w6") == begun(given, "w5 w6") == [1, 5, 6]
    assert begun(tokenizer(), "<s> w5") == [
        1,
        5,
    ]  # text like any other, where the tokenizer has no such habit


def test_pieces_of_sequences_begin_as_these_do() -> None:
    ids_NT = torch.tensor([[1, 10, 11, 12, 13, 14], [1, 20, 21, 22, 23, 24]])
    text_NT = ids_NT != 1
    tokens = TokenSet("search", ids_NT, torch.tensor([0, 1]), ("a", "b"), text_NT)
    pieces = tokens.cut(3)
    assert pieces.ids_NT.tolist() == [[1, 10, 11], [1, 12, 13], [1, 20, 21], [1, 22, 23]]
    assert pieces.document_N.tolist() == [0, 0, 1, 1]
    assert pieces.text_NT.tolist() == [[False, True, True]] * 4
    assert tokens.cut(99).ids_NT.tolist() == ids_NT.tolist()
    plain = TokenSet("search", ids_NT, torch.tensor([0, 1]), ("a", "b"))
    assert plain.cut(3).ids_NT.tolist() == ids_NT.reshape(4, 3).tolist()
    assert plain.cut(4).ids_NT.tolist() == ids_NT[:, :4].tolist()


# ----------------------------------------------------------------------------------------------------------- values


def token_set(name: str, documents: tuple[str, ...], first: int = 0) -> TokenSet:
    ids_NT = first + torch.arange(4 * len(documents)).reshape(-1, 4)
    return TokenSet(name, ids_NT, torch.arange(len(documents)), documents)


def test_splits_refuse_any_common_document() -> None:
    sets = [token_set(name, (f"{name}1", f"{name}2")) for name in SPLITS]
    Splits(*sets)
    for index in range(3):
        for other in range(3):
            if index != other:
                broken = list(sets)
                broken[index] = token_set(SPLITS[index], (f"{SPLITS[index]}1", f"{SPLITS[other]}2"))
                with pytest.raises(DataError, match="share 1 document"):
                    Splits(*broken)


def test_content_hash_depends_on_tokens_shape_and_documents() -> None:
    one = token_set("search", ("a", "b"))
    assert one.content_hash == token_set("report", ("a", "b")).content_hash  # the name is no content
    reshaped = TokenSet("search", one.ids_NT.reshape(1, 8), torch.tensor([0]), ("a", "b"))
    moved = TokenSet("search", one.ids_NT, torch.tensor([0, 0]), ("a", "b"))
    fewer = TokenSet("search", one.ids_NT, one.document_N, ("a", "b"), one.ids_NT > 0)
    others = [
        token_set("search", ("a", "b"), first=1),
        token_set("search", ("a", "c")),
        reshaped,
        moved,
        fewer,
    ]
    hashes = {one.content_hash, *(other.content_hash for other in others)}
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("ids_NT", "document_N"),
    [
        (torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
    ],
)
def test_token_set_checks_its_tensors(ids_NT: torch.Tensor, document_N: torch.Tensor) -> None:
    with pytest.raises(DataError, match="search"):
        TokenSet("search", ids_NT, document_N, ("a",))


# --------------------------------------------------------------------------------------------------- kinds of text


def of_kinds(names: tuple[str, ...], of_N: list[int]) -> TokenSet:
    one = token_set("search", ("a", "b"))
    kinds = Kinds(names, torch.tensor(of_N))
    return TokenSet("search", one.ids_NT, one.document_N, one.documents, one.text_NT, kinds)


def test_one_kind_is_no_content_whatever_its_name_and_several_are() -> None:
    """What was kept of a text before kinds were known is found again."""
    plain = token_set("search", ("a", "b"))
    assert of_kinds(("prose", "code"), [1, 1]).content_hash == plain.content_hash
    several = of_kinds(("prose", "code"), [0, 1])
    assert several.content_hash != plain.content_hash
    assert several.content_hash == of_kinds(("speech", "talk"), [0, 1]).content_hash


def test_sequences_keep_their_kind_when_some_are_taken_or_all_are_cut() -> None:
    several = of_kinds(("prose", "code"), [0, 1])
    assert several.of([1, 0]).kinds.of_N.tolist() == [1, 0]
    assert several.cut(2).kinds.of_N.tolist() == [0, 0, 1, 1]
    assert several.of([1]).kinds.names == ("prose", "code")


def test_each_sequence_is_of_one_kind() -> None:
    with pytest.raises(DataError, match=r"each of the 2 sequences is of one kind \(int64\), not \[3\]"):
        of_kinds(("prose",), [0, 0, 0])
