"""What a model is made of, by content: nothing that was computed with one model is ever taken for another's.

Every byte counts. A large file is hashed once: its hash is kept beside the path, size, times and inode that the file
had, and taken from there until one of them changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from foldsearch import cache
from foldsearch.files import write_json

__all__ = ["ContentHashes", "content_of", "file_hash"]

PIECE = 16 << 20  # bytes; pieces are hashed side by side, and files of one piece are always hashed again
_READ = 1 << 20  # bytes at a time
# A file that changed less than this long before it was read may change again without a new time of change.
_SETTLED_NS = 2 * 10**9

_TOKENIZER_NAMES = {"merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.json"}
_TOKENIZER_STARTS = ("tokenizer", "vocab")
_TOKENIZER_SUFFIXES = {".model", ".tiktoken", ".jinja"}


@dataclass(frozen=True, slots=True)
class ContentHashes:
    """Hashes of the parts of a model, 64 hex digits each.

    Attributes:
        weights: of the weight files; "" where they are not on this machine. A GGUF holds config and tokenizer too.
        config: of config.json; "" for a GGUF.
        tokenizer: of the tokenizer's files; "" where there are none.
        code: of the Python files, where they may run; else "".
        other: of what changes no figure, such as generation_config.json.
    """

    weights: str
    config: str
    tokenizer: str
    code: str
    other: str

    def short(self, version: int) -> str:
        """16 hex digits over everything, and over the version of who reads it: the name of what is converted from the
        model, or computed with it.
        """
        parts = (str(version), self.weights, self.config, self.tokenizer, self.code, self.other)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def content_of(
    small: Iterable[Path], weights: Iterable[Path], *, with_code: bool, kept_in: Path | None = None
) -> ContentHashes:
    """Hash the files of a model. Folders and the names of weight files do not count, nor does where the files lie.

    Args:
        small: config, tokenizer, code.
        weights: safetensors, .bin or .gguf.
        with_code: whether the Python files may run, and so are a part of the model.
        kept_in: where hashes of large files are kept.

    Raises:
        OSError: a file cannot be read.
    """
    parts: dict[str, list[str]] = {"config": [], "tokenizer": [], "code": [], "other": []}
    for path in sorted(small, key=lambda path: path.name):
        kind = _kind(path)
        if kind != "code" or with_code:
            parts[kind].append(f"{path.name} {file_hash(path)}")
    hashes = [file_hash(path, kept_in) for path in sorted(weights, key=lambda path: path.name)]
    return ContentHashes(_over(hashes), **{kind: _over(lines) for kind, lines in parts.items()})


def file_hash(path: Path, kept_in: Path | None = None) -> str:
    """sha256 over the sha256 of each piece of a file; 64 hex digits.

    Args:
        path: of the file.
        kept_in: folder where the hashes of large files are kept; None hashes anew.

    Raises:
        OSError: the file cannot be read.
    """
    began, stat = time.time_ns(), path.stat()
    kept = None
    # The time of change is there because every write moves it, while the time of modification can be set back.
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    if kept_in is not None and stat.st_size > PIECE:
        kept = kept_in / f"{cache.key(os.fspath(path.resolve()))}.json"
        if (known := _read_kept(kept)) is not None and known.get("state") == state:
            return str(known["sha256"])
    starts = range(0, max(stat.st_size, 1), PIECE)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pieces = pool.map(lambda start: _piece_hash(path, start), starts)
        found = hashlib.sha256(b"".join(pieces)).hexdigest()
    settled = began - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
    if kept is not None and settled:
        with suppress(OSError):  # a cache that cannot be written costs the time of hashing again, no more
            write_json(kept, {"path": str(path), "state": state, "sha256": found})
    return found


def _piece_hash(path: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = PIECE
        while left and (read := file.read(min(left, _READ))):
            digest.update(read)
            left -= len(read)
    return digest.digest()


def _read_kept(path: Path) -> dict[str, object] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _over(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else ""


def _kind(path: Path) -> str:
    if path.name == "config.json":
        return "config"
    if path.suffix == ".py":
        return "code"
    is_tokenizers = (
        path.name in _TOKENIZER_NAMES
        or path.name.startswith(_TOKENIZER_STARTS)
        or path.suffix in _TOKENIZER_SUFFIXES
    )
    return "tokenizer" if is_tokenizers else "other"
