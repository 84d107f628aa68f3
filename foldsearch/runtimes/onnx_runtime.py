"""Run an export in onnxruntime and answer questions about it (see `foldsearch.export.engine`)."""

from __future__ import annotations

import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from foldsearch.runtimes.onnx_decoder import Decoder

TURN_TOKENS = 24  # that are written in a turn


class Answers:
    """An export in onnxruntime, and the questions that are asked about it: each takes and returns plain JSON."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._folder = ""
        self._decoder: Any = None
        self._prompt_BT: Any = None

    def load(self, folder: str, threads: int, context: int, tokens: list[int]) -> dict[str, Any]:
        """Open the graph and read some tokens; how much memory that took.

        context: its cache grows with what is read, so it is not asked. tokens: of a prompt, which is read in
        every turn.
        """
        import psutil

        process = psutil.Process()
        before = process.memory_info().rss
        self._folder, self._decoder = folder, Decoder(folder, threads=threads)
        self._prompt_BT = np.asarray([tokens], dtype=np.int64)
        self._decoder.read(self._prompt_BT)
        return {
            "resident_bytes": process.memory_info().rss - before,
            "version": f"onnxruntime {version('onnxruntime')}",
        }

    def score(self, tokens: list[int], first: int) -> dict[str, Any]:
        """The log-probability, in nats, of each token from `first` on, given those before it."""
        logits_BTV, _ = self._decoder.read(np.asarray([tokens], dtype=np.int64))
        logits_PV = logits_BTV[0, first - 1 : -1].astype(np.float64)
        largest_P1 = logits_PV.max(-1, keepdims=True)
        normaliser_P = np.log(np.exp(logits_PV - largest_P1).sum(-1)) + largest_P1[:, 0]
        found_P = logits_PV[np.arange(len(logits_PV)), tokens[first:]] - normaliser_P
        return {"log_probabilities": found_P.tolist()}

    def turn(self) -> dict[str, Any]:
        """Tokens per second of reading a prompt and of writing one token after the other, measured now."""
        begin = time.perf_counter()
        logits_BTV, past = self._decoder.read(self._prompt_BT)
        prompt = self._prompt_BT.shape[1] / (time.perf_counter() - begin)
        seconds = []
        for _ in range(TURN_TOKENS):
            begin = time.perf_counter()
            logits_BTV, past = self._decoder.read(logits_BTV[:, -1:].argmax(-1), past)
            seconds.append(time.perf_counter() - begin)
        return {"prompt": prompt, "decode": 1 / statistics.median(seconds)}

    def write(self, text: str, num_tokens: int) -> dict[str, Any]:
        """How the model goes on after a text, the likeliest token each time."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(self._folder) / "tokenizer.json"))
        written = self._decoder.write(tokenizer.encode(text).ids, num_tokens)
        return {"text": tokenizer.decode(written)}

    def chat(self, messages: list[dict[str, str]], num_tokens: int) -> dict[str, Any]:
        """A chat through the tokenizer's template, and the likeliest answer (see `foldsearch.runtimes.verify`)."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self._folder)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        written = self._decoder.write(ids, num_tokens, stops=self._decoder.stops)
        return {
            "prompt": prompt,
            "stops": sorted(self._decoder.stops),
            "text": tokenizer.decode(written, skip_special_tokens=True),
        }
