"""Who is stopped, and at which rung, on curves written down beforehand.

Oracle: the rule worked out by hand (the comments beside the curves), and laws that hold for any results.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldsearch.plan.front import dominates
from foldsearch.run import Run
from foldsearch.search.halving import decide
from foldsearch.search.messages import Measured, encode
from foldsearch.search.proposer import Line
from foldsearch.search.records import Records
from foldsearch.search.run import Search
from foldsearch.spec.study import Objective
from tests import fake_trial
from tests.fake_driver import study

# name: (memory GB, GFLOPs per token), KL at each of three rungs; in the order in which they were run, one at a time
CURVES = {
    "a": ((0.280, 0.33), (0.70, 0.50, 0.45)),  # one of the first four results of every rung
    "b": ((0.280, 0.33), (1.00, 0.72, 0.60)),
    "c": ((0.280, 0.33), (0.65, 0.48, 0.44)),
    "d": ((0.280, 0.33), (0.90, 0.75, 0.66)),
    "e": ((0.240, 0.28), (1.30, 0.90, 0.80)),  # nobody else is as cheap
    "f": ((0.280, 0.33), (0.95, 0.60, 0.50)),  # c, e, a and d are of a better rank: four of six
    "g": (
        (0.279, 0.33),
        (0.66, 0.74, 0.70),
    ),  # rank 0 for its 1 MB, yet fourth of five of its cost at the second rung
    "h": ((0.245, 0.28), (1.35, 0.80, 0.70)),  # e is as cheap and better: second of two
    "i": ((0.260, 0.33), (0.80, 0.70, 0.65)),  # shares weights: nobody else has that memory
    "j": ((0.278, 0.33), (0.64, 0.45, 0.40)),  # the best of its cost
    "k": ((0.262, 0.33), (0.97, 0.50, 0.40)),  # i is as cheap and better, whatever k might have become
}
STOPPED = {"f": 0, "g": 1, "h": 0, "k": 0}


def stopped_in(curves: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]) -> dict[str, int]:
    rungs: list[list[tuple[float, ...]]] = [[], [], []]
    stopped: dict[str, int] = {}
    for name, (costs, losses) in curves.items():
        for rung, loss in enumerate(losses):
            decision = decide((loss, *costs), rungs[rung])
            rungs[rung].append((loss, *costs))
            if rung < 2 and not decision.goes_on:
                stopped[name] = rung
                break
    return stopped


def test_who_stops_at_which_rung() -> None:
    assert stopped_in(CURVES) == STOPPED


def test_losers_stop_though_none_dominates_another() -> None:
    """A little worse, a little cheaper, all of them: every rank is 0, and quality decides."""
    losses = (0.80, 0.60, 0.70, 0.90, 1.00, 0.50, 0.65, 0.85, 0.72)
    curves = {f"{loss:.2f}": ((0.28 - 0.002 * (loss - 0.5), 0.33), (loss,) * 3) for loss in losses}
    far = {"far": ((0.24, 0.28), (1.4,) * 3)}  # what costs are compared with: a span of 0.04 GB
    # With "far", the first three are the first four results. At the first rung 0.90 is then the last of four rivals,
    # 1.00 of five, 0.85 the sixth of eight; 0.72 is the fifth of nine, but at the second rung the fifth of six.
    assert stopped_in({**far, **curves}) == {"0.90": 0, "1.00": 0, "0.85": 0, "0.72": 1}


def test_reasons_have_the_numbers_in_them() -> None:
    same_cost = [(loss, 1.0, 1.0) for loss in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert decide((0.6, 1.0, 1.0), same_cost).reason == "dominated: 5 of 6 results are of a better rank"
    assert decide((0.6, 1.0, 1.0), same_cost[:3]).reason == "one of the first 4 at this rung"
    cheaper = [(0.1 * i, 1.0 - 0.001 * i, 1.0) for i in range(5)] + [(2.0, 0.1, 1.0)]
    reason = decide((0.5, 0.995, 1.0), cheaper).reason
    assert reason == "place 6 of 6 at about this cost, of which 3 go on"


def test_a_bad_result_that_is_no_rival_stops_nobody() -> None:
    """Its KL once stretched the scale until all others looked alike, and their costs decided."""
    others = [
        (3.2, 0.51, 0.51), (3.03, 0.54, 0.54), (0.71, 0.71, 0.71), (0.41, 0.76, 0.76), (0.08, 0.86, 0.86),
        (0.06, 0.86, 0.86),
    ]  # fmt: skip
    for more in ([], [(8.0, 0.76, 0.76)], [(800.0, 0.76, 0.76)]):
        assert decide((0.56, 0.59, 0.59), [*others, *more]).reason.startswith("place 1 of 3")


results = st.tuples(st.floats(0, 5), st.floats(0, 1), st.floats(0, 1))


@given(results, st.lists(results, max_size=14), st.integers(1, 6), st.floats(0.1, 1))
def test_the_first_ones_and_the_best_of_their_cost_go_on(
    point: tuple[float, ...], others: list[tuple[float, ...]], at_least: int, keep: float
) -> None:
    decision = decide(point, others, keep=keep, at_least=at_least, band=0.2)
    if len(others) < at_least:
        assert decision.goes_on
    spans = [max(column) - min(column) for column in zip(point, *others, strict=True)]
    near = [
        other
        for other in others
        if all(abs(a - b) <= 0.2 * span for a, b, span in zip(other[1:], point[1:], spans[1:], strict=True))
    ]
    if not near and not any(dominates(other, point) for other in others):
        assert decision.goes_on


@given(results, st.lists(results, min_size=4, max_size=12), st.integers(0, 11), st.floats(1, 100))
def test_what_is_dominated_elsewhere_changes_no_place(
    point: tuple[float, ...], others: list[tuple[float, ...]], which: int, times: float
) -> None:
    """A result at the costs of another, which is no rival, and worse than that."""
    at = others[which % len(others)]
    bad = ((at[0] + 0.1) * times, *at[1:])
    spans = [max(column) - min(column) for column in zip(point, *others, strict=True)]
    is_rival = all(abs(a - b) <= 0.3 * span for a, b, span in zip(at[1:], point[1:], spans[1:], strict=True))
    if not is_rival and decide(point, others, band=0.25).goes_on:
        assert decide(point, [*others, bad], band=0.25).goes_on


@given(st.lists(results, min_size=1, max_size=14), st.floats(0.1, 1))
def test_where_all_cost_the_same_the_better_share_goes_on(
    points: list[tuple[float, ...]], keep: float
) -> None:
    """Same costs: only quality counts, so the share that is kept can be counted."""
    losses = sorted({round(point[0], 3) for point in points})
    same = [(loss, 1.0, 1.0) for loss in losses]
    going = [
        decide(point, [other for other in same if other != point], keep=keep, at_least=1).goes_on
        for point in same
    ]
    assert sum(going) == math.ceil(keep * len(same))
    assert going == sorted(going, reverse=True)  # the better ones


@given(results, st.lists(results, max_size=10), st.integers(0, 10**6))
def test_the_order_of_the_others_does_not_matter(
    point: tuple[float, ...], others: list[tuple[float, ...]], seed: int
) -> None:
    import random

    shuffled = list(others)
    random.Random(seed).shuffle(shuffled)
    assert decide(point, others).goes_on == decide(point, shuffled).goes_on


# ---- in a search


def ends_of(folder: Path, objectives: tuple[Objective, ...]) -> dict[int, tuple[str, int]]:
    """State and last rung of each trial, and what the front is, where the study names its objectives in this order."""
    asked = study(trials=16, sampler="random", objectives=objectives)
    with Run.draft(folder) as draft:
        run = Run(draft, asked, fake_trial.TABLE).begin(folder)
    records = Records(run)
    line = Line(records)
    search = Search(records, line, lambda event: None)
    while (asked := line.next(num_running=0)) is not None:
        number, proposal = asked
        context = fake_trial.FakeContext(run, folder.parent)
        for trial in fake_trial.run_trial(proposal, context, number=number):
            if search.judge(number, encode(Measured(trial))):
                break
    ends = {record.number: (record.state, len(record.results)) for record in records.all()}
    return ends | {-1 - i: ("front", record.number) for i, record in enumerate(records.front())}


@pytest.mark.parametrize("names", [("kl", "memory", "flops"), ("kl", "memory")])
def test_the_order_of_the_objectives_changes_nothing(tmp_path: Path, names: tuple[Objective, ...]) -> None:
    turned = [names[i:] + names[:i] for i in range(len(names))]
    found = [ends_of(tmp_path / "-".join(order), order) for order in turned]
    assert any(state == "stopped" for state, _ in found[0].values())
    assert all(ends == found[0] for ends in found)
