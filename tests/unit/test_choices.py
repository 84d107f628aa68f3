"""Multiple-choice questions.

Oracles: numbers worked out by hand, the definitions in numpy, torch's cross entropy over the plain model's full logits.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foldsearch.errors import InputError
from foldsearch.model import choices
from foldsearch.model.choices import (
    Question,
    compare_choices,
    encode_question,
    option_perplexities,
    read_questions,
    seen,
    share_error,
)
from foldsearch.model.fold import fold
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.plan import FoldPlan
from tests.tiny import NUM_BLOCKS, LogitRows, dense_model, tokenizer

GOOD = {"question": "w3 w4", "options": ["w5", "w6 w7"], "answer": 0}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "q.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# ---- metrics


def test_metrics_worked_out_by_hand() -> None:
    dense = [[1.0, 3.0], [4.0, 2.0], [5.0, 5.0]]
    folded = [[2.0, 1.0], [9.0, 3.0], [7.0, 6.0]]
    # choices: dense 0, 1, 0 (the first of equal ones); folded 1, 1, 1. Right: dense yes, yes, no; folded no, yes, yes
    found = compare_choices(dense, folded, [0, 1, 1])
    assert found.items == 3
    assert found.dense_accuracy == 2 / 3
    assert found.accuracy == 2 / 3
    assert found.dense_accuracy_se == pytest.approx(1 / 3)  # sqrt(2/3 * 1/3 / 2)
    assert (
        found.agreement == 1 / 3
    )  # only the second: in the first dense alone is right, in the third folded alone
    # standard deviations of the options: 1, 1, 0; softmax: e, e, 1 over 2e + 1
    total = 2 * math.e + 1
    assert found.stability == pytest.approx(math.e / total)
    assert found.effective_items == pytest.approx(total**2 / (2 * math.e**2 + 1))


rows = st.integers(2, 12).flatmap(
    lambda n: st.lists(
        st.integers(2, 5).flatmap(
            lambda y: st.tuples(
                st.lists(st.floats(1, 1e6), min_size=y, max_size=y),
                st.lists(st.floats(1, 1e6), min_size=y, max_size=y),
                st.integers(0, y - 1),
            )
        ),
        min_size=n,
        max_size=n,
    )
)


@given(rows)
def test_metrics_are_the_definitions(drawn: list[tuple[list[float], list[float], int]]) -> None:
    dense, folded, answers = ([row[part] for row in drawn] for part in range(3))
    a = np.array([np.argmin(row) == y for row, y in zip(dense, answers, strict=True)])
    b = np.array([np.argmin(row) == y for row, y in zip(folded, answers, strict=True)])
    s = np.array([np.std(row) for row in dense])
    w = np.exp(s - s.max())
    w /= w.sum()
    found = compare_choices(dense, folded, answers)
    assert found.dense_accuracy == pytest.approx(a.mean())
    assert found.accuracy == pytest.approx(b.mean())
    assert found.accuracy_se == pytest.approx(b.std(ddof=1) / np.sqrt(len(b)))
    assert found.agreement == pytest.approx((a == b).mean())
    assert found.stability == pytest.approx((w * (a == b)).sum(), rel=1e-6, abs=1e-9)
    assert found.effective_items == pytest.approx(1 / (w**2).sum(), rel=1e-6)
    assert 1 - 1e-9 <= found.effective_items <= len(a) + 1e-9


def test_one_question_has_no_standard_error() -> None:
    assert share_error([True]) == math.inf


# ---- perplexities


@torch.no_grad()
def by_cross_entropy(model, ids: list[int], start: int) -> float:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return math.exp(torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:])))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "mistral"])
@pytest.mark.parametrize("plan", ["0-4", "0 1=3 3-4"])
def test_option_perplexity_is_cross_entropy_of_the_options_tokens(name, plan, monkeypatch) -> None:
    monkeypatch.setattr(choices, "TOKENS_AT_ONCE", 40)  # several batches, and padding in each
    monkeypatch.setattr("foldsearch.model.head.JUDGED_AT_ONCE", 3)
    model = fold(dense_model(name), FoldPlan.parse(plan, NUM_BLOCKS))
    questions = [
        Question("w3 w4 w5 w6", ("w7", "w8 w9 w10", "w11 w12"), 0, 1),
        Question(" ".join(f"w{i}" for i in range(20, 40)), ("w50 w51", "w52"), 1, 2),
        Question("w60", ("w61 w62 w63 w64", "w65"), 1, 3),
    ]
    encoded = [encode_question(question, tokenizer(), "here") for question in questions]
    shares: list[float] = []
    found = option_perplexities(model, encoded, progress=shares.append)
    for question, options in zip(questions, found, strict=True):
        prefix = [int(word[1:]) for word in question.text.split()]
        for option, value in zip(question.options, options, strict=True):
            ids = prefix + [int(word[1:]) for word in option.split()]
            assert value == pytest.approx(by_cross_entropy(model, ids, len(prefix)), rel=1e-4)
    assert len(shares) > 1
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_logits_are_made_for_tokens_of_options_only() -> None:
    question = Question(" ".join(["w3"] * 30), ("w5 w6", *[f"w{i}" for i in range(40, 80)]), 0, 1)
    encoded = [encode_question(question, tokenizer(), "here")]
    with LogitRows() as rows:
        option_perplexities(dense_model(), encoded)
    assert rows.most == 42  # of 41 times 31 tokens and more


# ---- the border between question and option


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """Bytes, with the merges "ab" and " c" (a space is Ġ): tokens that can straddle a border."""
    words = {
        token: index
        for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġc"])
    }
    built = Tokenizer(models.BPE(words, [("a", "b"), ("Ġ", "c")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>")


@pytest.mark.parametrize(
    ("question", "option", "head", "tail"),
    [
        ("x", "c", "x", " c"),  # a space between them, and it is the option's
        ("x ", "c", "x", " c"),  # the question's own space too
        ("x", " c", "x", " c"),
        ("x\n", "c", "x", "\nc"),
        ("x c", "ab", "x c", " ab"),
        ("xa\t", "b", "xa", "\tb"),
    ],
)
def test_what_comes_after_the_question_is_the_options(letters, question, option, head, tail) -> None:
    (encoded, _) = encode_question(Question(question, (option, "d"), 0, 1), letters, "here")
    assert letters.decode(encoded.ids[: encoded.start]) == head
    assert letters.decode(encoded.ids[encoded.start :]) == tail


def test_a_token_that_straddles_the_border_is_the_options() -> None:
    """The merge is of the question's last letter and the space that follows it."""
    spaced = Tokenizer(models.BPE({"x": 0, "a": 1, "Ġ": 2, "b": 3, "aĠ": 4, "d": 5}, [("a", "Ġ")]))
    spaced.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    straddling = PreTrainedTokenizerFast(tokenizer_object=spaced)
    (encoded, _) = encode_question(Question("xa", ("b", "d"), 0, 1), straddling, "here")
    assert encoded.ids == (0, 4, 3)
    assert encoded.start == 1


def test_the_first_token_goes_in_front_where_the_tokenizer_puts_it(letters) -> None:
    (plain, _) = encode_question(Question("x", ("c", "d"), 0, 1), letters, "here")
    assert plain.ids[0] != letters.bos_token_id
    from tokenizers.processors import TemplateProcessing

    with_bos = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(letters.backend_tokenizer.to_str()), bos_token="<s>"
    )
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", letters.bos_token_id)]
    )
    (encoded, _) = encode_question(Question("x", ("c", "d"), 0, 1), with_bos, "here")
    assert encoded.ids == (letters.bos_token_id, *plain.ids)
    assert encoded.start == plain.start + 1


def test_what_the_model_cannot_read_is_told() -> None:
    with pytest.raises(InputError, match=r"q, line 7: question and option 1 are 4 tokens, but .* at most 3"):
        encode_question(Question("w3 w4", ("w5", "w5 w6"), 0, 7), tokenizer(), "q, line 7", longest=3)


# ---- files


def test_questions_are_read(tmp_path) -> None:
    path = write(tmp_path, GOOD, "", {**GOOD, "answer": "w6 w7", "id": 3}, GOOD)
    found = read_questions(path)
    assert found[0] == Question("w3 w4", ("w5", "w6 w7"), 0, 1)
    assert (found[1].answer, found[1].line) == (1, 3)
    assert len(found) == 3
    assert read_questions(path, limit=2) == found[:2]
    for encoding in ("utf-8-sig", "utf-16"):  # as some editors save them
        again = tmp_path / f"{encoding}.jsonl"
        again.write_text(path.read_text(), encoding=encoding)
        assert read_questions(again) == found


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "each line is one JSON object, but: "),
        ([1], "each line is one JSON object, not a list"),
        ({"question": "w3", "options": ["a", "b"]}, "there is no 'answer', only 'question', 'options'"),
        ({"options": ["a", "b"], "answer": 0}, "there is no 'question'"),
        ({**GOOD, "question": 3}, "'question' is text, not a number"),
        ({**GOOD, "question": " "}, "'question' is text, not ' '"),
        ({**GOOD, "options": "w5"}, "'options' is a list of at least 2 texts, not 'w5'"),
        ({**GOOD, "options": ["w5"]}, "'options' is a list of at least 2 texts, not a list of 1"),
        ({**GOOD, "options": ["w5", None]}, "option 1 is text, not null"),
        ({**GOOD, "answer": 2}, "'answer' is an index from 0 to 1, not 2"),
        ({**GOOD, "answer": -1}, "'answer' is an index from 0 to 1, not -1"),
        ({**GOOD, "answer": True}, "'answer' is the index of an option or its text, not true or false"),
        ({**GOOD, "answer": 0.0}, "'answer' is the index of an option or its text, not a number"),
        ({**GOOD, "answer": "w9"}, "not 'w9'; the options are 'w5', 'w6 w7'"),
    ],
)
def test_faults_name_the_file_and_the_line(tmp_path, row, said) -> None:
    path = write(tmp_path, GOOD, "", row, GOOD)
    with pytest.raises(InputError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert said in str(caught.value)


def test_files_that_hold_no_questions_are_told(tmp_path) -> None:
    with pytest.raises(InputError, match="cannot be read: FileNotFoundError: No such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="takes at least 2 questions, but there are 1"):
        read_questions(write(tmp_path, GOOD))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(InputError, match="must be UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


# ---- what was seen


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_what_was_seen_is_found() -> None:
    """Two sequences of one document, then another document."""
    ids_NT = torch.tensor([list(range(10, 22)), list(range(22, 34)), list(range(50, 62))])
    search = TokenSet("search", ids_NT, torch.tensor([0, 0, 1]), ("a", "b"))
    recovery = TokenSet("recovery", torch.arange(70, 90)[None], torch.tensor([0]), ("c",))
    texts = {
        1: words(3, 4, *range(15, 28), 5),  # 13 in a row, over the border of two sequences
        2: words(3, 4, *range(15, 27), 5),  # 12 in a row
        3: words(*range(50, 58)),  # all of 8
        4: words(*range(50, 57)),  # 7 are too few to tell
        5: words(*range(28, 34), *range(50, 57)),  # two documents do not touch
        6: words(*range(71, 86)),
        7: words(*range(50, 57), 3),  # all but one
    }
    assert seen(texts.items(), tokenizer(), (search, recovery)) == [
        (1, "search"), (3, "search"), (6, "recovery"),
    ]  # fmt: skip


def test_a_first_word_that_stands_after_a_space_is_found(letters) -> None:
    ids = letters("x cxxxxxxxx")["input_ids"]
    saw = TokenSet("search", torch.tensor([ids]), torch.tensor([0]), ("a",))
    assert letters("cxxxxxxxx")["input_ids"][0] not in ids
    assert seen([(1, "cxxxxxxxx")], letters, (saw,)) == [(1, "search")]
