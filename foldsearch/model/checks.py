"""Look at a model before anything runs: what would fail later, or give figures of another model, is a sentence now."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldsearch.errors import ModelError
from foldsearch.model.blocks import FOLDED_PREFIX
from foldsearch.model.fold import stock_config
from foldsearch.paths import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "SHARED",
    "check_finite",
    "check_lengths",
    "check_no_adapter",
    "check_special_ids",
    "check_stored",
    "check_tokenizer",
    "check_tokens",
    "find_missing_shards",
    "is_shard_name",
    "shared_shards",
    "unfold_config",
]

_INDEX = "model.safetensors.index.json"
_LEARNED_POSITIONS = {"gpt2", "opt"}  # a position beyond the last has no embedding


def check_no_adapter(reference: str, folder: Path, *, has_model: bool) -> None:
    """A folder must not hold an adapter: alone it is no model, and beside a model it is no part of what is measured.

    Raises:
        ModelError: it holds one; the message names its base model.
    """
    if not (folder / "adapter_config.json").is_file():
        return
    base = "its base model"
    with suppress(OSError, ValueError, AttributeError):
        named = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        base = f"its base model ({named})" if named else base
    if has_model:
        raise ModelError(
            f"{reference}: the folder holds an adapter (adapter_config.json) beside the model, and the adapter would "
            "not be a part of what is measured. Merge it into the model (merge_and_unload of peft) and give the "
            "merged folder, or move the adapter elsewhere."
        )
    raise ModelError(
        f"{reference}: the folder holds an adapter only, and foldsearch folds whole models. Merge it into {base} "
        "(merge_and_unload of peft) and give the merged folder."
    )


SHARED = "shared"  # the folder beside exports of one front, which share weight files that lie there


def is_shard_name(name: str) -> bool:
    """Whether an index may name a weight file so: it lies beside the index, or in `shared` beside that folder."""
    parts = name.split("/")
    inner = parts[2:] if parts[:2] == ["..", SHARED] else parts
    return len(inner) == 1 and inner[0] not in ("", ".", "..")


def shared_shards(folder: Path) -> list[Path]:
    """Weight files in `shared` beside a folder that the index in the folder names, and that are there."""
    listed = _listed_shards(folder / _INDEX)
    shared = sorted(name for name in listed if name.startswith("..") and is_shard_name(name))
    return [folder / name for name in shared if (folder / name).is_file()]


def find_missing_shards(folder: Path) -> list[str]:
    """Weight files that an index lists and that are not there.

    Raises:
        ModelError: the index names files of another folder.
    """
    for index in (_INDEX, "pytorch_model.bin.index.json"):
        listed = _listed_shards(folder / index)
        if strange := sorted(name for name in listed if not is_shard_name(name)):
            raise ModelError(
                f"{printable(folder / index)}: an index names weight files beside it, but this one names "
                f"'{printable(strange[0])}'. Fetch the model again, from somebody you trust."
            )
        if any((folder / name).is_file() for name in listed):
            return sorted(name for name in listed if not (folder / name).is_file())
    return []


def _listed_shards(index: Path) -> set[str]:
    """The files that an index of weights names; none where it is not there, or cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set(map(str, json.loads(index.read_text("utf-8"))["weight_map"].values()))
    return set()


def unfold_config(reference: str, config: PretrainedConfig) -> PretrainedConfig:
    """The config of the model as a stock one; the same if it is.

    An export whose plan only drops whole blocks is a dense model with fewer blocks, and its tensors have the stock
    names. Any other folded export shares or replaces weights, and only a dense model can be folded.

    Raises:
        ModelError: the model is such an export; the message says which plan made it.
    """
    if not str(config.model_type).startswith(FOLDED_PREFIX):
        return config
    fold = getattr(config, "fold", None) or {}
    by_position = getattr(config, "scale_attn_by_inverse_layer_idx", False)
    if not by_position and _only_drops(fold):
        return stock_config(config)
    raise ModelError(
        f"{reference}: only a dense model can be folded, and this is a folded export: the plan "
        f"'{fold.get('plan', 'unknown')}' of a model of {fold.get('num_blocks', 'unknown')} blocks. Give that model, "
        "or export it with --to stock and give that folder."
    )


def _only_drops(fold: dict[str, Any]) -> bool:
    """Whether every position runs one block of the dense model whole, and no block twice."""
    slots = fold.get("slots") or []
    homes = [slot.get("home") for slot in slots]
    whole = all(
        slot.get("attention") == slot.get("mlp") == slot.get("home")
        and not slot.get("rank")
        and not slot.get("norm")
        and not slot.get("replaced")
        for slot in slots
    )
    return bool(slots) and whole and len(set(homes)) == len(homes)


def check_special_ids(reference: str, config: PretrainedConfig, generation: Path | None = None) -> None:
    """Begin, end and padding tokens must be rows of the embedding.

    Args:
        reference: what the person typed.
        config: of the model.
        generation: its generation_config.json, where there may be one.

    Raises:
        ModelError: one is beyond the vocabulary.
    """
    stated: list[tuple[str, dict[str, Any]]] = [("config.json", config.to_dict())]
    if generation is not None:
        with suppress(OSError, ValueError, TypeError, RecursionError):
            stated.append((generation.name, dict(json.loads(generation.read_text("utf-8")))))
    for place, values in stated:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = values.get(name)
            for index in value if isinstance(value, list) else [value]:
                # the first Llamas said -1 where they had none
                nothing = index is None or (name == "pad_token_id" and index == -1)
                if not nothing and not (isinstance(index, int) and 0 <= index < config.vocab_size):
                    raise ModelError(
                        f"{reference}: {name} of {place} must be one of the model's {config.vocab_size:,} tokens; got "
                        f"{index}. Correct it, or resize the embedding."
                    )


def check_tokenizer(reference: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token that a text can become must be a row of the embedding.

    Special tokens beyond it are left alone here, since published models have some that no text becomes (Gemma 3's mark
    of an image); `check_tokens` looks at the texts themselves.

    Raises:
        ModelError: the tokenizer has more tokens than the embedding has rows.
    """
    special = {index for index, added in tokenizer.added_tokens_decoder.items() if added.special}
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    special -= {index for index in used if index is not None}
    beyond = sorted(
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if index >= vocab_size and index not in special
    )
    if beyond:
        index, token = beyond[0]
        more = f" (and {len(beyond) - 1} more)" if len(beyond) > 1 else ""
        raise ModelError(
            f"{reference}: every token must be a row of the model's embedding, which has {vocab_size:,}; the tokenizer "
            f"has the token {token!r} with the id {index:,}{more}. Resize the embedding of the model "
            "(resize_token_embeddings), or give the tokenizer that it was made with."
        )


def check_tokens(reference: str, vocab_size: int, ids: Iterable[torch.Tensor]) -> None:
    """The tokens of the texts must be rows of the embedding.

    Raises:
        ModelError: one is beyond it.
    """
    for tensor in ids:
        if tensor.numel() and (largest := int(tensor.max())) >= vocab_size:
            raise ModelError(
                f"{reference}: the text holds the token with the id {largest:,}, but the model's embedding has "
                f"{vocab_size:,} rows. Resize the embedding (resize_token_embeddings), or take that token out of the "
                "text."
            )


def check_lengths(
    reference: str, config: PretrainedConfig, *, sequence_length: int, context: int, is_default: bool
) -> str:
    """Sequences must fit what the model was made for; a longer context may be priced, where positions are rotary.

    Figures of sequences beyond a model's own context are figures of what it was never made for, so they are refused.
    The target's context only sizes the cache: where the model can compute that far, it is told and no more.

    Args:
        reference: what the person typed.
        config: of the model.
        sequence_length: of what is measured and trained on, in tokens.
        context: of the target, in tokens.
        is_default: whether nobody asked for that context.

    Returns:
        What a person should know; "" if nothing.

    Raises:
        ModelError: sequences, or the context that was asked for of a model with learned positions, are longer than the
            model's own.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return ""
    if sequence_length > longest:
        raise ModelError(
            f"{reference}: the model was made for at most {longest:,} tokens; got sequences of {sequence_length:,}. "
            f"Set sequence_length under [splits] to {longest:,} or less."
        )
    if context <= longest:
        return ""
    if config.model_type in _LEARNED_POSITIONS:
        if is_default:
            return (
                f"the model has {longest:,} positions, but plans are priced for a context of {context:,} tokens, the "
                f"default: more memory than it can use. Give --context {longest}."
            )
        raise ModelError(
            f"{reference}: the model has {longest:,} positions; got a context of {context:,} under [target]. Set it to "
            f"{longest:,} or less."
        )
    if is_default:
        return ""
    return (
        f"the target's context of {context:,} tokens is longer than the {longest:,} that the model was made for: its "
        "memory is priced, its quality there is not measured."
    )


def check_finite(reference: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Weights must be numbers.

    Raises:
        ModelError: there is NaN or infinity in some; the first ones are named.
    """
    import torch

    # One sum is many times faster than looking at each value, and is finite only if all are (or huge: looked at then).
    broken = [
        name
        for name, value in tensors
        if value.is_floating_point()
        and not bool(torch.isfinite(value.sum()))
        and not bool(torch.isfinite(value).all())
    ]
    if broken:
        some = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
        raise ModelError(f"{reference}: NaN or infinity in {some}. The file is damaged: fetch it again.")


def check_stored(reference: str, weights: Iterable[Path], checked: Path) -> None:
    """Look once for NaN in files that are used where they lie.

    Args:
        reference: what the person typed.
        weights: safetensors files.
        checked: written when they were found good; where it is there, they are not read again. Its name must stand for
            the content of the files.

    Raises:
        ModelError: there is NaN or infinity in a tensor.
    """
    from safetensors import safe_open

    if checked.is_file():
        return
    for path in weights:
        with safe_open(path, framework="pt") as file:
            check_finite(reference, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
    with suppress(OSError):  # a cache that cannot be written costs the time of reading again, no more
        checked.parent.mkdir(parents=True, exist_ok=True)
        checked.touch()
