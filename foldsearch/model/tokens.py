"""Documents become the search, recovery and report token sets, split by document.

Which set a document belongs to is decided by its text alone (`split_of`), so it is the same in every run, and more data
never moves a document from one set to another. One that occurs twice counts once.

**How a sequence begins.** Every sequence that a model reads begins as the model's tokenizer begins a text: with what it
puts in front by itself, such as the <bos> of Gemma, Llama and Mistral, the </s> of OPT, or nothing (GPT-2, Qwen,
SmolLM2). Models that were trained so are other models without it: a Gemma 3 270M has four times the perplexity
(docs/log.md). These tokens count in the length of a sequence, but they are no text: a position is *scored* where the
token that it predicts is of the text. So the last token in front is scored (what it predicts is how a text begins), and
those before it are not.

Shapes: N sequences, T tokens of a sequence, P = T − 1 positions that predict a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from foldsearch.errors import DataError
from foldsearch.model.text import count_of, load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPLITS", "Splits", "TokenSet", "begun", "front_of", "make_splits", "split_of"]

SPLITS = ("search", "recovery", "report")
_PROBE = "One, two."


@dataclass(frozen=True, slots=True, eq=False)
class TokenSet:
    """Token sequences of one split.

    Attributes:
        name: "search", "recovery" or "report".
        ids_NT: int64, N sequences of T tokens, each begun as the tokenizer begins a text.
        document_N: int64, for each sequence the index of its document in `documents`: sequences of one document are
            not independent, so standard errors are clustered by it.
        documents: sha256 (hex) of the text of each document that is used.
        text_NT: bool, whether a token is of the text, not one that was put in front of it; all are if not given.
    """

    name: str
    ids_NT: torch.Tensor
    document_N: torch.Tensor
    documents: tuple[str, ...]
    text_NT: torch.Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))

    def __post_init__(self) -> None:
        if not self.text_NT.numel():
            object.__setattr__(self, "text_NT", torch.ones_like(self.ids_NT, dtype=torch.bool))
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

    def of(self, rows: list[int]) -> TokenSet:
        """Some of the sequences."""
        return TokenSet(
            self.name, self.ids_NT[rows], self.document_N[rows], self.documents, self.text_NT[rows]
        )

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
        )

    @property
    def num_tokens(self) -> int:
        """N times T."""
        return self.ids_NT.numel()

    @property
    def content_hash(self) -> str:
        """16 hex digits over token ids and their documents: equal sets have equal hashes, whatever their name."""
        digest = hashlib.sha256(f"{tuple(self.ids_NT.shape)}\n{self.documents}\n".encode())
        for values in (self.ids_NT, self.document_N, self.text_NT):
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
        _check_disjoint({one.name: one.documents for one in (self.search, self.recovery, self.report)})


def _check_disjoint(documents: Mapping[str, Iterable[str]]) -> None:
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
    return [*front, *_text_ids(tokenizer, text, front)]


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str, front: tuple[int, ...]) -> list[int]:
    """A text's own ids. One that has the front written out, as chat templates write it, does not get it twice."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[len(front) :] if tuple(ids[: len(front)]) == front else ids


def split_of(document_hash: str) -> str:
    """The split of a document by the sha256 (hex) of its text: 1 in 5 search, 1 in 5 report, the rest recovery."""
    u = int(document_hash[:16], 16) / 2**64
    return "search" if u < 0.2 else "report" if u < 0.4 else "recovery"


def make_splits(
    references: str | Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    num_sequences: Mapping[str, int],
    per_document: int = 2,
    text_column: str | None = None,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Splits:
    """Token sets for search, recovery and report, no document in two of them.

    From one source, `split_of` decides where a document goes; or three sources are named, one per split, each used
    whole. Within a split documents are taken in ascending order of their hash (a fixed shuffle), from each the first
    `per_document` chunks, until there are enough; documents of less than a chunk are passed over. A sequence is what
    the tokenizer puts in front of a text, then a chunk: `sequence_length` tokens together. Documents are tokenised one
    by one, only as many as are needed.

    Three sources have no document in common, used or not; those of fewer bytes than a chunk has tokens do not count, as
    they give no sequence. Of a source that is read in part (`limit`, a data set of the hub) only what was read is
    compared.

    Args:
        references: one source, or {"search": ..., "recovery": ..., "report": ...}; see `load_documents`.
        tokenizer: the dense model's.
        sequence_length: T, tokens of a sequence.
        num_sequences: N for each of the three splits; 0 gives an empty set.
        per_document: at most this many sequences from one document.
        text_column: as in `load_documents`.
        limit: as in `load_documents`; for each source.
        progress: as in `load_documents`.

    Raises:
        DataError: too few tokens, overlapping sources, or a source that cannot be read.
    """
    if sequence_length < 1 or per_document < 1:
        raise DataError(
            f"sequence_length and per_document are at least 1, not {sequence_length} and {per_document}."
        )
    for what, given in (("num_sequences", num_sequences), ("data", references)):
        if isinstance(given, Mapping) and set(given) != set(SPLITS):
            raise DataError(
                f"{what} names exactly {', '.join(SPLITS)}, not {', '.join(sorted(given)) or 'nothing'}."
            )
    for name in SPLITS:
        if num_sequences[name] < 0:
            raise DataError(f"num_sequences of {name} is at least 0, not {num_sequences[name]}.")

    front = front_of(tokenizer)
    if sequence_length <= len(front):
        raise DataError(
            f"sequence_length must be above {len(front)}, the tokens that this model's tokenizer puts in front of a "
            f"text; got {sequence_length}."
        )
    if isinstance(references, str):
        by_hash = _by_hash(
            load_documents(references, text_column=text_column, limit=limit, progress=progress)
        )
        pools = {
            name: {key: text for key, text in by_hash.items() if split_of(key) == name} for name in SPLITS
        }
        source_of = dict.fromkeys(SPLITS, references)
    else:
        source_of = dict(references)
        pools = {
            name: _by_hash(load_documents(source, text_column=text_column, limit=limit, progress=progress))
            for name, source in source_of.items()
        }
        _check_disjoint(
            {
                name: [
                    key for key, text in pool.items() if len(text.encode()) >= sequence_length - len(front)
                ]
                for name, pool in pools.items()
                if num_sequences[name]
            }
        )
    sets = {
        name: _token_set(
            name, source_of[name], pools[name], tokenizer, sequence_length, num_sequences[name], per_document
        )
        for name in SPLITS
    }
    return Splits(sets["search"], sets["recovery"], sets["report"])


def _by_hash(documents: Iterable[str]) -> dict[str, str]:
    """Texts by the sha256 of their UTF-8, in ascending order of it."""
    return dict(sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in documents))


def _token_set(
    name: str,
    source: str,
    pool: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_sequences: int,
    per_document: int,
) -> TokenSet:
    front = front_of(tokenizer)
    size = sequence_length - len(front)
    sequences: list[list[int]] = []
    document_of: list[int] = []
    used: list[str] = []
    for key, text in pool.items():
        if len(sequences) == num_sequences:
            break
        ids = _text_ids(tokenizer, text, front)
        for chunk in range(min(per_document, len(ids) // size, num_sequences - len(sequences))):
            sequences.append([*front, *ids[chunk * size : (chunk + 1) * size]])
            document_of.append(len(used))
        if document_of and document_of[-1] == len(used):
            used.append(key)
    if len(sequences) < num_sequences:
        raise DataError(
            f"{name}: {num_sequences} sequences of {sequence_length} tokens are wanted, but {source} gives "
            f"{len(sequences) or 'none'}: it has {count_of(len(pool))} in this split, and one gives at most "
            f"{per_document}. Ask for fewer or shorter sequences (splits.{name}, splits.sequence_length), or give "
            "more documents or longer ones. (In a single .txt file, two blank lines separate documents.)"
        )
    text_NT = torch.ones(num_sequences, sequence_length, dtype=torch.bool)
    text_NT[:, : len(front)] = False
    return TokenSet(
        name,
        torch.tensor(sequences, dtype=torch.int64).reshape(num_sequences, sequence_length),
        torch.tensor(document_of, dtype=torch.int64),
        tuple(used),
        text_NT,
    )
