"""What is kept on this machine between runs: made once, used by many processes, listed, and removed.

An entry is one file or folder `KIND/KEY...`, where the key begins with 16 hex digits. Nothing else is ever counted or
removed, so a folder that is no cache stays as it is. Two locks guard an entry: one beside it is held by the process
that makes or removes it, and one on the entry itself is shared by those that use it.

An entry is nothing that cannot be made again. So one that is damaged, by a failing disk say, is removed, and made
again: JSON holds a sum of itself, beside another file lie its size and sum, and what cannot be read is damaged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from foldsearch.errors import InputError
from foldsearch.files import alone, write_json
from foldsearch.paths import local, printable

Value = TypeVar("Value")


class Behind(Protocol):
    """What is asked for an entry that is not in the cache, before it is made: other machines may have it."""

    def fetch(self, path: Path) -> bool:
        """Put the entry at a path, whole or not at all, if it is to be had; whether it was."""

    def offer(self, path: Path) -> None:
        """Let others have the entry at a path; it may have been offered before."""


behind: Behind | None = None  # set while a search runs on several machines
# That a run leaves behind at most: a model of 7e9 parameters in float32 (28 GB), with what was computed of it, stays.
MOST_BYTES = 50 * 10**9
# Of a larger file only the size is looked at: a model is not read whole to be opened.
SUMMED_BYTES = 2 * 10**9

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


# ---- made once


def key(*parts: Any) -> str:
    """16 hex digits that stand for all that an entry depends on: a schema number, contents, settings, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def once(
    path: Path,
    make: Callable[[Path], object],
    read: Callable[[Path], Value],
    *,
    is_whole: Callable[[Path], bool] = Path.exists,
    keep: bool = False,
) -> tuple[Value, bool]:
    """What an entry holds, made first if it is not there; and whether it was there.

    Processes that want the same entry wait for the one that makes it.

    Args:
        path: of the entry, KIND/KEY... in the cache.
        make: writes it, whole or not at all.
        read: reads it; meanwhile nobody removes it.
        is_whole: whether the entry is there.
        keep: let nobody remove it until `let_go` is called, or this process ends: it may be opened again.
    """
    known, fetches = True, behind is not None
    while True:
        if not is_whole(path):
            with alone(_lock(path)):
                if not is_whole(path):
                    known = fetches and behind is not None and behind.fetch(path)
                    if not known:
                        make(path)
                    _note_sum(path)
                    assert is_whole(path), f"{path} was made, and is not there"
        with _used(path, keep=keep) as inode:
            if inode is None:
                continue
            if is_whole(path):
                with suppress(OSError):  # a cache of somebody else may be read only
                    os.utime(path)
                with suppress(_Damaged):
                    found = _read_whole(path, read) if known else read(path)
                    if behind is not None:
                        behind.offer(path)
                    return found, known
            # While it is held open, no other file has its inode.
            _remove_damaged(path, inode)
            fetches = False  # it may have been damaged where it was fetched from


class _Damaged(Exception):
    """An entry is not as it was made."""


def _read_whole(path: Path, read: Callable[[Path], Value]) -> Value:
    """What an entry holds.

    Raises:
        _Damaged: its sum differs, or it cannot be read; not so where the machine lacks memory, or the disk answers no.
    """
    if not _has_its_sum(path):
        raise _Damaged
    try:
        return read(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # each library has its own for what it cannot read
        raise _Damaged from error


def _remove_damaged(path: Path, inode: int) -> None:
    """Remove an entry that was found damaged, unless another process has done so and made it again."""
    with alone(_lock(path)), suppress(FileNotFoundError):
        if path.stat().st_ino != inode:
            return
        if (kept := _kept.pop(path, None)) is not None:
            os.close(kept)
        _remove(path)


_summed: set[tuple[int, int]] = set()  # files whose sum this process has looked at


def _sum_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.sum")


def _note_sum(path: Path) -> None:
    """Write down the size and the sum of a file that is no JSON, which holds its own."""
    if path.is_file() and path.suffix != ".json":
        size = path.stat().st_size
        write_json(_sum_path(path), {"bytes": size, "crc32": _crc32(path) if size <= SUMMED_BYTES else None})


def _has_its_sum(path: Path) -> bool:
    """Whether a file is as it was made, as far as that was written down."""
    if not path.is_file() or path.suffix == ".json":
        return True
    stat = path.stat()
    if (stat.st_dev, stat.st_ino) in _summed:
        return True
    try:
        told = json.loads(_sum_path(path).read_text())
        size, found = told["bytes"], told["crc32"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True  # of an earlier version, or its maker was killed before it
    if stat.st_size != size or (found is not None and _crc32(path) != found):
        return False
    _summed.add((stat.st_dev, stat.st_ino))
    return True


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            found = zlib.crc32(piece, found)
    return found


def json_once(path: Path, compute: Callable[[], Any]) -> tuple[Any, bool]:
    """The JSON at a path, computed first if it is not there; and whether it was there."""
    return once(path, lambda path: _write_value(path, compute()), _read_value)


def _write_value(path: Path, value: Any) -> None:
    write_json(path, {"crc32": zlib.crc32(json.dumps(value).encode()), "value": value})


def _read_value(path: Path) -> Any:
    """What `_write_value` wrote.

    Raises:
        ValueError: it is damaged.
    """
    told = json.loads(path.read_text())
    if not isinstance(told, dict) or told.keys() != {"crc32", "value"}:
        raise ValueError("it has no sum")
    if told["crc32"] != zlib.crc32(json.dumps(told["value"]).encode()):
        raise ValueError("its sum differs")
    return told["value"]


def json_grown(path: Path, grow: Callable[[Any], Any]) -> Any:
    """The JSON at a path after `grow` has been at it; it is given None where nothing is there, or nothing readable.

    Several processes may add to the same entry, one at a time.
    """
    with alone(_lock(path)):
        known = None
        with suppress(FileNotFoundError, ValueError, RecursionError):  # a damaged entry is begun again
            known = _read_value(path)
        value = grow(known)
        _write_value(path, value)
    return value


_kept: dict[Path, int] = {}


def keep(path: Path) -> None:
    """Let nobody remove an entry until `let_go` is called, or this process ends."""
    with _used(path, keep=True):
        pass


def let_go() -> None:
    """Allow others to remove what this process has kept."""
    while _kept:
        os.close(_kept.popitem()[1])


@contextmanager
def _used(path: Path, *, keep: bool) -> Iterator[int | None]:
    """Share the lock on an entry; its inode, or None where it is not there."""
    try:
        entry = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    with ExitStack() as held:
        held.callback(os.close, entry)
        fcntl.flock(entry, fcntl.LOCK_SH)  # waits while it is removed
        inode = os.fstat(entry).st_ino
        is_there = path.exists() and path.stat().st_ino == inode
        yield inode if is_there else None
        if keep and is_there:
            if (before := _kept.get(path)) is not None:
                os.close(before)
            _kept[path] = entry
            held.pop_all()


def _lock(path: Path) -> Path:
    """What a process holds while it makes or removes an entry."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def held_folder(path: Path) -> Iterator[None]:
    """A folder of the cache that is made where it is not there, and that nobody removes meanwhile."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with _used(path, keep=False) as is_there:
            if is_there:
                yield
                return


# ---- listed and removed


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in the cache. used: seconds since 1970 when it was last read or written, as the disk tells."""

    kind: str
    path: Path
    size_bytes: int
    used: float


def entries(cache_dir: Path) -> list[Entry]:
    """All entries, by kind and name; none where there is no such folder."""
    if not cache_dir.is_dir():
        return []
    found = []
    for kind in sorted(cache_dir.iterdir()):
        for path in sorted(kind.iterdir()) if kind.is_dir() and not kind.is_symlink() else ():
            if _ENTRY.fullmatch(path.name) and not path.is_symlink():
                with suppress(FileNotFoundError):  # another process removed it meanwhile
                    found.append(_entry(path))
    return found


def _entry(path: Path) -> Entry:
    files = (
        [file.lstat() for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else [path.lstat()]
    )
    # The time of access of a folder is that of its last listing, which is no use.
    used = max((path.lstat().st_mtime, *(max(stat.st_atime, stat.st_mtime) for stat in files)))
    return Entry(path.parent.name, path, sum(stat.st_size for stat in files), used)


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
    """Remove entries; returns those that went, and those that stay because a process makes or uses them."""
    gone: list[Entry] = []
    held: list[Entry] = []
    for entry in chosen:
        # The file of the lock stays: two processes must never lock two files of one name.
        with _lock(entry.path).open("a") as lock, suppress(FileNotFoundError):
            used = os.open(entry.path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(entry.path)
                gone.append(entry)
            except BlockingIOError:
                held.append(entry)
            finally:
                os.close(used)
    return gone, held


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink()
        _sum_path(path).unlink(missing_ok=True)
        return
    # Out of sight first: a folder that is cut short while it goes would look like a whole one.
    away = path.with_name(f".{path.name}.gone")
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    shutil.rmtree(away)


def trim(cache_dir: Path, bound_bytes: float | None = None) -> list[Entry]:
    """Remove what was used least recently until the rest is within a bound; what a process uses stays.

    Args:
        cache_dir: of the cache.
        bound_bytes: `MOST_BYTES` if None.
    """
    for away in cache_dir.glob("*/.*.gone"):  # of a process that was killed while it removed a folder
        with alone(_lock(away.with_name(away.name.removeprefix(".").removesuffix(".gone")))):
            shutil.rmtree(away, ignore_errors=True)
    gone, _ = remove(to_fit(entries(cache_dir), MOST_BYTES if bound_bytes is None else bound_bytes))
    return gone
