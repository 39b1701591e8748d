"""Tool calls in a model's answer, found as the text comes: a pure function of (style, tools, text). No I/O.

Models write calls into their text, each family in its own way (`node.text.tool_styles`). What a reader gets so far is determined
by the text so far, however it was cut into pieces, so that a stream taken up elsewhere goes on exactly. So text is held back only
while it may still be the beginning of a call; a call is announced with its name, and then its arguments go out as they come.
What turns out to be no call, or calls a function that was not offered, is text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from node.text.tool_styles import ToolStyle

MAX_HELD_SPACES = 64  # ahead of a call they are dropped; more than that is text
SPACES = " \t\r\n"
ARGUMENT_KEYS = ("arguments", "parameters")
KNOWN_KEYS = ("name", "type", "id", *ARGUMENT_KEYS)


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of call `index`'s arguments, as JSON text."""

    index: int
    text: str


ToolEvent = PlainText | CallStarted | CallArguments


def call_id(stream: str, choice: int, index: int, digits: int = 24) -> str:
    """The same on every node that serves the stream. Nine letters and digits alone is a form that Mistral's templates want."""
    digest = hashlib.blake2b(f"{stream}\0{choice}\0{index}".encode(), digest_size=12).hexdigest()
    return digest[:digits] if digits < 24 else "call_" + digest


class ScanState(Enum):
    """Where in `{"name": …, "arguments": …}` we are."""

    START = "start"
    KEY_OR_END = "key or end"
    KEY = "key"
    COLON = "colon"
    VALUE_START = "value start"
    VALUE = "value"
    COMMA_OR_END = "comma or end"
    DONE = "done"
    FAILED = "failed"


class CallScanner:
    """One call's JSON object, character by character. It checks how the object is put together, not what is in the arguments."""

    def __init__(self, names: frozenset[str], *, only_known_keys: bool) -> None:
        self.state = ScanState.START
        self.name: str | None = None
        self.fresh_arguments = ""  # those that came since the reader last took them
        self._names = names
        self._only_known_keys = only_known_keys
        self._key = ""
        self._text = ""  # of the key or value being read
        self._has_arguments = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def ended(self) -> bool:
        return self.state in (ScanState.DONE, ScanState.FAILED)

    def take(self, char: str) -> None:
        match self.state:
            case ScanState.KEY:
                self._key_char(char)
            case ScanState.VALUE:
                self._value_char(char)
            case ScanState.DONE | ScanState.FAILED:
                pass
            case _ if char in SPACES:
                pass
            case ScanState.START:
                self.state = ScanState.KEY_OR_END if char == "{" else ScanState.FAILED
            case ScanState.KEY_OR_END if char == '"':
                self.state, self._text, self._escaped = ScanState.KEY, '"', False
            case ScanState.COLON if char == ":":
                self.state = ScanState.VALUE_START
            case ScanState.VALUE_START:
                self._begin_value(char)
            case ScanState.COMMA_OR_END if char == ",":
                self.state = ScanState.KEY_OR_END
            case ScanState.COMMA_OR_END if char == "}":
                self._finish()
            case _:
                self.state = ScanState.FAILED

    def _key_char(self, char: str) -> None:
        self._text += char
        if char == '"' and not self._escaped:
            self._key = _decoded(self._text) or ""
            fits = self._key in KNOWN_KEYS or not self._only_known_keys
            self.state = ScanState.COLON if fits else ScanState.FAILED
        self._escaped = char == "\\" and not self._escaped

    @property
    def _streaming(self) -> bool:
        """Whether this value goes out as it comes: the arguments as an object, not as a text that holds one."""
        return self._key in ARGUMENT_KEYS and self._text.startswith("{")

    def _begin_value(self, char: str) -> None:
        self.state, self._text = ScanState.VALUE, ""
        self._depth, self._in_string, self._escaped = 0, False, False
        if self._key in ARGUMENT_KEYS and (self._has_arguments or char not in '{"n'):
            self.state = ScanState.FAILED
            return
        self._value_char(char)

    def _value_char(self, char: str) -> None:
        if not self._in_string and self._depth == 0 and self._text and char in ",}" + SPACES:  # the end of a number or a word
            self._end_value()
            if self.state is not ScanState.FAILED:
                self.take(char)
            return
        self._text = self._text + char if not self._streaming else self._text
        if self._streaming:
            self.fresh_arguments += char
        if self._in_string:
            if char == '"' and not self._escaped:
                self._in_string = False
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string, self._escaped = True, False
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if not self._in_string and self._depth == 0 and char in '"}]':
            self._end_value()

    def _end_value(self) -> None:
        self.state = ScanState.COMMA_OR_END
        if self._key == "name" and self.name is None:
            self.name = _decoded(self._text)
            if self.name not in self._names:
                self.name, self.state = None, ScanState.FAILED
        elif self._key in ARGUMENT_KEYS:
            self._has_arguments = True
            if not self._streaming:
                text = "{}" if self._text == "null" else _decoded(self._text)
                if text is None:
                    self.state = ScanState.FAILED
                else:
                    self.fresh_arguments += text

    def _finish(self) -> None:
        self.state = ScanState.DONE if self.name is not None else ScanState.FAILED
        if not self._has_arguments:
            self.fresh_arguments += "{}"


def _decoded(text: str) -> str | None:
    """The text that a JSON string stands for; None where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class ScanPosition(Enum):
    TEXT = "text"
    CALL = "call"
    BETWEEN = "between"  # behind a call: its closing marker, or in a list a comma or the end


class ToolCallParser:
    """One choice's answer."""

    def __init__(self, style: ToolStyle, names: frozenset[str], id_of: Callable[[int], str], *, most: int) -> None:
        """`names`: of the functions offered; `most`: calls that go out, further ones are dropped."""
        self._style = style
        self._names = names
        self._id_of = id_of
        self._most = most
        self._place = ScanPosition.TEXT
        self._held = ""  # spaces, then what may be the beginning of the opening or closing marker
        self._raw = ""  # of the call under way, with its marker, as long as it may turn out to be text
        self._scanner = self._new_scanner()
        self._announced = False
        self._calls = 0
        self._bare_over = False  # without a marker, calls can stand at the beginning alone
        self._dropping_spaces = False

    @property
    def calls(self) -> int:
        """Calls announced so far."""
        return min(self._calls, self._most)

    def feed(self, text: str) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        for char in text:
            for event in self._take(char):
                _append(events, event)
        return events

    def finish(self) -> list[ToolEvent]:
        """The text is over: what was held back goes out, unless it is the rest of a call."""
        events: list[ToolEvent] = []
        if self._place is ScanPosition.CALL and not self._announced:
            events = list(self._say(self._raw))
        elif self._place is ScanPosition.TEXT and not (self._calls and not self._held.strip(SPACES)):
            events = list(self._say(self._held))
        self._held = self._raw = ""
        self._place = ScanPosition.TEXT
        return events

    def _take(self, char: str) -> Iterator[ToolEvent]:
        match self._place:
            case ScanPosition.CALL:
                yield from self._in_call(char)
            case ScanPosition.BETWEEN:
                yield from self._between(char)
            case ScanPosition.TEXT if self._style.opening:
                yield from self._in_text(char)
            case ScanPosition.TEXT:
                yield from self._in_bare_text(char)

    def _in_text(self, char: str) -> Iterator[ToolEvent]:
        self._held += char
        marker = self._held.lstrip(SPACES)
        if marker == self._style.opening:
            self._begin_call(self._held)
            return
        start = 0
        while not self._style.opening.startswith(self._held[start:].lstrip(SPACES)) or len(self._held) - start > (
            MAX_HELD_SPACES + len(self._style.opening)
        ):
            start += 1
        out, self._held = self._held[:start], self._held[start:]
        yield from self._say(out)

    def _in_bare_text(self, char: str) -> Iterator[ToolEvent]:
        """Calls without a marker: the answer begins with one, and others follow at once."""
        if self._bare_over:
            yield from self._say(char)
            return
        self._held += char
        if char == "{":
            self._begin_call(self._held[:-1])
            yield from self._in_call(char)
        elif char not in SPACES + (self._style.between if self._calls else "") or len(self._held) > MAX_HELD_SPACES:
            self._bare_over = True
            out, self._held = self._held, ""
            yield from self._say(out)

    def _begin_call(self, raw: str) -> None:
        self._place, self._raw, self._held = ScanPosition.CALL, raw, ""
        self._scanner, self._announced = self._new_scanner(), False

    def _in_call(self, char: str) -> Iterator[ToolEvent]:
        if self._style.listed and self._scanner.state is ScanState.START and char == "[" and "[{" not in self._raw:
            self._raw += char  # the list's bracket, behind the marker
            return
        self._scanner.take(char)
        if not self._announced:
            self._raw += char
            if self._scanner.name is not None:
                yield from self._announce()
        if self._announced:
            yield from self._more_arguments()
        if self._scanner.state is ScanState.DONE:
            self._place, self._raw = (ScanPosition.BETWEEN if self._style.closing else ScanPosition.TEXT), ""
            self._dropping_spaces = True
        elif self._scanner.state is ScanState.FAILED:
            raw, self._raw, self._place, self._bare_over = self._raw, "", ScanPosition.TEXT, True
            if not self._announced:
                yield from self._say(raw)

    def _announce(self) -> Iterator[ToolEvent]:
        assert self._scanner.name is not None
        self._announced = True
        self._calls += 1
        if self._calls <= self._most:
            yield CallStarted(self._calls - 1, self._id_of(self._calls - 1), self._scanner.name)

    def _more_arguments(self) -> Iterator[ToolEvent]:
        text, self._scanner.fresh_arguments = self._scanner.fresh_arguments, ""
        if text and self._calls <= self._most:
            yield CallArguments(self._calls - 1, text)

    def _between(self, char: str) -> Iterator[ToolEvent]:
        """Behind a call: its closing marker ends it; in a list a comma begins another."""
        self._held += char
        marker = self._held.lstrip(SPACES)
        if marker == self._style.closing:
            self._place, self._held = ScanPosition.TEXT, ""
        elif self._style.listed and marker == ",":
            self._begin_call(self._held)
        elif not self._style.closing.startswith(marker) or len(self._held) > MAX_HELD_SPACES:
            held, self._held, self._place = self._held, "", ScanPosition.TEXT
            for again in held:
                yield from self._take(again)

    def _say(self, text: str) -> Iterator[ToolEvent]:
        if self._dropping_spaces:
            text = text.lstrip(SPACES)
        if text:
            self._dropping_spaces = False
            yield PlainText(text)

    def _new_scanner(self) -> CallScanner:
        return CallScanner(self._names, only_known_keys=not self._style.opening)


def _append(events: list[ToolEvent], event: ToolEvent) -> None:
    """Adds an event, joined with the last one where it goes on with the same."""
    last = events[-1] if events else None
    if isinstance(last, PlainText) and isinstance(event, PlainText):
        events[-1] = PlainText(last.text + event.text)
    elif isinstance(last, CallArguments) and isinstance(event, CallArguments) and last.index == event.index:
        events[-1] = replace(last, text=last.text + event.text)
    else:
        events.append(event)
