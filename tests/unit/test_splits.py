"""Documents dealt to the splits, and the sequences cut from them or packed.

Oracles: the stated rules, written out a second time here (hashing, chunking, packing) or as literal documents.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foldsearch.errors import DataError
from foldsearch.model import splits as splits_file
from foldsearch.model.splits import SplitRules, split_of
from foldsearch.model.text import Source
from foldsearch.model.tokens import SPLITS, TokenSet
from foldsearch.progress import unheard


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


def make_splits(data, tokenizer, *, progress=unheard, notice=unheard, **rules):
    return splits_file.make_splits(data, tokenizer, SplitRules(**rules), progress=progress, notice=notice)


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


def test_short_documents_are_passed_over_where_long_ones_are_enough(tmp_path: Path, tokenizer) -> None:
    texts = [document(index, num_words=7 if index % 2 else 8) for index in range(60)]
    folder = write_folder(tmp_path / "d", texts)
    told: list[str] = []
    splits = make_splits(
        folder, tokenizer, sequence_length=8, num_sequences=numbers(3, 3, 3), notice=told.append
    )
    long = {sha(text) for text in texts[::2]}
    assert set(splits.search.documents + splits.recovery.documents + splits.report.documents) <= long
    assert told == []


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
        (Path(folder) / "short.txt").write_text(
            "none"
        )  # in both, and too short for a sequence of eight tokens
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


# ------------------------------------------------------------------------------------------- short documents, packed


def short_folder(folder: Path, count: int, seed: int = 0, most: int = 5) -> tuple[str, list[str]]:
    """Documents of two to `most` words."""
    rng = random.Random(seed)
    texts = [" ".join(f"w{rng.randrange(2, 500)}" for _ in range(rng.randint(2, most))) for _ in range(count)]
    return write_folder(folder, texts), texts


def packed_by_hand(texts: list[str], name: str, front: list[int], between: list[int], length: int):
    """Sequences, whether each of their tokens is of a text, and the documents of each."""
    made, ids, own, keys = [], [], [], []
    for key, text in sorted((sha(text), text) for text in set(texts)):
        if split_of(key) != name:
            continue
        put = between if ids else front
        if len(ids) + len(put) >= length:  # no token of this document has a place
            made.append(((ids + put)[:length], (own + [False] * len(put))[:length], keys))
            ids, own, keys, put = [], [], [], front
        body = [int(word[1:]) for word in text.split()]
        ids, own, keys = [*ids, *put, *body], [*own, *[False] * len(put), *[True] * len(body)], [*keys, key]
        if len(ids) >= length:
            made.append((ids[:length], own[:length], keys))
            ids, own, keys = [], [], []
    return made


@pytest.mark.parametrize(
    ("around", "front", "between"),
    [
        ("$A", [], [500]),  # GPT-2, Qwen: the end token alone
        ("<s> $A", [1], [500, 1]),  # Gemma, Llama
        ("</s> $A", [500], [500]),  # OPT: what begins a text also ends it
        ("<s> $A </s>", [1], [500, 1]),
    ],
)
def test_short_documents_are_packed(
    tmp_path: Path, around: str, front: list[int], between: list[int]
) -> None:
    """Each in one sequence only, begun and parted as the tokenizer does it; what is in between is not scored."""
    folder, texts = short_folder(tmp_path / "d", 200)
    told: list[str] = []
    splits = make_splits(
        folder,
        words_tokenizer(around),
        sequence_length=16,
        num_sequences=numbers(6, 9, 5),
        notice=told.append,
    )
    for name, wanted in numbers(6, 9, 5).items():
        found: TokenSet = getattr(splits, name)
        expected = packed_by_hand(texts, name, front, between, 16)[:wanted]
        assert found.ids_NT.tolist() == [ids for ids, _, _ in expected]
        assert found.text_NT.tolist() == [own for _, own, _ in expected]
        assert found.num_in_front == len(front)
        # scored is what predicts a word, whatever stands before it
        assert found.scored.tolist() == [own[1:] for _, own, _ in expected]
        assert not torch.isin(found.ids_NT[:, 1:][found.scored], torch.tensor([1, 500])).any()
        # every sequence is a cluster of its own, and names all of its documents
        assert found.document_N.tolist() == list(range(wanted))
        assert [found.documents[index] for index in found.document_N] == [keys[0] for _, _, keys in expected]
        assert sorted(found.documents) == sorted(key for _, _, keys in expected for key in keys)
        assert f"{name}: {wanted} sequences of {folder}, all packed from short documents." in told


def test_a_document_lies_in_one_sequence_only(tmp_path: Path, tokenizer) -> None:
    """So a cluster of the standard errors is a sequence, or the sequences of one long document."""
    rng = random.Random(1)
    texts = [
        " ".join(f"w{rng.randrange(2, 500)}" for _ in range(rng.choice((3, 6, 12, 30)))) for _ in range(90)
    ]
    folder = write_folder(tmp_path / "d", texts)
    splits = make_splits(folder, tokenizer, sequence_length=8, num_sequences=numbers(99, 99, 99))
    places: dict[str, set[int]] = {}
    for name in SPLITS:
        found: TokenSet = getattr(splits, name)
        by_words = {tuple(int(word[1:]) for word in text.split()): sha(text) for text in texts}
        for ids_T, cluster in zip(found.ids_NT.tolist(), found.document_N.tolist(), strict=True):
            for part in " ".join(map(str, ids_T)).split(" 500"):
                run = tuple(map(int, part.split()))
                owners = [key for words, key in by_words.items() if _contains(words, run)]
                if len(run) > 2:  # fewer may be of several
                    assert owners
                    for key in owners:
                        places.setdefault(key, set()).add((name, cluster))
    assert all(len(of) == 1 for of in places.values())
    assert len(places) > 60


def _contains(words: tuple[int, ...], run: tuple[int, ...]) -> bool:
    return any(words[start : start + len(run)] == run for start in range(len(words) - len(run) + 1))


def test_a_document_that_has_its_end_does_not_get_it_twice(tmp_path: Path) -> None:
    """As chat templates write it."""
    texts = [f"w{index} w{index + 1} </s>" for index in range(2, 300)]
    folder = write_folder(tmp_path / "d", texts)
    splits = make_splits(
        folder, words_tokenizer("<s> $A"), sequence_length=12, num_sequences=numbers(4, 4, 4)
    )
    for name in SPLITS:
        ids_NT = getattr(splits, name).ids_NT
        assert (ids_NT[:, [0, 4, 8]] == 1).all()
        assert (ids_NT[:, [3, 7, 11]] == 500).all()


def test_without_an_end_token_an_empty_line_stands_between(tmp_path: Path) -> None:
    built = Tokenizer(models.WordLevel({"a": 0, "b": 1, "\n": 2}, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    given = PreTrainedTokenizerFast(tokenizer_object=built)
    texts = [f"{index:08b}".replace("0", "a").replace("1", "b") for index in range(200)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    splits = make_splits(str(tmp_path / "d.jsonl"), given, sequence_length=18, num_sequences=numbers(2, 2, 2))
    assert (splits.search.ids_NT[:, 8:10] == 2).all()
    assert (~splits.search.text_NT).nonzero()[:, 1].unique().tolist() == [8, 9]


# ------------------------------------------------------------------------------------------------------ small corpora


def test_more_is_taken_of_a_document_before_less_is_measured(tmp_path: Path, tokenizer) -> None:
    texts = [document(index, num_words=8 * 6) for index in range(30)]
    folder = write_folder(tmp_path / "d", texts)
    chosen = sorted((sha(text), text) for text in texts if split_of(sha(text)) == "search")
    wanted = 4 * len(chosen) - 1  # at two a document there would be half as many
    told: list[str] = []
    splits = make_splits(
        folder, tokenizer, sequence_length=8, num_sequences=numbers(wanted, 4, 4), notice=told.append
    )
    pieces = [
        (key, " ".join(text.split()[start : start + 8])) for key, text in chosen for start in range(0, 32, 8)
    ]
    assert [words(ids_T) for ids_T in splits.search.ids_NT] == [text for _, text in pieces[:wanted]]
    assert [splits.search.documents[i] for i in splits.search.document_N] == [k for k, _ in pieces[:wanted]]
    assert told == [f"search: {wanted} sequences of {folder}, up to 4 from one document."]


def test_a_small_corpus_is_used_as_far_as_it_goes(tmp_path: Path, tokenizer) -> None:
    texts = [document(index, num_words=20) for index in range(30)]
    folder = write_folder(tmp_path / "d", texts)
    count = {name: sum(split_of(sha(text)) == name for text in texts) for name in SPLITS}
    told: list[str] = []
    splits = make_splits(
        folder, tokenizer, sequence_length=8, num_sequences=numbers(99, 2, 99), notice=told.append
    )
    for name in ("search", "report"):
        assert len(getattr(splits, name).ids_NT) == 2 * count[name]
        assert (
            f"{name}: {2 * count[name]} sequences instead of 99: {folder} has no more text for it ({count[name]} "
            "documents)."
        ) in told
    assert len(splits.recovery.ids_NT) == 2
    assert len(told) == 2


@pytest.mark.parametrize("count", [6, 7, 9, 12])
def test_few_documents_are_dealt_so_that_each_set_gets_two(tmp_path: Path, tokenizer, count: int) -> None:
    """Only where their hashes alone would leave a set with less, and told."""
    for seed in range(40):
        texts = [document(1000 * seed + index) for index in range(count)]
        folder = write_folder(tmp_path / f"d{seed}", texts)
        told: list[str] = []
        splits = make_splits(
            folder, tokenizer, sequence_length=8, num_sequences=numbers(4, 4, 4), notice=told.append
        )
        by_hash = {name: {sha(t) for t in texts if split_of(sha(t)) == name} for name in SPLITS}
        enough = min(map(len, by_hash.values())) >= 2
        assert enough != any("dealt by number" in words for words in told)
        for name in SPLITS:
            found = set(getattr(splits, name).documents)
            assert len(found) == 2
            assert not enough or found <= by_hash[name]


def test_too_little_text_is_refused(tmp_path: Path, tokenizer) -> None:
    long = (document(index, num_words=400) for index in range(30))
    alone = write_folder(tmp_path / "one", [next(d for d in long if split_of(sha(d)) == "recovery")])
    with pytest.raises(
        DataError,
        match=r"search: at least 2 sequences of 8 tokens from different documents are needed, but .*/one gives none: "
        r"it has 0 documents in this split\..*splits\.sequence_length.*--sample-by line",
    ):
        make_splits(alone, tokenizer, sequence_length=8, num_sequences=numbers(4, 4, 4))
    recovery = next(d for d in map(document, range(30)) if split_of(sha(d)) == "recovery")
    few = write_folder(tmp_path / "few", [recovery])
    with pytest.raises(DataError, match=r"recovery: at least 2 .* gives 2: it has 1 document in this split"):
        make_splits(few, tokenizer, sequence_length=8, num_sequences=numbers(0, 99, 0))
    make_splits(
        few, tokenizer, sequence_length=8, num_sequences=numbers(0, 1, 0)
    )  # one is what was asked for


# ------------------------------------------------------------------------------------------------- the same text again


def test_a_text_is_the_same_however_it_was_saved(tmp_path: Path, tokenizer) -> None:
    """A byte order mark, line ends, white space around it and the form of its accents make no other document."""
    texts = [f"{document(index)} caf\u00e9\nw5" for index in range(40)]
    ways = {
        "bom": [text.encode("utf-8-sig") for text in texts],
        "utf16": [text.encode("utf-16") for text in texts],
        "windows": [text.replace("\n", "\r\n").encode() for text in texts],
        "ended": [(text + "\n").encode() for text in texts],
        "apart": [text.replace("\u00e9", "e\u0301").encode() for text in texts],
    }
    plain = write_folder(tmp_path / "plain", texts)
    other = write_folder(tmp_path / "other", [document(100 + index) for index in range(9)])
    alone = make_splits(plain, tokenizer, sequence_length=8, num_sequences=numbers(6, 6, 6))
    for way, contents in ways.items():
        (tmp_path / way).mkdir()
        for index, content in enumerate(contents):
            (tmp_path / way / f"{index:03}.txt").write_bytes(content)
        with pytest.raises(DataError, match="search and recovery share 40 documents"):
            make_splits(
                {"search": plain, "recovery": str(tmp_path / way), "report": other},
                tokenizer,
                sequence_length=8,
                num_sequences=numbers(4, 4, 4),
            )
        both = make_splits(
            [plain, str(tmp_path / way)], tokenizer, sequence_length=8, num_sequences=numbers(6, 6, 6)
        )
        for name in SPLITS:
            assert getattr(both, name).documents == getattr(alone, name).documents


def test_short_documents_of_several_splits_are_left_to_one(tmp_path: Path, tokenizer) -> None:
    common, texts = short_folder(tmp_path / "common", 60, seed=3)
    folders = {}
    for index, name in enumerate(SPLITS):
        own = short_folder(tmp_path / f"own {name}", 60, seed=10 + index)[1]
        folders[name] = write_folder(tmp_path / name, [*own, *texts])
    told: list[str] = []
    splits = make_splits(
        folders, tokenizer, sequence_length=32, num_sequences=numbers(12, 5, 5), notice=told.append
    )
    shared = {sha(text) for text in texts}
    assert shared & set(splits.search.documents)
    assert not shared & set(splits.report.documents + splits.recovery.documents)
    (of_report,) = (words for words in told if words.startswith("report:"))
    assert f"5 sequences of {folders['report']}" in of_report
    assert "60 documents that another set has too" in of_report
    with pytest.raises(
        DataError, match=r"it has 0 documents in this split \(60 documents more are in another"
    ):
        make_splits(
            dict.fromkeys(SPLITS, common), tokenizer, sequence_length=32, num_sequences=numbers(4, 4, 4)
        )


def test_a_document_is_short_by_its_tokens_not_by_its_bytes(tmp_path: Path, tokenizer) -> None:
    """Ten words of fifty bytes in two splits: too short for a sequence of 32, long enough in bytes."""
    shared = " ".join(f"w{index}" for index in range(100, 110))
    assert len(shared) > 32
    folders = {
        name: write_folder(
            tmp_path / name, [shared, *(document(40 * place + i, num_words=40) for i in range(8))]
        )
        for place, name in enumerate(SPLITS)
    }
    make_splits(folders, tokenizer, sequence_length=32, num_sequences=numbers(4, 4, 4))
    with pytest.raises(DataError, match="share 1 document"):
        make_splits(folders, tokenizer, sequence_length=10, num_sequences=numbers(4, 4, 4))


# ------------------------------------------------------------------------------------------------------------ mixtures


def test_sources_without_weights_are_one_pool(tmp_path: Path, tokenizer) -> None:
    texts = [document(index) for index in range(40)]
    one, two = write_folder(tmp_path / "one", texts[:25]), write_folder(tmp_path / "two", texts[15:])
    whole = write_folder(tmp_path / "whole", texts)
    together, alone = (
        make_splits(data, tokenizer, sequence_length=8, num_sequences=numbers(6, 6, 6))
        for data in ([one, Source(two)], whole)
    )
    for name in SPLITS:
        assert getattr(together, name).content_hash == getattr(alone, name).content_hash


def test_weights_are_shares_of_the_sequences_of_every_split(tmp_path: Path, tokenizer) -> None:
    sources, owner = [], {}
    for index, weight in enumerate((0.7, 0.2, 0.1)):
        texts = [document(100 * index + number) for number in range(80)]
        sources.append(Source(write_folder(tmp_path / str(index), texts), weight=weight))
        owner |= {sha(text): index for text in texts}
    splits = make_splits(sources, tokenizer, sequence_length=8, num_sequences=numbers(10, 20, 5))
    for name, expected in {"search": [7, 2, 1], "recovery": [14, 4, 2], "report": [4, 1, 0]}.items():
        found: TokenSet = getattr(splits, name)
        owners = [owner[found.documents[index]] for index in found.document_N]
        assert [owners.count(index) for index in range(3)] == expected  # 3.5, 1, 0.5: the first half goes up
        assert all(split_of(key) == name for key in found.documents)
        for index in range(3):  # of each source in the order of their hashes
            mine = [found.documents[i] for i, of in zip(found.document_N, owners, strict=True) if of == index]
            assert mine == sorted(mine)
        check_prefixes(owners)


def test_a_mixture_that_runs_short_says_which_source(tmp_path: Path, tokenizer) -> None:
    large = write_folder(tmp_path / "large", [document(index) for index in range(80)])
    small = write_folder(tmp_path / "small", [document(100 + index) for index in range(12)])
    told: list[str] = []
    splits = make_splits(
        [Source(large, weight=1), Source(small, weight=1)],
        tokenizer,
        sequence_length=8,
        num_sequences=numbers(8, 80, 8),
        notice=told.append,
    )
    assert len(splits.recovery.ids_NT) < 80
    assert [
        words
        for words in told
        if words.startswith("recovery:") and small in words and "instead of 40" in words
    ]
    assert not [words for words in told if large in words]


def test_a_mixture_has_all_weights_or_none(tmp_path: Path, tokenizer) -> None:
    one, two = (write_folder(tmp_path / name, [document(index)]) for index, name in enumerate("ab"))
    with pytest.raises(DataError, match="but 1 of 2 have one"):
        make_splits(
            [Source(one, weight=1), two], tokenizer, sequence_length=8, num_sequences=numbers(1, 1, 1)
        )


# --------------------------------------------------------------------------------------------------- kinds of text


def check_prefixes(owners: list[int]) -> None:
    """Law: of the first sequences, however many, each part has its share, to about one sequence."""
    for count in range(1, len(owners) + 1):
        for index in set(owners):
            share = count * owners.count(index) / len(owners)
            assert abs(owners[:count].count(index) - share) <= 1.5


def kinds_in(tokens: TokenSet) -> dict[str, int]:
    found = [tokens.kinds.names[index] for index in tokens.kinds.of_N]
    return {name: found.count(name) for name in tokens.kinds.names}


@pytest.fixture
def prose_and_code(tmp_path: Path) -> tuple[str, str]:
    """Two folders of 80 documents, none in both."""
    return tuple(
        write_folder(tmp_path / name, [document(100 * index + number) for number in range(80)])
        for index, name in enumerate(("prose", "code"))
    )


def test_named_kinds_give_equal_shares_and_each_sequence_knows_its_own(
    tmp_path: Path, tokenizer, prose_and_code: tuple[str, str]
) -> None:
    """Two sources of one kind are taken together; a source without a kind is of a kind of its own name."""
    prose, code = prose_and_code
    more = write_folder(tmp_path / "more", [document(300 + number) for number in range(80)])
    owner = {sha(path.read_text()): path.parent.name for path in tmp_path.rglob("*.txt")}
    sources = [Source(prose, kind="prose"), Source(code), Source(more, kind="prose")]
    splits = make_splits(sources, tokenizer, sequence_length=8, num_sequences=numbers(8, 20, 6))
    for name, wanted in numbers(8, 20, 6).items():
        tokens: TokenSet = getattr(splits, name)
        assert kinds_in(tokens) == {"prose": wanted // 2, "code": wanted // 2}
        owners = [owner[tokens.documents[index]] for index in tokens.document_N]
        kinds = [tokens.kinds.names[index] for index in tokens.kinds.of_N]
        assert [kind == "code" for kind in kinds] == [name == "code" for name in owners]


def test_the_first_sequences_are_of_every_kind_where_one_has_few_documents(tmp_path: Path, tokenizer) -> None:
    """Of many documents those of the least hashes are drawn: in the order of hashes the few would come last."""
    sources = [
        Source(write_folder(tmp_path / kind, [document(start + i) for i in range(count)]), kind=kind)
        for kind, start, count in (("much", 0, 400), ("little", 400, 90))
    ]
    found = make_splits(sources, tokenizer, sequence_length=8, num_sequences=numbers(8, 24, 8)).recovery
    owners = found.kinds.of_N.tolist()
    assert owners.count(0) == owners.count(1) == 12
    check_prefixes(owners)
    by_hash = sorted(range(24), key=lambda row: found.documents[int(found.document_N[row])])
    assert sum(owners[row] for row in by_hash[:12]) < 4


def test_sources_without_weights_or_kinds_are_of_one_kind(tokenizer, prose_and_code: tuple[str, str]) -> None:
    splits = make_splits(list(prose_and_code), tokenizer, sequence_length=8, num_sequences=numbers(4, 4, 4))
    assert len(splits.search.kinds.names) == 1


def test_sources_with_weights_are_of_kinds_of_their_own_names(
    tokenizer, prose_and_code: tuple[str, str]
) -> None:
    sources = [Source(reference, weight=1) for reference in prose_and_code]
    splits = make_splits(sources, tokenizer, sequence_length=8, num_sequences=numbers(4, 4, 4))
    assert splits.report.kinds.names == ("prose", "code")


def test_an_unseen_kind_is_in_the_report_set_alone_and_gives_the_same_sequences_as_when_it_is_seen(
    tokenizer, prose_and_code: tuple[str, str]
) -> None:
    """So whether a kind was seen is the only difference between two figures of it."""
    sources = [
        Source(reference, kind=kind)
        for reference, kind in zip(prose_and_code, ("prose", "code"), strict=True)
    ]
    seen, unseen = (
        make_splits(sources, tokenizer, sequence_length=8, num_sequences=numbers(8, 20, 6), unseen=names)
        for names in ((), ("code",))
    )
    assert kinds_in(unseen.search) == {"prose": 8, "code": 0}
    assert kinds_in(unseen.recovery) == {"prose": 20, "code": 0}
    assert torch.equal(unseen.report.ids_NT, seen.report.ids_NT)
    assert unseen.report.kinds.counted().tolist() == [index == 0 for index in seen.report.kinds.of_N]
    # of the code, only documents that are dealt to the report set
    assert all(split_of(key) == "report" for key in unseen.report.documents)


@pytest.mark.parametrize(
    ("wanted", "unseen", "words"),
    [
        (numbers(1, 4, 4), (), r"^search: each kind of text must have at least one sequence; got none"),
        (numbers(4, 4, 12), (), r"^the kind 'code': report: at least 2 sequences of 8 tokens"),
        (numbers(4, 4, 4), ("speech",), r"an unseen kind must be one of prose, code; got speech"),
    ],
)
def test_a_kind_without_documents_for_its_share_is_refused(
    tmp_path: Path, tokenizer, wanted: dict[str, int], unseen: tuple[str, ...], words: str
) -> None:
    """The code has two documents in the search set and one in the report set: too few to be dealt by number."""
    dealt = {name: [] for name in SPLITS}
    for index in range(200):
        dealt[split_of(sha(document(index)))].append(document(index))
    few = [*dealt["search"][:2], *dealt["recovery"][:2], dealt["report"][0]]
    others = [text for of in dealt.values() for text in of if text not in few]
    long = write_folder(tmp_path / "long", others)
    code = write_folder(tmp_path / "code", few)
    with pytest.raises(DataError, match=words):
        make_splits(
            [Source(long, kind="prose"), Source(code, kind="code")],
            tokenizer,
            sequence_length=8,
            num_sequences=wanted,
            unseen=unseen,
        )


def test_a_sequence_of_short_documents_is_of_one_kind(tmp_path: Path, tokenizer) -> None:
    folders = [
        write_folder(tmp_path / name, [document(250 * index + number, 3) for number in range(120)])
        for index, name in enumerate(("prose", "code"))
    ]
    owner = {sha(path.read_text()): path.parent.name for path in tmp_path.rglob("*.txt")}
    sources = [Source(folder, kind=Path(folder).name) for folder in folders]
    splits = make_splits(sources, tokenizer, sequence_length=8, num_sequences=numbers(4, 4, 4))
    for name in SPLITS:
        tokens: TokenSet = getattr(splits, name)
        for ids_T, kind in zip(tokens.ids_NT, tokens.kinds.of_N, strict=True):
            whole = words(ids_T).split("w1 ")[0]  # the first document, before <s> or the end token
            first = " ".join(whole.split()[:3])
            assert owner[sha(first)] == tokens.kinds.names[kind]


# --------------------------------------------------------------------------------------------------------------- chats


def test_a_chat_is_written_as_the_model_writes_it(tmp_path: Path) -> None:
    """The template writes <s> itself, so it is not put in front once more."""
    given = words_tokenizer("<s> $A")
    given.chat_template = (
        "{% for m in messages %}{% if loop.first %}<s> {% endif %}{{ m['content'] }} </s> {% endfor %}"
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i}"},
                {"role": "assistant", "content": f"w{i + 1} w{i + 2}"},
            ]
        }
        for i in range(2, 300)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = make_splits(
        str(tmp_path / "chats.jsonl"), given, sequence_length=12, num_sequences=numbers(4, 4, 4)
    )
    for name in SPLITS:
        for ids in getattr(splits, name).ids_NT.tolist():
            for start in (0, 6):
                first = ids[start + 1]
                assert ids[start : start + 6] == [1, first, 500, first + 1, first + 2, 500]
    made = splits.search.content_hash
    given.chat_template = "{{ strftime_now('%d %b %Y') }} " + given.chat_template
    dated = make_splits(
        str(tmp_path / "chats.jsonl"), given, sequence_length=12, num_sequences=numbers(4, 4, 4)
    )
    assert dated.search.content_hash != made
    write = splits_file._chat_writer(given)
    assert write is not None
    assert write(rows[0]["messages"]).startswith("26 Jul 2024 ")  # a text is the same on every day
    given.chat_template = None
    with pytest.raises(
        DataError, match=r"line 1: 'messages' holds a chat, but this model's tokenizer has no chat"
    ):
        make_splits(str(tmp_path / "chats.jsonl"), given, sequence_length=12, num_sequences=numbers(4, 4, 4))
