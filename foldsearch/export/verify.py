"""Load a model folder in this process and measure it: the fresh-process half of the verification.

It runs as a script of its own, `python verify.py REQUEST`, also where foldsearch is not installed: so it needs torch
and transformers only. REQUEST is a JSON file; the answer is written beside it, under the name it gives. The process
that exports calls the same functions for its reference figures.

Shapes: N sequences, B of them at once, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

BATCH = 4  # sequences at once; the same on both sides, since kernels may round differently for another shape
COMPARED_SEQUENCES, COMPARED_TOKENS = 2, 128  # whose logits are compared
DECODED_TOKENS = 16  # decoded one by one
TIMED_TOKENS, TIMED_SECONDS = 32, 4.0  # decoding is timed until either is reached


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
def speed(model: Any, ids_NT: Tensor) -> tuple[float, float]:
    """Tokens per second: reading a prompt (best of two), and decoding one sequence with the KV cache (the median)."""
    prompt_BT = ids_NT[:1, :256]
    prefill = math.inf
    for _ in range(2):
        start = time.perf_counter()
        model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
        prefill = min(prefill, time.perf_counter() - start)
    output = model(input_ids=prompt_BT[:, :DECODED_TOKENS], use_cache=True, logits_to_keep=1)
    seconds: list[float] = []
    while len(seconds) < TIMED_TOKENS and sum(seconds) < TIMED_SECONDS:
        next_BT = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=next_BT, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return prompt_BT.shape[1] / prefill, 1 / statistics.median(seconds)


def wrong_keys(info: dict[str, Any]) -> list[str]:
    """Every key that loading found missing, unexpected or of another shape (`output_loading_info` of transformers)."""
    return sorted(f"{kind.removesuffix('_keys')}: {key}" for kind, keys in info.items() for key in keys)


def _resident_bytes() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def _check(request: dict[str, Any]) -> dict[str, Any]:
    """Load the folder as the request says, and measure what it asks for."""
    import transformers
    from safetensors.torch import load_file
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    auto: Any = transformers.AutoModelForCausalLM
    torch.set_num_threads(request["threads"])
    answer: dict[str, Any] = {}
    folder: str = request["folder"]
    if request["without_foldsearch"]:
        try:
            auto.from_pretrained(folder, trust_remote_code=False)
            answer["refused_without_code"] = False
        except (ValueError, KeyError, OSError):
            answer["refused_without_code"] = True
    given = load_file(request["tensors"])
    ids_NT = given["ids_NT"]
    before = _resident_bytes()
    model, info = auto.from_pretrained(
        folder,
        dtype=getattr(torch, request["dtype"]),
        attn_implementation=request["attention"],
        trust_remote_code=request["without_foldsearch"],
        output_loading_info=True,
    )
    model.eval()
    answer["model_class"] = type(model).__name__
    answer["wrong_keys"] = wrong_keys(info)
    logits_BTV = compared_logits(model, ids_NT)
    after = _resident_bytes()
    answer["resident_bytes"] = None if before is None or after is None else after - before
    answer["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    if "logits_BTV" in given:
        answer["logits_max_difference"] = float(
            (logits_BTV.float() - given["logits_BTV"].float()).abs().max()
        )
        answer["logits_difference"] = relative_rms(logits_BTV, given["logits_BTV"])
    if request["measure"]:
        answer["decode_difference"] = decode_difference(model, ids_NT)
        answer["perplexity"] = perplexity(model, ids_NT, given["text_NT"])
        answer["prefill_tokens_per_second"], answer["decode_tokens_per_second"] = speed(model, ids_NT)
    return answer


def main(path: str) -> None:
    """Do what the request in the file `path` asks, and write the answer where it says."""
    request = json.loads(Path(path).read_text())
    if request["without_foldsearch"]:
        sys.modules["foldsearch"] = None  # type: ignore[assignment]  # an import of it now fails
    else:
        from foldsearch.model.register import register

        register()
    Path(request["answer"]).write_text(json.dumps(_check(request)))


if __name__ == "__main__":
    main(sys.argv[1])
