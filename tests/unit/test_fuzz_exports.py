"""Whatever the files of an export hold, they are read or refused in a sentence, and nothing is written.

As in `tests/unit/test_fuzz.py`: bytes are changed, as a failing disk changes them, and values of JSON are put in the
place of others. No model is loaded: a process that answers as for a good export stands for the one that would.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from foldsearch import api
from foldsearch.errors import FoldsearchError, InputError, ModelError
from foldsearch.export import recheck as rechecking
from foldsearch.export import reproduce as reproducing
from foldsearch.export.card import (
    Card,
    Licences,
    Probe,
    ProbeFigures,
    Recipe,
    commands_for,
    files_of,
    hashes_of,
    read_card,
    write_card,
)
from foldsearch.export.family import exports_in
from foldsearch.export.figures import ChatReport, ExportReport, ModelFigures, Speed
from foldsearch.identity import Identity
from foldsearch.machine import Machine
from foldsearch.model.content import ContentHashes
from foldsearch.plan.plan import FoldPlan
from foldsearch.report.terminal import console, rechecked_lines
from foldsearch.version import __version__
from tests.fake_driver import study
from tests.fake_trial import NUM_BLOCKS, trial_at
from tests.proposals import given
from tests.unit.test_fuzz import DEEP, FEW, VALUES, damage, places, put

FAMILY = {
    "schema": 1,
    "runtime": "stock",
    "base_model": "tiny",
    "stored_bytes": 9,
    "members": [
        {"folder": "trial-00000", "trial": 0, "plan": "0-4", "separate_bytes": 9, "perplexity": 2.0},
        {"folder": "trial-00003", "trial": 3, "plan": "0 2-4", "separate_bytes": 9, "perplexity": 3.0},
    ],
}
ABSURD = ("x" * 300, "\0", "\ud800", "../../etc/passwd", -1, 0, 1e-400, float("inf"), 10**400)


class Answers:
    """A process that says what the card says."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, what: str, **_: Any) -> dict[str, Any]:
        if what == "load":
            return {"wrong_keys": [], "parameters": 1}
        figures = {"mean_difference": 0.0, "max_difference": 0.0, "perplexity": 9.0, "decode_difference": 0.0}
        return figures if what == "quality" else {"stops": [2], "prompt": "", "text": ""}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files and a card that vouches for them and says how they were made; there is no model in it."""
    folder = tmp_path_factory.mktemp("fuzzed-exports") / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    Probe(torch.ones(1, 4).long(), torch.ones(1, 4).bool(), torch.zeros(1, 3)).write(folder)
    plan = FoldPlan.parse("0 2-11", NUM_BLOCKS)
    proposal = given(plan)
    machine = Machine("an abacus", 2, "2.0")
    trial = replace(trial_at(plan, study(), 2, proposal), machine=machine)
    hashes = ContentHashes(**dict.fromkeys(("weights", "config", "tokenizer", "code", "other"), "0" * 64))
    identity = Identity("tiny", hashes, "", "float32", "cpu", {"search": "1"}, ())
    settings = study(model="./nowhere", data="./nothing", kinds={}).model_dump(mode="json")
    recipe = Recipe(settings, identity, trial, trial.recovery, 0, "", shows_text=True)
    figures, speed = ModelFigures(1, 4, None, 9.0), Speed((), ())
    report = ExportReport(
        "folded", "float32", str(plan), NUM_BLOCKS, "tiny", figures, None, "", 4, 8, speed, speed, 9.0, 3,
        0.0, 0.0, 0.0, 0.0, 0.1, True, None, False, 1, {}, {}, "float32",
        chat=ChatReport("", (2,), "", None),
    )  # fmt: skip
    write_card(
        Card(
            __version__, plan, report, hashes_of(folder, files_of(folder)), ProbeFigures("tokens", 3, 9.0, 0.1, 0.1),
            "sdpa", (), (), Licences(), "", commands_for(recipe), recipe,
        ),
        folder,
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the export nor the model that it was made of is opened."""

    def closed(*_: object, **__: object) -> None:
        raise ModelError("the model is not opened here.")

    monkeypatch.setattr(rechecking, "ModelProcess", Answers)
    monkeypatch.setattr(reproducing, "open_source", closed)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


def look(folder: Path, out: Path) -> None:
    """What `verify` and `reproduce` do with a folder, short of loading a model."""
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with contextlib.suppress(InputError):
        for place, found in api.verify_export(folder):
            with console().capture():
                console().print(rechecked_lines(found, place))
    with pytest.raises(FoldsearchError) as told:
        api.reproduce_export(folder / "card.json", out)
    assert str(told.value).strip()
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if "rebuilt" in path.name]
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before


@contextlib.contextmanager
def holding(path: Path, content: bytes) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def changed(data: st.DataObject, whole: bytes) -> bytes:
    """Damaged bytes, or JSON with another value somewhere."""
    if data.draw(st.booleans()):
        found: bytes = data.draw(damage())(whole)
        return found
    value = json.loads(whole)
    at = data.draw(st.sampled_from(sorted(places(value), key=repr)))
    other = data.draw(st.one_of(VALUES, st.sampled_from(ABSURD)))
    return json.dumps(put(value, at, other)).encode()


def test_a_good_card_comes_as_far_as_the_model(exported: Path, tmp_path: Path) -> None:
    assert [place for place, _ in api.verify_export(exported)] == [exported]
    with pytest.raises(InputError, match="is not opened here"):
        api.reproduce_export(exported / "card.json", tmp_path / "again")
    look(exported, tmp_path / "again")


@settings(FEW, max_examples=40)
@drawn(st.data())
def test_a_card(exported: Path, data: st.DataObject) -> None:
    path = exported / "card.json"
    with holding(path, changed(data, path.read_bytes())):
        look(exported, exported.parent / "again")


@pytest.mark.parametrize("other", [*ABSURD, None, [], {}, "float64"], ids=repr)
@pytest.mark.parametrize(
    "at",
    [
        ("probe", "perplexity"),
        ("probe", "tokens"),
        ("report", "weights"),
        ("report", "runtime"),
        ("files",),
        ("recipe", "identity", "dtype"),
        ("recipe", "identity", "device"),
        ("recipe", "trial", "machine", "threads"),
        ("recipe", "trial", "results"),
        ("recipe", "trial", "proposal"),
        ("recipe", "trial", "draft"),
        ("recipe", "study"),
        ("recipe", "study", "data"),
        ("recipe", "study", "model"),
        ("recipe", "further_tokens"),
    ],
    ids=".".join,
)
def test_a_value_of_a_card(exported: Path, tmp_path: Path, at: tuple[Any, ...], other: Any) -> None:
    path = exported / "card.json"
    value = put(json.loads(path.read_text()), at, other)
    with holding(path, json.dumps(value).encode()):
        look(exported, tmp_path / "again")


@pytest.mark.parametrize("name", ["x" * 300, "\0", "\ud800.json", "a/../../b", "/etc/passwd", "."], ids=repr)
def test_a_name_of_a_card_that_is_no_file_of_it(exported: Path, tmp_path: Path, name: str) -> None:
    path = exported / "card.json"
    value = json.loads(path.read_text())
    value["files"][name] = value["files"]["config.json"]
    with holding(path, json.dumps(value).encode()):
        look(exported, tmp_path / "again")
        with contextlib.suppress(InputError):
            ((_, found),) = api.verify_export(exported)
            assert found.faults


@pytest.mark.parametrize(
    "content", [b"[" * DEEP, b'{"schema": ' + b"[" * DEEP, b"", b"\xff\xfe", b"null", b"[]"]
)
def test_a_card_without_end_or_begin(exported: Path, tmp_path: Path, content: bytes) -> None:
    with holding(exported / "card.json", content):
        with pytest.raises(InputError, match=r"card\.json"):
            read_card(exported)
        look(exported, tmp_path / "again")


@FEW
@drawn(damage())
def test_a_probe(exported: Path, change: Callable[[bytes], bytes]) -> None:
    path = exported / "check.npz"
    with holding(path, change(path.read_bytes())), contextlib.suppress(InputError):
        Probe.read(exported)


@FEW
@drawn(st.data())
def test_a_family(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    place = tmp_path_factory.getbasetemp() / "family"
    place.mkdir(exist_ok=True)
    (place / "family.json").write_bytes(changed(data, json.dumps(FAMILY).encode()))
    with contextlib.suppress(InputError):
        assert all(one.parent == place for one in exports_in(place))
    with pytest.raises(InputError):  # no point is there
        list(api.verify_export(place))
    assert [path.name for path in place.iterdir()] == ["family.json"]


@pytest.mark.parametrize("content", ["[" * DEEP, json.dumps({**FAMILY, "members": []})])
def test_a_family_without_end_or_points(tmp_path: Path, content: str) -> None:
    """One without points would pass `verify`, and nothing would have been looked at."""
    (tmp_path / "family.json").write_text(content)
    with pytest.raises(InputError, match=r"family\.json is no list of exports"):
        exports_in(tmp_path)
