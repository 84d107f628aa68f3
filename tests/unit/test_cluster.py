"""What a trial takes of a cluster, and addresses where none is: told in a sentence, soon, with nothing written.

Oracle: shares counted by hand; sockets that the tests themselves open.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import ray._private.state
import ray._private.utils
import ray._private.worker

from foldsearch import cli
from foldsearch.errors import InputError, RunError, SpecError
from foldsearch.search import cluster
from foldsearch.search.cluster import Node, Share, address_of, fair_share
from foldsearch.search.run import run_search
from foldsearch.signals import stops_raise
from foldsearch.spec.load import cluster_settings, load_study
from foldsearch.spec.study import ClusterSettings
from tests.fake_driver import FAKES, study


def nodes(*of: tuple[float, float]) -> list[Node]:
    return [Node(str(number), "", cpus, gpus) for number, (cpus, gpus) in enumerate(of)]


@pytest.mark.parametrize(
    ("of", "jobs", "settings", "expected"),
    [
        ([(8, 0), (8, 0)], 2, {}, (8, 0.0)),
        ([(8, 0), (8, 0)], 3, {}, (4, 0.0)),  # one node has two of them
        ([(8, 0), (3, 0)], 3, {}, (3, 0.0)),  # two of 3 on the first
        ([(4, 0)], 9, {}, (1, 0.0)),
        ([(0, 0), (16, 2)], 2, {}, (8, 1.0)),  # a head that runs nothing
        ([(16, 2)], 4, {"gpus_per_trial": 0.5}, (4, 0.5)),
        ([(16, 2), (16, 0)], 2, {}, (8, 1.0)),  # the second node has no GPU, so both are on the first
        ([(16, 4)], 1, {"gpus_per_trial": 2.0, "cpus_per_trial": 3}, (3, 2.0)),
        ([(16, 4)], 2, {"gpus_per_trial": 0.0}, (8, 0.0)),
    ],
)
def test_what_a_trial_takes_where_the_study_does_not_say(
    of: list[tuple[float, float]], jobs: int, settings: dict[str, float], expected: tuple[int, float]
) -> None:
    share = fair_share(nodes(*of), ClusterSettings(**settings), jobs, wants_gpu=True)
    assert (share.cpus, share.gpus) == expected


def test_trials_of_a_study_for_processors_take_no_gpu() -> None:
    assert fair_share(nodes((8, 2)), ClusterSettings(), 1, wants_gpu=False) == Share(8, 0.0)


def test_the_option_wins_over_the_study_and_that_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "there:1")
    assert address_of(ClusterSettings()) == "there:1"
    assert address_of(ClusterSettings(address="here:2")) == "here:2"
    assert address_of(ClusterSettings(address="local")) == ""
    mine = load_study("default", {"cluster.address": "here:2", "cluster.cpus_per_trial": 3})
    again = cluster_settings(mine, {"address": "other:3", "cpus_per_trial": None})
    assert again == ClusterSettings(address="other:3", cpus_per_trial=3)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("gpus_per_trial", 1.5, "a part of one GPU, or whole ones; got 1.5"),
        ("cpus_per_trial", 0, "must be above 0"),
        ("run_storage", "ftp://me:hidden@host/folder", "without user and password"),
    ],
)
def test_settings_that_cannot_be(key: str, value: object, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        load_study("default", {f"cluster.{key}": value})
    assert "hidden" not in str(caught.value)


@pytest.fixture
def a_port() -> Iterator[int]:
    """Of something that listens, and says nothing that Ray would."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "127.0.0.1:{closed}",
            r"none does at '127.0.0.1:\d+': Connection refused. Look at what `ray status` says",
        ),
        ("127.0.0.1:{listens}", "it is not Ray that listens there"),
        ("ray://head:10001", r"by host:port or auto; got 'ray://head:10001'. Start it there"),
        ("head", "a cluster's address is host:port, or auto; got 'head'"),
        ("nowhere.invalid:6379", "none does at 'nowhere.invalid:6379'"),
    ],
)
def test_where_no_cluster_answers(
    address: str, said: str, a_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 6.0)
    given = address.format(closed=closed_port(), listens=a_port)
    began = time.monotonic()
    with pytest.raises(RunError, match=said):
        run_search(study(**{"cluster.address": given}), tmp_path / "runs" / "mine", **FAKES)
    assert time.monotonic() - began < 60  # Ray itself would try for a quarter of an hour
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "run",
        "--address",
        f"127.0.0.1:{closed_port()}",
        "--budget-gb",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(
        "error: a Ray cluster must answer at the address, but none does at"
    )
    assert not list(tmp_path.iterdir())


def test_a_trial_that_no_machine_has_room_for(tmp_path: Path) -> None:
    cores = 1000 * (os.cpu_count() or 1)
    with pytest.raises(
        InputError, match=rf"it takes {cores} cores, and there are \d+\. Lower --cpus-per-trial"
    ):
        run_search(study(**{"cluster.cpus_per_trial": cores}), tmp_path / "run", **FAKES)
    assert not list(tmp_path.iterdir())


def test_signals_stay_ours_while_a_cluster_is_joined_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray 2.60 takes SIGTERM in Python and then in C++, and leaves it to the system at its end."""
    found: dict[str, object] = {}

    def connect() -> None:
        found["held back in C++"] = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def init(**_: object) -> None:
        ray._private.utils.set_sigterm_handler(lambda *_: None)
        found["joining"] = signal.getsignal(signal.SIGTERM)
        ray._private.worker.connect()
        found["joined"] = signal.getsignal(signal.SIGTERM)

    def shutdown() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ray._private.state.state.disconnect()
        found["leaving"] = signal.getsignal(signal.SIGTERM)

    monkeypatch.setattr(ray._private.worker, "connect", connect)
    monkeypatch.setattr(ray._private.state.state, "disconnect", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", shutdown)
    monkeypatch.setattr(cluster, "_raylets", list)
    with stops_raise():
        ours = signal.getsignal(signal.SIGTERM)
        with cluster._joined("a:1", ""):
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
    assert found.pop("held back in C++")
    assert set(found) == {"joining", "joined", "leaving"}
    assert set(found.values()) == {ours}
