"""The residual stream of the dense model at every depth, kept on disk and memory-mapped.

What replaces a run of blocks is fitted to it: any run of any plan, from one forward pass over the text. Memory stays
that of one batch, disk at most `MOST_BYTES` a model and text: where more text is given, its first sequences are taken.
Who asks for one depth after the other, as healing does, can have more (`StatesInOrder`): they are computed when they
are asked for, and two depths are held in memory.

Shapes: L blocks, N sequences, T positions, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldsearch import cache
from foldsearch.errors import InputError
from foldsearch.files import replace_atomically
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import block_runs, hidden_of
from foldsearch.model.head import last_hidden
from foldsearch.progress import CountProgress

SCHEMA = 1  # of the files; raise it when what is written in them changes
MOST_BYTES = 4 * 10**9
BATCH_TOKENS = 2048
SHORTEST = 128  # tokens of a sequence that is cut; shorter ones say too little of what comes later


class DepthStates(Protocol):
    """The dense model's states by depth: a tensor (L + 1, N, T, D), or what gives such tensors (N, T, D)."""

    @property
    def shape(self) -> Sequence[int]:
        """(L + 1, N, T, D)."""

    def __getitem__(self, depth: int, /) -> Tensor:
        """The states at a depth, in the model's dtype, on the CPU."""


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

    def states_in_order(self, progress: CountProgress | None = None) -> DepthStates:
        """The states of all of the text, for who asks for one depth after the other: kept on disk if they fit there."""
        if num_kept(self.dense, self.ids_NT) == len(self.ids_NT):
            return self.states(progress)
        return StatesInOrder(self.dense, self.ids_NT)


def text_to_fit(ids_NT: Tensor, tokens: int) -> Tensor:
    """The beginnings of a text's sequences that hold so many tokens in all, as many as can be; at least two.

    Many documents in part are worth more than few of them whole: what is fitted to 64 beginnings of 128 tokens is
    better on texts of the same kinds, and far better on other kinds, than what is fitted to 32 of 256 (docs/log.md).
    """
    num, length = ids_NT.shape
    length = min(length, max(SHORTEST, tokens // num))
    return ids_NT[: max(2, tokens // length), :length].contiguous()


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
    count = num_kept(dense, ids_NT, most_bytes)
    if not count:
        raise InputError(
            f"the states of one sequence of {length} tokens must fit {most_bytes} bytes, but take more. Use shorter "
            "sequences, or allow more."
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


def num_kept(dense: PreTrainedModel, ids_NT: Tensor, most_bytes: int = MOST_BYTES) -> int:
    """How many sequences of a text are kept on disk."""
    of_one = (
        (len(decoder_blocks(dense)) + 1) * ids_NT.shape[1] * dense.config.hidden_size * dense.dtype.itemsize
    )
    return int(min(len(ids_NT), most_bytes // of_one))


class StatesInOrder:
    """The residual stream of the dense model on a text, depth after depth: nothing is kept on disk.

    To go back costs as much as to begin again.
    """

    def __init__(self, dense: PreTrainedModel, ids_NT: Tensor) -> None:
        """Computes nothing yet; see `residual_states`."""
        self._dense, self._ids_NT = dense, ids_NT
        self.shape = (len(decoder_blocks(dense)) + 1, *ids_NT.shape, dense.config.hidden_size)
        self._found: dict[int, Tensor] = {}  # the depth asked for before, and the deepest
        self._before = 0

    @torch.inference_mode()
    def __getitem__(self, depth: int) -> Tensor:
        """The states at a depth, (N, T, D), in the model's dtype, on the CPU; not to be written to."""
        if depth not in self._found:
            nearest = max((known for known in self._found if known < depth), default=None)
            state_NTD = first_state(self._dense, self._ids_NT) if nearest is None else self._found[nearest]
            runs = block_runs(self._dense, self._ids_NT)
            for run in runs[nearest or 0 : depth]:
                state_NTD = torch.cat([run(part.to(self._dense.device)).cpu() for part in _parts(state_NTD)])
            self._found = {key: value for key, value in self._found.items() if key == self._before}
            self._found[depth] = state_NTD.clone() if depth == 0 else state_NTD
        self._before = depth
        return self._found[depth]


def first_state(model: PreTrainedModel, ids_NT: Tensor) -> Tensor:
    """What the first block of a model reads of a text, (N, T, D), on the CPU."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).cpu())
        raise _Enough

    hook = decoder_blocks(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for ids_BT in _parts(ids_NT):
            with suppress(_Enough):
                last_hidden(model, ids_BT.to(model.device))
    finally:
        hook.remove()
    return torch.cat(found)


def _parts(values_NT: Tensor) -> Iterator[Tensor]:
    """Some sequences at a time."""
    step = max(1, BATCH_TOKENS // values_NT.shape[1])
    yield from (values_NT[start : start + step] for start in range(0, len(values_NT), step))


class _Enough(Exception):
    """Ends a forward pass whose rest nobody needs."""


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
