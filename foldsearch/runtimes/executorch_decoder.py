"""Run a decoder in ExecuTorch: needs executorch, torch and, for text, tokenizers.

    python executorch_decoder.py "The state of our union"

An export to ExecuTorch holds this file, so that it runs where transformers is not. The program takes token ids, which
earlier tokens each may look at, their positions, and a cache for as many tokens as the export was made for; it gives
logits and the cache after them.

Shapes: B = 1 sequence, T tokens, V vocabulary, C tokens of the cache.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from executorch.runtime import Runtime
from torch import Tensor

PROGRAM, SETTINGS = "model.pte", "executorch.json"
INT64, FLOAT32, BOOL = 4, 6, 11  # by the numbers that torch gives its types
_DTYPES = {INT64: torch.int64, FLOAT32: torch.float32}


@dataclass(frozen=True, slots=True)
class Past:
    """What was read: how many tokens, and the cache, a tensor for each of the program's inputs."""

    num_tokens: int = 0
    cache: list[Tensor] = field(default_factory=list)


class Decoder:
    """A decoder with its KV cache. stops: the tokens that end a text, as generation_config.json has them."""

    def __init__(self, folder: str | Path, *, threads: int = 0) -> None:
        """Open the program of a folder. threads: of ExecuTorch in this process; 0 leaves them to it."""
        if threads:
            _unsafe_reset_threadpool(threads)
        settings = json.loads((Path(folder) / SETTINGS).read_text())
        path = Path(folder) / "generation_config.json"
        told_stops = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        self.stops = frozenset(
            told_stops if isinstance(told_stops, list) else [] if told_stops is None else [told_stops]
        )
        self.context: int = settings["context"]
        self.chunk: int = settings["chunk"]
        self.num_parameters: int = settings["num_parameters"]
        # the runtime reads the program where it lies, so it is kept as long as its method
        self._program = Runtime.get().load_program(Path(folder) / PROGRAM)
        self._method = self._program.load_method("forward")
        about = self._method.metadata
        told = [about.input_tensor_meta(i) for i in range(about.num_inputs())]
        # In which order a family is given these differs; of the rest is the cache.
        self._ids, self._positions = (
            i for i, one in enumerate(told) if one.dtype() == INT64 and len(one.sizes()) == 2
        )
        (self._mask,) = (i for i, one in enumerate(told) if one.dtype() == BOOL)
        self._cache = {
            i: torch.zeros(tuple(one.sizes()), dtype=_DTYPES[one.dtype()])
            for i, one in enumerate(told)
            if i not in (self._ids, self._positions, self._mask)
        }

    @torch.no_grad()
    def read(self, ids_BT: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Read tokens after those of `past`: float32 logits (B, T, V), and all that was read so far.

        ids_BT: int64, of one sequence.

        Raises:
            ValueError: the cache has no room for so many tokens, or there are several sequences.
        """
        past = past or Past(cache=list(self._cache.values()))
        if len(ids_BT) != 1:
            raise ValueError(f"this program reads one sequence at a time, got {len(ids_BT)}")
        if past.num_tokens + ids_BT.shape[1] > self.context:
            raise ValueError(
                f"the cache of this program has room for {self.context} tokens, and {past.num_tokens} were read; got "
                f"{ids_BT.shape[1]} more"
            )
        found = []
        for some_BT in ids_BT.split(self.chunk, 1):
            logits_BTV, past = self._step(some_BT.contiguous(), past)
            found.append(logits_BTV)
        return torch.cat(found, 1), past

    def _step(self, ids_BT: Tensor, past: Past) -> tuple[Tensor, Past]:
        position_T = torch.arange(past.num_tokens, past.num_tokens + ids_BT.shape[1])
        seen_TC = torch.arange(self.context) <= position_T[:, None]
        given = {self._ids: ids_BT, self._positions: position_T[None], self._mask: seen_TC[None, None]}
        given |= dict(zip(self._cache, past.cache, strict=True))
        outputs = self._method.execute([given[i] for i in sorted(given)])
        # the cache comes first, as what of the inputs was changed; the runtime uses its memory again
        cache = [one.clone() for one in outputs[: len(past.cache)]]
        return outputs[len(past.cache)].clone(), Past(past.num_tokens + ids_BT.shape[1], cache)

    def write(
        self, ids: list[int], num_tokens: int, *, stops: frozenset[int] = frozenset(), penalty: float = 1.0
    ) -> list[int]:
        """The likeliest next tokens after some, until one of `stops`, or the cache is full.

        penalty: above 1 makes tokens that were there less likely (`repetition_penalty` of transformers).
        """
        logits_BTV, past = self.read(torch.tensor([ids]))
        written: list[int] = []
        while len(written) < num_tokens:
            last_V, seen = logits_BTV[0, -1], [*ids, *written]
            last_V[seen] = torch.where(last_V[seen] > 0, last_V[seen] / penalty, last_V[seen] * penalty)
            token = int(last_V.argmax())
            if token in stops:
                break
            written.append(token)
            if past.num_tokens == self.context:
                break
            logits_BTV, past = self.read(torch.tensor([[token]]), past)
        return written


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
