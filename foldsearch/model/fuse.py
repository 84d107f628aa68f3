"""ReplaceMe's way of healing: before each gap, one map of what the last MLP adds, multiplied into its output matrix.

With M what the position before a gap writes to the stream, Y what was there before that, and L the dense model's state
after the gap, a matrix T is found so that M T + Y is like L, and the output matrix of the MLP becomes the product of it
and T. Nothing is added to the model. By least squares T is found in closed form,

    min over T of  Σ_t ‖M_t T + Y_t − L_t‖²

and by cosine with Adam, from the identity, on the mean of 1 − cos(M_t T + Y_t, L_t). Every token counts alike.
Source: ReplaceMe (arXiv 2505.02819), which drops one window of blocks; that several gaps are treated one after the
other on the folded model's own states, and the settings of Adam, are ours.

It differs from the ridge of heal.py in that the change is of the width of the stream (D × D, not D × F), that only what
stands before a gap is changed, and that nothing is held back on other text.

Shapes: M tokens, D width of the stream, F what the matrix reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from foldsearch.model.evidence import block_runs
from foldsearch.model.heal import Healed, HealedBlock
from foldsearch.model.places import Place, StreamText, StreamWriter, first_touched, places_of
from foldsearch.model.states import DepthStates, in_float64
from foldsearch.progress import CountProgress

LEAST_RIDGE = 1e-6  # in mean squares of what the position writes, so that there is a solution
EPOCHS, BATCH, RATE = 10, 1024, 1e-4  # of Adam; tokens, and the size of a step of an element of T

Solve = Callable[[Tensor, Tensor, Tensor], Tensor]


def fuse_by_squares(
    model: PreTrainedModel, states: DepthStates, ids_NT: Tensor, progress: CountProgress | None = None
) -> Healed:
    """Heal a folded model in place by ReplaceMe's map, found by least squares; see `foldsearch.model.heal.heal`."""
    return _fuse(model, StreamText.of(model, states), ids_NT, by_squares, progress)


def fuse_by_cosine(
    model: PreTrainedModel, states: DepthStates, ids_NT: Tensor, progress: CountProgress | None = None
) -> Healed:
    """Heal a folded model in place by ReplaceMe's map, found by cosine; see `foldsearch.model.heal.heal`."""
    return _fuse(model, StreamText.of(model, states), ids_NT, by_cosine, progress)


def is_fusible(model: PreTrainedModel) -> bool:
    """Whether a position that stands before a gap has an output matrix of its own."""
    return any(_is_fused(place) for place in places_of(model))


def _is_fused(place: Place) -> bool:
    """Before a gap, with a matrix of its own that nothing of the position reads from."""
    return place.is_before_gap and place.writer is not None and place.writer.is_last


@torch.no_grad()
def _fuse(
    model: PreTrainedModel, text: StreamText, ids_NT: Tensor, solve: Solve, progress: CountProgress | None
) -> Healed:
    places = places_of(model)
    begin = first_touched(places)
    runs = block_runs(model, ids_NT)
    values: dict[str, Tensor] = {}
    blocks: list[HealedBlock] = []
    for place, run in list(zip(places, runs, strict=True))[begin:]:
        if place.writer is not None and _is_fused(place):
            blocks.append(_fuse_one(place, place.writer, text, run, solve))
            values |= {f"{place.path}.{name}": value for name, value in place.writer.parameters().items()}
        else:
            text.advance(run)
        if progress is not None:
            progress(place.position + 1 - begin, len(places) - begin)
    return Healed(values, tuple(blocks), text.num_tokens if blocks else 0)


def _fuse_one(
    place: Place, writer: StreamWriter, text: StreamText, run: Callable[[Tensor], Tensor], solve: Solve
) -> HealedBlock:
    weight_NT1 = text.weights(place)
    read = text.read(run, writer)
    to_stream_FD = writer.to_stream()

    def solved(parts: Sequence[str]) -> Tensor:
        of_parts = [(here, h_MF) for here, h_MF in read.batches if text.part(here) in parts]
        change_DD = solve(
            torch.cat([writer.features(h_MF) @ to_stream_FD for _, h_MF in of_parts]),
            torch.cat([text.own_NTD[here].flatten(0, 1).float() for here, _ in of_parts]),
            torch.cat([text.missing(place, here) for here, _ in of_parts]),
        )
        return to_stream_FD @ change_DD

    before = text.missed(place, read, weight_NT1)
    after = text.missed(place, read, weight_NT1, solved(("fitted",)))
    text.take(read, solved(("fitted", "held out")))
    return HealedBlock(place.position, 0.0, before, after, writer.path)


def by_squares(written_MD: Tensor, _own_MD: Tensor, missing_MD: Tensor) -> Tensor:
    """T − 1, (D, D), by least squares.

    Args:
        written_MD: what the position writes to the stream, M.
        _own_MD: its output, Y + M.
        missing_MD: what the dense model's state after the gap is beyond that, L − Y − M.
    """
    gram_DD = in_float64(written_MD.T @ written_MD)
    # Above zero also where nothing is written: then nothing is changed.
    least = torch.finfo(gram_DD.dtype).tiny
    gram_DD.diagonal().add_(max(LEAST_RIDGE * float(gram_DD.diagonal().mean()), least))
    cross_DD = in_float64(written_MD.T @ missing_MD)
    solution_DD: Tensor = torch.linalg.solve(gram_DD, cross_DD)
    return solution_DD.to(written_MD)


@torch.enable_grad()
def by_cosine(written_MD: Tensor, own_MD: Tensor, missing_MD: Tensor) -> Tensor:
    """T − 1, (D, D), by the cosine of output and dense state; see `by_squares`."""
    width = written_MD.shape[1]
    change_DD = written_MD.new_zeros(width, width).requires_grad_()
    wanted_MD = own_MD + missing_MD
    optimizer = torch.optim.Adam([change_DD], lr=RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(written_MD), generator=generator).split(BATCH):
            made_MD = torch.addmm(own_MD[rows], written_MD[rows], change_DD)
            loss = (1 - functional.cosine_similarity(made_MD, wanted_MD[rows], dim=-1)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return change_DD.detach()
