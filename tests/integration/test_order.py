"""Cheap checks come before dear ones: what can be refused from small files is refused while no weight is readable.

Oracle: the weight file holds no weights (or there is none), so whoever reads it fails with another message.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from foldsearch import cli
from foldsearch.errors import ModelError
from foldsearch.model.source import locate, open_config, open_tokenizer, prepare
from tests.tiny import NUM_BLOCKS, save_model, write_corpus

STUDY = """\
model = "{model}"
data = "{data}"
device = "cpu"
precision = "bfloat16"
rungs = [0]
trials = 1
space = "foldgpt"
[splits]
sequence_length = 16
search = 6
recovery = 8
report = 6
"""


@pytest.fixture(params=["garbage", "absent"])
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, beside a study whose model has a config and a tokenizer and no readable weight."""
    model = Path(save_model(tmp_path / "model"))
    (model / "model.safetensors").unlink()
    if request.param == "garbage":
        (model / "model.safetensors").write_bytes(b"no weights" * 100)
    data = write_corpus(tmp_path / "corpus")
    (tmp_path / "study.toml").write_text(STUDY.format(model=model, data=data))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that cannot be done says; it leaves nothing behind."""
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert list(Path().iterdir()) == []
    assert not Path("../cache").exists()
    return said


STUDY_FILE = "../study.toml"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", STUDY_FILE, "--budget-gb", "0.0000001"], "no plan of the space 'foldgpt' keeps the budget"),
        (["run", STUDY_FILE, "--budget-gb", "0.0000001", "--dry-run"], "keeps the budget of 1e-07 GB"),
        (["run", STUDY_FILE, "--data", "../nothing.txt"], "../nothing.txt: there is no such file"),
        (
            ["run", STUDY_FILE, "--data", "../nothing.txt", "--dry-run"],
            "../nothing.txt: there is no such file",
        ),
        (["try", "0-3", "--study", STUDY_FILE, "--data", "package:nothing"], "'nothing' is not installed"),
        (["inspect", "--study", STUDY_FILE, "--data", "../nothing.txt"], "../nothing.txt: there is no such"),
        (["try", "0-9", "--study", STUDY_FILE], f"blocks go from 0 to {NUM_BLOCKS - 1}"),
        (["try", "0=1+r900 1-4", "--study", STUDY_FILE], "at most the model's width"),
        (["run", STUDY_FILE, "--out", "../study.toml"], "'../study.toml' is there already"),
        (["run", STUDY_FILE, "--out", "../study.toml", "--dry-run"], "'../study.toml' is there already"),
        (["run", STUDY_FILE, "--out", "../study.toml/x", "--dry-run"], "study.toml' is a file"),
    ],
)
def test_what_is_wrong_is_told_before_weights_are_read(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refused(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["run", STUDY_FILE],
        ["run", STUDY_FILE, "--dry-run"],
        ["try", "0-3", "--study", STUDY_FILE],
        ["inspect", "--study", STUDY_FILE],
    ],
)
def test_too_little_text_is_told_before_weights_are_read(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    Path("../short.txt").write_text("w5 w6 w7")
    assert "search" in refused(capsys, *words, "--data", "../short.txt")


@pytest.mark.parametrize("words", [["price", "0-3", "--study", STUDY_FILE], ["run", STUDY_FILE, "--dry-run"]])
def test_a_price_needs_no_weights(here: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 0
    assert "GB" in capsys.readouterr().out
    assert not Path("../cache").exists()


def test_nothing_else_is_wrong_with_the_study(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So the tests above are refused for what they say."""
    assert cli.main(["run", STUDY_FILE]) == 2
    assert "weights" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_weights_that_are_not_there_are_told_when_they_are_needed(tmp_path: Path) -> None:
    model = Path(save_model(tmp_path / "model"))
    (model / "model.safetensors").unlink()
    found = locate(str(model))
    assert open_config(found).num_hidden_layers == NUM_BLOCKS
    assert open_tokenizer(found)("w5 w6").input_ids == [5, 6]
    with pytest.raises(ModelError, match="holds no weights"):
        prepare(found, dtype="float32", cache_dir=tmp_path / "cache")
