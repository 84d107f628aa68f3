"""Many folded models measured on little text: each is built, healed in closed form and judged in seconds.

The text that is healed on and the text that is judged on go through the blocks together, one block at a time, and
what plans have in common up to a block is computed once (see `foldsearch.model.heal.Healer`). Source: ours.

Shapes: N sequences, T positions, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from foldsearch.errors import InputError
from foldsearch.model.blocks import family_of
from foldsearch.model.fold import fold
from foldsearch.model.heal import Healer
from foldsearch.model.judge import DenseTargets, judge
from foldsearch.model.states import MOST_BYTES, FitText
from foldsearch.model.tokens import TokenSet
from foldsearch.model.training import SCREEN_BYTES
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.progress import CountProgress

PROBED = 2  # measurements with each number of threads before one is chosen
PROBED_AGAIN = 40  # measurements after which it is looked at again: others come and go on a machine


class Screen:
    """Measures plans of one dense model on one text."""

    def __init__(
        self,
        text: FitText,
        tokens: TokenSet,
        targets: DenseTargets,
        *,
        progress: CountProgress | None = None,
    ) -> None:
        """Asks the dense model for its states.

        Args:
            text: that plans are healed on, at least two sequences.
            tokens: that they are judged on, of the same length.
            targets: what the dense model says on these.
            progress: called with (done, total) sequences.

        Raises:
            InputError: there is only one sequence to heal on, or there are more than memory is meant for.
        """
        self._dense, self._tokens, self._targets = text.dense, tokens, targets
        every = replace(text, ids_NT=torch.cat((text.ids_NT, tokens.ids_NT)))
        states = every.states(progress)
        if states.shape[1] < len(every.ids_NT):
            raise InputError(
                f"the dense model's states of a screening must fit {MOST_BYTES / 1e9:g} GB; {len(every.ids_NT)} "
                f"sequences of {every.ids_NT.shape[1]} tokens do not, {states.shape[1]} do. Lower screen.healed_tokens "
                "and screen.judged_tokens, or set screen.plans to 0."
            )
        self._healer = Healer(states, every.ids_NT, num_led=len(tokens.ids_NT), most_bytes=SCREEN_BYTES)

    @property
    def num_steps(self) -> int:
        """Positions of plans that were computed so far, not taken from plans that begin alike."""
        return self._healer.num_steps

    @torch.no_grad()
    def measure(self, plan: FoldPlan) -> Quality:
        """The quality of a plan, healed. Plans that begin alike are measured faster one after the other.

        Raises:
            ModelError: a state is no finite number.
        """
        assert plan.needs_no_fit, "what is new in a plan is fitted before it is healed"
        model = fold(self._dense, plan)
        _, own_NTD = self._healer.heal(model)
        norm = model.get_submodule(family_of(model.config).final_norm)
        return judge(model, self._tokens, self._targets, hidden_NTD=norm(own_NTD))


class Threads:
    """Chooses whether measurements go faster with all of torch's threads or with one.

    Threads wait for each other after every step of a model. Where other programs take a processor now and then, that
    waiting takes longer than the work.
    """

    def __init__(self) -> None:
        """Begins with what torch is set to."""
        self._all = torch.get_num_threads()
        self._took: dict[int, list[float]] = {}
        self._measured = 0

    @contextmanager
    def measuring(self, screen: Screen) -> Iterator[None]:
        """Set torch's threads for one measurement, and note what a position took."""
        choice = self._next()
        torch.set_num_threads(choice)
        before, began = screen.num_steps, time.perf_counter()
        try:
            yield
        finally:
            steps, seconds = screen.num_steps - before, time.perf_counter() - began
            torch.set_num_threads(self._all)
            self._measured += 1
            if steps:
                self._took.setdefault(choice, []).append(seconds / steps)

    def _next(self) -> int:
        if self._measured and self._measured % PROBED_AGAIN == 0:
            self._took = {}
        options = dict.fromkeys((self._all, 1))
        short = [option for option in options if len(self._took.get(option, [])) < PROBED]
        if short:
            return min(short, key=lambda option: len(self._took.get(option, [])))
        return min(options, key=lambda option: sum(self._took[option]) / len(self._took[option]))
