"""A run goes on only with what it was made of: weights, config, tokenizer, tokens, precision; from any folder.

Oracles: files that are changed by hand between `run` and what follows, and the figures of the run itself.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from foldsearch import api, cli, rebuild
from foldsearch import context as contexts
from foldsearch.context import close_workbench, open_workbench
from foldsearch.errors import RunError, VerificationError
from foldsearch.model.content import file_hash
from foldsearch.model.kept import read_tensors, read_words, write_tensors
from foldsearch.prepare import prepare_context
from foldsearch.run import Run, RunFolder
from foldsearch.spec.space import Recover, Space
from foldsearch.spec.study import GateSettings, SplitSettings, Study
from tests.contexts import begin_run, run_queued
from tests.tiny import save_model, write_corpus

STUDY = Study(
    model="m",
    data="texts/corpus",
    space=Space(recover=Recover(learning_rate=(0.004, 0.004))),
    device="cpu",
    precision="float32",
    rungs=(0, 640),  # enough, at a low rate, that training helps: a state that it hurt would not be kept
    trials=1,
    splits=SplitSettings(sequence_length=16, search=6, recovery=40, report=6),
    gates=GateSettings(steps=2),
)


def make_run(study: Study, path: Path) -> None:
    """A run of one finished trial, made without Ray."""
    run_queued(begin_run(study, path), "window", 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to be copied: its `here` holds a project, a cache, and a file with questions."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("identity")
    project = place / "here" / "project"
    save_model(project / "m")
    write_corpus(project / "texts" / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setenv("FOLDSEARCH_CACHE", str(place / "here" / "cache"))
        make_run(STUDY, Path("runs/r"))
    question = {"question": "w3 w9", "options": ["w4", "w5"], "answer": 1}
    (place / "here" / "q.jsonl").write_text("\n".join([json.dumps(question)] * 3))
    (place / "here").rename(place / "kept")
    return place


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, as new and where it was made: a model `m`, texts, and the run `runs/r` that was made with
    both by relative paths."""
    shutil.copytree(made / "kept", made / "here")
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(made / "here" / "cache"))
    monkeypatch.chdir(made / "here" / "project")
    close_workbench()
    yield made / "here" / "project"
    shutil.rmtree(made / "here")


def shell(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and what was said on standard error."""
    close_workbench()  # each command is a process of its own
    code = cli.main(words)
    return code, capsys.readouterr().err


VERBS = {
    "resume": ("resume", "runs/r"),
    "export": ("export", "runs/r", "--out", "out"),
    "evaluate": ("evaluate", "runs/r", "--questions", "../q.jsonl"),
    "recover": ("recover", "runs/r", "--trial", "0", "--tokens", "2000"),
}


# ---- another model, another text


def retrain(project: Path) -> None:
    tensors = load_file(project / "m" / "model.safetensors")
    save_file({name: value + 0.01 for name, value in tensors.items()}, project / "m" / "model.safetensors")


def patch_a_bit(project: Path) -> None:
    data = bytearray((project / "m" / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (project / "m" / "model.safetensors").write_bytes(data)


def change_config(project: Path) -> None:
    path = project / "m" / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e-05"))


def change_tokenizer(project: Path) -> None:
    path = project / "m" / "tokenizer.json"
    text = path.read_text()
    assert '"w3"' in text
    path.write_text(text.replace('"w3"', '"w0"'))


def change_tokens(project: Path) -> None:
    path = RunFolder(project / "runs" / "r").tokens
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no dict
        metadata = file.metadata()
    tensors["report.ids"][0, 3] += 1
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (retrain, "weights"),
        (patch_a_bit, "weights"),
        (change_config, "config"),
        (change_tokenizer, "tokenizer"),
        (change_tokens, "report tokens"),
    ],
)
def test_what_is_not_what_the_run_was_made_of_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], part: str
) -> None:
    change(project)
    study = (project / "runs" / "r" / "study.json").read_bytes()
    for words in VERBS.values():
        code, said = shell(*words, capsys=capsys)
        assert code == 2
        assert "a run goes on only with the" in said
        assert f"was made with {part} " in said
        assert "start a new run" in said
    assert not Path("out").exists()
    assert not Path("runs/r/evaluations").exists()
    assert (project / "runs" / "r" / "study.json").read_bytes() == study


def test_an_extension_is_exported_from_the_model_that_it_was_trained_with(project: Path) -> None:
    study = STUDY.model_copy(update={"rungs": (0,)})
    list(api.try_plan("0-3", study, folder=Path("tried")))
    retrain(project)
    close_workbench()
    with pytest.raises(RunError, match="'tried' was made with weights"):
        api.export_tried(study, Path("tried"), Path("out"))
    assert not Path("out").exists()


def test_damaged_tokens_are_told(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for damage, verb in itertools.product(("", "not tensors"), ("export", "evaluate", "recover")):
        RunFolder(project / "runs" / "r").tokens.write_text(damage)
        code, said = shell(*VERBS[verb], capsys=capsys)
        assert code == 2
        assert "the token sets of a run, " in said
        assert "Put back a copy of it, or remove it: it is then made again from the texts." in said
    assert shell(*VERBS["resume"], capsys=capsys)[0] == 0  # it makes them again
    assert shell(*VERBS["export"], capsys=capsys)[0] == 0


def test_tokens_that_are_gone_are_cut_again_from_the_same_text(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RunFolder(project / "runs" / "r").tokens
    before = contexts.read_splits(RunFolder(path.parent))
    path.unlink()
    prepare_context(STUDY, path.parent)
    assert contexts.read_splits(RunFolder(path.parent)).report.content_hash == before.report.content_hash
    path.unlink()
    shutil.rmtree("texts/corpus")
    write_corpus(project / "texts" / "corpus", seed=1)
    code, said = shell(*VERBS["export"], capsys=capsys)
    assert code == 2
    assert "was made with search tokens" in said
    assert not path.exists()


# ---- the rebuilt model beside what was recorded of it


def swap(project: Path) -> None:
    """The trained parameters of the same plan after another training."""
    path = project / "runs" / "r" / "trials" / "00000" / "recovered.safetensors"
    write_tensors(path, {name: value * 1.5 for name, value in read_tensors(path).items()}, read_words(path))


def cut(project: Path) -> None:
    path = project / "runs" / "r" / "trials" / "00000" / "recovered.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("change", [swap, cut])
def test_changed_files_of_a_trial_are_told(
    project: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None]
) -> None:
    change(project)
    for verb in ("export", "evaluate"):
        code, said = shell(*VERBS[verb], capsys=capsys)
        assert code == 2
        assert "a trial is rebuilt only from what it was measured with" in said
        assert "00000/recovered.safetensors' had the hash" in said
    assert not Path("out").exists()


def edit_trial(project: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = project / "runs" / "r" / "trials" / "00000" / "trial.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_rebuilt_model_with_other_figures_is_no_export(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained parameters were swapped, and who did it knew of the hash."""
    swap(project)
    path = project / "runs" / "r" / "trials" / "00000" / "recovered.safetensors"
    edit_trial(project, lambda value: value["files"].update({path.name: file_hash(path)}))
    result = json.loads((path.parent / "trial.json").read_text())["results"][-1]["report"]
    for verb in ("export", "evaluate"):
        code, said = shell(*VERBS[verb], capsys=capsys)
        assert code == 1
        assert "the rebuilt model of trial 0 is not the one that was measured" in said
        assert f"recorded were {result['kl']:.6g}" in said
        assert f"recorded were {result['perplexity']:.6g}" in said
        assert "(tolerance 0 nats)" in said  # this machine measured it
    assert not Path("out").exists()


def test_two_records_of_a_trial_say_the_same(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_trial(project, lambda value: value["results"][-1]["report"].update(kl=0.5))
    code, said = shell(*VERBS["export"], capsys=capsys)
    assert code == 2
    assert "a trial has one result, but" in said
    assert "says KL 0.5" in said


@pytest.mark.parametrize(
    ("machine", "off", "refused"),
    [("this", 1e-5, True), ("another", 1e-5, False), ("another", 1e-3, True)],
)
def test_another_processor_may_round(project: Path, machine: str, off: float, refused: bool) -> None:
    """What a processor measured that sums in another order; SmolLM2's KL differs by 1e-7 between AVX512 and AVX2."""

    def change(value: dict[str, Any]) -> None:
        value["results"][-1]["report"]["kl"] += off
        if machine == "another":
            value["machine"]["kind"] = "cpu of another make"

    edit_trial(project, change)
    context = prepare_context(STUDY, Path("runs/r"))
    model, _ = rebuild.recovered_model(context, 0)
    if refused:
        with pytest.raises(VerificationError, match="its KL is"):
            rebuild.check_rebuilt(context, 0, model)
    else:
        rebuilt = rebuild.check_rebuilt(context, 0, model)
        assert rebuilt.tolerance == rebuild.ROUNDING["float32"]
        assert rebuilt.recorded_kl - rebuilt.found_kl == pytest.approx(off, rel=1e-3)


# ---- the same model, from elsewhere


def test_a_run_is_used_from_any_folder_and_moved_with_its_model(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = project.parent
    other = place / "other"
    save_model(other / "m", "mistral")  # what the relative path names here is not looked at
    monkeypatch.chdir(other)

    def evaluate(run: Path, questions: str = "../q.jsonl") -> tuple[int, str]:
        return shell("evaluate", str(run), "--questions", questions, capsys=capsys)

    run, moved = project / "runs" / "r", place / "moved" / "runs" / "r"
    code, said = evaluate(run)
    assert code == 0, said
    written = json.loads((run / "evaluations" / "00000-q.json").read_text())
    assert written["model"] == "m"  # as it was typed
    shutil.copy(place / "q.jsonl", project / "texts" / "corpus")
    code, said = evaluate(run, "../project/texts/corpus/q.jsonl")
    assert code == 2
    assert "belongs to texts/corpus" in said
    project.rename(place / "moved")
    code, said = evaluate(moved)
    assert code == 0, said
    assert json.loads((moved / "evaluations" / "00000-q.json").read_text()) == written
    (place / "moved" / "m").rename(place / "gone")
    code, said = evaluate(moved)
    assert code == 2
    assert f"was made with '{project / 'm'}', which is not there any more. Put it back" in said


# ---- what "auto" stood for


def test_auto_is_chosen_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = STUDY.model_copy(update={"precision": "auto"})
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        patch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        make_run(study, Path("runs/auto"))
    made = RunFolder(Path("runs/auto")).identity()
    assert made is not None
    assert (made.dtype, made.device) == ("bfloat16", "cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    close_workbench()
    noticed: list[str] = []
    context = prepare_context(Run.open(Path("runs/auto")).study, Path("runs/auto"), notice=noticed.append)
    assert context.files.dtype == "bfloat16"
    assert next(open_workbench(context).dense.parameters()).dtype == torch.bfloat16
    assert noticed == ["the run computes in bfloat16, as it began; a new run would compute in float32 here."]


def test_another_device_is_told(project: Path) -> None:
    made = RunFolder(Path("runs/r")).identity()
    assert made is not None
    RunFolder(Path("runs/r")).write_identity(replace(made, device="cuda"))
    noticed: list[str] = []
    prepare_context(STUDY, Path("runs/r"), notice=noticed.append)
    assert noticed == ["the run began on cuda, and goes on on cpu: its figures may differ by rounding."]
