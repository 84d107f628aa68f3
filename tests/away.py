"""Trials and a driver for a search on two nodes.

A trial runs as any does, and writes into SHARED which rung it ended where. On the second node it looks whether it sees
the driver's folder, and waits after its first rung, to be killed with its node. SHARED and DRIVER are folders that the
environment names.

    python -m tests.away run ADDRESS      a search of a tiny model, in DRIVER
    python -m tests.away errors ADDRESS   what is said of settings that cannot be, as JSON, and the seconds it took
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient

from foldsearch.context import TrialContext
from foldsearch.errors import InputError
from foldsearch.model import judge
from foldsearch.progress import StageProgress
from foldsearch.proposal import Proposal
from foldsearch.record import Trial
from foldsearch.search import events
from foldsearch.search.run import run_search
from foldsearch.spec.space import Space
from foldsearch.spec.study import ClusterSettings, HalvingSettings, ScreenSettings, Study
from foldsearch.trial import run_trial as run_here
from tests import fake_driver
from tests.contexts import tiny_study


def run_trial(
    proposal: Proposal, context: TrialContext, *, number: int, progress: StageProgress
) -> Iterator[Trial]:
    shared, driver = Path(os.environ["SHARED"]), Path(os.environ["DRIVER"])
    where = "first" if (driver / "run").exists() else "second"

    def log(words: str) -> None:
        with (shared / "executed.log").open("a") as file:
            file.write(f"{words}\n")

    if where == "second":
        assert not list(driver.iterdir()), "the driver's folder is hidden from this node"
    note_asking(log)
    while where == "first" and "second" not in (shared / "executed.log").read_text():
        time.sleep(0.05)  # a search this small would be over before the other node has begun
    for trial in run_here(proposal, context, number=number, progress=progress):
        words = f"{where} {number}:{len(trial.results)}"
        if where == "second":
            yield trial
            log(words)  # who asks for more has handed this in
            while True:
                time.sleep(0.05)
        log(words)
        yield trial


def note_asking(log: Callable[[str], None]) -> None:
    """Note where this process asks the dense model what it says."""
    ask = judge.ask_dense

    def asked(*args: Any, **more: Any) -> Any:
        log("asked")
        return ask(*args, **more)

    judge.ask_dense = asked


def study(place: Path, address: str, **cluster: Any) -> Study:
    """Two trials of a tiny random model, of different plans: one of the same plan would wait for the other's results.

    Nothing is screened or stopped, as that is not what is looked at.
    """
    return tiny_study(
        place,
        space=Space(criteria=("window",)),
        rungs=(0, 64, 128),
        trials=2,
        jobs=2,
        screen=ScreenSettings(plans=0),
        halving=HalvingSettings(at_least=99),
        cluster=ClusterSettings(address=address, **cluster),
    )


def run(driver: Path, shared: Path, address: str) -> None:
    def say(event: events.Event) -> None:
        if isinstance(event, events.TrialRetried):
            print(f"retried {event.number}", flush=True)

    made = study(driver / "made", address, run_storage=str(shared / "storage"))
    run_search(made, driver / "run", on_event=say, trial="tests.away:run_trial")


def errors(driver: Path, shared: Path, address: str) -> None:
    ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False)
    while len(ray.nodes()) < 2:
        time.sleep(0.1)
    client = GcsClient(address=address)
    key, space = CLUSTER_METADATA_KEY, KV_NAMESPACE_CLUSTER
    before = client.internal_kv_get(key, space)
    said = {}

    def ask(name: str, **cluster: Any) -> None:
        settings = {f"cluster.{key}": value for key, value in {"address": address, **cluster}.items()}
        began = time.monotonic()
        try:
            run_search(fake_driver.study(**settings), driver / "refused", **fake_driver.FAKES)
        except InputError as error:
            said[name] = str(error), time.monotonic() - began

    ask("no storage")
    ask("too large", cpus_per_trial=9, run_storage=str(shared))
    ask("no gpu", gpus_per_trial=0.5, run_storage=str(shared))
    ask("not seen", run_storage=str(driver / "storage"))
    ask("no such library", run_storage="nowhere://storage")
    changed = {**json.loads(before), "ray_version": "2.9.9"}
    client.internal_kv_put(key, json.dumps(changed).encode(), True, space)
    ask("version", run_storage=str(shared))
    client.internal_kv_put(key, before, True, space)
    os.environ["RAY_AUTH_TOKEN"] = "0" * 32  # of the process that knocks
    ask("token", run_storage=str(shared))
    print(json.dumps(said))


if __name__ == "__main__":
    {"run": run, "errors": errors}[sys.argv[1]](
        Path(os.environ["DRIVER"]), Path(os.environ["SHARED"]), sys.argv[2]
    )
