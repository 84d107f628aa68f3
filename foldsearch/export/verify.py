"""Load a model folder in this process and answer questions about it: the fresh-process half of the verification.

It runs as a script of its own, `python verify.py alone`, also where foldsearch is not installed: so it needs torch and
transformers only. Each line on its standard input is a question in JSON, `{"what": name, ...}`, which a method of
`Answers` of that name answers, in one line of JSON on its standard output. It ends when its input ends. The process
that exports calls the same functions for its reference figures.

Shapes: N sequences, B of them at once, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import traceback
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BATCH = 4  # sequences at once; the same on both sides, since kernels may round differently for another shape
COMPARED_SEQUENCES, COMPARED_TOKENS = 2, 128  # whose logits are compared
DECODED_TOKENS = 16  # decoded one by one
PROMPT_TOKENS = 256  # that are read in a turn
TURN_TOKENS, TURN_SECONDS = 6, 2.0  # that are written in a turn, until either is reached


@torch.no_grad()
def compared_logits(model: Any, ids_NT: Tensor) -> Tensor:
    """Logits (B, T, V) of the first tokens of the first sequences, in the model's dtype."""
    ids_BT = ids_NT[:COMPARED_SEQUENCES, :COMPARED_TOKENS]
    logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV


@torch.no_grad()
def decode_difference(model: Any, ids_NT: Tensor) -> float:
    """How far token-by-token decoding with the KV cache is from one full forward: RMS of the difference / RMS."""
    ids_BT = ids_NT[:1, :DECODED_TOKENS]
    full_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    cache, steps = None, []
    for token in range(ids_BT.shape[1]):
        output = model(input_ids=ids_BT[:, token : token + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits.float())
    return relative_rms(torch.cat(steps, 1), full_BTV)


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    """RMS of the difference over RMS of `theirs`."""
    difference = (ours.float() - theirs.float()).pow(2).mean().sqrt()
    return float(difference / theirs.float().pow(2).mean().sqrt().clamp_min(1e-30))


@torch.no_grad()
def perplexity(model: Any, ids_NT: Tensor, text_NT: Tensor) -> float:
    """Perplexity: e to the mean next-token loss (nats) over all tokens of the text; the loss is taken in float32.

    text_NT: bool, whether a token is of the text, not one that the tokenizer puts in front of it.
    """
    total = 0.0
    for ids_BT, text_BT in zip(ids_NT.split(BATCH), text_NT.split(BATCH), strict=True):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        # one sequence's float32 logits at a time
        for logits_TV, ids_T, text_T in zip(logits_BTV, ids_BT, text_BT, strict=True):
            loss_P = functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
            total += float(loss_P[text_T[1:]].sum())
    loss = total / int(text_NT[:, 1:].sum())
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def turn(model: Any, ids_NT: Tensor) -> tuple[float, float]:
    """Tokens per second of a moment: reading a prompt, and writing one token after the other (the median token)."""
    prompt_BT = ids_NT[:1, :PROMPT_TOKENS]
    start = time.perf_counter()
    model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    prompt = prompt_BT.shape[1] / (time.perf_counter() - start)
    output = model(input_ids=prompt_BT[:, :DECODED_TOKENS], use_cache=True, logits_to_keep=1)
    seconds: list[float] = []
    while len(seconds) < TURN_TOKENS and sum(seconds) < TURN_SECONDS:
        next_BT = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=next_BT, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return prompt, 1 / statistics.median(seconds)


def wrong_keys(info: dict[str, Any]) -> list[str]:
    """Every key that loading found missing, unexpected or of another shape (`output_loading_info` of transformers)."""
    return sorted(f"{kind.removesuffix('_keys')}: {key}" for kind, keys in info.items() for key in keys)


def _resident_bytes() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


class Answers:
    """A model folder, and the questions that are asked about it: each method takes and returns plain JSON."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._model: Any = None
        self._given: dict[str, Tensor] = {}

    def is_refused(self, folder: str) -> dict[str, Any]:
        """Whether transformers refuses the folder when it may not run the folder's own code."""
        import transformers

        auto: Any = transformers.AutoModelForCausalLM
        try:
            auto.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError):
            return {"refused": True}
        return {"refused": False}

    def load(
        self, folder: str, dtype: str, attention: str, threads: int, tensors: str, how: str = ""
    ) -> dict[str, Any]:
        """Load the model, let it read a few tokens, and compare its logits with those in the file `tensors`.

        how: by what: "" by transformers, "own code" by transformers with the folder's code, else the name of a module
        with a `load` (see `foldsearch.runtimes.Loader`).
        """
        import transformers
        from safetensors.torch import load_file
        from transformers.utils import logging

        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        torch.set_num_threads(threads)
        self._given = load_file(tensors)
        before = _resident_bytes()
        if how in ("", "own code"):
            auto: Any = transformers.AutoModelForCausalLM
            model, info = auto.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                trust_remote_code=how == "own code",
                output_loading_info=True,
            )
            wrong = wrong_keys(info)
        else:
            model, wrong = import_module(how).load(folder, dtype, attention)
        self._model = model.eval()
        logits_BTV = compared_logits(model, self._given["ids_NT"])
        after = _resident_bytes()
        given_BTV = self._given.pop("logits_BTV", logits_BTV)  # the dense model has none to be compared with
        return {
            "wrong_keys": wrong,
            "resident_bytes": None if before is None or after is None else after - before,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "logits_max_difference": float((logits_BTV.float() - given_BTV.float()).abs().max()),
            "logits_difference": relative_rms(logits_BTV, given_BTV),
        }

    def quality(self) -> dict[str, Any]:
        """How far decoding is from one full forward, and the perplexity."""
        return {
            "decode_difference": decode_difference(self._model, self._given["ids_NT"]),
            "perplexity": perplexity(self._model, self._given["ids_NT"], self._given["text_NT"]),
        }

    def turn(self) -> dict[str, Any]:
        """Tokens per second, measured now."""
        prompt, decode = turn(self._model, self._given["ids_NT"])
        return {"prompt": prompt, "decode": decode}


def main(where: str, answers_of: str = "") -> None:
    """Answer until the input ends.

    Args:
        where: "alone": foldsearch cannot be imported, as where it is not installed.
        answers_of: the module whose `Answers` are asked; empty for those of this one.
    """
    if where == "alone":
        sys.modules["foldsearch"] = None  # type: ignore[assignment]  # an import of it now fails
    else:
        from foldsearch.model.register import register

        register()
    # The channel is ours alone: whatever a library prints goes to the log, and one that asks gets no answer.
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    answers = import_module(answers_of).Answers() if answers_of else Answers()
    for line in questions:
        question = json.loads(line)
        try:
            answer = getattr(answers, question.pop("what"))(**question)
        except Exception as error:
            answer = {"failed": _words(error)}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


def _words(error: Exception) -> str:
    try:
        from foldsearch.errors import describe_error
    except ImportError:
        return "".join(traceback.format_exception(error)).strip()
    return describe_error(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
