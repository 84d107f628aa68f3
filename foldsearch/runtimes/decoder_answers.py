"""What is asked alike of every export that comes with a `Decoder` of its own: speed, a text, a chat.

The runtimes that have one load an export and score its tokens each in a way of its own (`onnx_runtime.py`,
`executorch_runtime.py`); what follows from reading and writing with a decoder is here (see `foldsearch.export.engine`).

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

TURN_TOKENS = 24  # that are written in a turn
PENALTY = 1.2  # on logits of tokens that were there, as transformers' `repetition_penalty` has it


class DecoderAnswers:
    """An export in its decoder, and the questions that are asked about it: each takes and returns plain JSON.

    folder: of the export. decoder: the `Decoder` that came with it. prompt_BT: tokens that are read in a turn. All are
    set by the `load` of a runtime.
    """

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self.folder = ""
        self.decoder: Any = None
        self.prompt_BT: Any = None

    def num_written(self, past: Any) -> int:
        """How many tokens are written in a turn after what was read."""
        return TURN_TOKENS

    def turn(self) -> dict[str, Any]:
        """Tokens per second of reading a prompt and of writing one token after the other, measured now."""
        begin = time.perf_counter()
        logits_BTV, past = self.decoder.read(self.prompt_BT)
        prompt = self.prompt_BT.shape[1] / (time.perf_counter() - begin)
        seconds = []
        for _ in range(self.num_written(past)):
            begin = time.perf_counter()
            logits_BTV, past = self.decoder.read(logits_BTV[:, -1:].argmax(-1), past)
            seconds.append(time.perf_counter() - begin)
        return {"prompt": prompt, "decode": 1 / statistics.median(seconds)}

    def write(self, text: str, num_tokens: int) -> dict[str, Any]:
        """How the model goes on after a text: as elsewhere the likeliest token, those that were there less so."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(self.folder) / "tokenizer.json"))
        ids = tokenizer.encode(text).ids
        written = self.decoder.write(ids, num_tokens, stops=self.decoder.stops, penalty=PENALTY)
        return {"text": tokenizer.decode(written)}

    def chat(self, messages: list[dict[str, str]], num_tokens: int) -> dict[str, Any]:
        """A chat through the tokenizer's template, and the likeliest answer (see `foldsearch.runtimes.verify`).

        The answer is empty where the program's cache has no room for the question.
        """
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        # a program with a cache of its own has room for so many tokens; no answer fits after a longer question
        fits = len(ids) <= getattr(self.decoder, "context", len(ids))
        written = self.decoder.write(ids, num_tokens, stops=self.decoder.stops) if fits else []
        return {
            "prompt": prompt,
            "stops": sorted(self.decoder.stops),
            "text": tokenizer.decode(written, skip_special_tokens=True),
        }
