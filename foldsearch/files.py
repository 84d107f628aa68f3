"""Files that are whole or absent, and locks."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foldsearch.errors import InputError
from foldsearch.paths import beside, printable, stem_beside

ABANDONED_SECONDS = 24 * 3600
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of a file (ulimit -f)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a full disk; some libraries say it only in words."""
    while error is not None:
        words = str(error)
        if (
            getattr(error, "errno", None) in _FULL
            or "No space left on device" in words
            or "File too large" in words
            or "disk is full" in words
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: readers see all of it or nothing.

    The temporary file goes when writing fails (a full disk, say); one that a killed process left goes with the next
    writing of the same path, once it is a day old.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(stem_beside(path))}*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()
    temporary = beside(path, "tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def scratch(what: str) -> Iterator[Path]:
    """A temporary folder, which goes at the end.

    Args:
        what: a word for its name.

    Raises:
        InputError: there is no place for it, or its disk is full.
    """
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise InputError(
            "a folder for temporary files is needed, but there is none that can be written to. Set TMPDIR to one."
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix=f"foldsearch-{what}-") as name:
            yield Path(name)
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise InputError(
            f"the folder of temporary files, {printable(place)}, has no room left. Make room there, or set TMPDIR to "
            "another folder."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, whole or not at all."""
    replace_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1)))


def check_writable(place: Path, what: str, remedy: str = "Choose another place.") -> None:
    """Whether something new can be written at a place, as far as can be known without leaving anything there.

    Args:
        place: a file or a folder, there or not.
        what: it is, for the message.
        remedy: the sentence that ends it.

    Raises:
        InputError: it cannot.
    """
    above = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    reason = "" if above.is_dir() else "is a file"
    if not reason:
        try:
            tempfile.TemporaryFile(
                dir=above
            ).close()  # permission bits do not tell: root has none, file systems refuse
        except OSError as error:
            reason = f"cannot be written to ({error.strerror})"
    if reason:
        raise InputError(
            f"{what} must be in a folder that can be written to, but '{printable(above)}' {reason}. {remedy}"
        )


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock file `path`: one process at a time; the kernel lets go when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
