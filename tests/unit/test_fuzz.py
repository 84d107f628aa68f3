"""Whatever a file holds, it is read or refused in a sentence: no other error, no memory for sizes that it only names.

Random changes are made to valid files, as a failing disk makes them; and values of JSON are put in the place of others,
as another program makes them. GGUF files have tests of their own (`tests/unit/test_gguf.py`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foldsearch.codec import from_json
from foldsearch.errors import FoldsearchError, InputError, ModelError, PlanError, RunError, SpecError
from foldsearch.model.checks import find_missing_shards
from foldsearch.model.choices import read_questions
from foldsearch.model.rows import rows_of, text_of
from foldsearch.plan.plan import FoldPlan
from foldsearch.report.view import RunView
from foldsearch.run import Run
from foldsearch.search.records import note, read_trials
from foldsearch.spec.load import load_study, shipped
from tests.fake_trial import NUM_BLOCKS

FEW = settings(max_examples=60, suppress_health_check=list(HealthCheck))
DEEP = 20_000  # brackets, more than a parser that calls itself can follow
ABSURD = (10**18, -(10**18), 1e308, float("nan"), float("inf"))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ABSURD),
    st.integers(-3, 10**6),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of some bytes, a cut, or something else put in."""
    kind = draw(st.sampled_from(("flip", "cut", "insert", "other")))
    place, more = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=12))

    def change(content: bytes) -> bytes:
        at = int(place * max(1, len(content)))
        if kind == "other":
            return more
        return (
            content[:at]
            + (more if kind != "cut" else b"")
            + content[at + (kind == "flip") * len(more) :][: 0 if kind == "cut" else None]
        )

    return change


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value there are others."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], other)
    return copy


# ---- plans


@FEW
@given(st.text(max_size=40), st.integers(1, 40))
def test_the_text_of_a_plan(text: str, num_blocks: int) -> None:
    with contextlib.suppress(PlanError):
        FoldPlan.parse(text, num_blocks)


@FEW
@given(VALUES)
def test_a_plan_in_json(value: Any) -> None:
    for form in (
        value,
        {"schema": 1, "plan": value, "num_blocks": 3},
        {"schema": 1, "plan": "0", "num_blocks": value},
    ):
        with contextlib.suppress(PlanError):
            FoldPlan.from_json(json.dumps(form))
        with contextlib.suppress(ValueError, KeyError, TypeError):  # as `from_json` says
            from_json(FoldPlan, form)


@pytest.mark.parametrize(
    "read",
    [
        lambda: FoldPlan.parse("0-99999999999", NUM_BLOCKS),
        lambda: FoldPlan.parse("0=0+r99999999999", NUM_BLOCKS),
        lambda: FoldPlan.from_json(json.dumps({"schema": 1, "plan": "0-9999999999", "num_blocks": 10**10})),
        lambda: FoldPlan.from_json("[" * DEEP),
        lambda: from_json(FoldPlan, {"plan": "0", "num_blocks": 10**12}),
    ],
)
def test_an_absurd_plan_takes_no_memory(read: Callable[[], FoldPlan]) -> None:
    tracemalloc.start()
    with pytest.raises(PlanError):
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000  # bytes


# ---- studies


STUDY = shipped("studies")["default"].read_bytes()


@FEW
@given(damage())
def test_a_study(tmp_path_factory: pytest.TempPathFactory, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(change(STUDY))
    with contextlib.suppress(SpecError):
        load_study(path)


@FEW
@given(
    st.sampled_from(["model", "data", "rungs", "budget", "space", "splits", "kinds", "trials", "seed"]),
    VALUES,
)
def test_a_value_of_a_study(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    with contextlib.suppress(SpecError):
        load_study("default", {key: value})


@pytest.mark.parametrize("text", ["a = " + "[" * DEEP, "a = " + "{a=" * DEEP, "[" + "a." * DEEP + "a]"])
def test_a_study_without_end(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.toml").write_text(text)
    with pytest.raises(SpecError, match=r"deep\.toml"):
        load_study(tmp_path / "deep.toml")


# ---- texts and questions

FILES = {
    ".jsonl": b'{"text": "a b c", "n": [1, 2]}\n{"text": "d \\u00e9 f"}\n',
    ".json": b'{"data": [{"text": "a"}, {"text": "b"}]}',
    ".csv": b'text,kind\n"a, b","c"\nd,e\n',
    ".tsv": b"text\tkind\na b\tc\n",
}
QUESTION = b'{"question": "2 + 2 =", "options": ["3", "4"], "answer": 1}\n'


def rows(path: Path) -> list[str]:
    return [text_of(row, None, None, where) for where, row in rows_of(path, None)]


@FEW
@given(st.sampled_from(list(FILES)), damage())
def test_rows(tmp_path_factory: pytest.TempPathFactory, kind: str, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzzed{kind}"
    path.write_bytes(change(FILES[kind]))
    with contextlib.suppress(InputError):
        assert all(isinstance(text, str) for text in rows(path))


@FEW
@given(VALUES)
def test_rows_of_any_json(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    place = tmp_path_factory.getbasetemp()
    for name, content in (
        ("any.json", json.dumps(value)),
        ("any.jsonl", json.dumps({"text": value})),
        ("two.json", json.dumps({"text": value, "more": [value]})),
    ):
        (place / name).write_text(content)
        with contextlib.suppress(InputError):
            rows(place / name)


@FEW
@given(damage(), st.sampled_from(["question", "options", "answer"]), VALUES)
def test_questions(
    tmp_path_factory: pytest.TempPathFactory, change: Callable[[bytes], bytes], key: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "questions.jsonl"
    changed = json.dumps({**json.loads(QUESTION), key: value}).encode() + b"\n"
    for content in (QUESTION + change(QUESTION), QUESTION + changed):
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            read_questions(path)


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_rows_without_end(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * DEEP)
    with pytest.raises(InputError, match="deep"):
        rows(tmp_path / name)
    with pytest.raises(InputError, match="deep"):
        read_questions(tmp_path / name)


# ---- run folders

JSON_FILES = (
    "study.json",
    "table.json",
    "identity.json",
    "trials/00000/trial.json",
    "screened.json",
    "rivals.json",
    "pick.json",
)


@pytest.fixture(scope="module")
def run_folder(_recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every JSON file that one may have."""
    from foldsearch.codec import to_json
    from foldsearch.files import write_json
    from foldsearch.identity import Identity
    from foldsearch.model.content import ContentHashes
    from foldsearch.record import DenseRival
    from foldsearch.search.screened import Screened, write_screened

    path = Path(shutil.copytree(_recorded, tmp_path_factory.mktemp("fuzzed") / "run"))
    run = Run.open(path)
    trial = read_trials(run)[0]
    write_json(run.trial(0).record, to_json(trial))
    write_screened(run.screened, [Screened(trial.plan, ("alone",), trial.quality)])
    write_json(run.rivals, [to_json(DenseRival("q8_0", trial.cost, trial.quality, trial.quality))])
    hashes = ContentHashes(**dict.fromkeys(("weights", "config", "tokenizer", "code", "other"), "0" * 64))
    run.write_identity(Identity("m", hashes, "", "float32", "cpu", {"search": "1"}, ()))
    write_json(run.pick, {"trial": 0, "plan": str(trial.plan)})
    return path


def look(path: Path) -> None:
    """All that reports read of a run folder."""
    from foldsearch.api import picked
    from foldsearch.record import read_trial

    view = RunView.open(path)
    view.folder.identity()
    assert isinstance(view.screened, list)
    assert isinstance(view.rivals, tuple)
    read_trial(view.folder.trial(0))
    picked(view)
    assert view.folder.dense.memory_bytes
    assert str(view.folder.budget)


@settings(FEW, max_examples=25)
@given(st.data())
def test_a_run_folder(run_folder: Path, data: st.DataObject) -> None:
    look(run_folder)
    name = data.draw(st.sampled_from(JSON_FILES))
    path = run_folder / name
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        changed = data.draw(damage())(whole)
    else:
        value = json.loads(whole)
        at = data.draw(st.sampled_from(sorted(places(value), key=repr)))
        changed = json.dumps(put(value, at, data.draw(VALUES))).encode()
    path.write_bytes(changed)
    try:
        look(run_folder)
    except FoldsearchError:
        pass
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_run_folder_without_end(run_folder: Path, name: str) -> None:
    path = run_folder / name
    whole = path.read_bytes()
    path.write_text("[" * DEEP)
    try:
        with pytest.raises(RunError, match=rf"{path.name}|is incomplete"):
            look(run_folder)
    finally:
        path.write_bytes(whole)


# ---- paths, names and secrets


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "../shared/..", "../shared/a/b"]
)
def test_an_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"w": name, "v": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names weight files beside it"):
        find_missing_shards(tmp_path)


def test_a_name_is_no_mark_up_in_a_note(run_path: Path) -> None:
    """optuna-dashboard shows notes as Markdown, in which HTML may stand."""
    from dataclasses import replace

    from foldsearch.plan.result import KindQuality

    trial = read_trials(Run.open(run_path))[0]
    kinds = (KindQuality("<img src=x>|[a](javascript:b)", 0.5, 0.1, 9, unseen=False),) * 2
    quality = replace(trial.quality, kinds=kinds)
    shown = note(replace(trial, results=(*trial.results[:-1], replace(trial.last, quality=quality))))
    assert "img src=x" in shown
    assert "<img" not in shown
    assert "](" not in shown


def test_the_token_of_the_hub_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.contexts import begin_run, run_queued, tiny_study

    token = "hf_" + "s3cret" * 5
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, token)
    study = tiny_study(tmp_path, rungs=(0,))
    context = begin_run(study, tmp_path / "run", cache_dir=tmp_path / "cache")
    run_queued(context, "window", 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if token.encode() in path.read_bytes()]
