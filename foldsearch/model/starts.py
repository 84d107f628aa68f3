"""Give what a folded model has beyond the dense model's tensors good values, from which recovery then starts.

Replacements are fitted to the residual stream (replacements.py), adapters and output norms to the weights or the
states of the blocks that their children stand for (children.py).
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldsearch.errors import PlanError
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.children import start_adapters
from foldsearch.model.fold import fold
from foldsearch.model.judge import DenseTargets, judge
from foldsearch.model.parts import Borrowed, OutputNorm, Replaced
from foldsearch.model.replacements import FitSettings, fit_replacement
from foldsearch.model.states import FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.plan.plan import AdapterStart, FoldPlan, Replacement, Slot
from foldsearch.progress import CountProgress, StageProgress, counting, silent


def folded_start(
    text: FitText,
    plan: FoldPlan,
    *,
    adapters: AdapterStart = "svd",
    fit: FitSettings | None = None,
    progress: StageProgress = silent,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fold, and fit replacements and adapters. Returns the model, and what the fits found as plain values.

    Args:
        text: the dense model, and the text that replacements and adapters are fitted to.
        plan: the plan of the folded model.
        adapters: how adapters start, see `foldsearch.model.children`.
        fit: how replacements are fitted; None is the defaults.
        progress: called with what is done and the share of it.

    Raises:
        ModelError, PlanError: see `fold`.
    """
    dense, ids_NT = text.dense, text.ids_NT
    model = fold(dense, plan)
    summary: dict[str, Any] = {}
    left_out = "linear" if fit is not None and fit.linear is None else ""
    if any(isinstance(slot, Replacement) and slot.kind != left_out for slot in plan.slots):
        states = text.states(counting(progress, "residual states"))
        for block, slot in zip(decoder_blocks(model), plan.slots, strict=True):
            if isinstance(slot, Replacement) and slot.kind != left_out:
                name = f"{slot.first}-{slot.last}~{slot.kind}"
                found = fit_replacement(
                    dense, slot, states, ids_NT, fit, counting(progress, f"fitting {name}")
                )
                _put(_new_module(block), found.values)
                summary[name] = {"errors": found.errors, "chosen": found.chosen}
    if any(isinstance(slot, Slot) and (slot.rank or slot.norm) for slot in plan.slots):
        start_adapters(model, dense, ids_NT, adapters, counting(progress, "calibrating adapters"))
        summary["adapters"] = adapters
    return model, summary


def linear_window(
    dense: PreTrainedModel,
    count: int,
    states: Tensor,
    tokens: TokenSet,
    targets: DenseTargets,
    progress: CountProgress | None = None,
) -> tuple[int, ...]:
    """Find the `count` consecutive blocks whose linear replacement leaves the least KL to the dense model [ours].

    Every window is fitted in closed form, built and measured: states alone do not tell a window that can go from one
    that later blocks cannot do without (docs/log.md).

    Args:
        states: see `foldsearch.model.states.residual_states`.
        tokens, targets: to measure on; a thousand tokens will do.
        progress: called with (done, total) windows.
    """
    num_blocks = len(decoder_blocks(dense))
    found: list[float] = []
    for first in range(num_blocks - count + 1):
        slot = Replacement(first, first + count - 1, "linear")
        kept = FoldPlan.dropping(range(first, first + count), num_blocks).slots
        plan = FoldPlan((*kept[:first], slot, *kept[first:]), num_blocks)
        kl = math.inf
        with suppress(PlanError):  # no block attends, in a hybrid
            model = fold(dense, plan)
            fit = fit_replacement(dense, slot, states, tokens.ids_NT)
            _put(_new_module(decoder_blocks(model)[first]), fit.values)
            kl = judge(model, tokens, targets).kl
        found.append(kl if math.isfinite(kl) else math.inf)
        if progress is not None:
            progress(first + 1, num_blocks - count + 1)
    best = min(range(len(found)), key=found.__getitem__)
    return tuple(range(best, best + count))


def new_values(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a folded model has beyond the dense model's tensors, by parameter name: what `fold(start=…)` takes."""
    names = {id(module): path for path, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, (Borrowed, OutputNorm, Replaced)):
            for name, parameter in module.named_parameters(recurse=False):
                found[f"{names[id(module)]}.{name}"] = parameter.detach()
    for block, slot in zip(decoder_blocks(model), model.config.fold["slots"], strict=True):
        if slot.get("replaced") and slot["attention"] is not None:  # a copy of a block
            for name, parameter in block.named_parameters():
                found[f"{names[id(block)]}.{name}"] = parameter.detach()
    return found


def _new_module(block: torch.nn.Module) -> torch.nn.Module:
    """The network inside a block, or the block itself where that is what replaces others (`layer`)."""
    return next((module for module in block.modules() if isinstance(module, Replaced)), block)


@torch.no_grad()
def _put(module: torch.nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])
