"""Paths are data: in the study's URL, in messages, in commands to paste, in mark-up, HTML, Markdown and notes.

Oracles: bash, which reads the printed commands back; the files that are there afterwards; rich's own plain text.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from foldsearch import cli
from foldsearch.errors import InputError, RunError
from foldsearch.export.card import Card, Licences, ProbeFigures
from foldsearch.export.figures import ExportReport, ModelFigures, Speed
from foldsearch.export.readme import loading_lines, model_card
from foldsearch.files import replace_atomically
from foldsearch.paths import MOST_NAME_BYTES, beside, check_path, command, printable
from foldsearch.plan.plan import FoldPlan
from foldsearch.report.terminal import console
from foldsearch.run import Run
from foldsearch.search.records import Records, read_trials

NASTY = (
    "what? now",
    "100%",
    "a%3Fb",
    "#1",
    "[red]x[bold]",
    "[a-z]*",
    'it\'s "quoted" `here` $HOME',
    "{SCHEMA_VERSION}{0}{",
    "-leading",
    "--all",
    "~",
    "~nobody-of-this-name",
    ":smile:",
    "a\nb\tc",
    "back\\slash\\n",
    "file:memory?mode=memory",
    "é " + "ü" * 90,
    "x" * 200,
    "<b>&amp;<i>",
    "a;b&&c|d>e(f)!g",
    " ",
    "...",
    "\x1b[31mred",
    "$\\frac{1}{2}$",
    "a\u202eb",
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- words


@pytest.mark.parametrize("name", NASTY)
def test_a_printed_command_is_one_line_that_a_shell_reads_back(name: str, here: Path) -> None:
    line = command("export", Path(name), "--out", "DIR")
    assert line.isprintable()
    script = f'foldsearch() {{ printf "%s\\0" "$@"; }}; {line}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    *words, _ = done.stdout.decode().split("\0")
    assert [words[0], *words[2:]] == ["export", "--out", "DIR"]
    assert Path(words[1]) == Path(name)
    assert not words[1].startswith("-")  # it would be an option


def test_a_plain_path_is_printed_plainly() -> None:
    assert command("pick", Path("runs/demo-2"), "--knee") == "foldsearch pick runs/demo-2 --knee"
    assert printable("runs/Übung [2] 日本") == "runs/Übung [2] 日本"


def test_what_does_not_print_is_shown_as_an_escape() -> None:
    assert printable("a\nb\x1bc\u202ed") == "a\\nb\\x1bc\\u202ed"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (os.fsdecode(b"runs/caf\xe9"), r"--out must be UTF-8 text; got 'runs/caf\\xe9'"),
        ("runs/" + "x" * 256, r"at most 255 bytes in each of its names; got 256: 'runs/xxx"),
        ("runs/" + "é" * 128, r"at most 255 bytes in each of its names; got 256"),
        ("/".join(["y" * 200] * 20), r"at most 3,800 bytes in all; got 4,"),
    ],
)
def test_what_no_file_system_or_record_takes_is_refused(path: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_path(Path(path), "--out")


@pytest.mark.parametrize("name", ["x" * MOST_NAME_BYTES, "é" * (MOST_NAME_BYTES // 2), *NASTY])
def test_a_file_is_written_whole_under_every_name_that_may_be(name: str, tmp_path: Path) -> None:
    assert len(os.fsencode(beside(tmp_path / name, "partial").name)) <= MOST_NAME_BYTES
    replace_atomically(tmp_path / name, lambda path: path.write_text("whole"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "whole")]


# ---- a run in a folder of such a name


STORED = (
    "what? #1 100% a%3Fb",
    ":memory:",
    "file:x?mode=memory",
    "{SCHEMA_VERSION}{0}{",
    "a\nb\tc",
    "[a-z]*",
    "x" * 200,
)


@pytest.mark.parametrize("name", STORED)
def test_a_study_is_kept_and_read_in_any_folder(name: str, run_path: Path, here: Path) -> None:
    before = read_trials(Run.open(run_path))
    os.rename(run_path, here / name)
    path = Path(name)
    assert read_trials(Run.open(path)) == before
    number, _ = Records(Run.open(path)).ask()
    assert number == len(before)
    assert len(read_trials(Run.open(path))) == len(before) + 1
    assert [found.name for found in here.iterdir()] == [name]  # and nothing is made beside it


@pytest.mark.parametrize("name", ["what? [red] :smile:\n$\\frac{", "-<b>&amp;"])
def test_reports_name_the_run_the_model_and_the_text_as_they_are(
    name: str,
    run_path: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # lines of prose stay whole
    study = json.loads((run_path / "study.json").read_text())
    study["study"]["model"] = study["study"]["data"] = f"{name}/m[/red]"
    study["study"]["kinds"]["unseen"] = []  # of one text there is one kind
    (run_path / "study.json").write_text(json.dumps(study))
    os.rename(run_path, here / name)
    path, typed, model = Path(name), f"./{name}", f"{printable(name)}/m[/red]"

    assert cli.main(["front", typed]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{printable(path)}  {model} (fake <weights>) on {model}\n")
    assert out.endswith(f"\nPictures: {printable(path)}/report/index.html\n")
    page = (path / "report" / "index.html").read_text(encoding="utf-8")
    assert f"<title>{html.escape(printable(path))} · foldsearch</title>" in page
    assert f"<h1>{html.escape(model)} folded</h1>" in page

    assert cli.main(["pick", typed, "--knee"]) == 0
    (path / "pick.json").write_text("{")
    capsys.readouterr()
    assert cli.main(["export", typed, "--out", "exported"]) == 2
    again = capsys.readouterr().err.rstrip().rpartition("Choose again: ")[2]
    assert again == command("pick", path, "--knee")


def test_our_consoles_print_mark_up_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("[bold]x[/bold] :smile:")
    assert capsys.readouterr().out == "[bold]x[/bold] :smile:\n"


@pytest.mark.parametrize("name", ["", ".", "..", "a/.."])
def test_a_run_needs_a_name(name: str, here: Path) -> None:
    with pytest.raises(RunError, match=r"Give it a name|is there already"), Run.draft(Path(name)):
        pass
    assert list(here.iterdir()) == []


def test_a_path_that_is_no_text_is_refused_by_every_verb(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = os.fsdecode(b"caf\xe9")
    for words in (["run", "--out", bad], ["front", bad], ["export", "x", "--out", bad], ["inspect", bad]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert err == (
            "error: the command line must be UTF-8 text; got 'caf\\xe9'. Rename the file or folder.\n"
        )
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("words", ["run STUDY", "run --out STUDY", "try 0-3 --study STUDY", "front STUDY"])
def test_a_name_that_is_too_long_is_told(words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.replace("STUDY", "x" * 300).split()) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- a card


@pytest.mark.parametrize("name", [*NASTY, "org/Llama_3_8B", "_private_"])
def test_a_card_shows_a_models_name_as_it_is(name: str) -> None:
    figures = ModelFigures(parameters=1, weight_bytes=1, resident_bytes=1, perplexity=3.0)
    speed = Speed(exported=(1.0,), dense=())
    report = ExportReport(
        runtime="folded", exported=figures, dense=None, dense_note="", tokens=3, dtype="float32", logits_tolerance=0.0,
        weights="float32",
        logits_max_difference=0.0, logits_difference=0.0, decode_difference=0.0, decode_tolerance=1.0,
        measured_perplexity=3.0, num_blocks=3, plan="0-2", threads=1, base_model=name, details={"model": name},
        file_bytes=1, prompt_tokens=1, prompt=speed, decode=speed, loads_without_foldsearch=True,
        refused_without_code=True, has_tokenizer=True, versions={},
    )  # fmt: skip
    of_export = Card(
        foldsearch="0", plan=FoldPlan.identity(3), report=report, files={},
        probe=ProbeFigures("tokens", 1, 1.0, 0.0, 0.0),
        attention="eager", checked=(), not_checked=(), licences=Licences(), loading=loading_lines(report, Path(name)),
        commands={},
    )  # fmt: skip
    card = model_card(of_export, Path(name))
    _, front, body = card.split("---\n", 2)
    assert not name.strip() or name not in front  # YAML would have to quote it
    title = body.splitlines()[0]
    assert title.startswith("# ")
    assert title.endswith(", folded")
    shown = title.removeprefix("# ").removesuffix(", folded")
    # CommonMark: a backslash before punctuation makes it a letter; what mark-up could begin with has one
    assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", shown) == printable(name)
    assert re.search(r"(?<!\\)(\\\\)*[*`\[<$|&]", shown) is None
    (block,) = re.findall(r"```json\n(.*?)\n```", card, re.DOTALL)
    assert json.loads(block) == {"model": name}


def test_bash_is_not_alone(here: Path) -> None:
    """What prints is quoted for any POSIX shell, as the standard library does."""
    for name in NASTY:
        if name.isprintable() and not name.startswith("-"):
            assert shlex.split(command("front", Path(name))) == ["foldsearch", "front", str(Path(name))]
