"""The ways to heal a folded model in closed form: one list, one file each. A study's `healing.method` names one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from foldsearch.model.fuse import fuse_by_cosine, fuse_by_squares, is_fusible
from foldsearch.model.heal import Healed, heal, is_healable
from foldsearch.model.rescale import is_rescalable, rescale
from foldsearch.model.states import DepthStates
from foldsearch.model.training import HealMethod
from foldsearch.progress import CountProgress


@dataclass(frozen=True, slots=True)
class Method:
    """One way to heal.

    Attributes:
        source: the paper, or "ours".
        heal: heals a folded model in place, given the dense model's states, the tokens that they are of, and what is
            told of the progress. Nothing is added to the model.
        can_heal: whether it would change anything in a folded model; costs nothing.
    """

    source: str
    heal: Callable[[PreTrainedModel, DepthStates, Tensor, CountProgress | None], Healed]
    can_heal: Callable[[PreTrainedModel], bool]


METHODS: dict[HealMethod, Method] = {
    "ridge": Method("ours", heal, is_healable),
    "fused": Method("ReplaceMe, arXiv 2505.02819, by least squares", fuse_by_squares, is_fusible),
    "fused-cosine": Method("ReplaceMe, arXiv 2505.02819, by cosine", fuse_by_cosine, is_fusible),
    "rescale": Method("after Prune&Comp, arXiv 2507.18212", rescale, is_rescalable),
}
