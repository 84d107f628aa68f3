"""Prune&Comp's way of healing: the stream is scaled to the size that it has in the dense model.

After a gap the stream is smaller than the next block was trained for, so what that block adds counts for too much. The
factor at a gap is the mean over tokens of the dense state's size over the folded model's own, sizes being sums of
absolute values. The paper multiplies everything before the gap by it (embedding and output matrices). Here everything
after it that writes to the stream is divided instead: blocks read the stream through a norm, which does not see its
scale, and so does the head, so that both are the same function; and where the embedding is the head too, that stays as
it is. Of a position whose units end in a norm (Gemma 2 and 3, OLMo 2), that norm's gain is divided.
Source: Prune&Comp (arXiv 2507.18212), from its abstract: "estimate the magnitude gap", "rescaling the remaining weights
offline"; which mean, and that a plan comes from a criterion first and is compensated then, are ours. The paper prunes
one layer at a time and compensates in between.

Shapes: B sequences of a batch, T positions, D width of the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldsearch.errors import InputError
from foldsearch.model.blocks import FOLDED_PREFIX, family_of
from foldsearch.model.evidence import block_runs
from foldsearch.model.heal import Healed, HealedBlock
from foldsearch.model.places import (
    Place,
    StreamText,
    StreamWriter,
    first_touched,
    places_of,
    shared_parameters,
    unit_writer,
)  # fmt: skip
from foldsearch.model.states import DepthStates
from foldsearch.progress import CountProgress


def is_rescalable(model: PreTrainedModel) -> bool:
    """Whether the stream comes to a position across a gap."""
    places = places_of(model)
    return any(_follows_gap(places, index) for index in range(len(places)))


@torch.no_grad()
def rescale(
    model: PreTrainedModel, states: DepthStates, ids_NT: Tensor, progress: CountProgress | None = None
) -> Healed:
    """Heal a folded model in place by rescaling; see `foldsearch.model.heal.heal`.

    A `HealedBlock` tells of a position after a gap: the relative squared error of the state that it reads, over all of
    the text, as it was and as it is scaled.

    Raises:
        InputError: there is only one sequence; or a position runs weights that others run too, a network or experts; or
            blocks of the family read the stream without a norm (OLMo 2).
    """
    reads = family_of(model.config).attention
    if reads.output in reads.norms[:1]:
        raise InputError(
            "rescaling must have blocks that read the stream through a norm, but those of "
            f"{str(model.config.model_type).removeprefix(FOLDED_PREFIX)} read it as it is. Heal by ridge."
        )
    text = StreamText.of(model, states)
    places = places_of(model)
    begin = first_touched(places)
    runs = block_runs(model, ids_NT)
    scale = 1.0  # of the dense stream over the folded model's, by the gaps so far
    values: dict[str, Tensor] = {}
    blocks: list[HealedBlock] = []
    for index, place in list(enumerate(places))[begin:]:
        if _follows_gap(places, index):
            before = _error(text, states[place.reads], scale)
            scale *= _factor(text, states[place.reads], scale)
            blocks.append(HealedBlock(place.position, 0.0, before, _error(text, states[place.reads], scale)))
        if blocks:
            values |= _divide(model, place, scale)
        text.advance(runs[index])
        if progress is not None:
            progress(index + 1 - begin, len(places) - begin)
    return Healed(values, tuple(blocks), text.num_tokens if blocks else 0)


def _follows_gap(places: list[Place], index: int) -> bool:
    return places[index].reads > (places[index - 1].ends if index else 0)


def _factor(text: StreamText, dense_NTD: Tensor, scale: float) -> float:
    """Mean over tokens of the dense state's size over that of the folded model's, which is scaled."""
    total = sum(
        float(
            (_size(dense_NTD[here]) / _size(text.own_NTD[here]).clamp_min(1e-12).cpu()).sum(
                dtype=torch.float64
            )
        )
        for here in text.batches()
    )
    return total / (scale * text.num_tokens)


def _size(state_BTD: Tensor) -> Tensor:
    return state_BTD.float().abs().sum(-1)


def _error(text: StreamText, dense_NTD: Tensor, scale: float) -> float:
    """Mean over tokens of the relative squared error of the scaled stream."""
    total = 0.0
    for here in text.batches():
        wanted_BTD = dense_NTD[here].to(text.own_NTD.device).float()
        left_BTD = scale * text.own_NTD[here].float() - wanted_BTD
        errors_BT = left_BTD.square().sum(-1) / wanted_BTD.square().sum(-1).clamp_min(1e-12)
        total += float(errors_BT.sum(dtype=torch.float64))
    return total / text.num_tokens


def _divide(model: PreTrainedModel, place: Place, scale: float) -> dict[str, Tensor]:
    """Divide what a position writes to the stream; its new parameters, by their names in the model."""
    family, slot = family_of(model.config), model.config.fold["slots"][place.position]
    shared = shared_parameters(model)
    values: dict[str, Tensor] = {}
    for name, unit in family.units_of(place.block):
        if slot[name] is None and "replaced" not in slot:
            continue
        writer = unit_writer(place.block, unit, shared) if slot[name] == slot["home"] else None
        if writer is None:
            raise InputError(
                f"rescaling must divide what each later position writes by itself, but position {place.position} runs "
                "weights that others run too, a network or experts. Drop blocks only, or heal by ridge."
            )
        path, module = (writer.path, writer.module) if writer.norm is None else (unit.output, writer.norm)
        for key, value in _divided(module, writer, scale).items():
            setattr(module, key, nn.Parameter(value, requires_grad=False))
            values[f"{place.path}.{path}.{key}"] = value
    return values


def _divided(module: Any, writer: StreamWriter, scale: float) -> dict[str, Tensor]:
    """The parameters of a linear, or of the norm after it, whose output is divided."""
    if writer.norm is None:
        names = ("weight", "bias") if writer.has_bias else ("weight",)
        return {
            name: (getattr(module, name).float() / scale).to(getattr(module, name).dtype) for name in names
        }
    weight_D = module.weight.float()
    gain_D = module(torch.ones_like(module.weight)[None])[0].float()
    offset_D = (gain_D - weight_D).round()  # a gain is the weight, or in Gemma 1 more than it
    return {"weight": ((offset_D + weight_D) / scale - offset_D).to(module.weight.dtype)}
