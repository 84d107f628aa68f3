"""The folded model as it is: shared weights once, with the code that runs it in transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from foldsearch.model import blocks as blocks_file
from foldsearch.model import folded as folded_file
from foldsearch.model import networks as networks_file
from foldsearch.model import parts as parts_file
from foldsearch.model.blocks import family_of
from foldsearch.runtimes import NOTHING, Beside, stock
from foldsearch.runtimes.stock import check_model, rounded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["before_rounding", "check_model", "rounded", "write"]

SHIPPED_CODE = tuple(
    Path(str(module.__file__)) for module in (folded_file, networks_file, parts_file, blocks_file)
)


def before_rounding(model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """The model itself; how products with experts sum goes by where a file's weights come to lie in memory."""
    return model, not family_of(model.config).experts


def write(model: PreTrainedModel, folder: Path, beside: Beside = NOTHING) -> tuple[str, ...]:
    """Write a folded model with the code that runs it; `folder` exists.

    Stock transformers refuses the folder unless told `trust_remote_code=True`: it knows no such model type.
    """
    model.config.auto_map = {
        "AutoConfig": f"folded.{type(model.config).__name__}",
        "AutoModelForCausalLM": f"folded.{type(model).__name__}",
    }
    stock.write(model, folder, beside)
    for file in SHIPPED_CODE:
        shutil.copyfile(file, folder / file.name)
    return ()
