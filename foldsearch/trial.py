"""One trial, rung by rung: draft → gate → fold → measure → recover a little → measure → recover more.

It knows neither Optuna nor Ray and can run alone in one process. What it learnt is on disk after every rung, under
the run folder, so a trial that was stopped or killed goes on from its last rung when it is run again. What is reported,
rebuilt and exported is the best state so far, so that recovery never makes a result worse; and where it hurt, training
goes on from that state too, at a lower learning rate:

    trials/00012/trial.json             plan, recovery settings, results so far
    trials/00012/start.safetensors      fitted replacements and adapters, where the plan has any
    trials/00012/recovered.safetensors  what recovery trained, at the trial's best state; none where that is untrained
    trials/00012/optimizer.safetensors  its latest state, to go on from; until the last rung
    plans/<plan id>.json                which trial measures the plan: no plan is trained twice; plans whose adapters
                                        start in different ways are different ones
    tokens.safetensors                  the three token sets
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from foldsearch.errors import InputError, ModelError, RunError, VerificationError, describe_error, quote_error
from foldsearch.files import once, replace_atomically, write_json
from foldsearch.identity import Identity, Machine, Place
from foldsearch.model import gates as gating
from foldsearch.model import source
from foldsearch.model.checks import check_lengths, check_tokens
from foldsearch.model.children import base_blocks, base_distances
from foldsearch.model.content import ContentHashes, file_hash
from foldsearch.model.evidence import (
    Evidence,
    GreedyResult,
    attention_order,
    best_window,
    greedy_order,
    influence_order,
    measure_evidence,
)
from foldsearch.model.evolution import EvolutionResult, EvolutionSettings, evolve
from foldsearch.model.fold import fold
from foldsearch.model.judge import DenseTargets, dense_targets, judge
from foldsearch.model.measure import measure
from foldsearch.model.recover import (
    Diverged,
    Recovery,
    RecoverySettings,
    attach,
    load_trained,
    merge,
    saved_tokens,
)
from foldsearch.model.splits import make_splits
from foldsearch.model.starts import (
    StartSettings,
    fitting_tokens,
    folded_start,
    linear_window,
    new_values,
)
from foldsearch.model.states import residual_states
from foldsearch.model.text import Source, check_reference, holds, local_path
from foldsearch.model.tokens import Splits, TokenSet
from foldsearch.paths import printable
from foldsearch.plan.cost import Budget, Cost, CostTable, Target, price
from foldsearch.plan.plan import FoldPlan, Replacement
from foldsearch.plan.proposal import (
    AdapterStart,
    Proposal,
    fold_plan,
    lower_bound,
    random_drop,
    uniform_drop,
)
from foldsearch.plan.result import Quality, Setback, TrialResult, trained_for
from foldsearch.progress import Notice, StageProgress, TimeUp, counting, silent, unheard
from foldsearch.spec.study import SourceSettings, Study

BASE_RANK = 1 / 16  # of the base-block metric, in widths of the model: FlexiGPT's 256 for 4,096
TOKENS = "tokens.safetensors"  # of a run: its three token sets
WAIT_SECONDS = 0.2  # between looks at a trial that measures the same plan
EXTENSION_NEXT_TOKEN = 0.5  # weight of the next-token loss for extensions, where the study does not say
RATE_AFTER_SETBACK = 0.25  # of the learning rate, where training left the model worse than it was
GREEDY_TOKENS = 1024  # SLEB calibrates on few; each of its hundreds of runs goes over them
EVIDENCE_SCHEMA = 3


@dataclass(frozen=True, slots=True)
class TrialContext:
    """All that trials of a run share: paths and plain values, so that it can be sent to another process.

    budget: resolved against the dense model's price. threads: torch threads of a trial; 0 leaves them alone.
    asking_seconds: how long it took to ask the dense model. token_seconds: one token of that, with all threads; 0 where
    the cache had the answers.
    """

    study: Study
    files: source.DenseFiles
    table: CostTable
    budget: Budget
    run_folder: Path
    cache_dir: Path
    device: str
    threads: int = 0
    asking_seconds: float = field(default=0.0, compare=False)
    token_seconds: float = field(default=0.0, compare=False)

    @property
    def target(self) -> Target:
        """What plans are priced for."""
        return self.study.target.value()

    @property
    def dense_cost(self) -> Cost:
        """The price of the dense model."""
        return price(FoldPlan.identity(len(self.table.blocks)), self.table, self.target)

    def trial_folder(self, number: int) -> Path:
        """Where a trial keeps what it learnt."""
        return self.run_folder / "trials" / f"{number:05d}"


# ---- before the first trial


def choose_device(wanted: str) -> str:
    """The device that "auto" stands for on this machine: CUDA, then MPS, then the CPU.

    Raises:
        InputError: a device was named that is not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(device for device, available in here.items() if available)
    if not here[wanted]:
        found = ", ".join(device for device, available in here.items() if available)
        raise InputError(f"--device {wanted} needs one, but torch finds only: {found}.")
    return wanted


def choose_precision(wanted: str, device: str) -> str:
    """The dtype that "auto" stands for: bfloat16 where the device multiplies it fast, else float32."""
    if wanted != "auto":
        return wanted
    fast = device == "cuda" or (device == "cpu" and torch.cpu._is_amx_tile_supported())
    return "bfloat16" if fast else "float32"


def open_source(
    study: Study, progress: StageProgress = silent, *, run_folder: Path | None = None
) -> source.ModelSource:
    """The study's model as it is found: no weight is read, and of a hub model none is fetched.

    Args:
        study: names the model.
        progress: told what is being done.
        run_folder: of a run that was made with it: the model is looked for where it lay then, at its commit.

    Raises:
        ModelError: it cannot be found.
        RunError: it is gone, or its config or its tokenizer is another one than the run was made with.
    """
    typed = source.revision_of(study.model)
    if study.revision and typed and typed != study.revision:
        raise ModelError(
            f"a revision is said once, but the model is '{printable(study.model)}' and the study's revision is "
            f"'{printable(study.revision)}'. Leave one of them out."
        )
    made = Identity.read(run_folder) if run_folder else None
    path = made.path_of(study.model, run_folder) if made and run_folder else None
    found = source.locate(
        str(path) if path else study.model,
        revision=(made.commit if made else "") or study.revision,
        trust_remote_code=study.trust_remote_code,
        progress=lambda message: progress(message, 0.0),
    )
    if made and run_folder:
        made.check_model(source.identify(found, of_weights=False), found.place, run_folder)
    return found


def prepare_model(
    study: Study,
    found: source.ModelSource,
    *,
    run_folder: Path | None = None,
    cache_dir: Path | None = None,
    progress: StageProgress = silent,
) -> tuple[source.DenseFiles, ContentHashes]:
    """The study's model as files that can be mapped, and what it is made of; fetched and converted if need be.

    Args:
        study: says what is computed in.
        found: what `open_source` found.
        run_folder: of a run that was made with it: only that model will do, in that dtype.
        cache_dir: of converted models; `default_cache_dir()` if None.
        progress: told what is being done.

    Raises:
        ModelError: its weights cannot be used.
        RunError: they are others than the run was made with.
    """

    def say(message: str) -> None:
        progress(message, 0.0)

    made = Identity.read(run_folder) if run_folder else None
    found = source.with_weights(found, say)
    say("reading the weights")
    content = source.identify(found, cache_dir=cache_dir)
    if made and run_folder:
        made.check_model(content, found.place, run_folder)
    dtype = made.dtype if made else choose_precision(study.precision, choose_device(study.device))
    return source.prepare(found, dtype=dtype, cache_dir=cache_dir, content=content, progress=say), content


def prepare_context(
    study: Study,
    run_folder: Path,
    *,
    cache_dir: Path | None = None,
    check: Callable[[CostTable], object] = lambda table: None,
    progress: StageProgress = silent,
    notice: Notice = unheard,
) -> TrialContext:
    """Price the model, split the text, fetch and convert the weights, and ask the dense model once.

    In this order: what is cheap and may be refused comes before what is dear. Everything is kept: the model and its
    answers in the cache by content; the token sets, and what the run was made of, in the run folder. Where the run
    folder holds them already, only the same model and the same tokens will do.

    Args:
        study: what is to be run.
        run_folder: made, where it is not there, once the model and the text can be used.
        cache_dir: of models and of all that is computed from them; `default_cache_dir()` if None.
        check: told what the blocks cost before the text is read; what it raises ends the preparation.
        progress: told what is being done.
        notice: told what a person should know, in words.

    Raises:
        ModelError, DataError: the model or the text cannot be used.
        RunError: they are others than the run was made with.
        InputError: the cache cannot be written to.
    """
    cache_dir = cache_dir or source.default_cache_dir()
    source.check_cache(cache_dir)
    device = choose_device(study.device)
    made = Identity.read(run_folder)
    if made is None:
        check_data(study)
    else:
        _say_how_it_differs(study, made, device, notice)
    found = open_source(study, progress, run_folder=run_folder)
    if made is None:
        say_unused(study, found, notice)
    config = source.open_config(found)
    # A run's own study has all defaults written out, and was looked at when the run began.
    if made is None and (words := check_study_lengths(study, config)):
        notice(words)
    progress("pricing the dense model", 0.0)
    table = measure(config)
    check(table)
    splits = _splits_of(study, run_folder, found, made, progress, notice)
    sets = (splits.search, splits.recovery, splits.report)
    check_tokens(study.model, config.vocab_size, (one.ids_NT for one in sets))
    files, content = prepare_model(
        study, found, run_folder=run_folder, cache_dir=cache_dir, progress=progress
    )
    opened = AutoConfig.from_pretrained(files.folder, trust_remote_code=files.trust_remote_code)
    if opened.tie_word_embeddings != config.tie_word_embeddings:
        # The config says tied, but the checkpoint holds two matrices that differ: only the weights could tell.
        table = measure(opened)
        check(table)
    dense = price(FoldPlan.identity(len(table.blocks)), table, study.target.value())
    context = TrialContext(study, files, table, study.budget.value(dense), run_folder, cache_dir, device)
    if made is None:
        _identity_of(context, found, content, splits).write(run_folder)
    return _asked(context, progress)


def _asked(context: TrialContext, progress: StageProgress) -> TrialContext:
    """Ask the dense model, and note how long it took: it is part of a run's time, and the first measure of the pace."""
    began, asked = time.monotonic(), 0.0

    def say(stage: str, share: float) -> None:
        nonlocal asked
        asked = asked or share  # nothing is told where the answers are in the cache
        progress(stage, share)

    bench = open_workbench(context, say)
    seconds = time.monotonic() - began
    tokens = sum(
        one.ids_NT.numel() for one in (bench.splits.search, bench.splits.recovery, bench.splits.report)
    )
    return replace(context, asking_seconds=seconds, token_seconds=seconds / tokens if asked else 0.0)


def check_study_lengths(study: Study, config: PretrainedConfig) -> str:
    """Whether the study's sequences and its target's context suit the model; what a person should know, or "".

    Raises:
        ModelError: they are longer than what the model was made for.
    """
    return check_lengths(
        study.model,
        config,
        sequence_length=study.splits.sequence_length,
        # the default is nobody's wish
        context=study.target.context if "context" in study.target.model_fields_set else 0,
    )


def say_unused(study: Study, found: source.ModelSource, notice: Notice) -> None:
    """Tell of settings that do not apply to the model and the text as they were found."""
    if study.revision and not found.hub_id:
        notice(f"revision does not apply: '{printable(study.model)}' is not on the hub.")
    sources = study.all_sources()
    plain = [one for one in sources if one.sample_by and not holds(one.source)[0]]
    rows = [one for one in sources if one.text_column and not holds(one.source)[1]]
    for key, unused, why in (
        ("sample_by", plain, "there are rows, each of which is a document"),
        ("text_column", rows, "plain text has no columns"),
    ):
        for reference in dict.fromkeys(one.source for one in unused):
            notice(f"{key} does not apply to '{printable(reference)}': {why}.")


def _say_how_it_differs(study: Study, made: Identity, device: str, notice: Notice) -> None:
    """Tell where a run goes on otherwise than a new one of the same study would, or than it began."""
    if device != made.device:
        notice(
            f"the run began on {made.device}, and goes on on {device}: its figures may differ by rounding."
        )
    if (here := choose_precision(study.precision, device)) != made.dtype:
        notice(f"the run computes in {made.dtype}, as it began; a new run would compute in {here} here.")


def _splits_of(
    study: Study,
    run_folder: Path,
    found: source.ModelSource,
    made: Identity | None,
    progress: StageProgress,
    notice: Notice,
) -> Splits:
    """The token sets of a run, cut where there are none yet.

    Raises:
        DataError: the text cannot be used. RunError: the token sets are not those that the run was made with.
    """
    path = run_folder / TOKENS
    if path.exists():
        splits = read_splits(run_folder)
    else:
        splits = make_study_splits(study, source.open_tokenizer(found), progress, notice=notice)
    if made is not None:
        made.check_tokens(_token_hashes(splits), run_folder)
    if not path.exists():
        _write_splits(path, splits)
    return splits


def _token_hashes(splits: Splits) -> dict[str, str]:
    return {one.name: one.content_hash for one in (splits.search, splits.recovery, splits.report)}


def _identity_of(
    context: TrialContext, found: source.ModelSource, content: ContentHashes, splits: Splits
) -> Identity:
    study = context.study
    here = [study.model] if not found.hub_id and source.local_path(study.model) else []
    # what is in a package is found by the package's name, wherever that lies
    here += [text for text in sources_of(study) if not text.startswith("package:") and local_path(text)]
    return Identity(
        model=study.model,
        content=content,
        commit=found.commit,
        dtype=context.files.dtype,
        device=context.device,
        tokens=_token_hashes(splits),
        places=tuple(Place.of(typed, context.run_folder) for typed in dict.fromkeys(here)),
    )


def sources_of(study: Study) -> tuple[str, ...]:
    """The references of the study's text, each once."""
    return tuple(dict.fromkeys(one.source for one in study.all_sources()))


def check_data(study: Study) -> None:
    """Look whether the study's text is there, without reading it. What is on the hub is looked up when it is read.

    Raises:
        DataError: a file, a folder or a package is not there.
    """
    for reference in sources_of(study):
        check_reference(reference)


def make_study_splits(
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    progress: StageProgress = silent,
    *,
    search_only: bool = False,
    notice: Notice = unheard,
) -> Splits:
    """The token sets of a study.

    Args:
        study: whose text, and how much of it.
        tokenizer: the dense model's.
        progress: told what is being done.
        search_only: leave the recovery and the report set empty.
        notice: told where a set is not as the study asks for it.

    Raises:
        DataError: the text cannot be read, or there is too little of it.
    """
    progress("reading the text", 0.0)
    sources = study.sources()
    sizes = study.splits
    num_sequences = {"search": sizes.search, "recovery": sizes.recovery, "report": sizes.report}
    if search_only:
        num_sequences |= {"recovery": 0, "report": 0}
    return make_splits(
        [_source(one) for one in sources]
        if isinstance(sources, tuple)
        else {split: [_source(one) for one in of] for split, of in sources.items()},
        tokenizer,
        sequence_length=sizes.sequence_length,
        num_sequences=num_sequences,
        progress=lambda message: progress(message, 0.0),
        notice=notice,
    )


def _source(settings: SourceSettings) -> Source:
    return Source(settings.source, settings.text_column, settings.sample_by, settings.weight)


def _write_splits(path: Path, splits: Splits) -> None:
    sets = (splits.search, splits.recovery, splits.report)
    tensors = {f"{one.name}.ids": one.ids_NT.contiguous() for one in sets}
    tensors |= {f"{one.name}.document": one.document_N.contiguous() for one in sets}
    tensors |= {f"{one.name}.text": one.text_NT.contiguous() for one in sets}
    metadata = {one.name: json.dumps(one.documents) for one in sets}
    replace_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_splits(run_folder: Path) -> Splits:
    """The token sets of a run.

    Raises:
        RunError: the run folder has none, or they are damaged.
    """
    path = run_folder / TOKENS
    if not path.exists():
        raise RunError(f"a run folder holds {TOKENS}, but {run_folder} does not. Start the run anew.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            sets = [
                TokenSet(
                    name,
                    file.get_tensor(f"{name}.ids"),
                    file.get_tensor(f"{name}.document"),
                    tuple(json.loads(metadata[name])),
                    file.get_tensor(f"{name}.text"),
                )
                for name in ("search", "recovery", "report")
            ]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Put back a copy of it, or start a new run."
        raise RunError(
            quote_error(f"the token sets of a run, '{printable(path)}', cannot be read", error, remedy)
        ) from error
    return Splits(*sets)


# ---- what trials of one process share


@dataclass(frozen=True, slots=True, eq=False)
class Workbench:
    """The dense model, mapped, and what it says on the three token sets."""

    dense: PreTrainedModel
    splits: Splits
    search: DenseTargets
    recovery: DenseTargets
    report: DenseTargets


_open: dict[tuple[Any, ...], Workbench] = {}


def open_workbench(context: TrialContext, progress: StageProgress = silent) -> Workbench:
    """The workbench of a run; opened once per process."""
    key = (context.run_folder, context.files, context.device)
    if key not in _open:
        close_workbench()  # one model at a time
        dense = source.open_dense(context.files, device=context.device)
        splits = read_splits(context.run_folder)

        def ask(tokens: TokenSet) -> DenseTargets:
            return dense_targets(
                dense,
                tokens,
                model_hash=context.files.content_hash,
                cache_dir=context.cache_dir,
                progress=lambda share: progress(f"asking the dense model ({tokens.name})", share),
            )

        _open[key] = Workbench(dense, splits, ask(splits.search), ask(splits.recovery), ask(splits.report))
    return _open[key]


def close_workbench() -> None:
    """Let go of the dense model and of the memory of its device; the next `open_workbench` opens it again."""
    _open.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- which blocks to drop


def choose_blocks(
    proposal: Proposal, context: TrialContext, say: StageProgress
) -> tuple[tuple[int, ...], dict[str, Any] | None]:
    """The blocks that the proposal's criterion drops, and a summary of the gated training where there was one.

    Evidence, greedy orders and gate rankings are functions of (model, tokens, settings, seed); each is computed once
    per machine, and trials that want the same one wait for it.
    """
    count = proposal.num_removed
    if count == 0:
        return (), None
    if proposal.criterion == "gate":
        found, summary = _gate_ranking(proposal, context, say)
        return tuple(sorted(found.ranking[:count])), summary
    if proposal.criterion == "greedy":
        return tuple(sorted(_greedy(context, say).order[:count])), None
    if proposal.criterion == "uniform":
        return uniform_drop(count, len(context.table.blocks)), None
    if proposal.criterion == "random":
        return random_drop(count, len(context.table.blocks), context.study.seed), None
    if proposal.criterion == "linear_window":
        return _linear_window(count, context, say), None
    if proposal.criterion == "evolution":
        return _evolved(count, context, say).plan.dropped, None
    evidence = _evidence(context, say)
    if proposal.criterion == "window":
        return best_window(evidence, count), None
    return tuple(sorted(influence_order(evidence)[:count])), None


def choose_plan(
    proposal: Proposal, context: TrialContext, say: StageProgress
) -> tuple[FoldPlan, dict[str, Any] | None]:
    """The plan of a proposal, and a summary of the gated training where there was one."""
    if proposal.plan is not None:
        return proposal.plan, None
    dropped, gates = choose_blocks(proposal, context, say)
    bases = base_blocks(_bases(context, say), dropped) if proposal.fate == "share" and dropped else None
    order = attention_order(_evidence(context, say)) if proposal.attention_removed else ()
    plan = fold_plan(dropped, proposal, len(context.table.blocks), bases=bases, attention_order=order)
    return plan, gates


def _cache_path(context: TrialContext, folder: str, tokens: TokenSet, **settings: Any) -> Path:
    parts = [EVIDENCE_SCHEMA, context.files.content_hash, context.files.dtype, tokens.content_hash, settings]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return context.cache_dir / folder / f"{key}.json"


def _evidence(context: TrialContext, say: StageProgress) -> Evidence:
    bench = open_workbench(context, say)
    tokens = bench.splits.search
    value, _ = once(
        _cache_path(context, "evidence", tokens),
        lambda: measure_evidence(bench.dense, tokens, progress=counting(say, "block influence")).to_json(),
    )
    return Evidence.from_json(value)


def _greedy(context: TrialContext, say: StageProgress) -> GreedyResult:
    bench = open_workbench(context, say)
    tokens = bench.splits.search
    rows = min(len(tokens.ids_NT), max(1, GREEDY_TOKENS // tokens.ids_NT.shape[1]))
    most = context.study.space.counts(len(context.table.blocks))[1]
    value, _ = once(
        _cache_path(context, "greedy", tokens, rows=rows, most=most),
        lambda: greedy_order(
            bench.dense, tokens.of(list(range(rows))), max(most, 1), progress=counting(say, "greedy removal")
        ).to_json(),
    )
    return GreedyResult.from_json(value)


def _linear_window(count: int, context: TrialContext, say: StageProgress) -> tuple[int, ...]:
    bench = open_workbench(context, say)
    tokens = bench.splits.search
    rows = list(range(min(len(tokens.ids_NT), max(1, GREEDY_TOKENS // tokens.ids_NT.shape[1]))))
    fitted = context.study.starts.tokens
    value, _ = once(
        _cache_path(
            context,
            "windows",
            tokens,
            count=count,
            rows=len(rows),
            fitted=[fitted, bench.splits.recovery.content_hash],
        ),
        lambda: linear_window(
            bench.dense,
            count,
            residual_states(
                bench.dense,
                fitting_tokens(bench.splits.recovery.ids_NT, fitted),
                model_hash=context.files.content_hash,
                cache_dir=context.cache_dir,
                progress=counting(say, "residual states"),
            ),
            tokens.of(rows),
            bench.search.of(rows),
            counting(say, "linear windows"),
        ),
    )
    return tuple(value)


def _evolved(count: int, context: TrialContext, say: StageProgress) -> EvolutionResult:
    """Whole blocks, from the cosine window's plan and the influence's."""
    bench = open_workbench(context, say)
    tokens, num_blocks = bench.splits.search, len(context.table.blocks)
    evidence = _evidence(context, say)
    starts = [
        FoldPlan.dropping(blocks, num_blocks)
        for blocks in (best_window(evidence, count), influence_order(evidence)[:count])
    ]
    settings = EvolutionSettings(seed=context.study.seed)
    value, _ = once(
        _cache_path(context, "evolution", tokens, count=count, evolution=settings.to_json()),
        lambda: evolve(
            bench.dense, tokens, bench.search, starts, settings, progress=counting(say, "evolution")
        ).to_json(),
    )
    return EvolutionResult.from_json(value)


def _bases(context: TrialContext, say: StageProgress) -> list[list[float]]:
    """FlexiGPT's distances between the blocks; of the weights alone, so they serve every text."""
    bench = open_workbench(context, say)
    rank = max(1, round(BASE_RANK * context.table.width))
    key = f"{EVIDENCE_SCHEMA}-{context.files.content_hash}-{context.files.dtype}-{rank}"
    say("distances between the blocks", 0.0)
    path = context.cache_dir / "bases" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    value, _ = once(path, lambda: base_distances(bench.dense, rank).tolist())
    return value  # type: ignore[no-any-return]


def _gate_ranking(
    proposal: Proposal, context: TrialContext, say: StageProgress
) -> tuple[gating.GateResult, dict[str, Any]]:
    bench = open_workbench(context, say)
    tokens = bench.splits.recovery
    assert proposal.gate_eps is not None
    settings = gating.GateSettings(
        count=proposal.num_removed,
        eps=proposal.gate_eps,
        steps=context.study.gates.steps,
        seed=context.study.seed,
    )
    macs = [float(block.attention.macs + block.mlp.macs) for block in context.table.blocks]
    value, known = once(
        _cache_path(context, "gates", tokens, **settings.to_json()),
        lambda: gating.train_gates(
            bench.dense, tokens, settings, block_macs=macs, progress=counting(say, "training gates")
        ).to_json(),
    )
    result = gating.GateResult.from_json(value)
    summary = {
        "eps": settings.eps,
        "steps": result.steps,
        "tokens": result.tokens,
        "polarized": result.polarized,
        "soft_loss": result.soft_loss,
        "hard_loss": result.hard_loss,
        "seconds": result.seconds,
        "from_cache": known,
    }
    return result, summary


# ---- the trial

# What a trial's model is rebuilt from.
_START, _RECOVERED = "start.safetensors", "recovered.safetensors"


@dataclass(frozen=True, slots=True)
class _Record:
    """A trial as it stands on disk: enough to go on from its last rung."""

    plan: FoldPlan
    learning_rate: float
    delta_rank: int
    adapter_start: AdapterStart | None  # None where nothing starts in one way or another
    gates: dict[str, Any] | None
    results: tuple[TrialResult, ...]
    machine: Machine | None = None  # that the last result was measured on
    files: Mapping[str, str] = field(
        default_factory=dict
    )  # hashes of those that the last result was measured with

    @property
    def has_trained(self) -> bool:
        """Whether any of its results is of a trained model."""
        return bool(self.results) and self.results[-1].recovery_tokens > 0

    def worth(self, other: _Record) -> tuple[TrialResult, ...]:
        """Its results, as far as they hold for another trial of the same plan.

        All of them where that one would train in the same way, and where this one has reached the last rung: no plan
        is trained twice. Else (it was stopped, or its training diverged) only those of the untrained model.
        """
        same = (self.learning_rate, self.delta_rank) == (other.learning_rate, other.delta_rank)
        last = self.results[-1]
        if same or (last.is_last_rung and not last.training_diverged):
            return self.results
        return tuple(result for result in self.results if not result.recovery_tokens)

    def write(self, folder: Path, machine: Machine) -> None:
        files = {name: folder / name for name in (_START, _RECOVERED)}
        value = {
            "plan": str(self.plan),
            "num_blocks": self.plan.num_blocks,
            "learning_rate": self.learning_rate,
            "delta_rank": self.delta_rank,
            "adapter_start": self.adapter_start,
            "gates": self.gates,
            "results": [result.to_json() for result in self.results],
            "machine": asdict(machine),
            "files": {name: file_hash(path) for name, path in files.items() if path.exists()},
        }
        write_json(folder / "trial.json", value)

    @classmethod
    def read(cls, folder: Path) -> _Record | None:
        path = folder / "trial.json"
        if not path.exists():
            return None
        value = json.loads(path.read_text())
        plan = FoldPlan.parse(value["plan"], value["num_blocks"])
        results = tuple(TrialResult.from_json(result) for result in value["results"])
        settings = (value["learning_rate"], value["delta_rank"], value["adapter_start"])
        return cls(plan, *settings, value["gates"], results, Machine(**value["machine"]), value["files"])


def run_trial(
    proposal: Proposal, context: TrialContext, *, number: int, progress: StageProgress = silent
) -> Iterator[TrialResult]:
    """Run one trial; yields a result per rung, and may be closed at any yield.

    A trial whose folder holds earlier rungs goes on after the last of them and yields only what is new. A plan that
    another trial has measured is not trained again: its results are yielded as "known", and if that trial was stopped
    early, or its training diverged, this one goes on: from where that one stopped if it would train in the same way,
    else from the untrained model, with its own settings. What cannot fit or runs out of memory ends the trial with a
    result that says so. Where the training diverges, the best state before it is the trial's result; where there is
    none, the result says so.

    Args:
        proposal: what to try. number: of the trial; names its folder.
        progress: told the stage and its share.
    """
    began = time.perf_counter()
    if context.threads:
        torch.set_num_threads(context.threads)
    folder = context.trial_folder(number)
    record = _Record.read(folder)
    if record is None:
        drafted = _draft(proposal, context, progress)
        if isinstance(drafted, TrialResult):
            yield drafted
            return
        record = drafted
    cost = price(record.plan, context.table, context.target)
    with _plan_alone(_plan_path(context, record), context) as (free, owner):
        if owner is not None and owner != number:
            known = _Record.read(context.trial_folder(owner))
            if known is not None and known.results:
                told = known.results if not free else known.worth(record)
                for result in told:
                    yield replace(result, state="known", known_from=owner, gates=record.gates)
                if not free or (told and told[-1].is_last_rung):
                    return
                record = replace(record, results=told, files=known.files)
                _copy_state(context.trial_folder(owner), folder, trained=record.has_trained)
        if free:
            write_json(_plan_path(context, record), {"trial": number, "plan": str(record.plan)})
        if record.results and record.results[-1].is_last_rung:
            return  # nothing is left to do
        spent = record.results[-1].seconds if record.results else 0.0
        try:
            course = _Course(record, context, folder, progress)
            for rung in range(len(record.results), len(context.study.rungs)):
                result = replace(
                    course.to_rung(rung),
                    cost=cost,
                    seconds=spent + time.perf_counter() - began,
                    gates=record.gates,
                )
                record = replace(record, results=(*record.results, result))
                record.write(folder, Machine.here(context.device))
                if result.is_last_rung:
                    (folder / "optimizer.safetensors").unlink(missing_ok=True)
                yield result
                if result.is_last_rung:
                    break
        except (Diverged, InputError, MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            state, reason = _failure(error)
            yield TrialResult(
                plan=record.plan,
                cost=cost,
                quality=None,
                rung=len(record.results),
                is_last_rung=False,
                recovery_tokens=record.results[-1].recovery_tokens if record.results else 0,
                seconds=spent + time.perf_counter() - began,
                state=state,  # type: ignore[arg-type]
                reason=reason,
                gates=record.gates,
            )


def _failure(error: BaseException) -> tuple[str, str]:
    """State and reason of a trial that could not go on; anything that is our own fault is raised again."""
    if isinstance(error, Diverged):
        return "diverged", str(error)
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "failed", f"out of memory: {describe_error(error)}"
    if isinstance(error, InputError):
        return "failed", text
    raise error


def _draft(proposal: Proposal, context: TrialContext, say: StageProgress) -> _Record | TrialResult:
    """The proposal as a plan that fits; or the result that says it does not."""
    bound = lower_bound(proposal, context.table, context.target)
    gates = None
    if context.budget.admits(bound) or proposal.origin == "hand":
        plan, gates = choose_plan(proposal, context, say)
        cost = price(plan, context.table, context.target)
        if context.budget.admits(cost) or proposal.origin == "hand":
            return _Record(
                plan, proposal.learning_rate, proposal.delta_rank, proposal.adapter_start, gates, ()
            )
    else:  # never built; the plan only shows the counts
        removed = range(proposal.num_removed)
        plan = fold_plan(
            removed,
            proposal,
            len(context.table.blocks),
            bases=dict.fromkeys(removed, proposal.num_removed),
        )
        cost = bound
    over = {name: share for name, share in context.budget.violations(cost).items() if share > 0}
    reason = "; ".join(f"{name} is {share:.1%} above the budget" for name, share in over.items())
    return TrialResult(plan, cost, None, 0, False, 0, 0.0, "infeasible", reason, gates=gates)


class _Course:
    """The model of one trial on its way through the rungs: trained, measured, and the best of its states kept.

    Best is by `trained_for`, on the search tokens; of equals the first. `recovered.safetensors` holds the best state,
    unless that is untrained; `optimizer.safetensors` the latest, which training goes on from if it is the best. If it
    is not, the learning rate was too high for this model: training goes on from the best state at a quarter of the
    rate. (To go on from the worse one was worse in every case tried, and so was the old rate; see docs/decisions/0010.)
    """

    def __init__(self, record: _Record, context: TrialContext, folder: Path, say: StageProgress) -> None:
        self._record, self._context, self._folder, self._say = record, context, folder, say
        self._bench = open_workbench(context, say)
        random.seed(context.study.seed)
        torch.manual_seed(context.study.seed)
        self._model = _started(record, context, folder, say)
        self._recovery: Recovery | None = None
        self._best: Quality | None = None
        self._kept_tokens = 0
        self._results = list(record.results)
        if self._results:
            self._best, self._kept_tokens = self._results[-1].quality, self._results[-1].kept_tokens
            _check_state(record, folder)
        elif context.study.rungs[0] > 0:
            # No rung measures the untrained model, but training is not to end worse than it.
            untrained = self._measure()
            self._best = untrained if math.isfinite(untrained.kl) else None

    def to_rung(self, rung: int) -> TrialResult:
        """Train until the rung, and tell the best state so far.

        Raises:
            Diverged: there is no state with a finite KL.
        """
        latest: Quality | None = None
        diverged = ""
        try:
            latest = self._latest(self._context.study.rungs[rung])
        except Diverged as error:
            if self._best is None:
                raise
            diverged = str(error)
        done = self._tokens_done
        is_last = bool(diverged) or rung == len(self._context.study.rungs) - 1
        report = self._report() if is_last else None
        if self._recovery is not None and self._kept_tokens == done:
            # Last, so that a trial killed before its result is noted can nearly always be rebuilt at the rung before.
            self._recovery.keep(self._folder)
        result = TrialResult(
            plan=self._record.plan,
            cost=self._context.dense_cost,  # the caller knows the plan's
            quality=self._best,
            rung=rung,
            is_last_rung=is_last,
            recovery_tokens=done,
            seconds=0.0,
            reason=diverged,
            report=report,
            setback=None if self._kept_tokens == done else Setback(self._kept_tokens, latest),
        )
        self._results.append(result)
        return result

    @property
    def _rate(self) -> float:
        """Share of the record's learning rate to train at: less with every rung that hurt."""
        return RATE_AFTER_SETBACK ** sum(result.setback is not None for result in self._results)

    @property
    def _tokens_done(self) -> int:
        return self._recovery.tokens_done if self._recovery else 0

    def _latest(self, tokens: int) -> Quality:
        """Quality after so many recovery tokens; the state is kept if it is the best one."""
        if tokens:
            self._train(tokens)
        quality = self._measure()
        if not math.isfinite(quality.kl):
            raise Diverged(
                f"the folded model's KL is {quality.kl} after {tokens} tokens of recovery at learning rate "
                f"{self._record.learning_rate:g}. Lower the learning rate, or compute in float32."
            )
        plan = self._record.plan
        if self._best is None or trained_for(plan, quality) < trained_for(plan, self._best):
            self._best, self._kept_tokens = quality, self._tokens_done
        return quality

    def _train(self, tokens: int) -> None:
        study, record = self._context.study, self._record
        if self._recovery is None:
            wanted = study.recovery.next_token
            if wanted is None:
                # Text draws a model away from the dense one, most of all where that is at a loss: wrong for a folded
                # model, which is to be like it, and right for an extension, which is to become better.
                wanted = EXTENSION_NEXT_TOKEN if record.plan.is_extension else 0.0
            settings = RecoverySettings(
                learning_rate=record.learning_rate,
                delta_rank=record.delta_rank,
                next_token=wanted,
                kl=study.recovery.kl,
                tail=study.recovery.tail,
                batch=study.recovery.batch,
                seed=study.seed,
            )
            bench = self._bench
            self._recovery = Recovery(
                self._model, settings, bench.splits.recovery, bench.recovery, study.rungs[-1]
            )
            if (self._folder / "optimizer.safetensors").exists():
                self._recovery.load(self._folder)  # it may be ahead of the record
            self._recovery.rate = self._rate
        last = self._results[-1] if self._results else None
        if last is not None and last.setback is not None and self._tokens_done == last.recovery_tokens:
            self._go_back(self._recovery)
        try:
            self._recovery.train(tokens, lambda share: self._say("recovery", share))
        except TimeUp:  # in the middle of a rung: a resumed run goes on from here
            self._recovery.save(self._folder)
            raise
        self._recovery.save(self._folder)

    def _go_back(self, recovery: Recovery) -> None:
        """Take up the kept state: the untrained one as it is attached anew, another one as it was written."""
        model = _started(self._record, self._context, self._folder, silent)
        kept = attach(model, self._record.delta_rank, self._context.study.seed)
        if self._kept_tokens:
            load_trained(kept, self._folder)
        recovery.go_back(kept, self._rate)

    def _measure(self) -> Quality:
        self._say("measuring", 0.0)
        return judge(self._model, self._bench.splits.search, self._bench.search)

    def _report(self) -> Quality:
        """Quality of the kept state on the report tokens."""
        model = self._model
        if self._kept_tokens != self._tokens_done:
            model = _rebuilt(self._record, self._context, self._folder, self._kept_tokens)
        return judge(model, self._bench.splits.report, self._bench.report)


def _rebuilt(record: _Record, context: TrialContext, folder: Path, kept_tokens: int) -> PreTrainedModel:
    """The folded model at the state that the trial keeps, its deltas not merged yet."""
    model = _started(record, context, folder, silent)
    if kept_tokens:
        load_trained(attach(model, record.delta_rank, context.study.seed), folder)
    return model


def _check_state(record: _Record, folder: Path) -> None:
    """Whether the files that a trial's model is rebuilt from are as they were when its last result was measured.

    Raises:
        RunError: one was changed.
    """
    for name, ours in record.files.items():
        path = folder / name
        if name == _RECOVERED and _is_ahead(record, folder):
            continue  # the trial was killed between its training and its result
        if path.exists() and (theirs := file_hash(path)) != ours:
            raise RunError(
                f"a trial is rebuilt only from what it was measured with: '{printable(path)}' had the hash {ours[:12]} "
                f"(sha256), but now has {theirs[:12]}. Put the old file back, or choose another trial."
            )


def _is_ahead(record: _Record, folder: Path) -> bool:
    """Whether what recovery trained was trained on other tokens than the last result says."""
    try:
        return saved_tokens(folder / _RECOVERED) != record.results[-1].kept_tokens
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return False  # it cannot be read at all


def _started(record: _Record, context: TrialContext, folder: Path, say: StageProgress) -> PreTrainedModel:
    """The folded model before recovery; what was fitted for it is kept in the trial's folder."""
    bench = open_workbench(context, say)
    if not any(isinstance(slot, Replacement) or slot.rank or slot.norm for slot in record.plan.slots):
        return fold(bench.dense, record.plan)
    path = folder / _START
    if path.exists():
        return fold(bench.dense, record.plan, load_file(path))
    model, found = folded_start(
        bench.dense,
        record.plan,
        bench.splits.recovery.ids_NT,
        StartSettings(adapters=record.adapter_start or "zero", tokens=context.study.starts.tokens),
        model_hash=context.files.content_hash,
        cache_dir=context.cache_dir,
        progress=say,
    )
    values = {name: value.contiguous() for name, value in new_values(model).items()}
    replace_atomically(path, lambda temporary: save_file(values, temporary, {"found": json.dumps(found)}))
    return model


def _copy_state(owner: Path, folder: Path, *, trained: bool) -> None:
    """What another trial of the same plan starts from; and what it trained."""
    names = ("start", "recovered", "optimizer") if trained else ("start",)
    for name in (f"{name}.safetensors" for name in names):
        if not (owner / name).exists():
            continue  # not every plan has a start of its own
        replace_atomically(folder / name, lambda path, name=name: shutil.copyfile(owner / name, path))  # type: ignore[misc]


def _plan_path(context: TrialContext, record: _Record) -> Path:
    """One file a plan and a start of its adapters: together they say what the untrained model is."""
    start = "" if record.adapter_start is None else f"-{record.adapter_start}"
    return context.run_folder / "plans" / f"{record.plan.id}{start}.json"


@contextmanager
def _plan_alone(path: Path, context: TrialContext) -> Iterator[tuple[bool, int | None]]:
    """Whether no other running trial measures the plan of this path, and the number of the trial that does or did.

    Where another one has begun, this waits for its first result.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
    try:
        while True:
            free = _is_free(lock)
            owner = json.loads(path.read_text())["trial"] if path.exists() else None
            if free or (owner is not None and _Record.read(context.trial_folder(owner)) is not None):
                break
            time.sleep(WAIT_SECONDS)
        yield free, owner
    finally:
        os.close(lock)  # lets go of the lock


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---- after the search


def recovered_model(context: TrialContext, number: int) -> tuple[PreTrainedModel, TrialResult]:
    """The folded model of a finished trial at the state that it keeps, deltas merged, and its last result.

    Raises:
        RunError: the trial was not measured, or its weights are gone.
    """
    folder = context.trial_folder(number)
    record = _Record.read(folder)
    if record is None or not record.results:
        raise RunError(
            f"only a trial that was measured can be rebuilt, but trial {number} of {folder.parents[1]} was not."
        )
    result = record.results[-1]
    if result.kept_tokens:
        path = folder / _RECOVERED
        if not path.exists():
            raise RunError(f"trial {number} was trained, but {printable(path)} is gone. Run it again.")
        if _is_ahead(record, folder):
            raise RunError(
                f"trial {number} was stopped while rung {result.rung + 1} was measured: its weights are of that rung, "
                f"its last result is of rung {result.rung}. Resume the run first."
            )
    _check_state(record, folder)
    model = _rebuilt(record, context, folder, result.kept_tokens)
    return merge(model), result


# What rounding alone may change in a mean over thousands of tokens, in nats, and as a share of a KL above 1: another
# processor sums in another order. Measured on SmolLM2 between AVX512 and AVX2: 1e-7 in float32; in bfloat16 2e-4 of
# the KL and 1e-3 of the loss.
ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A rebuilt model beside what was recorded when it was measured, on the same tokens.

    tokens: "report", or "search" where a trial was not measured on those. tolerance: of the KL and of the mean
    next-token loss, in nats; 0 where the same machine computes both, which is to give the same numbers.
    """

    tokens: str
    recorded_kl: float
    found_kl: float
    recorded_perplexity: float
    found_perplexity: float
    tolerance: float

    def faults(self) -> Iterator[str]:
        """What differs by more than rounding, in words."""
        if not abs(self.found_kl - self.recorded_kl) <= self.tolerance * max(1.0, abs(self.recorded_kl)):
            yield f"its KL is {self.found_kl:.6g}, recorded were {self.recorded_kl:.6g}"
        if not abs(math.log(self.found_perplexity) - math.log(self.recorded_perplexity)) <= self.tolerance:
            yield f"its perplexity is {self.found_perplexity:.6g}, recorded were {self.recorded_perplexity:.6g}"


def check_rebuilt(
    context: TrialContext, number: int, model: PreTrainedModel, recorded: Sequence[TrialResult] = ()
) -> Rebuilt:
    """Judge a rebuilt model, and compare it with the figures that were recorded when it was measured.

    Args:
        context: of the run.
        number: of the trial.
        model: what `recovered_model` rebuilt.
        recorded: results of it that are kept elsewhere, such as in the study; they must say the same.

    Raises:
        VerificationError: the figures differ by more than rounding.
        RunError: what is kept elsewhere differs from what the trial's folder holds.
    """
    folder = context.trial_folder(number)
    record = _Record.read(folder)
    assert record is not None
    last = record.results[-1]
    for other in recorded:
        if (other.quality, other.report) != (last.quality, last.report):
            raise RunError(
                f"a trial has one result, but '{printable(folder / 'trial.json')}' says KL {_kl_of(last)}, and the "
                f"run's study says KL {_kl_of(other)}. Put the old files back, or choose another trial."
            )
    bench = open_workbench(context)
    tokens, told = ("report", last.report) if last.report else ("search", last.quality)
    assert told is not None
    here, threads = Machine.here(context.device), torch.get_num_threads()
    if record.machine is not None and record.machine.kind == here.kind:
        torch.set_num_threads(record.machine.threads)
        here = replace(here, threads=record.machine.threads)
    try:
        found = judge(model, getattr(bench.splits, tokens), getattr(bench, tokens))
    finally:
        torch.set_num_threads(threads)
    same = here == record.machine and context.device == "cpu"  # a GPU may sum in another order each time
    rebuilt = Rebuilt(
        tokens,
        told.kl,
        found.kl,
        told.perplexity,
        found.perplexity,
        0.0 if same else ROUNDING[context.files.dtype],
    )
    if faults := list(rebuilt.faults()):
        raise VerificationError(
            f"the rebuilt model of trial {number} is not the one that was measured: on the {tokens} tokens "
            f"{'; '.join(faults)} (tolerance {rebuilt.tolerance:g} nats). Nothing was written. If foldsearch, "
            "torch and transformers are the versions that the run was made with, please report it with the plan."
        )
    return rebuilt


def _kl_of(result: TrialResult) -> str:
    quality = result.report or result.quality
    return f"{quality.kl:.6g}" if quality else "none"


def quality_of(context: TrialContext, model: PreTrainedModel) -> tuple[Quality, Quality]:
    """Quality of a model on the search and on the report tokens of a run."""
    bench = open_workbench(context)
    return judge(model, bench.splits.search, bench.search), judge(model, bench.splits.report, bench.report)
