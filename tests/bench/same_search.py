"""Every proposal and every result of a small search as JSON, so that a redesign can be held against what was before.

    PYTHONPATH=OLD python tests/bench/same_search.py before.json
    PYTHONPATH=.   python tests/bench/same_search.py after.json
    cmp before.json after.json

A number after the file sets the tokens of healing, 0 for none; without one they are as the code has them:

    PYTHONPATH=.   python tests/bench/same_search.py after.json 0

The search takes every criterion, fate and replacement, on a tiny random model, one trial at a time, on one thread: the
same code gives the same bytes on the same machine. It takes about half a minute.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from foldsearch.record import Trial
from foldsearch.run import Run
from foldsearch.search.records import read_trials
from foldsearch.search.run import run_search
from foldsearch.spec.load import load_study
from tests.tiny import save_model, write_corpus

SPACE = """
removal = [0.2, 0.8]
criteria = ["gate", "block_influence", "window", "linear_window", "greedy", "uniform", "random", "evolution"]
fates = ["drop", "share", "replace"]
attention = [0.0, 0.4]
[children]
ranks = [2, 4]
starts = ["zero", "svd", "data"]
[replace]
kinds = ["linear", "ffn", "layer"]
[groups]
max_groups = 2
group_sizes = [2, 3]
adapter_ranks = [0, 2]
"""


def told(trial: Trial) -> list[object]:
    """What a trial was and came to, without times."""
    cost = trial.draft and [str(trial.plan), trial.cost.memory_bytes, trial.cost.flops]
    return [
        trial.number,
        trial.state,
        trial.proposal.to_json() if trial.proposal else None,
        cost,
        [
            [
                result.known_from,
                result.recovery_tokens,
                *((one.kl, one.perplexity) if one else None for one in (result.quality, result.report)),
            ]
            for result in trial.results
        ],
    ]


def main(out: Path, healing_tokens: int | None = None) -> None:
    """Run the search, and write what came of it."""
    healing = {} if healing_tokens is None else {"healing": {"tokens": healing_tokens}}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["FOLDSEARCH_CACHE"] = str(place / "cache")
        (place / "space.toml").write_text(SPACE)
        save_model(place / "model")
        write_corpus(place / "corpus.txt")
        study = load_study(
            "default",
            {
                "model": str(place / "model"),
                "data": str(place / "corpus.txt"),
                "space": str(place / "space.toml"),
                "splits": {"sequence_length": 32, "search": 2, "recovery": 8, "report": 2},
                "gates": {"steps": 3},
                "screen": {"plans": 0},  # every trial is the sampler's
                "rungs": [0, 64, 128],
                "trials": 40,
                "precision": "float32",
                "device": "cpu",
                "target": {"dtype": "float32", "context": 64},
                **healing,
            },
        )
        run_search(study, place / "run")
        found = [told(trial) for trial in read_trials(Run.open(place / "run"))]
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
