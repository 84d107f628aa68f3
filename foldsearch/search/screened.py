"""What was screened, as a run folder keeps it; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from foldsearch.codec import from_json, to_json
from foldsearch.criteria import criterion_names, criterion_of
from foldsearch.errors import FoldsearchError, RunError, quote_error
from foldsearch.fates.replace import Networks
from foldsearch.files import write_json
from foldsearch.paths import printable
from foldsearch.plan.plan import FoldPlan
from foldsearch.plan.result import Quality
from foldsearch.search.chain import ATTENTION_ONLY, DROPPED, KEPT, LINEAR, MLP_ONLY, STATES
from foldsearch.spec.space import Space
from foldsearch.spec.study import Study

EARLIER = "earlier run"  # an author
SEARCH = "search"  # in tables: whoever asked for plans but the criteria


@dataclass(frozen=True, slots=True)
class Screened:
    """A plan as it was screened. authors: who asked for it, in order: criteria, "alone", "chain", "move"
    or `EARLIER`.
    """

    plan: FoldPlan
    authors: tuple[str, ...]
    quality: Quality

    @property
    def searchers(self) -> tuple[str, ...]:
        """Its authors that are no criteria."""
        names = criterion_names()
        return tuple(author for author in self.authors if author not in names)

    def asked_by(self, author: str) -> Screened:
        """The same plan, which this one asked for too."""
        return self if author in self.authors else replace(self, authors=(*self.authors, author))


@dataclass(frozen=True, slots=True)
class Promoted:
    """What of a screening is trained. rival: a criterion to train beside the plans, and how many blocks it removes."""

    plans: tuple[FoldPlan, ...] = ()
    rival: tuple[str, int] | None = None


def is_screened(study: Study, space: Space) -> bool:
    """Whether a search of the space begins with a screening: some whole blocks go, and what is left is healed."""
    heals = study.healing.tokens > 0 and study.healing.method == "ridge"
    return study.screen.plans > 0 and heals and not {DROPPED, LINEAR}.isdisjoint(screened_states(space))


def screened_states(space: Space) -> str:
    """The states that blocks of screened plans may be in: those of the space that need no fit before healing.

    A matrix in a gap is worth about its bytes, but costs the stock architecture (docs/log.md), so gaps are filled only
    where the space does not leave them empty.
    """
    networks = space.table("replace")
    fills = "replace" in space.fates and isinstance(networks, Networks) and "linear" in networks.kinds
    may_be = {
        KEPT: True,
        DROPPED: "drop" in space.fates,
        LINEAR: fills and "drop" not in space.fates,
        MLP_ONLY: space.attention[1] > 0,
        ATTENTION_ONLY: space.attention[1] > 0,
    }
    return "".join(state for state in STATES if may_be[state])


def compared_criteria(space: Space) -> frozenset[str]:
    """The criteria of a space whose baselines a screening measures: quick ones, where baselines drop blocks."""
    if space.fates[0] != "drop":
        return frozenset()
    return frozenset(name for name in space.criteria if criterion_of(name).is_quick)


def write_screened(path: Path, found: Iterable[Screened]) -> None:
    """Keep what was screened."""
    write_json(path, [to_json(one) for one in found])


def read_screened(path: Path) -> list[Screened]:
    """What `write_screened` kept; nothing where nothing was screened.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        return [from_json(Screened, value) for value in json.loads(path.read_text())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FoldsearchError) as error:
        what = f"what was screened before the first trial, '{printable(path)}', cannot be read"
        remedy = "Put back a copy of it, or remove it: reports then leave it out."
        raise RunError(quote_error(what, error, remedy)) from error


def screened_by_count(found: Iterable[Screened]) -> dict[int, dict[str, Screened]]:
    """By the number of dropped blocks, the best plan of each criterion, and the best of all others as "search".

    Only counts at which criteria were asked, and plans that only drop blocks.
    """
    names = criterion_names()
    best: dict[int, dict[str, Screened]] = {}
    for one in found:
        if one.plan.only_drops:
            row = best.setdefault(len(one.plan.dropped), {})
            for author in {author if author in names else SEARCH for author in one.authors}:
                if author not in row or one.quality.kl < row[author].quality.kl:
                    row[author] = one
    return {count: row for count, row in sorted(best.items()) if row.keys() - {SEARCH}}
