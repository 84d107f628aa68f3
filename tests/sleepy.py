"""A program for exports that does not answer as often as the file named SLEEPS says; see export/engine.py."""

import os
import time
from pathlib import Path
from typing import Any


class Answers:
    def load(self, **given: Any) -> dict[str, Any]:
        left = Path(os.environ["SLEEPS"])
        if (count := int(left.read_text())) > 0:
            left.write_text(str(count - 1))
            time.sleep(600)
        return {"resident_bytes": 1, "version": "awake"}

    def score(self, tokens: list[int], first: int) -> dict[str, Any]:
        return {"log_probabilities": [-1.0] * (len(tokens) - first)}
