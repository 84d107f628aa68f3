"""`foldsearch extend` on a tiny model, from the command to the exported folder.

Oracles: the base model's perplexity, what a trial's folder holds, the exported model's own config, another process
(inside the verification), and folders listed before and after.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import foldsearch
from foldsearch import cli
from foldsearch.export import load_exported
from foldsearch.model.parts import GAMMA_START
from foldsearch.plan.plan import FoldPlan
from tests.tiny import NUM_BLOCKS, save_model, write_corpus

STUDY = """\
space = "foldgpt"
device = "cpu"
precision = "float32"
rungs = [64, 256]
[splits]
sequence_length = 16
search = 6
recovery = 8
report = 6
"""
PLAN = "0-1 1=1+r2+n 2 2=2+r2+n 3-4"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, a text and a study."""
    place = tmp_path_factory.mktemp("extend")
    model, data = save_model(place / "model"), write_corpus(place / "corpus")
    (place / "tiny.toml").write_text(f'model = "{model}"\ndata = "{data}"\n{STUDY}')
    return place


@pytest.fixture(autouse=True)
def _here(place, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def extend(place: Path, *words: str) -> int:
    return cli.main(["extend", "--study", str(place / "tiny.toml"), "--blocks", "1-3", *words])


def test_extend_prices_trains_measures_and_exports(place, capsys):
    code = extend(
        place, "--to", "7", "--rank", "0.0625", "--tokens", "128", "--out", "kept", "--export", "deep"
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    # the price comes first, with the strip and its ruler, and says that all of it grows
    assert out.startswith("0\n██▒█▒██\n")
    assert (
        "2 of 7 positions are repeats, each with an adapter of rank 2 on every linear and an output norm"
        in out
    )
    assert out.index("KV cache, GB") < out.index("search KL")
    grows = re.search(
        r"memory ([+\-\d.]+)%.*KV cache ([+\-\d.]+)%.*decode ([+\-\d.]+)%", " ".join(out.split())
    )
    assert grows
    assert float(grows[2]) == 40.0  # two more of five caches
    assert all(float(share) > 0 for share in grows.groups())
    # the start, near the base model, and the end
    trial = Path("kept/trials/00000")
    record = json.loads((trial / "trial.json").read_text())
    assert record["draft"]["plan"]["plan"] == PLAN
    start, end = (result["quality"] for result in record["results"])
    assert [result["recovery_tokens"] for result in record["results"]] == [0, 128]
    assert start["kl"] < 0.01
    assert abs(start["perplexity"] / start["dense_perplexity"] - 1) < 0.02
    assert end["perplexity"] < start["perplexity"]
    for quality in (start, end):
        assert f"{quality['kl']:.4f}" in out
        assert f"{quality['perplexity']:.2f}" in out
    # what repeats carry was trained
    trained = load_file(trial / "recovered.safetensors")
    ups = [value for name, value in trained.items() if re.search(r"layers\.[24]\..*(proj|inner)\.up$", name)]
    gammas = [value for name, value in trained.items() if name.endswith("gamma")]
    assert len(ups) == 2 * 7
    assert all(up.any() for up in ups)
    assert len(gammas) == 2 * 2
    assert not any(gamma.eq(GAMMA_START).all() for gamma in gammas)
    # the export is verified, and runs the plan
    assert "Verified in a fresh process" in out
    model, tokenizer = load_exported(Path("deep"))
    assert model.config.fold["plan"] == PLAN
    assert model.config.num_hidden_layers == 7
    assert tokenizer is not None
    written = json.loads(Path("deep/card.json").read_text())
    assert written["recipe"]["trial"] == record
    assert sorted(path.name for path in Path().iterdir()) == ["deep", "kept"]


def test_a_study_without_rung_0_still_shows_the_start(place, capsys):
    assert extend(place, "--to", "9", "--pattern", "sequential", "--rank", "0") == 0
    out, _ = capsys.readouterr()
    assert "0-3 1=1+n 2=2+n 3=3+n 1=1+n 4" in out
    assert "each with an output norm of its own" in out
    assert [row.split()[:2] for row in out.splitlines() if re.match(r" *\d  ", row)][-3:] == [
        ["0", "0"], ["1", "64"], ["2", "256"],
    ]  # fmt: skip
    assert list(Path().iterdir()) == []  # nothing was asked to be kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "5"), "more than 5, got 5"),
        (("--to", "7", "--rank", "33"), "the model's width, 32"),
        (("--to", "7", "--blocks", "3-5"), "blocks go from 0 to 4, got 3-5"),
    ],
)
def test_what_cannot_be_extended_leaves_nothing(place, capsys, words, message):
    assert extend(place, "--out", "kept", "--export", "deep", *words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert list(Path().iterdir()) == []


def test_a_text_that_cannot_be_used_leaves_nothing(place, capsys):
    assert extend(place, "--to", "7", "--data", "nowhere.txt", "--out", "kept", "--export", "deep") == 2
    assert "nowhere.txt" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_a_trained_extension_that_diverges_is_not_exported(place, capsys, monkeypatch):
    monkeypatch.setattr("foldsearch.model.recover.Recovery._step", lambda self, rows: float("nan"))
    assert extend(place, "--to", "7", "--export", "deep") == 2
    assert "the trial diverged" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_the_public_name():
    assert str(foldsearch.extended(FoldPlan.identity(NUM_BLOCKS), 1, 3, 7, rank=2)) == PLAN
    assert FoldPlan.parse(PLAN, NUM_BLOCKS).depth == 7
