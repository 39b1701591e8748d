"""What a client said never enters a log, not even by way of an exception."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator

import pytest
import structlog

from node.host.logs import MAX_FRAMES, configure

SECRET = "my-account-is-4711"


class Unforeseen(Exception):
    """Of a library that we do not know."""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.contextvars.clear_contextvars()
    structlog.configure(**before)


def fails_with(error: BaseException) -> None:
    said = f"a local variable: {SECRET}"
    assert said
    raise error


def chained() -> None:
    try:
        fails_with(ValueError(SECRET))
    except ValueError as error:
        raise OSError(28, "No space left on device") from error


def in_handling() -> None:
    try:
        fails_with(KeyError(SECRET))
    except KeyError:
        fails_with(ValueError(SECRET))


def grouped() -> None:
    raise ExceptionGroup(SECRET, [ValueError(SECRET), ExceptionGroup(SECRET, [KeyError(SECRET)])])


def logged(what: Callable[[], None], log_format: str, capsys: pytest.CaptureFixture[str]) -> str:
    configure(log_format, "n")
    try:
        what()
    except (LookupError, ValueError, OSError, RuntimeError, sqlite3.Error, ExceptionGroup, Unforeseen):
        structlog.get_logger().exception("step failed", rows=3)
    return capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    "error",
    [
        ValueError(f"invalid literal for int(): {SECRET!r}"),
        KeyError(SECRET),
        sqlite3.OperationalError(f'fts5: syntax error near "{SECRET}"'),
        UnicodeEncodeError("utf-8", SECRET, 0, 1, SECRET),
        Unforeseen(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_is_told_by_its_type_and_place_and_not_by_its_message(
    error: Exception, log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = logged(lambda: fails_with(error), log_format, capsys)
    assert SECRET not in told
    assert type(error).__name__ in told and "in fails_with" in told and "step failed" in told


@pytest.mark.parametrize("what", [chained, in_handling, grouped])
def test_nor_by_the_messages_of_those_before_it_or_within_it(
    what: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    told = logged(what, "text", capsys)
    assert SECRET not in told
    assert "builtins.ValueError\n" in told + "\n"
    assert ("of which:" if what is grouped else "and then:") in told


def test_what_the_machine_says_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No space left on device" in logged(chained, "text", capsys)
    out_of_memory = RuntimeError("tried to allocate 2 GiB")
    assert "tried to allocate 2 GiB" in logged(lambda: fails_with(out_of_memory), "text", capsys)


def test_an_exception_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    line = json.loads(logged(chained, "json", capsys))
    assert line["event"] == "step failed" and line["rows"] == 3 and line["node"] == "n"
    assert "and then:" in line["exception"]


def test_a_deep_recursion_is_told_by_its_innermost_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def endless() -> None:
        endless()

    told = logged(endless, "text", capsys)
    assert "RecursionError" in told and told.count("in endless") <= MAX_FRAMES
