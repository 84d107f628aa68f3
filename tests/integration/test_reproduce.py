"""An export is made again from its card alone: `foldsearch reproduce`.

Oracles: the hashes of the first export's files, on the same machine with as many threads; the run folder, which is
gone by then; texts and models that are changed by hand.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foldsearch import api, prepare
from foldsearch.cli import main
from foldsearch.export import reproduce
from foldsearch.export.card import read_card, write_card
from foldsearch.export.figures import Predicted
from foldsearch.further import recover_further
from foldsearch.model.training import FurtherTraining
from foldsearch.plan.cost import price
from foldsearch.plan.latency import Latency, Line, Timed
from foldsearch.plan.plan import FoldPlan
from foldsearch.progress import silent
from foldsearch.report.view import RunView
from foldsearch.spec.load import study_from_json
from tests.contexts import begin_run, run_queued, tiny_study
from tests.tiny import price_table

FURTHER = 192


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text, and exports of a trial before and after it was trained further; no run."""
    place = tmp_path_factory.mktemp("reproduce")
    study = tiny_study(place, rungs=(0, 64))
    context = begin_run(study, place / "run", cache_dir=place / "cache")
    run_queued(context, "window", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))
        form = api.ExportForm(compares=False)
        api.export_trial(RunView.open(place / "run"), 0, place / "first", form=form)
        for _ in recover_further(0, context, FurtherTraining(FURTHER - 5)):  # it ends with a whole step
            pass
        api.export_trial(RunView.open(place / "run"), 0, place / "further", form=form)
    shutil.rmtree(place / "run")
    return place


@pytest.fixture(autouse=True)
def _cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))


@pytest.mark.parametrize("name", ["first", pytest.param("further", marks=pytest.mark.slow)])
def test_what_is_made_again_has_the_same_bits(
    place: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = read_card(place / name)
    assert card.recipe is not None
    assert card.recipe.further_tokens == (FURTHER if name == "further" else 0)
    assert name == "first" or card.recipe.trial.last.kept_tokens == FURTHER  # so trained weights are in it
    again = tmp_path / "again"
    assert main(["reproduce", str(place / name / "card.json"), "--out", str(again)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "made again on the same kind of machine, with as many threads" in out
    assert "Files with another hash: none" in out
    (weights,) = again.glob("*.safetensors")
    assert weights.read_bytes() == (place / name / weights.name).read_bytes()
    assert read_card(again).recipe is not None
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def changed(place: Path, tmp_path: Path, change: Any) -> Path:
    """The first card, changed."""
    folder = tmp_path / "changed"
    folder.mkdir()
    card = read_card(place / "first")
    assert card.recipe is not None
    write_card(change(card), folder)
    return folder / "card.json"


def of_recipe(**more: Any) -> Any:
    return lambda card: replace(card, recipe=replace(card.recipe, **more))


def test_milliseconds_of_the_study_stay_and_nothing_is_timed_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the card that is followed; the price by the lines on it."""
    lines = Latency("folded", "", 20, Line(1, 1e-4), Line(2, 1e-4), (Timed(5, 9, 9, 0.1),), "this test")

    def timed(card: Any) -> Any:
        study = card.recipe.study
        study = {
            **study,
            "objectives": ["kl", "decode_ms"],
            "budget": {
                **study["budget"],
                "prompt_ms": 1e-6,
            },  # which no plan keeps: it was chosen in spite of it
            "target": {**study["target"], "prompt_tokens": 20},
        }
        return of_recipe(study=study, latencies=(lines,))(card)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is timed before an export is made again")

    monkeypatch.setattr(prepare, "calibrated", refuse)
    path, again = changed(place, tmp_path, timed), tmp_path / "again"
    found = api.reproduce_export(path, again)
    asked, made = read_card(path).recipe, read_card(again).recipe
    assert asked is not None
    assert made is not None
    assert made.latencies == asked.latencies == (lines,)
    for key in ("objectives", "budget", "target"):
        assert made.study[key] == asked.study[key]
    assert not found.faults
    table = replace(price_table(), latencies=(lines,))
    target = study_from_json(made.study).target.value()
    plans = made.trial.plan, FoldPlan.identity(len(table.blocks))
    costs = [price(plan, table, target) for plan in plans]
    times = [ms or 0.0 for cost in costs for ms in (cost.prompt_ms, cost.decode_ms)]
    assert found.again.report.predicted == Predicted(20, *times)


def test_times_of_another_machine_foretell_nothing_here(place: Path) -> None:
    card = read_card(place / "first")
    assert card.recipe is not None
    assert card.recipe.trial.machine is not None
    assert reproduce._is_same_machine(card.recipe)
    other = replace(card.recipe.trial.machine, torch="0.1")
    assert not reproduce._is_same_machine(replace(card.recipe, before=other))
    for machine in (other, None):
        trial = replace(card.recipe.trial, machine=machine)
        assert not reproduce._is_same_machine(replace(card.recipe, trial=trial))


def test_each_training_takes_its_own_threads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a search share the cores, and training further has all of them: other numbers sum in other orders."""
    recipe = read_card(place / "further").recipe
    assert recipe is not None
    assert recipe.before == recipe.trial.machine is not None
    assert recipe.before is not None
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(reproduce, "run_trial", lambda *_, **__: iter([recipe.trial]))
    monkeypatch.setattr(reproduce, "recover_further", lambda *_, **__: taken.append(0) or iter(()))
    monkeypatch.setattr(reproduce, "latest_folder", lambda *_: None)
    monkeypatch.setattr(reproduce, "read_trial", lambda _: recipe.trial)
    context = SimpleNamespace(run=None)
    reproduce._rebuilt(context, replace(recipe, before=replace(recipe.before, threads=7)), silent)  # type: ignore[arg-type]
    assert taken == [7, recipe.before.threads, 0]


def test_figures_that_are_others_are_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A card that claims half the KL."""

    def boast(card: Any) -> Any:
        last = card.recipe.trial.last
        report = replace(last.report, kl=last.report.kl / 2)
        trial = card.recipe.trial
        trial = replace(trial, results=(*trial.results[:-1], replace(last, report=report)))
        return of_recipe(trial=trial)(card)

    path = changed(place, tmp_path, boast)
    assert main(["reproduce", str(path), "--out", str(tmp_path / "again")]) == 1
    assert "what was made again is not what the card says: KL to dense, nats is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: replace(card, recipe=None), "exported from Python without a recipe"),
        (
            lambda card: of_recipe(study={**card.recipe.study, "data": "nowhere"})(card),
            "What lies elsewhere now is named by --moved OLD=NEW.",
        ),
        (lambda card: of_recipe(study={**card.recipe.study, "model": "./nowhere"})(card), "--moved OLD=NEW."),
        (
            lambda card: of_recipe(identity=replace(card.recipe.identity, tokens={"search": "0" * 64}))(card),
            "from the same text only, but its search tokens are others",
        ),
        (
            lambda card: of_recipe(
                identity=replace(
                    card.recipe.identity, content=replace(card.recipe.identity.content, config="0" * 64)
                )
            )(card),
            "from the same model only, but its config is another one",
        ),
    ],
)
def test_a_card_that_cannot_be_followed_is_told_and_leaves_nothing(
    place: Path, tmp_path: Path, change: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(place, tmp_path, change)
    assert main(["reproduce", str(path), "--out", str(tmp_path / "again")]) == 2
    assert words in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["changed"]


def test_the_folder_of_the_card_and_one_that_is_there_are_left_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = place / "first"
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert main(["reproduce", str(first), "--out", str(first), "--force"]) == 2
    assert "another folder than that of the card" in capsys.readouterr().err
    assert main(["reproduce", str(first), "--out", str(place / "further")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before


def test_what_has_moved_is_found_where_it_is_said_to_be(place: Path, tmp_path: Path) -> None:
    card = read_card(place / "first")
    assert card.recipe is not None
    old = card.recipe.study["data"]
    study = reproduce._study(card.recipe, {old: str(tmp_path)})
    assert study.data == str(tmp_path)
    assert study.precision == card.recipe.identity.dtype
    of_hub = replace(
        card.recipe,
        study={**card.recipe.study, "model": "me/model@main"},
        identity=replace(card.recipe.identity, commit="0123abc"),
    )
    pinned, here = reproduce._study(of_hub, {}), reproduce._study(of_hub, {"me/model@main": "copy"})
    assert (pinned.model, pinned.revision) == ("me/model", "0123abc")  # whatever `main` is by now
    assert (here.model, here.revision) == ("copy", None)
    listed = replace(card.recipe, study={**card.recipe.study, "data": [{"source": "a", "kind": "b"}, "c"]})
    found = json.loads(
        json.dumps(reproduce._study(listed, {"a": "z", "c": "y"}).model_dump(mode="json")["data"])
    )
    assert [one if isinstance(one, str) else one["source"] for one in found] == ["z", "y"]
    with pytest.raises(ValueError, match=r"the card does not know \['elsewhere'\]"):
        reproduce._study(card.recipe, {"elsewhere": "here"})
    with pytest.raises(ValueError, match=r"does not know \['here'\]"):  # the wrong way round
        reproduce._study(card.recipe, {"here": old})
