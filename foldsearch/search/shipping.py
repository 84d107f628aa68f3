"""How trials run on machines that do not see the run's folder: what they need and what they learn goes through a store.

Each node has a folder of its own in its cache, laid out as the run's folder is, so a trial works as it does anywhere:

* Before the first trial the weights and the token sets are put into the run storage by their content. A node copies
  them once, whichever of its workers comes first. On the search's own node the weights are used where they lie.
* What is computed once per model and text (the dense model's answers, gates, evidence) is looked up there before it is
  made, and put there after. Only residual states are not: they are large, and made in seconds.
* After every rung, and about once a minute while it trains, a worker puts the folder of its trial there: the files that
  changed, then the list of them. The search copies it into the run's folder before the study is told, so a run is as
  whole as without a cluster; and whichever node goes on with a trial begins with the list.

Every process of a search has names of its own there (`session`): a worker of one that was killed may live on for a
moment, and what it writes is read by nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from foldsearch import cache
from foldsearch.codec import from_json, to_json
from foldsearch.errors import FoldsearchError, RunError
from foldsearch.files import alone, write_json
from foldsearch.paths import beside
from foldsearch.record import Trial, note_owner, owner_of, plan_path, read_trial
from foldsearch.run import Run, TrialFolder
from foldsearch.search.desk import open_desk
from foldsearch.search.records import read_rows
from foldsearch.store import Blob, Store, StoreError, blob_of

WAIT_SECONDS = 0.5  # between looks at a trial on another node that measures the same plan
LOOK_SECONDS = 1.0  # between questions where trials are
_TRIES = 3  # to read the files of a trial that another process puts there meanwhile
_SHARED = {"targets"}  # kinds of entries that all nodes share, beside all that are JSON
_HASHES = "blobs"  # the kind that holds hashes of this machine's files
_SMALL = {".json", ".py"}  # files of a model that are read beside its weights; no trial needs its tokenizer


# ---- entries of the cache


class _Entries:
    """Entries of the cache that all nodes share (`foldsearch.cache.Behind`); what cannot be had is made here."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: set[str] = set()

    def fetch(self, path: Path) -> bool:
        """See `foldsearch.cache.Behind`."""
        if not (name := _entry(path)):
            return False
        temporary = beside(path, "tmp")
        with suppress(StoreError, KeyError, TypeError):
            if (told := self._store.read(name)) is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._store.get_blob(Blob(told["sha256"], told["size"]), temporary)
                os.replace(temporary, path)
                self._known.add(name)
                return True
        return False

    def offer(self, path: Path) -> None:
        """See `foldsearch.cache.Behind`."""
        if not (name := _entry(path)) or name in self._known:
            return
        self._known.add(name)
        with suppress(StoreError):
            if self._store.read(name) is None:
                self._store.write(name, to_json(self._store.put_blob(path)))


def _entry(path: Path) -> str:
    """The name of an entry that is shared; "" of another one."""
    is_shared = path.parent.name in _SHARED or (path.suffix == ".json" and path.parent.name != _HASHES)
    return f"entries/{path.parent.name}/{path.name}" if is_shared else ""


@contextmanager
def shared_cache(place: str) -> Iterator[None]:
    """While entered, entries of the cache are shared through a run storage; where that is "" nothing changes."""
    cache.behind = _Entries(Store(place)) if place else None
    try:
        yield
    finally:
        cache.behind = None


# ---- the folders of trials


@dataclass(frozen=True, slots=True)
class _Sent:
    """A file of a trial in the store: its name there, and its content."""

    name: str
    blob: Blob


class TrialStates:
    """The folders of trials in a store: for each a list of files, which is written last."""

    def __init__(self, store: Store, session: str) -> None:
        """`session`: under which name of the store."""
        self._store, self._session = store, session
        self._known: dict[tuple[Path, tuple[int, ...]], _Sent] = {}  # files as this process put or got them
        self._mine: set[str] = set()

    def put(self, number: int, folder: TrialFolder, *, all_of_it: bool = True) -> None:
        """Put what a trial goes on from, as far as it changed.

        Args:
            number: of the trial.
            folder: of this machine.
            all_of_it: else its record alone, which is what others need of a trial that is finished.

        Raises:
            StoreError: it cannot be written.
        """
        paths = _files(folder) if all_of_it else (folder.record,)
        files = {path.name: self._sent(number, path) for path in paths if path.exists()}
        before = self._files(number)
        if files == before:
            return
        self._store.write(self._list(number), {name: to_json(sent) for name, sent in files.items()})
        for name in {sent.name for sent in before.values()} - {sent.name for sent in files.values()}:
            if name in self._mine:  # another process may still read what it put there itself
                self._store.remove(name)

    def get(self, number: int, folder: TrialFolder, *, only_newer: bool = False) -> None:
        """Let a folder hold what was put of a trial, and nothing else from which it would go on.

        Args:
            number: of the trial.
            folder: of this machine.
            only_newer: leave it as it is where nothing was put, or less than it holds.

        Raises:
            StoreError: it cannot be read.
        """
        for left in reversed(range(_TRIES)):
            files = self._files(number)
            if only_newer and (not files or self._is_behind(files, folder)):
                return
            try:
                self._copy(files, folder)
            except StoreError:
                if not left or files == self._files(number):
                    raise
                continue  # it was put anew meanwhile
            for path in _files(folder):
                if path.name not in files:
                    path.unlink(missing_ok=True)
            return

    def lacks(self, path: Path) -> bool:
        """Whether a file is there that this process has not put as it is."""
        return path.exists() and (path, _stamp(path)) not in self._known

    def read(self, number: int) -> Trial | None:
        """The record of a trial that was put; None where there is none."""
        sent = self._files(number).get(TrialFolder(Path()).record.name)
        if sent is None:
            return None
        with suppress(FileNotFoundError, FoldsearchError, ValueError, KeyError, TypeError):
            return from_json(Trial, self._store.read(sent.name))
        return None

    def copy(self, number: int, folder: TrialFolder, names: Sequence[str]) -> None:
        """Copy some of another trial's files into a folder."""
        files = self._files(number)
        self._copy({name: files[name] for name in names if name in files}, folder)

    def remove(self) -> None:
        """Remove all of this session."""
        self._store.remove(self._session)

    # ---- one file

    def _sent(self, number: int, path: Path) -> _Sent:
        key = (path, _stamp(path))
        if key not in self._known:
            sent = _Sent(f"{self._session}/{number:05}-{secrets.token_hex(4)}-{path.name}", blob_of(path))
            self._store.put(path, sent.name)
            self._mine.add(sent.name)
            self._known[key] = sent
        return self._known[key]

    def _copy(self, files: dict[str, _Sent], folder: TrialFolder) -> None:
        folder.path.mkdir(parents=True, exist_ok=True)
        # The record last: with it the trial is as far as it says.
        for name, sent in sorted(files.items(), key=lambda item: item[0] == folder.record.name):
            path = folder.path / name
            if path.exists() and self._known.get((path, _stamp(path))) == sent:
                continue
            if not path.exists() or blob_of(path) != sent.blob:
                temporary = beside(path, "tmp")
                try:
                    self._store.get_checked(sent.name, sent.blob, temporary)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
            self._known[path, _stamp(path)] = sent

    # ---- the list

    def _list(self, number: int) -> str:
        return f"{self._session}/{number:05}.json"

    def _files(self, number: int) -> dict[str, _Sent]:
        told = self._store.read(self._list(number)) or {}
        try:
            return {name: from_json(_Sent, value) for name, value in told.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"'{self._list(number)}' of the run storage is damaged. Remove it.") from error

    def _is_behind(self, files: dict[str, _Sent], folder: TrialFolder) -> bool:
        """Whether a folder holds more results than were put."""
        here = read_trial(folder)
        if here is None:
            return False
        sent = files.get(folder.record.name)
        if sent is None:
            return True
        told = self._store.read(sent.name)
        return told is None or len(told["results"]) < len(here.results)


def _files(folder: TrialFolder) -> tuple[Path, ...]:
    return (*folder.kept, folder.error, folder.overdue)


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


# ---- the search's side


@dataclass(frozen=True, slots=True)
class Cargo:
    """What a worker needs to run trials of a run, wherever it is.

    Attributes:
        storage: the run storage. session: the name of this search in it.
        home: id of the node that the search runs on.
        model: the files of the dense model by their names; none where trials have no model.
        tokens: the token sets; None where there are none.
        desk: a handle of the run's `Desk`.
    """

    storage: str
    session: str
    home: str
    model: dict[str, Blob]
    tokens: Blob | None
    desk: Any


class Shipping:
    """The search's side: what goes out before the first trial, and what comes back of every trial."""

    def __init__(self, context: Any, storage: str, home: str, deadline: float | None) -> None:
        """Put what all trials need into the run storage.

        Args:
            context: of the run's trials.
            storage: the run storage.
            home: id of the node that the search runs on.
            deadline: of the run, by the monotonic clock.

        Raises:
            StoreError: it cannot be written.
        """
        self._run: Run = context.run
        store = Store(storage)
        session = f"runs/{secrets.token_hex(8)}"
        self._states = TrialStates(store, session)
        owners, begun = _known_plans(self._run), set()
        # By the row: one that is open is gone on with, also where its folder has the last result already.
        ended = {row.trial.number for row in read_rows(self._run) if not row.is_open}
        for folder in sorted(path for path in self._run.path.glob("trials/*") if path.name.isdecimal()):
            place, number = TrialFolder(folder), int(folder.name)
            if (known := read_trial(place)) is not None:
                begun.add(number)
            goes_on = number not in ended or (known is not None and known.state != "finished")
            if goes_on or known is not None:
                self._states.put(number, place, all_of_it=goes_on)
        write_json(self._run.shipping_file, {"storage": storage, "session": session})
        tokens = store.put_blob(self._run.tokens) if self._run.tokens.exists() else None
        self._desk = open_desk(home, owners, begun, deadline)
        self._progress: dict[int, tuple[str, float]] = {}
        self._looked = 0.0
        self.cargo = Cargo(storage, session, home, _put_model(context, store), tokens, self._desk)

    def fetch(self, number: int) -> None:
        """Copy what a trial learnt into the run's folder.

        Raises:
            StoreError: it cannot be read.
        """
        self._states.get(number, self._run.trial(number))

    def note(self, trial: Trial) -> None:
        """A trial has a result, which was fetched."""
        if trial.known_from is None and trial.draft is not None:
            note_owner(self._run, trial)
        self._desk.note.remote(trial.number)

    def release(self, number: int) -> None:
        """A trial, or its worker, has ended: others may have its plan."""
        self._desk.release.remote(number)

    def progress(self, number: int) -> tuple[str, float] | None:
        """Where a trial is, as it said about a second ago."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            with suppress(ray.exceptions.RayError):
                self._progress = ray.get(self._desk.progress.remote(), timeout=LOOK_SECONDS)
        return self._progress.get(number)

    def end(self) -> None:
        """The run is over: nobody needs what is in the run storage of it."""
        with suppress(StoreError):
            self._states.remove()
            self._run.shipping_file.unlink(missing_ok=True)


def fetch_interrupted(run: Run, numbers: Sequence[int]) -> None:
    """Copy what workers of an earlier process put into the run storage after that process had ended.

    Args:
        run: that is gone on with.
        numbers: of its trials that have not ended.
    """
    try:
        told = json.loads(run.shipping_file.read_text())
        states = TrialStates(Store(told["storage"]), told["session"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, FoldsearchError):
        return  # nothing was shipped, or it is out of reach: the run's folder has what the search had heard of
    for number in numbers:
        with suppress(FoldsearchError):
            states.get(number, run.trial(number), only_newer=True)
    with suppress(StoreError):
        states.remove()


def _known_plans(run: Run) -> dict[str, int]:
    found = {}
    for path in run.path.glob("plans/*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, RunError):
            if (owner := owner_of(path, run)) is not None:
                found[path.name] = owner
    return found


def _put_model(context: Any, store: Store) -> dict[str, Blob]:
    files = getattr(context, "files", None)
    if files is None:
        return {}
    paths = [path for path in sorted(files.folder.iterdir()) if path.suffix in (*_SMALL, ".safetensors")]
    state = [(path.name, *_stamp(path)) for path in paths]
    # All of the weights is read to be hashed: once, as long as they stay as they are.
    kept = context.cache_dir / _HASHES / f"{cache.key(str(files.folder), state)}.json"
    told, _ = cache.json_once(kept, lambda: {path.name: to_json(blob_of(path)) for path in paths})
    return {path.name: store.put_blob(path, from_json(Blob, told[path.name])) for path in paths}


# ---- a node's side


class NodeSite:
    """A run on one node, for one of its workers: a folder in the node's cache, and what goes in and out of it.

    It is also how a trial sees the others (`foldsearch.record.Peers`).
    """

    def __init__(self, cargo: Cargo) -> None:
        """`cargo`: of the run."""
        self._cargo = cargo
        self._store = Store(cargo.storage)
        self._states = TrialStates(self._store, cargo.session)
        self._held = ExitStack()
        self._run: Run | None = None

    def open(self, context: Any) -> Any:
        """The context of the run's trials as it is on this node; what the node lacks is copied first.

        Raises:
            StoreError: it cannot be.
            InputError: the node's cache cannot be written to.
        """
        cargo = self._cargo
        is_home = ray.get_runtime_context().get_node_id() == cargo.home
        cache_dir = context.cache_dir if is_home else cache.default_cache_dir()
        folder = cache_dir / "runs" / cargo.session.rpartition("/")[2]
        left = [one for one in cache.entries(cache_dir) if one.kind == "runs" and one.path != folder]
        cache.remove(left)  # of searches that were killed
        self._held.enter_context(cache.held_folder(folder))
        run = replace(context.run, path=folder)
        if cargo.tokens is not None:
            self._bring(cargo.tokens, run.tokens)
        self._run = run
        cache.behind = _Entries(self._store)
        changed: dict[str, Any] = {"run": run, "cache_dir": cache_dir}
        if cargo.model:
            changed["peers"] = self
            if not is_home or not context.files.folder.is_dir():
                changed["files"] = self._model(context.files, cache_dir)
        return replace(context, **changed)

    def _bring(self, blob: Blob, path: Path) -> None:
        with alone(path.with_name(f".{path.name}.lock")):
            if path.exists():
                return
            temporary = beside(path, "tmp")
            self._store.get_blob(blob, temporary)
            os.replace(temporary, path)

    def _model(self, files: Any, cache_dir: Path) -> Any:
        """The dense model in the node's cache."""
        from foldsearch.model.source import stamps_of

        model = self._cargo.model
        key = cache.key("shipped", {name: blob.sha256 for name, blob in model.items()})

        def make(path: Path) -> None:
            temporary = beside(path, "tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                for name, blob in model.items():
                    self._store.get_blob(blob, temporary / name)
                temporary.rename(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

        place = cache_dir / "models" / f"{key}-{files.dtype}"
        cache.once(place, make, lambda path: path, is_whole=Path.is_dir, keep=True)
        return replace(files, folder=place, gguf=(), whole=None, stamps=stamps_of(place))

    def close(self) -> None:
        """This worker needs the node's folder no longer; the last one removes it."""
        self._held.close()
        if self._run is not None:
            place = self._run.path
            cache.remove([one for one in cache.entries(place.parent.parent) if one.path == place])

    # ---- a trial

    def take_up(self, number: int) -> None:
        """Let the folder of a trial, whose lock is held, be as it was put last, by whichever node."""
        self._states.get(number, self._folder(number))

    def hand_in(self, number: int) -> None:
        """Put what a trial has learnt."""
        self._states.put(number, self._folder(number))

    def put_away(self, number: int) -> None:
        """A trial runs here no longer."""
        folder = self._folder(number)
        if not folder.path.is_dir():
            return
        with folder.lock.open("w") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in folder.path.iterdir():
                if path != folder.lock and path.is_file():
                    path.unlink(missing_ok=True)

    def tell(self, number: int, phase: str, share: float) -> None:
        """Where a trial is; what it keeps while it trains is put as often as it is written."""
        self._cargo.desk.tell.remote(number, phase, share)
        if self._states.lacks(self._folder(number).optimizer):
            self.hand_in(number)

    def left(self) -> float | None:
        """Seconds until the time of the run is up; None: for ever."""
        found: float | None = ray.get(self._cargo.desk.left.remote())
        return found

    def _folder(self, number: int) -> TrialFolder:
        assert self._run is not None, "it was opened"
        return self._run.trial(number)

    # ---- the other trials

    @contextmanager
    def hold(self, trial: Trial) -> Iterator[tuple[bool, Trial | None]]:
        """See `foldsearch.record.Peers`. The search lets go of the plan, when the trial or its worker has ended."""
        while (told := ray.get(self._cargo.desk.hold.remote(self._plan(trial), trial.number))) is None:
            time.sleep(WAIT_SECONDS)
        free, owner = told
        yield free, self._states.read(owner) if owner is not None and owner != trial.number else None

    def take(self, trial: Trial) -> None:
        """See `foldsearch.record.Peers`."""
        ray.get(self._cargo.desk.take.remote(self._plan(trial), trial.number))

    def copy(self, number: int, folder: TrialFolder, names: Sequence[str]) -> None:
        """See `foldsearch.record.Peers`."""
        self._states.copy(number, folder, names)

    def _plan(self, trial: Trial) -> str:
        assert self._run is not None, "it was opened"
        return plan_path(self._run, trial).name
