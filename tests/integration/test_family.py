"""Points of a front in one folder: each tensor is stored once, each point loads alone by the ordinary call.

Oracles: the same models, folded here; transformers, where foldsearch cannot be imported; bytes on disk; which
tensors are equal, found by comparing the bytes of all of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from foldsearch import api
from foldsearch.cli import main
from foldsearch.errors import ModelError, VerificationError
from foldsearch.export import load_exported
from foldsearch.export.family import FAMILY, read_family
from foldsearch.model.fold import cast, fold
from foldsearch.model.source import identify, locate, open_dense, prepare
from foldsearch.plan.plan import FoldPlan
from foldsearch.report.view import RunView
from foldsearch.runtimes import stock
from foldsearch.search.records import Records
from foldsearch.spec.study import HealingSettings
from foldsearch.trial import run_trial
from tests.contexts import begin_run, tiny_study
from tests.tiny import NUM_BLOCKS, dense_model

PLANS = ("0-1 3-4", "0-2 4")
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
ALONE = """
import sys, torch
sys.modules["foldsearch"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
given = load_file(sys.argv[1])
for place in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, attn_implementation="eager").eval()
    found = model(given["ids"]).logits
    assert torch.equal(found, given[place.rpartition("/")[2]]), place
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of these plans, neither healed nor trained, made without Ray."""
    place = tmp_path_factory.mktemp("family")
    study = tiny_study(place, rungs=(0,), healing=HealingSettings(tokens=0))
    context = begin_run(study, place / "run", cache_dir=place / "cache")
    records = Records(context.run)
    for text in PLANS:
        records.queue_plan(FoldPlan.parse(text, NUM_BLOCKS))
        number, proposal = records.ask()
        for trial in run_trial(proposal, context, number=number):
            records.record(trial)
        records.finish(number)
    return place


@pytest.fixture(autouse=True)
def _cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDSEARCH_CACHE", str(place / "cache"))


def model_of(number: int) -> PreTrainedModel:
    """A point as it ships, made here."""
    folded = fold(dense_model(), FoldPlan.parse(PLANS[number], NUM_BLOCKS))
    return cast(stock.expand(folded), torch.bfloat16)


def tensors(number: int) -> list[tuple[str, bytes]]:
    """Every tensor of a point: its name and its bytes."""
    held = model_of(number).state_dict()
    return [(name, value.contiguous().view(torch.uint8).numpy().tobytes()) for name, value in held.items()]


def stored(folder: Path) -> int:
    """Bytes of all tensors in all files of a folder."""
    files = [load_file(path) for path in folder.rglob("*.safetensors")]
    return sum(value.nbytes for held in files for value in held.values())


def check_alone(folder: Path, tmp_path: Path) -> None:
    """Each point gives the logits of the model made here, where foldsearch cannot be imported."""
    given = {"ids": IDS}
    places = [folder / f"trial-{number:05}" for number in range(len(PLANS))]
    for number, one in enumerate(places):
        model = model_of(number)
        model.set_attn_implementation("eager")
        given[one.name] = model(IDS).logits.detach()
    save_file(given, tmp_path / "given")
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path / "given"), *map(str, places)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def check_as_model(folder: Path, tmp_path: Path) -> None:
    """A point that only drops blocks is a dense model, which can be named by --model and folded further."""
    cache_dir = tmp_path / "models"
    found = open_dense(prepare(str(folder), dtype="bfloat16", cache_dir=cache_dir))
    expected = model_of(int(folder.name[-1])).state_dict()
    assert {name: value.shape for name, value in found.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    weights = identify(locate(str(folder)), cache_dir=cache_dir).weights
    (shard, *_) = sorted((folder.parent / "shared").iterdir())
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert (
        identify(locate(str(folder)), cache_dir=cache_dir).weights != weights
    )  # shared files are a part of it
    shard.unlink()
    with pytest.raises(ModelError, match=rf"missing \.\./shared/{shard.name}|holds no weights"):
        locate(str(folder))
    shard.write_bytes(data)


@pytest.mark.slow
def test_stock_points_share_what_has_the_same_name_and_load_in_another_place(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for number in range(len(PLANS)) for word in ("--trial", str(number))]
    assert main(["export", str(place / "run"), "--front", str(tmp_path / "made"), *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    once = {one for number in range(len(PLANS)) for one in tensors(number)}
    assert stored(tmp_path / "made") == sum(len(value) for _, value in once)
    read = read_family(tmp_path / "made")
    assert [one.plan for one in read.members] == list(PLANS)
    assert read.runtime == "stock"
    sizes = [path.stat().st_size for path in (tmp_path / "made").rglob("*.safetensors")]
    assert read.stored_bytes == sum(sizes) < read.separate_bytes
    assert f"in folders of their own: {read.separate_bytes / 1e6:,.1f} MB" in out
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "made", elsewhere)  # as `cp -r` and an unpacked archive
    shutil.rmtree(tmp_path / "made")
    check_alone(elsewhere, tmp_path)
    check_as_model(elsewhere / "trial-00001", tmp_path)
    assert main(["verify", str(elsewhere / "trial-00001")]) == 0
    (shard, *_) = (elsewhere / "shared").iterdir()  # that of all points
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    assert main(["verify", str(elsewhere)]) == 1
    assert capsys.readouterr().err.count("trial-0000") >= 2
    readme = (elsewhere / "trial-00000" / "README.md").read_text()
    assert "keep both folders side by side" in readme
    assert "on the hub" not in readme
    shard.write_bytes(data)
    shutil.rmtree(elsewhere / "trial-00000")  # what is left of the others is told
    assert main(["verify", str(elsewhere)]) == 2
    found = capsys.readouterr()
    assert "trial-00001" in found.out
    assert "there is no" in found.err
    assert "trial-00000" in found.err


@pytest.mark.slow
def test_folded_points_store_every_tensor_once(place: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    view = RunView.open(place / "run")
    api.export_front(view, range(len(PLANS)), made, form=api.ExportForm(to="folded"))
    most: Counter[bytes] = Counter()  # a tensor that a point has twice, such as norms of ones, is there twice
    for number in range(len(PLANS)):
        most |= Counter(value for _, value in tensors(number))
    assert stored(made) == sum(len(value) * count for value, count in most.items())
    check_alone(made, tmp_path)
    check_as_model(made / "trial-00001", tmp_path)
    model, words = load_exported(made / "trial-00001")
    assert words is not None
    again = tmp_path / "again"
    model.save_pretrained(again)  # which writes names of its own
    assert torch.equal(load_exported(again)[0](IDS).logits, model(IDS).logits)


def test_a_point_that_fails_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(run: RunView, number: int, out: Path, **more: object) -> None:
        (out / "half").mkdir(parents=True)
        if number == 1:
            raise VerificationError("it is another model")

    monkeypatch.setattr(api, "export_trial", export)
    with pytest.raises(VerificationError, match="another model"):
        api.export_front(RunView.open(place / "run"), [0, 1], tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--front", "DIR", "--to", "gguf"), "points share files of weights in exports to stock and folded"),
        (("--front", "DIR", "--prompt", "w5"), "takes no --prompt"),
        (("--front", "DIR", "--to", "plan"), "takes no --to plan"),
        (("--front", "DIR", "--max-gb", "0.0000001"), "GB"),
        (("--out", "DIR", "--trial", "0", "--trial", "1"), "--trial is given once"),
        (("--out", "DIR", "--trial", "0", "--to", "plan", "--type", "q8_0"), "takes no --type"),
        (("--out", "DIR", "--trial", "0", "--to", "plan", "--no-text"), "takes no --no-text"),
        (("--front", "run"), "exists already. Choose another folder"),
        (("--front", "run", "--force"), f"holds no {FAMILY}"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(
    place: Path, tmp_path: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"DIR": str(tmp_path / "made"), "run": str(place / "run")}
    assert main(["export", str(place / "run"), *(named.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
