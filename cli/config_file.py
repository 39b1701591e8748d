"""Reads `mesh.toml`: options and their values, in the shapes that people write. Mistakes are reported with key and line.

A value may stand as TOML's own kind or as a text of the same value (`drain-s = "30"`), and one text where a list is meant is a
list of one. Anything else is refused here, before an option is taken for something that it is not.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from mesh.errors import BadRequest
from mesh.files import text_of

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NUMBERS = {"int": int, "float": float}


@dataclass(frozen=True, slots=True)
class Config:
    """What the file sets, by the option's name with underscores."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)

    def named(self, error: BadRequest, ctx: typer.Context) -> BadRequest:
        """The error, with the place in the file where the value that caused it stands; itself, where that came another way."""
        name = _plain(error.param or "")
        source = ctx.get_parameter_source(name)
        if name not in self.lines or source is None or source.name != "DEFAULT_MAP":
            return error
        return BadRequest(f"{self.path}, line {self.lines[name]}: {error}", error.param, error.code, error.status)


def read(path: Path, options: Mapping[str, object]) -> Config:
    """`options`: those of the command, by name.

    Raises:
        typer.BadParameter: not readable, not TOML, a name that is no option, or a value of another shape.
    """
    try:
        text = text_of(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise typer.BadParameter(f"expected a TOML file, got {str(path)!r}: {reason}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise typer.BadParameter(f"{path}, {_place(text, str(error))}") from None
    values: dict[str, object] = {}
    lines: dict[str, int] = {}
    for key, value in table.items():
        name, line = _plain(key), _line_of(text, key)
        where = f"{path}, line {line}, {key}"
        if name not in options:
            raise typer.BadParameter(_unknown(where, key, value, options))
        if name in values:
            raise typer.BadParameter(f"{where}: it stands there twice, as {key} and on line {lines[name]}")
        values[name], lines[name] = _shaped(where, options[name], value), line
    return Config(path, values, lines)


def _plain(key: str) -> str:
    return key.lstrip("-").replace("-", "_")


def _place(text: str, reason: str) -> str:
    """Where TOML breaks off, with the key of that line, and why: `reason` reads "why (at line 3, column 9)"."""
    lines = text.splitlines() or [""]
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", reason, re.DOTALL)
    why, line = (found[1], int(found[2] or len(lines))) if found else (reason, len(lines))
    key = re.match(r"\s*([\w-]+)\s*=", lines[min(line, len(lines)) - 1])
    return f'line {line}{", " + key[1] if key else ""}: expected TOML, such as name = "one": {why}'


def _line_of(text: str, key: str) -> int:
    """Where a key of the top level, or a table of that name, begins."""
    name = rf"(?:{re.escape(key)}|\"{re.escape(key)}\"|'{re.escape(key)}')"
    begins = re.compile(rf"\s*(?:{name}\s*[.=]|\[+\s*{name}\s*[.\]])")
    return next((number for number, line in enumerate(text.splitlines(), 1) if begins.match(line)), 1)


def _unknown(where: str, key: str, value: object, options: Mapping[str, object]) -> str:
    if isinstance(value, dict | list) and (isinstance(value, dict) or any(isinstance(each, dict) for each in value)):
        return f"{where}: expected the options at the top level, got the table [{key}]; write its lines without it"
    known = sorted(name.replace("_", "-") for name in options)
    near = get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
    return f"{where}: there is no such option{hint}"


def _shaped(where: str, option: Any, value: object) -> object:
    """The value as the option takes it. Raises typer.BadParameter."""
    if option.multiple:
        listed = value if isinstance(value, list) else [value]
        return [_text(where, each, "a text, or a list of texts") for each in listed]
    if option.is_flag:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in BOOLEANS:
            return BOOLEANS[value.strip().lower()]
        raise _other(where, "true or false", value)
    if kind := NUMBERS.get(option.bare_type()):
        return _number(where, kind, value)
    return _text(where, value, "a text")


def _number(where: str, kind: type[int] | type[float], value: object) -> int | float:
    whole = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (kind is int and isinstance(value, float)):
        raise _other(where, whole, value)
    try:
        return kind(value)
    except ValueError:
        raise _other(where, whole, value) from None


def _text(where: str, value: object, expected: str) -> str:
    """Numbers stand for the text that they are written as: a size, a name."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _other(where, expected, value)


def _other(where: str, expected: str, value: object) -> typer.BadParameter:
    kinds = {bool: "true or false", list: "a list", dict: "a table", int: "a whole number", float: "a number", str: "a text"}
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:60] + "…"
    return typer.BadParameter(f"{where}: expected {expected}, got {kinds.get(type(value), type(value).__name__)}: {shown}")
