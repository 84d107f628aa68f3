"""An export beside the dense model, loaded alike: figures, and speeds in turns."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from foldsearch.errors import describe_error
from foldsearch.export.chat import ANSWER_TOKENS, SECONDS, ask_chat, question_to
from foldsearch.export.checks import raise_for, while_loading
from foldsearch.export.engine import EngineJob, compare, expected, fault_of, running, tolerance_of
from foldsearch.export.figures import ChatReport, EngineReport, ModelFigures, Speed
from foldsearch.export.folder import ROOM
from foldsearch.export.shipment import Job, file_bytes, on_cpu
from foldsearch.model.convert import quiet
from foldsearch.model.fold import cast as in_dtype
from foldsearch.model.gguf.kv_cache import rounded_kv_cache
from foldsearch.model.whole import put_back
from foldsearch.paths import beside
from foldsearch.plan.cost import DTYPE_BYTES, GB
from foldsearch.runtimes import Engine
from foldsearch.runtimes.process import ModelProcess, ProcessError, in_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rounds of timing, in which both models take a turn: at most so many, and no further one after so many seconds; the
# fewest of which a spread can be told.
MOST_ROUNDS, TIMED_SECONDS, FEWEST_ROUNDS = 9, 8.0, 3
NO_SPEED = Speed((), ())


@dataclass(frozen=True, slots=True)
class Compared:
    """An export beside the dense model.

    dense: its figures; None where there are none, and note says why. speeds: of both, by "prompt" and "decode". engine:
    what the program of the runtime found, and resident_bytes: of the export in it; engine_note: why it was not asked.
    chat: a question through the chat template, and what both answer.
    """

    dense: ModelFigures | None
    note: str
    speeds: dict[str, Speed]
    engine: EngineReport | None = None
    engine_note: str = ""
    resident_bytes: int | None = None
    chat: ChatReport | None = None


def compare_in_torch(
    job: Job, exported: ModelProcess, dense: PreTrainedModel | None, workplace: Path
) -> Compared:
    """Figures of the dense model, or why there are none; and the speeds of both.

    The dense model is written anew in the dtype that ships, by the same writer: whatever it lies in, both models are
    loaded alike. That an export is right does not depend on it, so no failure here is the export's.
    """
    note = ""
    with while_loading(""):
        chat = ask_chat(job, exported)
    if dense is not None:
        with _dense_beside(job) as place:
            try:
                note = _lacks_room(job, dense)
                if not note:
                    with _loaded_dense(job, dense, place, workplace) as (process, figures):
                        chat = _beside_dense(job, chat, process)
                        return Compared(figures, "", take_turns(exported, process), chat=chat)
            except (ProcessError, OSError, SafetensorError) as error:
                note = f"The dense model could not be measured: {describe_error(error)}."
    with while_loading(""):
        return Compared(None, note, take_turns(exported), chat=chat)


def _beside_dense(job: Job, chat: ChatReport | None, process: ModelProcess) -> ChatReport | None:
    """A chat with the dense model's answer beside the export's."""
    if chat is None:
        return None
    answer = process.ask("chat", seconds=SECONDS, messages=question_to(job), num_tokens=ANSWER_TOKENS)
    return replace(chat, dense=answer["text"])


def compare_in_engine(job: Job, engine: Engine, dense: PreTrainedModel | None, workplace: Path) -> Compared:
    """The same where another program runs the export: whether it is the same model there, memory and speeds.

    The dense model is written for that program and run in it; what torch makes of its rounded weights is not asked.

    Raises:
        VerificationError: it is another model in the program.
    """
    why = "" if engine.is_installed else engine.absence
    if not why and not (job.beside.tokenizer or job.beside.gguf):
        why = f"not checked in {engine.name}, which needs a tokenizer: the model was exported without one"
    if why:
        return Compared(None, "", {"prompt": NO_SPEED, "decode": NO_SPEED}, engine_note=why)
    asked = EngineJob(
        engine,
        torch.get_num_threads(),
        **job.tokens,
        prompt_tokens=job.prompt_tokens,
        kv_cache=job.kv_cache,
    )
    held = in_dtype(job.measured, torch.float32)
    with rounded_kv_cache(held, job.kv_cache):
        theirs = expected(held, asked)
        tolerance = tolerance_of(held, asked, theirs, job.weights)
    del held  # what follows holds models in other processes
    with _dense_beside(job) as place, ExitStack() as stack:
        with while_loading(f" of {engine.name}"):
            process, found = stack.enter_context(running(asked, job.folder, workplace))
            report = compare(engine, found, theirs, tolerance)
            raise_for([fault] if (fault := fault_of(report)) else [], job.runtime.name)
            chat = ask_chat(job, process)
        note = "" if dense is None else _lacks_room(job, dense)
        if dense is not None and not note:
            try:
                figures = _write_dense(job, dense, place)
                other, beside_it = stack.enter_context(running(asked, place, workplace))
                chat = _beside_dense(job, chat, other)
                speeds = take_turns(process, other, is_warm=True)
                return Compared(
                    replace(figures, resident_bytes=beside_it.resident_bytes),
                    "",
                    speeds,
                    replace(report, dense_perplexity=beside_it.perplexity),
                    resident_bytes=found.resident_bytes,
                    chat=chat,
                )
            except (ProcessError, OSError) as error:
                note = f"The dense model could not be measured: {describe_error(error)}."
        with while_loading(f" of {engine.name}"):
            speeds = take_turns(process, is_warm=True)
    return Compared(None, note, speeds, report, resident_bytes=found.resident_bytes, chat=chat)


def _write_dense(job: Job, dense: PreTrainedModel, place: Path) -> ModelFigures:
    """Write the dense model as the runtime has it: its weights are rounded while they are written."""
    place.mkdir()
    written, _ = job.runtime.writer.before_rounding(dense)
    held = in_dtype(written, getattr(torch, job.dtype))
    job.runtime.writer.write(on_cpu(held), place, replace(job.beside, plan=""))
    numbers = sum(parameter.numel() for parameter in written.parameters())
    return ModelFigures(numbers, file_bytes(job.runtime, place), None, None)


@contextmanager
def _dense_beside(job: Job) -> Iterator[Path]:
    """Where the dense model lies for a while."""
    place = beside(job.folder, "dense")
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _loaded_dense(
    job: Job, dense: PreTrainedModel, place: Path, workplace: Path
) -> Iterator[tuple[ModelProcess, ModelFigures]]:
    """The dense model as transformers writes it, in the dtype that ships, in a process of its own."""
    written = on_cpu(in_dtype(dense, getattr(torch, job.weights)))
    with quiet():
        if job.beside.whole is not None:
            written = put_back(written, job.beside.whole)
        written.save_pretrained(place)
    if job.beside.tokenizer is not None:  # it is asked in a chat
        job.beside.tokenizer.save_pretrained(place)
    tensors = workplace / "tokens.safetensors"
    save_file(job.tokens, tensors)
    with ModelProcess(workplace) as process:
        answer = process.ask("load", **job.loading(place, tensors)) | process.ask("quality")
        yield process, job.figures(place, answer)


def _lacks_room(job: Job, dense: PreTrainedModel) -> str:
    """Why the dense model cannot be measured beside the export; empty where it can."""
    import psutil

    numbers = sum(parameter.numel() for parameter in dense.parameters()) + job.rest_parameters
    needed = ROOM * numbers * DTYPE_BYTES[job.dtype]
    for what, free in (
        ("disk", shutil.disk_usage(job.folder.parent).free),
        ("memory", psutil.virtual_memory().available),
    ):
        if free < needed:
            return (
                f"The dense model was not measured: it needs {needed / GB:.2f} GB of {what} beside the export, and "
                f"{free / GB:.2f} GB are free."
            )
    return ""


def take_turns(*processes: ModelProcess, is_warm: bool = False) -> dict[str, Speed]:
    """Speeds of one model, or of two in turns: first, second, first, second.

    What the machine does besides then slows both of a round, and their ratio stays. is_warm: they were at work already;
    else caches are cold and memory is not yet given out, and a first round is not counted.
    """
    for process in () if is_warm else processes:
        process.ask("turn")
    rounds = in_turns(processes, fewest=FEWEST_ROUNDS, most=MOST_ROUNDS, seconds=TIMED_SECONDS)
    return {
        what: Speed(
            exported=tuple(turns[0][what] for turns in rounds),
            dense=tuple(turns[1][what] for turns in rounds if len(turns) > 1),
        )
        for what in ("prompt", "decode")
    }
