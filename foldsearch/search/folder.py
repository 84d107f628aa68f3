"""The run folder: where everything that a run learns lies.

study.json    the resolved study, versions, schema number                  table.json   the dense model's costs
identity.json what the run was made of, see foldsearch.identity            tokens.safetensors  its three token sets
storage.db    the Optuna study: the book of record                         plans/       results of measured plans
trials/00012/ what one trial learnt                                        lock         held while somebody writes
report/       pictures and the final table                                 evaluations/ what `evaluate` found
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foldsearch.codec import from_json, to_json
from foldsearch.errors import FoldsearchError, RunError, quote_error
from foldsearch.files import check_writable, disk_is_full, write_json
from foldsearch.paths import beside, check_path, command, printable
from foldsearch.plan.cost import Budget, Cost, CostTable, Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.spec.load import study_from_json
from foldsearch.spec.study import Study
from foldsearch.version import __version__

SCHEMA = 5
LIMITS = ("trials", "seconds", "jobs")  # what a resumed run may change


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run on disk, opened.

    study: what was asked for, resolved. table: the dense model's costs. provenance: versions and hashes of the data
    and the model, by name.
    """

    path: Path
    study: Study
    table: CostTable
    provenance: Mapping[str, str]

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
        """A folder to fill before `create` takes it over; what is in it goes if that does not happen.

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

    @classmethod
    def create(
        cls, path: Path, draft: Path, study: Study, table: CostTable, provenance: Mapping[str, str]
    ) -> RunFolder:
        """Make a run of what `draft` yielded: it appears at `path` whole or not at all.

        Raises:
            RunError: the disk is full, or `path` cannot be written.
        """
        folder = cls(path, study, table, dict(provenance))
        with _written(path):
            for name in ("plans", "trials", "report"):
                (draft / name).mkdir(exist_ok=True)
            write_json(draft / "table.json", to_json(table))
            folder._write_study(draft / "study.json")
            draft.rename(path)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Read what `create` wrote.

        Raises:
            RunError: not a run folder, an incomplete one, or one of another version of foldsearch.
        """
        if not (path / "study.json").is_file():
            raise RunError(
                f"a run folder holds study.json, but there is no '{printable(path / 'study.json')}'. "
                "Name the folder that `foldsearch run` printed."
            )
        try:
            value: dict[str, Any] = json.loads((path / "study.json").read_text())
            schema, version = value["schema"], value["foldsearch"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                quote_error(f"'{printable(path / 'study.json')}' cannot be read", error, "Start a new run.")
            ) from error
        if (schema, version) != (SCHEMA, __version__):
            raise RunError(
                f"'{printable(path)}' is a run of foldsearch {version} (schema {schema}), "
                f"but this is {__version__} (schema {SCHEMA}). "
                f"Install foldsearch {version}, or start a new run."
            )
        try:
            study = study_from_json(value["study"])
            table = from_json(CostTable, json.loads((path / "table.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError, FoldsearchError) as error:
            raise RunError(
                quote_error(f"the run folder '{printable(path)}' is incomplete", error, "Start a new run.")
            ) from error
        return cls(path, study, table, value["provenance"])

    def with_limits(self, study: Study) -> RunFolder:
        """The same run with the trials, seconds and jobs of `study`; `keep_limits` writes them down.

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
        if RunFolder.open(self.path).study != self.study:
            self._write_study(self.path / "study.json")

    def _write_study(self, path: Path) -> None:
        value = {"schema": SCHEMA, "foldsearch": __version__, "provenance": dict(self.provenance)}
        write_json(path, {**value, "study": self.study.model_dump(mode="json")})

    # ---- places

    @property
    def storage(self) -> Path:
        """The SQLite file of the Optuna study."""
        return self.path / "storage.db"

    @property
    def plans(self) -> Path:
        """Results of measured plans, one file a plan."""
        return self.path / "plans"

    @property
    def report(self) -> Path:
        """Pictures and the final table."""
        return self.path / "report"

    def trial(self, number: int) -> Path:
        """What one trial learnt."""
        return self.path / "trials" / f"{number:05}"

    # ---- prices

    @property
    def num_blocks(self) -> int:
        """Blocks of the dense model."""
        return len(self.table.blocks)

    @property
    def target(self) -> Target:
        """The device side of the price."""
        return self.study.target.value()

    @property
    def dense(self) -> Cost:
        """What the dense model costs on the target."""
        return price(FoldPlan.identity(self.num_blocks), self.table, self.target)

    @property
    def budget(self) -> Budget:
        """Bounds in bytes and FLOPs."""
        return self.study.budget.value(self.dense)

    # ---- one writer

    @contextmanager
    def lock(self) -> Iterator[None]:
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


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = " Free some space." if disk_is_full(error) else ""
        raise RunError(
            f"the run folder '{printable(path)}' cannot be written: {error.strerror}.{remedy}"
        ) from error
