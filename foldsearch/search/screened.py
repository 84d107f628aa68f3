"""What was screened, as a run folder keeps it; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from foldsearch.codec import from_json, to_json
from foldsearch.criteria import criterion_names
from foldsearch.files import write_json
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.spec.space import Space

SEARCH = "search"  # in tables: whoever asked for plans but the criteria


@dataclass(frozen=True, slots=True)
class Screened:
    """A plan as it was screened. author: who asked for it: a criterion, "alone", "chain" or "move"."""

    plan: FoldPlan
    author: str
    quality: Quality


def can_be_screened(space: Space) -> bool:
    """Whether the space has plans that can be screened."""
    return "drop" in space.fates


def write_screened(path: Path, found: Iterable[Screened]) -> None:
    """Keep what was screened."""
    write_json(path, [to_json(one) for one in found])


def read_screened(path: Path) -> list[Screened]:
    """What `write_screened` kept; nothing where nothing was screened."""
    if not path.exists():
        return []
    return [from_json(Screened, value) for value in json.loads(path.read_text())]


def screened_by_count(found: Iterable[Screened]) -> dict[int, dict[str, Screened]]:
    """By the number of dropped blocks, the best plan of each criterion, and the best of all others as "search".

    Only counts at which criteria were asked, and plans that only drop blocks.
    """
    names = criterion_names()
    best: dict[int, dict[str, Screened]] = {}
    for one in found:
        if one.plan.only_drops:
            author = one.author if one.author in names else SEARCH
            row = best.setdefault(len(one.plan.dropped), {})
            if author not in row or one.quality.kl < row[author].quality.kl:
                row[author] = one
    return {count: row for count, row in sorted(best.items()) if row.keys() - {SEARCH}}
