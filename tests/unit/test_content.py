"""Hashes of a model's files.

Oracles: sha256 as the standard library gives it, and what must not be called (it raises).
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from foldsearch.model import content
from foldsearch.model.content import PIECE, content_of, file_hash

LONG_AGO = time.time() - 3600


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of several pieces, that was written long ago."""
    monkeypatch.setattr(content, "PIECE", 1000)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 20)
    monkeypatch.setattr(content, "_SETTLED_NS", -1)  # a test cannot set the time of change back
    return path


def test_a_hash_is_over_every_piece(large: Path) -> None:
    data = large.read_bytes()
    pieces = [hashlib.sha256(data[start : start + 1000]).digest() for start in range(0, len(data), 1000)]
    assert file_hash(large) == hashlib.sha256(b"".join(pieces)).hexdigest()
    large.write_bytes(b"")
    assert file_hash(large) == hashlib.sha256(hashlib.sha256(b"").digest()).hexdigest()


@pytest.mark.parametrize("where", [0, 0.31, 0.5, 0.77, 1])
def test_one_bit_anywhere_is_another_file(tmp_path: Path, where: float) -> None:
    """Larger than what earlier versions read of a file, with the size and the times as they were."""
    path, kept_in = tmp_path / "model.safetensors", tmp_path / "hashes"
    with path.open("wb") as file:
        file.truncate(2 * PIECE + 12345)
    before = file_hash(path, kept_in)
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(int(where * (stat.st_size - 1)))
        file.write(b"\x01")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_hash(path, kept_in) != before


def test_a_large_file_is_read_once_while_it_stays_as_it_is(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_in = tmp_path / "hashes"
    found = file_hash(large, kept_in)
    with monkeypatch.context() as patch:
        patch.setattr(content, "_piece_hash", lambda path, start: pytest.fail("read a second time"))
        assert file_hash(large, kept_in) == found
    data = bytearray(large.read_bytes())
    data[2500] ^= 1
    stat = large.stat()
    large.write_bytes(data)
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` and `rsync -t` do
    assert file_hash(large, kept_in) == file_hash(large) != found
    # what is kept and cannot be read is made anew
    for kept in kept_in.iterdir():
        kept.write_text("{")
    assert file_hash(large, kept_in) == file_hash(large)


def test_what_may_still_change_is_not_kept(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write within the clock's grain would leave no trace."""
    monkeypatch.setattr(content, "_SETTLED_NS", 2 * 10**9)
    file_hash(large, tmp_path / "hashes")
    assert not (tmp_path / "hashes").exists()


def test_a_cache_that_cannot_be_written_costs_time_only(large: Path, tmp_path: Path) -> None:
    (tmp_path / "hashes").write_text("a file, where a folder should be")
    assert file_hash(large, tmp_path / "hashes") == file_hash(large)


def test_each_part_of_a_model_has_a_hash_of_its_own(tmp_path: Path) -> None:
    names = {
        "config": ["config.json"],
        "tokenizer": [
            "tokenizer.json",
            "tokenizer_config.json",
            "merges.txt",
            "vocab.json",
            "chat_template.jinja",
        ],
        "code": ["modeling_new.py"],
        "other": ["generation_config.json", "LICENSE.txt"],
        "weights": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    }
    for name in [name for files in names.values() for name in files]:
        (tmp_path / name).write_text(f"this is {name}")

    def parts(*, with_code: bool = True) -> dict[str, str]:
        weights = [tmp_path / name for name in names["weights"]]
        small = [path for path in tmp_path.iterdir() if path not in weights]
        found = content_of(small, weights, with_code=with_code)
        return {part: getattr(found, part) for part in names} | {"all": found.short(1)}

    before = parts()
    assert len(set(before.values())) == 6
    assert parts() == before
    assert parts(with_code=False)["code"] == ""
    for part, files in names.items():
        for name in files:
            (tmp_path / name).write_text("changed")
            changed = {key for key, value in parts().items() if value != before[key]}
            assert changed == {part, "all"}, name
            (tmp_path / name).write_text(f"this is {name}")
    assert parts() == before
