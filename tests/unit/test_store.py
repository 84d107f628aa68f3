"""Files that several machines see, and folders of trials that go through them.

Oracle: the files that the tests write, byte for byte; the same laws on a folder and on fsspec's store in memory, which
has no renaming and no folders, as object stores have none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from foldsearch import cache
from foldsearch.codec import to_json
from foldsearch.errors import InputError
from foldsearch.files import write_json
from foldsearch.record import Trial
from foldsearch.run import TrialFolder
from foldsearch.search.desk import Desk
from foldsearch.search.shipping import TrialStates, shared_cache
from foldsearch.store import Blob, Store, StoreError, absolute, blob_of
from tests.fake_driver import study
from tests.fake_trial import trial_at
from tests.proposals import removing


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    fsspec.filesystem("memory").store.clear()
    return "memory://store"


def file(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# ---- files


def test_what_is_put_is_got_and_what_is_not_there_is_told(place: str, tmp_path: Path) -> None:
    store = Store(place)
    assert store.read("a/b.json") is None
    store.write("a/b.json", {"x": [1, None]})
    assert Store(place).read("a/b.json") == {"x": [1, None]}
    store.put(file(tmp_path / "one", b"1"), "a/one")
    store.get("a/one", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"1"
    store.remove("a/one")
    store.remove("a/one")
    with pytest.raises(FileNotFoundError):
        store.get("a/one", tmp_path / "again")
    store.remove("a")
    assert store.read("a/b.json") is None


def test_a_blob_is_put_once_and_looked_at_when_it_is_got(place: str, tmp_path: Path) -> None:
    store = Store(place)
    blob = store.put_blob(file(tmp_path / "one", b"content"))
    assert blob == blob_of(tmp_path / "one") == Blob(blob.sha256, 7)
    # it is there: the file is not read again
    assert store.put_blob(tmp_path / "gone", blob) == blob
    store.get_blob(blob, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == b"content"
    store.put(file(tmp_path / "other", b"CONTENT"), f"blobs/{blob.sha256}")
    with pytest.raises(StoreError, match="It was removed; resume the run"):
        store.get_blob(blob, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    with pytest.raises(StoreError, match="is gone"):
        store.get_blob(blob, tmp_path / "damaged")


def test_a_place_that_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="a URL that fsspec can open, but 'nowhere://x' is not"):
        Store("nowhere://x")
    file(tmp_path / "a file", b"")
    with pytest.raises(
        StoreError, match=r"cannot be used: .* Look whether all nodes may read and write there"
    ):
        Store(str(tmp_path / "a file")).write("x.json", 1)
    monkeypatch.chdir(tmp_path)
    assert absolute("here") == str(tmp_path / "here")
    assert absolute("s3://bucket/folder") == "s3://bucket/folder"


# ---- entries of the cache


def test_an_entry_is_made_on_one_machine_only(place: str, tmp_path: Path) -> None:
    made: list[Path] = []

    def ask(machine: str, kind: str, name: str) -> tuple[bytes, bool]:
        def make(path: Path) -> None:
            made.append(path)
            file(path, b"[1]")

        path = tmp_path / machine / kind / name
        return cache.once(path, make, Path.read_bytes)

    with shared_cache(place):
        for kind, name in (("targets", f"{1:016x}.safetensors"), ("gates", f"{1:016x}.json")):
            assert ask("one", kind, name) == (b"[1]", False)
            assert ask("two", kind, name) == (b"[1]", True)
            assert len(made) == 1
            made.clear()
        assert [ask(machine, "states", f"{1:016x}.bin")[1] for machine in ("one", "two")] == [False, False]
    made.clear()
    # one that was known before a search ran on several machines is shared as well
    ask("three", "targets", f"{2:016x}.safetensors")
    with shared_cache(place):
        ask("three", "targets", f"{2:016x}.safetensors")
        ask("four", "targets", f"{2:016x}.safetensors")
    assert [path.parts[-3] for path in made] == ["three"]
    assert cache.behind is None


def test_an_entry_that_cannot_be_had_is_made(tmp_path: Path) -> None:
    place = tmp_path / "store"
    path = tmp_path / "cache" / "targets" / f"{1:016x}.safetensors"
    with shared_cache(str(place)):
        cache.once(path, lambda path: file(path, b"1"), Path.read_bytes)
        for blob in place.glob("blobs/*"):
            blob.write_bytes(b"damaged")
        path.unlink()
        assert cache.once(path, lambda path: file(path, b"1"), Path.read_bytes) == (b"1", False)


# ---- the folders of trials


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], TrialFolder]:
    def of(machine: str) -> TrialFolder:
        made = TrialFolder(tmp_path / machine / "00003")
        made.path.mkdir(parents=True, exist_ok=True)
        return made

    return of


def after(rungs: int) -> Trial:
    proposal = removing("window", 3)
    from tests.fake_trial import NUM_BLOCKS, ORDERS
    from tests.proposals import ordered_plan

    plan = ordered_plan(proposal, ORDERS, NUM_BLOCKS)
    return trial_at(plan, study(), rungs - 1, proposal, 3)


def holds(folder: TrialFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.iterdir()}


def test_a_trial_goes_on_where_it_was_put_last(place: str, folder: Callable[[str], TrialFolder]) -> None:
    one, two = folder("one"), folder("two")
    of_one, of_two = (TrialStates(Store(place), "runs/x") for _ in range(2))
    write_json(one.record, to_json(after(1)))
    one.start.write_bytes(b"start")
    one.optimizer.write_bytes(b"first")
    of_one.put(3, one)
    assert of_two.read(3) == after(1)
    assert of_two.read(4) is None
    two.recovered.write_bytes(b"of a trial that is not this one")
    of_two.get(3, two)
    assert holds(two) == holds(one)
    # it goes on there, and comes back
    write_json(two.record, to_json(after(2)))
    two.optimizer.unlink()
    of_two.put(3, two)
    of_one.get(3, one)
    assert holds(one) == holds(two)
    # what was never put begins anew
    of_one.get(4, two)
    assert not holds(two)


def test_files_that_did_not_change_are_not_put_again_and_old_ones_go(
    tmp_path: Path, folder: Callable[[str], TrialFolder]
) -> None:
    one = folder("one")
    states = TrialStates(Store(str(tmp_path / "store")), "runs/x")
    one.start.write_bytes(b"large")

    def put() -> set[str]:
        states.put(3, one)
        return {path.name for path in (tmp_path / "store" / "runs" / "x").iterdir()}

    first = put()
    assert put() == first
    for content in (b"1", b"2"):
        one.optimizer.with_suffix(".new").write_bytes(content)
        os.replace(one.optimizer.with_suffix(".new"), one.optimizer)
        assert states.lacks(one.optimizer)
        now = put()
        assert not states.lacks(one.optimizer)
    assert first < now
    assert len(now) == 3  # the list, the start, the latest optimizer
    states.remove()
    assert not (tmp_path / "store" / "runs" / "x").exists()


def test_what_was_put_is_taken_only_if_it_is_newer(
    tmp_path: Path, folder: Callable[[str], TrialFolder]
) -> None:
    one, two = folder("one"), folder("two")
    states = TrialStates(Store(str(tmp_path / "store")), "runs/x")
    write_json(two.record, to_json(after(2)))
    states.get(3, two, only_newer=True)  # nothing was put
    write_json(one.record, to_json(after(1)))
    states.put(3, one)
    kept = holds(two)
    states.get(3, two, only_newer=True)
    assert holds(two) == kept
    write_json(one.record, to_json(after(3)))
    states.put(3, one)
    states.get(3, two, only_newer=True)
    assert holds(two) == holds(one)


def test_a_reader_meets_whole_states_while_another_process_puts_new_ones(
    tmp_path: Path, folder: Callable[[str], TrialFolder]
) -> None:
    one, two = folder("one"), folder("two")
    writer, reader = (TrialStates(Store(str(tmp_path / "store")), "runs/x") for _ in range(2))
    one.start.write_bytes(b"0")
    one.optimizer.write_bytes(b"0")
    writer.put(3, one)
    over = threading.Event()

    def write() -> None:
        number = 0
        while not over.is_set():
            number += 1
            for path in (one.start, one.optimizer):
                path.with_suffix(".new").write_bytes(str(number).encode())
                os.replace(path.with_suffix(".new"), path)
            writer.put(3, one)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(20):
            try:
                reader.get(3, two)
            except StoreError:  # put anew three times while it was read: told, and nothing is mixed
                continue
            assert two.start.read_bytes() == two.optimizer.read_bytes()
    finally:
        over.set()
        thread.join()


# ---- who measures a plan


def test_a_plan_is_held_by_one_trial_and_let_go_of_with_it() -> None:
    desk = Desk({"old": 1}, [1], None)
    assert desk.left() is None
    assert desk.hold("new", 3) == (True, None)
    desk.take("new", 3)
    assert desk.hold("new", 3) == (True, 3)  # its worker died, and another one goes on with it
    assert desk.hold("new", 4) is None  # to wait for a first result
    desk.note(3)
    assert desk.hold("new", 4) == (False, 3)
    desk.release(3)
    assert desk.hold("new", 4) == (True, 3)
    # of an earlier process: nobody holds it, and what that trial measured is known
    assert desk.hold("old", 5) == (True, 1)


def test_where_trials_are_and_the_time_that_is_left() -> None:
    desk = Desk({}, [], 0.0)
    left = desk.left()
    assert left is not None
    assert left < 0
    desk.tell(2, "recovery", 0.5)
    assert desk.progress() == {2: ("recovery", 0.5)}
    desk.release(2)
    assert desk.progress() == {}


def test_trials_are_read_whatever_is_there(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    states = TrialStates(store, "runs/x")
    folder = TrialFolder(tmp_path / "00003")
    folder.path.mkdir()
    folder.record.write_text("{}")
    states.put(3, folder)
    assert states.read(3) is None
    write_json(folder.record, to_json(replace(after(1), number=3)))
    states.put(3, folder)
    assert states.read(3) == after(1)
