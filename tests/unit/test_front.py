"""Pareto fronts.

Oracles: the definitions over all pairs (brute force), Optuna's hypervolume, a count of grid cells, cases by hand.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from foldsearch.plan.front import contributions, dominates, hypervolume, knee, non_dominated, normalise, ranks

coordinate = st.integers(0, 5)  # few values, so that ties are common


def point_sets(max_size: int = 12, min_size: int = 0):
    return st.integers(1, 4).flatmap(
        lambda dimensions: st.lists(
            st.tuples(*[coordinate] * dimensions), min_size=min_size, max_size=max_size
        )
    )


def beats(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@given(point_sets())
def test_dominance_and_front(points):
    for a, b in itertools.product(points, points):
        assert dominates(a, b) == beats(a, b)
    assert non_dominated(points) == [
        i for i, point in enumerate(points) if not [other for other in points if beats(other, point)]
    ]


@given(point_sets())
def test_ranks(points):
    """A point's rank is one more than the highest rank of the points that dominate it (Deb et al., III-A)."""
    found = ranks(points)
    for point, rank in zip(points, found, strict=True):
        above = [other for q, other in zip(points, found, strict=True) if beats(q, point)]
        assert rank == max(above, default=-1) + 1


class Counted(float):
    """A number that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other):
        Counted.comparisons += 1
        return float.__lt__(self, other)

    def __le__(self, other):
        Counted.comparisons += 1
        return float.__le__(self, other)

    def __ge__(self, other):
        Counted.comparisons += 1
        return float.__ge__(self, other)

    def __gt__(self, other):
        Counted.comparisons += 1
        return float.__gt__(self, other)

    __hash__ = float.__hash__


def spread(size, dimensions, kind):
    """No point dominates another ("front"), each dominates the next ("chain"), or as chance has it."""
    rng = np.random.default_rng(size)
    if kind == "chain":
        rows = np.repeat(rng.permutation(size)[:, None], dimensions, 1) / size
    else:
        rows = rng.random((size, dimensions))
        if kind == "front":
            rows[:, -1] = dimensions - rows[:, :-1].sum(1)
    return [tuple(map(Counted, row)) for row in rows.tolist()]


@pytest.mark.parametrize("kind", ["front", "chain", "chance"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    "work", [non_dominated, ranks, lambda points: hypervolume(points, (Counted(9.0),) * len(points[0]))]
)
def test_twice_the_points_take_little_more_than_twice_the_work(work, dimensions, kind):
    """n log n comparisons grow by 2.2 from 400 points to 800, n² by 4; three objectives may halve twice (2.5)."""

    def comparisons(size):
        points = spread(size, dimensions, kind)
        Counted.comparisons = 0
        work(points)
        return Counted.comparisons

    assert comparisons(800) <= 2.7 * comparisons(400)


def test_contributions_take_a_hypervolume_for_each_point_of_the_front():
    """So n² log n comparisons, which grow by 4.6 from 50 points to 100."""

    def comparisons(size):
        points = spread(size, 3, "front")
        Counted.comparisons = 0
        contributions(points, (Counted(9.0),) * 3)
        return Counted.comparisons

    assert comparisons(100) <= 5.5 * comparisons(50)


@given(point_sets(max_size=9))
def test_hypervolume_counts_grid_cells(points):
    """With whole numbers the dominated volume is the number of unit cells whose lower corner is dominated."""
    dimensions = len(points[0]) if points else 2
    cells = itertools.product(range(5), repeat=dimensions)
    covered = sum(
        any(all(x <= c for x, c in zip(point, cell, strict=True)) for point in points) for cell in cells
    )
    assert hypervolume(points, (5,) * dimensions) == covered


@given(
    st.integers(2, 3).flatmap(
        lambda n: st.lists(st.tuples(*[st.floats(-5, 5, width=32)] * n), min_size=1, max_size=30)
    )
)
def test_hypervolume_is_optunas(points):
    reference = (3.0,) * len(points[0])
    inside = [point for point in points if all(x <= 3 for x in point)]
    expected = compute_hypervolume(np.array(inside), np.array(reference)) if inside else 0.0
    assert hypervolume(points, reference) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


def test_hypervolume_by_hand():
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([(1, 1)], (3, 4)) == 6
    assert hypervolume([(1, 3), (2, 1)], (4, 4)) == 3 * 1 + 2 * 3 - 2 * 1
    assert hypervolume([(1, 3), (2, 1), (2, 3)], (4, 4)) == 7
    assert hypervolume([(0, 0, 0)], (2, 3, 4)) == 24
    assert hypervolume([(4, 0)], (4, 4)) == 0  # on the edge
    assert hypervolume([(5, 0), (1, 1)], (4, 4)) == 9


@given(point_sets(max_size=8))
def test_contributions_are_what_is_lost(points):
    dimensions = len(points[0]) if points else 2
    reference = (6,) * dimensions
    found = contributions(points, reference)
    assert len(found) == len(points)
    front = set(non_dominated(points))
    for index, value in enumerate(found):
        rest = [point for other, point in enumerate(points) if other != index]
        assert value == hypervolume(points, reference) - hypervolume(rest, reference)
        assert (value > 0) == (index in front and points[index] not in rest)


def test_normalise():
    assert normalise([(1, 10, 7), (3, 20, 7), (2, 12, 7)]) == [(0, 0, 0), (1, 1, 0), (0.5, 0.2, 0)]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(5, 5)], 0),
        ([(0, 10), (2, 2), (10, 0)], 1),
        ([(0, 10), (10, 0), (9, 9), (2, 2)], 3),
        ([(0, 1000), (1, 900), (10, 0)], 1),  # scaled: (0, 1), (0.1, 0.9), (1, 0), so 1, 0.82 and 1
        ([(0, 1), (1, 0)], 0),  # a tie: the earlier one
        ([(3, 3), (3, 3)], 0),
        ([(1, 7), (1, 5), (1, 6)], 1),  # one dominates all
    ],
)
def test_knee_by_hand(points, expected):
    assert knee(points) == expected


def test_knee_is_scaled_over_the_front_only():
    """A dominated point far out must not stretch an axis: (6, 2) is the knee with it as without."""
    front = [(0, 10), (6, 2), (10, 0)]
    assert knee(front) == knee([*front, (1000, 10)]) == 1


@given(point_sets(min_size=1))
def test_a_knee_is_on_the_front(points):
    assert knee(points) in non_dominated(points)


def test_no_knee_of_nothing():
    with pytest.raises(ValueError, match="at least one point"):
        knee([])
