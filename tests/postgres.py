"""A PostgreSQL server of a test's own, on 127.0.0.1, where its binaries are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

USER, PASSWORD = "fold", "p4ss/w0rd:of@fold"
QUOTED = "p4ss%2Fw0rd%3Aof%40fold"  # as it stands in a URL


@dataclass
class Server:
    """url: with the password. words: the command that starts it."""

    port: int
    words: list[str]
    user: str | None
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://{USER}:{QUOTED}@127.0.0.1:{self.port}/postgres"

    @property
    def shown(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        psycopg = pytest.importorskip("psycopg")
        self.process = subprocess.Popen(
            self.words, user=self.user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url).close()
            except psycopg.OperationalError:  # while it recovers from being killed, it listens and refuses
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < until
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """At once: what is connected is cut off."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _binary(name: str) -> str | None:
    """Of the version that is installed, or the newest of Debian's."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    return shutil.which(name) or next((str(p / name) for p in reversed(places) if (p / name).exists()), None)


@contextmanager
def postgres_server() -> Iterator[Server]:
    """A server with a password; skips the test, and says why, where there can be none."""
    pytest.importorskip(
        "psycopg", reason="PostgreSQL's driver is not installed: pip install 'foldsearch[postgres]'"
    )
    initdb, postgres = _binary("initdb"), _binary("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = None
    if os.geteuid() == 0:  # it refuses to run as root
        known = {entry.pw_name for entry in pwd.getpwall()}
        user = next((name for name in ("postgres", "nobody") if name in known), None)
        if user is None:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres' or 'nobody'")
    place = Path(tempfile.mkdtemp(prefix="fold-postgres-"))
    secret = place / "password"
    secret.write_text(PASSWORD)
    if user is not None:
        for path in (place, secret):
            shutil.chown(path, user)
    data = place / "data"
    made = subprocess.run(
        [initdb, "-D", str(data), "-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"],
        user=user, capture_output=True, text=True, check=False, cwd=place,
    )  # fmt: skip
    try:
        assert made.returncode == 0, made.stderr
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        words = [postgres, "-D", str(data), "-p", str(port)]
        words += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        server = Server(port, words, user)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(place, ignore_errors=True)
