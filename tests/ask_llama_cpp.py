"""Ask llama.cpp what it makes of GGUF files: a program of its own, since its threads end only with the process.

Reads jobs as JSON from its input, one object a line: the file, the tokens of several prompts, texts to be cut, the
context that memory is taken for, and the type of the cache (f32 where none is named). Writes one object a line: for
each prompt the log-probabilities of every next token, and for each text its tokens.
"""

import json
import os
import sys
import urllib.request

import xllamacpp


def ask(job: dict) -> dict:
    params = xllamacpp.CommonParams()
    params.model.path = job["file"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    # All numbers in 32 bits: the cache is in 16 by default, and so are some products of flash attention.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if kv_cache := job.get("kv_cache"):
        kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kv_cache.upper()}")
        params.cache_type_k = params.cache_type_v = kind
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO
    # One thread: more of them wait in a loop for each other, which on a busy machine takes seconds a token.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    answers = []
    for prompt in job["prompts"]:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": job["vocabulary"], "temperature": 0}
        answer = server.handle_completions(request | {"cache_prompt": False})
        assert "choices" in answer, answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        answers.append({entry["id"]: entry["logprob"] for entry in top})
    return {"prompts": answers, "texts": [tokenize(server, text) for text in job.get("texts", [])]}


def tokenize(server: xllamacpp.Server, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    address = server.listening_address + "/tokenize"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["tokens"]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(ask(json.loads(line))), flush=True)
    os._exit(0)  # its threads would keep the process
