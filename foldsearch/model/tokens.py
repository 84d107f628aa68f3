"""Token sets, and how a sequence of tokens begins; `foldsearch.model.splits` makes the sets of documents.

**How a sequence begins.** Every sequence that a model reads begins as the model's tokenizer begins a text: with what it
puts in front by itself, such as the <bos> of Gemma, Llama and Mistral, the </s> of OPT, or nothing (GPT-2, Qwen,
SmolLM2). Models that were trained so are other models without it: a Gemma 3 270M has four times the perplexity
(docs/log.md). These tokens count in the length of a sequence, but they are no text: a position is *scored* where the
token that it predicts is of the text. So the last token in front is scored (what it predicts is how a text begins), and
those before it are not.

**Kinds of text.** Each sequence is of one kind (see `Kinds`), so that every figure can be told for each kind apart.

Shapes: N sequences, T tokens of a sequence, P = T − 1 positions that predict a token.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import torch

from foldsearch.errors import DataError
from foldsearch.model.text import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SPLITS",
    "Kinds",
    "Over",
    "Splits",
    "TokenSet",
    "as_parts",
    "begun",
    "check_disjoint",
    "front_of",
    "reads_parts",
    "text_ids",
]

SPLITS = ("search", "recovery", "report")
Over = Literal["mean", "worst"]
_PROBE = "One, two."


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """Which kind of text each sequence of a token set is of, and how one figure is made of several kinds.

    Attributes:
        names: of the kinds, in the order of the study.
        of_N: int64, for each sequence the index of its kind in `names`.
        unseen: kinds that nothing is fitted to and nothing is chosen on. They are told apart and count in no figure of
            all kinds.
        over: one KL of several kinds is their mean, each kind counting the same, or that of the worst kind.
    """

    names: tuple[str, ...] = ("text",)
    of_N: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    unseen: tuple[str, ...] = ()
    over: Over = "mean"

    def counted(self) -> torch.Tensor:
        """(N), bool: whether a sequence is of a kind that counts, as it is not unseen."""
        unseen = torch.tensor([name in self.unseen for name in self.names], dtype=torch.bool)
        return ~unseen[self.of_N]

    def take(self, of_N: torch.Tensor) -> Kinds:
        """The same kinds for other sequences, whose kinds are given."""
        return Kinds(self.names, of_N, self.unseen, self.over)


@dataclass(frozen=True, slots=True, eq=False)
class TokenSet:
    """Token sequences of one split.

    Attributes:
        name: "search", "recovery" or "report".
        ids_NT: int64, N sequences of T tokens, each begun as the tokenizer begins a text.
        document_N: int64, for each sequence the index in `documents` of the document that it is of: sequences of one
            document are not independent, so standard errors are clustered by it. For a sequence that holds several
            short ones, which are in no other, it is that of the first.
        documents: sha256 (hex) of the text of each document that is used.
        text_NT: bool, whether a token is of a text, not one that was put in front of it or between two; all are if not
            given.
        kinds: of text, of each sequence; all are of one kind if not given.
    """

    name: str
    ids_NT: torch.Tensor
    document_N: torch.Tensor
    documents: tuple[str, ...]
    text_NT: torch.Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    kinds: Kinds = field(default_factory=Kinds)

    def __post_init__(self) -> None:
        if not self.text_NT.numel():
            object.__setattr__(self, "text_NT", torch.ones_like(self.ids_NT, dtype=torch.bool))
        if not self.kinds.of_N.numel():
            one = torch.zeros(len(self.ids_NT), dtype=torch.int64)
            object.__setattr__(self, "kinds", self.kinds.take(one))
        if self.ids_NT.dim() != 2 or self.ids_NT.dtype != torch.int64:
            raise DataError(
                f"{self.name}: token ids are a 2-dimensional int64 tensor [sequences, tokens], not "
                f"{list(self.ids_NT.shape)} of {self.ids_NT.dtype}."
            )
        if self.document_N.shape != self.ids_NT.shape[:1] or self.document_N.dtype != torch.int64:
            raise DataError(
                f"{self.name}: each of the {len(self.ids_NT)} sequences has one document index (int64), not "
                f"{list(self.document_N.shape)} of {self.document_N.dtype}."
            )
        if self.text_NT.shape != self.ids_NT.shape or self.text_NT.dtype != torch.bool:
            raise DataError(
                f"{self.name}: each token is of the text or not (bool, {list(self.ids_NT.shape)}), not "
                f"{list(self.text_NT.shape)} of {self.text_NT.dtype}."
            )
        if len(self.document_N) and not (
            int(self.document_N.min()) >= 0 and int(self.document_N.max()) < len(self.documents)
        ):
            raise DataError(
                f"{self.name}: a sequence names a document that is not among the {len(self.documents)}."
            )
        if self.kinds.of_N.shape != self.ids_NT.shape[:1] or self.kinds.of_N.dtype != torch.int64:
            raise DataError(
                f"{self.name}: each of the {len(self.ids_NT)} sequences is of one kind (int64), not "
                f"{list(self.kinds.of_N.shape)} of {self.kinds.of_N.dtype}."
            )

    def of(self, rows: list[int]) -> TokenSet:
        """Some of the sequences."""
        return TokenSet(
            self.name,
            self.ids_NT[rows],
            self.document_N[rows],
            self.documents,
            self.text_NT[rows],
            self.kinds.take(self.kinds.of_N[rows]),
        )

    def shuffled(self, seed: int) -> TokenSet:
        """The sequences in a random order; that of as many is always the same."""
        rows = list(range(len(self.ids_NT)))
        random.Random(seed).shuffle(rows)
        return self.of(rows)

    @property
    def scored(self) -> torch.Tensor:
        """(N, P), bool: whether a position predicts a token of the text, and counts in losses, KL and agreement."""
        return self.text_NT[:, 1:]

    @property
    def num_in_front(self) -> int:
        """How many tokens every sequence begins with that are not of the text."""
        return int(self.text_NT.any(0).int().cumsum(0).eq(0).sum())

    def cut(self, length: int) -> TokenSet:
        """Shorter sequences, each begun as these are: the text in each is cut, what is left over at its end is lost."""
        num_sequences, whole = self.ids_NT.shape
        front = self.num_in_front
        size = min(length, whole) - front
        assert size > 0, "a sequence holds more than what is in front of its text"
        pieces = (whole - front) // size

        def cut(values_NT: torch.Tensor) -> torch.Tensor:
            begin = values_NT[:, None, :front].expand(num_sequences, pieces, front)
            rest = values_NT[:, front : front + pieces * size].reshape(num_sequences, pieces, size)
            return torch.cat((begin, rest), 2).flatten(0, 1)

        return TokenSet(
            self.name,
            cut(self.ids_NT),
            self.document_N.repeat_interleave(pieces),
            self.documents,
            cut(self.text_NT),
            self.kinds.take(self.kinds.of_N.repeat_interleave(pieces)),
        )

    @property
    def num_tokens(self) -> int:
        """N times T."""
        return self.ids_NT.numel()

    @property
    def content_hash(self) -> str:
        """16 hex digits over token ids, their documents and kinds: equal sets have equal hashes, whatever their names.

        Where all sequences are of one kind, it counts for nothing.
        """
        digest = hashlib.sha256(f"{tuple(self.ids_NT.shape)}\n{self.documents}\n".encode())
        kinds = (self.kinds.of_N,) if len(self.kinds.of_N.unique()) > 1 else ()
        for values in (self.ids_NT, self.document_N, self.text_NT, *kinds):
            digest.update(values.cpu().contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Splits:
    """The three token sets of a study; no document is in two of them.

    Attributes:
        search: what objectives are measured on.
        recovery: what is trained on.
        report: what only the final table is measured on.

    Raises:
        DataError: two of them share a document.
    """

    search: TokenSet
    recovery: TokenSet
    report: TokenSet

    def __post_init__(self) -> None:
        check_disjoint({one.name: one.documents for one in (self.search, self.recovery, self.report)})

    def hashes(self) -> dict[str, str]:
        """Of each set by its name; 64 hex digits."""
        return {one.name: one.content_hash for one in (self.search, self.recovery, self.report)}


def check_disjoint(documents: Mapping[str, Iterable[str]]) -> None:
    """Refuse hashes that two splits have in common."""
    for (one, of_one), (other, of_other) in combinations(documents.items(), 2):
        if shared := set(of_one) & set(of_other):
            raise DataError(
                f"{one} and {other} share {count_of(len(shared))} (the first has hash {min(shared)[:12]}), so a result "
                "would be measured on what was trained or chosen on. Give sources without common documents, or one "
                "source for all three: it is split by document."
            )


def front_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that a tokenizer puts in front of a text by itself, such as that of <bos>; often none.

    It is asked, whatever its tokens are called: a text is tokenised with and without special tokens. What it puts after
    a text (some add an end token) is no part of the beginning.

    Raises:
        DataError: with special tokens, the text itself becomes other tokens.
    """
    plain: list[int] = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    whole: list[int] = tokenizer(_PROBE, verbose=False)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    raise DataError(
        f"a tokenizer gives a text the same tokens with and without special ones around it, but for {_PROBE!r} this "
        f"one gives {whole} and {plain}. Its files are damaged, or of another model: fetch them again."
    )


def begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's ids, begun as the tokenizer begins one, with nothing after them; what to go on with after a prompt."""
    front = front_of(tokenizer)
    return [*front, *text_ids(tokenizer, text, front)]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, front: tuple[int, ...]) -> list[int]:
    """A text's own ids. One that has the front written out, as chat templates write it, does not get it twice."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[len(front) :] if tuple(ids[: len(front)]) == front else ids


def reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template reads the content of a message as a list of parts, and drops one that is a text.

    Templates of models that also see do, many of them: a part is an image or a text.
    """
    probe = [{"role": "user", "content": _PROBE}]
    shown = []
    for messages in (probe, as_parts(probe)):
        try:
            shown.append(_PROBE in str(tokenizer.apply_chat_template(messages, tokenize=False)))
        except Exception:  # a template is a program of its own, and may raise what it likes
            shown.append(False)
    return shown == [False, True]


def tells_time(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes the date or the time of day, so that a chat is another text tomorrow."""
    return "strftime_now" in str(tokenizer.chat_template or "")


def as_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose texts are lists of one part, the text; contents that are no text stay as they are."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]
