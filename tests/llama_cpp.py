"""Ask llama.cpp in processes of its own; see tests/ask_llama_cpp.py for what can be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROCESSES = 5
PROGRAM = Path(__file__).with_name("ask_llama_cpp.py")


def ask_llama_cpp(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What llama.cpp answers; see tests/ask_llama_cpp.py."""
    answers: list[dict[str, Any]] = []
    said = b""
    # A server of its has stopped answering once, after dozens of models in one process: another process goes on then.
    for _ in range(PROCESSES):
        try:
            done = subprocess.run(
                [sys.executable, str(PROGRAM)],
                input="\n".join(json.dumps(job) for job in jobs[len(answers) :]).encode(),
                capture_output=True,
                check=False,
                timeout=90,
            )
            output, said = done.stdout, done.stderr
        except subprocess.TimeoutExpired as stuck:
            output, said = stuck.stdout or b"", stuck.stderr or b""
        answers += [
            json.loads(line) for line in output.splitlines() if line.startswith(b"{") and line.endswith(b"}")
        ]
        if len(answers) == len(jobs):
            return answers
    raise AssertionError(said[-3000:].decode(errors="replace"))
