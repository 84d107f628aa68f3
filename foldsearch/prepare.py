"""Before the first trial: price the model, split the text, fetch and convert the weights, ask the dense model once.

In the order of what it costs: what may be refused is looked at before anything takes minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from foldsearch.calibrate import Subject, calibrated
from foldsearch.context import TrialContext, open_workbench, read_splits, write_splits
from foldsearch.errors import ModelError
from foldsearch.identity import Identity, Location
from foldsearch.machine import choose_device, choose_precision
from foldsearch.model import source
from foldsearch.model.checks import check_lengths, check_tokens
from foldsearch.model.content import ContentHashes
from foldsearch.model.convert import quiet
from foldsearch.model.gguf.kv_cache import check_kv_cache
from foldsearch.model.measure import measure
from foldsearch.model.own_text import OwnText, first_tokens, kept_text, with_own_text
from foldsearch.model.splits import SplitRules, make_splits
from foldsearch.model.text import Source, check_reference, holds, local_path
from foldsearch.model.tokens import Splits, front_of
from foldsearch.model.whole import class_name, count_rest
from foldsearch.paths import printable
from foldsearch.plan.cost import DTYPE_BYTES, GB, CostTable
from foldsearch.progress import Notice, StageProgress, silent, unheard
from foldsearch.run import Run, RunFolder
from foldsearch.runtimes import STOCK
from foldsearch.spec.study import SourceSettings, Study

# Forward passes that a token of asking takes, measured: the mean row of the head is a product more.
ASKING = 1.4


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
    made = RunFolder(run_folder).identity() if run_folder else None
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

    made = RunFolder(run_folder).identity() if run_folder else None
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
    accept: Callable[[Identity], object] = lambda made: None,
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
        accept: told what the run is made of before the dense model is asked; so too.
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
    made = RunFolder(run_folder).identity()
    if made is None:
        check_data(study)
    else:
        _say_how_it_differs(study, made, device, notice)
    found = open_source(study, progress, run_folder=run_folder)
    if made is None:
        say_unused(study, found, notice)
    config = source.open_config(found)
    # A run's own study has all defaults written out, and was looked at when the run began.
    if made is None and (words := check_study_shapes(study, config)):
        notice(words)
    progress("pricing the dense model", 0.0)
    table = cost_table(found, config)
    if made is None:
        say_part(study, found, table, notice)
    check(table)
    if study.has_times:  # before the text is read: a budget that no plan keeps is refused here
        table = with_times(study, found, config, table, cache_dir, (progress, notice), run_folder=run_folder)
        check(table)
    splits = _splits_of(study, run_folder, found, progress, notice)
    writes = study.own_text()[1] > 0 and not RunFolder(run_folder).tokens.exists()
    if not writes:
        _keep_splits(splits, run_folder, made)
    sets = (splits.search, splits.recovery, splits.report)
    check_tokens(study.model, config.vocab_size, (one.ids_NT for one in sets))
    files, content = prepare_model(
        study, found, run_folder=run_folder, cache_dir=cache_dir, progress=progress
    )
    began = time.monotonic()
    if writes:
        splits = _with_own_text(splits, study, files, (device, cache_dir), progress)
        _keep_splits(splits, run_folder, made)
    writing_seconds = time.monotonic() - began
    opened = AutoConfig.from_pretrained(files.folder, trust_remote_code=files.trust_remote_code)
    if opened.tie_word_embeddings != config.tie_word_embeddings:
        # The config says tied, but the checkpoint holds two matrices that differ: only the weights could tell.
        table = replace(cost_table(found, opened), latencies=table.latencies)
        check(table)
    context = TrialContext(Run(run_folder, study, table, files.note), files, cache_dir, device)
    if made is None:
        made = _identity_of(context, found, content, splits)
        context.run.write_identity(made)
    accept(made)
    context = _asked(context, progress)
    return replace(context, asking_seconds=context.asking_seconds + writing_seconds)


def _asked(context: TrialContext, progress: StageProgress) -> TrialContext:
    """Ask the dense model, and note how long it took: it is part of a run's time, and the first measure of the pace."""
    began = time.monotonic()
    told: dict[str, list[tuple[float, float]]] = {}  # by stage: when which share was done

    def say(stage: str, share: float) -> None:
        told.setdefault(stage, []).append((time.monotonic(), share))
        progress(stage, share)

    bench = open_workbench(context, say)
    sets = (bench.splits.search, bench.trained, bench.splits.report)
    seconds = time.monotonic() - began
    # Torch is imported and the model opened before; where the answers are in the cache, nothing is told.
    paces = []
    for stage, shares in told.items():
        (then, first), (now, last) = shares[0], shares[-1]
        asked = next(one for one in sets if one.name in stage)
        if tokens := (last - first) * asked.ids_NT.numel():
            paces.append((now - then) / (ASKING * tokens))
    # Not their mean: whatever else is at work at the beginning, as the disk that takes a copy of the model, slows one.
    return replace(context, asking_seconds=seconds, token_seconds=median(paces) if paces else 0.0)


def cost_table(found: source.ModelSource, config: PretrainedConfig) -> CostTable:
    """The costs of a model that was found: of its blocks, and of what a model that also sees has beside its text part.

    Raises:
        ModelError: the family is unknown, or an operation cannot be counted.
    """
    whole = source.whole_config(found)
    table = measure(config)
    if whole is None:
        return table
    with quiet():
        return replace(table, rest_weights=count_rest(whole))


def say_part(study: Study, found: source.ModelSource, table: CostTable, notice: Notice) -> None:
    """Tell that a model is one that also sees: what of it is searched, and what is priced."""
    whole = source.whole_config(found)
    if whole is None:
        return
    target = study.target.value()
    size = f"{table.rest_weights * DTYPE_BYTES[target.dtype] / GB:.2f} GB in {target.dtype}"
    priced = (
        f"The rest, {size}, is priced with it, as an export to {target.runtime} holds both."
        if target.holds_rest
        else f"The rest, {size}, is not priced: only exports to {STOCK} hold it, which are the whole model again. Set "
        f"the target's runtime to {STOCK} to price both."
    )
    notice(
        f"'{printable(study.model)}' is a {class_name(whole)}: its text part, a {table.family} model of "
        f"{len(table.blocks)} blocks, is folded and measured. {priced}"
    )


def with_times(
    study: Study,
    found: source.ModelSource,
    config: PretrainedConfig,
    table: CostTable,
    cache_dir: Path,
    told: tuple[StageProgress, Notice],
    *,
    run_folder: Path | None = None,
) -> CostTable:
    """The costs of a model with its times on this machine, for each type of weights that the study allows.

    Args:
        study: whose target, and how long a prompt.
        found: the model, for its tokenizer.
        config: of the model.
        table: its costs.
        cache_dir: where times are kept.
        told: of progress, and what a person should know.
        run_folder: of a run that has times already: these stay, wherever it goes on.

    Raises:
        InputError: the program of the target's runtime is not installed, or memory is short.
        ModelError: the model could not be run there.
        BudgetError: its time does not grow with the blocks that run.
    """
    if run_folder is not None and RunFolder(run_folder).table_file.exists():
        return replace(table, latencies=RunFolder(run_folder).read_table().latencies)
    progress, notice = told
    gguf = found.weights if found.gguf_file else ()
    latencies = []
    for target in study.targets():
        tokens = study.target.prompt_tokens
        subject = Subject(config, table, target, tokens, lambda: source.open_tokenizer(found), gguf)
        latencies.append(calibrated(subject, cache_dir, progress))
        if words := latencies[-1].unsteady:
            notice(words)
    return replace(table, latencies=tuple(latencies))


def check_study_shapes(study: Study, config: PretrainedConfig) -> str:
    """Whether the study's lengths and its KV cache suit the model; what a person should know, or "".

    Raises:
        ModelError: they are longer than what the model was made for, or a cache of the type cannot hold its heads.
    """
    for target in study.targets():
        if target.kv_cache:
            check_kv_cache(config, target.kv_cache)
    return check_lengths(
        study.model,
        config,
        sequence_length=study.splits.sequence_length,
        context=study.target.context,
        is_default="context" not in study.target.model_fields_set,
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
    progress: StageProgress,
    notice: Notice,
) -> Splits:
    """The token sets of a run, cut where there are none yet; those lack what the dense model writes itself.

    Raises:
        DataError: the text cannot be used.
    """
    if RunFolder(run_folder).tokens.exists():
        return read_splits(RunFolder(run_folder))
    return make_study_splits(study, source.open_tokenizer(found), progress, notice=notice)


def _keep_splits(splits: Splits, run_folder: Path, made: Identity | None) -> None:
    """Write the token sets of a run, where it has none yet.

    Raises:
        RunError: they are not those that the run was made with.
    """
    folder = RunFolder(run_folder)
    if made is not None:
        made.check_tokens(splits.hashes(), run_folder)
    if not folder.tokens.exists():
        write_splits(folder.tokens, splits)


def _identity_of(
    context: TrialContext, found: source.ModelSource, content: ContentHashes, splits: Splits
) -> Identity:
    study = context.study
    here = [study.model] if not found.hub_id and source.local_path(study.model) else []
    # what is in a package is found by the package's name, wherever that lies
    here += [text for text in sources_of(study) if not text.startswith("package:") and local_path(text)]
    here += [] if study.warm_from is None else [study.warm_from]
    return Identity(
        model=study.model,
        content=content,
        commit=found.commit,
        dtype=context.files.dtype,
        device=context.device,
        tokens=splits.hashes(),
        places=tuple(Location.of(typed, context.run.path) for typed in dict.fromkeys(here)),
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
    """The token sets of a study, but for the text that the dense model writes itself.

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
    recovery = sizes.recovery - study.own_text()[1]
    num_sequences = {"search": sizes.search, "recovery": recovery, "report": sizes.report}
    if search_only:
        num_sequences |= {"recovery": 0, "report": 0}
    return make_splits(
        [_source(one) for one in sources]
        if isinstance(sources, tuple)
        else {split: [_source(one) for one in of] for split, of in sources.items()},
        tokenizer,
        SplitRules(
            sizes.sequence_length,
            num_sequences,
            unseen=study.kinds.unseen,
            over=study.kinds.objective,
        ),
        progress=lambda message: progress(message, 0.0),
        notice=notice,
    )


def _with_own_text(
    splits: Splits, study: Study, files: source.DenseFiles, where: tuple[str, Path], say: StageProgress
) -> Splits:
    """The token sets with what the dense model writes itself among the recovery texts; where: device and cache."""
    (kind, count), (device, cache_dir) = study.own_text(), where
    stage = f"the dense model writes {count} sequences itself"
    say(stage, 0.0)
    tokenizer = source.open_tokenizer(files)
    wanted = OwnText(count, study.splits.sequence_length, front_of(tokenizer), study.seed)
    dense = source.open_dense(files, device=device)
    ids_NT = kept_text(
        dense,
        first_tokens(tokenizer, dense.config.vocab_size),
        wanted,
        model_hash=files.content_hash,
        cache_dir=cache_dir,
        progress=lambda share: say(stage, share),
    )
    return replace(splits, recovery=with_own_text(splits.recovery, ids_NT, kind, len(wanted.front)))


def _source(settings: SourceSettings) -> Source:
    return Source(settings.source, settings.text_column, settings.sample_by, settings.weight, settings.kind)
