"""Run an export in ExecuTorch and answer questions about it (see `foldsearch.export.engine`)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from foldsearch.runtimes.decoder_answers import TURN_TOKENS, DecoderAnswers
from foldsearch.runtimes.executorch import DECODER, quiet


class Answers(DecoderAnswers):
    """An export in ExecuTorch."""

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
            self.folder, self.decoder = folder, decoder.Decoder(folder, threads=threads)
        room = max(1, self.decoder.context - TURN_TOKENS)
        self.prompt_BT = torch.tensor([tokens[:room]])
        self.decoder.read(self.prompt_BT)
        return {
            "resident_bytes": process.memory_info().rss - before,
            "version": f"executorch {version('executorch')}",
        }

    def score(self, tokens: list[int], first: int) -> dict[str, Any]:
        """The log-probability, in nats, of each token from `first` on, given those before it."""
        logits_BTV, _ = self.decoder.read(torch.tensor([tokens]))
        logs_PV = logits_BTV[0, first - 1 : -1].double().log_softmax(-1)
        found_P = logs_PV.gather(1, torch.tensor(tokens[first:])[:, None])[:, 0]
        return {"log_probabilities": found_P.tolist()}

    def num_written(self, past: Any) -> int:
        """As many tokens as the cache has room for."""
        room: int = self.decoder.context - past.num_tokens
        return min(TURN_TOKENS, room)
