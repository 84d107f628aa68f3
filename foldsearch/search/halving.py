"""Which trials go on after a rung.

Asynchronous, like ASHA (Li et al. 2020): a trial is judged when its result of a rung arrives, against the results of
that rung so far, and never again. Several objectives need another order than ASHA's. Non-domination rank comes first;
but with three conflicting objectives nearly every trial has rank 0, so the rank alone would stop hardly anybody. Then
the trials of about the same cost compete for their place on the front, by the hypervolume that each of them alone
would add to the results of other costs. Trials of quite another cost are no rivals: the cheap end of a front is as
wanted as its good end. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from foldsearch.plan.front import Point, hypervolume, non_dominated, normalise, ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

LEAST = 1e-3  # a KL, in nats a token: below it plans are as good as the dense model


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
    better = sum(other < rank[0] for other in rank)
    if better >= max(at_least, math.ceil(keep * len(points))):
        return Decision(False, f"dominated: {better} of {len(points)} results are of a better rank")
    scaled = normalise(_by_ratios(points))
    rivals = [i for i, other in enumerate(scaled) if _near(other, scaled[0], band)]
    # Costs have a far reference, so that small differences of cost count little beside quality.
    reference = (1.1, *(2.0 for _ in scaled[0][1:]))
    near = set(rivals)
    elsewhere = [other for i, other in enumerate(scaled) if i not in near]
    elsewhere = [elsewhere[i] for i in non_dominated(elsewhere)]  # the others add no volume
    without = hypervolume(elsewhere, reference)
    adds = {i: hypervolume([*elsewhere, scaled[i]], reference) - without for i in rivals}
    place = sum((-adds[i], points[i]) < (-adds[0], points[0]) for i in rivals)
    kept = math.ceil(keep * len(rivals))
    return Decision(
        place < kept, f"place {place + 1} of {len(rivals)} at about this cost, of which {kept} go on"
    )


def _by_ratios(points: Sequence[Point]) -> list[Point]:
    """The points with the logarithm of their quality, which ends at the worst of those that nothing dominates.

    A quality is a share of another's, whatever the worst of all is: one plan that came out badly, or the cheap end of a
    front, would else make all the others look alike, and their costs would decide.
    """
    worst = max(points[i][0] for i in non_dominated(points))
    return [(math.log(max(LEAST, min(point[0], worst))), *point[1:]) for point in points]


def _near(a: Point, b: Point, band: float) -> bool:
    return all(abs(x - y) <= band for x, y in zip(a[1:], b[1:], strict=True))


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
