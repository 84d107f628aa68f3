"""Check an export again, wherever it lies now, by its card alone: no run, no dense model, nothing of the first time.

What is compared: the files by their hashes; the model as its runtime loads it, in a fresh process, by what it says of
the tokens of the probe. Nothing is loaded that the card does not vouch for, and of the code that came with an export
only what this foldsearch would have written itself is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from foldsearch.errors import InputError, quote_error
from foldsearch.export.card import CARD, Card, Probe, files_of, hashes_of, read_card
from foldsearch.export.chat import ANSWER_TOKENS, QUESTION, SECONDS, stop_faults
from foldsearch.export.engine import TOLERANCES, EngineJob, compare, fault_of, running
from foldsearch.files import scratch
from foldsearch.model.checks import SHARED
from foldsearch.model.tokens import as_parts
from foldsearch.paths import printable
from foldsearch.progress import StageProgress, silent
from foldsearch.runtimes import Runtime, runtime_named
from foldsearch.runtimes.folded import SHIPPED_CODE
from foldsearch.runtimes.process import ModelProcess, ProcessError

TIMED_CHAT = "the text of a chat, as its template writes the date or the time"


@dataclass(frozen=True, slots=True)
class Rechecked:
    """What came of checking an export again, in sentences.

    card: of the export. passed, faults: of what was checked; skipped: what was not, and why.
    """

    card: Card
    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def note(self, words: str, faults: list[str]) -> None:
        """Keep what a check found: that it passed, or its faults."""
        if faults:
            self.faults.extend(faults)
        else:
            self.passed.append(words)


def recheck(folder: Path, progress: StageProgress = silent) -> Rechecked:
    """Check an export again.

    Args:
        folder: of the export, wherever it lies.
        progress: told what is being done.

    Raises:
        InputError: the folder is no export, or the runtime of the export is not known.
    """
    card = read_card(folder)
    found = Rechecked(card)
    progress("comparing the files with their hashes", 0.0)
    _check_files(folder, found)
    if found.faults:  # what is not what it was is not loaded either: there may be code in it
        found.skipped.append("it was not loaded, as its files are not those of the card")
        return found
    runtime, probe = runtime_named(card.report.runtime), Probe.read(folder)
    with scratch("verify") as workplace:
        tensors = workplace / "probe.safetensors"
        save_file(probe.tensors, tensors)
        progress("loading it in a fresh process", 0.0)
        for words, without_foldsearch, how in _ways(folder, runtime, found):
            question = _loading(card, folder, tensors, how)
            try:
                with ModelProcess(workplace, without_foldsearch=without_foldsearch) as process:
                    answer = process.ask("load", **question) | process.ask("quality")
                    found.note(f"{words}: {_figures_words(card, answer)}", _faults(card, answer, words))
                    _check_chat(process, runtime, found)
            except ProcessError as error:
                found.faults.append(quote_error(f"{words}: it could not be loaded", error))
        if runtime.engine is not None:
            progress(f"asking {runtime.engine.name}", 0.0)
            _check_in_engine(folder, runtime, probe, workplace, found)
    return found


def _check_files(folder: Path, found: Rechecked) -> None:
    named = found.card.files
    outside = [name for name in named if not _is_of(name)]
    if outside:
        raise InputError(
            f"the files of an export lie in its folder, or in `shared` beside it, but {printable(folder / CARD)} names "
            f"{outside[:3]}. Do not use this card."
        )
    missing = sorted(name for name in named if not _is_there(folder / name))
    there = hashes_of(folder, [name for name in named if name not in missing])
    changed = sorted(name for name in there if there[name] != named[name])
    faults = [f"the file {printable(name)} is missing" for name in missing]
    faults += [f"the file {printable(name)} is not the one that was exported" for name in changed]
    size = sum(one.num_bytes for one in named.values())
    found.note(f"{len(named)} files, {size / 1e6:,.1f} MB, have the hashes of the card", faults)
    further = sorted(set(files_of(folder)) - set(named))
    if further:
        found.skipped.append(f"files that the card does not name: {', '.join(map(printable, further))}")


def _is_there(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is of none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_of(name: str) -> bool:
    """Whether a name of a card is of a file in the folder, or in that which a family of exports shares."""
    parts = name.split("/")
    inner = parts[2:] if parts[:2] == ["..", SHARED] else parts
    return bool(inner) and not name.startswith("/") and not {"", ".", ".."} & set(inner)


def _ways(folder: Path, runtime: Runtime, found: Rechecked) -> Iterator[tuple[str, bool, str]]:
    """How an export is loaded: in words, whether foldsearch is kept out of the process, and by what."""
    if runtime.needs_only_transformers:
        yield "loaded by transformers, where foldsearch cannot be imported", True, ""
        return
    by = f"by foldsearch from {runtime.weights}" if runtime.loader else "by foldsearch"
    yield f"loaded {by}", False, runtime.loader
    if not runtime.carries_code:
        return
    if others := _other_code(folder):
        found.skipped.append(
            f"its own code was not run, as this foldsearch ships other code: {', '.join(map(printable, others))}"
        )
    else:
        yield "loaded with its own code, where foldsearch cannot be imported", True, "own code"


def _other_code(folder: Path) -> list[str]:
    """What transformers may run, once it may run the code of a folder, that this foldsearch does not ship.

    config.json and the tokenizer's settings name the file and class to load, `custom_generate/generate.py` is run
    without being named, a name with "--" is of another model's folder, and so is the base model of an adapter.
    """
    shipped = {file.name: file.read_bytes() for file in SHIPPED_CODE}
    code = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    others = {name for name in {*shipped, *code} if shipped.get(name) != code.get(name)}
    if (folder / "adapter_config.json").exists():
        others.add("adapter_config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and "--" in _named_classes(folder / name):
            others.add(name)
    return sorted(others)


def _named_classes(path: Path) -> str:
    """Which classes a file of settings says to load from code, as JSON; "--" where it cannot be read."""
    try:
        return json.dumps(json.loads(path.read_text(encoding="utf-8")).get("auto_map"))
    except (ValueError, AttributeError, RecursionError):
        return "--"


def _loading(card: Card, folder: Path, tensors: Path, how: str) -> dict[str, Any]:
    return {
        "folder": str(folder.resolve()),
        "dtype": card.report.dtype,
        "attention": card.attention,
        "threads": torch.get_num_threads(),
        "tensors": str(tensors),
        "how": how,
    }


def _figures_words(card: Card, answer: dict[str, Any]) -> str:
    probe = card.probe
    return (
        f"the log-probabilities of {probe.tokens:,} {probe.of} are {answer['mean_difference']:.2g} nats away on "
        f"average (tolerance {probe.tolerance:g}), {answer['max_difference']:.2g} at most; perplexity "
        f"{answer['perplexity']:.4f}, {probe.perplexity:.4f} on the card"
    )


def _faults(card: Card, answer: dict[str, Any], words: str) -> list[str]:
    probe, report, faults = card.probe, card.report, []
    if answer["wrong_keys"]:
        faults.append(f"weights are missing, unexpected or of another shape: {answer['wrong_keys'][:5]}")
    if answer["parameters"] != report.exported.parameters:
        faults.append(
            f"it has {answer['parameters']:,} parameters, the card says {report.exported.parameters:,}"
        )
    if not answer["mean_difference"] <= probe.tolerance:
        faults.append(
            f"the log-probabilities of {probe.of} are {answer['mean_difference']:.3g} nats away on average (tolerance "
            f"{probe.tolerance:g})"
        )
    if not abs(math.log(answer["perplexity"] / probe.perplexity)) <= probe.loss_tolerance:
        faults.append(
            f"its perplexity is {answer['perplexity']:.6g}, the card says {probe.perplexity:.6g} (tolerance "
            f"{probe.loss_tolerance:g} nats)"
        )
    if not answer["decode_difference"] <= report.decode_tolerance:
        faults.append(
            f"decoding with the KV cache is {answer['decode_difference']:.3g} of the logits' RMS away from one full "
            f"forward (tolerance {report.decode_tolerance:g})"
        )
    return [f"{words}: {fault}" for fault in faults]


def _check_chat(
    process: ModelProcess, runtime: Runtime, found: Rechecked, *, in_engine: bool = False
) -> None:
    """Whether a chat is rendered as the card says, and ends at the same tokens; the answer is told only."""
    chat = found.card.report.chat
    if chat is None or (runtime.engine is not None) != in_engine:
        return
    answers = []
    for question in (list(QUESTION), as_parts(QUESTION)):  # in one of these forms it was asked
        answers.append(process.ask("chat", seconds=SECONDS, messages=question, num_tokens=ANSWER_TOKENS))
        if chat.tells_time or answers[-1]["prompt"] == chat.prompt:
            break
    answer = answers[-1] if answers[-1]["prompt"] == chat.prompt else answers[0]
    faults = stop_faults(list(chat.stops), answer["stops"])
    if chat.tells_time:
        if TIMED_CHAT not in found.skipped:  # an export is loaded in several ways
            found.skipped.append(TIMED_CHAT)
    elif answer["prompt"] != chat.prompt:
        faults.append(
            f"the chat template makes {answer['prompt']!r} of a question, on the card {chat.prompt!r}"
        )
    same = "as on the card" if answer["text"] == chat.answer else f"on the card {chat.answer!r}"
    found.note(f"a chat through its template; it answers {answer['text']!r}, {same}", faults)


def _check_in_engine(folder: Path, runtime: Runtime, probe: Probe, workplace: Path, found: Rechecked) -> None:
    """Whether the program that the export is for says the same of the probe."""
    engine, report = runtime.engine, found.card.report
    assert engine is not None
    if report.weights not in TOLERANCES:
        found.faults.append(f"the card says weights in '{printable(report.weights)}', which no export has")
        return
    if not engine.is_installed or report.engine is None:
        found.skipped.append(engine.absence if not engine.is_installed else report.engine_note)
        return
    job = EngineJob(engine, torch.get_num_threads(), probe.ids_NT, probe.text_NT)  # the program's own cache
    # As it was when the model was at hand, or what is known of others; and the probe was computed in the dtype.
    of_probe = found.card.probe.engine_tolerance
    tolerance = (
        max(report.engine.tolerance, of_probe, TOLERANCES[report.weights]) + found.card.probe.tolerance
    )
    try:
        with running(job, folder, workplace) as (process, figures):
            compared = compare(engine, figures, job.told_by(probe.log_probabilities_NP), tolerance)
            fault = fault_of(compared)
            found.note(compared.check, [fault] if fault else [])
            _check_chat(process, runtime, found, in_engine=True)
    except ProcessError as error:
        found.faults.append(quote_error(f"{engine.name} could not run it", error))
