"""How fast a model is on this machine, in the program that ships it: measured once, in fresh processes, and kept.

The model is cut to a few counts of blocks, written by the runtime, and loaded in a process for each count; these read a
prompt and write a few tokens in turns. Weights are at random: they multiply as fast as others, and none has to be
fetched. Everything runs on the processor, as an export is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from foldsearch import cache
from foldsearch.codec import from_json, to_json
from foldsearch.errors import InputError, ModelError, quote_error
from foldsearch.files import scratch
from foldsearch.machine import Machine, computing_dtype, free_memory
from foldsearch.model.convert import quiet
from foldsearch.model.fold import cast, folded_config, stock_config
from foldsearch.plan.cost import DTYPE_BYTES, GB, CostTable, Target, price, work
from foldsearch.plan.latency import Latency, fit_line, timed
from foldsearch.plan.plan import FoldPlan
from foldsearch.progress import StageProgress, silent
from foldsearch.runtimes import Beside, Runtime, runtime_for
from foldsearch.runtimes.process import LOADING_SECONDS, TRIES, ModelProcess, ProcessError, in_turns, room_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["Rounds", "Subject", "calibrated", "latency_of"]

SCHEMA = 3  # of what is kept; raise it when a turn, or what is read of it, changes
SHARES = (1.0, 2 / 3, 1 / 2, 1 / 3)  # of the blocks, that are measured
SMALLER = (1.0, 0.5, 0.25)  # of these shares, where memory does not hold the whole model as often
FEWEST_ROUNDS, MOST_ROUNDS, TIMED_SECONDS = 3, 9, 24.0
ROOM = 1.5  # of the bytes of all measured models, that their processes take
WRITTEN_TOKENS = 24  # at most, after a prompt
FEW_TOKENS = 16  # that a model reads when it is loaded; a prompt repeats them

Rounds = list[list[dict[str, float]]]
"""Tokens per second of reading ("prompt") and writing ("decode"), by round, then by model."""

Runner = Callable[["Subject", Sequence[FoldPlan], StageProgress], Rounds]
"""Measures the dense model cut by each of some plans."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    config: of the dense model. table: its costs. target: whose runtime and type of weights are measured. tokens: of the
    prompt. tokenizer, gguf: of the model, for programs whose files hold a tokenizer (see `foldsearch.runtimes.Beside`).
    """

    config: PretrainedConfig
    table: CostTable
    target: Target
    tokens: int
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    gguf: tuple[Path, ...] = ()

    @property
    def runtime(self) -> Runtime:
        """What a plan that only drops blocks is exported to."""
        plan = FoldPlan.identity(len(self.table.blocks))
        return runtime_for(plan, self.target.runtime, by_position=self.table.by_position)

    @property
    def weights(self) -> str:
        """How that stores weights."""
        return self.runtime.stored_as(self.target.dtype, self.target.weights if self.runtime.types else "")

    @property
    def dtype(self) -> str:
        """In which torch holds the numbers that are written."""
        dtype, runtime = self.target.dtype, self.runtime
        if runtime.stored_as(dtype) == self.weights and dtype not in runtime.lacks:
            return dtype
        return self.weights if self.weights in DTYPE_BYTES else "float32"

    @property
    def program(self) -> str:
        """What runs it, with its version."""
        engine = self.runtime.engine
        name, package = ("transformers", "transformers") if engine is None else (engine.name, engine.package)
        try:
            return f"{name} {version(package)}"
        except PackageNotFoundError:
            return name


def calibrated(
    subject: Subject, cache_dir: Path, progress: StageProgress = silent, *, run: Runner | None = None
) -> Latency:
    """The times of a model on this machine, from the cache or measured now.

    Args:
        subject: what is measured.
        cache_dir: where it is kept, by the model's shape, the program, the processor and its threads.
        progress: told how far it is.
        run: measures; in processes of their own if None.

    Raises:
        InputError: the program is not installed.
        ModelError: the runtime has no such model, or it could not be run.
        BudgetError: time does not grow with the blocks that run.
    """
    engine = subject.runtime.engine
    if engine is not None and not engine.is_installed:
        raise InputError(
            f"latency is measured in the program that ships, {engine.name}, which is not installed. Install it: pip "
            f"install 'foldsearch[{engine.extra}]', or take the latency out of the budget and the objectives."
        )
    subject = replace(subject, tokens=_prompt_tokens(subject))
    subject.runtime.writer.check_model(subject.config, subject.tokens)

    def measure() -> Any:
        plans = list(_plans(subject))
        rounds = (run or run_in_turns)(subject, plans, progress)
        return to_json(latency_of(subject, plans, rounds))

    kept, _ = cache.json_once(cache_dir / "latencies" / f"{_key(subject)}.json", measure)
    target = subject.target
    return replace(
        from_json(Latency, kept), runtime=target.runtime, weights=target.weights, kv_cache=target.kv_cache
    )


def latency_of(subject: Subject, plans: Sequence[FoldPlan], rounds: Rounds) -> Latency:
    """Lines through what was measured of plans, by the median of the rounds.

    Raises:
        BudgetError: time does not grow with the blocks that run.
    """
    machine = Machine.here("cpu")
    threads = f"{machine.threads} thread{'' if machine.threads == 1 else 's'}"
    measured = tuple(
        timed(
            plan.depth,
            [1000 * subject.tokens / models[number]["prompt"] for models in rounds],
            [1000 / models[number]["decode"] for models in rounds],
        )
        for number, plan in enumerate(plans)
    )
    done = [work(plan, subject.table, subject.target, subject.tokens) for plan in plans]
    pairs = list(zip(done, measured, strict=True))
    return Latency(
        runtime=subject.target.runtime,
        weights=subject.target.weights,
        tokens=subject.tokens,
        prompt=fit_line([(one.prompt_macs, at.prompt_ms) for one, at in pairs], "to read a prompt"),
        decode=fit_line([(one.decode_bytes, at.decode_ms) for one, at in pairs], "to write a token"),
        timed=measured,
        kv_cache=subject.target.kv_cache,
        where=f"{subject.program} in {subject.weights}, {machine.kind.removeprefix('cpu ')}, {threads}",
    )


def _prompt_tokens(subject: Subject) -> int:
    """Of the prompt: no longer than the target's context, nor than what the model has positions for."""
    longest = getattr(subject.config, "max_position_embeddings", None)
    room = longest - WRITTEN_TOKENS if isinstance(longest, int) and longest > 0 else subject.tokens
    return max(1, min(subject.tokens, subject.target.context, room))


def _plans(subject: Subject) -> Iterator[FoldPlan]:
    """The dense model and its first blocks only; fewer of them where memory is short.

    Raises:
        InputError: the model has one block, or memory does not hold a quarter of it.
    """
    num_blocks = len(subject.table.blocks)
    if num_blocks < 2:
        raise InputError(
            "latency is reckoned from models of several counts of blocks; got a model of 1 block. Take the latency out "
            "of the budget and the objectives."
        )
    for scale in SMALLER:
        counts = sorted({max(1, round(scale * share * num_blocks)) for share in SHARES}, reverse=True)
        counts = counts if len(counts) > 1 else [2, 1]
        plans = [FoldPlan.dropping(range(count, num_blocks), num_blocks) for count in counts]
        needed = ROOM * sum(price(plan, subject.table, subject.target).stored_bytes for plan in plans)
        building = 2 * price(plans[0], subject.table, Target("float32")).stored_bytes
        if max(needed, building) <= free_memory():
            yield from plans
            return
    raise InputError(
        f"latency is measured with at least a quarter of the model in memory several times over; that needs "
        f"{max(needed, building) / GB:.1f} GB, and {free_memory() / GB:.1f} GB are free. Take the latency out of the "
        "budget and the objectives."
    )


def _key(subject: Subject) -> str:
    """All that a time depends on."""
    shape = {
        name: value
        for name, value in subject.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "architectures", "dtype")
    }
    target = subject.target
    what = (subject.runtime.name, subject.weights, target.dtype, target.shares_weights, target.kv_cache)
    computing = computing_dtype(subject.dtype)
    return cache.key(
        SCHEMA, shape, *what, computing, subject.tokens, subject.program, to_json(Machine.here("cpu"))
    )


# ---- in processes of their own


def run_in_turns(subject: Subject, plans: Sequence[FoldPlan], progress: StageProgress = silent) -> Rounds:
    """Write the dense model cut by each plan, load each in a process, and let them take turns.

    Raises:
        ModelError: the program could not run one.
    """
    stage = f"measuring how fast {subject.program} is here"
    progress(stage, 0.0)
    with scratch("latency") as workplace:
        folders = [_written(subject, plan, workplace / f"{plan.depth} blocks") for plan in plans]
        for attempt in range(TRIES):
            try:
                return _timed(subject, folders, workplace, lambda share: progress(stage, share))
            except ProcessError as error:
                if attempt + 1 == TRIES or not error.is_silence:
                    what = f"{subject.program} could not run the model whose latency is to be known"
                    remedy = "Take the latency out of the budget and the objectives."
                    raise ModelError(quote_error(what, error, remedy)) from error
    raise AssertionError("the last try returns or raises")


@torch.no_grad()
def _written(subject: Subject, plan: FoldPlan, folder: Path) -> Path:
    """The dense model, weights at random, cut by a plan and written as the runtime has it."""
    from transformers import AutoModelForCausalLM

    runtime = subject.runtime
    auto: Any = AutoModelForCausalLM
    with quiet(), torch.random.fork_rng(devices=[]):  # weights at random are nobody else's numbers
        torch.manual_seed(0)
        cut = stock_config(folded_config(subject.config, plan))
        model: Any = auto.from_config(cut, dtype=getattr(torch, subject.dtype)).eval()
        if runtime.engine is None:
            model.save_pretrained(folder)
            return folder
        folder.mkdir()
        written, _ = runtime.writer.before_rounding(model)
        beside = Beside(subject.tokenizer(), subject.weights, gguf=subject.gguf, context=subject.tokens)
        runtime.writer.write(cast(written, getattr(torch, subject.dtype)), folder, beside)
    return folder


def _timed(
    subject: Subject, folders: Sequence[Path], workplace: Path, progress: Callable[[float], object]
) -> Rounds:
    engine = subject.runtime.engine
    with ExitStack() as stack:
        processes = [
            stack.enter_context(ModelProcess(workplace, answers=engine.module if engine else ""))
            for _ in folders
        ]
        for process, folder in zip(processes, folders, strict=True):
            process.ask("load", seconds=LOADING_SECONDS, **_loading(subject, folder, workplace))
            process.ask("turn", seconds=LOADING_SECONDS)  # caches are cold, memory is not yet given out
        return in_turns(
            processes,
            fewest=FEWEST_ROUNDS,
            most=MOST_ROUNDS,
            seconds=TIMED_SECONDS,
            progress=progress,
            silence=LOADING_SECONDS,
        )


def _loading(subject: Subject, folder: Path, workplace: Path) -> dict[str, Any]:
    """What the process of a runtime is asked to load (see `foldsearch.runtimes.verify`, and `Engine`)."""
    drawn = random.Random(0)
    ids = [drawn.randrange(subject.config.vocab_size) for _ in range(subject.tokens)]
    shared = {"folder": str(folder), "threads": torch.get_num_threads()}
    if subject.runtime.engine is not None:
        cached = {"kv_cache": subject.target.kv_cache} if subject.target.kv_cache else {}
        return shared | {"context": room_for(subject.tokens), "tokens": ids, **cached}
    tensors = workplace / "tokens.safetensors"
    save_file({"ids_NT": torch.tensor([ids[:FEW_TOKENS]])}, tensors)
    return shared | {
        "dtype": computing_dtype(subject.dtype),  # as an export is measured
        "attention": None,  # what transformers chooses
        "tensors": str(tensors),
        "prompt_tokens": subject.tokens,
    }
