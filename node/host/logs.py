"""Logs: event names with fields, to stderr, for people or as JSON. stdout carries the announcement and nothing else.

What a client said never enters a log. An exception's message may quote it, so of an exception are told its type and the lines of
code it came through; its message only where it is of a kind that speaks of the machine or the program.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

import structlog

from mesh.errors import MeshError

MAX_FRAMES = 16  # the innermost, of each exception in a chain
MAX_CHAIN = 8
# Ours; of the system; of torch and the interpreter, which name shapes, devices and attributes. Not ValueError and LookupError,
# which quote what could not be read, nor the errors of templates, grammars and SQL, which quote where in it.
_SPEAK_OF_NO_CONTENT = (MeshError, OSError, MemoryError, RuntimeError, TypeError, AttributeError, ImportError)


def configure(log_format: str, node: str) -> None:
    """`log_format`: text or json. Every line names the node."""
    last: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(_what_went_wrong),
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(node=node)


def _what_went_wrong(exc_info: tuple[type[BaseException], BaseException, TracebackType | None]) -> str:
    return "\n".join(_told(exc_info[1], MAX_CHAIN))


def _told(error: BaseException, depth: int) -> Iterator[str]:
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None and depth:
        yield from _told(earlier, depth - 1)
        yield "and then:"
    yield "".join(traceback.format_tb(error.__traceback__, -MAX_FRAMES)).rstrip()
    message = f": {error}" if isinstance(error, _SPEAK_OF_NO_CONTENT) else ""
    yield f"{type(error).__module__}.{type(error).__qualname__}{message}"
    if isinstance(error, BaseExceptionGroup) and depth:
        for member in error.exceptions:
            yield "of which:"
            yield from _told(member, depth - 1)
