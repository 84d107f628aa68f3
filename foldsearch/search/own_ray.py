"""Ray of our own on this machine: whether it can begin here, its start, and an end that leaves nothing of it.

What a search needs of Ray in any case (its quiet, its watch, its signals) is here too; `cluster` joins another's.

Ray keeps its sockets, its logs and Tune's state in a folder of ours that goes with it. Nothing in there is needed
again, so no path of a person's ever reaches Ray, which would read some of them as URLs.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.services
import ray._private.state
import ray._private.utils
import ray._private.worker

from foldsearch.errors import RunError, quote_error
from foldsearch.paths import check_path, printable
from foldsearch.signals import handlers_kept, uninterrupted

MOST_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of the path of a Unix socket
STORE_BYTES = 100 * 10**6  # of Ray's object store; nothing large goes through it
_PREFIX = "fold-"
# Held by who made such a folder. No file of a run has this name: whoever keeps runs in /tmp may call one fold-this.
_LOCK = "fold-ray.lock"
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # the longest that Ray adds
_MOST_PLACE_BYTES = MOST_SOCKET_BYTES - len(_SOCKET) - len(f"/{_PREFIX}12345678")
_SHM = Path("/dev/shm")
_YOUNG_SECONDS = 60.0
_KILL_SECONDS = 5.0  # that Ray's processes have to go by themselves
_AUTH_MODE = "RAY_AUTH_MODE"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they were
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # its state is never restored
}


# ---- before anything is asked of it


def check_machine() -> None:
    """Whether Ray can begin on this machine; takes milliseconds and leaves nothing.

    Raises:
        RunError: it cannot, with what is missing and how to give it.
        InputError: the current folder's path is no text.
    """
    check_process()
    choose_place()
    _choose_store()


def check_process() -> None:
    """Whether this process may do what any search does; takes milliseconds.

    Raises:
        RunError: it may not, with the limit and how to raise it.
        InputError: the current folder's path is no text.
    """
    check_path(_current_folder(), "the current folder's path")
    _check_limits()


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise RunError(
            "a run needs a current folder, but it was removed. Change into one that is there."
        ) from error


@dataclass(frozen=True, slots=True)
class _Limit:
    """A limit of the system on a process. fewest: with less a run fails on its way. wanted: what is asked for, where
    the process may. command: that raises it.
    """

    of: str
    what: str
    fewest: int
    wanted: int
    command: str


# Measured on two processors: a run has up to 60 open files in a process and 250 threads, and Ray reserves 3 GB.
_LIMITS = (
    _Limit("RLIMIT_NOFILE", "files that are open at a time", 256, 4096, "ulimit -n 4096"),
    _Limit("RLIMIT_NPROC", "processes and threads", 512, 4096, "ulimit -u 4096"),
    _Limit("RLIMIT_AS", "bytes of address space", 6 * 10**9, 64 * 10**9, "ulimit -v unlimited"),
)
_CONTAINER_TASKS = Path("/sys/fs/cgroup/pids.max")


def _check_limits() -> None:
    """Let the process have as much as it may, where it begins with little; and look whether that is enough."""
    for limit in _LIMITS:
        if limit.of == "RLIMIT_NPROC" and os.geteuid() == 0:
            continue  # of no meaning to root
        if (most := _raised(limit)) is not None and most < limit.fewest:
            raise RunError(
                f"a run needs {limit.fewest:,} {limit.what}, but the limit is {most:,}. Raise it: {limit.command}"
            )
    tasks, most = _LIMITS[1], None
    with suppress(OSError, ValueError):  # no such file, or "max"
        most = int(_CONTAINER_TASKS.read_text())
    if most is not None and most < tasks.fewest:
        raise RunError(
            f"a run needs {tasks.fewest:,} {tasks.what}, but this container may have {most:,}. "
            f"Raise it (of a Docker container: --pids-limit={tasks.wanted})."
        )


def _raised(limit: _Limit) -> int | None:
    """The limit, raised as far as the process may; None for no limit."""
    import resource

    number: int | None = getattr(resource, limit.of, None)  # not every system has each
    if number is None:
        return None
    soft, hard = resource.getrlimit(number)
    most = limit.wanted if hard == resource.RLIM_INFINITY else min(limit.wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(number, (most, hard))
            soft = most
    return None if soft == resource.RLIM_INFINITY else soft


def choose_place() -> Path:
    """A folder for temporary ones in which a socket's path is short enough, and that can be written to."""
    refused = []
    for place in _places():
        if reason := _unfit(place):
            refused.append(f"'{printable(place)}' {reason}")
        else:
            return place
    raise RunError(
        f"Ray needs a folder for its sockets that can be written to, with a path of at most {_MOST_PLACE_BYTES} bytes "
        f"of plain letters; but {', '.join(refused)}. Set TMPDIR to such a folder."
    )


def _places() -> list[Path]:
    named = [os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    return list(dict.fromkeys(map(Path, [*named, "/tmp", "/var/tmp", str(_SHM)])))


def _unfit(place: Path) -> str:
    """Why sockets cannot be in a folder; "" if they can."""
    if len(os.fsencode(place)) > _MOST_PLACE_BYTES:
        return f"has {len(os.fsencode(place))} bytes"
    if not re.fullmatch(r"/[A-Za-z0-9_@+=:,./-]*", str(place)):
        return "has other letters"
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        return f"cannot be written to ({error.strerror})"
    return ""


def _choose_store() -> Path | None:
    """Where Ray's object store can be: in shared memory where it has room, else (None) in Ray's own folder."""
    if _free_bytes(_SHM) >= 2 * STORE_BYTES:
        return _SHM
    place = choose_place()
    if (free := _free_bytes(place)) < 2 * STORE_BYTES:
        raise RunError(
            f"Ray needs {2 * STORE_BYTES / 1e6:.0f} MB for its object store, but {_SHM} has "
            f"{_free_bytes(_SHM) / 1e6:.0f} MB free and '{place}' {free / 1e6:.0f} MB. Make room in one of them (of a "
            "Docker container: --shm-size=1g), or set TMPDIR to a folder with room."
        )
    return None


def _free_bytes(place: Path) -> int:
    """Free bytes of a folder that can be written to; 0 of another one."""
    try:
        return shutil.disk_usage(place).free if os.access(place, os.W_OK) else 0
    except OSError:
        return 0


# ---- Ray


@contextmanager
def own_ray(cpus: int, gpus: int, again: str = "") -> Iterator[Path]:
    """Ray of our own on this machine, quiet; whoever started Ray before us keeps theirs.

    Args:
        cpus, gpus: that it hands out.
        again: what goes on with the work, for the message of a Ray that is lost.

    Yields:
        A folder for Tune's state. It goes, and so does every process of Ray, whatever ends the block.

    Raises:
        RunError: Ray cannot begin here.
    """
    with quiet(), temporary_folder(choose_place()) as folder:
        if ray.is_initialized():
            yield folder
            return
        others = set(psutil.Process().children())
        try:
            _start(cpus, gpus, folder, again)
            with watched([child for child in psutil.Process().children() if child not in others], again):
                yield folder
        finally:
            with uninterrupted():
                _stop([child for child in psutil.Process().children() if child not in others])


# ---- a Ray that is lost

_NEEDED = ("gcs_server", "raylet")  # of Ray's processes: without them no trial can go on
# Of the raylet, which ends itself where one of them ends; and their programs, before they take these names.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
_AGENT_FILES = ("/dashboard/agent.py", "/runtime_env/agent/main.py")
_LOOK_SECONDS = 0.1
_HEARD_SECONDS = 1.0  # that the main thread has to hear of it, before a person is told all the same
_END_SECONDS = 5.0  # that it then has to end by itself
_daemons: dict[str, psutil.Process] = {}
_again = ""


def check_ray() -> None:
    """Whether the processes of Ray on this machine live.

    Raises:
        RunError: one is gone: it was killed, by a person or for its memory.
    """
    if words := _lost_words():
        raise RunError(words)


def _lost_words() -> str:
    for name, daemon in list(_daemons.items()):  # the search may end while a thread looks
        with suppress(psutil.NoSuchProcess):
            if daemon.status() != psutil.STATUS_ZOMBIE:
                continue
        return (
            f"Ray, which runs the trials, needs its process {name} (pid {daemon.pid}), but that has ended: it was "
            f"killed, maybe as memory was full. Nothing that was finished is lost. Go on with: {_again}"
        )
    return ""


def _is_agent(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any(word.endswith((*_AGENTS, *_AGENT_FILES)) for word in process.cmdline())
    return False


@contextmanager
def watched(children: list[psutil.Process], again: str) -> Iterator[None]:
    """While entered, `check_ray` looks at Ray's processes, and a thread does where the main thread does not.

    Ray itself would end our process within a minute, and at times at once, in C++ and without a word on how to go on.
    """
    global _again  # one Ray a process
    for child in children:
        with suppress(psutil.Error):
            if (name := child.name()) in _NEEDED:
                _daemons[name] = child
                agents = filter(_is_agent, child.children())
                _daemons.update((f"agent {number}", agent) for number, agent in enumerate(agents))
    _again, over = again, threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_SECONDS):
            if (words := _lost_words()) and not over.wait(_HEARD_SECONDS):
                print(f"error: {words}", file=sys.stderr, flush=True)
                if over.wait(_END_SECONDS):
                    return
                for child in children:
                    with suppress(psutil.Error):
                        child.kill()
                os._exit(2)  # the main thread waits in Ray for what no longer lives

    watcher = threading.Thread(target=watch, daemon=True, name="foldsearch-watches-ray")
    watcher.start()
    try:
        yield
    finally:
        over.set()
        _daemons.clear()


# ---- its start and its end


def _start(cpus: int, gpus: int, folder: Path, again: str) -> None:
    store = _choose_store()
    try:
        with handlers_kept(), patched_for_start():
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=STORE_BYTES,
                _plasma_directory=str(store or folder),
                _temp_dir=str(folder),
            )
    except Exception as error:
        raise RunError(
            quote_error(
                "Ray, which runs the trials, must be able to start on this machine, but it could not",
                error,
                "Look whether processes, memory or files are limited (ulimit -a) or the machine is very busy, and "
                + (f"go on with: {again}" if again else "try again."),
            )
        ) from error


def _stop(daemons: list[psutil.Process]) -> None:
    """Stop Ray and wait for its processes: none of them is left."""
    ours = list(daemons)
    for daemon in daemons:
        with suppress(psutil.Error):
            ours += daemon.children(recursive=True)
    if not ray.is_initialized():  # its start was cut short
        for process in ours:
            with suppress(psutil.Error):
                process.kill()
    try:
        shut_down()
    finally:
        _, alive = psutil.wait_procs(ours, timeout=_KILL_SECONDS)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=_KILL_SECONDS)


def shut_down() -> None:
    """Leave Ray, its own one or a cluster's, with the signals ours to its end."""
    state: Any = ray._private.state.state
    with handlers_kept() as give_back:
        # Ray's C++ leaves SIGTERM to the system, which ends the process; what follows it here takes seconds.
        disconnect = state.disconnect

        def heard() -> None:
            give_back()
            disconnect()

        with _replaced(state, "disconnect", heard):
            ray.shutdown()


@contextmanager
def patched_for_start() -> Iterator[None]:
    """What ray.init does to the signals of a program that is not Ray's alone.

    It takes SIGTERM for itself, three times and at last in C++, which prints a stack and aborts; and its daemons are
    in our process group, so that a terminal's or a batch system's signal ends them before we could end them orderly.
    """
    connect = getattr(ray._private.worker, "connect", None)
    popen = getattr(ray._private.services, "ConsolePopen", None)

    def connect_unheard(*args: Any, **kwargs: Any) -> Any:
        # C++ takes the signals in here; one that comes meanwhile waits until they are ours again.
        kept = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            with uninterrupted(), handlers_kept():
                assert connect is not None
                return connect(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, kept)

    with ExitStack() as held:
        if popen is not None:
            grouped = functools.partial(popen, process_group=0)
            held.enter_context(_replaced(ray._private.services, "ConsolePopen", grouped))
        if connect is not None and threading.current_thread() is threading.main_thread():
            held.enter_context(_replaced(ray._private.worker, "connect", connect_unheard))
            held.enter_context(_replaced(ray._private.utils, "set_sigterm_handler", _leave_alone))
        yield


def _leave_alone(handler: Callable[..., Any]) -> None:
    """Who else would set a handler."""


@contextmanager
def quiet(*, joins: bool = False) -> Iterator[None]:
    """Ray's settings and its voice; all is put back. `joins`: a cluster of somebody's, whose token is theirs too."""
    changed: dict[str, str | None] = {
        **_QUIET,
        "RAY_ADDRESS": None,  # where to join is said by who calls
        # Where it is not set, Ray sets it at its start, for all that follows in the process.
        _AUTH_MODE: os.environ.get(_AUTH_MODE),
    }
    if not joins and not _home_takes_a_token():
        changed["RAY_AUTH_TOKEN"] = _token()
    before = {name: os.environ.get(name) for name in changed}
    logger = logging.getLogger("ray")
    level = logger.level
    _put(changed)
    logger.setLevel(logging.CRITICAL)
    try:
        # A thread of Ray prints a worker's death, whatever the log settings are; TrialRetried says it instead.
        with _replaced(ray._private.worker, "print_to_stdstream", _say_nothing):
            yield
    finally:
        logger.setLevel(level)
        _put(before)


def _put(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _say_nothing(data: Any, ignore_prefix: bool = False) -> None:
    pass


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of Ray's that has no setting; one that a version lacks is left away."""
    if not hasattr(module, name):
        yield
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _home_takes_a_token() -> bool:
    """Whether Ray's processes can prove to each other who they are by a file in the home folder, as is its way."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", _AUTH_MODE)):
        return True  # somebody cares for it
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            (folder / "auth_token").read_text()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError, UnicodeError):
        return False
    return True


@functools.cache
def _token() -> str:
    """One for the whole process: Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def temporary_folder(place: Path) -> Iterator[Path]:
    """A new folder in `place` that goes at the end; those that killed processes left go first."""
    for left in place.glob(f"{_PREFIX}*"):
        _remove_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        with uninterrupted():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder that no process holds: its lock is there, and free."""
    try:
        if time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
            return  # whoever makes it may be about to take the lock
        with (folder / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EWOULDBLOCK, errno.EACCES, errno.ENOTDIR):
            raise
