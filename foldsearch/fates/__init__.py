"""What becomes of removed blocks: one file each, and one list that proposals, prices, spaces and reports read.

A new one is a file with a `Fate` and its `FateTable`, and its entry in `FATES`; nothing here needs torch.
"""

from __future__ import annotations

from foldsearch.errors import find_named
from foldsearch.fates.contract import Bound, Fate, FateTable, Option, Suggest
from foldsearch.fates.drop import Drop
from foldsearch.fates.replace import Replace
from foldsearch.fates.share import Share

__all__ = [
    "FATES",
    "Bound",
    "Drop",
    "Fate",
    "FateTable",
    "Option",
    "Replace",
    "Share",
    "Suggest",
    "fate_names",
    "fate_named",
]

FATES: list[type[Fate]] = [Drop, Share, Replace]


def fate_names() -> tuple[str, ...]:
    """The name of every fate, in the order of the list."""
    return tuple(fate.name for fate in FATES)


def fate_named(name: str) -> type[Fate]:
    """The fate of this name.

    Raises:
        PlanError: the list has none.
    """
    return find_named(FATES, name, "a fate")
