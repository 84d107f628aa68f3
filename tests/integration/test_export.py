"""An export is the model that was measured, or nothing is left of it.

Oracles: the folded model in this process, in the dtype that ships; the folder's own files; what the message says when
the written weights are tampered with between writing and verifying.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from foldsearch.errors import InputError, VerificationError
from foldsearch.export import Shipment, checks, export, load_exported, ship
from foldsearch.export import dense as beside_dense
from foldsearch.export.card import read_card
from foldsearch.export.figures import Predicted
from foldsearch.export.folder import whole_or_absent
from foldsearch.model.fold import cast, fold
from foldsearch.model.parts import Borrowed
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import folded as folded_runtime
from foldsearch.runtimes.process import ModelProcess, ProcessError
from tests.tiny import tokenizer
from tests.tolerances import OTHER_WAY

NUM_BLOCKS = 6
IDS = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))


def dense_model(folder=None):
    torch.manual_seed(0)
    config = tf.Gemma2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=7,
        max_position_embeddings=64,
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    if folder is None:
        return model
    model.save_pretrained(folder)
    return tf.AutoModelForCausalLM.from_pretrained(folder).eval()


def folded(dense, text):
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    model = fold(dense, plan)
    torch.manual_seed(2)
    for part in model.modules():
        if isinstance(part, Borrowed) and part.rank:
            part.up.data.normal_(0, 0.1)
    return model, plan


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def run_card(out, tmp_path):
    """What the card's Python prints, where foldsearch cannot be imported and nobody answers a question."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    alone = f"import sys\nsys.modules['foldsearch'] = None\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", alone],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    return done.stdout


def test_a_processor_without_instructions_for_16_bits_computes_in_32_with_the_same_numbers(
    tmp_path, monkeypatch
):
    class Written(Exception):
        pass

    def look(job, shipment, probe):
        weights = load_file(next(job.folder.glob("*.safetensors")))
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in job.measured.parameters()} == {torch.float32}
        assert (job.weights, job.dtype, job.tolerance) == ("bfloat16", "float32", 0.0)
        assert torch.equal(logits(job.measured), logits(cast(rounded, torch.float32)))
        raise Written

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(ship, "_report", look)
    model, plan = folded(dense_model(), "0 1=3 2a 3 4")
    rounded = cast(model, torch.bfloat16)
    with pytest.raises(Written):
        export(model, tokenizer(), tmp_path / "out", Shipment(plan, "folded", "bfloat16", IDS))
    assert not (tmp_path / "out").exists()


def test_folded_export(tmp_path, monkeypatch):
    """bfloat16, with everything a plan can have; the dense model's figures beside."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    loaded = []

    class Watched(ModelProcess):
        def ask(self, what, **arguments):
            if what == "load":
                weights = load_file(next(Path(arguments["folder"]).glob("*.safetensors")))
                loaded.append(({tensor.dtype for tensor in weights.values()}, arguments["dtype"]))
            return super().ask(what, **arguments)

    for module in (ship, checks, beside_dense):
        monkeypatch.setattr(module, "ModelProcess", Watched)
    dense = dense_model(tmp_path / "dense")
    model, plan = folded(dense, "0 1=3+r4+n 2a 3 4=3m 5m")
    out = tmp_path / "new" / """it's "out".v1 \\n"""
    report = export(
        model,
        tokenizer(),
        out,
        Shipment(
            plan=plan,
            runtime="folded",
            dtype="bfloat16",
            ids_NT=IDS,
            text_NT=torch.arange(24).expand(5, 24) >= 2,
            dense=dense,
            details={"base_model": "tiny", "kl": 0.5},
            predicted=Predicted(40, 1e-6, 1e9),
        ),
    )
    assert report.logits_max_difference == 0
    assert report.logits_tolerance == 0
    assert report.loads_without_foldsearch
    assert report.refused_without_code
    assert report.exported.perplexity == report.measured_perplexity
    loss = functional.cross_entropy(
        logits(cast(model, torch.bfloat16))[:, 1:-1].flatten(0, 1).float(), IDS[:, 2:].flatten()
    )
    # the first two tokens are no text: the second is not scored, the first of the text is
    assert report.exported.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert report.exported.weight_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert report.dense is not None
    # like beside like: the dense model lies in float32, and is weighed in what ships
    assert report.dense.parameters == sum(p.numel() for p in dense.parameters())
    assert report.dense.weight_bytes == 2 * report.dense.parameters
    assert len(report.decode.exported) == len(report.decode.dense) >= 3
    assert min(report.decode.exported + report.decode.dense + report.prompt.exported) > 0
    assert read_card(out).report == report
    card = (out / "README.md").read_text()
    assert "# tiny, folded" in card
    assert str(plan) in card
    assert '"kl": 0.5' in card
    assert report.prompt_tokens == 40  # as the prediction has it, longer than the texts
    assert report.latency_words.startswith("Predicted 1e-06 ms for a prompt of 40 tokens and 1e+09 ms")
    assert report.latency_words in card
    # the export, the same where foldsearch is not, the dense model: all lie in what they are measured in
    assert loaded == [({torch.bfloat16}, "bfloat16")] * 3
    (line,) = (line for line in card.splitlines() if str(tmp_path) in line)
    assert line.startswith("FOLDER = ")
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    again, words = load_exported(out)
    assert words.get_vocab() == tokenizer().get_vocab()
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(cast(model, torch.bfloat16)))
    assert 0 < len(run_card(out, tmp_path).split()) <= 20  # the prompt's words are unknown to this tokenizer


def test_stock_export(tmp_path):
    """Float32; merged adapters are the same function up to rounding; it replaces an older export."""
    model, plan = folded(dense_model(), "0 1=3+r4 2 3 5 2=2")
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(InputError, match="only an export is overwritten"):
        export(model, None, out, Shipment(plan, "stock", "float32", IDS), overwrite=True)
    (out / "card.json").touch()
    report = export(model, None, out, Shipment(plan, "stock", "float32", IDS), overwrite=True)
    assert not (out / "old").exists()
    assert report.logits_tolerance > 0
    assert report.logits_difference <= report.logits_tolerance
    assert report.loads_without_foldsearch
    assert report.refused_without_code is None
    assert report.dense is None
    again, _ = load_exported(out)
    assert type(again) is tf.Gemma2ForCausalLM
    torch.testing.assert_close(logits(again), logits(model), **OTHER_WAY)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert run_card(out, tmp_path).startswith("tensor([[")


def test_a_process_that_cannot_answer_says_all_of_it(tmp_path):
    """Its error with the one that it came from; and where it dies, how."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{no JSON")
    with ModelProcess(tmp_path) as process:
        with pytest.raises(ProcessError, match=r"Error: .*\n.*JSONDecodeError: Expecting"):
            process.ask(
                "load", folder=str(tmp_path / "x"), dtype="float32", attention="eager", threads=1,
                tensors=str(save_tokens(tmp_path)),
            )  # fmt: skip
        process._child.kill()
        with pytest.raises(ProcessError, match="exit code -9"):
            process.ask("turn")


def save_tokens(folder):
    save_file(
        {"ids_NT": IDS, "text_NT": torch.ones_like(IDS, dtype=torch.bool)}, folder / "tokens.safetensors"
    )
    return folder / "tokens.safetensors"


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda weights: weights["model.layers.1.mlp.up_proj.weight"].mul_(1.01), "logits are"),
        pytest.param(
            lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
            "missing: model.layers.1.mlp.up_proj",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mismatch_fails_and_leaves_nothing(tmp_path, monkeypatch, tamper, message):
    write = folded_runtime.write

    def write_wrong(model, folder, beside):
        notes = write(model, folder, beside)
        weights = load_file(folder / "model.safetensors")
        tamper(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return notes

    monkeypatch.setattr(folded_runtime, "write", write_wrong)
    model, plan = folded(dense_model(), "0 2-3")
    with pytest.raises(VerificationError, match=message):
        export(model, None, tmp_path / "out", Shipment(plan, "folded", "float32", IDS))
    assert list(tmp_path.iterdir()) == []


def test_code_that_cannot_run_alone_fails(tmp_path, monkeypatch):
    """Shipped code that imports foldsearch loads here, but not where foldsearch isn't."""
    write = folded_runtime.write

    def write_wrong(model, folder, beside):
        notes = write(model, folder, beside)
        code = (folder / "parts.py").read_text()
        (folder / "parts.py").write_text(code + "\nimport foldsearch.errors\n")
        return notes

    monkeypatch.setattr(folded_runtime, "write", write_wrong)
    model, plan = folded(dense_model(), "0 2-3")
    with pytest.raises(VerificationError, match="without foldsearch"):
        export(model, None, tmp_path / "out", Shipment(plan, "folded", "float32", IDS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error):
    """Neither what it wrote nor, once a day old, what a process that was killed left."""
    for name in (
        ".out.1.partial",
        ".out.2.rebuilt",
        "..out.3.partial.3.dense",
        ".out.4.partial",
        ".other.5.partial",
    ):
        (tmp_path / name / "x").mkdir(parents=True)
        if "4" not in name:
            os.utime(tmp_path / name, (0, 0))

    def write(model, folder, beside):
        (folder / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(folded_runtime, "write", write)
    model, plan = folded(dense_model(), "0 2-3")
    with pytest.raises((KeyboardInterrupt, InputError)):
        export(model, None, tmp_path / "out", Shipment(plan, "folded", "float32", IDS))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.5.partial", ".out.4.partial"]


def test_a_folder_that_came_to_be_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def export() -> None:
        with whole_or_absent(out, 1) as temporary:
            (temporary / "model").write_text("new")
            out.mkdir()
            (out / "mine.txt").write_text("somebody else's")

    with pytest.raises(InputError, match="exists already"):
        export()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    """The link stays, as it is there for the disk that it leads to."""
    place, link = tmp_path / "disk" / "export", tmp_path / "link"
    place.mkdir(parents=True)
    (place / "card.json").write_text("old")
    link.symlink_to(place)
    with whole_or_absent(link, 1, overwrite=True) as temporary:
        (temporary / "card.json").write_text("new")
    assert link.is_symlink()
    assert (place / "card.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["card.json", "disk", "export", "link"]


def test_a_full_folder_of_temporary_files_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is often another disk than the export's, so room there would not help."""

    def save(*_args: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(ship, "save_file", save)
    model, plan = folded(dense_model(), "0 2-3")
    with pytest.raises(InputError, match=r"temporary files, .* has no room left.*TMPDIR"):
        export(model, None, tmp_path / "out", Shipment(plan, "folded", "float32", IDS))
    assert list(tmp_path.iterdir()) == []
