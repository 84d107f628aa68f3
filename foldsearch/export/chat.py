"""Whether an export still chats: a question through its template, the tokens that end an answer, the answer."""

from __future__ import annotations

from typing import Any

from foldsearch.export.checks import raise_for
from foldsearch.export.figures import ChatReport
from foldsearch.export.shipment import Job
from foldsearch.model.tokens import as_parts, reads_parts, tells_time
from foldsearch.runtimes import verify
from foldsearch.runtimes.process import ModelProcess

QUESTION = ({"role": "user", "content": "What is the capital of France?"},)
ANSWER_TOKENS = 24  # at most: a few lines say whether a model answers at all
SECONDS = 600.0  # a program that has not answered by then has stopped


def question_to(job: Job) -> list[dict[str, Any]]:
    """The question in the form that the chat template of an export reads."""
    tokenizer = job.beside.tokenizer
    in_parts = tokenizer is not None and reads_parts(tokenizer)
    return as_parts(QUESTION) if in_parts else list(QUESTION)


def ask_chat(job: Job, process: ModelProcess) -> ChatReport | None:
    """Ask an export in its process; None where its tokenizer has no chat template, or one that refuses the question.

    The answer is the likeliest token each time, so that it can be read beside the dense model's; it is no measure of
    quality, and nothing depends on it.

    Raises:
        VerificationError: the template gives another text than the model's own tokenizer does, or a token that ends an
            answer is lost.
    """
    tokenizer: Any = job.beside.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return None
    question = question_to(job)
    try:
        expected = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program of its own: some ask for words of the system first
        return None
    answer = process.ask("chat", seconds=SECONDS, messages=question, num_tokens=ANSWER_TOKENS)
    engine = job.runtime.engine
    is_full = engine is not None and engine.most_stops == len(answer["stops"])  # the runtime has told that
    faults = [] if is_full else stop_faults(job.stops, answer["stops"])
    note = ""
    is_timed = tells_time(tokenizer)
    if answer["prompt"] != expected and not is_timed:
        differs = f"it makes {answer['prompt']!r} of a question, the base model's {expected!r}"
        if engine is None:
            faults.append(f"its chat template is another one: {differs}")
        else:  # llama.cpp has a reader of templates of its own
            note = f"The chat template is read in another way by {engine.name}: {differs}."
    raise_for(faults, job.runtime.name)
    return ChatReport(answer["prompt"], tuple(answer["stops"]), answer["text"], None, note, is_timed)


def stop_faults(expected: list[int], found: list[int]) -> list[str]:
    """Which tokens that end an answer are lost, in words."""
    lost = sorted(set(expected) - set(found))
    return [f"of the tokens that end an answer, {expected}, it lost {lost}"] if lost else []


def check_stops(job: Job) -> None:
    """Whether an export that transformers reads still has the tokens that end an answer, template or not.

    Raises:
        VerificationError: it lost one.
    """
    if not job.runtime.loader:
        raise_for(stop_faults(job.stops, verify.stop_tokens(str(job.folder))), job.runtime.name)
