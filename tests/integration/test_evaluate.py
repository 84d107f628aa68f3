"""What a folded model still knows, beside dense, as a person asks for it: `foldsearch evaluate`.

Oracles: the plain models' own cross entropy, lm-evaluation-harness on the same models without our glue, the texts of
the run itself, and what must not be called (it raises).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

from foldsearch import cli, context, prepare, rebuild
from foldsearch.context import open_workbench
from foldsearch.model.choices import compare_choices
from foldsearch.prepare import prepare_context
from foldsearch.rebuild import recovered_model
from foldsearch.run import Run, RunFolder
from foldsearch.spec.study import SplitSettings
from tests.contexts import begin_run, run_queued, tiny_study
from tests.tiny import VOCABULARY, tokenizer

# the harness's own libraries, when they are imported
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus, and a run of one trial, made without Ray."""
    place = tmp_path_factory.mktemp("evaluate")
    splits = SplitSettings(sequence_length=32, search=6, recovery=8, report=6)
    context = begin_run(tiny_study(place, splits=splits), place / "run", cache_dir=place / "cache")
    run_queued(context, "window", 2)
    rows = questions(30)
    (place / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def questions(count: int) -> list[dict[str, object]]:
    rng = random.Random(7)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{rng.randrange(3, VOCABULARY)}" for _ in range(rng.randint(least, most)))

    return [
        {"question": words(5, 30), "options": [words(1, 5) for _ in range(3)], "answer": rng.randrange(3)}
        for _ in range(count)
    ]


def evaluate(place: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(place),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))
        try:
            code = cli.main(("evaluate", "run", *words))
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def models(place: Path) -> list[torch.nn.Module]:
    context = prepare_context(Run.open(place / "run").study, place / "run", cache_dir=place / "cache")
    return [open_workbench(context).dense, recovered_model(context, 0)[0]]


@torch.no_grad()
def perplexity(model, question: str, option: str) -> float:
    ids = tokenizer()(f"{question} {option}", return_tensors="pt").input_ids
    count = len(option.split())
    logits = model(input_ids=ids, use_cache=False).logits[0, -count - 1 : -1]
    return math.exp(torch.nn.functional.cross_entropy(logits.double(), ids[0, -count:]))


# ---- questions


def test_questions_are_answered_and_written_down(place: Path) -> None:
    code, out, err = evaluate(place, "--questions", "q.jsonl")
    assert code == 0, err
    rows = [json.loads(line) for line in (place / "q.jsonl").read_text().splitlines()]
    asked = [
        [[perplexity(model, row["question"], option) for option in row["options"]] for row in rows]
        for model in models(place)
    ]
    expected = compare_choices(*asked, [row["answer"] for row in rows])
    written = json.loads((place / "run" / "evaluations" / "00000-q.json").read_text())
    for name in ("items", "accuracy", "dense_accuracy", "agreement", "accuracy_se"):
        assert written[name] == pytest.approx(getattr(expected, name)), name
    assert written["stability"] == pytest.approx(expected.stability, abs=1e-3)
    assert written["effective_items"] == pytest.approx(expected.effective_items, rel=1e-2)
    assert 0 < written["agreement"] < 1  # there is something to see
    for row, dense, ours in zip(written["perplexities"], *asked, strict=True):
        assert row["dense"] == pytest.approx(dense, rel=1e-4)
        assert row["folded"] == pytest.approx(ours, rel=1e-4)
    assert (written["trial"], written["limit"], written["dtype"]) == (0, None, "float32")
    assert (written["healing_tokens"], written["recovery_tokens"]) == (8 * 32, 64)
    assert "healed on 256 tokens (forward only), trained on 64 tokens" in " ".join(out.split())
    assert f"{expected.accuracy:.1%} ± {expected.accuracy_se:.1%}" in out
    assert "00000-q.json" in out
    assert "q.jsonl, dense ..." in err


def test_a_part_is_written_beside_the_whole(place: Path) -> None:
    code, _, err = evaluate(place, "--questions", "q.jsonl", "--limit", "5", "--trial", "0")
    assert code == 0, err
    written = json.loads((place / "run" / "evaluations" / "00000-q-first5.json").read_text())
    assert (written["items"], written["limit"]) == (5, 5)


def test_another_file_of_the_same_name_takes_nothing_away(place: Path) -> None:
    (place / "other").mkdir(exist_ok=True)
    rows = (place / "q.jsonl").read_text().splitlines()
    (place / "other" / "q.jsonl").write_text("\n".join(rows[:7]))
    folder = place / "run" / "evaluations"
    assert evaluate(place, "--questions", "q.jsonl")[0] == 0
    first = (folder / "00000-q.json").read_text()
    for _ in range(2):  # asked again it takes the place of its own results
        assert evaluate(place, "--questions", "other/q.jsonl")[0] == 0
        assert (folder / "00000-q.json").read_text() == first
        (beside,) = folder.glob("00000-q-????????.json")
        assert json.loads(beside.read_text())["items"] == 7


# ---- what is refused, before a model is loaded


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("no model is to be loaded")

    for module, name in (
        (prepare, "prepare_context"),
        (context, "open_workbench"),
        (rebuild, "recovered_model"),
    ):
        monkeypatch.setattr(module, name, never)


def refused(place: Path, *words: str) -> str:
    code, out, err = evaluate(place, *words)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.usefixtures("no_model")
def test_what_cannot_be_asked_is_told(place: Path, tmp_path: Path) -> None:
    assert "evaluate needs something to ask" in refused(place)
    assert "only a trial that reached the last rung" in refused(
        place, "--questions", "q.jsonl", "--trial", "8"
    )
    assert "at least 2 for a standard error, not 1" in refused(
        place, "--questions", "q.jsonl", "--limit", "1"
    )
    assert "none.jsonl: cannot be read" in refused(place, "--questions", "none.jsonl")
    assert "two are called 'q'" in refused(place, "--questions", "q.jsonl", "--questions", "sub/q.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(questions(1)[0]) + '\n{"question": "w3", "options": ["w4", "w5"]}\n')
    assert f"{bad}, line 2: there is no 'answer'" in refused(place, "--questions", str(bad))
    bad.write_text("\n".join(json.dumps({**row, "question": "w3 " * 127}) for row in questions(2)))
    assert f"{bad}, line 1: question and option 0 are" in refused(place, "--questions", str(bad))


@pytest.mark.usefixtures("no_model")
def test_what_the_run_saw_is_refused(place: Path, tmp_path: Path) -> None:
    saw = context.read_splits(RunFolder(place / "run"))
    inside = place / "corpus" / "inside.jsonl"
    inside.write_text((place / "q.jsonl").read_text())
    err = refused(place, "--questions", str(inside))
    inside.unlink()
    assert f"belongs to {place / 'corpus'}, which 'run' was made with" in err
    for tokens in (saw.search, saw.recovery):
        text = tokenizer().decode(tokens.ids_NT[3, 5:20])
        path = tmp_path / f"{tokens.name}.jsonl"
        rows = questions(3)
        rows[1]["question"] = f"w3 {text} w4"
        path.write_text("\n".join(map(json.dumps, rows)))
        err = refused(place, "--questions", str(path))
        assert f"1 of {path} occurs in texts that this run used" in err
        assert f"the first (line 2) in the {tokens.name} texts" in err
    # the report's texts only ever measure
    rows[1]["question"] = tokenizer().decode(saw.report.ids_NT[3, 5:20])
    assert not trials_seen(rows, saw)


def trials_seen(rows: list[dict[str, object]], saw: context.Splits) -> list[tuple[int, str]]:
    from foldsearch.model.choices import seen

    texts = enumerate(str(row["question"]) for row in rows)
    return seen(texts, tokenizer(), (saw.search, saw.recovery))


# ---- tasks of lm-evaluation-harness


@pytest.fixture(scope="module")
def tasks(place: Path) -> Path:
    """A folder with a multiple-choice task over a local file, one on the run's own texts, and one on the hub."""
    pytest.importorskip("lm_eval")
    folder = place / "tasks"
    folder.mkdir()
    saw = context.read_splits(RunFolder(place / "run"))
    rows = questions(30)
    overlapping = [dict(row) for row in rows]
    overlapping[4]["question"] = tokenizer().decode(saw.recovery.ids_NT[0])
    for name, made in (("tiny_words", rows), ("tiny_more", questions(40)[30:]), ("tiny_seen", overlapping)):
        (folder / f"{name}.json").write_text(json.dumps(made))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{name}.json")},
                "cache_dir": str(place / "datasets"),
            },
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "options",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    both = {"metric": "acc", "weight_by_size": True}
    group = {"group": "tiny_both", "task": ["tiny_words", "tiny_more"], "aggregate_metric_list": [both]}
    (folder / "tiny_both.yaml").write_text(yaml.safe_dump(group))
    hub = {**task, "task": "tiny_hub", "dataset_path": "nobody/nothing"}
    del hub["dataset_kwargs"]
    (folder / "tiny_hub.yaml").write_text(yaml.safe_dump(hub))
    return folder


@pytest.mark.slow
def test_a_task_scores_as_the_harness_alone_does(place: Path, tasks: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    words = ("--tasks", "tiny_words", "--include-path", str(tasks))
    code, out, err = evaluate(place, *words)
    assert code == 0, err
    written = json.loads((place / "run" / "evaluations" / "00000-tiny_words.json").read_text())
    scores = {score["metric"]: score for score in written["scores"]}
    assert set(scores) == {"acc", "acc_norm"}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    right = {"acc": [], "acc_norm": []}
    for who, model in zip(("dense", "folded"), models(place), strict=True):
        with torch.no_grad():
            before_BTV = model(input_ids=torch.arange(3, 30)[None]).logits
            harnessed = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=4)
            assert torch.equal(
                model(input_ids=torch.arange(3, 30)[None]).logits, before_BTV
            )  # it ties weights
        alone = lm_eval.evaluate(harnessed, manager.load(["tiny_words"]))
        for metric, score in scores.items():
            assert score[who] == pytest.approx(alone["results"]["tiny_words"][f"{metric},none"])
            assert score[f"{who}_se"] == pytest.approx(
                alone["results"]["tiny_words"][f"{metric}_stderr,none"]
            )
            right[metric].append([row[metric] for row in alone["samples"]["tiny_words"]])
    for metric, score in scores.items():
        dense, folded = right[metric]
        assert score["agreement"] == sum(a == b for a, b in zip(dense, folded, strict=True)) / 30
        assert score["items"] == 30
    assert "tiny_words" in out
    assert "tiny_words, folded: Running loglikelihood requests ..." in err
    assert "it/s" not in err  # the harness's own bars


def test_a_part_of_a_task(place: Path, tasks: Path) -> None:
    code, _, err = evaluate(place, "--tasks", "tiny_words", "--include-path", str(tasks), "--limit", "6")
    assert code == 0, err
    written = json.loads((place / "run" / "evaluations" / "00000-tiny_words-first6.json").read_text())
    assert {score["items"] for score in written["scores"]} == {6}


def test_a_group_is_scored_with_its_tasks(place: Path, tasks: Path) -> None:
    code, _, err = evaluate(place, "--tasks", "tiny_both", "--include-path", str(tasks))
    assert code == 0, err
    written = json.loads((place / "run" / "evaluations" / "00000-tiny_both.json").read_text())
    scores = {score["task"]: score for score in written["scores"] if score["metric"] == "acc"}
    assert {name: score["items"] for name, score in scores.items()} == {
        "tiny_both": 40, "tiny_words": 30, "tiny_more": 10,
    }  # fmt: skip
    for who in ("dense", "folded"):
        right = 30 * scores["tiny_words"][who] + 10 * scores["tiny_more"][who]
        assert scores["tiny_both"][who] == pytest.approx(right / 40)


@pytest.mark.usefixtures("no_model")
def test_tasks_that_cannot_be_asked_are_told(place: Path, tasks: Path) -> None:
    where = ("--include-path", str(tasks))
    assert "Did you mean 'tiny_words'" in refused(place, "--tasks", "tiny_word", *where)
    assert "there is no folder 'nowhere'" in refused(
        place, "--tasks", "tiny_words", "--include-path", "nowhere"
    )
    err = refused(place, "--tasks", "tiny_hub", *where)
    assert "task tiny_hub: its data cannot be loaded" in err
    assert "--include-path" in err
    err = refused(place, "--tasks", "tiny_seen", *where)
    assert (
        "1 of tiny_seen occurs in texts that this run used, the first (item 5) in the recovery texts" in err
    )


@pytest.mark.usefixtures("no_model")
def test_the_harness_is_an_extra(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'foldsearch[eval]'" in refused(place, "--tasks", "arc_easy")
