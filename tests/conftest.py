"""What every test runs under: no network, one torch thread, nothing written outside the test's own folders."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from foldsearch.machine import collect_seldom

# Before torch, transformers or ray is imported: each reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a worker starves beside other tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several tests run at a time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("COLUMNS", "120")

# `make test &` starts with Ctrl-C ignored and `nohup make test` with SIGHUP, and so would every program that a test
# starts and interrupts.
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, handler)

collect_seldom()

settings.register_profile(
    "unhurried", deadline=None
)  # an example's time depends on what else the machine does
settings.load_profile("unhurried")


@pytest.fixture(autouse=True, scope="module")
def _signals_as_found() -> Iterator[None]:
    """What a library makes of signals, as Ray does in the process that joins it, ends with the file of its tests."""
    found = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in found.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """One Ray for the tests of a file that do not kill it; run_search uses what is there."""
    import ray

    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]))  # workers import the fakes
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 10**6,
    )
    yield
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="session")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fake trials, written by the search's own records; tests get copies of it."""
    from foldsearch.plan.plan import FoldPlan
    from foldsearch.run import Run
    from foldsearch.search.records import Records
    from foldsearch.spec.load import load_study
    from foldsearch.spec.propose import baseline_count
    from tests.fake_trial import NUM_BLOCKS, ORDERS, TABLE, trial_at
    from tests.proposals import criterion_in, ordered_plan

    path = tmp_path_factory.mktemp("recorded") / "run"
    study = load_study(
        "default", {"space": "foldgpt", "budget.gb": 0.0070, "rungs": [0, 100, 400], "trials": 14}
    )
    with Run.draft(path) as draft:
        records = Records(Run(draft, study, TABLE, note="fake <weights>").begin(path))
    folder = records.run
    count = baseline_count(records.space, folder.table, folder.target, folder.budget)
    assert count == 4  # gate and greedy drop the same four: one measures the plan, the other knows it
    for criterion in ("gate", "block_influence", "window", "greedy"):
        records.queue(criterion, count)
    measured: dict[FoldPlan, int] = {}
    for _ in range(14):
        number, proposal = records.ask()
        if number == 5:
            records.fail(number, "crashed: out of paper")
            continue
        plan = ordered_plan(proposal, ORDERS, NUM_BLOCKS)
        owner = measured.setdefault(plan, number)
        trial = trial_at(plan, study, 1 if number == 7 else 2, proposal, number)
        *earlier, last = trial.results
        if trial.ended:
            report = replace(last.quality, kl=1.1 * last.quality.kl, dense_perplexity=33.0, tokens=222)
            last = replace(last, report=report)
        known_from = None if owner == number else owner
        results = (replace(result, known_from=known_from) for result in (*earlier, last))
        gates = None
        if criterion_in(proposal) == "gate":
            gates = {"steps": 20, "tokens": 1000, "polarized": 0.9, "soft_loss": 2.0, "hard_loss": 2.5}
            gates["from_cache"] = number > 4
        assert trial.draft is not None
        records.record(replace(trial, draft=replace(trial.draft, gates=gates), results=tuple(results)))
        if trial.ended:
            records.finish(number)
        else:
            records.stop(number, "rank 2 of 4")
    return path


@pytest.fixture
def run_path(_recorded: Path, tmp_path: Path) -> Path:
    """A run folder of a test's own: 14 trials of a model of 12 blocks, one failed, one stopped."""
    return Path(shutil.copytree(_recorded, tmp_path / "run"))
