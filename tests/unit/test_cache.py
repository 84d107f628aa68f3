"""The cache: oracles are files written by hand, of known sizes and times."""

from __future__ import annotations

import fcntl
import os
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
        os.utime(path, (1000 + age, 1000 + age))
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
    for lock in (f"models/.{KEYS[0]}-float32.lock", f"states/{KEYS[2]}.lock"):
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
