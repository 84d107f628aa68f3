"""An export is checked again anywhere, by its card alone: `foldsearch verify`.

Oracles: the files themselves, changed by hand in ways that a card must notice; hashes by hashlib; a chat template whose
text is known; the tokens that the measured model ends an answer with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foldsearch.cli import main
from foldsearch.errors import InputError, VerificationError
from foldsearch.export import Shipment, export
from foldsearch.export import card as card_module
from foldsearch.export.card import Probe, files_of, hashes_of, read_card, write_card
from foldsearch.export.recheck import Rechecked, _ways, recheck
from foldsearch.export.recipe import _in_folder
from foldsearch.model.fold import fold
from foldsearch.plan.plan import FoldPlan
from foldsearch.runtimes import runtime_named, stock, verify
from foldsearch.runtimes.folded import SHIPPED_CODE
from foldsearch.version import __version__
from tests.tiny import NUM_BLOCKS, dense_model, tokenizer

IDS = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(1))
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' w9' }}{% endif %}"
)
STOPS = [2, 7]


def folded(text: str = "0 2-4") -> tuple[Any, FoldPlan]:
    plan = FoldPlan.parse(text, NUM_BLOCKS)
    model = fold(dense_model(), plan)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = STOPS
    return model, plan


def chatting() -> Any:
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock export of a model that chats, without its dense model."""
    out = tmp_path_factory.mktemp("exported") / "first"
    model, plan = folded()
    export(model, chatting(), out, Shipment(plan, "stock", "float32", IDS, details={"base_model": "tiny"}))
    return out


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """The export in another place."""
    return Path(shutil.copytree(exported, tmp_path / "elsewhere" / "copy"))


def test_the_card_says_what_the_export_is(exported: Path) -> None:
    card = read_card(exported)
    assert str(card.plan) == card.report.plan == "0 2-4"
    weights = (exported / "model.safetensors").read_bytes()
    assert card.files["model.safetensors"].sha256 == hashlib.sha256(weights).hexdigest()
    named = {path.name for path in exported.iterdir()}
    assert set(card.files) == named - {"card.json", "README.md"}
    assert card.licences.model == "unknown"
    assert card.recipe is None
    assert set(card.commands) == {"verify"}
    assert {"torch", "transformers", "python", "safetensors"} <= set(card.report.versions)
    assert any("equal to the bit" in line for line in card.checked)
    assert any("vLLM" in line for line in card.not_checked)
    readme = (exported / "README.md").read_text()
    assert all(line in readme for line in (*card.checked, *card.not_checked))
    assert "Licence of the base model: unknown." in readme


def test_the_probe_is_what_the_measured_model_says(exported: Path) -> None:
    probe, (model, _) = Probe.read(exported), folded()
    logits = model(probe.ids_NT).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(2, probe.ids_NT[:, 1:, None])[..., 0]
    torch.testing.assert_close(probe.log_probabilities_NP, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(probe.ids_NT, IDS)
    assert (
        verify.perplexity(probe.log_probabilities_NP, probe.text_NT) == read_card(exported).probe.perplexity
    )


def test_a_chat_and_the_tokens_that_end_it_are_kept(exported: Path) -> None:
    chat = read_card(exported).report.chat
    assert chat is not None
    assert chat.prompt == "<s> user What is the capital of France? w9"
    assert list(chat.stops) == STOPS
    told = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(told) == STOPS
    model, _ = folded()
    ids = tokenizer()(chat.prompt, add_special_tokens=False).input_ids
    made = model.generate(
        torch.tensor([ids]),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones(1, len(ids)),
    )[0, len(ids) :].tolist()
    kept = made[: next((at for at, token in enumerate(made) if token in STOPS), None)]
    assert chat.answer == tokenizer().decode(kept, skip_special_tokens=True)


def test_a_copy_is_verified_where_nothing_else_is(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "README.md").write_text("written anew by somebody")
    (copied / "notes.txt").write_text("mine")
    assert main(["verify", str(copied)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "where foldsearch cannot be imported" in out
    assert "are 0 nats away on average" in out
    assert "files that the card does not name: notes.txt" in out


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: _flip(folder / "model.safetensors"), "model.safetensors is not the one"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: _flip(folder / "check.npz"), "check.npz is not the one"),
    ],
)
def test_what_is_not_what_the_card_says_is_refused_and_not_loaded(
    copied: Path, change: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copied)
    assert main(["verify", str(copied)]) == 1
    said = capsys.readouterr()
    assert words in " ".join(said.out.split())
    assert "it was not loaded" in said.out
    assert "not what its card says" in said.err


def test_another_model_with_a_card_that_fits_its_files_is_told_by_its_figures(copied: Path) -> None:
    """Somebody changed a weight and the hashes; what the measured model says of the probe is still there."""
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].mul_(1.2)
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    write_card(replace(read_card(copied), files=hashes_of(copied, files_of(copied))), copied)
    found = recheck(copied)
    assert len(found.faults) >= 1
    assert "nats away on average (tolerance 0.001)" in found.faults[0]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda folder: (folder / "card.json").unlink(), "an export holds card.json, but there is no"),
        (lambda folder: (folder / "card.json").write_text("{"), "is no card of an export"),
        (lambda folder: (folder / "card.json").write_text('{"schema": 99}'), "must be a card of schema 1"),
        (lambda folder: (folder / "card.json").write_text('{"schema": 1}'), "is no card of an export"),
        (
            lambda folder: (folder / "card.json").write_text(
                json.dumps({"schema": 9, "foldsearch": __version__})
            ),
            "is no card of an export: its schema is 9, not 1. Name another export",
        ),
        (lambda folder: (folder / "card.json").write_text("[" * 100_000), "is no card of an export"),
    ],
)
def test_what_is_no_export_is_told(
    copied: Path, write: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(copied)
    assert main(["verify", str(copied)]) == 2
    assert words in capsys.readouterr().err


def test_a_card_that_names_files_elsewhere_is_refused(copied: Path) -> None:
    card = read_card(copied)
    for name in ("../../etc/passwd", "/etc/passwd", "../shared/../x"):
        write_card(replace(card, files={**card.files, name: card.files["config.json"]}), copied)
        with pytest.raises(InputError, match="Do not use this card"):
            recheck(copied)


@pytest.mark.slow
def test_without_text_the_probe_is_at_random(tmp_path: Path) -> None:
    model, plan = folded()
    out = tmp_path / "out"
    export(model, None, out, Shipment(plan, "stock", "float32", IDS, shows_text=False))
    with np.load(out / "check.npz") as held:
        assert held["ids_NT"].shape == (2, 20)
        assert not any((row == ours).all() for row in held["ids_NT"] for ours in IDS.numpy())
    found = recheck(out)
    assert found.faults == []
    assert any("tokens at random" in words for words in found.passed)


def test_a_lost_stop_token_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = stock.write

    def write_wrong(model: Any, folder: Path, beside: Any) -> tuple[str, ...]:
        notes = write(model, folder, beside)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
        return notes

    monkeypatch.setattr(stock, "write", write_wrong)
    model, plan = folded()
    with pytest.raises(VerificationError, match=r"that end an answer, \[2, 7\], it lost \[7\]"):
        export(model, None, tmp_path / "out", Shipment(plan, "stock", "float32", IDS))
    assert list(tmp_path.iterdir()) == []


def test_each_file_is_read_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may have many gigabytes."""
    read: list[str] = []
    hashed = card_module._sha256
    monkeypatch.setattr(card_module, "_sha256", lambda path: [read.append(path.name), hashed(path)][1])
    (copied / "config.json").write_text("{}")  # so that nothing is loaded
    assert recheck(copied).faults
    assert sorted(read) == sorted(path.name for path in copied.iterdir() if path.name in read)
    assert "model.safetensors" in read


OWN = {"AutoConfig": "folded.FoldedLlamaConfig", "AutoModelForCausalLM": "folded.FoldedLlamaForCausalLM"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", json.dumps({"auto_map": OWN}), ""),
        ("evil.py", "raise SystemExit", "evil.py"),
        ("custom_generate/generate.py", "raise SystemExit", "custom_generate/generate.py"),
        ("folded.py", "raise SystemExit", "folded.py"),
        ("folded.py", None, "folded.py"),
        ("config.json", json.dumps({"auto_map": {"AutoConfig": "me/evil--folded.Config"}}), "config.json"),
        ("config.json", "[", "config.json"),
        ("tokenizer_config.json", json.dumps({"auto_map": ["me/evil--x.T", None]}), "tokenizer_config.json"),
        ("adapter_config.json", json.dumps({"base_model_name_or_path": "me/evil"}), "adapter_config.json"),
    ],
)
def test_code_of_an_export_is_run_only_where_this_foldsearch_ships_it(
    exported: Path, tmp_path: Path, name: str, content: str | None, told: str
) -> None:
    """A card vouches for what came with it, so nothing that it says of code is believed."""
    for file in SHIPPED_CODE:
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": OWN}))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    found = Rechecked(read_card(exported))
    ways = [how for _, _, how in _ways(tmp_path, runtime_named("folded"), found)]
    assert ways == (["", "own code"] if not told else [""])
    assert [words.partition("ships other code: ")[2] for words in found.skipped] == ([told] if told else [])


@pytest.mark.parametrize(
    ("readme", "told"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\ntags:\n- a\nlicense: 'mit' # kept\n---\n", "mit"),
        ("---\nlicense:\n- apache-2.0\n- mit\n---\n", "apache-2.0, mit"),
        ("---\nlicense:\ntags:\n- a\n---\n", "unknown"),
        ("---\ntags:\n- a\n---\nThe data\nlicense: gpl-3.0-only\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("no front matter", "unknown"),
    ],
)
def test_a_licence_is_what_the_front_matter_says(tmp_path: Path, readme: str, told: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert _in_folder(tmp_path) == told


def _exported(folder: Path, template: str) -> Path:
    """A stock export whose chat template is this one."""
    made, (model, plan) = tokenizer(), folded()
    made.chat_template = template
    export(model, made, folder, Shipment(plan, "stock", "float32", IDS))
    return folder


def test_a_template_that_tells_the_time_verifies_at_another_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _exported(
        tmp_path / "dated", "{{ strftime_now('%f') }} " + TEMPLATE
    )  # microseconds: never the same twice
    assert main(["verify", str(out)]) == 0
    assert " ".join(capsys.readouterr().out.split()).count("writes the date or the time") == 1


def test_a_template_that_refuses_the_question_is_no_fault_of_the_export(tmp_path: Path) -> None:
    out = _exported(tmp_path / "strict", "{{ raise_exception('words of the system come first') }}")
    card = read_card(out)
    assert card.report.chat is None
    assert any("no chat template that takes" in line for line in card.not_checked)
    assert main(["verify", str(out)]) == 0


def test_a_card_stands_for_its_folder(copied: Path) -> None:
    assert main(["verify", str(copied / "card.json")]) == 0
