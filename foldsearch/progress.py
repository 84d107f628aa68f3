"""How long work says where it is, to whoever listens."""

from __future__ import annotations

from collections.abc import Callable

StageProgress = Callable[[str, float], None]
"""Called with the name of the stage and the share of it that is done, 0 to 1."""


class TimeUp(Exception):
    """The time of a run is up: raised by a listener out of the work that told it where it is.

    Whoever works keeps what it has, and lets it through.
    """


class TrialTimeUp(TimeUp):
    """The time that one trial may take is up."""


CountProgress = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


Notice = Callable[[str], object]
"""Told, in words, what a person should know."""


def silent(stage: str, share: float) -> None:
    """A listener to whom nothing matters."""


def unheard(words: str) -> None:
    """Nobody is told."""


def counting(say: StageProgress, stage: str) -> CountProgress:
    """A listener to the counts of one stage, which tells its share."""
    return lambda done, total: say(stage, done / max(total, 1))
