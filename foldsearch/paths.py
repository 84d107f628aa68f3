"""Paths are data: how they are shown in a message, typed in a command, and kept within what file systems take."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from pathlib import Path

from foldsearch.errors import InputError

MOST_NAME_BYTES = 255  # of one part of a path, on every common file system
MOST_PATH_BYTES = 3800  # Linux takes 4,095; what is written below a folder needs the rest
_LONGEST_BESIDE = 150  # bytes of a name that a name beside it repeats


def printable(path: object) -> str:
    """A path, or a name that may hold one, on one line: a character that does not print is written as an escape."""
    return "".join(char if char.isprintable() else _escaped(char) for char in str(path))


def command(verb: str, *words: str | Path) -> str:
    """A `foldsearch` command as one line that can be pasted into a shell.

    Args:
        verb: of the command.
        words: what follows it. A `Path` is never taken for an option.
    """
    return " ".join(["foldsearch", verb, *map(_word, words)])


def check_path(path: Path, what: str = "a path") -> None:
    """Refuse what no part of a run could write down: the Optuna study, Ray and JSON take text only.

    Args:
        path: as it was given.
        what: it is, for the message; such as "--out".

    Raises:
        InputError: the path is not UTF-8, or longer than a file system takes.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} must be UTF-8 text; got '{printable(path)}'. Choose another name."
        ) from error
    size = len(os.fsencode(path.absolute()))
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > MOST_NAME_BYTES or size > MOST_PATH_BYTES:
        long, most = (longest, MOST_NAME_BYTES) if longest > MOST_NAME_BYTES else (size, MOST_PATH_BYTES)
        part = "in each of its names" if longest > MOST_NAME_BYTES else "in all"
        start = printable(path)[:60]
        raise InputError(
            f"{what} must have at most {most:,} bytes {part}; got {long:,}: '{start}...'. Choose a shorter one."
        )


def local(text: str) -> Path:
    """The path that a reference names on this machine: as it is, else with `~` for a home folder.

    Quoted, as in a study, no shell has put the home folder in its place; but a folder may also be called `~x`.
    """
    path = Path(text)
    if text.startswith("~") and not os.path.lexists(path):
        with suppress(RuntimeError):  # nobody of this name, or no home
            return path.expanduser()
    return path


def beside(path: Path, ending: str) -> Path:
    """A hidden name beside `path` for what is not finished, of this process alone; as long as a name may be.

    Args:
        path: what it will become.
        ending: of the name, such as "tmp".
    """
    return path.with_name(f"{stem_beside(path)}{os.getpid()}.{ending}")


def stem_beside(path: Path) -> str:
    """How the names of `beside` begin, whichever process they are of."""
    name = os.fsencode(path.name)[:_LONGEST_BESIDE].decode(errors="ignore")
    return f".{name}."


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # how Python holds a byte of a name that is not UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def _word(word: str | Path) -> str:
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    if text.isprintable():
        return shlex.quote(text)
    # Line breaks would end the command, and bytes that are no text could not be copied: bash and zsh read $'...'.
    quoted = re.sub(r"[\\']", r"\\\g<0>", text)
    return "$'" + "".join(c if c.isprintable() else _octal(c) for c in quoted) + "'"


def _octal(char: str) -> str:
    # Octal escapes end after three digits, whatever follows; those of \x would take a letter that follows.
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
