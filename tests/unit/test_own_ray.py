"""What a machine may lack is told before anything is asked of it, and Ray of our own leaves nothing of itself.

Oracle: the limits and folders that the tests themselves set.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from foldsearch import api, cli
from foldsearch.errors import InputError, RunError
from foldsearch.files import check_writable
from foldsearch.model.source import check_cache, default_cache_dir
from foldsearch.paths import local
from foldsearch.run import RunFolder
from foldsearch.search import own_ray
from foldsearch.search.run import run_search
from tests.fake_driver import study

ROOT = Path(__file__).resolve().parents[2]

LIMITED = """
import resource, sys
from foldsearch.errors import RunError
from foldsearch.search.own_ray import check_machine

name, soft, hard = getattr(resource, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(name, (soft, hard))
try:
    check_machine()
except RunError as error:
    print(error)
print(resource.getrlimit(name)[0])
"""


@pytest.mark.parametrize(
    ("name", "soft", "hard", "said"),
    [
        ("RLIMIT_NOFILE", 100, 100, "a run needs 256 files that are open at a time, but the limit is 100. "),
        ("RLIMIT_NOFILE", 100, 1000, "1000\n"),
        (
            "RLIMIT_AS",
            5 * 10**9,
            5 * 10**9,
            "but the limit is 5,000,000,000. Raise it: ulimit -v unlimited\n",
        ),
    ],
)
def test_limits_of_a_process_are_raised_or_told(name: str, soft: int, hard: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, name, str(soft), str(hard)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said in done.stdout


def test_a_containers_limit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pids.max"
    monkeypatch.setattr(own_ray, "_CONTAINER_TASKS", file)
    file.write_text("max\n")
    own_ray.check_machine()
    file.write_text("100\n")
    with pytest.raises(RunError, match=r"this container may have 100\. .*--pids-limit=4096"):
        own_ray.check_machine()


@pytest.mark.parametrize("tmpdir", ["/" + "x" * 30, "/tmp/a b", "/tmp/a?b", "relative", "/proc", "/dev/null"])
def test_sockets_go_where_a_path_is_short_and_plain(tmpdir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", tmpdir)
    place = own_ray.choose_place()
    assert str(place) != tmpdir
    # a path of 108 bytes with its end is what the kernel takes; Ray checks it too
    from ray._private.utils import validate_socket_filepath

    validate_socket_filepath(f"{place}/{own_ray._PREFIX}12345678{own_ray._SOCKET}")


def test_where_no_folder_is_fit_each_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [Path("/proc"), Path("/" + "x" * 40), Path("/a b"), Path("/dev/null")]
    monkeypatch.setattr(own_ray, "_places", lambda: places)
    with pytest.raises(RunError) as error:
        own_ray.check_machine()
    for said in (
        "'/proc' cannot be written to (",
        "xx' has 41 bytes",
        "'/a b' has other letters",
        "Set TMPDIR",
    ):
        assert said in str(error.value)


def test_the_object_store_is_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_ray._choose_store() in (own_ray._SHM, None)
    monkeypatch.setattr(own_ray, "_SHM", tmp_path / "missing")
    assert own_ray._choose_store() is None
    monkeypatch.setattr(own_ray, "_SHM", tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=64 * 10**6)  # Docker's
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        RunError, match=r"needs 200 MB for its object store, but .* has 64 MB free.*--shm-size"
    ):
        own_ray.check_machine()


def test_a_cluster_of_somebodys_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    with own_ray.quiet():
        assert "RAY_ADDRESS" not in os.environ
        assert "RAY_AUTH_TOKEN" not in os.environ  # Ray keeps its own in the home folder
        os.environ["RAY_AUTH_MODE"] = "token"  # as ray.init does
    assert dict(os.environ) == before


@pytest.mark.parametrize("home", ["/proc", "/dev/null"])
def test_without_a_home_ray_gets_its_token_from_us(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with own_ray.quiet():
        token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    with own_ray.quiet():
        assert os.environ["RAY_AUTH_TOKEN"] == token  # Ray reads it once a process


def test_what_killed_processes_left_goes_and_no_other(tmp_path: Path) -> None:
    old = time.time() - 2 * own_ray._YOUNG_SECONDS
    for name in ("old", "young", "held", "another's", "run"):
        folder = tmp_path / f"{own_ray._PREFIX}{name}"
        folder.mkdir()
        if name == "run":  # that somebody called fold-run
            with RunFolder(folder).held():
                pass
        elif name != "another's":
            (folder / own_ray._LOCK).touch()
        if name != "young":
            os.utime(folder, (old, old))
    with (tmp_path / f"{own_ray._PREFIX}held" / own_ray._LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with own_ray.temporary_folder(tmp_path) as ours:
            assert ours.is_dir()
    left = {path.name.removeprefix(own_ray._PREFIX) for path in tmp_path.iterdir()}
    assert left == {"young", "held", "another's", "run"}


def test_the_machine_is_looked_at_before_anything_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prepare` would open the model and ask it; here it is a name that nothing has."""
    monkeypatch.setattr(own_ray, "_places", lambda: [Path("/proc")])
    with pytest.raises(RunError, match="Ray needs a folder for its sockets"):
        run_search(study(), tmp_path / "run", prepare="no.such.module:function")
    assert list(tmp_path.iterdir()) == []


# ---- folders


def test_a_place_that_can_be_written_to_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "it")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"it must be in a folder .*file' is a file\. Choose"):
        check_writable(tmp_path / "file" / "x", "it")
    with pytest.raises(InputError, match=r"it must be in a folder .*'/proc' cannot be written to \("):
        check_writable(Path("/proc/x"), "it")  # also to root, whom permission bits do not stop


def test_a_cache_that_cannot_be_kept_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"the cache of models '/proc/c' must .* Set FOLDSEARCH_CACHE to"):
        check_cache(Path("/proc/c"))
    for name in ("FOLDSEARCH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", nobody)  # a container that runs as a number
    with pytest.raises(InputError, match=r"no home folder\. Set FOLDSEARCH_CACHE"):
        default_cache_dir()


def test_a_tilde_is_a_home_unless_something_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/some/home")
    assert local("~/m") == Path("/some/home/m")
    assert local("~nobody-of-this-name/m") == Path("~nobody-of-this-name/m")
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "m").touch()
    assert local("~/m") == Path("~/m")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Could not determine home directory."), "Set HOME to a folder."),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "Set TMPDIR to one."),
        (BlockingIOError(11, "Resource temporarily unavailable"), "ulimit -u 4096"),
        (RuntimeError("can't start new thread"), "ulimit -u 4096"),
        (MemoryError(), "the machine's memory is full."),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the machine's memory is full."),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "the machine's memory is full.",
        ),
        (PermissionError(13, "Permission denied", "/a\nb"), r"'/a\nb' cannot be used: Permission denied."),
        (OSError(30, "Read-only file system", "/x/huggingface/y"), "Set HF_HOME to a folder"),
    ],
)
def test_what_the_machine_refuses_later_is_a_sentence_too(
    error: Exception,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "try_plan", refuse)
    assert cli.main(["try", "0-3"]) == 2
    assert said in capsys.readouterr().err


def test_a_ray_that_cannot_start_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("its raylet did not answer")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(
            RunError, match=r"did not answer\. Look .* and go on with: foldsearch resume runs/mine$"
        ),
        own_ray.own_ray(1, 0, "foldsearch resume runs/mine"),
    ):
        pytest.fail("it has begun")
