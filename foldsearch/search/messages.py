"""What a worker tells the search of its trial. It goes through Tune as one text, as Tune would take a dict apart."""

from __future__ import annotations

import json
from dataclasses import dataclass

from foldsearch.codec import from_json, to_json
from foldsearch.record import Trial


@dataclass(frozen=True, slots=True)
class Measured:
    """The trial after a rung, or at its end. again: as its folder had it already, so the study may know it or not."""

    trial: Trial
    again: bool = False


@dataclass(frozen=True, slots=True)
class TimeIsUp:
    """The time of the run ended the trial; reason: where it was."""

    reason: str


@dataclass(frozen=True, slots=True)
class DiskIsFull:
    """The trial could not be written, so no other one could go on either."""

    reason: str


@dataclass(frozen=True, slots=True)
class StorageLost:
    """What the trial learnt could not be put where the search would find it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The trial raised an error."""

    reason: str


@dataclass(frozen=True, slots=True)
class EndedEarly:
    """The trial ended before the last rung without an error, as one does whose plan another trial measures."""

    reason: str = "it ended before the last rung"


@dataclass(frozen=True, slots=True)
class Probed:
    """A step of the largest plan was trained before the trial began. words: to be told; empty where memory held it."""

    words: str


Message = Measured | TimeIsUp | DiskIsFull | StorageLost | Failed | EndedEarly | Probed
_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Measured, TimeIsUp, DiskIsFull, StorageLost, Failed, EndedEarly, Probed)
}


def encode(message: Message) -> str:
    """The message as text."""
    return json.dumps({"kind": type(message).__name__, "message": to_json(message)})


def decode(text: str) -> Message:
    """Read what `encode` made."""
    value = json.loads(text)
    return from_json(_KINDS[value["kind"]], value["message"])
