"""The Optuna dashboard of a run, on this machine only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from foldsearch.errors import InputError, RunError, quote_error
from foldsearch.paths import printable
from foldsearch.run import Run

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

HOST = "127.0.0.1"  # a run's plans are nobody else's business, and the dashboard asks for no password


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _ReadOnly:
    """A WSGI application that is only read, but for notes: what its buttons do would take rows from a run at work.

    "Fail Trial" ends a row that a search holds, "Delete" takes the study and all its trials away.
    """

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        if method in ("GET", "HEAD") or (method == "PUT" and path.endswith("/note")):
            return self._application(environ, start_response)
        told = json.dumps(
            {"reason": "the study of a run is changed by foldsearch alone; only notes can be written"}
        )
        start_response("403 Forbidden", [("Content-Type", "application/json")])
        return [told.encode()]


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A line per request would drown the terminal."""


def serve(path: Path, *, port: int = 8080, on_ready: Callable[[str], None] = print) -> None:
    """Serve the dashboard of a run until interrupted; trials show up while the run goes on. It is read, but for notes.

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
            HOST,
            port,
            _ReadOnly(optuna_dashboard.wsgi(storage)),
            server_class=_Server,
            handler_class=_Quiet,
        )
    except (OSError, OverflowError) as error:
        raise InputError(
            quote_error(f"port {port} of {HOST} cannot be served", error, "Choose another with --port.")
        ) from error
