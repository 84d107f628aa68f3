"""Run a GGUF file in llama.cpp itself and answer questions about it (see `foldsearch.export.engine`).

llama.cpp comes as the package xllamacpp: a server inside the process, which listens on 127.0.0.1, at a port that is
free, and lets nobody in without a key that nobody knows.
"""

from __future__ import annotations

import json
import secrets
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from foldsearch.runtimes.decoder_answers import TURN_TOKENS

_WINS = 1e6  # added to a logit
_STOPS = ("eos", "eot", "eom")  # of a text, a turn, a message: each ends an answer


def stop_tokens(file: Path) -> list[int]:
    """The tokens that end an answer, as the file's metadata has them."""
    from foldsearch.model.gguf.file import read_gguf

    metadata = read_gguf((file,)).metadata
    found = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _STOPS)
    return sorted({int(token) for token in found if token is not None})


class Answers:
    """A GGUF file in llama.cpp, and the questions that are asked about it: each takes and returns plain JSON."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._server: Any = None
        self._prompt: list[int] = []
        self._key = secrets.token_hex(16)
        self._stops: list[int] = []

    def load(
        self, folder: str, threads: int, context: int, tokens: list[int], kv_cache: str = ""
    ) -> dict[str, Any]:
        """Load the file and read some tokens; how much memory that took.

        context: tokens that memory is taken for, in one sequence. tokens: of a prompt, which is read in
        every turn. kv_cache: the type of the cache; empty for llama.cpp's own, f16.
        """
        import psutil
        import xllamacpp

        (file,) = Path(folder).glob("*.gguf")
        process = psutil.Process()
        before = process.memory_info().rss
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel = context, 1
        settings.warmup, settings.verbosity = False, -1
        settings.api_keys = [self._key]
        if kv_cache:
            kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kv_cache.upper()}")
            settings.cache_type_k = settings.cache_type_v = kind
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        self._stops = stop_tokens(file)
        self._server = xllamacpp.Server(settings)
        self._prompt = tokens
        self._complete(self._prompt, n_predict=1)
        return {
            "resident_bytes": process.memory_info().rss - before,
            "version": f"xllamacpp {version('xllamacpp')}",
        }

    def score(self, tokens: list[int], first: int) -> dict[str, Any]:
        """The log-probability, in nats, of each token from `first` on, given those before it.

        The server tells it of tokens that it writes, so each is made to win; what is told is from before that. It says
        nothing of a token that is part of a letter: None.
        """
        found: list[float | None] = []
        for position in range(first, len(tokens)):
            token = tokens[position]
            answer = self._complete(
                tokens[:position], n_predict=1, n_probs=1, logit_bias=[[token, _WINS]], cache_prompt=True
            )
            content = (answer["choices"][0]["logprobs"] or {}).get("content")
            if content and content[0]["id"] != token:
                raise RuntimeError(f"the server wrote the token {content[0]['id']}, not {token}")
            found.append(content[0]["logprob"] if content else None)
        return {"log_probabilities": found}

    def turn(self) -> dict[str, Any]:
        """Tokens per second of reading a prompt and of writing one token after the other, measured now."""
        timings = self._complete(self._prompt, n_predict=TURN_TOKENS, ignore_eos=True)["timings"]
        written = timings["predicted_n"] - 1  # the first comes with the prompt
        return {
            "prompt": timings["prompt_per_second"],
            "decode": 1000 * written / timings["predicted_ms"],
        }

    def write(self, text: str, num_tokens: int) -> dict[str, Any]:
        """How the model goes on after a text, the likeliest token each time."""
        answer = self._complete(text, n_predict=num_tokens, repeat_penalty=1.2)
        return {"text": answer["choices"][0]["text"]}

    def chat(self, messages: list[dict[str, str]], num_tokens: int) -> dict[str, Any]:
        """A chat through the file's template, and the likeliest answer (see `foldsearch.runtimes.verify`)."""
        request = {"messages": messages, "temperature": 0, "max_tokens": num_tokens, "cache_prompt": False}
        answer = self._checked(self._server.handle_chat_completions(request))
        return {
            "prompt": self._rendered(messages),
            "stops": self._stops,
            "text": answer["choices"][0]["message"].get("content") or "",
        }

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """The chat as text, which only the server's address tells."""
        request = urllib.request.Request(
            f"{self._server.listening_address}/apply-template",
            json.dumps({"messages": messages}).encode(),
            {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return str(json.load(reply)["prompt"])

    def _complete(self, prompt: Any, **more: Any) -> dict[str, Any]:
        request = {"prompt": prompt, "temperature": 0, "cache_prompt": False, **more}
        return self._checked(self._server.handle_completions(request))

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        if "choices" not in answer:
            raise RuntimeError(f"the server of llama.cpp refused: {json.dumps(answer)[:500]}")
        return answer
