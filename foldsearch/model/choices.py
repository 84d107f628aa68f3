"""Multiple-choice questions: read, kept apart from what the search saw, and answered by perplexity.

A model's choice is the option of least perplexity given the question, PPL(i, y) = exp(mean negative log-likelihood of
the tokens of option y), the loss in nats per token (as in LLM-Streamline, arXiv 2403.19135).

Question and option are one text and tokenised together, with a space between them where neither has white space there.
The tokens of the option are those after what this text and the question alone have in common: a token that straddles
the border belongs to the option. A question begins as the tokenizer begins a text (see tokens.py); there is no other
special token.

Shapes: B sequences, T positions, M tokens of options, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldsearch.errors import InputError, quote_error
from foldsearch.model.head import judged_logits, last_hidden
from foldsearch.model.judge import TOKENS_AT_ONCE
from foldsearch.model.rows import lines_of
from foldsearch.model.tokens import TokenSet, begun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEN_GRAM = (
    13  # tokens in a row that a question must not share with what was seen (GPT-3's 13-grams, in our tokens)
)
SEEN_LEAST = 8  # a shorter question is not compared: anybody may have said it
HIGHEST_NLL = 300.0  # nats per token: e^300 is still a number, and so is its square


# ---- questions


@dataclass(frozen=True, slots=True)
class Question:
    """One item: its text, at least two options, the index of the right one, and the line it was read from."""

    text: str
    options: tuple[str, ...]
    answer: int
    line: int


def read_questions(path: Path, *, limit: int | None = None) -> tuple[Question, ...]:
    """The questions of a JSONL file, in its order: keys question, options, and answer (an index, or an option).

    Other keys and blank lines are passed over.

    Args:
        path: one JSON object a line; see `foldsearch.model.rows.lines_of`.
        limit: only the first so many.

    Raises:
        InputError: the file cannot be read, has fewer than 2 questions, or a line is no question; names the line.
    """
    found: list[Question] = []
    for number, line in enumerate(lines_of(path), start=1):
        if line.strip():
            found.append(_question(line, number, f"{path}, line {number}"))
        if limit is not None and len(found) == limit:
            break
    if len(found) < 2:
        raise InputError(
            f"{path}: a standard error takes at least 2 questions, but there are {len(found)}. Give one JSON object a "
            'line: {"question": "...", "options": ["...", "..."], "answer": 0}'
        )
    return tuple(found)


def _question(line: str, number: int, where: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(quote_error(f"{where}: each line is one JSON object, but", error)) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: each line is one JSON object, not {_kind(row)}.")
    for key in ("question", "options", "answer"):
        if key not in row:
            raise InputError(
                f"{where}: there is no {key!r}, only {', '.join(map(repr, row)) or 'nothing'}. A question has "
                "'question', 'options' and 'answer'."
            )
    text, options, answer = row["question"], row["options"], row["answer"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: 'question' is text, not {_kind(text)}. Write out what is asked.")
    if not isinstance(options, list) or len(options) < 2:
        had = f"a list of {len(options)}" if isinstance(options, list) else _kind(options)
        raise InputError(
            f"{where}: 'options' is a list of at least 2 texts, not {had}. List what to choose from."
        )
    for index, option in enumerate(options):
        if not isinstance(option, str) or not option.strip():
            raise InputError(f"{where}: option {index} is text, not {_kind(option)}. Write it in quotes.")
    if isinstance(answer, str):
        if answer not in options:
            raise InputError(
                f"{where}: 'answer' is the index of an option or one of them as it is written, not {answer!r}; the "
                f"options are {', '.join(map(repr, options))}."
            )
        answer = options.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise InputError(f"{where}: 'answer' is the index of an option or its text, not {_kind(answer)}.")
    if not 0 <= answer < len(options):
        raise InputError(
            f"{where}: 'answer' is an index from 0 to {len(options) - 1}, not {answer}. The first option is 0."
        )
    return Question(text, tuple(options), answer, number)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]


# ---- what the search or the recovery saw


def seen(
    texts: Iterable[tuple[int, str]], tokenizer: PreTrainedTokenizerBase, sets: Sequence[TokenSet]
) -> list[tuple[int, str]]:
    """Which texts occur in token sets: the number of each, and the name of the first set that it occurs in.

    A text occurs where 13 of its tokens in a row do, or all of them if they are fewer, at least 8; shorter ones are not
    compared. Exact in tokens: another spelling, case or spacing is not found. (After GPT-3's overlap test, arXiv
    2005.14165, appendix C, which takes words.)

    Args:
        texts: numbered.
        tokenizer: the one that made the sets.
        sets: sequences of one document that follow one another are joined.
    """
    owners: dict[tuple[int, ...], list[int]] = {}
    for number, text in texts:
        # A word has one token at the start of a text and often another one after a space.
        for spelling in (text.strip(), " " + text.strip()):
            ids = tokenizer(spelling, add_special_tokens=False, verbose=False)["input_ids"]
            size = min(SEEN_GRAM, len(ids))
            if size < SEEN_LEAST:
                continue
            for start in range(len(ids) - size + 1):
                owners.setdefault(tuple(ids[start : start + size]), []).append(number)
    sizes = sorted({len(gram) for gram in owners})
    found: dict[int, str] = {}
    for one in sets:
        for ids in _documents(one):
            for size in sizes:
                for start in range(len(ids) - size + 1):
                    for number in owners.get(tuple(ids[start : start + size]), ()):
                        found.setdefault(number, one.name)
    return sorted(found.items())


def _documents(one: TokenSet) -> Iterator[list[int]]:
    """The ids of each document, without what is in front of each of its sequences."""
    joined: dict[int, list[int]] = {}
    for ids, document in zip(
        one.ids_NT[:, one.num_in_front :].tolist(), one.document_N.tolist(), strict=True
    ):
        joined.setdefault(document, []).extend(ids)
    yield from joined.values()


# ---- perplexities of options


@dataclass(frozen=True, slots=True)
class EncodedOption:
    """ids: of the question with one option; those from `start` on are the option's."""

    ids: tuple[int, ...]
    start: int


def encode_question(
    question: Question, tokenizer: PreTrainedTokenizerBase, where: str, *, longest: int | None = None
) -> tuple[EncodedOption, ...]:
    """Token ids of a question with each of its options, by the rule in the module's docstring.

    Args:
        question: what to encode.
        tokenizer: the dense model's.
        where: file and line, for messages.
        longest: tokens that the model can read.

    Raises:
        InputError: an option has no token of its own, or it is all too long for the model.
    """
    alone = begun(tokenizer, question.text.rstrip())
    encoded = []
    for index, option in enumerate(question.options):
        spaced = question.text[-1].isspace() or option[0].isspace()
        ids = begun(tokenizer, f"{question.text}{'' if spaced else ' '}{option}")
        same = 0
        while same < min(len(alone), len(ids)) and alone[same] == ids[same]:
            same += 1
        start = max(same, 1)  # the first token of all has nothing to be predicted from
        if start >= len(ids):
            raise InputError(
                f"{where}: option {index} ({option!r}) has no token of its own after the question, so it has no "
                "perplexity. Write it so that the tokenizer keeps it."
            )
        if longest is not None and len(ids) > longest:
            raise InputError(
                f"{where}: question and option {index} are {len(ids):,} tokens, but the model reads at most "
                f"{longest:,}. Shorten the question, or leave it out."
            )
        encoded.append(EncodedOption(tuple(ids), start))
    return tuple(encoded)


@torch.inference_mode()
def option_perplexities(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[EncodedOption]],
    *,
    progress: Callable[[float], None] | None = None,
) -> list[list[float]]:
    """PPL(i, y): e to the mean next-token loss (nats) over the tokens of option y given question i, at most e^300.

    Logits are made for tokens of options only, and in chunks (see `judged_logits`).

    Args:
        model: in eval mode.
        encoded: for each question, its options.
        progress: gets the share done.
    """
    place = {(i, y): option for i, options in enumerate(encoded) for y, option in enumerate(options)}
    order = sorted(
        place, key=lambda key: -len(place[key].ids)
    )  # of about one length, so that little is padding
    found = [[0.0] * len(options) for options in encoded]
    done = 0
    while done < len(order):
        longest = len(place[order[done]].ids)
        batch = order[done : done + max(1, TOKENS_AT_ONCE // longest)]
        loss = _option_losses(model, [place[key] for key in batch])
        for (i, y), value in zip(batch, loss, strict=True):
            found[i][y] = math.exp(min(value, HIGHEST_NLL))
        done += len(batch)
        if progress is not None:
            progress(done / len(order))
    return found


def _option_losses(model: PreTrainedModel, options: Sequence[EncodedOption]) -> list[float]:
    """Mean loss of each option's tokens. Padding stands to the right, where no token of a causal model looks."""
    ids_BT = torch.zeros(len(options), max(len(option.ids) for option in options), dtype=torch.int64)
    asked_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, option in enumerate(options):
        ids_BT[row, : len(option.ids)] = torch.tensor(option.ids)
        asked_BT[row, option.start : len(option.ids)] = True
    ids_BT, asked_BT = ids_BT.to(model.device), asked_BT.to(model.device)
    hidden_MD = last_hidden(model, ids_BT)[:, :-1][asked_BT[:, 1:]]
    next_M: Tensor = ids_BT[:, 1:][asked_BT[:, 1:]]
    normaliser_M, logit_M, _ = judged_logits(model, hidden_MD, next_M, next_M)
    losses = (normaliser_M - logit_M).cpu().double().split(asked_BT.sum(1).tolist())
    return [float(loss.mean()) for loss in losses]


# ---- what the perplexities say


@dataclass(frozen=True, slots=True)
class ChoiceQuality:
    """How well two models choose on the same questions.

    *accuracy: share of right choices. *_se: its standard error. agreement: share of questions that both get right or
    both get wrong. stability: that share weighted by how sure the dense model is, see `stability`; effective_items:
    how many questions of equal weight those weights are worth.
    """

    items: int
    dense_accuracy: float
    dense_accuracy_se: float
    accuracy: float
    accuracy_se: float
    agreement: float
    stability: float
    effective_items: float


def compare_choices(
    dense: Sequence[Sequence[float]], folded: Sequence[Sequence[float]], answers: Sequence[int]
) -> ChoiceQuality:
    """The choices of a dense and a folded model, from the perplexities of the options: one list a question."""
    dense_right = [least(row) == answer for row, answer in zip(dense, answers, strict=True)]
    folded_right = [least(row) == answer for row, answer in zip(folded, answers, strict=True)]
    weights = stability_weights(dense)
    return ChoiceQuality(
        items=len(answers),
        dense_accuracy=share(dense_right),
        dense_accuracy_se=share_error(dense_right),
        accuracy=share(folded_right),
        accuracy_se=share_error(folded_right),
        agreement=share([a == b for a, b in zip(dense_right, folded_right, strict=True)]),
        stability=stability(weights, dense_right, folded_right),
        effective_items=effective_items(weights),
    )


def least(values: Sequence[float]) -> int:
    """The index of the least value, the first of equal ones."""
    return min(range(len(values)), key=values.__getitem__)


def share(right: Sequence[bool]) -> float:
    """How many of them are true, 0 to 1."""
    return sum(right) / len(right)


def share_error(right: Sequence[bool]) -> float:
    """Standard error of a share: √(p (1 − p) / (n − 1)), the sample standard deviation over √n; infinite for n = 1."""
    p, n = share(right), len(right)
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.inf


def stability_weights(dense: Sequence[Sequence[float]]) -> list[float]:
    """w = softmax over the questions of s, where s_i is the standard deviation of PPL(i, y) of the dense model over y.

    Source: the definition in LLM-Streamline, arXiv 2403.19135. It does not say which standard deviation; the
    population's (divided by the number of options, numpy's default) is ours. A softmax of perplexities gives nearly all
    weight to few questions: read `effective_items` beside it.
    """
    spreads = []
    for row in dense:
        mean = sum(row) / len(row)
        spreads.append(math.sqrt(sum((value - mean) ** 2 for value in row) / len(row)))
    highest = max(spreads)
    raised = [math.exp(spread - highest) for spread in spreads]
    total = sum(raised)
    return [value / total for value in raised]


def stability(weights: Sequence[float], dense_right: Sequence[bool], folded_right: Sequence[bool]) -> float:
    """Σ_i w_i · 1[dense and folded are both right or both wrong on i], 0 to 1 (arXiv 2403.19135)."""
    return sum(w for w, a, b in zip(weights, dense_right, folded_right, strict=True) if a == b)


def effective_items(weights: Sequence[float]) -> float:
    """Kish's effective sample size 1 / Σ w², for weights that sum to 1: between 1 and their number."""
    return 1 / sum(w * w for w in weights)
