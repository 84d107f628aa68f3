"""The one process that trials on several machines can ask at any time: who measures a plan, how much time is left.

It is an actor of Ray on the node that the search runs on, and knows nothing that the search could not tell it anew. A
plan is held by the number of a trial, and let go of by the search, which hears of a worker that died.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Desk:
    """Answers trials; every call takes microseconds."""

    def __init__(self, owners: Mapping[str, int], begun: Iterable[int], deadline: float | None) -> None:
        """Args:
        owners: of each plan's file the trial that it names.
        begun: numbers of trials that have a result.
        deadline: when the time of the run is up, by the monotonic clock of this machine; None: never.
        """
        self._owners, self._begun, self._deadline = dict(owners), set(begun), deadline
        self._held: dict[str, int] = {}
        self._progress: dict[int, tuple[str, float]] = {}

    # ---- what trials ask

    def left(self) -> float | None:
        """Seconds until the time of the run is up; None: for ever."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    def hold(self, plan: str, number: int) -> tuple[bool, int | None] | None:
        """Whether a plan is held by a trial from now on, and which one measures, or has measured, it.

        None: ask again, as the trial that holds the plan has no result yet.
        """
        holder, owner = self._held.setdefault(plan, number), self._owners.get(plan)
        if holder == number:
            return True, owner
        return (False, owner) if owner in self._begun else None

    def take(self, plan: str, number: int) -> None:
        """A trial measures a plan that it holds."""
        self._owners[plan] = number

    def tell(self, number: int, phase: str, share: float) -> None:
        """Where a trial is."""
        self._progress[number] = (phase, share)

    # ---- what the search says and asks

    def note(self, number: int) -> None:
        """A trial has a result, which others can read."""
        self._begun.add(number)

    def release(self, number: int) -> None:
        """A trial has ended, or its worker has: others may have its plan."""
        self._held = {plan: holder for plan, holder in self._held.items() if holder != number}
        self._progress.pop(number, None)

    def progress(self) -> dict[int, tuple[str, float]]:
        """Where each trial is."""
        return self._progress


def open_desk(node: str, owners: Mapping[str, int], begun: Iterable[int], deadline: float | None) -> Any:
    """A desk on a node, as a handle that can be sent to other processes; it ends with this process."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    # One that was killed begins again as it is made here: at worst two trials measure the same plan.
    desk = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Desk)
    return desk.options(scheduling_strategy=here).remote(owners, begun, deadline)
