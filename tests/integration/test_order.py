"""Cheap checks come before dear ones: what can be refused from small files is refused while no weight is readable.

Oracle: the weight file holds no weights (or there is none), so whoever reads it fails with another message.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from foldsearch import api, cli
from foldsearch import prepare as preparation
from foldsearch.errors import ModelError
from foldsearch.files import write_json
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


def test_where_an_export_goes_is_looked_at_before_the_model(
    run_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's model is a fake that cannot be opened at all."""
    monkeypatch.setattr(
        preparation, "prepare_context", lambda *args, **more: pytest.fail("the model was opened")
    )
    monkeypatch.chdir(run_path)
    Path("report").mkdir(exist_ok=True)  # made with the first report
    assert cli.main(["export", ".", "--out", "report"]) == 2
    assert "report exists already" in capsys.readouterr().err
    assert cli.main(["export", ".", "--out", "study.json/x"]) == 2
    assert "study.json' is a file" in capsys.readouterr().err
    shared = next(entry.number for entry in api.open_run(run_path).finished if "=" in str(entry.plan))
    write_json(run_path / "pick.json", {"trial": shared})
    assert cli.main(["export", ".", "--out", "new", "--to", "stock"]) == 2
    assert "stock blocks" in capsys.readouterr().err


def test_weights_that_are_not_there_are_told_when_they_are_needed(tmp_path: Path) -> None:
    model = Path(save_model(tmp_path / "model"))
    (model / "model.safetensors").unlink()
    found = locate(str(model))
    assert open_config(found).num_hidden_layers == NUM_BLOCKS
    assert open_tokenizer(found)("w5 w6").input_ids == [5, 6]
    with pytest.raises(ModelError, match="holds no weights"):
        prepare(found, dtype="float32", cache_dir=tmp_path / "cache")


def test_settings_that_do_not_apply_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, on standard error, and the command goes on."""
    study = STUDY.format(model=save_model(tmp_path / "model"), data=write_corpus(tmp_path / "corpus"))
    head = 'text_column = "body"\nrevision = "main"\nsampler = "nsga2"\n'
    (tmp_path / "study.toml").write_text(head + study + "[recovery]\nbatch = 4\n[halving]\nkeep = 0.3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path / "cache"))
    of_files = [
        f"revision does not apply: '{tmp_path / 'model'}' is not on the hub.",
        f"text_column does not apply to '{tmp_path / 'corpus'}': plain text has no columns.",
    ]
    untrained = "recovery.batch does not apply: the only rung is 0, so nothing is trained."
    of_search = [
        untrained,
        "halving.keep does not apply: there is one rung only, after which every trial ends.",
        "space.neighbour_share does not apply: the sampler nsga2 takes no neighbours, as it crosses only what all "
        "trials have in common.",
    ]
    for words, expected in (
        (["run", "study.toml", "--dry-run"], of_search + of_files),
        (["try", "0-3", "--study", "study.toml"], [untrained, *of_files]),
        (["inspect", "--study", "study.toml"], of_files),
    ):
        assert cli.main(words) == 0
        said = capsys.readouterr().err.splitlines()
        assert [line for line in said if "not apply" in line] == expected
