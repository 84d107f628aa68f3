"""Which trials go on after a rung.

Asynchronous, like ASHA (Li et al. 2020): a trial is judged when its result of a rung arrives, against the results of
that rung so far, and never again. Several objectives need another order than ASHA's: non-domination rank first, and
within a rank what a trial adds to the front (hypervolume), compared with the trials of about its cost only. With
three conflicting objectives nearly every trial has rank 0, so the rank alone would stop nobody; and trials of quite
another cost are no rivals: the cheap end of a front is as wanted as its good end. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from foldsearch.plan.front import Point, contributions, ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a trial goes on. reason: a sentence with the numbers, for notes and progress."""

    goes_on: bool
    reason: str


def decide(
    point: Point, others: Sequence[Point], *, keep: float = 0.5, at_least: int = 4, band: float = 0.25
) -> Decision:
    """Whether the trial whose result of a rung is `point` goes on to the next rung.

    Args:
        point: its objectives, quality first, costs after it, all minimised.
        others: results of the same rung so far, of other plans.
        keep: share of the trials of about the same cost that goes on (rounded up).
        at_least: so many results of a rung go on before any trial is stopped.
        band: how near two costs are to be "about the same", as a share of the span of the costs seen.

    Stops nobody whose cost is like no other's and whom nobody dominates.
    """
    points = [tuple(point), *(tuple(other) for other in others)]
    if len(points) <= at_least:
        return Decision(True, f"one of the first {at_least} at this rung")
    rank = ranks(points)
    quota = max(at_least, math.ceil(keep * len(points)))
    better = sum(other < rank[0] for other in rank)
    if better >= quota:
        return Decision(False, f"dominated: {better} of {len(points)} results are of a better rank")
    spans = [max(column) - min(column) for column in zip(*points, strict=True)]
    rivals = [i for i, other in enumerate(points) if _near(other, points[0], spans, band)]
    added = _added([points[i] for i in rivals], [rank[i] for i in rivals], spans, band)
    order = sorted(range(len(rivals)), key=lambda i: (rank[rivals[i]], -added[i]))
    place = order.index(0)  # rivals[0] is the point itself
    kept = math.ceil(keep * len(rivals))
    words = f"place {place + 1} of {len(rivals)} at about this cost, {kept} go on"
    return Decision(place < kept, words)


def _near(a: Point, b: Point, spans: Sequence[float], band: float) -> bool:
    return all(abs(x - y) <= band * span for x, y, span in zip(a[1:], b[1:], spans[1:], strict=True))


def _added(points: list[Point], rank: list[int], spans: Sequence[float], band: float) -> list[float]:
    """Hypervolume that each point adds to those of its own rank.

    Quality is scaled to the points' own span; costs to the width of the band, with the reference one more band
    away: so within a band a better quality counts more than a slightly lower cost.
    """
    qualities = [point[0] for point in points]
    low, span = min(qualities), max(qualities) - min(qualities)
    scaled = [
        (
            (point[0] - low) / span if span else 0.0,
            *(
                x / (band * width) if band * width else 0.0
                for x, width in zip(point[1:], spans[1:], strict=True)
            ),
        )
        for point in points
    ]
    worst = [max(column) for column in zip(*scaled, strict=True)]
    reference = (worst[0] + 0.1, *(x + 1 for x in worst[1:]))
    result = [0.0] * len(points)
    for level in set(rank):
        members = [i for i, other in enumerate(rank) if other == level]
        for i, volume in zip(members, contributions([scaled[i] for i in members], reference), strict=True):
            result[i] = volume
    return result


class Halving(FIFOScheduler):
    """Tune's side of it: asks `judge` about every result, and stops the trial where it says so.

    It keeps nothing: `judge` looks into the study, so after a restart the rungs are as they were. Tune tells a
    searcher nothing of a trial's last result, and marks stopped trials as done; so it is here that every result of
    a trial is seen, and a trial ends when `judge` says so, never by Tune's own `done`.
    """

    def __init__(self, judge: Callable[[int, str], bool]) -> None:
        """`judge`: from a trial's number and its result in JSON to whether the trial ends now."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._judge = judge

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, str]) -> str:
        """Stop or go on."""
        ends = self._judge(trial.config["number"], result["result"])
        return str(TrialScheduler.STOP if ends else TrialScheduler.CONTINUE)
