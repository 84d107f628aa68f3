"""Documents become the search, recovery and report token sets: dealt to the splits, then cut or packed into sequences.

**Dealing.** Of one source, or several together, the text of a document alone decides which set it belongs to
(`split_of`), so it is the same in every run, and more data never moves a document to another set. Only where a set
would get fewer than two documents so, the borders between the sets are moved just as far as that takes. A document
that occurs twice counts once, white space around it aside.

**Cutting.** A sequence is what the tokenizer puts in front of a text (see tokens.py), then as many tokens of a document
as fill it. Documents are taken in ascending order of their hash (a fixed shuffle), from each the first `per_document`
sequences, until there are enough. Where there are not, in this order:

1. Documents too short for a sequence, which are passed over till then, are *packed*: one after the other, each begun as
   the tokenizer begins a text, with its end token between two, until a sequence is full. The last one in it is cut, the
   rest of that one is lost. So a document lies in one sequence only, and what is packed together is one cluster of the
   standard errors. A document is read with those before it in view; what is between two of them is not scored.
2. More sequences are taken of each document that has them.
3. There are fewer sequences than asked for, at least two from different documents.

Each of these is told.

**Mixtures and kinds.** Documents that give sequences together are a *part*: those of a source with a weight, else those
of a kind of text where kinds are named, else those of all sources. Each part gives its share of the sequences of every
set, by its weight; without weights the parts are equal. All documents of a part, and so all of a sequence, are of one
kind. Where kinds are named, each of them has documents enough for its share. A kind that is *unseen* gives its share of
the report set, and nothing to the two others; what is dealt to those is not used.

Shapes: N sequences, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from foldsearch.errors import DataError
from foldsearch.model.rows import WriteChat
from foldsearch.model.text import Source, count_of, load_documents, own_name
from foldsearch.model.tokens import (
    SPLITS,
    Kinds,
    Over,
    Splits,
    TokenSet,
    as_parts,
    check_disjoint,
    front_of,
    reads_parts,
    tells_time,
    text_ids,
)
from foldsearch.paths import printable
from foldsearch.progress import Notice, unheard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LEAST", "Data", "SplitRules", "make_splits", "split_of"]

# In front of a chat template that writes today's date: a text is the same on every day.
SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
LEAST = 2  # sequences of a split, from different documents: one alone has no standard error
Sources = str | Source | Sequence[str | Source]
Data = Sources | Mapping[str, Sources]
Pool = dict[str, str]  # texts by their hash, in ascending order of it


def split_of(document_hash: str) -> str:
    """The split of a document by the sha256 (hex) of its text: 1 in 5 search, 1 in 5 report, the rest recovery."""
    u = int(document_hash[:16], 16) / 2**64
    return "search" if u < 0.2 else "report" if u < 0.4 else "recovery"


@dataclass(frozen=True, slots=True)
class SplitRules:
    """By which rules text becomes token sets.

    sequence_length: T, tokens of a sequence. num_sequences: N for each of the three splits; 0 gives an empty set.
    per_document: at most this many sequences from one document, where there are documents enough.
    limit: as in `load_documents`; for each source. unseen: kinds of text that are in the report set only.
    over: how one KL is made of those of several kinds, see `Kinds`.

    Raises:
        DataError: a number is out of its range, or a split is not named.
    """

    sequence_length: int
    num_sequences: Mapping[str, int]
    per_document: int = 2
    limit: int | None = None
    unseen: Sequence[str] = ()
    over: Over = "mean"

    def __post_init__(self) -> None:
        if self.sequence_length < 1 or self.per_document < 1:
            raise DataError(
                f"sequence_length and per_document are at least 1, not {self.sequence_length} and {self.per_document}."
            )
        _check_names("num_sequences", self.num_sequences)
        for name in SPLITS:
            if self.num_sequences[name] < 0:
                raise DataError(f"num_sequences of {name} is at least 0, not {self.num_sequences[name]}.")


def make_splits(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    rules: SplitRules,
    *,
    progress: Notice = unheard,
    notice: Notice = unheard,
) -> Splits:
    """Token sets for search, recovery and report, no document in two of them; see the module's docstring.

    Sources of their own for each of the three are used whole. They have no document in common, used or not; one that is
    too short for a sequence may be in several, and is then left to the first of search, report and recovery. Of a
    source that is read in part (`limit`, a data set of the hub) only what was read is compared.

    Args:
        data: one source, or several, or those of each split by its name.
        tokenizer: the dense model's.
        rules: how much text, and which.
        progress: told, in words, what takes time.
        notice: told, in words, where a set is not as it was asked for.

    Raises:
        DataError: too few tokens, overlapping sources, or a source that cannot be read.
    """
    cutter = _Cutter(tokenizer, rules.sequence_length)

    def load(sources: Sources) -> list[_Part]:
        return _load(sources, tokenizer, rules.limit, progress)

    if isinstance(data, Mapping):
        _check_names("data", data)
        parts = {name: load(data[name]) if data[name] or rules.num_sequences[name] else [] for name in SPLITS}
        _part_from_others({name: of for name, of in parts.items() if rules.num_sequences[name]}, cutter)
    else:
        dealt = [part.dealt(notice) for part in load(data)]
        parts = {name: [part[name] for part in dealt] for name in SPLITS}
    for name in ("search", "recovery"):
        parts[name] = [part for part in parts[name] if part.kind not in rules.unseen]
    names = dict.fromkeys(part.kind for name in SPLITS for part in parts[name])
    if missing := [kind for kind in rules.unseen if kind not in names]:
        raise DataError(
            f"an unseen kind must be one of {', '.join(names)}; got {', '.join(missing)}. Name kinds of the text."
        )
    kinds = Kinds(tuple(names), unseen=tuple(rules.unseen), over=rules.over)
    sets = {
        name: _token_set(
            parts[name], cutter, _Wanted(name, rules.num_sequences[name], rules.per_document, kinds), notice
        )
        for name in SPLITS
    }
    return Splits(sets["search"], sets["recovery"], sets["report"])


def _check_names(what: str, given: Mapping[str, object]) -> None:
    if set(given) != set(SPLITS):
        raise DataError(
            f"{what} names exactly {', '.join(SPLITS)}, not {', '.join(sorted(given)) or 'nothing'}."
        )


# ---------------------------------------------------------------------------------------------------------- dealing


@dataclass(slots=True)
class _Part:
    """Documents that give sequences together; see the module's docstring.

    kind: of text. is_named: whether somebody named the kind, and so asks for figures of it. left_out: how many
    documents were, because another split has them too.
    """

    name: str
    weight: float
    pool: Pool
    kind: str
    is_named: bool = False
    left_out: int = 0

    def dealt(self, tell: Notice) -> dict[str, _Part]:
        """The documents of each split."""
        keys = list(self.pool)  # ascending, so the splits follow one another
        num = dict.fromkeys(SPLITS, 0)
        for key in keys:
            num[split_of(key)] += 1
        if min(num.values()) < LEAST and len(keys) >= LEAST * len(SPLITS):
            num["search"] = min(max(num["search"], LEAST), len(keys) - 2 * LEAST)
            num["report"] = min(max(num["report"], LEAST), len(keys) - num["search"] - LEAST)
            num["recovery"] = len(keys) - num["search"] - num["report"]
            shown = ", ".join(f"{name} {num[name]}" for name in SPLITS)
            tell(
                f"{self.name}: by their hashes, a set would get fewer than {LEAST} of {count_of(len(keys))}, so "
                f"they are dealt by number: {shown}."
            )
        found: dict[str, _Part] = {}
        start = 0
        for name in ("search", "report", "recovery"):
            taken = keys[start : start + num[name]]
            start += num[name]
            found[name] = replace(self, pool={key: self.pool[key] for key in taken})
        return found


def _load(
    sources: Sources, tokenizer: PreTrainedTokenizerBase, limit: int | None, progress: Notice
) -> list[_Part]:
    """The parts of the sources; no document is in two of them."""
    given = [sources] if isinstance(sources, str | Source) else list(sources)
    every = [Source(one) if isinstance(one, str) else one for one in given]
    if not every:
        raise DataError("data names at least one source of text, but the list is empty.")
    weights = [source.weight for source in every if source.weight is not None]
    if weights and len(weights) < len(every):
        raise DataError(
            f"either every source of a mixture has a weight or none, but {len(weights)} of {len(every)} have one. Give "
            "the others a weight too."
        )
    known: set[str] = set()
    parts = []
    for source in every:
        texts = load_documents(source, write_chat=_chat_writer(tokenizer), limit=limit, progress=progress)
        pool = {key: text for key, text in _by_hash(texts).items() if key not in known}
        known |= pool.keys()
        name, kind = printable(source.reference), source.kind or own_name(source.reference)
        parts.append(_Part(name, source.weight or 1.0, pool, kind, bool(source.kind)))
    if weights or len(parts) == 1:
        return parts
    if not any(part.is_named for part in parts):
        return [_together(parts, ", ".join(part.name for part in parts))]
    return [_together([part for part in parts if part.kind == kind], kind) for kind in _kinds_of(parts)]


def _together(parts: Sequence[_Part], kind: str) -> _Part:
    """One part of several."""
    pool = dict(sorted(item for part in parts for item in part.pool.items()))
    name = ", ".join(part.name for part in parts)
    return _Part(name, 1.0, pool, kind, any(part.is_named for part in parts))


def _kinds_of(parts: Iterable[_Part]) -> list[str]:
    return list(dict.fromkeys(part.kind for part in parts))


def _by_hash(documents: Iterable[str]) -> Pool:
    """Texts by the sha256 of their UTF-8, white space around them aside."""
    found: Pool = {}
    for text in documents:
        same = unicodedata.normalize("NFC", text.strip())
        found.setdefault(hashlib.sha256(same.encode()).hexdigest(), text)
    return dict(sorted(found.items()))


def _chat_writer(tokenizer: PreTrainedTokenizerBase) -> WriteChat | None:
    if not tokenizer.chat_template:
        return None
    in_parts = reads_parts(tokenizer)

    def write(messages: list[dict[str, Any]]) -> str:
        held = as_parts(messages) if in_parts else messages
        template = tokenizer.get_chat_template()  # refused where there are several and no default
        if tells_time(tokenizer):
            template = SAME_DAY + template
        return str(tokenizer.apply_chat_template(held, tokenize=False, chat_template=template))

    return write


def _part_from_others(parts: dict[str, list[_Part]], cutter: _Cutter) -> None:
    """Refuse long documents that two splits have in common; leave short ones to the first split that has them."""
    texts = {key: text for of in parts.values() for part in of for key, text in part.pool.items()}
    keys = {name: [key for part in of for key in part.pool] for name, of in parts.items()}
    num = Counter(key for of in keys.values() for key in of)  # of splits: no document is in two parts of one
    long = {key for key, count in num.items() if count > 1 and cutter.fills(texts[key])}
    check_disjoint({name: long.intersection(of) for name, of in keys.items()})
    taken: set[str] = set()
    for name in ("search", "report", "recovery"):
        for part in parts.get(name, ()):
            before = len(part.pool)
            part.pool = {key: text for key, text in part.pool.items() if key not in taken}
            part.left_out = before - len(part.pool)
        taken.update(keys.get(name, ()))


def _may_fill(text: str, size: int) -> bool:
    """Whether a text may have so many tokens: each is a byte at least, but for a space that some put in front."""
    return len(text.encode()) + 1 >= size


# ---------------------------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sequence: its ids, which of them are of a text, and the hashes of its documents."""

    ids: list[int]
    of_text: list[bool]
    documents: tuple[str, ...]


class _Cutter:
    """Makes sequences of documents, for one tokenizer and one length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer = tokenizer
        self.length = length
        self._front = front_of(tokenizer)
        if length <= len(self._front):
            raise DataError(
                f"sequence_length must be above {len(self._front)}, the tokens that this model's tokenizer puts in "
                f"front of a text; got {length}."
            )
        self.size = length - len(self._front)
        self._end = _end_of(tokenizer, self._front)

    def cut(self, pool: Pool, wanted: int, per_document: int) -> list[_Piece]:
        """At most so many sequences, by the rules of the module."""
        long: dict[str, list[int]] = {}
        short: dict[str, str] = {}
        count = 0
        for key, text in pool.items():
            if count >= wanted:
                break
            ids = self._ids(text) if _may_fill(text, self.size) else []
            if len(ids) < self.size:
                short[key] = text
            else:
                long[key] = ids[: wanted * self.size]
                count += min(per_document, len(ids) // self.size)
        packed = list(self._packed(short, wanted - count))
        most, fullest = per_document, max((len(ids) // self.size for ids in long.values()), default=0)
        while most < fullest and self._count(long, most) + len(packed) < wanted:
            most += 1
        cut = [
            self._piece(ids[chunk * self.size : (chunk + 1) * self.size], key)
            for key, ids in long.items()
            for chunk in range(min(most, len(ids) // self.size))
        ]
        # in the order of their hashes, so that the first ones are of every kind
        return sorted([*cut[: wanted - len(packed)], *packed], key=lambda piece: piece.documents[0])

    def fills(self, text: str) -> bool:
        """Whether a text has tokens for a sequence."""
        return _may_fill(text, self.size) and len(self._ids(text)) >= self.size

    def _count(self, long: Mapping[str, list[int]], most: int) -> int:
        return sum(min(most, len(ids) // self.size) for ids in long.values())

    def _ids(self, text: str) -> list[int]:
        return text_ids(self._tokenizer, text, self._front)

    def _piece(self, ids: list[int], key: str) -> _Piece:
        front = list(self._front)
        return _Piece(front + ids, [False] * len(front) + [True] * len(ids), (key,))

    def _packed(self, short: Mapping[str, str], wanted: int) -> Iterator[_Piece]:
        """At most so many full sequences of several short documents each."""
        made, page = 0, _Page(self.length, self._front, self._end)
        for key, text in short.items():
            if made >= wanted:
                return
            ids = self._ids(text)
            if not page.has_room:
                yield page.piece()
                made, page = made + 1, _Page(self.length, self._front, self._end)
            page.add(key, ids)
        if made < wanted and not page.has_room:
            yield page.piece()


@dataclass(slots=True)
class _Page:
    """A sequence that is being filled with short documents."""

    length: int
    front: tuple[int, ...]
    end: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    of_text: list[bool] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        """Whether a token of another document has a place."""
        return len(self.ids) + len(self._between()) < self.length

    def _between(self) -> tuple[int, ...]:
        """What stands before the next document: the end of the one before, if it has not ended itself; the front."""
        ended = not self.ids or tuple(self.ids[-len(self.end) :]) == self.end
        return self.front if ended else (*self.end, *self.front)

    def add(self, key: str, ids: list[int]) -> None:
        """Put a document behind those that are here, as much of it as has a place."""
        if ids:
            self._extend(self._between(), of_text=False)
            self._extend(ids, of_text=True)
            self.documents.append(key)

    def _extend(self, ids: Sequence[int], *, of_text: bool) -> None:
        taken = ids[: self.length - len(self.ids)]
        self.ids += taken
        self.of_text += [of_text] * len(taken)

    def piece(self) -> _Piece:
        """The sequence; where a document ended just before, what would come before the next one fills it."""
        self._extend(self._between(), of_text=False)
        return _Piece(self.ids, self.of_text, tuple(self.documents))


def _end_of(tokenizer: PreTrainedTokenizerBase, front: tuple[int, ...]) -> tuple[int, ...]:
    """What stands between a document and the front of the next one: an end token, or an empty line if there is none."""
    end = tokenizer.eos_token_id
    if isinstance(end, int):
        return () if end in front else (end,)
    return () if front else tuple(text_ids(tokenizer, "\n\n", front))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of a set: so many sequences, from each document at most so many where there are enough."""

    name: str
    sequences: int
    per_document: int
    kinds: Kinds

    def least(self, share: int) -> int:
        """From how many documents a share of the sequences has to be."""
        return min(LEAST, math.ceil(share / self.per_document))


def _token_set(parts: list[_Part], cutter: _Cutter, wanted: _Wanted, tell: Notice) -> TokenSet:
    shares = _shares([part.weight for part in parts], wanted.sequences)
    found = [
        cutter.cut(part.pool, share, wanted.per_document) for part, share in zip(parts, shares, strict=True)
    ]
    drawn = _interleaved(
        [[(piece, part.kind) for piece in of] for part, of in zip(parts, found, strict=True)]
    )
    pieces = [piece for piece, _ in drawn]
    # Pieces that share a document are of one cluster. A packed one shares none, so its first document stands for all.
    clusters = {key: index for index, key in enumerate(dict.fromkeys(piece.documents[0] for piece in pieces))}
    if len(clusters) < wanted.least(wanted.sequences):
        raise DataError(_too_few(wanted.name, parts, cutter.length, len(pieces)))
    if wanted.sequences:
        _check_kinds(parts, shares, found, cutter.length, wanted)
    for part, share, of in zip(parts, shares, found, strict=True):
        for words in _told(wanted.name, part, of, share, wanted.per_document):
            tell(words)
    others = [key for piece in pieces for key in piece.documents[1:]]
    of_N = torch.tensor([wanted.kinds.names.index(kind) for _, kind in drawn], dtype=torch.int64)
    return TokenSet(
        wanted.name,
        torch.tensor([piece.ids for piece in pieces], dtype=torch.int64).reshape(-1, cutter.length),
        torch.tensor([clusters[piece.documents[0]] for piece in pieces], dtype=torch.int64),
        (*clusters, *others),
        torch.tensor([piece.of_text for piece in pieces], dtype=torch.bool).reshape(-1, cutter.length),
        wanted.kinds.take(of_N),
    )


def _interleaved(of_parts: list[list[tuple[_Piece, str]]]) -> list[tuple[_Piece, str]]:
    """The pieces of all parts, so that the first ones of them, however many, are of every part in its share.

    In the order of their documents' hashes they would not be: of many documents those of the least hashes are drawn, so
    a part of few documents would come last.
    """
    placed = [
        ((index + 0.5) / len(of), one[0].documents[0], one) for of in of_parts for index, one in enumerate(of)
    ]
    return [one for _, _, one in sorted(placed, key=lambda place: place[:2])]


def _check_kinds(
    parts: list[_Part], shares: Sequence[int], found: list[list[_Piece]], length: int, wanted: _Wanted
) -> None:
    """Refuse a kind that was named and has no share of a set, or too few documents for its share."""
    if len(_kinds_of(parts)) == 1:
        return
    for kind in _kinds_of(part for part in parts if part.is_named):
        mine = [index for index, part in enumerate(parts) if part.kind == kind]
        share = sum(shares[index] for index in mine)
        documents = {piece.documents[0] for index in mine for piece in found[index]}
        if not share:
            raise DataError(
                f"{wanted.name}: each kind of text must have at least one sequence; got none of the kind '{kind}' "
                f"among {wanted.sequences}. Ask for more sequences (splits.{wanted.name}), or give it more weight."
            )
        if len(documents) < wanted.least(share):
            of_kind = [parts[index] for index in mine]
            pieces = sum(len(found[index]) for index in mine)
            raise DataError(f"the kind '{kind}': {_too_few(wanted.name, of_kind, length, pieces)}")


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers with this sum, as near to the weights as can be: the largest remainders are rounded up."""
    exact = [weight / sum(weights) * total for weight in weights]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: found[index] - exact[index])
    for index in by_remainder[: total - sum(found)]:
        found[index] += 1
    return found


def _told(name: str, part: _Part, found: list[_Piece], wanted: int, per_document: int) -> Iterator[str]:
    """What is not as it was asked for."""
    alone = [piece.documents[0] for piece in found if len(piece.documents) == 1]
    most = max((alone.count(key) for key in set(alone)), default=0)
    how = []
    if len(alone) < len(found):
        number = f"{len(found) - len(alone)} of them" if alone else "all"
        how.append(f"{number} packed from short documents")
    if most > per_document:
        how.append(f"up to {most} from one document")
    if part.left_out:
        how.append(f"without {count_of(part.left_out)} that another set has too")
    if len(found) < wanted:
        yield (
            f"{name}: {len(found)} sequences instead of {wanted}{''.join(f', {words}' for words in how)}: {part.name} "
            f"has no more text for it ({count_of(len(part.pool))})."
        )
    elif how:
        yield f"{name}: {len(found)} sequences of {part.name}, {', '.join(how)}."


def _too_few(name: str, parts: list[_Part], length: int, found: int) -> str:
    documents = sum(len(part.pool) for part in parts)
    source = ", ".join(part.name for part in parts)
    left_out = sum(part.left_out for part in parts)
    also = f" ({count_of(left_out)} more are in another set's source too)" if left_out else ""
    return (
        f"{name}: at least {LEAST} sequences of {length} tokens from different documents are needed, but {source} "
        f"gives {found or 'none'}: it has {count_of(documents)} in this split{also}. Ask for shorter sequences "
        "(splits.sequence_length), or give more documents or longer ones. In a single .txt file, two blank lines "
        "separate documents; if each line or each paragraph is one, say --sample-by line or paragraph (sample_by in a "
        "study)."
    )
