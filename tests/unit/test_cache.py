"""The cache: oracles are files written by hand, of known sizes and times."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foldsearch import cache, cli

KEYS = [f"{number:016x}" for number in range(3)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of 100 bytes (the oldest), targets of 20 and states of 3 bytes; and a file that is no entry."""
    for age, (place, size) in enumerate(
        [
            (f"models/{KEYS[0]}-float32/a", 100),
            (f"targets/{KEYS[1]}.safetensors", 20),
            (f"states/{KEYS[2]}.bin", 3),
        ]
    ):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
        for one in (path, path.parent) if place.startswith("models") else (path,):
            os.utime(one, (1000 + age, 1000 + age))
    (tmp_path / "targets" / "mine.txt").write_text("mine")
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path))
    return tmp_path


def kinds(folder: Path) -> dict[str, int]:
    return {entry.kind: entry.size_bytes for entry in cache.entries(folder)}


def test_lists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kinds(folder) == {"models": 100, "targets": 20, "states": 3}
    assert cli.main(["cache"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("models", "targets", "states", "total", str(folder)))


def test_clears_one_kind_or_all_and_nothing_else(folder: Path) -> None:
    assert cli.main(["cache", "--clear", "targets"]) == 0
    assert kinds(folder) == {"models": 100, "states": 3}
    assert cli.main(["cache", "--clear"]) == 0
    assert kinds(folder) == {}
    assert (folder / "targets" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("keep", "left"),  # of 100 + 20 + 3 bytes: the oldest go first
    [
        ("1", {"models", "targets", "states"}),
        ("23e-9", {"targets", "states"}),
        ("22e-9", {"states"}),
        ("0", {}),
    ],
)
def test_keeps_what_fits(folder: Path, keep: str, left: set[str] | dict[str, int]) -> None:
    assert cli.main(["cache", "--keep-gb", keep]) == 0
    assert list(kinds(folder)) == [kind for kind in ("models", "states", "targets") if kind in left]


def test_what_a_process_holds_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lock in (f"models/.{KEYS[0]}-float32.lock", f"states/.{KEYS[2]}.bin.lock"):
        with (folder / lock).open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert cli.main(["cache", "--clear", lock.split("/")[0]]) == 0
            assert "entries that stay" in capsys.readouterr().err
    assert kinds(folder) == {"models": 100, "targets": 20, "states": 3}


@pytest.mark.parametrize("words", [["--clear", "nosuch"], ["--keep-gb", "-1"]])
def test_what_cannot_be_used_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert cli.main(["cache", *words]) == 2
    assert "must be" in capsys.readouterr().err
    assert len(kinds(folder)) == 3


# ---- made once, and used


def read(path: Path) -> bytes:
    return path.read_bytes()


def never(path: Path) -> None:
    raise AssertionError("this is not to be made")


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    yield
    cache.let_go()


def test_a_key_stands_for_all_its_parts() -> None:
    """Of a schema number, a content and settings each one makes another key; the order of settings does not."""
    parts = [
        (1, "a", {"n": 2, "m": 3}),
        (2, "a", {"n": 2, "m": 3}),
        (1, "b", {"n": 2, "m": 3}),
        (1, "a", {"n": 2}),
    ]
    assert len({cache.key(*each) for each in parts}) == 4
    assert cache.key(1, "a", {"m": 3, "n": 2}) == cache.key(*parts[0])
    assert all(cache._ENTRY.fullmatch(cache.key(*each)) for each in parts)


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "states" / f"{KEYS[0]}.bin"
    made = []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.05)  # the others come meanwhile
        path.write_bytes(b"abc")

    found: list[tuple[bytes, bool]] = []
    threads = [threading.Thread(target=lambda: found.append(cache.once(path, make, read))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [path]
    assert sorted(found) == [(b"abc", False), *[(b"abc", True)] * 3]


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("number", range(3))
def test_what_is_used_stays(folder: Path, number: int) -> None:
    """A folder, and files: as long as a process keeps one it is not removed, however little may be left."""
    entry = cache.entries(folder)[number]
    cache.once(entry.path, never, Path.exists, keep=True)
    cache.once(entry.path, never, Path.exists, keep=True)  # as a second trial does
    cache.trim(folder, 0)
    assert kinds(folder) == {entry.kind: entry.size_bytes}
    cache.let_go()
    assert [one.path for one in cache.trim(folder, 0)] == [entry.path]


def test_what_another_process_uses_stays_until_it_ends(folder: Path) -> None:
    entry = cache.entries(folder)[0]
    uses = (
        "import sys; from pathlib import Path; from foldsearch import cache\n"
        "cache.once(Path(sys.argv[1]), None, Path.exists, keep=True); print('kept', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", uses, str(entry.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "kept\n"
        cache.trim(folder, 0)
        assert kinds(folder) == {entry.kind: entry.size_bytes}
        user.communicate()
    cache.trim(folder, 0)
    assert kinds(folder) == {}


def test_an_empty_folder_is_an_entry_of_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "models" / f"{KEYS[0]}-float32").mkdir(parents=True)
    assert kinds(tmp_path) == {"models": 0}


def test_what_was_used_last_stays(folder: Path) -> None:
    """The oldest entry is used again, so the second oldest goes first."""
    cache.once(folder / "models" / f"{KEYS[0]}-float32", never, Path.exists)
    assert [one.kind for one in cache.trim(folder, 110)] == ["targets"]
    assert kinds(folder) == {"models": 100, "states": 3}


def test_what_a_killed_process_left_goes_too(folder: Path) -> None:
    """A folder on its way out is renamed first, so nobody lists it; nobody would remove it either."""
    left = folder / "models" / f".{KEYS[0]}-float32.gone"
    left.mkdir()
    (left / "half").write_bytes(b"x" * 50)
    before = kinds(folder)
    assert cache.trim(folder, 10**9) == []
    assert not left.exists()
    assert kinds(folder) == before


def test_what_goes_while_it_is_listed_is_not_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache._entry

    def gone(path: Path) -> cache.Entry:
        if path.parent.name == "targets":
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(cache, "_entry", gone)
    assert "targets" not in {one.kind for one in cache.entries(folder)}


def test_whoever_reads_while_others_remove_reads_it_whole(tmp_path: Path) -> None:
    """An entry that is removed again and again is made again: what is read is what was made."""
    path, stop = tmp_path / "evidence" / f"{KEYS[0]}.json", threading.Event()

    def remove() -> None:
        while not stop.is_set():
            cache.trim(tmp_path, 0)

    remover = threading.Thread(target=remove)
    remover.start()
    try:
        found = [cache.json_once(path, lambda: [1, 2, 3]) for _ in range(200)]
    finally:
        stop.set()
        remover.join()
    assert all(value == [1, 2, 3] for value, _ in found)
    assert not found[0][1]
