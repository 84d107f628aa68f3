"""Many folded models measured on little text: each is built, healed in closed form and judged in seconds.

The text that is healed on and the text that is judged on go through the blocks together, one block at a time, and
what plans have in common up to a block is computed once (see `foldsearch.model.heal.Healer`). Source: ours.

Shapes: N sequences, T positions, D width.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import pairwise

import torch

from foldsearch.errors import InputError, ModelError
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

MOST_AT_ONCE = 4  # plans that are measured at once


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
        self._folding = threading.Lock()
        every = replace(text, ids_NT=torch.cat((text.ids_NT, tokens.ids_NT)))
        states = every.states(progress)
        if states.shape[1] < len(every.ids_NT):
            raise InputError(
                f"the dense model's states of a screening must fit {MOST_BYTES / 1e9:g} GB; {len(every.ids_NT)} "
                f"sequences of {every.ids_NT.shape[1]} tokens do not, {states.shape[1]} do. Lower screen.healed_tokens "
                "and screen.judged_tokens, or set screen.plans to 0."
            )
        self.fault = ""  # why the latest plan without finite figures has none
        self._healer = Healer(
            states,
            every.ids_NT,
            num_led=len(tokens.ids_NT),
            most_bytes=SCREEN_BYTES,
            states_only=True,
            with_attention=False,
        )

    @property
    def num_steps(self) -> int:
        """Positions of plans that were computed so far, not taken from plans that begin alike."""
        return self._healer.num_steps

    def measure(self, plan: FoldPlan, progress: CountProgress | None = None) -> Quality:
        """The quality of a plan, healed. Plans that begin alike are measured faster one after the other.

        Several threads may measure at once. `progress` is called with (done, total) positions.

        Raises:
            ModelError: a state is no finite number.
        """
        assert plan.needs_no_fit, "what is new in a plan is fitted before it is healed"
        with torch.no_grad():
            with self._folding:  # transformers sets what all threads share while it makes a model
                model = fold(self._dense, plan)
            _, own_NTD = self._healer.heal(model, progress)
            norm = model.get_submodule(family_of(model.config).final_norm)
            return judge(model, self._tokens, self._targets, hidden_NTD=norm(own_NTD))

    def measure_each(
        self, plans: Sequence[FoldPlan], is_over: Callable[[], bool]
    ) -> Iterator[tuple[FoldPlan, Quality | None]]:
        """Measure plans, several at once; what they come to as they end, None where that is no finite number.

        Neighbours are measured one after the other, so plans come in an order in which these begin alike. The figures
        are the same however many are measured at once, to the rounding of products on fewer threads.

        Args:
            plans: to measure.
            is_over: asked before each plan whether no more are to be begun.
        """
        if not plans:
            return
        threads = torch.get_num_threads()
        at_once = num_at_once(self._dense.device.type, threads, len(plans))
        ends = [len(plans) * number // at_once for number in range(at_once + 1)]
        parts = [deque(plans[start:stop]) for start, stop in pairwise(ends)]
        running: dict[Future[Quality | None], tuple[FoldPlan, deque[FoldPlan]]] = {}
        stopped = threading.Event()
        pool = ThreadPoolExecutor(
            at_once, initializer=torch.set_num_threads, initargs=(max(1, threads // at_once),)
        )
        free = list(parts)
        try:
            while True:
                while free and any(parts) and not is_over():
                    mine = free.pop()
                    plan = mine.popleft() if mine else max(parts, key=len).pop()
                    running[pool.submit(self._measured, plan, stopped)] = plan, mine
                if not running:
                    return
                if free and any(parts):  # no more are to be begun
                    parts = []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    plan, mine = running.pop(future)
                    free.append(mine)
                    yield plan, future.result()
        finally:
            stopped.set()
            pool.shutdown()
            torch.set_num_threads(threads)

    def _measured(self, plan: FoldPlan, stopped: threading.Event) -> Quality | None:
        def go_on(_done: int, _total: int) -> None:
            if stopped.is_set():
                raise _Stopped

        try:
            quality = self.measure(plan, go_on)
        except ModelError as error:
            self.fault = str(error)
            return None
        except _Stopped:
            return None
        return quality if math.isfinite(quality.kl) else None


class _Stopped(Exception):
    """Ends a measurement that nobody waits for any more."""


def num_at_once(device: str, threads: int, num_plans: int) -> int:
    """How many plans are measured at once.

    A thread that has a plan for itself waits for no other: on two threads two plans at once take less time than one
    after the other (docs/log.md). Each needs memory of its own, for its states and a chunk of logits.
    """
    return max(1, min(threads, MOST_AT_ONCE, num_plans)) if device == "cpu" else 1
