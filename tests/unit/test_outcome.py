"""How a run ended, in words. Oracle: counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import rounded
from foldsearch.record import State, Trial
from foldsearch.search.outcome import failing_alike, why_no_front
from tests.fake_driver import study
from tests.fake_trial import NUM_BLOCKS, trial_at
from tests.proposals import removing

TRIED = trial_at(FoldPlan.dropping([3], NUM_BLOCKS), study(), 0, removing("window", 1))
DIVERGED = "diverged: the loss became nan after {} tokens at learning rate {:g}. Lower the learning rate."


def trials(*ends: tuple[State, str]) -> list[Trial]:
    return [replace(TRIED, number=i, state=state, reason=reason) for i, (state, reason) in enumerate(ends)]


def test_one_finished_trial_is_a_front() -> None:
    assert why_no_front(trials(("failed", "x"), ("finished", ""))) == ""


def test_the_commonest_cause_is_told_whatever_its_numbers() -> None:
    alike = [("failed", DIVERGED.format(32 * i, 1e-3 / (i + 1))) for i in range(3)]
    words = why_no_front(trials(*alike))  # type: ignore[arg-type]
    assert words == f"3 of 3 trials failed, all alike: {alike[0][1]}"
    words = why_no_front(trials(("failed", "out of memory"), *alike, ("cut", "the time was up")))  # type: ignore[arg-type]
    assert words == (
        f"4 of 5 trials failed, 3 of them alike: {alike[0][1]}; "
        "1 of 5 stopped before the last rung (the time was up)"
    )


def test_what_never_ran_is_no_trial() -> None:
    rejected = replace(trials(("infeasible", "above the budget"))[0], draft=None, results=())
    assert why_no_front([rejected, *trials(("failed", "x"))]) == "1 of 1 trials failed: x"
    assert why_no_front([]) == "there was no time to begin a trial"
    waiting = [Trial(i, "waiting") for i in range(4)]
    assert why_no_front(waiting) == "none of the 4 trials began"


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([("failed", "killed by signal 9")] * 10, True),
        ([("failed", "killed by signal 9")] * 9, False),
        ([("failed", f"worker {i} died") for i in range(10)], True),
        ([("finished", "")] + [("failed", "a")] * 10, True),
        ([("failed", "a")] * 10 + [("finished", "")], False),
        ([("failed", "a")] * 5 + [("failed", "b")] * 5, False),
        ([("failed", "a")] * 5 + [("stopped", "")] + [("failed", "a")] * 5, False),
        ([("failed", "a")] * 5 + [("infeasible", "")] + [("failed", "a")] * 5, True),  # nothing of it ran
        ([("failed", "a")] * 10 + [("running", "")], True),
    ],
)
def test_ten_failures_in_a_row(ends: list[tuple[State, str]], expected: bool) -> None:
    assert bool(failing_alike(trials(*ends))) == expected


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (-1e-9, ".4f", "0.0000"),
        (-0.0, ".3f", "0.000"),
        (-0.00004, ".4f", "0.0000"),
        (-0.00006, ".4f", "-0.0001"),  # below zero by more than rounding: a fault, not to be hidden
        (-0.5, ".3f", "-0.500"),
        (-1e-9, "+.3f", "+0.000"),
        (0.25, "+.3f", "+0.250"),
        (1.5, ".2f", "1.50"),
    ],
)
def test_what_rounds_to_zero_is_zero(value: float, form: str, expected: str) -> None:
    assert rounded(value, form) == expected
