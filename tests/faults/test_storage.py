"""Runs whose study lies in a real PostgreSQL, and what is kept of its URL.

Oracle: the same search with its study in the run folder; and the password, looked for in every file.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from foldsearch import cli
from foldsearch.errors import InputError, RunError
from foldsearch.run import Run, RunFolder
from foldsearch.search import storage
from foldsearch.search.check import check_run
from foldsearch.search.records import Records, read_trials
from foldsearch.search.storage import network_words, place_of, storage_errors, use_storage, without_secrets
from tests.fake_trial import TABLE
from tests.faults.test_every_write import SEARCHES, Clock, Killed, begin, killed_by, run_process
from tests.postgres import PASSWORD, QUOTED, Server, postgres_server

SEARCH = "faulty"
# A search that is killed here leaves its connections to this process, which would end with it elsewhere.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres_server() as found:
        yield found
        gc.collect()  # those connections end here, where they are ignored, and not in a test of another file


def begin_there(path: Path, url: str) -> Run:
    begin(path.parent / "beside" / "run", SEARCH)  # what goes wrong is said beside the run
    (path.parent / "beside" / "faults.json").rename(path.parent / "faults.json")
    with Run.draft(path) as draft:
        use_storage(RunFolder(draft), url)
        return Run(draft, SEARCHES[SEARCH][0], TABLE).begin(path)


def holds_no_secret(place: Path, *words: str) -> None:
    for path in place.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert PASSWORD.encode() not in content, path
        assert QUOTED.encode() not in content, path
    for word in words:
        assert PASSWORD not in word
        assert QUOTED not in word


def test_two_runs_on_one_database_are_those_that_each_would_be_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = begin(tmp_path / "alone" / "run", SEARCH)
    run_process(alone)
    runs = [begin_there(tmp_path / name / "run", server.url) for name in ("one", "two")]
    # by turns: each is killed, goes on, and is killed again
    due = [Clock(iter([120, 90, 60, 10**9])) for _ in runs]
    over: set[int] = set()
    while len(over) < 2:
        for number, run in enumerate(runs):
            if number in over:
                continue
            try:
                with killed_by(due[number]):
                    run_process(run)
                over.add(number)
            except Killed:
                pass
    assert min(clock.kills for clock in due) > 0
    expected = [trial.proposal for trial in read_trials(alone)]
    for run in runs:
        trials = read_trials(run)
        assert [trial.proposal for trial in trials] == expected
        assert [trial.results for trial in trials] == [trial.results for trial in read_trials(alone)]
        assert not run.storage.exists()
        assert check_run(run, repair=False).left == ()
    assert len({place_of(run).study for run in runs}) == 2  # type: ignore[union-attr]

    # another process knows the password from its environment
    storage._given.clear()
    monkeypatch.setenv(storage.VARIABLE, server.url)
    assert cli.main(["front", str(runs[0].path)]) == 0
    assert cli.main(["check", str(runs[0].path)]) == 0
    monkeypatch.delenv(storage.VARIABLE)
    assert cli.main(["front", str(runs[0].path)]) == 2
    out, err = capfd.readouterr()
    assert f"the storage '{server.shown}' cannot be used" in err
    assert storage.VARIABLE in err
    holds_no_secret(tmp_path, out, err)


def test_a_database_that_goes_away_ends_the_run_in_a_sentence_and_loses_nothing(
    server: Server, tmp_path: Path
) -> None:
    run = begin_there(tmp_path / "run", server.url)
    alone = begin(tmp_path / "alone" / "run", SEARCH)
    run_process(alone)
    records = Records(run)
    server.stop()
    try:
        with pytest.raises(RunError) as told, storage_errors(place_of(run)):
            records.study.ask()
    finally:
        server.start()
    words = "".join(traceback.format_exception(told.value))
    assert f"the storage '{server.shown}' cannot be used" in words
    holds_no_secret(tmp_path, words)
    run_process(run)
    assert [trial.proposal for trial in read_trials(run)] == [trial.proposal for trial in read_trials(alone)]


def test_a_wrong_password_is_told_and_not_repeated(server: Server, tmp_path: Path) -> None:
    for url, word in (
        (server.url.replace(QUOTED, "wrong-password"), "password authentication failed"),
        (server.url.replace("/postgres", "/none"), "does not exist"),
        (server.url.replace("postgresql:", "oracle:"), "needs a driver"),
    ):
        with pytest.raises(InputError, match=word) as told:
            use_storage(RunFolder(tmp_path), url)
        holds_no_secret(tmp_path, "".join(traceback.format_exception(told.value)))
        assert "wrong-password" not in str(told.value)
    assert not any(tmp_path.iterdir())


# ---- without a server


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://me:secret@h:5/db", "postgresql://me@h:5/db"),
        ("postgresql://h/db?password=secret&sslmode=require", "postgresql://h/db?sslmode=require"),
        ("mysql+pymysql://me:s%40crt@h/db?ssl_passwd=x", "mysql+pymysql://me@h/db"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
    ],
)
def test_a_url_is_kept_without_its_secrets(url: str, kept: str) -> None:
    assert without_secrets(url) == kept
    assert without_secrets(kept) == kept


@pytest.mark.parametrize("url", ["me:secret@host", "postgres ql://me:secret@h/db", "", "secret"])
def test_what_is_no_url_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="a storage is a URL such as") as told:
        use_storage(RunFolder(tmp_path), url)
    assert "secret" not in "".join(traceback.format_exception_only(told.value))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgres://me:secret@h/db", r"got 'postgres'\. Did you mean 'postgresql'\?"),
        ("http://me:secret@h/db", r"got 'http'\. Write postgresql://user@host/database\."),
        ("sqlite:////nowhere/at/all.db", r"whether the folder of that file is there"),
    ],
)
def test_a_url_of_another_kind_is_told_with_what_helps(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as told:
        use_storage(RunFolder(tmp_path), url)
    assert "secret" not in "".join(traceback.format_exception(told.value))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://me:secret@h:5/"])
def test_a_storage_names_a_database(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="names none") as told:
        use_storage(RunFolder(tmp_path), url)
    assert "secret" not in str(told.value)


def test_a_run_stays_where_its_study_is(run_path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is in its storage\.db\. Leave --storage out"):
        use_storage(RunFolder(run_path), f"sqlite:///{tmp_path / 'other.db'}")


def test_a_file_elsewhere_holds_a_study_too(tmp_path: Path) -> None:
    """As where the run folder is on a network file system, and the study on a local disk."""
    run = begin_there(tmp_path / "run", f"sqlite:///{tmp_path / 'local.db'}")
    alone = begin(tmp_path / "alone" / "run", SEARCH)
    for one in (run, alone):
        with killed_by(Clock(iter([200, 10**9]))), pytest.raises(Killed):
            run_process(one)
        run_process(one)
    assert [trial.proposal for trial in read_trials(run)] == [trial.proposal for trial in read_trials(alone)]


def test_a_file_elsewhere_is_the_same_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = begin_there(tmp_path / "run", "sqlite:///mine.db")
    run_process(run)
    found = read_trials(run)
    monkeypatch.chdir(tmp_path / "there")
    assert found
    assert read_trials(run) == found
    assert not (tmp_path / "there" / "mine.db").exists()
    # where the file has gone, nothing begins again over the trials that are there
    (tmp_path / "here" / "mine.db").unlink()
    for look in (read_trials, Records):
        with pytest.raises(
            RunError, match=r"has trials, but the database 'sqlite:.*mine\.db' does not hold their"
        ):
            look(run)


@pytest.mark.parametrize(("kind", "told"), [("nfs4", True), ("ext4", False), ("cifs", True)])
def test_a_network_file_system_is_told(kind: str, told: bool) -> None:
    def partitions(**_: object) -> list[SimpleNamespace]:
        mounts = {"/": "ext4", "/home": "nfs4", "/home/me/disk": kind}
        return [SimpleNamespace(mountpoint=where, fstype=of) for where, of in mounts.items()]

    words = network_words(Path("/home/me/disk/runs/r"), partitions)
    assert (kind in words) is told
    assert ("--storage" in words) is told
