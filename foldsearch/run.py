"""A run on disk: where everything that it learns lies, and of what it is a run.

study.json          the resolved study, versions, schema number       table.json   the dense model's costs
identity.json       what the run was made of (`foldsearch.identity`)  tokens.safetensors  its three token sets
storage.db          the Optuna study: the book of record              storage.copy.db  as it was when a trial ended last
storage.json        where the study is, if not in storage.db          lock         held while somebody writes
plans/              which trial measures a plan                       trials/      what each trial learnt
report/             pictures and the final table                      evaluations/ what `evaluate` found
pick.json           the trial that was chosen                         screened.json plans measured before any trial
rivals.json         the dense model in fewer bits        shipping.json  where workers of other machines put theirs
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from foldsearch.codec import from_json, to_json
from foldsearch.errors import FoldsearchError, RunError, quote_error
from foldsearch.files import check_writable, disk_is_full, write_json
from foldsearch.identity import Identity
from foldsearch.paths import beside, check_path, command, printable
from foldsearch.plan.cost import Budget, Cost, CostTable, Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.spec.load import RUN_STUDY, study_from_json
from foldsearch.spec.study import Study
from foldsearch.version import __version__

SCHEMA = 12
LIMITS = ("trials", "seconds", "trial_seconds", "jobs", "cluster")  # what a resumed run may change


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """Where what one trial learnt lies."""

    path: Path

    @property
    def record(self) -> Path:
        """The trial as it stood after its latest rung (`foldsearch.record.Trial`)."""
        return self.path / "trial.json"

    @property
    def start(self) -> Path:
        """Fitted replacements and adapters, and healed matrices, where there are any."""
        return self.path / "start.safetensors"

    @property
    def recovered(self) -> Path:
        """What recovery trained, at the trial's best state; absent where that is untrained."""
        return self.path / "recovered.safetensors"

    @property
    def optimizer(self) -> Path:
        """The latest state of its recovery, to go on from; until the last rung, or in `further` for good."""
        return self.path / "optimizer.safetensors"

    @property
    def kept(self) -> tuple[Path, ...]:
        """All from which a trial goes on: without them it begins again."""
        return (self.record, self.start, self.recovered, self.optimizer)

    @property
    def further(self) -> TrialFolder:
        """What training beyond the run's last rung came to (`foldsearch.further`), laid out as this folder is."""
        return TrialFolder(self.path / "further")

    @property
    def before(self) -> TrialFolder | None:
        """Of such a folder, that of the trial which it goes on with; else None."""
        return TrialFolder(self.path.parent) if self.path.name == "further" else None

    @property
    def progress(self) -> Path:
        """Where the trial is, written about once a second while it runs."""
        return self.path / "progress.json"

    @property
    def overdue(self) -> Path:
        """Left by a worker that ended itself, as its trial said nothing for longer than it may take."""
        return self.path / "overdue.txt"

    @property
    def error(self) -> Path:
        """The traceback of its failure."""
        return self.path / "error.txt"

    @property
    def lock(self) -> Path:
        """Held by the process that runs the trial."""
        return self.path / "lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of a run lies, also before the run has begun."""

    path: Path

    @property
    def study_file(self) -> Path:
        """What `Run.open` reads first: where it is, a run has begun."""
        return self.path / RUN_STUDY

    @property
    def table_file(self) -> Path:
        """The dense model's costs."""
        return self.path / "table.json"

    @property
    def identity_file(self) -> Path:
        """What the run was made of."""
        return self.path / "identity.json"

    @property
    def tokens(self) -> Path:
        """The three token sets."""
        return self.path / "tokens.safetensors"

    @property
    def storage(self) -> Path:
        """The SQLite file of the Optuna study."""
        return self.path / "storage.db"

    @property
    def storage_copy(self) -> Path:
        """A copy of it, made whenever a trial ends."""
        return self.path / "storage.copy.db"

    @property
    def storage_file(self) -> Path:
        """Says in which database the study is; absent where it is in `storage`."""
        return self.path / "storage.json"

    @property
    def shipping_file(self) -> Path:
        """Where on a run storage what workers put is; absent where trials run in this folder, or have ended."""
        return self.path / "shipping.json"

    @property
    def screened(self) -> Path:
        """The plans that were measured before the first trial; absent where none were."""
        return self.path / "screened.json"

    @property
    def rivals(self) -> Path:
        """The dense model in fewer bits (`foldsearch.record.DenseRival`); absent where none was measured."""
        return self.path / "rivals.json"

    @property
    def pick(self) -> Path:
        """The trial that a person chose; absent until one did."""
        return self.path / "pick.json"

    @property
    def page(self) -> Path:
        """The report, which a browser shows."""
        return self.path / "report" / "index.html"

    @property
    def picture(self) -> Path:
        """The front, as the report shows it."""
        return self.path / "report" / "front.png"

    def plan(self, name: str) -> Path:
        """Which trial measures a plan; one file a plan."""
        return self.path / "plans" / f"{name}.json"

    def trial(self, number: int) -> TrialFolder:
        """The folder of a trial."""
        return TrialFolder(self.path / "trials" / f"{number:05}")

    def evaluation(self, number: int, name: str) -> Path:
        """What `evaluate` found of a trial, by what was asked."""
        return self.path / "evaluations" / f"{number:05}-{name}.json"

    def identity(self) -> Identity | None:
        """What the run was made of; None where it has not come so far.

        Raises:
            RunError: it cannot be read.
        """
        if not self.identity_file.exists():
            return None
        try:
            value = json.loads(self.identity_file.read_text(encoding="utf-8"))
            if value["schema"] != SCHEMA:
                raise ValueError("it is of another version of foldsearch")
            return from_json(Identity, value)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            remedy = "Put back a copy of it, or start a new run."
            what = f"'{printable(self.identity_file)}' cannot be read"
            raise RunError(quote_error(what, error, remedy)) from error

    def read_table(self) -> CostTable:
        """The dense model's costs, as the run began with them.

        Raises:
            OSError, ValueError, KeyError, TypeError: they cannot be read.
        """
        return from_json(CostTable, json.loads(self.table_file.read_text()))

    def write_identity(self, identity: Identity) -> None:
        """Keep what the run is made of."""
        write_json(self.identity_file, {"schema": SCHEMA, **to_json(identity)})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run: one writer at a time; the kernel lets go when its holder dies.

        Raises:
            RunError: somebody else writes to this run.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(
                    f"one process at a time runs a study, but another one is at work in '{printable(self.path)}'. "
                    "Wait for it, or stop it (Ctrl-C) first."
                ) from error
            yield


@dataclass(frozen=True, slots=True)
class Run(RunFolder):
    """A run: its folder, and of what it is a run.

    study: what was asked for, resolved. table: the dense model's costs. note: what must be said beside a figure of the
    model; empty where there is nothing.
    """

    study: Study = field(repr=False)
    table: CostTable = field(repr=False)
    note: str = ""

    # ---- prices

    @property
    def num_blocks(self) -> int:
        """Blocks of the dense model."""
        return len(self.table.blocks)

    @property
    def target(self) -> Target:
        """The device side of the price, with the fewest bytes of weights where the space has several types."""
        return self.study.narrowest()

    @property
    def dense(self) -> Cost:
        """What the dense model costs on the target, its weights in the target's dtype."""
        return price(FoldPlan.identity(self.num_blocks), self.table, self.study.target.stored_in(""))

    @property
    def timed_dense(self) -> Cost:
        """What the dense model costs with weights as the target has them: its times are of these."""
        return price(FoldPlan.identity(self.num_blocks), self.table, self.target)

    @property
    def budget(self) -> Budget:
        """Bounds in bytes, FLOPs and milliseconds."""
        return self.study.budget.value(self.dense)

    # ---- its life

    @staticmethod
    def check_new(path: Path) -> None:
        """Whether a run can begin at `path`, as far as can be known before anything is written.

        Raises:
            RunError: something is there already.
            InputError: `path` is no text, or too long, or the folder above cannot be written to.
        """
        check_path(path, "a run folder's path")
        if path.name in ("", ".."):
            raise RunError(f"a run starts in a folder of its own, got '{path}'. Give it a name.")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(
                f"a run starts in a folder of its own, but '{printable(path)}' is there already. "
                f"Choose another name, or go on with it: {command('resume', path)}"
            )
        check_writable(path.parent, f"the run folder '{printable(path)}'")

    @classmethod
    @contextmanager
    def draft(cls, path: Path) -> Iterator[Path]:
        """A folder to fill before `begin` takes the run to its place; what is in it goes if that does not happen.

        Raises:
            RunError: something is at `path` already, or it cannot be written, or the disk is full.
        """
        cls.check_new(path)
        temporary = beside(path, "tmp")
        try:
            with _written(path):
                temporary.mkdir(parents=True)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def begin(self, path: Path) -> Run:
        """Take a run that lies in a draft to its place: it appears at `path` whole or not at all.

        Raises:
            RunError: the disk is full, or `path` cannot be written.
        """
        with _written(path):
            write_json(self.table_file, to_json(self.table))
            self._write_study()
            self.path.rename(path)
        return replace(self, path=path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Read what `begin` wrote.

        Raises:
            RunError: not a run folder, an incomplete one, or one of another version of foldsearch.
        """
        file = RunFolder(path).study_file
        if not file.is_file():
            raise RunError(
                f"a run folder holds study.json, but there is no '{printable(file)}'. "
                "Name the folder that `foldsearch run` printed."
            )
        try:
            value: dict[str, Any] = json.loads(file.read_text())
            schema, made_by = value["schema"], value["foldsearch"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(
                quote_error(f"'{printable(file)}' cannot be read", error, "Start a new run.")
            ) from error
        if (schema, made_by) != (SCHEMA, __version__):
            raise RunError(
                f"'{printable(path)}' is a run of foldsearch {made_by} (schema {schema}), "
                f"but this is {__version__} (schema {SCHEMA}). "
                f"Install foldsearch {made_by}, or start a new run."
            )
        try:
            study = study_from_json(value["study"])
            table, note = RunFolder(path).read_table(), str(value["note"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, FoldsearchError) as error:
            raise RunError(
                quote_error(f"the run folder '{printable(path)}' is incomplete", error, "Start a new run.")
            ) from error
        return cls(path, study, table, note)

    def with_limits(self, study: Study) -> Run:
        """The same run with the limits of `study`; `keep_limits` writes them down.

        Raises:
            RunError: `study` differs in anything else.
        """
        mine, other = self.study.model_dump(mode="json"), study.model_dump(mode="json")
        if different := [name for name in mine if mine[name] != other[name] and name not in LIMITS]:
            shown = "; ".join(f"{name} was {mine[name]!r}, is {other[name]!r}" for name in different)
            raise RunError(
                f"'{printable(self.path)}' is a run of another study: {shown}. A resumed run may change "
                f"{', '.join(LIMITS)} only. Start a new run in another folder."
            )
        return replace(self, study=study)

    def keep_limits(self) -> None:
        """Write the study down as it is now, so that the next `resume` finds these limits."""
        if Run.open(self.path).study != self.study:
            self._write_study()

    def _write_study(self) -> None:
        value = {"schema": SCHEMA, "foldsearch": __version__, "versions": _versions(), "note": self.note}
        write_json(self.study_file, {**value, "study": self.study.model_dump(mode="json")})


def _versions() -> dict[str, str]:
    """Of what decides the figures of a run."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "optuna", "ray", "fvcore"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = " Free some space." if disk_is_full(error) else ""
        raise RunError(
            f"the run folder '{printable(path)}' cannot be written: {error.strerror}.{remedy}"
        ) from error
