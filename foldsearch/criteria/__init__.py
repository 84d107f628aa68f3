"""The ways to choose which blocks are removed: one file each, and one list that space, trial, report and pictures read.

A new one is a file with `choose(request) -> Choice` and its entry in `CRITERIA`. The list itself needs no torch: a
file is imported when its criterion is asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foldsearch.errors import PlanError, find_named
from foldsearch.model.training import FITTED_TOKENS, GATE_STEPS
from foldsearch.progress import StageProgress, silent

if TYPE_CHECKING:
    from foldsearch.model.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Request:
    """What a criterion is asked, and what it may use to answer.

    bench: the dense model, its texts, and what it says on them. count: blocks to remove, 1 or more. most: the most
    blocks that any proposal of the space removes, for those that answer for all counts at once. setting: the value of
    the criterion's own setting; None where it has none. seed: of everything random. gate_steps: of gated training.
    fitted_tokens: that networks in place of blocks are fitted to. say: told what is being done.
    """

    bench: Workbench
    count: int
    most: int
    setting: float | None = None
    seed: int = 0
    gate_steps: int = GATE_STEPS
    fitted_tokens: int = FITTED_TOKENS
    say: StageProgress = silent


@dataclass(frozen=True, slots=True)
class Choice:
    """The blocks to remove, in order; and what is worth telling of how they were found, for the trial's record."""

    blocks: tuple[int, ...]
    summary: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """A number above 0 that a criterion is asked with.

    key: of a space, which lists the values. values: where the space names none. most: the largest value.
    """

    key: str
    values: tuple[float, ...]
    most: float = 1.0


@dataclass(frozen=True, slots=True)
class Criterion:
    """One way to choose the blocks.

    name: in a space and in the study. title: in reports. marker: of matplotlib, in pictures. source: the paper, or
    "ours". max_runs: how many runs of neighbours it may cut; None: any number. setting: its own, if it has one.
    is_simple: whether reports hold the search against it. is_fitted: whether it fits networks to text.
    is_quick: whether it takes no longer than to measure a few plans.
    """

    name: str
    title: str
    marker: str
    source: str
    max_runs: int | None = None
    setting: Setting | None = None
    is_simple: bool = True
    is_fitted: bool = False
    is_quick: bool = False
    module: str = ""  # where `choose` is, if not in the file of its name

    @property
    def setting_key(self) -> str:
        """The key of a space that lists the values of its setting; empty where it has none."""
        return self.setting.key if self.setting is not None else ""

    def choose(self, request: Request) -> Choice:
        """The blocks that this criterion removes.

        Raises:
            PlanError: the count is not between 1 and the number of blocks less one.
        """
        num_blocks = len(request.bench.table.blocks)
        if not 1 <= request.count < num_blocks:
            raise PlanError(
                f"from 1 to {num_blocks - 1} of {num_blocks} blocks can be removed, got {request.count}."
            )
        answer: Choice = importlib.import_module(self.module or f"{__name__}.{self.name}").choose(request)
        return answer


CRITERIA: list[Criterion] = [
    Criterion(
        "gate",
        "gates",
        "o",
        "FoldGPT-style, arXiv 2407.00928",
        setting=Setting("gate_eps", (0.5,)),
        is_simple=False,
    ),
    Criterion("block_influence", "Block Influence", "s", "ShortGPT, arXiv 2403.03853", is_quick=True),
    Criterion("window", "cosine window", "D", "LLM-Streamline, arXiv 2403.19135", max_runs=1, is_quick=True),
    Criterion("linear_window", "linear window", "d", "ours", max_runs=1, is_fitted=True),
    Criterion("greedy", "greedy", "^", "SLEB, arXiv 2402.09025"),
    Criterion("tail", "last blocks", "<", "arXiv 2403.17887, its simple form", max_runs=1, is_quick=True),
    Criterion("uniform", "uniform", "P", "blocks at even distances", is_quick=True),
    Criterion("random", "random", "X", "any blocks", is_quick=True),
    Criterion("evolution", "evolution", "v", "after EvoPress, arXiv 2410.14649"),
]


def criterion_names() -> tuple[str, ...]:
    """The name of every criterion, in the order of the list."""
    return tuple(criterion.name for criterion in CRITERIA)


def criterion_of(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        PlanError: the list has none.
    """
    return find_named(CRITERIA, name, "a criterion")
