"""Optuna's samplers, made repeatable: a run that was killed and goes on is proposed what it would have been proposed.

A sampler draws from one stream of random numbers, and a new process would begin another one. So every draw here has a
stream of its own: its seed is made of the study's seed, the number of the trial and the name of the parameter. What is
drawn then depends on these and on what the study knows, and on nothing that goes with a process: also not on how many
parameters of the trial had been drawn when it was killed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from foldsearch.spec.study import Study

POPULATION = 8  # of NSGA-II
STARTUP_TRIALS = 8  # that TPE draws at random first


class RepeatableSampler(BaseSampler):
    """A sampler each of whose draws has a seed of its own."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        """make: the sampler of a seed, to draw once. seed: of the study."""
        self._make = make
        self._seed = seed
        self._knows = make(seed)  # what needs no random number, and may remember what it has read

    def _drawer(self, trial: FrozenTrial, name: str) -> BaseSampler:
        return self._make(zlib.crc32(f"{self._seed} {trial.number} {name}".encode()))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters that are drawn together."""
        return self._knows.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw the parameters that are drawn together."""
        return self._drawer(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw a parameter by itself."""
        drawer = self._drawer(trial, param_name)
        return drawer.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Told before a trial is drawn."""
        self._knows.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Told when a trial has ended."""
        self._knows.after_trial(study, trial, state, values)


def repeatable_sampler(study: Study) -> RepeatableSampler:
    """The sampler that a study names."""
    # The liar keeps trials that run at the same time apart; alone, it only reads the storage again and again.
    liar = study.jobs > 1

    def make(seed: int) -> BaseSampler:
        if study.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION)
        if study.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=liar)

    return RepeatableSampler(make, study.seed)
