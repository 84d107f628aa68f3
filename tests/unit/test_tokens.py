"""The splits of documents, and the token sequences cut from them.

Oracles: the stated rules, written out a second time here (hashing, chunking) or as literal documents.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foldsearch.errors import DataError
from foldsearch.model.tokens import (
    SPLITS,
    Splits,
    TokenSet,
    begun,
    front_of,
    make_splits,
    split_of,
)


class Counting(PreTrainedTokenizerFast):
    """Counts the documents it is asked to tokenise."""

    num_calls = 0

    def __call__(self, *args, **kwargs):
        type(self).num_calls += 1
        return super().__call__(*args, **kwargs)


def words_tokenizer(around: str = "$A") -> PreTrainedTokenizerFast:
    """Token i is the word "wi"; around a text it puts what the template says."""
    vocabulary = {"<unk>": 0, "<s>": 1} | {f"w{index}": index for index in range(2, 500)}
    vocabulary |= {"</s>": 500, "<b>": 501}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = [(token, vocabulary[token]) for token in ("<s>", "</s>", "<b>")]
    built.post_processor = processors.TemplateProcessing(around, special_tokens=specials)
    Counting.num_calls = 0
    return Counting(
        tokenizer_object=built, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=8
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """It has a <s>, but does not begin a text with it."""
    return words_tokenizer()


def document(index: int, num_words: int = 20) -> str:
    return " ".join(f"w{2 + (index * 31 + position) % 498}" for position in range(num_words))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_folder(folder: Path, texts: list[str]) -> str:
    folder.mkdir()
    for index, text in enumerate(texts):
        (folder / f"{index:03}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def numbers(search: int, recovery: int, report: int) -> dict[str, int]:
    return {"search": search, "recovery": recovery, "report": report}


def words(ids: torch.Tensor) -> str:
    return " ".join(f"w{index}" for index in ids.tolist())


# ----------------------------------------------------------------------------------------------------------- splits


@given(st.text())
def test_split_of_follows_the_rule(text: str) -> None:
    u = int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    expected = "search" if u < 0.2 else "report" if u < 0.4 else "recovery"
    assert split_of(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()) == expected


def test_split_of_known_documents() -> None:
    """Written down: a change of the rule would mix what was trained on with what is reported, across versions."""
    assert [split_of(sha(text)) for text in ("a", "b", "c", "d", "e", "f", "g", "h")] == KNOWN


KNOWN = ["recovery", "report", "search", "search", "report", "search", "recovery", "recovery"]


def test_chunks_from_the_documents_start_in_hash_order(tmp_path: Path, tokenizer) -> None:
    texts = [document(index, num_words=20 + index) for index in range(40)]
    folder = write_folder(tmp_path / "d", texts)
    splits = make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(6, 9, 5))
    for name, wanted in numbers(6, 9, 5).items():
        chosen = sorted((sha(text), text) for text in texts if split_of(sha(text)) == name)
        expected = [
            (key, " ".join(text.split()[start : start + 8])) for key, text in chosen for start in (0, 8)
        ][:wanted]
        found: TokenSet = getattr(splits, name)
        assert found.name == name
        assert found.num_tokens == wanted * 8
        assert [words(ids_T) for ids_T in found.ids_NT] == [text for _, text in expected]
        assert [found.documents[index] for index in found.document_N.tolist()] == [key for key, _ in expected]
        assert len(set(found.documents)) == len(found.documents) == len(set(found.document_N.tolist()))


def test_only_what_is_needed_is_tokenised(tmp_path: Path, tokenizer) -> None:
    folder = write_folder(tmp_path / "d", [document(index) for index in range(60)])
    make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(0, 0, 0))
    asked, Counting.num_calls = Counting.num_calls, 0
    make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(4, 4, 3))
    # and what the tokenizer is asked to find out how it begins a text
    assert Counting.num_calls == asked + 2 + 2 + 2


def test_short_documents_are_passed_over(tmp_path: Path, tokenizer) -> None:
    texts = [document(index, num_words=7 if index % 2 else 8) for index in range(60)]
    folder = write_folder(tmp_path / "d", texts)
    splits = make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(3, 3, 3))
    long = {sha(text) for text in texts[::2]}
    assert set(splits.search.documents + splits.recovery.documents + splits.report.documents) <= long


def test_duplicates_count_once(tmp_path: Path, tokenizer) -> None:
    texts = [document(index) for index in range(30)]
    once = write_folder(tmp_path / "once", texts)
    thrice = write_folder(tmp_path / "thrice", texts * 3)
    one, other = (
        make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(4, 8, 4))
        for folder in (once, thrice)
    )
    for name in SPLITS:
        assert torch.equal(getattr(one, name).ids_NT, getattr(other, name).ids_NT)
        assert getattr(one, name).content_hash == getattr(other, name).content_hash


def test_more_data_moves_no_document_to_another_split(tmp_path: Path, tokenizer) -> None:
    texts = [document(index) for index in range(80)]
    few = write_folder(tmp_path / "few", texts[:40])
    many = write_folder(tmp_path / "many", texts)
    before = make_splits(few, tokenizer, sequence_length=8, num_sequences=numbers(4, 8, 4))
    after = make_splits(many, tokenizer, sequence_length=8, num_sequences=numbers(4, 8, 4))
    for name in SPLITS:
        for other in set(SPLITS) - {name}:
            assert not set(getattr(before, name).documents) & set(getattr(after, other).documents)


def test_too_few_tokens(tmp_path: Path, tokenizer) -> None:
    texts = [document(index) for index in range(30)]
    folder = write_folder(tmp_path / "d", texts)
    num_search = sum(split_of(sha(text)) == "search" for text in texts)
    with pytest.raises(
        DataError,
        match=rf"search: 99 sequences of 8 tokens are wanted, but .* gives {2 * num_search}: it has {num_search} "
        r"documents in this split, and one gives at most 2\..*\(splits\.search, splits\.sequence_length\)",
    ):
        make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(99, 1, 1))
    recovery = next(text for text in texts if split_of(sha(text)) == "recovery")
    alone = write_folder(tmp_path / "one", [recovery])
    with pytest.raises(DataError, match="gives none: it has 0 documents in this split"):
        make_splits(alone, tokenizer, sequence_length=8, num_sequences=numbers(1, 1, 1))
    with pytest.raises(DataError, match=r"recovery: .*: it has 1 document in this split"):
        make_splits(alone, tokenizer, sequence_length=8, num_sequences=numbers(0, 99, 0))


def test_a_split_may_be_empty(tmp_path: Path, tokenizer) -> None:
    folder = write_folder(tmp_path / "d", [document(index) for index in range(30)])
    splits = make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(2, 0, 2))
    assert splits.recovery.ids_NT.shape == (0, 8)
    assert splits.recovery.documents == ()


def test_three_sources(tmp_path: Path, tokenizer) -> None:
    sources = {
        name: write_folder(tmp_path / name, [document(100 * index + number) for number in range(3)])
        for index, name in enumerate(SPLITS)
    }
    splits = make_splits(sources, tokenizer, sequence_length=8, num_sequences=numbers(6, 6, 6))
    for index, name in enumerate(SPLITS):  # each source is used whole, whatever the hash of its documents
        assert set(getattr(splits, name).documents) == {sha(document(100 * index + n)) for n in range(3)}


def test_overlapping_sources_are_refused(tmp_path: Path, tokenizer) -> None:
    one = write_folder(tmp_path / "one", [document(index) for index in range(3)])
    two = write_folder(tmp_path / "two", [document(index) for index in range(2, 5)])
    three = write_folder(tmp_path / "three", [document(index) for index in range(10, 13)])
    with pytest.raises(DataError, match=rf"recovery and report share 1 document .*{sha(document(2))[:12]}"):
        make_splits(
            {"search": three, "recovery": one, "report": two},
            tokenizer,
            sequence_length=8,
            num_sequences=numbers(6, 6, 6),
        )
    for recovery, count in (
        (two, "1 document "),
        (one, "3 documents "),
    ):  # one sequence: not the common document's
        with pytest.raises(DataError, match=f"search and recovery share {count}"):
            make_splits(
                {"search": one, "recovery": recovery, "report": three},
                tokenizer,
                sequence_length=8,
                num_sequences=numbers(1, 1, 1),
            )
    for folder in (one, three):
        (Path(folder) / "short.txt").write_text("none")  # in both, and gives no sequence of eight tokens
    make_splits(
        {"search": one, "recovery": three, "report": one},
        tokenizer,
        sequence_length=8,
        num_sequences=numbers(1, 1, 0),
    )
    make_splits(  # what is not used is measured on by nobody
        {"search": one, "recovery": two, "report": one},
        tokenizer,
        sequence_length=8,
        num_sequences=numbers(1, 0, 0),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "at least 1, not 0"),
        ({"per_document": 0}, "at least 1"),
        (
            {"num_sequences": {"search": 1, "recovery": 1}},
            "num_sequences names exactly search, recovery, report",
        ),
        ({"num_sequences": numbers(1, -1, 1)}, "recovery is at least 0, not -1"),
        ({"references": {"search": "x"}}, "data names exactly search, recovery, report, not search"),
    ],
)
def test_arguments_are_checked(tokenizer, changes: dict, message: str) -> None:
    arguments = {"references": "d", "sequence_length": 8, "num_sequences": numbers(1, 1, 1)} | changes
    with pytest.raises(DataError, match=message):
        make_splits(arguments.pop("references"), tokenizer, **arguments)


# ------------------------------------------------------------------------------------------------ how a text begins


@pytest.mark.parametrize(
    ("around", "front"),
    [
        ("$A", ()),
        ("<s> $A", (1,)),  # Gemma, Llama, Mistral
        ("</s> $A", (500,)),  # OPT begins with its end token
        ("$A </s>", ()),  # what comes after a text is not how it begins
        ("<s> $A </s>", (1,)),
        ("<b> <s> $A", (501, 1)),
    ],
)
def test_the_front_is_what_the_tokenizer_puts_before_a_text(around: str, front: tuple[int, ...]) -> None:
    tokenizer = words_tokenizer(around)
    assert front_of(tokenizer) == front
    assert begun(tokenizer, "w5 w6") == [*front, 5, 6]


def test_a_text_that_is_begun_already_is_not_begun_twice() -> None:
    """As a chat template writes it."""
    tokenizer = words_tokenizer("<s> $A")
    assert begun(tokenizer, "<s> w5 w6") == begun(tokenizer, "w5 w6") == [1, 5, 6]
    assert begun(words_tokenizer(), "<s> w5") == [
        1,
        5,
    ]  # text like any other, where the tokenizer has no such habit


@pytest.mark.parametrize(("around", "front"), [("<s> $A", [1]), ("<b> <s> $A </s>", [501, 1])])
def test_every_sequence_begins_as_the_tokenizer_begins_one(
    tmp_path: Path, around: str, front: list[int]
) -> None:
    texts = [document(index, num_words=20 + index) for index in range(40)]
    folder = write_folder(tmp_path / "d", texts)
    splits = make_splits(folder, words_tokenizer(around), sequence_length=8, num_sequences=numbers(6, 9, 5))
    size = 8 - len(front)
    for name, wanted in numbers(6, 9, 5).items():
        found: TokenSet = getattr(splits, name)
        chosen = sorted((sha(text), text) for text in texts if split_of(sha(text)) == name)
        expected = [
            [*front, *(int(word[1:]) for word in text.split()[start : start + size])]
            for _, text in chosen
            for start in (0, size)
        ][:wanted]
        assert found.ids_NT.tolist() == expected
        assert found.num_in_front == len(front)
        # not scored: what the tokens in front before the last predict, which is the rest of them
        assert found.scored.tolist() == [[False] * (len(front) - 1) + [True] * size] * wanted


def test_a_sequence_holds_more_than_its_front(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", [document(index) for index in range(30)])
    tokenizer = words_tokenizer("<b> <s> $A")
    with pytest.raises(DataError, match=r"sequence_length must be above 2, .*in front of a text; got 2"):
        make_splits(folder, tokenizer, sequence_length=2, num_sequences=numbers(1, 1, 1))
    splits = make_splits(folder, tokenizer, sequence_length=3, num_sequences=numbers(1, 1, 1))
    assert splits.search.scored.tolist() == [[False, True]]


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
