"""Every error foldsearch raises on purpose.

    FoldsearchError
    ├── InputError (also a ValueError)   what a person gave cannot be used: the command line exits with 2
    │   ├── PlanError      a fold plan breaks a law, or its text cannot be read
    │   ├── SpecError      a study or a space file is wrong (all its faults at once)
    │   ├── BudgetError    no plan can meet the budget
    │   ├── ModelError     the model cannot be found, read, or folded
    │   ├── DataError      the text cannot be found, read, or split
    │   └── RunError       a run folder is not what it should be
    └── VerificationError  an export is not the model that was measured: the command line exits with 1

Messages state the law, the value, and the remedy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Protocol, TypeVar


class FoldsearchError(Exception):
    """Root of all errors raised on purpose by foldsearch."""


class InputError(FoldsearchError, ValueError):
    """What a person gave cannot be used; the message names the remedy."""


class PlanError(InputError):
    """A fold plan breaks a law, or its text form cannot be read."""


class SpecError(InputError):
    """A study or space file is wrong; the message lists every fault found."""


class BudgetError(InputError):
    """No plan of the space can meet the budget."""


class ModelError(InputError):
    """The dense model cannot be found, read or folded."""


class DataError(InputError):
    """The text cannot be found, read or split."""


class RunError(InputError):
    """A run folder is missing, incomplete, or belongs to another study or version."""


class VerificationError(FoldsearchError):
    """An exported model differs from the model that was measured."""


# ---- a name that must be one of a list's


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=_Named)


def find_named(items: Iterable[Item], name: str, what: str, error: type[InputError] = PlanError) -> Item:
    """The item of a list that has this name.

    Args:
        items: of the list.
        name: as a person wrote it.
        what: an item is, for the message: "a criterion".
        error: raised where there is none.

    Raises:
        InputError: the list has no such name, as `error`; the message has all names, and the nearest one.
    """
    known = {item.name: item for item in items}
    if name in known:
        return known[name]
    near = nearest(name, known) or " Name one of these."
    raise error(f"{what} is one of {', '.join(known)}; got '{name}'.{near}")


def nearest(word: str, known: Iterable[str], *, most: int = 1) -> str:
    """A question that names the nearest of the known words, with a space before it; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


# ---- memory

_ASKED = re.compile(r"tried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that memory is full, of the machine or of a device; torch has no one type for it."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in words
        or "CUDA out of memory" in words
    )


def bytes_asked(error: BaseException) -> str:
    """How much memory was asked for when there was none, as the error says it; empty where it does not."""
    found = _ASKED.search(str(error))
    return found[1] if found else ""


# ---- the words of a library's error

MOST_LINES = 20  # of an error's words; a trace of a worker process has hundreds
MOST_CHARACTERS = 500  # of a line; a parser may quote the whole file
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]"
)  # colours and cursor moves of a terminal


def describe_error(error: BaseException) -> str:
    """All that an error says: its type, every line of its words, its notes, and the errors that it came from.

    The lines after the first one are indented. A cause whose words were said already is left out. The whole has at
    most `MOST_LINES` lines: where there are more, the first and the last ones, and how many are missing between them.
    """
    lines = _lines_of(error, "", set())
    if len(lines) > MOST_LINES:
        first = MOST_LINES // 2
        last = MOST_LINES - first - 1
        missing = f"... ({len(lines) - first - last:,} more lines)"
        lines = [*lines[:first], missing, *lines[-last:]]
    return "\n".join([lines[0], *(f"  {line}" for line in lines[1:])])


def last_lines(text: str) -> str:
    """The last `MOST_LINES` lines of what a process said, the first of them marked where there were more."""
    lines = _clean(text)
    more = len(lines) - MOST_LINES
    shown = lines if more <= 0 else [f"... ({more + 1:,} more lines)", *lines[more + 1 :]]
    return "\n".join(map(_cut, shown))


def quote_error(what: str, error: BaseException, remedy: str = "") -> str:
    """A message: what happened, the words of the error that tells why, and the remedy.

    It is one line where the error has one line; else the error's lines are indented, and the remedy stands below them.
    """
    words = describe_error(error)
    if "\n" not in words:
        end = "" if words.endswith((".", "!", "?")) else "."
        return f"{what}: {words}{end} {remedy}".rstrip()
    indented = "\n".join(f"  {line}" for line in words.splitlines())
    return f"{what}:\n{indented}\n{remedy}".rstrip()


def _lines_of(error: BaseException, relation: str, seen: set[int]) -> list[str]:
    """The lines of an error, then those of its causes, each after how it relates to the one before."""
    lines: list[str] = []
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:  # a chain may lead back to itself
        seen.add(id(cause))
        words = _words_of(cause)
        # many errors quote the one that they were raised from
        if not lines or not words or _plain(words) not in _plain("\n".join(lines)):
            # the messages of our own errors are written for people, who need no type
            kind = "" if isinstance(cause, FoldsearchError) and words else type(cause).__name__
            own = ": ".join(filter(None, (kind, words))).splitlines()
            lines += [
                f"{relation}{_cut(own[0])}",
                *(("  " if relation else "") + _cut(line) for line in own[1:]),
            ]
        for number, inner in enumerate(getattr(cause, "exceptions", ())):  # an ExceptionGroup's
            if isinstance(inner, BaseException):
                lines += _lines_of(inner, f"{number + 1}. ", seen)
        if cause.__cause__ is not None or cause.__suppress_context__:
            relation, cause = "caused by ", cause.__cause__
        else:
            relation, cause = "raised after ", cause.__context__
    return lines


def _words_of(error: BaseException) -> str:
    """The words and notes of one error, without its type, its number, empty lines and what a terminal would obey."""
    words = str(error)
    if isinstance(error, OSError) and error.strerror:
        words = f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    return "\n".join(_clean("\n".join([words, *getattr(error, "__notes__", ())]))).lstrip()


def _clean(text: str) -> list[str]:
    """Lines that say something, without what a terminal would obey."""
    return [line for line in (_CONTROL.sub("", line).rstrip() for line in text.splitlines()) if line]


def _cut(line: str) -> str:
    more = len(line) - MOST_CHARACTERS
    return line if more <= 0 else f"{line[:MOST_CHARACTERS]}... ({more:,} more characters)"


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
