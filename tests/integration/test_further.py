"""A trial that is trained beyond the last rung of its run, on a tiny model.

Oracles: the trial as the run left it, an uninterrupted training, the quality of the model that is rebuilt, and the
command line's own words.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from foldsearch import api, cli, further
from foldsearch import trial as trials
from foldsearch.context import TrialContext
from foldsearch.errors import InputError, RunError
from foldsearch.model.recover import Recovery
from foldsearch.model.training import FurtherTraining, Trained
from foldsearch.progress import TimeUp
from foldsearch.rebuild import check_rebuilt, recovered_model
from foldsearch.record import Trial, read_trial
from foldsearch.report import page, terminal
from foldsearch.spec.space import Recover, Space
from foldsearch.spec.study import SplitSettings
from tests.contexts import begin_run, quality_of, run_queued, tiny_study

STEP = 2 * 16  # tokens
BEGIN, MARK, END = 64, 256, 384  # trained by the run; measured after; asked for
TRAINS = get_args(Trained)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TrialContext:
    """A run of one trial, made without Ray. Two measurements of 6 × 16 tokens make a step of 192."""
    place = tmp_path_factory.mktemp("further")
    study = tiny_study(
        place,
        rungs=(0, BEGIN),
        space=Space(recover=Recover(delta_ranks=(2,))),
        splits=SplitSettings(sequence_length=16, search=6, recovery=8, report=6),
    )
    context = begin_run(study, place / "run", cache_dir=place / "cache")
    run_queued(context, "window", 2)
    return context


@pytest.fixture
def context(prepared: TrialContext, tmp_path: Path) -> TrialContext:
    """The same run in a folder of the test's own."""
    copy = subprocess.run(["cp", "-a", prepared.run.path, tmp_path / "run"], check=True)
    assert copy.returncode == 0
    return replace(prepared, run=replace(prepared.run, path=tmp_path / "run"))


def train(context: TrialContext, tokens: int = END, **more: Any) -> list[Trial]:
    return list(further.recover_further(0, context, FurtherTraining(tokens, **more)))


def untimed(trial: Trial) -> Trial:
    results = (replace(result, seconds=0.0) for result in trial.results)
    return replace(trial, results=tuple(results))


def files(context: TrialContext) -> dict[str, bytes]:
    """All that the run itself wrote."""
    place = context.run.path
    paths = (path for path in place.rglob("*") if path.is_file() and "further" not in path.parts)
    return {str(path.relative_to(place)): path.read_bytes() for path in paths if path.name != "lock"}


# ---- what it comes to


@pytest.mark.parametrize("trains", TRAINS)
def test_it_goes_on_and_leaves_the_run_as_it_was(context: TrialContext, trains: Trained) -> None:
    before, known = files(context), read_trial(context.run.trial(0))
    assert known is not None
    first, last = train(context, trains=trains)
    assert files(context) == before
    assert last.results[:2] == known.results
    assert [result.recovery_tokens for result in last.results] == [0, BEGIN, MARK, END]
    assert (first.state, last.state) == ("running", "finished")
    assert [result.report is not None for result in last.results] == [False, True, False, True]
    assert last.quality.kl < known.quality.kl
    assert last.recovery.trains == trains
    # what is rebuilt is what was measured, here and in a process that reads it from disk
    model, rebuilt = recovered_model(context, 0)
    assert rebuilt == read_trial(context.run.trial(0).further) == last
    assert quality_of(context, model) == (last.quality, last.last.report)
    assert check_rebuilt(context, 0, model, known).tolerance == 0.0


def test_the_texts_go_on_where_the_run_left_them(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the order of one training from the start. Eight sequences: each pass over them is in a new order."""
    rows: list[list[int]] = []
    step = Recovery._step
    monkeypatch.setattr(Recovery, "_step", lambda self, taken: (rows.append(taken), step(self, taken))[1])
    train(context)
    seen = BEGIN // 16
    whole = Recovery._sequences(_Order())  # type: ignore[arg-type]
    expected = [next(whole) for _ in range(END // 16)][seen:]
    assert [row for taken in rows for row in taken] == expected
    assert sorted(expected[4:12]) == list(range(8))
    assert expected[4:12] != expected[12:20]


class _Order:
    class settings:
        seed = 0

    class tokens:
        ids_NT = torch.zeros(8, 16)


def test_more_tokens_go_on_after_the_end(context: TrialContext) -> None:
    *_, first = train(context)
    assert train(context) == []  # it has come so far
    *_, more = train(context, 3 * END)
    assert more.results[: len(first.results)] == first.results
    assert more.last.recovery_tokens == 3 * END
    with pytest.raises(
        InputError, match=rf"more than the {3 * END:,} that trial 0 was trained on; got {END}"
    ):
        train(context)
    with pytest.raises(InputError, match=r"trained further by 'deltas'; got 'last'. Take that, or remove"):
        train(context, 9 * END, trains="last")


def test_training_that_hurts_is_not_kept(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise after the first mark: its state is the trial's, and the model of the run where there is none better."""
    real, noisy = Recovery.train, []

    def spoil(self: Recovery, until: int, progress: Any = None) -> None:
        real(self, until, progress)
        if until in noisy:
            for parameter in self.trained.values():
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(Recovery, "train", spoil)
    noisy += [MARK, END]
    *_, worse = train(context)
    assert worse.last.kept_tokens == BEGIN
    assert worse.quality == worse.results[1].quality
    assert worse.setback_words.endswith(f"kept after {BEGIN} tokens")
    model, _ = recovered_model(context, 0)
    assert quality_of(context, model) == (worse.quality, worse.results[1].report)


def test_its_last_step_may_hurt(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Recovery.train

    def spoil(self: Recovery, until: int, progress: Any = None) -> None:
        real(self, until, progress)
        if until == END:
            for parameter in self.trained.values():
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(Recovery, "train", spoil)
    first, last = train(context)
    assert (last.last.kept_tokens, last.quality) == (MARK, first.quality)
    model, _ = recovered_model(context, 0)
    assert quality_of(context, model) == (last.quality, last.last.report)


# ---- stopped and killed


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("where", ["judge", "step", "record"])
def test_killed_at_any_time_it_goes_on(
    context: TrialContext, prepared: TrialContext, tmp_path: Path, where: str, trains: Trained
) -> None:
    """Oracle: an uninterrupted training, to the bit. Its state is written after every step here."""
    subprocess.run(["cp", "-a", prepared.run.path, tmp_path / "whole"], check=True)
    whole = replace(prepared, run=replace(prepared.run, path=tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "SAVE_SECONDS", -1.0)
        expected = train(whole, trains=trains)
        calls: list[int] = []

        def killed(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == {"judge": 2, "step": 8, "record": 2}[where]:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        owner, name = {
            "judge": (trials, "judged"), "step": (Recovery, "_step"), "record": (Trial, "kept_in"),
        }[where]  # fmt: skip
        real = getattr(owner, name)
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train(context, trains=trains)
        patch.setattr(owner, name, real)
        steps: list[int] = []
        step = Recovery._step
        patch.setattr(Recovery, "_step", lambda self, rows: (steps.append(1), step(self, rows))[1])
        rest = train(context)
    assert untimed(rest[-1]) == untimed(expected[-1])
    one, two = (load_file(place.run.trial(0).further.recovered) for place in (whole, context))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(steps) <= (END - BEGIN) // STEP - 6  # what was written was not trained again


def test_stopped_before_it_was_measured_it_goes_on_with_what_it_trained(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "SAVE_SECONDS", -1.0)
    step, taken = Recovery._step, []

    def killed(self: Recovery, rows: list[int]) -> float:
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, rows)

    monkeypatch.setattr(Recovery, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(context, trains="last")
    folder = context.run.trial(0).further
    assert folder.optimizer.exists()
    assert not folder.record.exists()
    with pytest.raises(InputError, match=r"trained further by 'last'; got 'deltas'. Take that, or remove"):
        train(context, trains="deltas")
    *_, last = train(context)
    assert (last.recovery.trains, last.last.recovery_tokens) == ("last", END)


def test_the_time_ends_the_training_and_what_was_reached_is_measured(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    step = Recovery._step
    monkeypatch.setattr(Recovery, "_step", lambda self, rows: (taken.append(1), step(self, rows))[1])
    monkeypatch.setattr(further, "time", _Clock(lambda: float(len(taken))))
    (last,) = train(context, seconds=2.0)
    assert (last.state, last.last.recovery_tokens) == ("finished", BEGIN + 3 * STEP)
    assert last.last.report is not None
    assert last.quality.kl < last.results[1].quality.kl
    model, _ = recovered_model(context, 0)
    assert quality_of(context, model) == (last.quality, last.last.report)
    *_, whole = train(context)
    assert whole.last.recovery_tokens == END


def test_time_that_is_up_right_after_a_step_measures_the_report_texts(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was trained since; the latest result gets what it lacks."""

    def is_over(*_: Any) -> None:
        raise TimeUp

    steps: Iterator[Trial] = further.recover_further(0, context, FurtherTraining(END))
    first = next(steps)
    assert first.last.report is None
    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "train", is_over)
        (last,) = steps
    assert len(last.results) == len(first.results)
    model, _ = recovered_model(context, 0)
    assert quality_of(context, model) == (last.quality, last.last.report)


class _Clock:
    def __init__(self, monotonic: Any) -> None:
        self.monotonic, self.perf_counter = monotonic, time.perf_counter


# ---- what cannot be


def test_what_cannot_be_trained_further_is_told(context: TrialContext) -> None:
    with pytest.raises(InputError, match=rf"more than the {BEGIN} that trial 0 was trained on; got {BEGIN}"):
        train(context, BEGIN)
    with pytest.raises(RunError, match="only a trial that reached the last rung can be trained further"):
        list(further.recover_further(7, context, FurtherTraining(END)))
    assert not context.run.trial(0).further.path.exists()


def test_of_a_changed_file_nothing_is_trained(context: TrialContext) -> None:
    path = context.run.trial(0).recovered
    path.write_bytes(path.read_bytes() + b" ")
    (last,) = train(context)
    assert last.state == "failed"
    assert "only from what it was measured with" in last.reason
    assert not context.run.trial(0).further.path.exists()


# ---- the command line


def foldsearch(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def run(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(context.cache_dir))
    return context.run.path


def test_the_verb_tells_every_step_and_reports_show_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert foldsearch("recover", run, "--trial", 0, "--tokens", END) == 0
    told = capsys.readouterr()
    assert re.search(rf"^{MARK} tokens, .* the best so far; about \d+:\d\d left$", told.err, re.MULTILINE)
    assert "go through them 3.0 times, each time in a new order" in told.err
    rows = re.findall(r"^ *(\+?\d+) +(\d+)  .*±", told.out, re.MULTILINE)
    assert rows == [("0", "0"), ("1", "64"), ("+1", "256"), ("+2", "384")]
    view = api.open_run(run)
    words = view.further_words(view.finished[0])
    assert words.startswith(f"trained further, {BEGIN} → {END} tokens: report KL ")
    shown = " ".join(str(line) for line in terminal._remarks(view, every=False))
    assert words in shown
    assert "the figures in the tables are of the last rung for all" in shown
    assert words in page._page(view)
    assert view.finished[0].last.recovery_tokens == BEGIN  # the front compares as before

    assert foldsearch("export", run, "--trial", 0, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert re.search(
        rf"trial 0 was trained further; what ships is its best state: .*trained on {END} tokens", said
    )
    written = json.loads((tmp_path / "out" / "card.json").read_text())["recipe"]
    assert written["trial"]["results"][-1]["recovery_tokens"] == END

    # oracle: a model that cannot be read is no fault where nothing is to be trained
    with monkeypatch.context() as patch:
        patch.setattr("foldsearch.prepare.prepare_context", None)
        assert foldsearch("recover", run, "--trial", 0, "--tokens", END) == 0
        told = capsys.readouterr()
        assert f"trial 0 was trained on {END} tokens already" in told.err
        assert "go through them" not in told.err
        assert "+2" in told.out
        # as many whole steps: training ends with one, so it ended there for these too
        assert foldsearch("recover", run, "--trial", 0, "--tokens", END - 1) == 0
        assert f"trial 0 was trained on {END - 1} tokens already" in capsys.readouterr().err
        assert foldsearch("recover", run, "--trial", 0, "--tokens", END - 2 * 32) == 2
        assert f"must be more than the {END}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trial", 9, "--tokens", END), "only a trial that reached the last rung can be picked, got 9"),
        (("--trial", 0, "--tokens", BEGIN), "more than the 64 that trial 0 was trained on"),
    ],
)
def test_bad_input_is_told(run: Path, capsys: pytest.CaptureFixture[str], words: Any, said: str) -> None:
    assert foldsearch("recover", run, *words) == 2
    assert said in capsys.readouterr().err
    assert not (run / "trials" / "00000" / "further").exists()


def test_a_run_that_is_running_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold = f"""
from foldsearch.run import RunFolder
from pathlib import Path
with RunFolder(Path({str(run)!r})).held():
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code = foldsearch("recover", run, "--trial", 0, "--tokens", END)
        holder.communicate("\n")
    assert code == 2
    assert "another one is at work in" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recovery, "train", interrupt)
    assert foldsearch("recover", run, "--trial", 0, "--tokens", END) == 130
    assert f"Go on with: foldsearch recover {run} --trial 0 --tokens {END}" in capsys.readouterr().err


def test_a_plan_that_is_typed_is_trained_by_each_arm(context: TrialContext) -> None:
    kls = {}
    for trains in TRAINS:
        *_, trial = api.try_plan("0-1 4", context.study, trains=trains)
        assert trial.recovery.trains == trains
        kls[trains] = trial.last.quality.kl
    assert len(set(kls.values())) == len(TRAINS)


def test_another_plan_in_the_same_folder_begins_anew(context: TrialContext, tmp_path: Path) -> None:
    """Its figures are those of a folder of its own, and the one before is tried again if it is asked for."""
    folder, study = tmp_path / "tried", context.study
    one, other = (untimed(list(api.try_plan(plan, study))[-1]) for plan in ("0-1 4", "0-2 4"))
    for plan, expected in (("0-1 4", one), ("0-2 4", other), ("0-1 4", one)):
        found = untimed(list(api.try_plan(plan, study, folder=folder))[-1])
        assert (found.plan, found.quality) == (expected.plan, expected.quality)
    shorter = study.model_copy(update={"rungs": (0, BEGIN // 2)})
    *_, last = api.try_plan("0-1 4", shorter, folder=folder)
    assert last.last.recovery_tokens == BEGIN // 2
    before = files(context)
    with pytest.raises(RunError, match="in a folder of its own"):
        list(api.try_plan("0-1 4", study, folder=context.run.path))
    assert files(context) == before


def test_a_plan_that_is_tried_again_says_what_it_came_to(context: TrialContext, tmp_path: Path) -> None:
    """And begins anew where the study is another one, whose healing makes another model."""
    folder, study = tmp_path / "tried", context.study
    *_, first = api.try_plan("0-1 4", study, folder=folder)
    (again,) = api.try_plan("0-1 4", study, folder=str(folder))
    assert again == first
    plain = study.model_copy(update={"healing": study.healing.model_copy(update={"tokens": 0})})
    *_, other = api.try_plan("0-1 4", plain, folder=folder)
    *_, alone = api.try_plan("0-1 4", plain)
    assert other.quality == alone.quality != first.quality


def test_gradients_that_are_no_numbers_leave_the_state_as_it_was(
    context: TrialContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, the gradient is not: training diverged, and goes back to the state that was kept."""
    monkeypatch.setattr(trials, "SAVE_SECONDS", -1.0)
    real, calls = Recovery._gradients, []

    def spoilt(self: Recovery, rows: list[int]) -> float:
        loss = real(self, rows)
        calls.append(1)
        if len(calls) == 3:
            next(iter(self.trained.values())).grad.fill_(float("nan"))  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(Recovery, "_gradients", spoilt)
    *_, hurt = train(context)
    assert hurt.setback_words
    saved = load_file(context.run.trial(0).further.optimizer)
    assert all(value.isfinite().all() for value in saved.values())
    *_, last = train(context)
    assert last.last.recovery_tokens == END
    assert last.quality.kl <= hurt.quality.kl
