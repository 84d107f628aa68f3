"""How gates and folded models are trained, as values: a study takes its defaults from them, so they need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foldsearch.errors import InputError

GATE_STEPS = 20
FITTED_TOKENS = 8192  # of a text, that what is new in a folded model is fitted to
HEALED_TOKENS = 16384  # of a text, that a folded model is healed on
HealMethod = Literal["ridge", "fused", "fused-cosine", "rescale"]  # see `foldsearch.model.healing`
Trained = Literal["deltas", "last", "healed"]  # see `foldsearch.model.recover.attach`
LinearStart = Literal["ridge", "patch"]  # see `foldsearch.model.replacements.FitSettings`
SCREEN_BYTES = 2 * 10**9  # of states that screened plans have in common, which are kept


@dataclass(frozen=True, slots=True)
class GateTraining:
    """How gates are trained (see `foldsearch.model.gates`).

    Attributes:
        count: blocks to remove.
        eps: width of the gates around the threshold, in units of log weight: small is hard, large tries more gates.
        steps: training steps.
        seed: of the sequences and of the gates.
    """

    count: int
    eps: float = 0.5
    steps: int = GATE_STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.eps <= 0.0:
            raise InputError(f"The gates' eps is above 0, but here it is {self.eps}. Try 0.5.")
        if self.steps < 1:
            raise InputError(f"Gates train for at least 1 step, but here are {self.steps}. Try {GATE_STEPS}.")


@dataclass(frozen=True, slots=True)
class FurtherTraining:
    """What is asked of the training of one trial beyond its run's last rung (see `foldsearch.further`).

    tokens: to train on in all, those of the run included. trains: what is trained (see the top of
    `foldsearch.model.recover`); None: what was trained before. seconds: to train for at most, after which what was
    reached is measured; None: no bound.
    """

    tokens: int
    trains: Trained | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RecoveryTraining:
    """How a folded model is trained (see `foldsearch.model.recover`).

    learning_rate: of AdamW at its peak, in RMS of the weights that are changed (see `step_units` there). trains: what
    is trained (see the top there). delta_rank: of the deltas; 0 trains norms and what children carry only. next_token,
    kl, tail: weights of the loss. batch: sequences of a step. warmup: share of all tokens; then a cosine down to a
    tenth. clip: of the gradient's norm.
    """

    learning_rate: float = 0.035
    trains: Trained = "deltas"
    delta_rank: int = 8
    next_token: float = 0.0
    kl: float = 1.0
    tail: float = 0.1
    batch: int = 1
    warmup: float = 0.3
    clip: float = 1.0
    seed: int = 0
