"""The one place that formats what a person reads: tables, JSON, streamed text, errors.

What nodes and models say is shown without control characters, so that it cannot drive the terminal.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence

from mesh.json_object import JsonObject


def printable(text: str) -> str:
    """`text` without control characters but newline and tab."""
    return "".join(letter for letter in text if letter in "\n\t" or (ord(letter) >= 32 and not 127 <= ord(letter) < 160))


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is none: what is piped is not wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def one_line(text: str) -> str:
    """`text` without control characters, on one line."""
    return printable(text).replace("\n", " ").replace("\t", " ")


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


def as_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str, *, keys: int = 1, wraps: Collection[str] = ()
) -> None:
    """Rows under their columns, as `cli.tables.table_lines`; `empty` is printed where there are none."""
    from rich.console import Console
    from rich.text import Text

    from cli.tables import table_lines

    shown = [[cell if isinstance(cell, int | float) else one_line(str(cell)) for cell in row] for row in rows]
    if not shown:
        note(empty)
        return
    console = Console()
    for each in table_lines(columns, shown, terminal_width(), keys=keys, wraps=wraps):
        console.print(Text(each.text, style="bold" if each.is_head else ""), soft_wrap=True)


def paragraph(text: str, indent: str = "") -> None:
    """Words, wrapped at the width of a terminal; lines but the first begin with `indent`. No word is broken: it may be a URL."""
    from cli.tables import wrapped

    for each in wrapped(one_line(text), terminal_width(), indent):
        line(each)


def spans(held: Iterable[JsonObject]) -> str:
    """`model 0:4, 6:8`, as `--layers` writes them."""
    by_model: dict[str, list[str]] = {}
    for span in held:
        by_model.setdefault(span["model"], []).append(f"{span['start']}:{span['end']}")
    return "; ".join(f"{model} {', '.join(ranges)}" for model, ranges in by_model.items()) or "-"


def citation_list(annotations: Sequence[JsonObject]) -> None:
    """The sources of an answer, numbered as `[n]` in its text."""
    if not annotations:
        note("no citations: the answer names no passage")
        return
    line("Sources:")
    for number, annotation in enumerate(annotations, 1):
        quote = " ".join(str(annotation.get("quote", "")).split())
        quote = quote if len(quote) <= 100 else quote[:99] + "…"
        place = f"{annotation.get('start', '?')}-{annotation.get('end', '?')}"
        paragraph(f"  [{annotation.get('number', number)}] {annotation.get('filename', '?')} ({place}): {quote}", indent="      ")


class Story:
    """What the demo does, step by step, with the time each step took."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._step = 0

    def title(self, text: str) -> None:
        self._print(text, style="bold")

    def step(self, text: str) -> None:
        self._step += 1
        self._print(f"{self._step}. {text}", style="bold cyan")

    def say(self, text: str) -> None:
        self._print(f"   {text}")

    def quote(self, text: str) -> None:
        self._print(f"   “{' '.join(text.split())}”", style="dim")

    def verdict(self, text: str, *, good: bool) -> None:
        self._print(text, style="bold green" if good else "bold red")

    def _print(self, text: str, style: str = "") -> None:
        """Wrapped between words, so that paths and URLs stay whole."""
        from cli.tables import wrapped

        for each in wrapped(one_line(text), terminal_width(), indent="   "):
            self._console.print(each, style=style, markup=False, soft_wrap=True)


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
