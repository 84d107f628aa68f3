"""A table whose cells are never cut, laid out in one pass over its cells.

A rich Table measures and renders every cell several times over, which takes seconds for some thousand rows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

GAP = 2  # characters between columns


@dataclass(frozen=True, slots=True)
class Column:
    """A head and the cells below it; both may have several lines. right: figures, aligned at their last digit."""

    head: Text
    cells: tuple[Text, ...]
    right: bool = False

    @property
    def width(self) -> int:
        """Characters of its widest line."""
        return max((line.cell_len for text in (self.head, *self.cells) for line in _lines(text)), default=0)

    def folded(self, size: int) -> Column:
        """The same on lines of at most `size` characters, cut anywhere."""
        return Column(_fold(self.head, size), tuple(_fold(cell, size) for cell in self.cells), self.right)

    def wrapped(self, size: int) -> Column:
        """The same on lines of at most `size` characters, cut between words; a longer word is cut."""
        return Column(_wrap(self.head, size), tuple(_wrap(cell, size) for cell in self.cells), self.right)


@dataclass(frozen=True, slots=True)
class Grid:
    """Columns side by side. first_is_dim: the first row is what the others are compared with."""

    columns: tuple[Column, ...]
    first_is_dim: bool = True

    @property
    def width(self) -> int:
        """Characters of a line that shows all of it."""
        return sum(column.width for column in self.columns) + GAP * (len(self.columns) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [column.width for column in self.columns]
        heads = [column.head for column in self.columns]
        lines = max(len(_lines(head)) for head in heads)
        low = [
            Text("\n" * (lines - len(_lines(head)))) + head for head in heads
        ]  # heads stand on their columns
        yield from self._row(low, widths, "bold")
        for number, cells in enumerate(zip(*(column.cells for column in self.columns), strict=True)):
            yield from self._row(cells, widths, "" if number or not self.first_is_dim else "dim")

    def _row(self, cells: Sequence[Text], widths: Sequence[int], style: str) -> Iterator[Text]:
        split = [_lines(cell) for cell in cells]
        for index in range(max(map(len, split))):
            line = Text(style=style, no_wrap=True, overflow="ignore")
            blank = 0
            for column, lines, width in zip(self.columns, split, widths, strict=True):
                cell = lines[index] if index < len(lines) else Text()
                missing = width - cell.cell_len
                line.append(" " * (blank + (missing if column.right else 0)))
                line.append_text(cell)
                blank = GAP + (0 if column.right else missing)
            yield line


def _lines(text: Text) -> Sequence[Text]:
    return list(text.split("\n", allow_blank=True)) if "\n" in text.plain else [text]


def _fold(text: Text, size: int) -> Text:
    return Text("\n").join(text.divide(range(size, len(text), size)))


def _wrap(text: Text, size: int) -> Text:
    """Without its styles."""
    return Text("\n".join(textwrap.wrap(text.plain, size))) if len(text) > size else text


def fold_size(length: int, room: int, step: int) -> int:
    """Characters a line that a text of `length` is folded to so that its lines are equally long and fit the room.

    A multiple of `step`, also where that does not fit.
    """
    most = max(1, room // step)
    lines = ceil(length / (step * most))
    return step * ceil(length / (step * lines))
