"""Files that were damaged while no process was at work: what `check` says of them, what `resume` does with them.

Oracle: the same search undisturbed, and the bytes that were there before.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foldsearch import cache, cli
from foldsearch.context import TrialContext, read_splits, write_splits
from foldsearch.errors import RunError
from foldsearch.files import write_json
from foldsearch.further import recover_further
from foldsearch.model.kept import DamagedFileError, read_tensors, read_words, write_tensors
from foldsearch.model.training import FurtherTraining
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.record import Trial, owner_of, plan_path
from foldsearch.run import Run
from foldsearch.search.check import check_run, mend_for_resume
from foldsearch.search.records import Records, read_trials
from foldsearch.search.screened import Screened, write_screened
from foldsearch.trial import run_trial
from tests.contexts import begin_run, tiny_study
from tests.faults.storm import corrupt, truncate, without_seconds
from tests.faults.test_every_write import Clock, Killed, begin, killed_by, run_process
from tests.proposals import given

Damage = Callable[[Run], Path]
RNG = random.Random(0)
SEARCH = "tpe"


def the_last_record(run: Run) -> Path:
    return max(run.path.glob("trials/*/trial.json"))


def a_plan(run: Run) -> Path:
    return min(run.path.glob("plans/*.json"))


def the_study(run: Run) -> Path:
    return run.storage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search to its end, with the folders of its trials."""
    run = begin(tmp_path_factory.mktemp("whole") / "run", SEARCH)
    run_process(run)
    return run


def copy_of(run: Run, place: Path) -> Run:
    shutil.copytree(run.path.parent, place, dirs_exist_ok=True)
    return Run.open(place / "run")


def test_a_whole_run_is_whole(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(whole, tmp_path)
    before = {path: path.read_bytes() for path in run.path.rglob("*.json")}
    assert cli.main(["check", str(run.path)]) == 0
    assert f"Whole: {len(read_trials(whole))} trials" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.path.rglob("*.json")} == before


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (the_last_record, truncate),
        (the_last_record, lambda path, rng: path.unlink()),
        (a_plan, truncate),
        (the_study, truncate),
        (the_study, lambda path, rng: path.write_bytes(b"")),
        (the_study, lambda path, rng: path.unlink()),
    ],
)
def test_what_has_a_second_source_is_mended(
    whole: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: Damage,
    damage: Callable[[Path, random.Random], None],
) -> None:
    run = copy_of(whole, tmp_path)
    path = file(run)
    damage(path, RNG)
    assert cli.main(["check", str(run.path)]) == cli.NOT_WHOLE
    said = capsys.readouterr().out
    assert path.name in said
    assert "--repair" in said
    assert cli.main(["check", str(run.path), "--repair"]) == 0
    assert "mended" in capsys.readouterr().out
    assert read_trials(run) == read_trials(whole)
    assert check_run(run, repair=False).left == ()
    if path.suffix == ".json":
        mended, before = (json.loads(one.read_text()) for one in (path, file(whole)))
        # whether a trial closes the search is the study's to know, and no worker's
        assert {**mended, "closing": None} == {**before, "closing": None}


def test_what_has_none_is_told(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(whole, tmp_path)
    number = next(trial.number for trial in read_trials(run) if trial.is_measured)
    run.trial(number).start.write_bytes(b"no safetensors")
    for more in ([], ["--repair"]):
        assert cli.main(["check", str(run.path), *more]) == cli.NOT_WHOLE
        said = capsys.readouterr().out
        assert f"trial {number}: '{run.trial(number).start}' cannot be read" in said.replace("\n", " ")
        assert "choose another trial: foldsearch front" in said


def test_what_killed_processes_left_goes(whole: Run, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    left = [run.trial(0).path / ".trial.json.4711.tmp", run.trial(0).optimizer]
    for path in left:
        path.write_bytes(b"half")
    (fault,) = check_run(run, repair=True).mended
    assert "2 files that nobody needs" in fault.words
    assert not any(path.exists() for path in left)


def test_a_run_that_is_at_work_is_left_alone(whole: Run) -> None:
    with whole.held(), pytest.raises(RunError, match="at work"):
        check_run(whole, repair=True)


@pytest.mark.parametrize("file", [None, the_last_record, the_study, "no study, no copy"])
def test_a_killed_search_goes_on_as_if_nothing_had_been_damaged(
    whole: Run, tmp_path: Path, file: Damage | str | None
) -> None:
    """Killed in the middle of a trial, then damaged; the copy of the study is a trial behind, and so are the folders
    ahead of it.
    """
    run = begin(tmp_path / "run", SEARCH)
    with killed_by(Clock(iter([300, 10**9]))), pytest.raises(Killed):
        run_process(run)
    assert 3 < len(read_trials(run)) < len(read_trials(whole))
    if isinstance(file, str):
        run.storage_copy.unlink()
        run.storage.write_bytes(b"no database" * 1000)
    elif file is not None:
        truncate(file(run), RNG)
    told = list(mend_for_resume(run))
    assert len(told) == (file is not None)
    run_process(run)
    assert read_trials(run) == read_trials(whole)
    assert check_run(run, repair=False).left == ()


# ---- the state of a real trial


def first_rung(place: Path) -> tuple[Run, Trial, TrialContext]:
    """A trial that was stopped after a rung that trained."""
    context = begin_run(
        tiny_study(place, rungs=(0, 64, 128), trials=1), place / "run", cache_dir=place / "cache"
    )
    records = Records(context.run)
    records.queue("window", 1)
    number, proposal = records.ask()
    steps = run_trial(proposal, context, number=number)
    for _ in range(2):
        trial = next(steps)
        records.record(trial)
    steps.close()
    return context.run, trial, context


def to_its_end(run: Run, context: TrialContext) -> Trial:
    records = Records(run)
    number, proposal = records.ask()
    for trial in run_trial(proposal, context, number=number):
        records.record(trial)
    records.finish(number)
    return records.get(number)


def test_a_trial_whose_state_is_damaged_comes_to_the_same(tmp_path: Path) -> None:
    """Its record, its training or its model damaged: it is made again, to the bit."""
    run, trial, context = first_rung(tmp_path)
    folder = run.trial(trial.number)
    shutil.copytree(run.path, tmp_path / "kept")
    undisturbed = to_its_end(run, context)
    damaged = [path for path in folder.kept if (tmp_path / "kept" / path.relative_to(run.path)).exists()]
    assert folder.optimizer in damaged
    for path in damaged:
        for hurt in (truncate, corrupt):
            shutil.rmtree(run.path)
            shutil.copytree(tmp_path / "kept", run.path)
            hurt(path, RNG)
            told = list(mend_for_resume(run))
            assert len(told) == 1, (path, hurt, told)
            assert path.name in told[0]
            assert without_seconds([to_its_end(run, context)]) == without_seconds([undisturbed])
    shutil.rmtree(run.path)
    shutil.copytree(tmp_path / "kept", run.path)
    assert list(mend_for_resume(run)) == []


def test_a_model_that_changes_during_the_run_is_told(tmp_path: Path) -> None:
    run, _, context = first_rung(tmp_path)
    (weights,) = context.files.folder.glob("*.safetensors")
    time.sleep(0.01)
    weights.touch()
    records = Records(run)
    number, proposal = records.ask()
    (trial,) = run_trial(proposal, context, number=number)
    assert trial.state == "failed"
    assert re.search(r"model\.safetensors in .* changed\. Put the old files back", trial.reason)


# ---- what belongs to no trial, and training beyond the last rung


def test_what_a_run_keeps_beside_its_trials_is_looked_at(tmp_path: Path) -> None:
    """Token sets are made again from the texts; what only reports need is put aside."""
    run, trial, context = first_rung(tmp_path)
    to_its_end(run, context)
    tokens = run.tokens.read_bytes()
    write_screened(run.screened, [Screened(trial.plan, ("window",), trial.quality)])
    run.rivals.write_text("[]")
    assert check_run(run, repair=False).left == ()
    for path in (run.tokens, run.screened, run.rivals):
        for hurt in (truncate, lambda path, rng: path.write_bytes(b"\xff")):
            kept = path.read_bytes()
            hurt(path, RNG)
            (fault,) = check_run(run, repair=False).left
            assert str(path) in fault.words
            (mended,) = check_run(run, repair=True).mended
            assert str(mended) == str(fault)
            assert check_run(run, repair=False).left == ()
            assert not path.exists()
            path.write_bytes(kept)
    run.tokens.unlink()
    prepare_context(run.study, run.path, cache_dir=tmp_path / "cache")
    assert check_run(run, repair=False).left == ()
    splits = read_splits(run)
    changed = splits.search.ids_NT.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 10
    write_splits(run.tokens, replace(splits, search=replace(splits.search, ids_NT=changed)))
    (fault,) = check_run(run, repair=True).left  # whose they are is not ours to guess
    assert "not those that the run was made with" in fault.words
    run.tokens.write_bytes(tokens)
    run.identity_file.write_text("{")
    (fault,) = check_run(run, repair=True).left
    assert "identity.json" in fault.words


def test_a_plans_file_that_names_a_trial_of_another_plan_is_mended(whole: Run, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    path = a_plan(run)
    told = json.loads(path.read_text())
    other = next(trial for trial in read_trials(run) if trial.draft and str(trial.plan) != told["plan"])
    write_json(path, told | {"trial": other.number})
    (mended,) = check_run(run, repair=True).mended
    assert path.name in mended.words
    assert json.loads(path.read_text()) == told
    assert check_run(run, repair=False).left == ()


def test_weights_that_are_gone_are_told_also_where_their_record_is_written_again(tmp_path: Path) -> None:
    run, trial, context = first_rung(tmp_path)
    to_its_end(run, context)
    folder = run.trial(trial.number)
    kept = [path for path in (folder.start, folder.recovered) if path.exists()]
    assert kept
    for path in kept:
        content = path.read_bytes()
        path.unlink()
        (fault,) = check_run(run, repair=False).left
        assert str(path) in fault.words
        path.write_bytes(content)
    assert check_run(run, repair=False).left == ()
    shutil.rmtree(folder.path)
    found = check_run(run, repair=True)
    assert [folder.record.name in fault.words for fault in found.mended] == [True]
    assert [str(folder.recovered) in fault.words for fault in found.left] == [True]


def test_what_further_training_left_is_looked_at(tmp_path: Path) -> None:
    run, trial, context = first_rung(tmp_path)
    to_its_end(run, context)
    assert list(recover_further(trial.number, context, FurtherTraining(256)))
    assert check_run(run, repair=False).left == ()
    folder = run.trial(trial.number).further
    for path in (path for path in folder.kept if path.exists()):
        kept = path.read_bytes()
        truncate(path, RNG)
        (fault,) = check_run(run, repair=True).left
        assert str(path) in fault.words
        assert f"remove '{folder.path}'" in fault.remedy
        if path == folder.recovered:
            path.unlink()
            assert check_run(run, repair=True).left == (fault,)
        path.write_bytes(kept)
    folder.record.write_text("{")
    with pytest.raises(RunError, match="recover` then begins anew"):
        list(recover_further(trial.number, context, FurtherTraining(512)))


# ---- tensors, and what the cache holds


def flips(content: bytes, count: int) -> Iterator[bytes]:
    for at in RNG.sample(range(len(content)), min(count, len(content))):
        yield content[:at] + bytes([content[at] ^ (1 << RNG.randrange(8))]) + content[at + 1 :]


def test_kept_tensors_are_read_as_they_were_written_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    words = {"tokens": "64", "found": "{}"}
    write_tensors(path, tensors, words)
    content = path.read_bytes()
    for hurt in [*flips(content, 150), *(content[:size] for size in range(0, len(content), 13))]:
        path.write_bytes(hurt)
        try:
            found, told = read_tensors(path), read_words(path)
        except DamagedFileError:
            continue
        assert told == words
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    write_tensors(path, tensors, words)
    assert path.read_bytes() == content  # the same state is the same file


def test_a_damaged_entry_of_the_cache_is_made_again(tmp_path: Path) -> None:
    value = {"kl": [0.125, 3.0], "plan": "0-3"}
    path = tmp_path / "evidence" / f"{0:016x}.json"
    assert cache.json_once(path, lambda: value) == (value, False)
    for hurt in [*flips(path.read_bytes(), 80), b"", b"[1]", b"{}"]:
        path.write_bytes(hurt)
        found, _ = cache.json_once(path, lambda: value)
        assert found == value
        assert json.loads(path.read_text())["value"] == value
    path.write_bytes(path.read_bytes().replace(b"0.125", b"0.625"))
    assert cache.json_grown(path, lambda known: known or "begun again") == "begun again"

    path = tmp_path / "states" / f"{1:016x}.bin"
    whole = bytes(range(256)) * 3

    def make(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole)

    cache.once(path, make, Path.read_bytes)
    for hurt in [*flips(whole, 10), whole[:-1], b""]:
        path.unlink()  # another file, as after a restore
        path.write_bytes(hurt)
        cache._summed.clear()
        assert cache.once(path, make, Path.read_bytes)[0] == whole
    assert [entry.kind for entry in cache.entries(tmp_path)] == ["evidence", "states"]


def test_an_entry_that_another_process_made_again_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the same damage; the slower one must not remove what the faster one uses already."""
    path = tmp_path / "states" / f"{1:016x}.bin"
    made: list[bytes] = []

    def make(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        made.append(b"whole")
        path.write_bytes(b"whole")

    cache.once(path, make, Path.read_bytes)
    path.write_bytes(b"hurt!")
    cache._summed.clear()
    hold = cache.alone

    @contextmanager
    def hold_later(lock: Path) -> Iterator[None]:
        monkeypatch.setattr(cache, "alone", hold)
        path.unlink()
        path.write_bytes(b"whole")  # by the other process
        with hold(lock):
            yield

    monkeypatch.setattr(cache, "alone", hold_later)
    assert cache.once(path, make, Path.read_bytes) == (b"whole", True)
    assert len(made) == 1


def test_an_entry_that_is_damaged_where_it_is_fetched_from_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        def fetch(self, path: Path) -> bool:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"no JSON")
            return True

        def offer(self, path: Path) -> None:
            assert json.loads(path.read_text())["value"] == [1]

    monkeypatch.setattr(cache, "behind", Other())
    assert cache.json_once(tmp_path / "evidence" / f"{0:016x}.json", lambda: [1]) == ([1], False)


def test_an_entry_that_cannot_be_read_however_often_is_told(tmp_path: Path) -> None:
    """What fails on an entry that was just made is no damage."""

    def read(path: Path) -> None:
        raise ZeroDivisionError

    path = tmp_path / "states" / f"{1:016x}.bin"
    with pytest.raises(ZeroDivisionError):
        cache.once(path, lambda path: path.parent.mkdir(exist_ok=True) or path.write_bytes(b"abc"), read)
    with pytest.raises(ZeroDivisionError):
        cache.once(path, lambda path: path.write_bytes(b"abc"), read)


# ---- a study that was begun again gives numbers to other plans


def trial_of(context: TrialContext, text: str, number: int) -> Trial:
    *_, trial = run_trial(given(FoldPlan.parse(text, 5)), context, number=number)
    return trial


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """KL of a plan in a run of its own."""
    place = tmp_path_factory.mktemp("alone")
    study = tiny_study(place, rungs=(0,), trials=1)
    return trial_of(begin_run(study, place / "run", cache_dir=place / "cache"), "0-2 4", 0).quality.kl


def test_what_another_plan_was_healed_to_is_not_taken(alone: float, tmp_path: Path) -> None:
    """Trial 0 was killed before its first result; after that the number is another plan's, of as many blocks."""
    context = begin_run(
        tiny_study(tmp_path, rungs=(0,), trials=1), tmp_path / "run", cache_dir=tmp_path / "cache"
    )
    trial_of(context, "0-1 3-4", 0)
    folder = context.run.trial(0)
    assert folder.start.exists()
    folder.record.unlink()
    assert trial_of(context, "0-2 4", 0).quality.kl == alone


def test_what_another_plan_measured_is_not_taken(alone: float, tmp_path: Path) -> None:
    """The plan's file names trial 0, which has another plan by now."""
    context = begin_run(
        tiny_study(tmp_path, rungs=(0,), trials=1), tmp_path / "run", cache_dir=tmp_path / "cache"
    )
    trial_of(context, "0-2 4", 0)
    shutil.rmtree(context.run.trial(0).path)
    other = trial_of(context, "0-1 3-4", 0)
    again = trial_of(context, "0-2 4", 1)
    assert again.last.known_from is None
    assert again.quality.kl == alone != other.quality.kl
    path = plan_path(context.run, again)
    write_json(path, {"trial": 0, "plan": str(again.plan)})
    assert owner_of(path, context.run) is None
