"""Moves the clock of the wall for the Python processes of a search: each begins with this module, where its folder is
on the path. `MOVED_CLOCK` names a file that says by how many seconds; where there is none the clock is right.

The clock of a machine is everybody's, and Linux has no other one of the wall for some processes alone.
"""

from __future__ import annotations

import os
import time

_true, _true_ns, _path = time.time, time.time_ns, os.environ.get("MOVED_CLOCK", "")
_LOOK_SECONDS = 0.2
_known = (0.0, 0.0)  # when it was looked at, by the monotonic clock, and what it said


def _moved() -> float:
    global _known  # noqa: PLW0603  # the clock is the process's own
    now = time.monotonic()
    if now - _known[0] > _LOOK_SECONDS:
        try:
            with open(_path) as file:
                _known = (now, float(file.read()))
        except (OSError, ValueError):
            _known = (now, 0.0)
    return _known[1]


if _path:
    time.time = lambda: _true() + _moved()
    time.time_ns = lambda: _true_ns() + int(_moved() * 1e9)
