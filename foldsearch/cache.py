"""What is kept on this machine between runs: listed, measured, and removed.

An entry is one file or folder `KIND/KEY...`, where the key begins with 16 hex digits. Nothing else is ever counted or
removed, so a folder that is no cache stays as it is.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from foldsearch.errors import InputError
from foldsearch.paths import local, printable

_ENTRY = re.compile(r"[0-9a-f]{16,64}(-float32|-bfloat16|\.json|\.bin|\.safetensors)?")


def default_cache_dir() -> Path:
    """$FOLDSEARCH_CACHE, else $XDG_CACHE_HOME/foldsearch, else ~/.cache/foldsearch.

    Raises:
        InputError: none of them is known.
    """
    if chosen := os.environ.get("FOLDSEARCH_CACHE"):
        return local(chosen)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return local(xdg) / "foldsearch"
    try:
        return Path.home() / ".cache" / "foldsearch"
    except RuntimeError as error:
        raise InputError(
            "models are kept in a folder of this machine, but this user has no home folder. "
            "Set FOLDSEARCH_CACHE to a folder that can be written to."
        ) from error


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in the cache. used: seconds since 1970 when it was last read or written, as the disk tells."""

    kind: str
    path: Path
    size_bytes: int
    used: float

    @property
    def lock(self) -> Path:
        """What a process holds while it makes this entry: beside a folder its name with a dot before it."""
        if self.path.is_dir():
            return self.path.with_name(f".{self.path.name}.lock")
        return self.path.with_suffix(".lock")


def entries(cache_dir: Path) -> list[Entry]:
    """All entries, by kind and name; none where there is no such folder."""
    if not cache_dir.is_dir():
        return []
    return [
        _entry(path)
        for kind in sorted(cache_dir.iterdir())
        if kind.is_dir() and not kind.is_symlink()
        for path in sorted(kind.iterdir())
        if _ENTRY.fullmatch(path.name) and not path.is_symlink()
    ]


def _entry(path: Path) -> Entry:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    stats = [file.lstat() for file in files if not file.is_dir()] or [path.lstat()]
    size = sum(stat.st_size for stat in stats) if files != [path] or path.is_file() else 0
    return Entry(path.parent.name, path, size, max(max(stat.st_atime, stat.st_mtime) for stat in stats))


def of_kinds(found: Iterable[Entry], kinds: Iterable[str]) -> list[Entry]:
    """The entries of some kinds; all of them where none is named.

    Raises:
        InputError: there is no such kind.
    """
    found, kinds = list(found), set(kinds)
    known = {entry.kind for entry in found}
    if unknown := sorted(kinds - known):
        raise InputError(
            f"a kind must be one that the cache holds: {', '.join(sorted(known)) or 'none, as it is empty'}; "
            f"got {printable(unknown[0])}. See `foldsearch cache`."
        )
    return [entry for entry in found if not kinds or entry.kind in kinds]


def to_fit(found: Iterable[Entry], bound_bytes: float) -> list[Entry]:
    """The entries to remove, least recently used first, until the others are within the bound."""
    oldest = sorted(found, key=lambda entry: entry.used)
    left = sum(entry.size_bytes for entry in oldest)
    removed = []
    for entry in oldest:
        if left <= bound_bytes:
            break
        removed.append(entry)
        left -= entry.size_bytes
    return removed


def remove(chosen: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Remove entries; returns those that went, and those that stay because a process holds their lock."""
    gone: list[Entry] = []
    held: list[Entry] = []
    for entry in chosen:
        with entry.lock.open("a") as lock:  # stays: two processes must never lock two files of one name
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(entry)
                continue
            if entry.path.is_dir():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
            gone.append(entry)
    return gone, held
