"""A search on two nodes that see one folder in common: what a trial needs reaches the other node, what it learns comes
back, and when that node dies its trials go on elsewhere.

The second node has a raylet, an object store, a temporary folder, a home and a cache of its own, and the driver's
folder is hidden from it by a mount, so nothing of a trial could be read from there.

Oracles: the log into which trials write what they executed where; the same trials run in this process, without Ray.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from foldsearch.paths import command
from foldsearch.record import Trial
from foldsearch.run import Run
from foldsearch.search.check import check_run
from foldsearch.search.records import read_trials
from foldsearch.store import blob_of
from foldsearch.trial import run_trial
from tests.away import study
from tests.contexts import begin_run
from tests.faults.storm import BUDGET, make_place
from tests.two_nodes import Cluster, two_nodes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("cluster")
    folders = [place / name for name in ("driver", "shared")]
    for folder in folders:
        folder.mkdir()
    with two_nodes(*folders) as made:
        yield made


@pytest.mark.slow
def test_what_cannot_be_is_told_in_a_sentence(cluster: Cluster) -> None:
    out, _ = cluster.python("-m", "tests.away", "errors", cluster.address).communicate(timeout=300)
    said = {name: words for name, (words, seconds) in json.loads(out.splitlines()[-1]).items()}
    expected = {
        "no storage": "but none is named for the 2 nodes at '{address}'. Name one: --run-storage PATH",
        "too large": "it takes 9 cores, and of the 2 nodes at '{address}' the largest has 1 core. Lower",
        "no gpu": "it takes 1 core and 0.5 GPU, and of the 2 nodes",
        "not seen": "but that at 127.0.0.2 does not see what was just written to the run storage",
        "no such library": "a URL that fsspec can open, but 'nowhere://storage' is not",
        "version": "the cluster at '{address}' has 2.9.9, and this is",
        "token": "lets in who has its token, but ours is missing or another. To join, set RAY_AUTH_MODE=token",
    }
    assert said.keys() == expected.keys()
    for name, words in expected.items():
        assert words.format(address=cluster.address) in said[name]
        assert "\n" not in said[name]
    assert not (cluster.driver / "refused").exists()
    assert not list(cluster.shared.rglob("probes/*"))


def test_a_node_that_dies(cluster: Cluster, tmp_path: Path) -> None:
    log = cluster.shared / "executed.log"
    log.touch()
    search = cluster.python("-m", "tests.away", "run", cluster.address)
    until = time.monotonic() + 330  # it takes minutes where the machine has other work
    while not any(line.startswith("second") for line in log.read_text().splitlines()):
        if search.poll() is not None or time.monotonic() > until:
            search.kill()
            pytest.fail(search.communicate()[0])
        time.sleep(0.1)
    taken = {line for line in log.read_text().splitlines() if line.startswith("second")}
    (number,) = {int(line.split()[1].partition(":")[0]) for line in taken}
    look_at_second(cluster)
    cluster.kill_second()
    out, _ = search.communicate(timeout=240)
    assert search.returncode == 0, out

    # the trial of the dead node went on from its last rung, on the other one, and nothing was done twice
    assert f"retried {number}" in out
    lines = [line for line in log.read_text().splitlines() if line != "asked"]
    assert [line for line in lines if f" {number}:" in line] == [
        f"second {number}:1", f"first {number}:2", f"first {number}:3"
    ]  # fmt: skip
    assert set(Counter(line.split()[1] for line in lines).values()) == {1}
    # nobody but the driver asked the dense model
    assert "asked" not in log.read_text().splitlines()

    # the run is whole: the study, the folders and the weights in them agree
    run = Run.open(cluster.driver / "run")
    assert not check_run(run, repair=False).left
    trials = read_trials(run)
    assert all(trial.state in ("finished", "repeat") for trial in trials)

    # and its figures are those of a search without a cluster
    alone = [trial for trial in trials if trial.is_measured]
    assert number in [trial.number for trial in alone]
    assert [values(one) for one in measured_here(tmp_path, alone)] == [values(one) for one in alone]

    # of the run nothing is left where only others needed it
    left = {
        path.relative_to(cluster.shared / "storage").parts[0] for path in cluster.shared.rglob("storage/*/*")
    }
    assert left == {"blobs", "entries"}


@pytest.mark.slow
def test_a_driver_that_joined_ends_by_a_signal_as_any_other(cluster: Cluster) -> None:
    """SIGTERM in the middle of a trial, and once more while it ends; Ray takes that signal for itself as it joins."""
    place = cluster.driver / "stopped"
    place.mkdir()
    make_place(place)
    study, run = place / "foldsearch.toml", place / "run"
    study.write_text(study.read_text().replace("rungs = [0, 256, 1024]", "rungs = [0, 256, 1000000]"))
    search = cluster.python(
        "-m", "foldsearch", "run", str(study), "--budget-gb", BUDGET, "--out", str(run),
        "--address", cluster.address, "--run-storage", str(cluster.shared / "stopped"),
    )  # fmt: skip
    until = time.monotonic() + 480  # of a busy machine
    while not (run / "study.json").exists() or not any(trial.results for trial in read_trials(Run.open(run))):
        if search.poll() is not None or time.monotonic() > until:
            search.kill()
            pytest.fail(search.communicate()[0])
        time.sleep(0.2)
    search.terminate()
    time.sleep(0.1)
    search.terminate()
    out, _ = search.communicate(timeout=120)
    assert search.returncode == 128 + signal.SIGTERM, out
    assert command("resume", run) in out
    for word in ("Traceback", "SIGTERM", "***"):
        assert word not in out, out


def look_at_second(cluster: Cluster) -> None:
    """The second node has the weights, each file once and under the hash of what the driver has."""
    (model,) = (cluster.folders[1] / "cache" / "models").glob("[0-9a-f]*")
    weights = blob_of(model / "model.safetensors")
    assert weights == blob_of(cluster.driver / "made" / "model" / "model.safetensors")
    assert (cluster.shared / "storage" / "blobs" / weights.sha256).is_file()


def measured_here(place: Path, trials: list[Trial]) -> list[Trial]:
    """The same proposals, each run from its begin to its end in this process."""
    torch.set_num_threads(1)
    context = begin_run(study(place / "made", "local"), place / "run", cache_dir=place / "cache")
    assert all(trial.proposal is not None for trial in trials)
    return [
        list(run_trial(trial.proposal, context, number=trial.number))[-1]
        for trial in trials
        if trial.proposal is not None
    ]


def values(trial: Trial) -> list[tuple[float, int]]:
    return [(result.quality.kl, result.recovery_tokens) for result in trial.results]
