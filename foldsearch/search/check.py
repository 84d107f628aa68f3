"""Whether the study of a run and the folders of its trials agree, and what is mended where they do not.

A process that is killed leaves nothing that is half written, and `resume` goes on from what is there. What is mended
here is what killed processes do not do: files that a failing disk, a machine without power or a person damaged. The
study is the book of record, so a record in a folder is written again from it; the study has a copy of itself; what a
trial trained and cannot be read is trained again, if the trial has not ended. Nothing is mended by guessing: what has
no second source is told.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from foldsearch.codec import to_json
from foldsearch.context import read_splits
from foldsearch.errors import FoldsearchError, RunError
from foldsearch.files import write_json
from foldsearch.model.content import file_hash
from foldsearch.model.kept import DamagedFileError, read_tensors
from foldsearch.paths import command, printable
from foldsearch.rebuild import is_ahead
from foldsearch.record import Trial, plan_path, point, read_rivals, read_trial
from foldsearch.run import Run, TrialFolder
from foldsearch.search.records import TOLD, Row, read_rows, write_row
from foldsearch.search.screened import read_screened
from foldsearch.search.storage import place_of


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is not as it should be.

    where: which part of the run. words: what is wrong with it. remedy: what mends it, or what a person can do.
    mend: mends it; None where only a person can.
    """

    where: str
    words: str
    remedy: str
    mend: Callable[[], None] | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.words}"


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check_run` found. trials: how many there are. interrupted: those that `resume` goes on with. mended: faults
    that are no more. left: those that are.
    """

    trials: int
    interrupted: tuple[int, ...]
    mended: tuple[Fault, ...]
    left: tuple[Fault, ...]


def check_run(run: Run, *, repair: bool) -> Checked:
    """Look at everything that a run keeps; takes as long as reading it once.

    Raises:
        RunError: somebody else is at work in the run.
    """
    with run.held():
        mended: list[Fault] = []
        left: list[Fault] = []
        for look in (_faults_of_study, _faults_of_trials, _faults_of_files):
            found = list(look(run))
            if repair and (can_be := [fault for fault in found if fault.mend is not None]):
                for fault in can_be:
                    assert fault.mend is not None
                    fault.mend()
                mended += can_be
                found = list(look(run))  # a record that is there again may tell of weights that are not
            left += found
            if look is _faults_of_study and left:
                return Checked(0, (), tuple(mended), tuple(left))
        rows = read_rows(run)
        open_ones = tuple(row.trial.number for row in rows if row.is_open)
        return Checked(len(rows), open_ones, tuple(mended), tuple(left))


def mend_for_resume(run: Run) -> Iterator[str]:
    """Mend what would hinder a run that goes on, whose lock is held; a sentence for each fault.

    Of trials that have ended only the records are looked at: `check_run` reads their weights too.
    """
    for fault in [*_faults_of_study(run)]:
        if fault.mend is None:
            raise RunError(f"{fault}. {fault.remedy}")
        fault.mend()
        yield f"{fault}. {fault.remedy}."
    for fault in [*_faults_of_trials(run, ended=False), *_faults_of_files(run)]:
        if fault.mend is not None:
            fault.mend()
            yield f"{fault}. {fault.remedy}."


# ---- the study


def _faults_of_study(run: Run) -> Iterator[Fault]:
    """At most one: whether the study is there and can be read, every row of it."""
    if place_of(run) is not None or not (run.storage.exists() or run.storage_copy.exists()):
        return
    if not (reason := _why_unreadable(run)):
        return
    words = f"'{printable(run.storage)}', which holds the trials, {reason}"
    if run.storage_copy.exists() and not _damage(run.storage_copy):
        remedy = "Its copy, made when the last trial ended, takes its place"
        yield Fault("the study", words, remedy, lambda: _restore(run))
    else:
        remedy = (
            "There is no copy of it: it is put aside, and the search begins again with what the folders hold"
        )
        yield Fault("the study", words, remedy, lambda: _put_aside(run, run.storage_copy))


def _why_unreadable(run: Run) -> str:
    """What is wrong with the file of the study, in words; empty where nothing is."""
    if not run.storage.exists():
        return "is gone"
    if damage := _damage(run.storage):
        return f"is damaged: {damage}"
    try:
        rows = read_rows(run)
    except RunError as error:
        return f"is damaged: {error}"
    # A file of no bytes is an empty database. The copy was made when a trial ended, which had a row.
    return "holds no trial, but a trial had ended" if not rows and run.storage_copy.exists() else ""


def _damage(path: Path) -> str:
    """What SQLite says is wrong with a file; empty where it is whole."""
    try:
        with closing(sqlite3.connect(path, timeout=60)) as file:
            (said,) = file.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:
        raise  # locked, or the disk is full: not damage
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if said == "ok" else str(said)


def _put_aside(run: Run, *others: Path) -> None:
    """Put the file of the study aside with those beside it, and others."""
    beside = (run.storage.with_name(run.storage.name + ending) for ending in ("", "-wal", "-shm"))
    for file in (*beside, *others):
        if file.exists():
            _set_aside(file)


def _restore(run: Run) -> None:
    _put_aside(run)
    shutil.copyfile(run.storage_copy, run.storage)


# ---- the trials


def _faults_of_trials(run: Run, *, ended: bool = True) -> Iterator[Fault]:
    """What is wrong with trials, their folders and the files of plans; `ended`: look at weights of ended ones too."""
    rows = read_rows(run)
    for row in rows:
        yield from _faults_of_row(run, row)
        yield from _faults_of_record(run, row)
    for row in rows:
        # Records first: whether weights are whole is held against them.
        if row.is_open or (ended and row.trial.state == "finished"):
            yield from _faults_of_weights(run, row)
        if ended:
            yield from _faults_of_further(run, row.trial.number)
    yield from _faults_of_plans(run, [row.trial for row in rows])
    yield from _trained_twice(run, [row.trial for row in rows])
    if ended:
        yield from _leftovers(run, rows)


def _faults_of_row(run: Run, row: Row) -> Iterator[Fault]:
    """The state that Optuna was told, and its objectives, beside the trial as we have it."""
    trial, where = row.trial, f"trial {row.trial.number}"
    ask = "Please report it, with the run's study.json"
    if not row.is_open and row.state != "WAITING" and TOLD[trial.state].name != row.state:
        yield Fault(where, f"it is {trial.state}, but its row is {row.state}", ask)
    if trial.state != "finished" or row.is_open:
        return
    if len(trial.results) < len(run.study.rungs) and not trial.last.training_diverged:
        yield Fault(where, f"it is finished after {len(trial.results)} of {len(run.study.rungs)} rungs", ask)
    elif row.values != point(trial, run.study.objectives):
        yield Fault(where, f"its row has the objectives {row.values}, and it measured others", ask)


def _faults_of_record(run: Run, row: Row) -> Iterator[Fault]:
    """The record in the folder beside the row."""
    trial, folder = row.trial, run.trial(row.trial.number)
    where = f"trial {trial.number}"
    measured = any(result.known_from is None for result in trial.results)
    again = "It is written again from the study"

    def write() -> None:
        write_json(folder.record, to_json(trial))

    try:
        known = read_trial(folder)
    except RunError:
        words = f"'{printable(folder.record)}' cannot be read"
        if measured:
            yield Fault(where, words, again, write)
        else:
            yield Fault(where, words, "The trial begins again", folder.record.unlink)
        return
    if known is None:
        if measured:
            yield Fault(where, f"it was measured, but there is no '{printable(folder.record)}'", again, write)
        return
    if known.proposal != trial.proposal and trial.proposal is not None:
        yield _of_another(where, row, folder)
    elif known.results[: len(trial.results)] != trial.results and measured:
        yield Fault(where, "its folder holds other results than the study", again, write)
    elif len(known.results) > len(trial.results) and not row.is_open and measured:
        words = f"it ended after {len(trial.results)} rungs, but its folder holds {len(known.results)}"
        yield Fault(where, words, "Look whether two processes ran it")


def _of_another(where: str, row: Row, folder: TrialFolder) -> Fault:
    """The folder of a trial holds what another proposal came to, as after a study was begun again."""
    words = f"'{printable(folder.path)}' holds what another proposal came to"
    if not row.is_open:
        return Fault(where, words, "Put back a copy of the folder")

    def put_aside() -> None:
        aside = folder.path.with_name(f"{folder.path.name}.aside")
        shutil.rmtree(aside, ignore_errors=True)
        folder.path.rename(aside)

    return Fault(where, words, "It is put aside, and the trial begins again", put_aside)


def _faults_of_weights(run: Run, row: Row) -> Iterator[Fault]:
    """What a trial keeps for its model, beside the sums and the hashes that were written down of it."""
    folder = run.trial(row.trial.number)
    where = f"trial {row.trial.number}"
    try:
        known = read_trial(folder)
    except RunError:
        return  # told before
    # Training that hurt goes on from an earlier state at a lower rate: only all of it made again is the same again.
    looked_at = folder.kept[1:] if row.is_open else (folder.start, folder.recovered)
    damaged = [path for path in looked_at if _is_damaged(path, known, folder)]
    if known is not None and known.results and known.known_from is None:
        # of a record that was written again from the study only the tokens tell that something was trained
        needed = {*known.files, *([folder.recovered.name] if known.last.kept_tokens else [])}
        damaged += [path for path in looked_at if path.name in needed and not path.exists()]
    shown = ", ".join(f"'{printable(path)}'" for path in damaged)
    words = f"{shown} cannot be read, or is not what the trial was measured with"
    if damaged and row.is_open:
        yield Fault(where, words, "The trial begins again", lambda: _begin_again(run, row.trial))
    elif damaged:
        remedy = f"Put back a copy of it, or choose another trial: {command('front', run.path)}"
        yield Fault(where, words, remedy)


def _is_damaged(path: Path, known: Trial | None, folder: TrialFolder) -> bool:
    """Whether a file is there, and not whole."""
    if not path.exists():
        return False
    try:
        read_tensors(path)
    except DamagedFileError:
        return True
    told = known.files.get(path.name) if known is not None else None
    if told is None or (known is not None and path == folder.recovered and is_ahead(known, folder)):
        return False
    return file_hash(path) != told


def _begin_again(run: Run, trial: Trial) -> None:
    folder = run.trial(trial.number)
    for path in folder.kept:
        path.unlink(missing_ok=True)
    write_row(
        run, replace(trial, state="running", healing=None, results=(), reason="", machine=None, files={})
    )


def _faults_of_further(run: Run, number: int) -> Iterator[Fault]:
    """What training beyond the last rung came to."""
    folder = run.trial(number).further
    where = f"trial {number}, trained further"
    remedy = f"Put back a copy of it, or remove '{printable(folder.path)}': recover then begins anew from the trial"
    try:
        known = read_trial(folder)
    except RunError:
        yield Fault(where, f"'{printable(folder.record)}' cannot be read", remedy)
        return
    told = known.files if known is not None else {}
    for path in folder.kept[1:]:
        if _is_damaged(path, known, folder) or (path.name in told and not path.exists()):
            words = f"'{printable(path)}' cannot be read, or is not what the trial was measured with"
            yield Fault(where, words, remedy)


# ---- what belongs to no trial


def _faults_of_files(run: Run) -> Iterator[Fault]:
    """What the run was made of, its token sets, and what was measured beside trials."""
    try:
        made = run.identity()
    except RunError:
        words = f"'{printable(run.identity_file)}', which says what the run was made of, cannot be read"
        yield Fault("the run", words, "Put back a copy of it, or start a new run")
        return
    if made is not None and run.tokens.exists():
        words = f"'{printable(run.tokens)}', the token sets,"
        try:
            is_ours = read_splits(run).hashes() == made.tokens
        except FoldsearchError:
            again = "It is removed, and made again from the texts by what needs it next; other tokens are refused then"
            yield Fault("the texts", f"{words} cannot be read", again, run.tokens.unlink)
        else:
            if not is_ours:
                yield Fault("the texts", f"{words} are not those that the run was made with", "Put them back")
    for what, path, read, remedy in (
        ("the screening", run.screened, read_screened, "It is put aside, and reports leave it out"),
        (
            "the dense model in fewer bits",
            run.rivals,
            read_rivals,
            "It is put aside, and `resume` measures it again",
        ),
    ):
        try:
            read(path)
        except RunError:
            yield Fault(what, f"'{printable(path)}' cannot be read", remedy, partial(_set_aside, path))


def _set_aside(path: Path) -> None:
    path.replace(path.with_name(f"{path.name}.damaged"))


# ---- who measures a plan


def _faults_of_plans(run: Run, trials: list[Trial]) -> Iterator[Fault]:
    """The files that say which trial measures a plan."""
    owners: dict[Path, int] = {}
    for trial in trials:
        if trial.draft is not None and any(result.known_from is None for result in trial.results):
            owners[plan_path(run, trial)] = trial.number
    for path, number in owners.items():
        try:
            told = json.loads(path.read_text())["trial"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            told = None
        if (
            not isinstance(told, int)
            or not 0 <= told < len(trials)
            or _is_of_another(run, trials[told], path)
        ):
            value = {"trial": number, "plan": str(trials[number].plan)}
            words = f"'{printable(path)}', which says that trial {number} measured a plan, is gone or wrong"

            def write(path: Path = path, value: dict[str, object] = value) -> None:
                write_json(path, value)

            yield Fault("the plans", words, "It is written again from the study", write)
    for path in sorted(set(run.path.glob("plans/*.json")).difference(owners)):
        try:
            told = json.loads(path.read_text())["trial"]
            of_another = 0 <= told < len(trials) and _is_of_another(run, trials[told], path)
            is_told = told >= 0 and not of_another
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            is_told = False
        if not is_told:
            words = f"'{printable(path)}' names no trial of its plan, and none has measured that"
            yield Fault("the plans", words, "It is removed", path.unlink)


def _is_of_another(run: Run, trial: Trial, path: Path) -> bool:
    """Whether the trial that a plan's file names has another plan, as after a study was begun again."""
    return trial.draft is not None and plan_path(run, trial) != path


def _trained_twice(run: Run, trials: list[Trial]) -> Iterator[Fault]:
    """No plan is trained twice, unless its training diverged or was stopped."""
    first: dict[Path, Trial] = {}
    for trial in trials:
        if trial.is_measured and trial.draft is not None:
            other = first.setdefault(plan_path(run, trial), trial)
            if other is not trial and not other.last.training_diverged:
                words = f"it measured the plan that trial {other.number} had measured"
                yield Fault(f"trial {trial.number}", words, "Nothing is lost: the better of both counts")


def _leftovers(run: Run, rows: list[Row]) -> Iterator[Fault]:
    """What processes that were killed left, which nobody needs."""
    left = sorted(path for path in run.path.rglob(".*.tmp") if path.is_file())
    for row in rows:
        folder = run.trial(row.trial.number)
        if row.trial.state == "finished" and not row.is_open:
            left += [folder.optimizer] if folder.optimizer.exists() else []
        if row.trial.state == "stopped" and not row.is_open:
            left += [folder.start] if folder.start.exists() else []
    if left:
        size = sum(path.stat().st_size for path in left) / 1e6

        def remove() -> None:
            for path in left:
                path.unlink(missing_ok=True)

        words = f"killed processes left {len(left)} files that nobody needs ({size:.1f} MB)"
        yield Fault("the folder", words, "They are removed", remove)
