"""Run an export in ExecuTorch and answer questions about it (see `foldsearch.export.engine`)."""

from __future__ import annotations

import statistics
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from foldsearch.runtimes.executorch import DECODER, quiet

TURN_TOKENS = 24  # that are written in a turn


class Answers:
    """An export in ExecuTorch, and the questions that are asked about it: each takes and returns plain JSON."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._folder = ""
        self._decoder: Any = None
        self._prompt_BT: Any = None

    def load(self, folder: str, threads: int, context: int, tokens: list[int]) -> dict[str, Any]:
        """Open the program and read some tokens; how much memory that took.

        context: the program has room for its own. tokens: of a prompt, which is read in every turn.
        """
        import psutil

        with quiet():
            decoder = import_module(DECODER)
        process = psutil.Process()
        before = process.memory_info().rss
        with quiet():
            self._folder, self._decoder = folder, decoder.Decoder(folder, threads=threads)
        room = max(1, self._decoder.context - TURN_TOKENS)
        self._prompt_BT = torch.tensor([tokens[:room]])
        self._decoder.read(self._prompt_BT)
        return {
            "resident_bytes": process.memory_info().rss - before,
            "version": f"executorch {version('executorch')}",
        }

    def score(self, tokens: list[int], first: int) -> dict[str, Any]:
        """The log-probability, in nats, of each token from `first` on, given those before it."""
        logits_BTV, _ = self._decoder.read(torch.tensor([tokens]))
        logs_PV = logits_BTV[0, first - 1 : -1].double().log_softmax(-1)
        found_P = logs_PV.gather(1, torch.tensor(tokens[first:])[:, None])[:, 0]
        return {"log_probabilities": found_P.tolist()}

    def turn(self) -> dict[str, Any]:
        """Tokens per second of reading a prompt and of writing one token after the other, measured now."""
        begin = time.perf_counter()
        logits_BTV, past = self._decoder.read(self._prompt_BT)
        prompt = self._prompt_BT.shape[1] / (time.perf_counter() - begin)
        seconds = []
        for _ in range(min(TURN_TOKENS, self._decoder.context - past.num_tokens)):
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
