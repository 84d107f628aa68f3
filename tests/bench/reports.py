"""Seconds that reading a long run and each of its reports take, of the processor: do they grow with the trials?

python -m tests.bench.reports [TRIALS ...]
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from foldsearch.report import page, picture, terminal
from foldsearch.report.view import RunView
from tests.many_trials import write_run

_Found = TypeVar("_Found")


def main() -> None:
    """Print a row for each step and number of trials; 300 and 2,000 if none is given."""
    for trials in map(int, sys.argv[1:] or ("300", "2000")):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "run"
            write_run(path, trials)
            print(f"{trials:,} trials")
            report(path)


def report(path: Path) -> None:
    """Read one run and make all of its reports."""
    view = _timed("open", lambda: RunView.open(path))
    _timed("front, knee, pick", view.pick)
    screen = Console(file=io.StringIO(), width=120)
    _timed("front", lambda: screen.print(terminal.front_report(view, width=120)))
    _timed("front --all", lambda: screen.print(terminal.front_report(view, width=120, every=True)))
    drawn = _timed("picture", lambda: picture.front_png(view))
    _timed("page", lambda: page.write_page(view, path / "report" / "index.html", drawn))


def _timed(what: str, work: Callable[[], _Found]) -> _Found:
    began = time.process_time()
    found = work()
    print(f"{what:>20} {time.process_time() - began:7.2f} s", flush=True)
    return found


if __name__ == "__main__":
    main()
