"""Pareto fronts over tuples of objectives, every one of them minimised."""

from __future__ import annotations

from collections.abc import Sequence

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether a is at least as good as b everywhere and better somewhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, in input order; of equal points, all stay."""
    return [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]


def ranks(points: Sequence[Point]) -> list[int]:
    """Non-domination rank of each point: 0 for the front, 1 for the front once rank 0 is gone, and so on.

    Source: fast non-dominated sorting, Deb et al. 2002 (NSGA-II), section III-A.
    """
    result = [-1] * len(points)
    left = list(range(len(points)))
    rank = 0
    while left:
        front = {left[i] for i in non_dominated([points[j] for j in left])}
        for index in front:
            result[index] = rank
        left = [index for index in left if index not in front]
        rank += 1
    return result


def normalise(points: Sequence[Point]) -> list[tuple[float, ...]]:
    """Each objective scaled so that the points span [0, 1]; an objective they agree on becomes 0."""
    columns = list(zip(*points, strict=True))
    lows = [min(column) for column in columns]
    spans = [max(column) - low for column, low in zip(columns, lows, strict=True)]
    return [
        tuple((x - low) / span if span else 0.0 for x, low, span in zip(point, lows, spans, strict=True))
        for point in points
    ]


def knee(points: Sequence[Point]) -> int:
    """Index of the front's point nearest (Euclid) to the ideal one, objectives normalised over the front.

    Ties go to the earlier point. Source: ours (the compromise solution of Zeleny 1973, with p = 2).

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("a knee needs at least one point, got none.")
    front = non_dominated(points)
    scaled = normalise([points[i] for i in front])
    distances = [sum(x * x for x in point) for point in scaled]
    return front[distances.index(min(distances))]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume that the points dominate below `reference`; points that do not reach it count nothing.

    Exact, by slicing along the last objective (While et al. 2006, HSO); meant for up to a few hundred points of
    two or three objectives.
    """
    inside = [tuple(point) for point in points if all(x < r for x, r in zip(point, reference, strict=True))]
    return _slices([inside[i] for i in non_dominated(inside)], tuple(reference))


def _slices(points: list[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    if not points:
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - min(point[0] for point in points))
    levels = sorted({point[-1] for point in points})
    total = 0.0
    for level, above in zip(levels, [*levels[1:], reference[-1]], strict=True):
        below = [point[:-1] for point in points if point[-1] <= level]
        total += (above - level) * _slices([below[i] for i in non_dominated(below)], reference[:-1])
    return total


def contributions(points: Sequence[Point], reference: Point) -> list[float]:
    """Hypervolume that is lost when each point alone is taken away."""
    whole = hypervolume(points, reference)
    return [whole - hypervolume([*points[:i], *points[i + 1 :]], reference) for i in range(len(points))]
