"""A Ray cluster of two nodes on one machine, of a test's own: a raylet each, with its own object store, temporary
folder, home and cache. The driver's folder is hidden from the second node by a mount of its own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
STORE_BYTES = 80 * 10**6


@dataclass
class Cluster:
    """address: of its head. driver: folder that only the first node sees. shared: folder that both see. environment:
    for a process on the first node, with the cluster's token.
    """

    address: str
    driver: Path
    shared: Path
    environment: dict[str, str]
    second: subprocess.Popen[bytes] | None = None
    folders: list[Path] = field(default_factory=list)

    def python(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """Start Python on the first node."""
        return subprocess.Popen(
            [sys.executable, *words],
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.driver,
        )

    def kill_second(self) -> None:
        """As where a machine loses its power: nobody of it says goodbye."""
        assert self.second is not None
        kill(self.second.pid)
        self.second.wait()


def kill(pid: int) -> None:
    """Kill a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in [top, *top.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def hiding() -> list[str]:
    """The command that gives a process mounts of its own; skips the test where none does."""
    for words in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        with suppress(OSError, subprocess.SubprocessError):
            mount = [*words, "sh", "-c", "mount -t tmpfs none /mnt"]
            if subprocess.run(mount, capture_output=True, timeout=10, check=False).returncode == 0:
                return words
    pytest.skip("folders cannot be hidden from a process here: it needs unshare(1) and the right to mount")


@contextmanager
def two_nodes(driver: Path, shared: Path) -> Iterator[Cluster]:
    """Such a cluster, of one core a node. driver: that the second node is not to see."""
    words, port = hiding(), free_port()
    homes = [Path(tempfile.mkdtemp(prefix="fold2-", dir="/tmp")) for _ in range(2)]  # sockets: a short path
    environments = []
    for home in homes:
        environments.append({
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "HOME": str(home), "FOLDSEARCH_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT),
            "DRIVER": str(driver), "SHARED": str(shared), "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1",
            # who is dead is known sooner than in half a minute
            "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        })  # fmt: skip
    token = secrets.token_hex(16)
    for environment in environments:
        environment["RAY_AUTH_TOKEN"] = token
    environments[0]["FOLDSEARCH_CACHE"] = str(driver / "cache")
    address = f"127.0.0.1:{port}"
    ray = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--disable-usage-stats",
        "--num-cpus=1",
    ]
    ray += [f"--object-store-memory={STORE_BYTES}"]
    head = [*ray, "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    join = [*ray, f"--address={address}", "--node-ip-address=127.0.0.2"]
    hidden = [*words, "sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "sh", str(driver)]
    cluster = Cluster(address, driver, shared, environments[0], folders=homes)
    started: list[subprocess.Popen[bytes]] = []

    def start(number: int, command: list[str]) -> subprocess.Popen[bytes]:
        with (homes[number] / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, f"--temp-dir={homes[number]}"],
                env=environments[number], stdout=log, stderr=log, cwd=homes[number],
            )  # fmt: skip
        started.append(process)
        return process

    try:
        wait_for(start(0, head), port)
        cluster.second = start(1, [*hidden, *join])
        yield cluster
    finally:
        for process in started:
            kill(process.pid)
            process.wait()
        for home in homes:
            shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(process: subprocess.Popen[bytes], port: int, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "the head ended"
        assert time.monotonic() < until
        time.sleep(0.1)
