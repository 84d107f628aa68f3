"""The hub path, against a small server on loopback that is named by HF_ENDPOINT.

The oracle is the local path: what is read through the hub must equal what is read from the same files on disk.
The client libraries read HF_ENDPOINT when they are imported, so everything under test runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
import zstandard

from foldsearch.model.source import locate, open_dense, open_tokenizer, prepare
from foldsearch.model.text import load_documents

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SENTENCES = [f"Document {index} says that the sea is wide and the night is long." for index in range(12)]


class Hub:
    """The endpoints that the hub's clients ask for, over folders `models/ORG/NAME` and `datasets/ORG/NAME`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.commit = COMMIT  # of every branch
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                hub.requests.append(f"POST {self.path} {sent}")
                # paths-info: which of these paths exist
                path = urlsplit(self.path).path
                if "/paths-info/" not in path:
                    return self._send(404, b"{}")
                folder = hub.folder(path.removeprefix("/api/").partition("/paths-info/")[0])
                asked = json.loads(sent)["paths"] if sent.startswith("{") else parse_qs(sent)["paths"]
                known = [hub.entry(folder, folder / name) for name in asked if (folder / name).exists()]
                return self._send(200, json.dumps(known).encode())

            def _answer(self, *, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                path = unquote(urlsplit(self.path).path)
                if path.startswith("/api/"):
                    return self._api(path.removeprefix("/api/"))
                repo, _, rest = path.strip("/").partition("/resolve/")
                file = hub.folder(repo if repo.startswith("datasets/") else f"models/{repo}")
                file = file / rest.partition("/")[2]
                if not file.is_file():
                    return self._send(
                        404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit}
                    )
                data = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": hub.commit}
                headers["Accept-Ranges"] = "bytes"
                status = 200
                if wanted := self.headers.get("Range"):
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    end = min(int(last) + 1 if last else len(data), len(data))
                    headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                    status, data = 206, data[int(first) : end]
                return self._send(status, data, headers, body=body)

            def _api(self, path: str) -> None:
                kind_and_repo, _, rest = path.partition("/revision/")
                if "/tree/" in path:
                    kind_and_repo, _, rest = path.partition("/tree/")
                folder = hub.folder(kind_and_repo)
                if not folder.is_dir():
                    return self._send(404, b'{"error":"not found"}', {"X-Error-Code": "RepoNotFound"})
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                if "/tree/" in path:
                    below = folder / unquote(rest).partition("/")[2]
                    if not below.is_dir():
                        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    listing = [hub.entry(folder, file) for file in sorted(below.rglob("*"))]
                    return self._send(200, json.dumps(listing).encode())
                info = {
                    "_id": "1",
                    "id": kind_and_repo.partition("/")[2],
                    "sha": rest if rest == COMMIT else hub.commit,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": str(file.relative_to(folder))} for file in files],
                }
                return self._send(200, json.dumps(info).encode())

            def _send(
                self, status: int, data: bytes, headers: dict[str, str] | None = None, *, body: bool = True
            ) -> None:
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body and self.command != "HEAD":
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def folder(self, repo: str) -> Path:
        return self.root / repo

    def entry(self, folder: Path, path: Path) -> dict[str, object]:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        data = path.read_bytes()
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("hub")
    _write_model(root / "models" / "tiny-org" / "tiny-llama")
    data = root / "datasets" / "tiny-org" / "tiny-text"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    packed = root / "datasets" / "tiny-org" / "tiny-packed"
    packed.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in SENTENCES)
    (packed / "train.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    wiki = root / "datasets" / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    wiki.mkdir(parents=True)
    _write_wikitext(wiki / "train-00000-of-00001.parquet")
    (wiki.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: train\n"
        "    path: wikitext-2-raw-v1/train-*\n---\n"
    )
    hub = Hub(root)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def _write_model(folder: Path, seed: int = 0) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    words = sorted({word for text in SENTENCES for word in text.replace(".", " .").split()})
    vocabulary = {word: index for index, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def _write_wikitext(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        "",
        " = One = \n",
        "",
        " First . \n",
        " = = Part = = \n",
        " More . \n",
        "",
        " = Two = \n",
        " Second . \n",
    ]
    pq.write_table(pa.table({"text": rows}), path)


def run(
    code: str, endpoint: str, home: Path, arguments: Sequence[str] = (), **extra: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FOLDSEARCH"))
    }
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "FOLDSEARCH_CACHE": str(home / "cache"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment | extra,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def output(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout)
    assert isinstance(answer, dict)
    return answer


OPEN = """
import json, torch
torch.set_num_threads(1)
from foldsearch.model.source import open_dense, open_tokenizer, prepare
answer = {}
for dtype in ("float32", "bfloat16"):
    files = prepare("tiny-org/tiny-llama", dtype=dtype)
    ids_T = open_tokenizer(files)("the sea is long").input_ids
    with torch.no_grad():
        logits_TV = open_dense(files)(torch.tensor([ids_T])).logits[0].float()
    answer[dtype] = [files.content_hash, ids_T, logits_TV.tolist()]
print(json.dumps(answer))
"""


@pytest.mark.slow
def test_a_hub_model_equals_the_same_files_on_disk(hub: Hub, tmp_path: Path) -> None:
    online = output(run(OPEN, hub.endpoint, tmp_path))
    assert any("tiny-org/tiny-llama/resolve" in request for request in hub.requests)
    for dtype in ("float32", "bfloat16"):
        folder = hub.root / "models" / "tiny-org" / "tiny-llama"
        files = prepare(str(folder), dtype=dtype, cache_dir=tmp_path / "local")
        ids_T = open_tokenizer(files)("the sea is long").input_ids
        with torch.no_grad():
            logits_TV = open_dense(files)(torch.tensor([ids_T])).logits[0].float()
        assert online[dtype] == [files.content_hash, ids_T, logits_TV.tolist()]
    # once fetched, the hub is not needed
    assert output(run(OPEN, hub.endpoint, tmp_path, HF_HUB_OFFLINE="1")) == online


PINNED = """
import json, sys, torch
from pathlib import Path
from foldsearch.identity import Identity
from foldsearch.model.source import locate, prepare
from foldsearch.spec.space import Space
from foldsearch.spec.study import SplitSettings, Study
from foldsearch.prepare import prepare_context
from foldsearch.run import RunFolder
torch.set_num_threads(1)
work = Path(sys.argv[1])
splits = SplitSettings(sequence_length=4, search=2, recovery=2, report=2)
study = Study(model="tiny-org/moving", data=str(work / "texts"), space=Space(), device="cpu", splits=splits)
context = prepare_context(study, work / "run")
made = RunFolder(work / "run").identity()
branch = locate("tiny-org/moving")
pinned = prepare("tiny-org/moving@" + made.commit, dtype="float32")
print(json.dumps({
    "run": [made.commit, context.files.content_hash],
    "branch": [branch.commit, prepare(branch, dtype="float32").content_hash],
    "pinned": pinned.content_hash,
}))
"""


@pytest.mark.slow
def test_a_run_stays_at_its_commit_when_the_branch_moves(hub: Hub, tmp_path: Path) -> None:
    folder = hub.root / "models" / "tiny-org" / "moving"
    _write_model(folder)
    for index, text in enumerate(SENTENCES):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{index}.txt").write_text(f"{text} {text}")
    first = output(run(PINNED, hub.endpoint, tmp_path, arguments=[str(tmp_path)]))
    assert first["run"] == first["branch"] == [COMMIT, first["pinned"]]
    _write_model(folder, seed=1)
    try:
        hub.commit = COMMIT[::-1]
        second = output(run(PINNED, hub.endpoint, tmp_path, arguments=[str(tmp_path)]))
    finally:
        hub.commit = COMMIT
    assert second["run"] == first["run"]
    assert second["pinned"] == first["pinned"]
    commit, content = second["branch"]
    assert commit == COMMIT[::-1]
    assert content != first["pinned"]


BEFORE_WEIGHTS = """
import json
from foldsearch.model.source import locate, open_config, open_tokenizer
found = locate("tiny-org/tiny-llama")
print(json.dumps([open_config(found).num_hidden_layers, open_tokenizer(found)("the sea is long").input_ids]))
"""


def test_a_hub_model_is_looked_at_before_its_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    layers, ids_T = json.loads(run(BEFORE_WEIGHTS, hub.endpoint, tmp_path).stdout)
    assert layers == 2
    assert (
        ids_T
        == open_tokenizer(locate(str(hub.root / "models/tiny-org/tiny-llama")))("the sea is long").input_ids
    )
    assert any("config.json" in request for request in hub.requests)
    assert not any("safetensors" in request for request in hub.requests)


LOAD = """
import json
from foldsearch.errors import DataError
from foldsearch.model.text import Source, load_documents
answer = {"all": load_documents("tiny-org/tiny-text"), "three": load_documents("tiny-org/tiny-text", limit=3)}
answer["packed"] = load_documents("tiny-org/tiny-packed")
answer["wikitext"] = load_documents("wikitext:wikitext-2-raw-v1")
for reference, column in (("tiny-org/tiny-text:default:nosuch", None), ("tiny-org/tiny-text", "body")):
    try:
        load_documents(Source(reference, column))
    except DataError as error:
        answer[str(column)] = str(error)
print(json.dumps(answer))
"""


def test_hub_data_sets_equal_the_same_files_on_disk(hub: Hub, tmp_path: Path) -> None:
    online = output(run(LOAD, hub.endpoint, tmp_path))
    local = hub.root / "datasets" / "tiny-org" / "tiny-text" / "train.jsonl"
    assert online["all"] == load_documents(str(local)) == SENTENCES
    assert online["three"] == SENTENCES[:3]
    assert online["packed"] == SENTENCES
    # the bare name is found under its owner; its rows are lines: a document starts at a top-level heading
    assert online["wikitext"] == [
        " = One = \n\n First . \n = = Part = = \n More . \n\n",
        " = Two = \n Second . \n",
    ]
    assert "tiny-org/tiny-text:default:nosuch" in online["None"]
    assert "org/name:config:split" in online["None"]
    assert "there is no 'body', only 'text'" in online["body"]


MISSING = """
import json, time
from foldsearch.errors import DataError, ModelError
from foldsearch.model.source import prepare
from foldsearch.model.text import Source, load_documents
import huggingface_hub, transformers, datasets
started, answer = time.monotonic(), {}
for error_type, call in (
    (ModelError, lambda: prepare("tiny-org/nothing", dtype="float32")),
    (DataError, lambda: load_documents("tiny-org/nothing:config")),
):
    try:
        call()
    except error_type as error:
        answer[error_type.__name__] = str(error)
print(json.dumps(answer | {"seconds": time.monotonic() - started}))
"""


@contextlib.contextmanager
def closed_port():
    with socket.socket() as probe:
        probe.bind(
            ("127.0.0.1", 0)
        )  # bound but not listening: connections are refused, and nobody else takes it
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_an_unreachable_hub_is_a_quick_clear_error(tmp_path: Path) -> None:
    with closed_port() as endpoint:
        result = run(MISSING, endpoint, tmp_path)
    answer = output(result)
    for message in (answer["ModelError"], answer["DataError"]):
        assert "tiny-org/nothing" in message
        assert f"the hub at {endpoint} could not be reached" in message
        assert "HF_ENDPOINT" in message
        assert "give a local folder" in message
    assert answer["seconds"] < 20  # the clients' own retries take minutes
    assert "Traceback" not in result.stderr


def test_an_unknown_hub_name_is_a_clear_error(hub: Hub, tmp_path: Path) -> None:
    answer = output(run(MISSING, hub.endpoint, tmp_path))
    assert "no such model at http://127.0.0.1" in answer["ModelError"]
    assert "no such data set at http://127.0.0.1" in answer["DataError"]


def test_the_server_serves_ranges(hub: Hub) -> None:
    """The server itself: a wrong range would make the tests above prove less than they seem to."""
    from urllib.request import Request, urlopen

    file = hub.root / "datasets" / "tiny-org" / "tiny-text" / "train.jsonl"
    url = f"{hub.endpoint}/datasets/tiny-org/tiny-text/resolve/main/train.jsonl"
    with urlopen(Request(url, headers={"Range": "bytes=3-9"})) as response:
        assert response.status == 206
        assert response.read() == file.read_bytes()[3:10]
