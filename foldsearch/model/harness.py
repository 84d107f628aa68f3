"""lm-evaluation-harness on models in this process: its tasks, its prompts, its scores.

The harness is an extra, `pip install 'foldsearch[eval]'`, and imported only when a task is asked for.
"""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.errors import DataError, InputError, nearest, quote_error
from foldsearch.model.tokens import begun, front_of
from foldsearch.progress import StageProgress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task, of the dense and of the folded model.

    metric: as the harness names it, "acc" or "acc_norm", with its filter if that is not "none". *_se: its standard
    error, None where the harness gives none. agreement: share of items with the same value in both models, where the
    metric is 0 or 1 an item; else None.
    """

    task: str
    metric: str
    items: int
    dense: float
    dense_se: float | None
    folded: float
    folded_se: float | None
    agreement: float | None


def open_tasks(names: Sequence[str], *, include_path: Path | str | None = None) -> Any:
    """The harness's task manager, once it knows every name.

    Args:
        names: tasks, groups or tags of the harness.
        include_path: a folder of task YAML files; they win over tasks of the same name.

    Raises:
        InputError: the harness is not installed, the folder is not there, or a name is not known.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            quote_error(
                "--tasks runs lm-evaluation-harness, which cannot be imported here",
                error,
                "Install it: pip install 'foldsearch[eval]'",
            )
        ) from error
    include_path = None if include_path is None else Path(include_path)
    if include_path is not None and not include_path.is_dir():
        raise InputError(
            f"--include-path is a folder of task YAML files, but there is no folder '{include_path}'."
        )
    manager = _manager(None if include_path is None else include_path.resolve())
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(
                f"a task is one of the {len(manager.all_tasks):,} names that lm-evaluation-harness knows, not {name!r}."
                f"{nearest(name, manager.all_tasks, most=3)} `lm_eval ls tasks` lists them; --include-path DIR adds "
                "your own."
            )
    return manager


@cache
def _manager(include_path: Path | None) -> Any:
    """It reads thousands of YAML files, which takes seconds: once per process."""
    from lm_eval.tasks import TaskManager

    with _told(silent):
        return TaskManager(include_path=None if include_path is None else str(include_path))


def task_texts(manager: Any, name: str, *, limit: int | None = None) -> Iterator[tuple[int, str]]:
    """What the items of a task ask, numbered from 1 through all of its subtasks; loads their data.

    Raises:
        DataError: the data is not here and cannot be fetched. InputError: the task runs code that a model writes, or
            shows pictures.
    """
    with _told(silent), _loadable(name):
        tasks = manager.load([name])["tasks"]
    number = 0
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                f"task {task.task_name}: it runs code that the model writes, which is not done here. Choose another."
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"task {task.task_name}: it shows pictures or plays sounds, but the model reads text. Choose another."
            )
        for doc in islice(task.eval_docs, limit):
            number += 1
            text = task.doc_to_text(doc)
            if (
                not isinstance(text, str) or not text.strip()
            ):  # several contexts, or a text to go through as a whole
                text = task.doc_to_target(doc)
            if isinstance(text, str):
                yield number, text


def run_task(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    name: str,
    *,
    limit: int | None = None,
    progress: StageProgress,
) -> tuple[TaskScore, ...]:
    """The scores of a task, group or tag: of the dense and the folded model, in this order.

    Seeds, shots and prompts are the task's own, the same for both.

    Raises:
        DataError: the data is not here and cannot be fetched.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = []
    for model, who in zip(models, ("dense", "folded"), strict=True):
        with _told(lambda stage, share, who=who: progress(f"{name}, {who}: {stage}", share)):  # type: ignore[misc]
            # The harness keeps the logits of a batch: on a CPU one sequence at a time is as fast, and small.
            size = 1 if model.device.type == "cpu" else 8
            harnessed = HFLM(
                pretrained=model, tokenizer=_without_end(tokenizer), backend="causal", batch_size=size
            )
            with _loadable(name):
                manager.load([name])
            found.append(simple_evaluate(model=harnessed, tasks=[name], task_manager=manager, limit=limit))
    return tuple(_scores(*found))


def _without_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it that puts nothing after a text.

    The harness asks for special tokens, as it should, so that a context begins as the tokenizer begins one. Some
    tokenizers also put an end token after it, and then nothing could follow.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    probe = "a"
    asked = tokenizer(probe, verbose=False)["input_ids"]
    if asked == begun(tokenizer, probe) or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    names = {f"front{place}": token for place, token in enumerate(front_of(tokenizer))}
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        " ".join([*names, "$A"]), special_tokens=list(names.items())
    )
    return changed


def _scores(dense: Any, folded: Any) -> Iterator[TaskScore]:
    for task, values in dense["results"].items():
        ours = folded["results"][task]
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = f"{metric}_stderr,{kind}"
            yield TaskScore(
                task=task,
                metric=metric if kind == "none" else f"{metric}, {kind}",
                items=_items(dense, task),
                dense=float(value),
                dense_se=_number(values.get(error)),
                folded=float(ours[key]),
                folded_se=_number(ours.get(error)),
                agreement=_agreement(dense, folded, task, metric, kind),
            )


def _items(results: Any, task: str) -> int:
    """Of a task; of a group, those of all its tasks."""
    counts = results["n-samples"]
    if task in counts:
        return int(counts[task]["effective"])
    return sum(_items(results, child) for child in results.get("group_subtasks", {}).get(task, ()))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # the harness writes "N/A"


def _agreement(dense: Any, folded: Any, task: str, metric: str, kind: str) -> float | None:
    def values(results: Any) -> list[Any]:
        rows = [row for row in results["samples"].get(task, ()) if row["filter"] == kind]
        return [row.get(metric) for row in sorted(rows, key=lambda row: row["doc_id"])]

    pairs = list(zip(values(dense), values(folded), strict=True))
    if not pairs or any(value not in (0, 1) for pair in pairs for value in pair):
        return None
    return float(sum(a == b for a, b in pairs) / len(pairs))


@contextmanager
def _loadable(name: str) -> Iterator[None]:
    """Whatever keeps a task's data away is told as one error; who raises it, and what, differs from task to task."""
    try:
        yield
    except Exception as error:
        raise DataError(
            quote_error(
                f"task {name}: its data cannot be loaded",
                error,
                "Check the network and HF_ENDPOINT, or write a task over a local file (dataset_path: json, "
                "dataset_kwargs: data_files) and name its folder with --include-path.",
            )
        ) from error


@contextmanager
def _told(progress: StageProgress) -> Iterator[None]:
    """The harness talks in log lines and bars; here its bars speak to `progress`, and only its errors are shown."""
    from tqdm import tqdm

    init, display, logger = tqdm.__init__, tqdm.display, logging.getLogger("lm_eval")
    level = logger.level

    def quiet(bar: Any, *args: Any, **options: Any) -> None:
        init(bar, *args, **{**options, "file": io.StringIO()})

    def tell(bar: Any, *args: Any, **options: Any) -> None:
        if bar.total:
            progress(bar.desc.removesuffix(": ") or "preparing", bar.n / bar.total)

    tqdm.__init__, tqdm.display = quiet, tell
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tqdm.__init__, tqdm.display = init, display
        logger.setLevel(level)
