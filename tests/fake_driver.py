"""Run or resume a study of fake trials in a process of its own, to be interrupted and killed.

python -m tests.fake_driver FOLDER run|resume
"""

from __future__ import annotations

import sys
from pathlib import Path

from foldsearch.errors import InputError
from foldsearch.search.events import Event
from foldsearch.search.run import run_search
from foldsearch.signals import Stopped, exit_code
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study

FAKES = {"trial": "tests.fake_trial:run_trial", "prepare": "tests.fake_trial:prepare"}


SPACE = {
    "removal": [0.0, 0.5],
    "gate_eps": [0.1, 0.01, 0.001],
    "neighbour_share": 0.25,
    "groups": {"max_groups": 4, "group_sizes": [2, 3], "start": [0.1, 0.9], "adapter_ranks": [0, 8, 32]},
    "recover": {"learning_rate": [3e-4, 3e-3], "delta_ranks": [8, 16]},
}


def study(**overrides: object) -> Study:
    """Small and quick: twelve blocks, dense is above the budget."""
    values = {"space": SPACE, "budget.gb": 0.0070, "rungs": [0, 100, 400], "trials": 9, "halving": {}}
    return load_study("default", {**values, **overrides})


def say(event: Event) -> None:
    print(type(event).__name__, getattr(event, "number", ""), getattr(event, "resume", ""), flush=True)


if __name__ == "__main__":
    resume = sys.argv[2] == "resume"
    try:
        run_search(None if resume else study(), Path(sys.argv[1]), resume=resume, on_event=say, **FAKES)
    except Stopped as stop:
        sys.exit(exit_code(stop))
    except InputError as error:
        print(f"error: {error}")
        sys.exit(2)
