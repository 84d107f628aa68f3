"""The command line: exit codes, messages, and that nothing is left half done.

Oracles: the exit codes that the README promises, folders listed before and after, Optuna's storage as it was.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import foldsearch
from foldsearch import api, arguments, cli
from foldsearch.errors import InputError, RunError, VerificationError
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.report import live
from foldsearch.report.terminal import console
from foldsearch.report.view import RunView
from foldsearch.run import Run, RunFolder
from foldsearch.runtimes import runtime_named
from foldsearch.search import events
from foldsearch.spec.load import load_study
from foldsearch.spec.study import HealingSettings, SourceSettings, Study
from tests.fake_trial import NUM_BLOCKS, TABLE

VERBS = (
    "run",
    "resume",
    "check",
    "try",
    "extend",
    "price",
    "inspect",
    "front",
    "pick",
    "evaluate",
    "export",
    "recover",
    "dashboard",
    "cache",
    "verify",
    "reproduce",
)


class Shell:
    """Types commands in an empty folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        said = self._capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(tmp_path / "cache"))
    return Shell(capsys)


# ---- help


def test_help_names_every_verb_and_teaches_the_main_job(shell: Shell) -> None:
    code, out, _ = shell("--help")
    assert code == 0
    assert all(re.search(rf"^ +{verb}\b", out, re.MULTILINE) for verb in VERBS)
    assert "foldsearch run --budget-gb 2" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(shell: Shell, verb: str) -> None:
    code, out, _ = shell(verb, "--help")
    assert code == 0
    assert out.startswith(f"usage: foldsearch {verb}")
    assert len(out.splitlines()) > 6


def test_version(shell: Shell) -> None:
    assert shell("--version")[:2] == (0, f"foldsearch {foldsearch.__version__}\n")


# ---- bad input: exit code 2, the law and the remedy, nothing left behind


@pytest.mark.parametrize("verb", ["try 0-3", "extend --blocks 1-3 --to 14", "inspect"])
@pytest.mark.parametrize(
    ("out", "said"),
    [
        (
            "a-file/x",
            "--out must be in a folder that can be written to, but '{here}/a-file' is a file. Choose",
        ),
        ("/proc/x", "'/proc"),  # to root it says that it can be written to, and cannot
    ],
)
def test_a_place_that_cannot_be_written_is_told(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, verb: str, out: str, said: str
) -> None:
    def work(*args: object, **kwargs: object) -> None:
        Path(out).mkdir()

    for name in ("try_plan", "inspect_model"):
        monkeypatch.setattr(api, name, work)
    monkeypatch.setattr(api, "measure_model", lambda *args: TABLE)
    Path("a-file").touch()
    code, _, err = shell(*verb.split(), "--out", out)
    assert code == 2
    assert said.format(here=Path.cwd()) in err
    assert [path.name for path in Path().iterdir()] == ["a-file"]


def test_a_picture_is_not_a_folder(shell: Shell) -> None:
    code, _, err = shell("inspect", "--out", ".")
    assert code == 2
    assert "--out is a file, but '.' is a folder" in err


@pytest.mark.parametrize("verb", ["try 0-3", "extend --blocks 1-3 --to 14", "inspect", "run --dry-run"])
def test_every_verb_that_reads_text_takes_sources_and_how_to_read_them(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    asked: list[Study] = []

    def stop(study: Study, *args: object, **rest: object) -> None:
        asked.append(study)
        raise RunError("enough")

    for name in ("inspect_model", "dry_run", "measure_model"):
        monkeypatch.setattr(api, name, stop)
    monkeypatch.setattr(api, "try_plan", lambda plan, study, **rest: stop(study))
    told = ["--data", "a.txt", "--data", "b.csv", "--text-column", "answer.text", "--sample-by", "line"]
    assert shell(*verb.split(), *told)[0] == 2
    assert shell(*verb.split(), "--data", "a.txt")[0] == 2
    several, one = asked
    expected = [
        SourceSettings(source=name, text_column="answer.text", sample_by="line")
        for name in ("a.txt", "b.csv")
    ]
    assert list(several.all_sources()) == expected
    assert one.data == "a.txt"
    assert one.text_column is None


@pytest.mark.parametrize(
    ("options", "healing"),
    [
        ([], HealingSettings()),
        (["--no-heal"], HealingSettings(tokens=0)),
        (["--heal-method", "rescale"], HealingSettings(method="rescale")),
    ],
)
def test_a_plan_can_be_tried_as_it_is_or_healed_by_a_rival(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, options: list[str], healing: HealingSettings
) -> None:
    seen: list[Study] = []

    def try_plan(plan: str, study: Study, **_: object) -> list[object]:
        seen.append(study)
        raise InputError("seen.")

    monkeypatch.setattr(api, "try_plan", try_plan)
    shell("try", "0-3", "--tokens", "0", *options)
    (study,) = seen
    assert study.healing == healing
    assert study.rungs == (0,)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_try_that_is_cut_short_leaves_no_folder(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Nothing could go on with it, and the same command would be refused."""

    def try_plan(plan: str, study: object, *, folder: Path, **_: object) -> list[object]:
        (folder / "trials").mkdir(parents=True)
        raise error

    monkeypatch.setattr(api, "try_plan", try_plan)
    code, _, _ = shell("try", "0-3", "--out", "tried")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "VERB"),
        ("fold", "invalid choice: 'fold'"),
        ("run nope", "baselines/window, default, smollm2-demo; got 'nope'"),
        ("run smolm2-demo", "Did you mean 'smollm2-demo'?"),
        ("run missing.toml", "there is no file 'missing.toml'"),
        ("run --space foldgp", "Did you mean 'foldgpt'?"),
        ("run --budget-gb -1", "the command line: 1 fault\n  --budget-gb: must be above 0; got -1"),
        ("run --budget-gb much", "--budget-gb: a number, such as 2 or 0.28, without a unit; got 'much'"),
        ("run --budget-flops 0.8y", "or a share of dense in quotes"),
        ("run --trials 0", "--trials: must be above 0; got 0"),
        ("run --time soon", "a time is seconds, or 90s, 15m, 2h; got 'soon'"),
        ("run --time 0m", "a time is seconds"),
        ("run --time 5ms", "a time is seconds, or 90s, 15m, 2h; got '5ms'"),
        ("run --time 2hours", "got '2hours'"),
        ("run --time 5m1h", "got '5m1h'"),
        ("run --time nan", "got 'nan'"),
        ("resume no-run --time 1_0s", "got '1_0s'"),
        ("run --budget-gb 2GB", "--budget-gb: a number, such as 2 or 0.28, without a unit; got '2GB'"),
        ("run --budget-gb 1_0", "--budget-gb: a number"),
        ("run --trials 3k", "--trials: a whole number, in digits and without a unit; got '3k'"),
        ("pick no-run --max-gb inf", "--max-gb: a number"),
        ("run --time 1e30h", "--time: must be at most 1e+09; got 3.6e+33."),
        ("run --budget-gb 1e300", "--budget-gb: must be at most 1e+09; got 1e+300."),
        ("run --context 0 --batch -2", "  --batch: must be above 0; got -2"),
        ("run --model ./no-model", "./no-model: there is no such file or folder"),
        ("run --dry-run --model ./no-model", "./no-model: there is no such file or folder"),
        ("run --model package:no_such_package", "no_such_package"),
        ("try 0-3;5", "'0-3;5' is not a word of a plan"),
        ("try 7-3", "a range goes up"),
        ("extend --to 8", "the following arguments are required: --blocks"),
        ("extend --blocks 1-3", "the following arguments are required: --to"),
        ("extend --blocks 3-1 --to 8", "a run of blocks is written 3-18, first before last; got '3-1'"),
        ("extend --blocks 1,3 --to 8", "a run of blocks is written 3-18"),
        ("extend --blocks 1-3 --to 8 --pattern zigzag", "invalid choice: 'zigzag'"),
        ("extend --blocks 1-3 --to 8 --rank many", "a share of the model's width such as 0.0625; got 'many'"),
        ("extend --blocks 1-3 --to 8 --tokens -1", "--tokens: must be at least 0; got -1."),
        ("try 0-3 --tokens -1", "--tokens: must be at least 0; got -1."),
        ("extend --blocks 1-3 --to 8 --out x --export ../here/x", "--out and --export are two folders"),
        ("extend --blocks 1-3 --to 8 --export .", "--export is a new folder, but '.' is there already."),
        ("extend ./no-model --blocks 1-3 --to 8", "./no-model: there is no such file or folder"),
        ("price 0-3_5=4", "block 4 does not run"),
        ("inspect ./no-model", "./no-model: there is no such file or folder"),
        ("front no-run", "there is no 'no-run/study.json'"),
        ("resume no-run", "there is no 'no-run/study.json'"),
        ("resume no-run --trials 0", "--trials: a whole number above 0, got '0'"),
        ("pick no-run --knee", "there is no 'no-run/study.json'"),
        ("export no-run --out x", "there is no 'no-run/study.json'"),
        ("evaluate no-run --questions q.jsonl", "there is no 'no-run/study.json'"),
        ("evaluate no-run --limit few", "--limit: a whole number, in digits and without a unit; got 'few'"),
        ("dashboard no-run", "there is no 'no-run/study.json'"),
        ("pick no-run --knee --trial 3", "not allowed with argument"),
        ("run --modle m", "foldsearch run: error: unknown option --modle. Did you mean --model?"),
        ("pick no-run --zzz", "foldsearch pick: error: unknown option --zzz.\n"),
        ("front no-run another", "foldsearch front: error: too many words: another"),
        ("inspect m --model n", "not allowed with argument"),
        ("", "foldsearch run --budget-gb 2"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(shell: Shell, words: str, said: str) -> None:
    code, out, err = shell(*(word.replace("_", " ") if "=" in word else word for word in words.split()))
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("verb", ["inspect", "extend --blocks 1-3 --to 8"])
def test_a_model_is_a_word_or_an_option(verb: str) -> None:
    words = verb.split()
    by_word, by_option = arguments.parse([*words, "m"]), arguments.parse([*words, "--model", "m"])
    assert by_word == by_option == arguments.parse([words[0], "m", *words[1:]])
    assert by_word.model == "m"
    assert arguments.parse(words).model is None


def test_an_empty_model_is_told_by_its_option(shell: Shell) -> None:
    assert "  --model: a reference is not empty" in shell("run", "--model", "")[2]
    assert "  --model: a reference is not empty" in shell("inspect", "")[2]


def test_all_faults_of_a_study_are_told_at_once(shell: Shell) -> None:
    Path("foldsearch.toml").write_text(
        'model = "m"\ndata = "d"\nspace = "foldgpt"\nseeed = 3\ntrials = "many"\n[target]\ndtype = "bfloat61"\n'
    )
    code, _, err = shell("run")
    assert code == 2
    assert "foldsearch.toml: 3 faults" in err
    assert "seeed: unknown key. Did you mean 'seed'?" in err
    assert 'trials: must be a whole number; got "many"' in err
    assert "Did you mean 'bfloat16'?" in err


def test_a_run_starts_in_a_folder_of_its_own(shell: Shell, run_path: Path) -> None:
    before = _snapshot(run_path)
    code, _, err = shell("run", "--out", str(run_path))
    assert code == 2
    assert "is there already" in err
    assert f"foldsearch resume {run_path}" in err
    assert _snapshot(run_path) == before


def test_a_run_of_another_version_is_refused(shell: Shell, run_path: Path) -> None:
    value = json.loads((run_path / "study.json").read_text())
    (run_path / "study.json").write_text(json.dumps({**value, "foldsearch": "0.0.1"}))
    for verb in ("front", "resume", "pick"):
        code, _, err = shell(verb, str(run_path))
        assert code == 2
        assert "is a run of foldsearch 0.0.1" in err


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "runs/x/storage.db"),
        RuntimeError("Error while serializing: No space left on device (os error 28)"),
        ValueError("database or disk is full"),
    ],
)
def test_a_full_disk_is_not_our_bug(
    shell: Shell, run_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("while writing") from error

    monkeypatch.setattr(api, "write_report", full)
    code, _, err = shell("front", str(run_path))
    assert code == 2
    assert "the disk is full" in err
    assert "Make room" in err


def test_our_own_bugs_show_their_traceback(
    shell: Shell, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "write_report", lambda view: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        shell("front", str(run_path))


def test_ctrl_c_is_130(shell: Shell, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> RunView:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "open_run", interrupted)
    code, _, err = shell("front", str(run_path))
    assert code == 130
    assert "Stopped" in err


def test_a_resumed_run_may_be_given_other_limits(
    shell: Shell, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Study] = []

    def run_search(study: Study, folder: Path, **rest: object) -> None:
        asked.append(study)

    monkeypatch.setattr("foldsearch.search.run.run_search", run_search)
    code, _, _ = shell("resume", str(run_path), "--trials", "99", "--time", "2h")
    assert code == 0
    before = Run.open(run_path).study
    assert asked == [before.model_copy(update={"trials": 99, "seconds": 7200.0})]


@pytest.mark.parametrize("verb", ["front", "pick", "dashboard"])
def test_a_damaged_storage_is_told(shell: Shell, run_path: Path, verb: str) -> None:
    Run.open(run_path).storage.write_bytes(b"\x07" * 5000)
    code, _, err = shell(verb, str(run_path))
    assert code == 2
    assert re.search(r"storage\.db' is damaged: .+ Put back its copy: foldsearch check \S+ --repair", err)


# ---- looking at a run


def test_front_prints_the_tables_and_writes_the_pictures(shell: Shell, run_path: Path) -> None:
    code, out, _ = shell("front", str(run_path))
    assert code == 0
    assert "◆" in out
    assert "report KL by criterion" in out
    assert f"Pictures: {run_path / 'report' / 'index.html'}" in out
    assert {path.name for path in (run_path / "report").iterdir()} == {"index.html", "front.png"}


def test_pick_prints_the_number_alone_and_remembers_it(shell: Shell, run_path: Path) -> None:
    knee = RunView.open(run_path).knee
    assert knee is not None
    code, out, err = shell("pick", str(run_path))
    assert (code, out) == (0, f"{knee.number}\n")
    assert str(knee.plan) in err
    assert shell("pick", str(run_path), "--trial", "2")[:2] == (0, "2\n")
    assert api.picked(api.open_run(run_path)).number == 2
    code, _, err = shell("pick", str(run_path), "--trial", "5")
    assert code == 2
    assert "got 5" in err
    for words, message in (
        (("--max-decode-ms", "3"), "search anew: foldsearch run --max-decode-ms MS"),
        (("--max-gb", "1", "--trial", "0"), "--max-gb may not stand beside --knee or --trial"),
        (("--max-prompt-ms", "1", "--knee"), "--max-prompt-ms may not stand beside --knee or --trial"),
    ):
        code, _, err = shell("pick", str(run_path), *words)
        assert code == 2
        assert message in err
    assert api.picked(api.open_run(run_path)).number == 2  # a refused pick changes nothing


def test_a_damaged_pick_is_told(shell: Shell, run_path: Path) -> None:
    RunFolder(run_path).pick.write_text("{}")
    code, _, err = shell("export", str(run_path), "--out", "x")
    assert code == 2
    assert "Choose again" in err


@pytest.mark.parametrize(
    ("words", "number"),
    [((), 2), (("--trial", "1"), 1), (("--knee",), None)],
    ids=["picked", "trial", "knee"],
)
def test_export_takes_what_was_picked_unless_told(
    shell: Shell, run_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], number: int | None
) -> None:
    asked: list[Any] = []

    def refuse(run: RunView, chosen: int, out: Path, **more: Any) -> None:
        asked.append((chosen, out, more["form"].to))
        raise VerificationError("logits differ by 0.3, at most 0 is allowed.")

    monkeypatch.setattr(api, "export_trial", refuse)
    shell("pick", str(run_path), "--trial", "2")
    code, _, err = shell("export", str(run_path), "--out", "x", "--to", "stock", *words)
    assert code == 1  # what was written is not what was measured
    assert "logits differ by 0.3" in err
    knee = RunView.open(run_path).knee
    assert knee is not None
    assert asked == [(knee.number if number is None else number, Path("x"), "stock")]


def test_a_plan_that_a_runtime_cannot_hold_is_refused_with_the_nearest_and_the_best_that_it_can(
    shell: Shell, run_path: Path
) -> None:
    """Oracle: the commands in the message themselves, and every other trial."""
    view, gguf = RunView.open(run_path), runtime_named("gguf")
    table, target, seen = view.folder.table, view.folder.target, set()
    there = replace(target, shares_weights=False)
    for trial in view.finished:
        if gguf.holds(trial.plan, table):
            continue
        code, _, err = shell(
            "export", str(run_path), "--trial", str(trial.number), "--to", "gguf", "--out", "x"
        )
        assert code == 2
        told = re.search(r"Export it to folded, or take the nearest plan that it holds, '(.*?)': ", err)
        assert told is not None
        plan, room = FoldPlan.parse(told[1], NUM_BLOCKS), trial.cost.memory_bytes
        assert gguf.holds(plan, table)
        assert price(plan, table, there).memory_bytes <= room
        fitting = [
            one
            for one in view.finished
            if gguf.holds(one.plan, table) and price(one.plan, table, there).memory_bytes <= room
        ]
        best = min(fitting, key=lambda one: one.quality.kl, default=None)
        measured = re.search(r"Measure it: foldsearch (try .*? --study .*?)(?: Of the trials|$)", err.strip())
        seen.add((measured is not None, best is not None))
        assert (measured is None) == (best is not None and best.plan == plan)  # else nobody has measured it
        if measured is not None:
            assert shlex.split(measured[1]) == ["try", str(plan), "--study", str(run_path)]
        if best is not None:
            end = f"foldsearch export {run_path} --trial {best.number} --to gguf --out DIR"
            assert err.strip().endswith(end)
    assert load_study(run_path) == view.folder.study
    assert {(False, True), (True, False)} <= seen
    assert not Path("x").exists()


def test_a_new_run_gets_a_name_that_is_free(shell: Shell) -> None:
    assert cli._new_folder("studies/mine.toml") == Path("runs/mine")
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine-2").mkdir()
    assert cli._new_folder("studies/mine.toml") == Path("runs/mine-3")
    assert cli._new_folder(None) == Path("runs/default")
    Path("foldsearch.toml").touch()
    assert cli._new_folder(None) == Path("runs/foldsearch")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_times(text: str, seconds: float) -> None:
    assert arguments._seconds(text) == seconds


def _snapshot(folder: Path) -> dict[str, tuple[int, float]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("1.5", 1.5),
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1m.5s", 60.5),
        ("1e2s", 100),
    ],
)
def test_times_are_seconds_or_have_units(text: str, seconds: float) -> None:
    assert arguments._seconds(text) == seconds


# ---- in a pipe


def test_a_log_has_a_line_at_least_every_half_minute() -> None:
    """Nothing happens but time: a second a beat, as the thread beats."""
    now, said = 0.0, []
    lines = live.StageLines(lambda words: said.append((now, words)), clock=lambda: now)
    lines("asking the dense model", 0.0)
    lines("asking the dense model", 0.0)
    assert said == [(0.0, "asking the dense model ...")]
    for second in range(1, 301):
        now = float(second)
        lines.pulse.beat()
        lines("asking the dense model", second / 600)
    times = [at for at, _ in said]
    assert 5 < max(b - a for a, b in pairwise(times)) <= 30
    assert said[-1][1].startswith("asking the dense model 50% · 5:00 · about 5:0")
    lines("pricing", 0.0)
    assert said[-1] == (300.0, "pricing ...")


def test_a_run_in_a_pipe_says_where_its_trials_are(capsys: pytest.CaptureFixture[str]) -> None:
    display = live.RunDisplay(console())
    display(events.Preparing("reading the text", 0.5))
    assert display._where().startswith("reading the text 50% · 0:00")
    display._waiting = ""
    display._progress = events.Progress(2, 14, 60.0, 120.0)
    display._running[3] = ("recovery", 0.25)
    said = display._where().strip()
    assert said.startswith("2 of 14 trials · 1:0")
    assert said.endswith("left · trial 3: recovery 25%")


@pytest.mark.slow
def test_a_run_whose_reader_ended_is_not_done(run_path: Path) -> None:
    """`foldsearch run | head -1`: a shell's code for SIGPIPE, and how to go on."""
    script = (
        "import sys; from foldsearch import cli; import foldsearch.search.run as run\n"
        "from foldsearch.search.events import Notice\n"
        "def told(*args, on_event, **kwargs): [on_event(Notice('x' * 200_000)) for _ in range(50)]\n"
        "run.run_search = told; cli.entry()"
    )
    command = f"{sys.executable} -c \"$SCRIPT\" resume '{run_path}' | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "SCRIPT": script},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 141
    assert done.stderr == f"Stopped, as nobody reads on. Go on with: foldsearch resume {run_path}\n"


def test_every_verb_that_can_be_typed_does_something() -> None:
    """Law: the parser and the command name the same verbs."""
    typed = [name for name, *_ in arguments._VERBS]
    assert typed == list(cli._VERBS)
    assert sorted(typed) == sorted(VERBS)
