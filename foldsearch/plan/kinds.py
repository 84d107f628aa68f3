"""The kinds of networks that can stand in place of a run of blocks: one list, which plans, prices and spaces read.

The networks themselves are in `foldsearch/model/networks.py`, which needs torch; this list does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from foldsearch.errors import PlanError, find_named

DEFAULT_EXPANSION = 4  # hidden width of a network whose size is not named, in widths of the model


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of network.

    name: as it is written in plans and spaces, letters a to z. source: the paper that it is from.
    cost: parameters, and MACs per token, of the network; asked with the model's width and the hidden width. None: the
    network is a copy of the first block that it replaces, so it costs what that block costs, and attends.
    takes_size: whether a plan may name the hidden width.
    """

    name: str
    source: str
    cost: Callable[[int, int], tuple[int, int]] | None
    takes_size: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z]+", self.name):
            raise PlanError(
                f"the name of a kind of network is of letters a to z, as plans have it, got '{self.name}'."
            )

    @property
    def is_block(self) -> bool:
        """Whether it is a block like the model's own, with attention and a KV cache."""
        return self.cost is None


def _linear(width: int, _hidden: int) -> tuple[int, int]:
    return width * width + width, width * width


def _ffn(width: int, hidden: int) -> tuple[int, int]:
    return 2 * width * hidden + hidden + width, 2 * width * hidden


def _swiglu(width: int, hidden: int) -> tuple[int, int]:
    return 3 * width * hidden, 3 * width * hidden


KINDS: tuple[Kind, ...] = (
    Kind("linear", "ReplaceMe, arXiv 2505.02819; LinearPatch, NeurIPS 2025", _linear),
    Kind("ffn", "LLM-Streamline, arXiv 2403.19135", _ffn, takes_size=True),
    Kind("swiglu", "LLM-Streamline, arXiv 2403.19135", _swiglu, takes_size=True),
    Kind("layer", "LLM-Streamline, arXiv 2403.19135", cost=None),
)


def kind_names() -> tuple[str, ...]:
    """The name of every kind, in the order of the list."""
    return tuple(kind.name for kind in KINDS)


def kind_named(name: str) -> Kind:
    """The kind of this name.

    Raises:
        PlanError: the list has none.
    """
    return find_named(KINDS, name, "a network in place of blocks")
