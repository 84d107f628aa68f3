"""Files that are whole or absent. Oracle: what lies in the folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from foldsearch.errors import InputError
from foldsearch.files import ABANDONED_SECONDS, disk_is_full, replace_atomically, scratch


def test_what_a_killed_process_left_goes_once_it_is_old(tmp_path: Path) -> None:
    """A young one may be another machine's, at work in the same folder."""
    old, young, of_another = (
        tmp_path / name for name in (".a.json.11.tmp", ".a.json.12.tmp", ".b.json.11.tmp")
    )
    for left in (old, young, of_another):
        left.write_text("half")
    long_ago = time.time() - ABANDONED_SECONDS - 1
    for left in (old, of_another):
        os.utime(left, (long_ago, long_ago))
    replace_atomically(tmp_path / "a.json", lambda path: path.write_text("whole"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", young.name, of_another.name}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (ValueError("database or disk is full"), True),
        (OSError(13, "Permission denied"), False),
        (RuntimeError("the disk spins"), False),
    ],
)
def test_a_full_disk_is_known_by_its_number_or_its_words(error: Exception, expected: bool) -> None:
    assert disk_is_full(error) is expected
    outer = RuntimeError("while writing")
    outer.__cause__ = error
    assert disk_is_full(outer) is expected


def test_a_scratch_folder_goes_and_says_what_of_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a full disk is told as one; where no folder can be written to at all, that is said."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(error: Exception) -> None:
        with scratch("test") as folder:
            assert folder.parent == tmp_path
            raise error

    with pytest.raises(InputError, match="has no room left"):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(KeyError):
        fail(KeyError("x"))
    assert list(tmp_path.iterdir()) == []

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with pytest.raises(InputError, match="Set TMPDIR"), scratch("test"):
        pass
