"""Lays rows out under their columns in a given width, and never breaks an id, a URL or a name. Pure.

What a person copies must stay in one piece: only the columns that are declared to hold words wrap, and only between words.
Rows that are too wide for one table are printed in several, each with the key columns again; if that does not fit, row by row.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len

GAP = "  "
WRAPPED_LEAST = 16  # characters that a column of words keeps, where it has so many


@dataclass(frozen=True, slots=True)
class TableLine:
    text: str
    is_head: bool = False


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cells: tuple[str, ...]
    is_number: bool
    wraps: bool

    @property
    def natural(self) -> int:
        return max(cell_len(text) for text in (self.head, *self.cells))

    @property
    def least(self) -> int:
        """The width below which an id would break, or words would have no room."""
        if not self.wraps:
            return self.natural
        words = [word for text in (self.head, *self.cells) for word in text.split()]
        return max(min(self.natural, WRAPPED_LEAST), *map(cell_len, words))


def table_lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    width: int | None,
    *,
    keys: int = 1,
    wraps: Collection[str] = (),
) -> list[TableLine]:
    """The lines of a table, at most `width` cells wide as far as unbroken cells allow; None: as wide as they are.

    keys: columns, the first ones, that say which row it is; wraps: columns that hold words. Numbers stand on the right.
    """
    made = [_column(rows, index, head, head in wraps) for index, head in enumerate(columns)]
    if width is None or _width([column.natural for column in made]) <= width:
        return _one_table(made, [column.natural for column in made])
    groups = _groups(made, width, keys)
    if groups is None:
        return _row_by_row(made)
    lines: list[TableLine] = []
    for group in groups:
        lines += [*([TableLine("")] if lines else []), *_one_table(group, _widths(group, width))]
    return lines


def wrapped(text: str, width: int | None, indent: str = "") -> list[str]:
    """`text` in lines of at most `width` characters, broken between words alone; all but the first begin with `indent`."""
    if width is None:
        return [text]
    lines = textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return lines or [""]


def _column(rows: Sequence[Sequence[object]], index: int, head: str, wraps: bool) -> _Column:
    cells = [row[index] for row in rows]
    return _Column(head, tuple(map(str, cells)), all(isinstance(cell, int | float) for cell in cells), wraps)


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _groups(columns: Sequence[_Column], width: int, keys: int) -> list[list[_Column]] | None:
    """The columns in as few tables as fit, each with the keys in front; None: one does not fit beside them."""
    head = list(columns[:keys])
    groups: list[list[_Column]] = [list(head)]
    for column in columns[keys:]:
        if _width([each.least for each in (*groups[-1], column)]) > width and len(groups[-1]) > keys:
            groups.append(list(head))
        groups[-1].append(column)
    fits = all(_width([column.least for column in group]) <= width for group in groups)
    return groups if fits else None


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """Of columns that fit at their least: what is left over goes to those that wrap, in order."""
    widths = [column.least for column in columns]
    left = width - _width(widths)
    for place, column in enumerate(columns):
        more = min(left, column.natural - widths[place])
        widths[place] += more
        left -= more
    return widths


def _one_table(columns: Sequence[_Column], widths: Sequence[int]) -> list[TableLine]:
    lines = [TableLine(_joined([column.head for column in columns], columns, widths), is_head=True)]
    for cells in zip(*(column.cells for column in columns)):
        parts = [wrapped(cell, size) if column.wraps else [cell] for cell, column, size in zip(cells, columns, widths)]
        lines += [TableLine(_joined(row, columns, widths)) for row in zip_longest(*parts, fillvalue="")]
    return lines


def _joined(cells: Sequence[str], columns: Sequence[_Column], widths: Sequence[int]) -> str:
    shown = []
    for cell, column, width in zip(cells, columns, widths):
        blank = " " * (width - cell_len(cell))
        shown.append(blank + cell if column.is_number else cell + blank)
    return GAP.join(shown).rstrip()


def _row_by_row(columns: Sequence[_Column]) -> list[TableLine]:
    """Each row as lines of its own: the first cell, then `COLUMN  cell` for the others, unbroken however long."""
    name, *others = columns
    label = max((cell_len(column.head) for column in others), default=0)
    lines: list[TableLine] = []
    for row, first in enumerate(name.cells):
        lines.append(TableLine(first, is_head=True))
        lines += [TableLine(f"{GAP}{column.head:<{label}}{GAP}{column.cells[row]}") for column in others]
    return lines
