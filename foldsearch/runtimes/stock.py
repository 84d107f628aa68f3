"""The stock architecture: shared weights again for every child, adapters merged.

Shapes: I inputs and O outputs of a linear.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foldsearch.model.blocks import family_of
from foldsearch.model.fold import cast, stock_config
from foldsearch.model.parts import Borrowed
from foldsearch.model.whole import copy_processor
from foldsearch.runtimes import NOTHING, Beside

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def before_rounding(model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """The stock model; where it merges adapters, it rounds once more than the folded model does.

    How products with experts sum goes by where their weights come to lie in memory.
    """
    merges = any(isinstance(part, Borrowed) and part.rank for part in model.modules())
    return expand(model), not merges and not family_of(model.config).experts


def check_model(config: PretrainedConfig, context: int) -> tuple[str, ...]:
    """Transformers runs every model that is folded."""
    return ()


def rounded(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """In the dtype that ships."""
    return cast(model, getattr(torch, weights))


def write(model: PreTrainedModel, folder: Path, beside: Beside = NOTHING) -> tuple[str, ...]:
    """As transformers writes it."""
    model.save_pretrained(folder)
    if beside.tokenizer is not None:
        beside.tokenizer.save_pretrained(folder)
    if beside.whole is not None:
        copy_processor(beside.whole, folder)
    return ()


@torch.no_grad()
def expand(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a stock model: every child gets its owner's weights, adapters merged in float32.

    The model's plan is one that stock blocks can run (see `Runtime.check`).
    """
    import transformers

    stock_class: Any = getattr(transformers, family_of(model.config).stock)
    config: Any = stock_config(model.config)
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    with torch.device("meta"):
        stock: Any = stock_class(config)
    tied: dict[int, nn.Parameter] = {}
    for name, module in stock.named_modules():
        source = model.get_submodule(name)
        owner = source.owner if isinstance(source, Borrowed) else source
        for key in module._buffers:
            module._buffers[key] = owner._buffers[key]
        for key in module._parameters:
            found = owner._parameters[key]
            if found is None:
                continue
            if isinstance(source, Borrowed):  # a copy of its own: a stock model shares no blocks
                value = merged_weight(source, found) if key == "weight" else found.clone()
                module._parameters[key] = nn.Parameter(value, False)
            else:
                module._parameters[key] = tied.setdefault(id(found), nn.Parameter(found.detach(), False))
    stock.generation_config = copy.deepcopy(model.generation_config)
    expanded: PreTrainedModel = stock.eval()
    return expanded


def merged_weight(child: Borrowed, weight: Tensor) -> Tensor:
    """A new tensor: the owner's weight plus the child's adapter, summed in float32, in the weight's dtype."""
    if child.down is None or child.up is None:
        return weight.clone()
    change_OI = child.up.float() @ child.down.float()
    change = change_OI if isinstance(child.owner, nn.Linear) else change_OI.T  # Conv1D keeps (I, O)
    return (weight.float() + change).to(weight.dtype)
