"""A place that several machines see: a folder of a file system that they share, or a URL that fsspec can open.

    blobs/SHA256        files by their content, written once
    entries/KIND/NAME   entries of the cache (`foldsearch.cache`): which blob holds one
    RUN/                what is of one run only

Files are whole or absent, and whoever reads one looks whether it is what was written. Nothing here is the only copy of
anything: things are kept in run folders and the caches of machines, and this is how they get from one to another.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldsearch.errors import FoldsearchError, InputError, quote_error
from foldsearch.paths import local, printable

_READ = 1 << 22  # bytes at a time


class StoreError(FoldsearchError):
    """A place that several machines see cannot be used, or does not hold what was put there.

    No fault of the trial that meets it: the search ends, and goes on when the place is there again.
    """


@dataclass(frozen=True, slots=True)
class Blob:
    """A file by its content. sha256: 64 hex digits. size: bytes."""

    sha256: str
    size: int


def blob_of(path: Path) -> Blob:
    """The content of a file; all of it is read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return Blob(digest.hexdigest(), path.stat().st_size)


def absolute(place: str) -> str:
    """A place as every machine is to read it: a path in full, a URL as it is."""
    return place if "://" in place else str(local(place).absolute())


class Store:
    """Files by names that are paths with `/` in between."""

    def __init__(self, place: str) -> None:
        """`place`: an absolute path, or a URL.

        Raises:
            InputError: fsspec has nothing for such a URL.
        """
        from fsspec.core import url_to_fs  # half a second, and only clusters need it

        self.place = place
        try:
            self._files, self._root = url_to_fs(place, use_listings_cache=False)
        except (ImportError, ValueError, OSError) as error:
            what = f"a run storage is a path, or a URL that fsspec can open, but '{printable(place)}' is not"
            raise InputError(quote_error(what, error)) from error
        self._is_local = "file" in (
            (self._files.protocol,) if isinstance(self._files.protocol, str) else self._files.protocol
        )

    # ---- files

    def put(self, path: Path, name: str) -> None:
        """Copy a file here, whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        with self._told():
            if self._is_local:
                self._rename_into(name, lambda temporary: shutil.copyfile(path, temporary))
            else:  # object stores show an object once it is whole
                self._files.put_file(str(path), self._path(name))

    def get(self, name: str, path: Path) -> None:
        """Copy a file from here.

        Raises:
            FileNotFoundError: it is not here.
            StoreError: it cannot be read.
        """
        with self._told():
            self._files.get_file(self._path(name), str(path))

    def write(self, name: str, value: Any) -> None:
        """Keep a value as JSON, whole or not at all."""
        data = json.dumps(value).encode()
        with self._told():
            if self._is_local:
                self._rename_into(name, lambda temporary: temporary.write_bytes(data))
            else:
                self._files.pipe_file(self._path(name), data)

    def read(self, name: str) -> Any:
        """The value that `write` kept; None where there is none."""
        with self._told(), suppress(FileNotFoundError):
            try:
                return json.loads(self._files.cat_file(self._path(name)))
            except (ValueError, RecursionError) as error:
                raise StoreError(f"'{printable(self._path(name))}' is damaged. Remove it.") from error
        return None

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing where there is none."""
        with self._told(), suppress(FileNotFoundError):
            self._files.rm(self._path(name), recursive=True)

    def _rename_into(self, name: str, write: Any) -> None:
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own: processes of two machines may have the same number.
        temporary = path.with_name(f".{path.name[:150]}.{secrets.token_hex(8)}.tmp")
        try:
            write(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:  # each library has its own
            what = f"the run storage '{printable(self.place)}' cannot be used"
            raise StoreError(
                quote_error(what, error, "Look whether all nodes may read and write there.")
            ) from error

    # ---- by content

    def put_blob(self, path: Path, blob: Blob | None = None) -> Blob:
        """Keep a file by its content, unless it is here already. `blob`: where that is known."""
        blob = blob or blob_of(path)
        with self._told():
            try:
                there = self._files.size(self._path(_blob(blob))) == blob.size
            except FileNotFoundError:
                there = False
        if not there:
            self.put(path, _blob(blob))
        return blob

    def get_blob(self, blob: Blob, path: Path) -> None:
        """Copy a file from here by its content.

        Raises:
            StoreError: it is not here, or is not what was put here.
        """
        self.get_checked(_blob(blob), blob, path)

    def get_checked(self, name: str, blob: Blob, path: Path) -> None:
        """Copy a file from here, and look whether its content is what it should be."""
        try:
            self.get(name, path)
        except FileNotFoundError as error:
            raise StoreError(
                f"the run storage '{printable(self.place)}' must keep what was put there, but '{name}' is gone. Stop "
                "whoever removes it, and resume the run."
            ) from error
        if (found := blob_of(path)) != blob:
            path.unlink()
            self.remove(name)
            raise StoreError(
                f"the run storage '{printable(self.place)}' must keep what was put there, but '{name}' had "
                f"{blob.size:,} bytes with the sha256 {blob.sha256[:12]}, and has {found.size:,} with "
                f"{found.sha256[:12]}. It was removed; resume the run."
            )


def _blob(blob: Blob) -> str:
    return f"blobs/{blob.sha256}"
