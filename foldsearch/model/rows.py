"""Lines of text files and rows of tables, however they are stored, and the text that a row holds.

Text is UTF-8, or UTF-16 or UTF-32 that begins with a byte order mark; files may be compressed (.gz, .bz2, .xz, .zst).
JSON and CSV are read with the standard library, line by line: a damaged file is told by its line and its byte, rows may
differ in their columns, and nothing is written into a cache. (`datasets` infers one schema for all rows of a file,
tells neither, and keeps a copy of every table that it reads; it does read what it saved itself, and what is on the
hub.)
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from foldsearch.errors import DataError, quote_error
from foldsearch.paths import printable

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TEXT_COLUMNS = (
    "text",
    "messages",
    "conversations",
)  # in this order, where none is named; then prompt and completion

Row = Mapping[str, Any]
WriteChat = Callable[[list[dict[str, Any]]], str]
"""From the messages of a chat, role and content, to its text: a model's chat template."""

_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATORS = ",;\t|"
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # other names of roles
_MOST_NAMES = 20  # columns that a message lists


def kind_of(path: Path) -> tuple[str, str]:
    """What a file's name says of it: the suffix of what it holds, and that of its compression ("" if it has none)."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else ""
    return (suffixes[-1] if suffixes else ""), packed


# ------------------------------------------------------------------------------------------------------------ lines


@contextmanager
def readable(where: object) -> Iterator[None]:
    """What cannot be read is told in words, with its name."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(quote_error(f"{printable(where)}: cannot be read", error)) from error


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed."""
    packed = kind_of(path)[1]
    if packed == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            yield io.BufferedReader(cast("Any", stream))
        return
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with openers.get(packed, open)(path, "rb") as file:
        yield file


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends, decompressed, without byte order marks.

    Raises:
        DataError: it cannot be read, or is not text; names the byte and the line.
    """
    with readable(path), opened(path) as file:
        first = file.readline()
        for mark, encoding in _MARKS:
            if first.startswith(mark):
                yield from io.StringIO(_decoded(first + file.read(), path, 0, 1, encoding), newline="\n")
                return
        offset = 0
        for number, line in enumerate(chain([first], file), start=1):
            text = _decoded(line, path, offset, number)
            offset += len(line)
            yield text


def _decoded(data: bytes, path: Path, offset: int, line: int, encoding: str = "utf-8") -> str:
    """Some bytes of a file as text; offset, line: where in the file they begin."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-8" if encoding == "utf-8" else f"{encoding.upper()}, as its byte order mark says"
        raise DataError(
            f"{printable(path)}: text must be {name}, but the byte at {offset + error.start} (line {line}) is not "
            f"({error.reason}). Convert it first, for example: iconv -f LATIN1 -t UTF-8"
        ) from error
    if (place := text.find("\0")) >= 0:
        before = len(text[:place].encode(encoding))
        raise DataError(
            f"{printable(path)}: text has no zero byte, but the byte at {offset + before} (line {line}) is one. Save "
            "it as UTF-8, if it is text in another encoding."
        )
    return text.replace("\ufeff", "")


# ------------------------------------------------------------------------------------------------------------- rows


def rows_of(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a table, each with the place that it is named by in messages.

    Args:
        path: of the file.
        column: whose text is wanted (see `text_of`); others are left out where that saves reading them.

    Raises:
        DataError: the file is damaged, or not what its name says.
    """
    kind, packed = kind_of(path)
    if packed and kind in (".parquet", ".arrow"):
        raise DataError(
            f"{printable(path)}: a {kind} file is read as it is, not compressed once more ({packed}). Unpack it first."
        )
    if kind == ".parquet":
        return _rows_of_parquet(path, column)
    if kind == ".arrow":
        return _rows_of_arrow(path)
    if kind == ".json":
        return _rows_of_json(path)
    if kind in (".csv", ".tsv"):
        return _rows_of_csv(path, "\t" if kind == ".tsv" else None)
    return _rows_of_json_lines(path, lines_of(path))


def _rows_of_json_lines(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{printable(path)}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter: nested too deeply
            raise DataError(quote_error(f"{where}: each line is one JSON object, but", error)) from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: each line is one JSON object, not {type(row).__name__}.")
        yield where, row


def _rows_of_json(path: Path) -> Iterator[tuple[str, Any]]:
    """An array of rows, an object that holds them, or, as some files have it, a row a line."""
    lines = list(lines_of(path))
    try:
        value = json.loads("".join(lines))
    except (ValueError, RecursionError) as error:
        if _is_row(next((line for line in lines if line.strip()), "")):
            yield from _rows_of_json_lines(path, iter(lines))
            return
        raise DataError(quote_error(f"{printable(path)}: not JSON", error)) from error
    for number, row in enumerate(_rows_in(value, path), start=1):
        if not isinstance(row, (dict, str)):
            raise DataError(
                f"{printable(path)}, row {number}: a row is an object, or a text alone, not {type(row).__name__}."
            )
        yield f"{printable(path)}, row {number}", row


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows_in(value: Any, path: Path) -> list[Any]:
    """The rows of a JSON file that is one value: a list; an object of columns, of one list, of rows; or one row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(
            f"{printable(path)}: a JSON file of texts is a list of rows, or an object that holds them; got "
            f"{_kind(value)}."
        )
    members = list(value.values())
    if any(map(_is_chat, members)):
        return [value]
    if columns := _columns(members):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    tables = [member for member in members if isinstance(member, list) and _are(dict, member)]
    if len(tables) == 1:  # {"version": "1", "data": [...]}
        return tables[0]
    return members if _are(dict, members) else [value]


def _columns(members: list[Any]) -> list[list[Any]]:
    """The cells of an object of columns: lists of one length, or objects by row number, as pandas writes them."""
    if _are(dict, members):
        same = len({tuple(member) for member in members}) == 1
        return [list(m.values()) for m in members] if same and all(map(str.isdigit, members[0])) else []
    same = _are(list, members) and len({len(member) for member in members}) == 1
    # Lists of objects alone are tables; beside a list of texts or numbers they are a column of objects.
    return members if same and not all(_are(dict, member) for member in members) else []


def _are(kind: type, values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, kind) for value in values)


def _rows_of_csv(path: Path, separator: str | None) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a cell may be a book; the limit is the process's, of no use to us
    lines = lines_of(path)
    first = next(lines, "")
    separator = separator or max(_SEPARATORS, key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        for cells in reader:
            where = f"{printable(path)}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{where}: a row must have the {len(names)} fields of the first line ({_listed(names)}); got "
                    f"{len(cells)}. A text that holds the separator {separator!r} or a line break stands in quotes."
                )
            yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        what = f"{printable(path)}, line {reader.line_num}: not CSV"
        raise DataError(quote_error(what, error, "A quote inside a quoted text is written twice.")) from error


def _rows_of_parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with _arrow_errors(path, "Parquet"), pyarrow.parquet.ParquetFile(path) as file:
        batches = file.iter_batches(1024, columns=_wanted(file.schema_arrow.names, column))
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))


def _rows_of_arrow(path: Path) -> Iterator[tuple[str, Any]]:
    """A stream, as `datasets` writes it, or a file (Feather)."""
    import pyarrow.ipc

    with _arrow_errors(path, "Arrow"), pyarrow.memory_map(str(path)) as source:
        try:
            batches = iter(pyarrow.ipc.open_stream(source))
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        yield from _numbered(path, (row for batch in batches for row in batch.to_pylist()))


@contextmanager
def _arrow_errors(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except DataError:  # is a ValueError too
        raise
    # Texts and dates that are none are found when they are read.
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        what = f"{printable(path)}: not a readable {kind} file"
        raise DataError(quote_error(what, error, "If it is damaged, fetch it again.")) from error


def _numbered(where: object, rows: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, start=1):
        yield f"{printable(where)}, row {number}", row


def _wanted(names: Sequence[str], column: str | None) -> list[str]:
    """The columns that may hold the text; all of them if none may, so that a message can list what is there."""
    if column is not None:
        asked = {column, column.partition(".")[0]}
    elif not (asked := set(TEXT_COLUMNS).intersection(names)) and {"prompt", "completion"} <= set(names):
        asked = {"prompt", "completion"}
    return [name for name in names if name in asked] or list(names)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` made a folder: of one data set, or of its splits."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def rows_of_saved(folder: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of what `save_to_disk` wrote; of several splits those of "train". See `rows_of`."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        what = f"{printable(folder)}: not a readable data set of `save_to_disk`"
        raise DataError(quote_error(what, error, "If it is damaged, save it again.")) from error
    if isinstance(found, datasets.DatasetDict):
        names = list(found)
        if "train" not in names and len(names) != 1:
            raise DataError(
                f"{printable(folder)}: it holds the splits {_listed(names)}, and none is called train. Name the folder "
                f"of one, such as {printable(folder / names[0])}."
            )
        found = found["train" if "train" in names else names[0]]
    yield from _numbered(folder, iter(found.select_columns(_wanted(found.column_names, column))))


# ------------------------------------------------------------------------------------------------- the text of a row


def text_of(row: Any, column: str | None, write_chat: WriteChat | None, where: str) -> str:
    """The text that a row holds: that of a column, or a chat as the model writes it.

    Args:
        row: columns by name; or a text alone.
        column: its name, dotted where it is nested ("answer.text"). None is the first of `TEXT_COLUMNS` that is there,
            or prompt and completion together.
        write_chat: None where the model has no chat template.
        where: the row's place, for messages.

    Raises:
        DataError: there is no such column, it holds neither text nor a chat, or the model cannot write the chat.
    """
    if isinstance(row, str) and column is None:
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row has columns by name, but it is {_kind(row)}. Leave text_column out.")
    if column is None:
        named = next((name for name in TEXT_COLUMNS if name in row), None)
        if named is None and {"prompt", "completion"} <= row.keys():
            return _prompt_and_completion(row, write_chat, where)
        column = named or TEXT_COLUMNS[0]
    return _written(_cell(row, column, where), repr(column), write_chat, where)


def _prompt_and_completion(row: Row, write_chat: WriteChat | None, where: str) -> str:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _written([*prompt, *completion], "'prompt' and 'completion'", write_chat, where)
    return "".join(_written(row[name], repr(name), None, where) for name in ("prompt", "completion"))


def _cell(row: Row, column: str, where: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = [
                name
                for key, inner in row.items()
                for name in (
                    [f"{key}.{part}" for part in inner] if isinstance(inner, Mapping) else [str(key)]
                )
            ]
            raise DataError(
                f"{where}: there is no {column!r}, only {_listed(names)}. Name the one that holds the text: "
                "--text-column on the command line, text_column in a study."
            )
        value = value[part]
    return value


def _written(value: Any, what: str, write_chat: WriteChat | None, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not _is_chat(value):
        raise DataError(
            f"{where}: {what} must hold text, or a chat (a list of messages with role and content), not "
            f"{_kind(value)}. Name another text_column (--text-column)."
        )
    if write_chat is None:
        raise DataError(
            f"{where}: {what} holds a chat, but this model's tokenizer has no chat template to write it with. Take a "
            "model that has one (its name mostly ends in instruct, chat or it), or a column of text (--text-column)."
        )
    try:
        return write_chat([_message(message) for message in value])
    except Exception as error:
        raise DataError(
            quote_error(
                f"{where}: the model's chat template does not take this chat",
                error,
                "Mend its roles or their order, or leave it out.",
            )
        ) from error


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, Mapping)
            and ("content" in message or "value" in message)
            and ("role" in message or "from" in message)
            for message in value
        )
    )


def _message(message: Row) -> dict[str, Any]:
    """A message as chat templates read it; ShareGPT's tables say from and value."""
    if "role" in message and "content" in message:
        return {key: value for key, value in message.items() if value is not None or key == "content"}
    role = message.get("role", message.get("from"))
    return {"role": _SHAREGPT.get(role, role), "content": message.get("content", message.get("value"))}


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:_MOST_NAMES]]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (", ".join(shown) + more) or "nothing"


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__
