"""The one place that formats what a person reads: tables, JSON, streamed text, errors.

What nodes and models say is shown without control characters, so that it cannot drive the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def printable(text: str) -> str:
    """`text` without control characters but newline and tab."""
    return "".join(letter for letter in text if letter in "\n\t" or (ord(letter) >= 32 and not 127 <= ord(letter) < 160))


def error(message: str) -> None:
    """One line on stderr."""
    print("mesh: " + " ".join(printable(message).split()), file=sys.stderr)


def note(message: str) -> None:
    """A remark that is not part of the result: on stderr."""
    print(printable(message), file=sys.stderr, flush=True)


def line(text: str = "") -> None:
    print(printable(text), flush=True)


def piece(text: str) -> None:
    """Part of a streamed answer, shown at once."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Rows under their columns; `empty` is said where there are none. Numbers stand on the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [list(row) for row in rows]
    if not shown:
        note(empty)
        return
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float) for row in shown)
        grid.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in shown:
        grid.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=400)  # a pipe has no width: nothing is wrapped or cut
    console.print(grid)


def spans(held: Iterable[Mapping[str, Any]]) -> str:
    """`model 0:4, 6:8`, as `--layers` writes them."""
    by_model: dict[str, list[str]] = {}
    for span in held:
        by_model.setdefault(span["model"], []).append(f"{span['start']}:{span['end']}")
    return "; ".join(f"{model} {', '.join(ranges)}" for model, ranges in by_model.items()) or "-"


def citation_list(annotations: Sequence[Mapping[str, Any]]) -> None:
    """The sources of an answer, numbered as `[n]` in its text."""
    if not annotations:
        note("no citations: the answer names no passage")
        return
    line("Sources:")
    for number, annotation in enumerate(annotations, 1):
        quote = " ".join(str(annotation.get("quote", "")).split())
        quote = quote if len(quote) <= 100 else quote[:99] + "…"
        place = f"{annotation.get('start', '?')}-{annotation.get('end', '?')}"
        line(f"  [{annotation.get('number', number)}] {annotation.get('filename', '?')} ({place}): {quote}")


class Story:
    """What the demo does, step by step, with the time each step took."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._step = 0

    def title(self, text: str) -> None:
        self._console.print(text, style="bold", markup=False)

    def step(self, text: str) -> None:
        self._step += 1
        self._console.print(f"{self._step}. {printable(text)}", style="bold cyan", markup=False)

    def say(self, text: str) -> None:
        self._console.print(f"   {printable(text)}", markup=False)

    def quote(self, text: str) -> None:
        self._console.print(f"   “{' '.join(printable(text).split())}”", style="dim", markup=False)

    def verdict(self, text: str, *, good: bool) -> None:
        self._console.print(printable(text), style="bold green" if good else "bold red", markup=False)


class Bar:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, total: int, unit: str, *, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)
        self._task = self._progress.add_task(unit, total=total)

    def advance(self, name: str) -> None:
        self._progress.update(self._task, advance=1, description=printable(name))

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
