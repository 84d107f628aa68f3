"""Pareto fronts over tuples of objectives, every one of them minimised."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether a is at least as good as b everywhere and better somewhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, in input order; of equal points, all stay."""
    covered = _Covered()
    found: list[int] = []
    for point, indices in _in_order(points):
        if not covered.holds(point[1:]):
            covered.add(point[1:])
            found += indices
    return sorted(found)


def ranks(points: Sequence[Point]) -> list[int]:
    """Non-domination rank of each point: 0 for the front, 1 for the front once rank 0 is gone, and so on.

    Source: the ranks of Deb et al. 2002 (NSGA-II), section III-A, found as in Zhang et al. 2015 (ENS-BS): a point
    goes into the first front that does not dominate it.
    """
    result = [-1] * len(points)
    fronts: list[_Covered] = []
    for point, indices in _in_order(points):
        # A front that dominates the point is dominated by all fronts before it: halving finds the first that does not.
        rank = bisect_left(fronts, True, key=lambda front: not front.holds(point[1:]))
        if rank == len(fronts):
            fronts.append(_Covered())
        fronts[rank].add(point[1:])
        for index in indices:
            result[index] = rank
    return result


def _in_order(points: Sequence[Point]) -> list[tuple[tuple[float, ...], list[int]]]:
    """Every point once with its indices, in lexicographic order: nothing is dominated by what comes after it."""
    indices: dict[tuple[float, ...], list[int]] = {}
    for index, point in enumerate(points):
        indices.setdefault(tuple(point), []).append(index)
    return sorted(indices.items())


class _Covered:
    """What earlier points in lexicographic order dominate, seen along all objectives but the first.

    Along the first objective every earlier point is as good, so that two of three objectives are left: a staircase,
    one end of it at each (y, z) with y ascending and z descending, which is searched by halving. More objectives are
    compared one by one.
    """

    def __init__(self) -> None:
        self._ys: list[float] = []
        self._zs: list[float] = []
        self._others: list[tuple[float, ...]] = []

    def holds(self, rest: tuple[float, ...]) -> bool:
        """Whether an earlier point is as good in all of the remaining objectives."""
        if len(rest) > 2:
            return any(all(x <= y for x, y in zip(other, rest, strict=True)) for other in self._others)
        y, z = (*rest, 0.0, 0.0)[:2]
        last = bisect_right(self._ys, y) - 1
        return last >= 0 and self._zs[last] <= z

    def add(self, rest: tuple[float, ...]) -> None:
        """Remember a point that is not covered."""
        if len(rest) > 2:
            self._others.append(rest)
            return
        y, z = (*rest, 0.0, 0.0)[:2]
        first = last = bisect_left(self._ys, y)
        while last < len(self._ys) and self._zs[last] >= z:
            last += 1  # the new point covers what these covered
        self._ys[first:last], self._zs[first:last] = [y], [z]


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

    Exact. One to three objectives take one sweep; with more, the volume is cut into slices along the last one (While
    et al. 2006, HSO).
    """
    inside = [tuple(point) for point in points if all(x < r for x, r in zip(point, reference, strict=True))]
    front = [inside[i] for i in non_dominated(inside)]
    missing = 3 - len(reference)
    if missing < 0:
        return _sliced(front, tuple(reference))
    # an objective that all points agree on multiplies the volume by its distance to the reference: by 1
    return _swept([(*point, *[0.0] * missing) for point in front], (*reference, *[1.0] * missing))


def _sliced(front: list[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    levels = sorted({point[-1] for point in front})
    return sum(
        (above - level) * hypervolume([point[:-1] for point in front if point[-1] <= level], reference[:-1])
        for level, above in zip(levels, [*levels[1:], reference[-1]], strict=False)
    )


def _swept(front: list[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    """The volume below a front of three objectives: the area that its first points cover, integrated over the last.

    The area lies above a staircase, whose steps begin at each x (ascending) and reach down to y (descending).
    """
    xs: list[float] = []
    ys: list[float] = []
    volume, area, level = 0.0, 0.0, 0.0
    for x, y, z in sorted(front, key=lambda point: point[2]):
        volume += area * (z - level)
        level = z
        before = bisect_right(xs, x) - 1
        left, height = x, ys[before] if before >= 0 else reference[1]
        if height <= y:
            continue
        first = last = bisect_left(xs, x)
        while last < len(xs) and ys[last] >= y:  # the steps that the new one covers
            area += (xs[last] - left) * (height - y)
            left, height = xs[last], ys[last]
            last += 1
        right = xs[last] if last < len(xs) else reference[0]
        area += (right - left) * (height - y)
        xs[first:last], ys[first:last] = [x], [y]
    return volume + area * (reference[2] - level)


def contributions(points: Sequence[Point], reference: Point) -> list[float]:
    """Hypervolume that is lost when each point alone is taken away."""
    whole = hypervolume(points, reference)
    lost = [0.0] * len(points)  # of what is dominated, nothing is lost
    for i in non_dominated(points):
        lost[i] = whole - hypervolume([*points[:i], *points[i + 1 :]], reference)
    return lost
