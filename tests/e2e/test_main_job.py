"""The main job on a tiny random Llama, typed as a person types it: run, front, pick, export, try.

Oracles: the budget itself, the folder that transformers reloads, the perplexity that the trial measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from foldsearch.cli import main
from foldsearch.report.view import RunView
from tests.tiny import VOCABULARY, save_model

STUDY = """
model = "{model}"
data = "{data}"
device = "cpu"
precision = "float32"
rungs = [0, 64, 192]
trials = 6
[space]
name = "tiny"
removal = [0.0, 0.8]
criteria = ["gate", "block_influence", "window", "greedy"]
gate_eps = [0.01]
[space.groups]
max_groups = 1
[splits]
sequence_length = 16
search = 4
recovery = 8
report = 4
[screen]
plans = 0  # trials are what is looked at here
[gates]
steps = 2
[target]
dtype = "float32"
context = 64
"""


@dataclass
class Done:
    """What a command left: exit code and what it said."""

    code: int
    out: str
    err: str


def foldsearch(*words: str, cwd: Path) -> Done:
    """One command in this process: starting another one takes ten seconds of imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, text and foldsearch.toml, in which a run has been made."""
    here = tmp_path_factory.mktemp("main-job")
    model = save_model(here / "model")
    rng = random.Random(0)
    (here / "text").mkdir()
    for number in range(40):
        words = " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(60))
        (here / "text" / f"{number}.txt").write_text(words)
    (here / "foldsearch.toml").write_text(STUDY.format(model=model, data=here / "text"))
    return here


@dataclass
class Stopped:
    """A run at the moment when Ctrl-C had ended it."""

    done: Done
    results: dict[int, object]  # of each finished trial


@pytest.fixture(scope="module")
def stopped(place: Path) -> Stopped:
    """A run that Ctrl-C ends after its first trial; dense needs 0.0003 GB."""
    command = [sys.executable, "-m", "foldsearch", "run", "--budget-gb", "0.00024", "--out", "runs/tiny"]
    lines = []
    with subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "1 of " in line:  # a trial has ended
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    return Stopped(Done(process.returncode, "".join(lines) + out, err), results_of(place / "runs" / "tiny"))


@pytest.fixture(scope="module")
def run(place: Path, stopped: Stopped) -> Path:
    """The same run, gone on with to its end."""
    done = foldsearch("resume", "runs/tiny", cwd=place)
    assert done.code == 0, done.err
    (place / "run.log").write_text(stopped.done.out + done.out)
    return place / "runs" / "tiny"


def results_of(run: Path) -> dict[int, object]:
    return {trial.number: trial.results for trial in RunView.open(run).finished}


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(stopped: Stopped) -> None:
    assert stopped.done.code == 130, stopped.done.err
    assert "Go on with: foldsearch resume runs/tiny" in stopped.done.out
    assert "Traceback" not in stopped.done.err
    assert stopped.results


def test_a_run_that_goes_on_loses_nothing(stopped: Stopped, run: Path) -> None:
    assert results_of(run).items() > stopped.results.items()
    assert max(record.number for record in RunView.open(run).trials) >= 5


def test_a_run_ends_with_a_front_within_the_budget(run: Path, place: Path) -> None:
    view = RunView.open(run)
    assert len(view.finished) >= 3
    assert all(entry.cost.memory_bytes <= 240_000 for entry in view.finished)
    ended = [
        trial for trial in view.trials if trial.state in ("finished", "repeat")
    ]  # a repeat comes to a plan that is
    assert {"gate", "window", "greedy"} <= {trial.removed.criterion for trial in ended if trial.removed}
    log = (place / "run.log").read_text()
    assert f"{len(view.front)} on the front" in log
    assert "gates: 2 steps" in log
    assert "left" in log  # an ETA
    assert (run / "report" / "front.png").stat().st_size > 10_000


def test_a_blank_prompt_is_refused_before_anything_is_written(run: Path, place: Path) -> None:
    done = foldsearch("export", "runs/tiny", "--out", "blank", "--prompt", " ", cwd=place)
    assert done.code == 2
    assert "it is blank" in done.err
    assert not (place / "blank").exists()


def test_the_chosen_model_is_exported_as_it_was_measured(run: Path, place: Path) -> None:
    from foldsearch.export import load_exported

    number = foldsearch("pick", "runs/tiny", "--knee", cwd=place).out.strip()
    done = foldsearch("export", "runs/tiny", "--out", "shipped", "--prompt", "w5 w9", cwd=place)
    assert done.code == 0, done.err
    assert "Verified in a fresh process" in done.out
    _, _, words = done.out.partition("w5 w9 ...")
    assert len(words.partition("dense")[2].split()) > 5
    view = RunView.open(run)
    entry = view.pick(number=int(number))
    shipped = json.loads((place / "shipped" / "card.json").read_text())["report"]
    assert shipped["plan"] == str(entry.plan)
    assert words.split()[0] == shipped["runtime"] == ("stock" if entry.plan.only_drops else "folded")
    assert shipped["exported"]["perplexity"] == pytest.approx(entry.final.perplexity, rel=1e-3)
    assert shipped["exported"]["weight_bytes"] == entry.cost.stored_bytes
    model, _ = load_exported(place / "shipped")
    assert model.config.num_hidden_layers == entry.plan.depth

    again = foldsearch("export", "runs/tiny", "--out", "shipped", cwd=place)
    assert again.code == 2
    assert "exists already" in again.err


def test_a_plan_is_tried_without_a_search(place: Path) -> None:
    done = foldsearch("try", "0 2 3=2+r2+n 4", "--tokens", "64", "--out", "tried", cwd=place)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if line[:5].strip().isdigit() and "±" in line]
    assert [(row[0], row[1]) for row in rows] == [("0", "0"), ("1", "64")]
    assert (place / "tried" / "trials" / "00000" / "recovered.safetensors").is_file()


def test_a_plan_is_priced_without_text(place: Path) -> None:
    done = foldsearch("price", "0 2-4", cwd=place)
    assert done.code == 0, done.err
    assert "total, GB" in done.out
    assert re.search(r"batch 1, \w+ weights$", done.out.strip())  # in the dtype's own numbers
    refused = foldsearch("price", "0 2-5", cwd=place)
    assert refused.code == 2
    assert "blocks go from 0 to 4" in refused.err
    held = foldsearch("price", "0 2-4", "--weights", "q8_0", cwd=place)
    assert "no export holds" not in held.err
    assert "gguf weights in q8_0" in held.out
    other = foldsearch("price", "0-2~linear 3-4", "--weights", "q8_0", cwd=place)
    assert other.code == 0, other.err
    assert "no export holds this plan in q8_0: gguf has nothing for" in other.err
    stock = foldsearch("price", "0-2 3a 4", "--runtime", "stock", cwd=place)
    assert stock.code == 0, stock.err
    assert "no export holds this plan: stock has nothing for" in stock.err


def test_a_model_is_inspected(place: Path) -> None:
    done = foldsearch("inspect", "--out", "cosines.png", cwd=place)
    assert done.code == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[1:6]] == list("01234")
    assert (place / "cosines.png").stat().st_size > 10_000


def test_a_dry_run_makes_nothing(place: Path) -> None:
    done = foldsearch("run", "--budget-gb", "0.00024", "--dry-run", "--out", "runs/dry", cwd=place)
    assert done.code == 0, done.err
    assert "of random ones" in done.out
    assert not (place / "runs" / "dry").exists()


def test_a_budget_that_no_plan_meets_names_the_smallest(place: Path) -> None:
    done = foldsearch("run", "--budget-gb", "0.00001", "--out", "runs/never", cwd=place)
    assert done.code == 2
    assert "its smallest reaches 0.0" in done.err
    assert not (place / "runs" / "never").exists()


def test_a_budget_that_dense_meets_is_said_and_searched_below(place: Path) -> None:
    done = foldsearch("run", "--budget-gb", "1", "--dry-run", cwd=place)
    assert done.code == 0, done.err
    assert "the dense model keeps the budget already" in done.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('data = "{text}"|data = "{one}"', "document"),
        ('data = "{text}"|data = {{search = "{text}", recovery = "{text}", report = "{text}"}}', "share"),
        ('model = "{model}"|model = "{encoder}"', "foldsearch folds decoder models only"),
        ('data = "{text}"|data = "{text}/none.txt"', "none.txt"),
    ],
    ids=["too few documents", "overlapping splits", "not a decoder", "no such text"],
)
def test_unusable_input_is_told_and_no_run_is_left(
    place: Path, tmp_path: Path, change: str, said: str
) -> None:
    from transformers import BertConfig, BertForMaskedLM

    small = {"vocab_size": 96, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertForMaskedLM(BertConfig(**small, intermediate_size=8)).save_pretrained(tmp_path / "encoder")
    names = {"model": place / "model", "text": place / "text", "encoder": tmp_path / "encoder"}
    names["one"] = min((place / "text").iterdir())
    old, new = (part.format(**names) for part in change.split("|"))
    study = STUDY.format(model=names["model"], data=names["text"])
    assert old in study
    (tmp_path / "foldsearch.toml").write_text(study.replace(old, new))
    done = foldsearch("run", "--budget-gb", "0.00024", cwd=tmp_path)
    assert done.code == 2
    assert said in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "foldsearch.toml"]


@pytest.mark.slow
def test_everything_is_searched_and_what_it_replaces_is_exported(place: Path) -> None:
    """The space of everything, by its name, at low fidelity: every fate is built, a replaced plan ships verified."""
    study = STUDY[: STUDY.index("[space]")] + STUDY[STUDY.index("[splits]") :]
    text = study.replace("trials = 6", 'trials = 8\nspace = "everything"')
    (place / "everything.toml").write_text(
        text.format(model=place / "model", data=place / "text") + "[starts]\ntokens = 64\n"
    )
    command = [sys.executable, "-m", "foldsearch", "run", "everything.toml", "--out", "runs/everything"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    view = RunView.open(place / "runs" / "everything")
    tried = {record.removed.fate.name for record in view.trials if record.removed is not None}
    assert {"replace", "share"} <= tried
    number = next(
        trial.number
        for trial in view.finished
        if trial.removed is not None and trial.removed.fate.name == "replace"
    )
    done = foldsearch("export", "runs/everything", "--trial", str(number), "--out", "replaced", cwd=place)
    assert done.code == 0, done.err
    assert "Verified in a fresh process" in done.out
    assert "~" in json.loads((place / "replaced" / "card.json").read_text())["report"]["plan"]
