"""Text that the dense model writes itself: calibration text of its own domain, without any data set.

Each sequence begins as the tokenizer begins a text and goes on with a random token; every next token is drawn from
what the dense model says, at temperature 1, until the sequence is full. What it writes after an end token counts like
the rest. Such text is fitted to and trained on; nothing is measured on it, as nobody is to read what a model says to
itself. (docs/log.md: what is fitted to it holds better on kinds of text that nothing was fitted to.)

Shapes: N sequences, T tokens of a sequence, B sequences at once, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldsearch import cache
from foldsearch.errors import ModelError
from foldsearch.files import replace_atomically
from foldsearch.model.tokens import TokenSet

__all__ = ["OwnText", "first_tokens", "kept_text", "with_own_text", "write_text"]

AT_ONCE = 16  # sequences; part of what is drawn, so a change of it is a change of SCHEMA
SCHEMA = 1  # of what is kept


@dataclass(frozen=True, slots=True)
class OwnText:
    """How much a model writes, and from which seed.

    front: what the tokenizer puts before a text, see `foldsearch.model.tokens.front_of`; it counts in the length.
    """

    sequences: int
    length: int
    front: tuple[int, ...] = ()
    seed: int = 0
    temperature: float = 1.0


def first_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    """What a text may begin with: every token but those that were added to the vocabulary, such as end tokens."""
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return [index for index in range(min(len(tokenizer), vocabulary)) if index not in added]


@torch.inference_mode()
def write_text(
    dense: PreTrainedModel,
    first: Sequence[int],
    wanted: OwnText,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """What a model writes, (N, T) int64: a function of the model, `first` and `wanted`.

    Args:
        dense: in eval mode.
        first: the tokens that a text may begin with.
        wanted: how much, and from which seed.
        progress: told the share that is done.

    Raises:
        ModelError: the model's logits are no finite numbers.
    """
    rng = torch.Generator().manual_seed(wanted.seed)
    choices, front = torch.tensor(first), torch.tensor(wanted.front, dtype=torch.int64)
    steps, done, found = wanted.length - len(front) - 1, 0, []
    total = steps * -(-wanted.sequences // AT_ONCE)
    for start in range(0, wanted.sequences, AT_ONCE):
        # The last batch is as large as the others: what is drawn does not depend on how much is wanted.
        begun_B1 = choices[torch.randint(len(choices), (AT_ONCE, 1), generator=rng)]
        ids_BT = torch.cat((front.expand(AT_ONCE, -1), begun_B1), 1)
        read_BT, cache = ids_BT, None
        for _ in range(steps):
            out = dense(input_ids=read_BT.to(dense.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            read_BT = _drawn(out.logits[:, -1], wanted.temperature, rng)
            ids_BT = torch.cat((ids_BT, read_BT), 1)
            done += 1
            if progress is not None:
                progress(done / total)
        found.append(ids_BT[: wanted.sequences - start])
    return torch.cat(found) if found else torch.zeros((0, wanted.length), dtype=torch.int64)


def _drawn(logits_BV: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """The next token of each sequence, (B, 1); drawn on the CPU, whose random numbers do not depend on the device."""
    p_BV = (logits_BV.float().cpu() / temperature).softmax(-1)
    if not p_BV.isfinite().all():
        raise ModelError(
            "a model that writes text must have finite logits; got inf or NaN. Compute in float32 (precision in a "
            "study), or leave 'own:' out of the data."
        )
    return torch.multinomial(p_BV, 1, generator=rng)


def kept_text(
    dense: PreTrainedModel,
    first: Sequence[int],
    wanted: OwnText,
    *,
    model_hash: str,
    cache_dir: Path,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """`write_text`, kept on disk by the content of the model and of what is wanted."""

    def write(path: Path) -> None:
        ids_NT = write_text(dense, first, wanted, progress)
        replace_atomically(path, lambda temporary: save_file({"ids": ids_NT.contiguous()}, temporary))

    key = cache.key(SCHEMA, AT_ONCE, model_hash, str(dense.dtype), list(first), asdict(wanted))
    path = cache_dir / "own" / f"{key}.safetensors"
    return cache.once(path, write, lambda path: load_file(path)["ids"])[0]


def with_own_text(tokens: TokenSet, ids_NT: Tensor, kind: str, num_in_front: int) -> TokenSet:
    """A token set with sequences that a model wrote among the others, each of them a document of its own."""
    keys = [hashlib.sha256(f"own {ids_T}".encode()).hexdigest() for ids_T in ids_NT.tolist()]
    documents = (*tokens.documents, *keys)
    names = tuple(dict.fromkeys((*tokens.kinds.names, kind)))
    of_N = torch.full((len(keys),), names.index(kind), dtype=torch.int64)
    text_NT = torch.arange(ids_NT.shape[1]).expand(ids_NT.shape) >= num_in_front
    document_N = torch.cat((tokens.document_N, len(tokens.documents) + torch.arange(len(keys))))
    kinds = replace(tokens.kinds, names=names, of_N=torch.cat((tokens.kinds.of_N, of_N)))
    whole = TokenSet(
        tokens.name,
        torch.cat((tokens.ids_NT.reshape(-1, ids_NT.shape[1]), ids_NT)),
        document_N,
        documents,
        torch.cat((tokens.text_NT.reshape(-1, ids_NT.shape[1]), text_NT)),
        kinds,
    )
    # In turns, like the parts of a mixture: the first sequences, however many, hold own text in its share.
    places = [(row + 0.5) / len(part) for part in (tokens.ids_NT, ids_NT) for row in range(len(part))]
    return whole.of(sorted(range(len(places)), key=places.__getitem__))
