"""The Optuna dashboard of a run, on this machine only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from foldsearch.errors import InputError, RunError, quote_error
from foldsearch.paths import printable
from foldsearch.run import Run

HOST = "127.0.0.1"  # a run's plans are nobody else's business, and the dashboard asks for no password


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A line per request would drown the terminal."""


def serve(path: Path, *, port: int = 8080, on_ready: Callable[[str], None] = print) -> None:
    """Serve the dashboard of a run until interrupted; trials show up while the run goes on.

    Args:
        path: the run folder.
        port: on 127.0.0.1; 0 takes a free one.
        on_ready: told the address when it answers.

    Raises:
        RunError: not a run folder, or no trial has begun yet.
        InputError: the port is taken.
    """
    server = open_server(path, port)
    on_ready(f"http://{HOST}:{server.server_port}/")
    with server:
        server.serve_forever()


def open_server(path: Path, port: int) -> WSGIServer:
    """The server of `serve`, bound and not yet serving."""
    folder = Run.open(path)
    from foldsearch.search.storage import is_begun, open_storage

    if not is_begun(folder):
        raise RunError(
            f"'{printable(path)}' has no study yet: its first trial has not begun. Try again in a moment."
        )
    import optuna_dashboard

    storage = open_storage(folder)
    try:
        return make_server(
            HOST, port, optuna_dashboard.wsgi(storage), server_class=_Server, handler_class=_Quiet
        )
    except (OSError, OverflowError) as error:
        raise InputError(
            quote_error(f"port {port} of {HOST} cannot be served", error, "Choose another with --port.")
        ) from error
