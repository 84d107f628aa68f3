"""Load a model folder in this process and answer questions about it: the fresh-process half of the verification.

It runs as a script of its own, `python verify.py alone`, also where foldsearch is not installed: so it needs torch and
transformers only. Each line on its standard input is a question in JSON, `{"what": name, ...}`, which a method of
`Answers` of that name answers, in one line of JSON on its standard output. It ends when its input ends. The process
that exports calls the same functions for its reference figures.

Shapes: N sequences, B of them at once, T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
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
PROMPT_TOKENS = 256  # that are read in a turn, where nobody says another number
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
def log_probabilities(model: Any, ids_NT: Tensor) -> Tensor:
    """(N, T − 1), float32, nats: of each token after the first of its sequence, given those before it."""
    found = []
    for ids_BT in ids_NT.split(BATCH):
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        # one sequence's float32 logits at a time
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True):
            found.append(-functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none"))
    return torch.stack(found)


def perplexity(log_probabilities_NP: Tensor, text_NT: Tensor) -> float:
    """Perplexity: e to the mean next-token loss (nats) over all tokens of the text.

    text_NT: bool, whether a token is of the text, not one that the tokenizer puts in front of it.
    """
    loss = -float(log_probabilities_NP[text_NT[:, 1:]].double().mean())
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def turn(model: Any, prompt_BT: Tensor) -> tuple[float, float]:
    """Tokens per second of a moment: reading a prompt, and writing one token after the other (the median token)."""
    start = time.perf_counter()
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    prompt = prompt_BT.shape[1] / (time.perf_counter() - start)
    seconds: list[float] = []
    while len(seconds) < TURN_TOKENS and sum(seconds) < TURN_SECONDS:
        next_BT = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        output = model(input_ids=next_BT, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return prompt, 1 / statistics.median(seconds)


def prompt_of(tokens: list[int], length: int) -> list[int]:
    """A prompt of so many tokens, which begin again where there are fewer."""
    return (tokens * -(-length // len(tokens)))[:length]


def wrong_keys(info: dict[str, Any]) -> list[str]:
    """Every key that loading found missing, unexpected or of another shape (`output_loading_info` of transformers)."""
    return sorted(f"{kind.removesuffix('_keys')}: {key}" for kind, keys in info.items() for key in keys)


def auto_class(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The class of transformers that loads a folder: one for text models, one for models that also see."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    sees = hasattr(config, "text_config")
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


def stop_tokens(folder: str) -> list[int]:
    """The tokens that end an answer, as generation_config.json of a folder has them; none where it has none."""
    path = os.path.join(folder, "generation_config.json")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return as_stops(json.load(file).get("eos_token_id"))


def as_stops(value: Any) -> list[int]:
    """The tokens that a setting `eos_token_id` names: it may be one, several or none."""
    return (
        [] if value is None else sorted({int(one) for one in (value if isinstance(value, list) else [value])})
    )


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
        self._folder = ""
        self._prompt_tokens = 0
        self._runs_code = False

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
        self,
        folder: str,
        dtype: str,
        attention: str | None,
        threads: int,
        tensors: str,
        how: str = "",
        prompt_tokens: int = 0,
    ) -> dict[str, Any]:
        """Load the model, let it read a few tokens, and compare its logits with those in the file `tensors`.

        Where that file has none, as of the dense model, there is nothing to compare.

        how: by what: "" by transformers, "own code" by transformers with the folder's code, else the name of a module
        with a `load` (see `foldsearch.runtimes.Loader`). prompt_tokens: that are read in a turn; 0 for the first
        sequence, or as much of it as a turn reads.
        """
        from safetensors.torch import load_file
        from transformers.utils import logging

        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        torch.set_num_threads(threads)
        self._given, self._folder, self._runs_code = load_file(tensors), folder, how == "own code"
        length = self._given["ids_NT"].shape[1]
        self._prompt_tokens = prompt_tokens or min(PROMPT_TOKENS, length)
        before = _resident_bytes()
        if how in ("", "own code"):
            auto = auto_class(folder, trust_remote_code=how == "own code")
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
        """How far decoding is from one full forward, the perplexity, and how far log-probabilities are from given ones.

        The latter are means and largest differences over the tokens of the text, in nats; 0 where none were given.
        """
        text_NT = self._given["text_NT"]
        found_NP = log_probabilities(self._model, self._given["ids_NT"])
        given_NP = self._given.get("log_probabilities_NP", found_NP)
        apart = (found_NP - given_NP).abs()[text_NT[:, 1:]]
        return {
            "decode_difference": decode_difference(self._model, self._given["ids_NT"]),
            "perplexity": perplexity(found_NP, text_NT),
            "mean_difference": float(apart.double().mean()),
            "max_difference": float(apart.max()),
        }

    def chat(self, messages: list[dict[str, str]], num_tokens: int) -> dict[str, Any]:
        """A chat through the template of the folder's tokenizer, and the likeliest answer, token after token.

        Returns:
            prompt: the chat as text; stops: the tokens that end an answer; text: the answer.
        """
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=self._runs_code)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        stops = stop_tokens(self._folder)
        written = self._write(ids, num_tokens, frozenset(stops))
        return {
            "prompt": prompt,
            "stops": stops,
            "text": tokenizer.decode(written, skip_special_tokens=True),
        }

    @torch.no_grad()
    def _write(self, ids: list[int], num_tokens: int, stops: frozenset[int]) -> list[int]:
        next_BT, cache = torch.tensor([ids]), None
        written: list[int] = []
        while len(written) < num_tokens:
            output = self._model(input_ids=next_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            next_BT, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            if int(next_BT) in stops:
                break
            written.append(int(next_BT))
        return written

    def turn(self) -> dict[str, Any]:
        """Tokens per second, measured now."""
        tokens = self._given["ids_NT"].flatten().tolist()
        prompt, decode = turn(self._model, torch.tensor([prompt_of(tokens, self._prompt_tokens)]))
        return {"prompt": prompt, "decode": decode}


def main(where: str, answers_of: str = "") -> None:
    """Answer until the input ends.

    Args:
        where: "alone": foldsearch cannot be imported, as where it is not installed.
        answers_of: the module whose `Answers` are asked; empty for those of this one.
    """
    gc.set_threshold(50_000, 20, 20)  # a sixth of an import of transformers is to look through what it made
    if where == "alone":
        sys.modules["foldsearch"] = None  # type: ignore[assignment]  # an import of it now fails
    elif not answers_of:  # other programs know nothing of transformers
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
