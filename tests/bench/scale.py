"""How far does a search scale? What its driver costs a trial, and what that makes of 1 to 1,000 workers.

    python -m tests.bench.scale driver [--trials 30 300 1000 3000] [--out driver.json]
    python -m tests.bench.scale workers --driver driver.json [--minutes 2 20 120] [--out workers.json]
    python -m tests.bench.scale shapes

`driver` makes a study of so many trials, and then takes a few more through it as a search does: asked for, begun, told
at each rung, ended. These are the real proposer, halving and Optuna storage, without Ray; seconds are of the processor.
`workers` simulates a search: the driver does one thing at a time and takes as long as `driver` found, a trial takes its
minutes give or take a third, and each worker that is free waits for the driver. It is done 8 trials a worker, or 3,000.
`shapes` reckons what models of known sizes take: bytes and FLOPs, by the shapes alone, on the meta device.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality, RungResult
from foldsearch.record import Draft, Trial
from foldsearch.search.messages import Measured, encode
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records
from foldsearch.search.run import Search
from tests.many_trials import NUM_BLOCKS, write_run

ROUNDS = 6  # trials that are taken through a study to time it
ASKED, TOLD = "asked for", "told"  # what the driver does: once a trial, and once a rung


# ---- the driver


def driver(counts: list[int]) -> list[dict[str, Any]]:
    """Seconds of the driver, a row for each number of trials that are known already."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "run"
            run = write_run(path, count)
            rows.append({"trials": count, **_timed_trials(run)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _timed_trials(run: Any) -> dict[str, float]:
    study = run.study.model_copy(update={"trials": 10**6})
    records = Records(replace(run, study=study))
    line = Line(records)
    search = Search(records, line, lambda event: None)
    rng, asked, told = random.Random(0), [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        found = line.next(num_running=0)
        assert found is not None, "a search without an end has always a next trial"
        number, _ = found
        search.started(number)
        asked.append(time.process_time() - began)
        trial = records.get(number)
        plan = FoldPlan.dropping(rng.sample(range(1, NUM_BLOCKS - 1), rng.randint(3, 12)), NUM_BLOCKS)
        trial = replace(trial, draft=Draft(plan, price(plan, run.table, study.target.value())))
        for rung in range(len(study.rungs)):
            trial = _measured(trial, rung, study)
            message = encode(Measured(trial))
            began = time.process_time()
            ends = search.judge(number, message)
            told.append(time.process_time() - began)
            if ends:
                break
    return {ASKED: statistics.median(asked), TOLD: statistics.median(told)}


def _measured(trial: Trial, rung: int, study: Any) -> Trial:
    kl = 0.05 * len(trial.plan.dropped) * (1 + 1 / (1 + study.rungs[rung] / 100))
    quality = Quality(kl, kl / 20, 30 + kl, 0.5, 30.0, 0.7, 100)
    is_last = rung == len(study.rungs) - 1
    result = RungResult(quality, study.rungs[rung], 1.0, quality if is_last else None)
    return replace(trial, state="finished" if is_last else "running", results=(*trial.results, result))


# ---- workers


@dataclass(frozen=True)
class Cost:
    """Seconds of the driver for one thing, by trials that are known: between what was measured on a straight line."""

    at: tuple[tuple[int, float], ...]

    def of(self, trials: int) -> float:
        """For so many known trials; beyond the most that were measured the last piece goes on."""
        if trials <= self.at[0][0]:
            return self.at[0][1]
        for (low, a), (high, b) in zip(self.at, self.at[1:], strict=False):
            if trials <= high or high == self.at[-1][0]:
                return a + (b - a) * (trials - low) / (high - low)
        return self.at[-1][1]


def simulate(workers: int, minutes: float, costs: dict[str, Cost], rungs: int = 3) -> dict[str, Any]:
    """A search of so many workers, whose driver does one thing at a time."""
    rng = random.Random(0)
    trials = min(3000, 8 * workers)
    step = 60 * minutes / rungs
    events: list[tuple[float, int, int]] = [(0.0, worker, 0) for worker in range(workers)]
    heapq.heapify(events)
    now = busy = worked = 0.0
    known, begun = 0, 0
    while events:
        at, worker, rung = heapq.heappop(events)
        now = max(now, at)
        what = ASKED if rung == 0 else TOLD
        if what == ASKED:
            if begun == trials:
                continue
            begun += 1
        takes = costs[what].of(known)
        now, busy = now + takes, busy + takes
        if rung == rungs:
            known += 1
            heapq.heappush(events, (now, worker, 0))
        else:
            lasts = step * rng.uniform(2 / 3, 4 / 3)
            worked += lasts
            heapq.heappush(events, (now + lasts, worker, rung + 1))
    return {
        "workers": workers,
        "minutes": minutes,
        "trials": trials,
        "hours": now / 3600,
        "at work": worked / (workers * now),
        "driver": busy / now,
    }


# ---- shapes

SHAPES = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, tied
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152, True),
    "TinyLlama-1.1B": (2048, 22, 32, 4, 5632, 32000, False),
    "Llama 2 7B": (4096, 32, 32, 32, 11008, 32000, False),
    "Llama 3 70B": (8192, 80, 64, 8, 28672, 128256, False),
    "Llama 3.1 405B": (16384, 126, 128, 8, 53248, 128256, False),
}


def shapes() -> list[dict[str, Any]]:
    """What a search of each model takes, a row each."""
    import torch
    import transformers as tf

    from foldsearch.model.measure import measure
    from foldsearch.run import Run
    from foldsearch.search.dry_run import plan_search
    from foldsearch.spec.load import load_study

    rows = []
    for name, (hidden, layers, heads, kv, inner, vocabulary, tied) in SHAPES.items():
        config = tf.LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
            intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=8192,
        )  # fmt: skip
        began = time.perf_counter()
        with torch.device("meta"):
            model = tf.AutoModelForCausalLM.from_config(config)
        table = measure(config)
        study = load_study("default", {"model": "x", "data": ["x"], "budget.flops": "0.8x"})
        found = plan_search(study, table, macs_per_second=1.0, num_proposals=100)
        run = Run(Path(), study, table)
        settings, length = study.screen, 128
        sequences = max(2, settings.healed_tokens // length) + max(2, settings.judged_tokens // length)
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "bf16 GB": found.dense.weight_bytes / 1e9,
                "MACs a token": run.dense.prefill_macs + table.head_macs,
                "memory GB": found.memory_bytes / 1e9,
                "disk GB": found.disk_bytes / 1e9,
                "states GB": 4 * sequences * length * hidden * (layers + 1) / 1e9,
                "MACs of the search": found.seconds,
                "MACs a screened plan": (2 * settings.healed_tokens + settings.judged_tokens)
                * (run.dense.prefill_macs + table.head_macs),
                "reckoned in s": time.perf_counter() - began,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Take the words of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("driver", "workers", "shapes"))
    parser.add_argument("--trials", type=int, nargs="+", default=[30, 300, 1000, 3000])
    parser.add_argument("--driver", type=Path, help="what `driver` wrote")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2, 20, 120])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "driver":
        rows = driver(args.trials)
    elif args.what == "shapes":
        rows = shapes()
    else:
        known = json.loads(args.driver.read_text())
        costs = {what: Cost(tuple((row["trials"], row[what]) for row in known)) for what in (ASKED, TOLD)}
        rows = [
            simulate(n, minutes, costs) for minutes in args.minutes for n in (1, 2, 8, 32, 100, 300, 1000)
        ]
        for row in rows:
            print(json.dumps(row))
    if args.out is not None:
        args.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
