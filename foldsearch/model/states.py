"""The residual stream of the dense model at every depth, kept on disk and memory-mapped.

What replaces a run of blocks is fitted to it: any run of any plan, from one forward pass over the text. Memory stays
that of one batch, disk at most `MOST_BYTES` a model and text: where more text is given, its first sequences are taken.

Shapes: L blocks, N sequences, T positions, D width.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldsearch import cache
from foldsearch.errors import InputError
from foldsearch.files import replace_atomically
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import hidden_of
from foldsearch.model.head import last_hidden
from foldsearch.progress import CountProgress

SCHEMA = 1  # of the files; raise it when what is written in them changes
MOST_BYTES = 2 * 10**9
BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True, eq=False)
class FitText:
    """A text that what is new in a folded model is fitted to, and the dense model's states on it.

    dense: the dense model. ids_NT: token ids of whole sequences, of a text that is not measured on.
    model_hash, cache_dir: see `residual_states`.
    """

    dense: PreTrainedModel
    ids_NT: Tensor
    model_hash: str
    cache_dir: Path

    def states(self, progress: CountProgress | None = None) -> Tensor:
        """The states between the blocks; see `residual_states`."""
        return residual_states(
            self.dense, self.ids_NT, model_hash=self.model_hash, cache_dir=self.cache_dir, progress=progress
        )


def first_sequences(ids_NT: Tensor, tokens: int) -> Tensor:
    """The first sequences of a text that hold so many tokens, at least two of them."""
    return ids_NT[: max(2, tokens // ids_NT.shape[1])]


def residual_states(
    dense: PreTrainedModel,
    ids_NT: Tensor,
    *,
    model_hash: str,
    cache_dir: Path,
    most_bytes: int = MOST_BYTES,
    progress: CountProgress | None = None,
) -> Tensor:
    """States between the blocks, (L + 1, n, T, D), in the model's dtype, on the CPU, mapped from a file.

    State i is the input of block i, state L the output of the last block, before the final norm. n is N, or as many
    sequences as `most_bytes` hold. Writing to the tensor changes no file.

    Args:
        dense: in eval mode. ids_NT: token ids.
        model_hash: names the weights; with the dtype and the tokens it names the file.
        progress: called with (done, total) sequences.

    Raises:
        InputError: not even one sequence fits `most_bytes`.
    """
    num_states, width = len(decoder_blocks(dense)) + 1, dense.config.hidden_size
    length = ids_NT.shape[1]
    of_one = num_states * length * width * dense.dtype.itemsize
    count = min(len(ids_NT), most_bytes // of_one)
    if not count:
        raise InputError(
            f"the states of one sequence of {length} tokens take {of_one} bytes, but {most_bytes} are allowed. "
            "Use shorter sequences, or allow more."
        )
    ids_NT = ids_NT[:count].cpu()
    size = num_states * count * length * width

    def make(path: Path) -> None:
        replace_atomically(path, lambda temporary: _write(dense, ids_NT, temporary, progress))

    def mapped(path: Path) -> Tensor:
        # Private: what a trial writes by mistake stays its own.
        return torch.from_file(str(path), shared=False, size=size, dtype=dense.dtype)

    of_ids = hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest()
    key = cache.key(SCHEMA, model_hash, str(dense.dtype), of_ids, count, length)
    found, _ = cache.once(cache_dir / "states" / f"{key}.bin", make, mapped, keep=True)
    return found.view(num_states, count, length, width)


@torch.inference_mode()
def _write(dense: PreTrainedModel, ids_NT: Tensor, path: Path, progress: CountProgress | None) -> None:
    count, length = ids_NT.shape
    blocks = decoder_blocks(dense)
    here = slice(0)

    def keep(index: int, hidden_BTD: Tensor) -> None:
        # Written, not mapped: where a mapped page finds no room on the disk the process dies without a word.
        values_BTD = hidden_BTD.cpu().contiguous().view(torch.uint8)
        file.seek((index * count + here.start) * length * values_BTD.shape[-1])
        file.write(values_BTD.numpy().data)

    with path.open("wb") as file, ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hook = block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: keep(i, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        hook = blocks[-1].register_forward_hook(lambda _, args, out: keep(len(blocks), hidden_of(out)))
        hooks.callback(hook.remove)
        step = max(1, BATCH_TOKENS // length)
        for start in range(0, count, step):
            here = slice(start, min(start + step, count))
            last_hidden(dense, ids_NT[here].to(dense.device))
            if progress is not None:
                progress(here.stop, count)


def in_float64(value: Tensor) -> Tensor:
    """Cast to float64 on the tensor's device, or on the CPU where the device (MPS) has no such type."""
    return (value.cpu() if value.device.type == "mps" else value).double()
