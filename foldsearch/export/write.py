"""Model folders for transformers: folded (shared weights once) and expanded (the stock architecture).

Shapes: I inputs and O outputs of a linear.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foldsearch.errors import PlanError
from foldsearch.model import blocks as blocks_file
from foldsearch.model import folded as folded_file
from foldsearch.model import parts as parts_file
from foldsearch.model.blocks import family_of
from foldsearch.model.parts import Borrowed
from foldsearch.plan.expanded import unexpandable
from foldsearch.plan.plan import FoldPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHIPPED_CODE = tuple(Path(str(module.__file__)) for module in (folded_file, parts_file, blocks_file))


def write_folded(model: PreTrainedModel, folder: Path) -> None:
    """Write a folded model with the code that runs it; `folder` exists.

    Stock transformers refuses the folder unless told `trust_remote_code=True`: it knows no such model type.
    """
    model.config.auto_map = {
        "AutoConfig": f"folded.{type(model.config).__name__}",
        "AutoModelForCausalLM": f"folded.{type(model).__name__}",
    }
    model.save_pretrained(folder)
    for file in SHIPPED_CODE:
        shutil.copyfile(file, folder / file.name)


@torch.no_grad()
def expand(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a stock model: every child gets its owner's weights, adapters merged in float32.

    Raises:
        PlanError: the plan has what no stock block can do; the message says what.
    """
    import transformers

    config: Any = model.config
    plan = FoldPlan.parse(config.fold["plan"], config.fold["num_blocks"])
    check_expandable(plan, by_position=getattr(config, "scale_attn_by_inverse_layer_idx", False))
    stock_class: Any = getattr(transformers, family_of(model.config).stock)
    values = model.config.to_dict()
    for key in ("model_type", "architectures", "fold", "auto_map", "kv_sharing_modes"):
        values.pop(key, None)
    config = stock_class.config_class(**values)
    config._attn_implementation = model.config._attn_implementation
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


def check_expandable(plan: FoldPlan, *, by_position: bool) -> None:
    """Whether stock blocks can do what a plan needs.

    Args:
        plan: of the folded model.
        by_position: whether the model scales attention by a block's position (`CostTable.by_position`).

    Raises:
        PlanError: they cannot; the message says what.
    """
    if (found := unexpandable(plan, by_position=by_position)) is not None:
        what, remedy = found
        raise PlanError(
            f"an expanded export uses stock blocks only, but the plan '{plan}' has {what}, which stock blocks cannot "
            f"do. Export it folded, or {remedy}."
        )
