"""Run an export in onnxruntime and answer questions about it (see `foldsearch.export.engine`)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from foldsearch.runtimes.decoder_answers import DecoderAnswers
from foldsearch.runtimes.onnx_decoder import Decoder


class Answers(DecoderAnswers):
    """An export in onnxruntime."""

    def load(self, folder: str, threads: int, context: int, tokens: list[int]) -> dict[str, Any]:
        """Open the graph and read some tokens; how much memory that took.

        context: its cache grows with what is read, so it is not asked. tokens: of a prompt, which is read in
        every turn.
        """
        import psutil

        process = psutil.Process()
        before = process.memory_info().rss
        self.folder, self.decoder = folder, Decoder(folder, threads=threads)
        self.prompt_BT = np.asarray([tokens], dtype=np.int64)
        self.decoder.read(self.prompt_BT)
        return {
            "resident_bytes": process.memory_info().rss - before,
            "version": f"onnxruntime {version('onnxruntime')}",
        }

    def score(self, tokens: list[int], first: int) -> dict[str, Any]:
        """The log-probability, in nats, of each token from `first` on, given those before it."""
        logits_BTV, _ = self.decoder.read(np.asarray([tokens], dtype=np.int64))
        logits_PV = logits_BTV[0, first - 1 : -1].astype(np.float64)
        largest_P1 = logits_PV.max(-1, keepdims=True)
        normaliser_P = np.log(np.exp(logits_PV - largest_P1).sum(-1)) + largest_P1[:, 0]
        found_P = logits_PV[np.arange(len(logits_PV)), tokens[first:]] - normaliser_P
        return {"log_probabilities": found_P.tolist()}
