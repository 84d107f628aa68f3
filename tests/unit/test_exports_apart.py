"""What an export must not do to what is not its own, and what it takes from a model's README."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldsearch.errors import InputError
from foldsearch.export.folder import whole_or_absent
from foldsearch.export.passport import is_passport
from foldsearch.export.recipe import _in_folder


def test_a_folder_that_came_to_be_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def export() -> None:
        with whole_or_absent(out, 1) as temporary:
            (temporary / "model").write_text("new")
            out.mkdir()
            (out / "mine.txt").write_text("somebody else's")

    with pytest.raises(InputError, match="exists already"):
        export()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("precious", False),
        ("[1]", False),
        ('{"plan": "0-3"}', False),
        ('{"foldsearch": 1, "plan": "0-3", "base_model": "m"}', True),
    ],
)
def test_only_a_plan_is_overwritten(tmp_path: Path, text: str, ours: bool) -> None:
    (tmp_path / "file").write_text(text)
    assert is_passport(tmp_path / "file") == ours


@pytest.mark.parametrize(
    ("readme", "told"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\ntags:\n- a\nlicense: 'mit' # kept\n---\n", "mit"),
        ("---\nlicense:\n- apache-2.0\n- mit\n---\n", "apache-2.0, mit"),
        ("---\nlicense:\ntags:\n- a\n---\n", "unknown"),
        ("---\ntags:\n- a\n---\nThe data\nlicense: gpl-3.0-only\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("no front matter", "unknown"),
    ],
)
def test_a_licence_is_what_the_front_matter_says(tmp_path: Path, readme: str, told: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert _in_folder(tmp_path) == told
