"""Run a decoder in onnxruntime: needs numpy, onnxruntime and, for text, tokenizers.

    python onnx_decoder.py "The state of our union"

An export to ONNX holds this file, so that it runs where neither torch nor transformers is. The graph takes token ids
and the keys and values of the tokens before them, and gives logits and the keys and values after them.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

GRAPH = "model.onnx"
STATE_IN, STATE_OUT = "input.", "output."  # before the names of keys and values that go in, and that come out
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True, slots=True)
class Past:
    """What was read: how many tokens, and their keys and values by the names of the graph's inputs."""

    num_tokens: int = 0
    state: dict[str, Any] = field(default_factory=dict)


class Decoder:
    """A decoder with its KV cache.

    session: of onnxruntime. stops: the tokens that end a text, as generation_config.json has them.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0) -> None:
        """Open the graph of a folder. threads: of onnxruntime; 0 leaves them to it."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(Path(folder) / GRAPH), options, providers=["CPUExecutionProvider"]
        )
        settings = Path(folder) / "generation_config.json"
        told = (
            json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id")
            if settings.is_file()
            else None
        )
        self.stops = frozenset(told if isinstance(told, list) else [] if told is None else [told])
        self._inputs = self.session.get_inputs()
        self._outputs = [output.name for output in self.session.get_outputs()]

    def read(self, ids_BT: Any, past: Past | None = None) -> tuple[Any, Past]:
        """Read tokens after those of `past`: float32 logits (B, T, V), and all that was read so far.

        ids_BT: int64.
        """
        batch, length = ids_BT.shape
        past = past or Past(state=self._nothing(batch))
        after = past.num_tokens + length
        given = {
            "input_ids": ids_BT,
            "position_ids": np.tile(np.arange(past.num_tokens, after, dtype=np.int64), (batch, 1)),
            "attention_mask": np.ones((batch, after), dtype=np.int64),
            **past.state,
        }
        found = self.session.run(self._outputs, {one.name: given[one.name] for one in self._inputs})
        named = dict(zip(self._outputs, found, strict=True))
        logits_BTV = named.pop("logits").astype(np.float32)
        return logits_BTV, Past(after, {STATE_IN + name[len(STATE_OUT) :]: named[name] for name in named})

    def write(
        self, ids: list[int], num_tokens: int, *, stops: frozenset[int] = frozenset(), penalty: float = 1.0
    ) -> list[int]:
        """The likeliest next tokens after some, until one of `stops`.

        penalty: above 1 makes tokens that were there less likely (`repetition_penalty` of transformers).
        """
        logits_BTV, past = self.read(np.asarray([ids], dtype=np.int64))
        written: list[int] = []
        while len(written) < num_tokens:
            last_V, seen = logits_BTV[0, -1], [*ids, *written]
            last_V[seen] = np.where(last_V[seen] > 0, last_V[seen] / penalty, last_V[seen] * penalty)
            token = int(last_V.argmax())
            if token in stops:
                break
            written.append(token)
            logits_BTV, past = self.read(np.asarray([[token]], dtype=np.int64), past)
        return written

    def _nothing(self, batch: int) -> dict[str, Any]:
        """Keys and values of no tokens: sizes that the graph leaves open are the batch, then none."""
        found = {}
        for one in self._inputs:
            if one.name.startswith(STATE_IN):
                known = [int(size) if str(size).isdigit() else 0 for size in one.shape]
                found[one.name] = np.zeros([batch, *known[1:]] if known else [], dtype=_NUMPY[one.type])
        return found


def main() -> None:
    """Go on with a text."""
    from tokenizers import Tokenizer

    folder = Path(__file__).parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(sys.argv[1]).ids
    decoder = Decoder(folder)
    print(tokenizer.decode(ids + decoder.write(ids, 40, stops=decoder.stops)))


if __name__ == "__main__":
    main()
