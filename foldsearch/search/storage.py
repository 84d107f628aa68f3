"""Where the Optuna study of a run lies: in a SQLite file of the run folder, or in a database that a URL names.

A URL may hold a password, and a password is in no file, note, log or message of ours: the run folder keeps the URL
without it (storage.json). Whoever opens the run again has it from where it was typed in this process, from the
environment (`FOLDSEARCH_STORAGE`, the same URL), or from where the database's own client looks (PGPASSWORD, ~/.pgpass).

Runs that share a database have studies of their own, by a random name.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy

from foldsearch.codec import from_json, to_json
from foldsearch.errors import InputError, RunError, nearest, quote_error
from foldsearch.files import replace_atomically, write_json
from foldsearch.paths import printable
from foldsearch.run import RunFolder

STUDY_NAME = "foldsearch"  # in the file of a run folder
VARIABLE = "FOLDSEARCH_STORAGE"
KINDS = ("postgresql", "sqlite", "mysql")  # of databases that Optuna is tried with
_WAIT_SECONDS = 60  # for another writer of the same file
_SECRET = ("passw", "secret", "token")  # in the name of a part of a URL's query
_NETWORK = {
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.sshfs",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
}

# Where databases are, by their URL without its secrets, with them, as this process was given them.
_given: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class StudyPlace:
    """Where the study of a run lies. url: of the database, without secrets. study: its name there."""

    url: str
    study: str

    def full_url(self) -> str:
        """The URL with its secrets, as far as this process knows them."""
        if self.url in _given:
            return _given[self.url]
        typed = os.environ.get(VARIABLE, "")
        return typed if typed and without_secrets(typed) == self.url else self.url


def without_secrets(url: str) -> str:
    """A storage URL without password.

    Raises:
        InputError: it is no URL; the message does not repeat it, as it may hold a password.
    """
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise InputError(
            "a storage is a URL such as postgresql://user@host/database; what was given is none. "
            f"Give it with --storage, or as {VARIABLE}."
        ) from error
    parts = parsed._replace(password=None)
    hidden = [name for name in parts.query if any(word in name.lower() for word in _SECRET)]
    return parts.difference_update_query(hidden).render_as_string(hide_password=False)


def use_storage(folder: RunFolder, url: str) -> None:
    """Let the study of a run lie in a database: of a new run in its draft, of one that goes on where it lies now.

    Raises:
        InputError: it is no URL, or the database cannot be opened.
        RunError: the run's study lies in its folder, or is not in this database.
    """
    url = _from_anywhere(url)
    shown = without_secrets(url)
    if sqlalchemy.engine.make_url(url).database in (None, "", ":memory:"):
        raise InputError(
            f"a storage names a database, but '{shown}' names none. Add it: {shown.rstrip('/')}/NAME"
        )
    before = place_of(folder)
    if before is None and folder.storage.exists():
        raise RunError(
            f"a run stays where its study is, and that of '{printable(folder.path)}' is in its {folder.storage.name}. "
            "Leave --storage out."
        )
    _given[shown] = url
    place = StudyPlace(shown, before.study if before else f"{STUDY_NAME}-{secrets.token_hex(8)}")
    storage = _open_database(place)
    if before is not None and before.url != shown and not _holds(storage, place):
        raise RunError(
            f"a run goes on in the database that holds its study '{place.study}', but '{shown}' does not. "
            f"It was in '{before.url}'."
        )
    write_json(folder.storage_file, to_json(place))


def _from_anywhere(url: str) -> str:
    """The URL as it means the same file in every folder; one that is none comes back as it is."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
        is_file = parsed.get_backend_name() == "sqlite"
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return url
    name = parsed.database
    if not is_file or name in (None, "", ":memory:") or name.startswith("file:"):
        return url
    return parsed._replace(database=os.path.abspath(name)).render_as_string(hide_password=False)


def check_study_there(folder: RunFolder, storage: optuna.storages.RDBStorage) -> None:
    """Whether the database holds the study of a run that has measured trials.

    Raises:
        RunError: it does not, so a search would begin again in its place.
    """
    place = place_of(folder)
    if place is None or not any((folder.path / "trials").glob("*/trial.json")):
        return
    if not _holds(storage, place):
        raise RunError(
            f"'{printable(folder.path)}' has trials, but the database '{place.url}' does not hold their study "
            f"'{place.study}'. Put a copy of the database back, or start a new run."
        )


def _holds(storage: optuna.storages.RDBStorage, place: StudyPlace) -> bool:
    return place.study in [one.study_name for one in storage.get_all_studies()]


def place_of(folder: RunFolder) -> StudyPlace | None:
    """The database that holds the study of a run; None where that is in the folder's own file.

    Raises:
        RunError: what says so cannot be read.
    """
    if not folder.storage_file.exists():
        return None
    try:
        return from_json(StudyPlace, json.loads(folder.storage_file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = (
            f"'{printable(folder.storage_file)}', which says where the trials of the run are, cannot be read"
        )
        raise RunError(quote_error(what, error, "Put back a copy of it.")) from error


def study_name(folder: RunFolder) -> str:
    """The name of a run's study in its storage."""
    place = place_of(folder)
    return STUDY_NAME if place is None else place.study


def open_storage(folder: RunFolder) -> optuna.storages.RDBStorage:
    """What holds the trials of a run.

    Raises:
        RunError: it is damaged, or cannot be opened.
    """
    place = place_of(folder)
    return _open_file(folder) if place is None else _open_database(place)


def is_begun(folder: RunFolder) -> bool:
    """Whether there may be a study."""
    return folder.storage_file.exists() or folder.storage.is_file()


# ---- a database


def _open_database(place: StudyPlace) -> optuna.storages.RDBStorage:
    url = place.full_url()
    with storage_errors(place):
        # A connection may have gone while a trial ran for hours.
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


@contextmanager
def storage_errors(place: StudyPlace | None) -> Iterator[None]:
    """Tell what goes wrong with a database in a sentence that holds no password.

    Raises:
        InputError: its driver is missing, or it cannot be reached.
    """
    if place is None:
        yield
        return
    kind = place.url.partition(":")[0]
    try:
        yield
    except sqlalchemy.exc.NoSuchModuleError as error:
        raise InputError(
            f"a storage is of a kind that SQLAlchemy knows, such as postgresql or sqlite; got '{printable(kind)}'."
            f"{nearest(kind, KINDS) or ' Write postgresql://user@host/database.'}"
        ) from error
    except ImportError as error:
        raise InputError(
            f"a storage of the kind '{printable(kind)}' needs a driver that is not installed. "
            "For PostgreSQL: pip install 'foldsearch[postgres]'"
        ) from error
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        remedy = f"Look whether it runs, and whether the password is known ({VARIABLE}, ~/.pgpass)."
        if kind == "sqlite":
            remedy = "Look whether the folder of that file is there, and can be written to."
        message = quote_error(f"the storage '{printable(place.url)}' cannot be used", error, remedy)
        raise RunError(_scrubbed(message, place)) from None  # what it came from may hold the URL


def _scrubbed(words: str, place: StudyPlace) -> str:
    """Words of a library without the secrets of a URL."""
    full, shown = (sqlalchemy.engine.make_url(url) for url in (place.full_url(), place.url))
    hidden = [full.password, *(str(full.query[name]) for name in full.query if name not in shown.query)]
    for secret in hidden:
        if secret:
            words = words.replace(str(secret), "***")
    return words


# ---- the file of a run folder


def _open_file(folder: RunFolder) -> optuna.storages.RDBStorage:
    # Never as part of the URL: there `?`, `#` and `%` mean something, and Optuna fills in what stands in braces.
    file = folder.storage.resolve()
    try:
        storage = optuna.storages.RDBStorage(
            "sqlite://",
            engine_kwargs={
                "creator": lambda: sqlite3.connect(file, timeout=_WAIT_SECONDS, check_same_thread=False),
                "poolclass": sqlalchemy.pool.QueuePool,  # that of a file; the URL alone would be one in memory
            },
        )
    except sqlalchemy.exc.DatabaseError as error:
        if isinstance(error, sqlalchemy.exc.OperationalError):  # locked, say, or the disk is full
            raise
        raise damaged(folder, error.orig or error) from error
    # Write-ahead log: what is committed survives a killed process, readers do not wait, and a commit takes 0.1 ms.
    # `NORMAL` leaves the last commits to chance only when the machine itself loses power.
    sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
    storage.engine.dispose()  # connections from before
    return storage


def damaged(folder: RunFolder, error: BaseException) -> RunError:
    """The error of a file that holds the trials of a run, and cannot be read."""
    return RunError(
        quote_error(
            f"the trials of a run are in its {folder.storage.name}, but '{printable(folder.storage)}' is damaged",
            error,
            f"Put back its copy: foldsearch check {printable(folder.path)} --repair",
        )
    )


def _write_ahead(connection: Any, _: object) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def copy_study(folder: RunFolder) -> None:
    """Keep a copy of the file that holds the trials, whole or not at all."""

    def write(path: Path) -> None:
        with closing(sqlite3.connect(folder.storage)) as ours, closing(sqlite3.connect(path)) as copy:
            ours.backup(copy)

    if place_of(folder) is None:
        replace_atomically(folder.storage_copy, write)


def network_words(folder: Path, partitions: Callable[..., list[Any]] = psutil.disk_partitions) -> str:
    """What to say of a run folder on a network file system; empty where it is on none, or that is not known."""
    try:
        mounts = [one for one in partitions(all=True) if folder.absolute().is_relative_to(one.mountpoint)]
    except OSError:
        return ""
    mount = max(mounts, key=lambda one: len(one.mountpoint), default=None)
    if mount is None or mount.fstype not in _NETWORK:
        return ""
    return (
        f"'{printable(folder)}' is on a network file system ({mount.fstype}), where SQLite cannot keep the study "
        "safely: its processes share memory. Give --storage a PostgreSQL URL, or put the run folder on a local disk."
    )
