"""What a trial's model still knows, beside the dense one: questions, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.errors import InputError
from foldsearch.files import write_json
from foldsearch.paths import printable
from foldsearch.progress import Notice, StageProgress, silent, unheard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foldsearch.model.choices import ChoiceQuality, EncodedOption, Question
    from foldsearch.model.harness import TaskScore
    from foldsearch.report.view import RunView

# What a result is of: what was asked, and of which state of the model.
_RESULT_OF = ("sha256", "task", "plan", "recovery_tokens", "healing_tokens", "weights", "kv_cache")
_LONGEST_NAME = 50  # characters that a file name repeats of what was asked: of four bytes at most


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model is asked.

    Attributes:
        questions: JSONL files, see `foldsearch.model.choices.read_questions`.
        tasks: names of lm-evaluation-harness (the `eval` extra).
        limit: only the first so many items of each file and task, at least 2.
        include_path: a folder of task YAML files.
    """

    questions: Sequence[Path | str] = ()
    tasks: Sequence[str] = ()
    limit: int | None = None
    include_path: Path | str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The question files as paths."""
        return tuple(map(Path, self.questions))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate_trial` found on one question file or one task, and where it is written.

    choices: of a question file; else None. scores: of a task; else empty.
    """

    name: str
    file: Path
    choices: ChoiceQuality | None
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True, slots=True)
class _Ready:
    """What was asked, read and found to be unseen; `manager` knows the tasks, and is None where none is asked."""

    items: dict[Path, tuple[Question, ...]]
    encoded: dict[Path, list[tuple[EncodedOption, ...]]]
    tokenizer: PreTrainedTokenizerBase
    manager: Any


def evaluate_trial(
    run: RunView,
    number: int,
    asked: Asked,
    *,
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> tuple[Evaluation, ...]:
    """What a trial's model still knows, beside the dense one.

    Both models answer in this process, in the precision that the trial was measured in. What the search or the recovery
    saw is refused before a model is loaded. Each result is written into the run, evaluations/NNNNN-NAME.json.

    Args:
        run: the run.
        number: of a trial that reached the last rung.
        asked: question files and tasks.
        progress: told what is being done.
        notice: told what a person should know.

    Raises:
        RunError: the trial was not measured, or the model or the tokens are others than the run was made with.
        InputError: a question file or task cannot be used, or was seen. ModelError: the model is gone.
        VerificationError: the rebuilt model is not the one that was measured.
    """
    from foldsearch.context import open_workbench
    from foldsearch.prepare import prepare_context
    from foldsearch.rebuild import check_rebuilt, recovered_model
    from foldsearch.shipped import as_stored

    if asked.include_path is not None and not asked.tasks:
        notice(
            "--include-path does not apply: no task is asked, and it holds tasks only. Name some with --tasks."
        )
    picked, folder = run.pick(number=number), run.folder
    names = _file_names(asked)
    ready = _read_unseen(asked, run, progress)
    context = prepare_context(folder.study, folder.path, progress=progress, notice=notice)
    progress("rebuilding the model that was measured", 0.0)
    folded, trial = recovered_model(context, picked.number)
    check_rebuilt(context, picked.number, folded, picked)
    target = context.target.storing(trial.types)
    if target.rounds:
        folded = as_stored(folded, target)
    models = {"dense": open_workbench(context).dense, "folded": folded}
    about = {
        "trial": trial.number,
        "plan": str(trial.plan),
        "model": folder.study.model,
        "dtype": context.files.dtype,
        **({"weights": target.weights} if target.rounds else {}),
        **({"kv_cache": target.kv_cache} if target.kv_cache else {}),
        "recovery_tokens": trial.last.kept_tokens,
        "healing_tokens": trial.healing.tokens if trial.healing else 0,
        "limit": asked.limit,
    }

    def write(name: str, what: dict[str, Any]) -> Path:
        told = {**about, **what}
        file = folder.evaluation(trial.number, name)
        result_of = [told.get(key) for key in _RESULT_OF]
        if file.exists() and _written_of(file) != result_of:
            # Another file of the same name, or the trial was trained further since: both results stay.
            part = hashlib.sha256(repr(result_of).encode()).hexdigest()[:8]
            file = folder.evaluation(trial.number, f"{name}-{part}")
        write_json(file, told)
        return file

    found = []
    for path in asked.files:
        quality, what = _ask_questions(path, ready, models, progress)
        found.append(Evaluation(names[str(path)], write(names[str(path)], what), quality, ()))
    for task in asked.tasks:
        scores = _ask_task(task, asked.limit, ready, models, progress)
        what = {"task": task, "scores": [asdict(score) for score in scores]}
        found.append(Evaluation(names[task], write(names[task], what), None, scores))
    return tuple(found)


def _read_unseen(asked: Asked, run: RunView, progress: StageProgress) -> _Ready:
    """Read what is asked, and refuse what the run saw; no weight is read.

    Raises:
        InputError: something cannot be used, or was seen.
    """
    from foldsearch.context import read_splits
    from foldsearch.model import choices, harness
    from foldsearch.model.source import open_config, open_tokenizer
    from foldsearch.prepare import open_source

    items = {path: choices.read_questions(path, limit=asked.limit) for path in asked.files}
    for path in asked.files:
        _check_source(path, run)
    manager = None
    if asked.tasks:
        progress("reading the names of tasks", 0.0)
        manager = harness.open_tasks(asked.tasks, include_path=asked.include_path)

    folder = run.folder
    splits = read_splits(folder)
    source = open_source(folder.study, progress, run_folder=folder.path)
    tokenizer = open_tokenizer(source)
    longest = getattr(open_config(source), "max_position_embeddings", None)
    saw = (splits.search, splits.recovery)
    for path, of_file in items.items():
        progress(f"comparing {printable(path)} with the run's texts", 0.0)
        _check_unseen(
            path, choices.seen(((item.line, item.text) for item in of_file), tokenizer, saw), "line"
        )
    encoded = {path: _encode(path, of_file, tokenizer, longest) for path, of_file in items.items()}
    for task in asked.tasks:
        progress(f"loading {task}, and comparing it with the run's texts", 0.0)
        texts = harness.task_texts(manager, task, limit=asked.limit)
        _check_unseen(task, choices.seen(texts, tokenizer, saw), "item")
    return _Ready(items, encoded, tokenizer, manager)


def _ask_questions(
    path: Path, ready: _Ready, models: dict[str, PreTrainedModel], progress: StageProgress
) -> tuple[ChoiceQuality, dict[str, Any]]:
    """How both models answer a question file, and what is written of it."""
    from foldsearch.model import choices

    items = ready.items[path]
    of_dense, of_folded = (
        choices.option_perplexities(
            model, ready.encoded[path], progress=partial(progress, f"{printable(path.name)}, {who}")
        )
        for who, model in models.items()
    )
    quality = choices.compare_choices(of_dense, of_folded, [item.answer for item in items])
    return quality, {
        "questions": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **asdict(quality),
        "perplexities": [
            {"line": item.line, "answer": item.answer, "dense": dense, "folded": ours}
            for item, dense, ours in zip(items, of_dense, of_folded, strict=True)
        ],
    }


def _ask_task(
    task: str, limit: int | None, ready: _Ready, models: dict[str, PreTrainedModel], progress: StageProgress
) -> tuple[TaskScore, ...]:
    from foldsearch.model import harness

    pair = (models["dense"], models["folded"])
    return harness.run_task(pair, ready.tokenizer, ready.manager, task, limit=limit, progress=progress)


def _written_of(file: Path) -> list[Any] | None:
    """What a file of results is of; None where it cannot be read."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return [told.get(key) for key in _RESULT_OF]
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _file_names(asked: Asked) -> dict[str, str]:
    """A file name for each question file and task: what it is called, and how much of it is asked."""
    questions, tasks, limit = asked.files, asked.tasks, asked.limit
    if not questions and not tasks:
        raise InputError(
            "evaluate needs something to ask: --questions FILE.jsonl, or --tasks NAME,NAME of lm-evaluation-harness."
        )
    if limit is not None and limit < 2:
        raise InputError(f"--limit is a number of items, at least 2 for a standard error, not {limit}.")
    names: dict[str, str] = {}
    for given, called in [*((str(path), path.stem) for path in questions), *((task, task) for task in tasks)]:
        name = re.sub(r"[^\w.-]+", "-", called)[:_LONGEST_NAME] + (f"-first{limit}" if limit else "")
        if name in names.values():
            raise InputError(
                f"each question file and task has a name of its own, but two are called {called!r}. Rename one, or "
                "ask one at a time."
            )
        names[given] = name
    return names


def _check_source(path: Path, run: RunView) -> None:
    """Refuse a question file that is, or lies in, a source of the run's texts."""
    from foldsearch.model.text import local_path
    from foldsearch.prepare import sources_of

    made = run.folder.identity()
    for reference in sources_of(run.folder.study):
        place = made.place_of(reference) if made else None
        source = place.now(run.folder.path) if place else local_path(reference)
        if source is not None and path.resolve().is_relative_to(source.resolve()):
            raise InputError(
                f"questions must be unseen, but {printable(path)} belongs to {printable(reference)}, which "
                f"'{run.name}' was made with. Take a file from elsewhere."
            )


def _check_unseen(what: object, found: Sequence[tuple[int, str]], unit: str) -> None:
    if found:
        first, name = found[0]
        occur = "occurs" if len(found) == 1 else "occur"
        raise InputError(
            f"questions must be unseen, but {len(found):,} of {printable(what)} {occur} in texts "
            f"that this run used, the first ({unit} {first}) in the {name} texts: 13 of its tokens in a row, or all of "
            "them. Leave these out, or make a run on other texts."
        )


def _encode(
    path: Path, items: Sequence[Question], tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> list[tuple[EncodedOption, ...]]:
    from foldsearch.model.choices import encode_question

    return [
        encode_question(item, tokenizer, f"{printable(path)}, line {item.line}", longest=longest)
        for item in items
    ]
