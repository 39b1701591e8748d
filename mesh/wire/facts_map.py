"""`Facts` as the keys of a replicated map, so that a small change of them is a small delta.

A key is a path: the field's name, then a model or a place in the documents' record, joined by line feeds. A field with its
default value has no key. Keys that this version does not know are stored and passed on, but are not part of the decoded facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from mesh.ids import ModelId
from mesh.view import Facts, Layer, Loading, ModelCard, Readiness, Span

SEPARATOR = "\n"
DOCUMENT_DEPTH = 3  # levels of the documents' record that get keys of their own: a shard's digest is at the third

KeyPath = tuple[str, ...]

_NO_FACTS = Facts()
_SINGLE_KEY = ("http", "draining", "version", "pid", "readiness", "twin", "uncompiled")  # fields with one key
_SPANS = ("spans", "intends")  # fields with one key a model; the value is a list of (start, end)
_BY_MODEL = ("capacity", "loading")  # fields with one key a model

_encoder = msgspec.msgpack.Encoder(order="sorted")  # equal values are equal bytes
_decode_spans = msgspec.msgpack.Decoder(tuple[tuple[Layer, Layer], ...]).decode
_decode: dict[str, Callable[[bytes], object]] = {
    "http": msgspec.msgpack.Decoder(str).decode,
    "draining": msgspec.msgpack.Decoder(bool).decode,
    "version": msgspec.msgpack.Decoder(str).decode,
    "pid": msgspec.msgpack.Decoder(Annotated[int, Meta(ge=0)]).decode,
    "twin": msgspec.msgpack.Decoder(Annotated[str, Meta(max_length=256)]).decode,
    "uncompiled": msgspec.msgpack.Decoder(Annotated[str, Meta(max_length=512)]).decode,
    "readiness": msgspec.msgpack.Decoder(Readiness).decode,
    "spans": _decode_spans,
    "intends": _decode_spans,
    "capacity": msgspec.msgpack.Decoder(Layer).decode,
    "loading": msgspec.msgpack.Decoder(Loading).decode,
    "models": msgspec.msgpack.Decoder(ModelCard).decode,
    "documents": msgspec.msgpack.Decoder().decode,
}


def keys_of(facts: Facts) -> dict[str, bytes]:
    """Returns the owner's map of these facts: every key with its encoded value."""
    values: dict[KeyPath, object] = {}
    for field in _SINGLE_KEY:
        if (value := getattr(facts, field)) != getattr(_NO_FACTS, field):
            values[(field,)] = value
    windows: dict[KeyPath, list[tuple[int, int]]] = {}
    for field in _SPANS:
        for span in getattr(facts, field):
            windows.setdefault((field, span.model), []).append((span.start, span.end))
    values |= windows
    for card in facts.models:
        values["models", card.id] = card
    for field in _BY_MODEL:
        for model, value in getattr(facts, field).items():
            values[field, model] = value
    for place, value in _leaves((), facts.documents):
        values["documents", *place] = value
    return {SEPARATOR.join(path): _encoder.encode(value) for path, value in values.items()}


class DecodedFacts:
    """The facts that an owner's map stands for, updated key by key."""

    def __init__(self) -> None:
        self.facts = _NO_FACTS
        self._values: dict[str, dict[KeyPath, object]] = {}  # by field

    def update(self, changes: Mapping[str, bytes | None]) -> int:
        """Applies new values, None for a deleted key. Returns how many keys were refused because they could not be decoded."""
        refused = 0
        touched: set[str] = set()
        for key, raw in changes.items():
            field, *rest = key.split(SEPARATOR)
            if field not in _decode:
                continue
            path = tuple(rest)
            touched.add(field)
            values = self._values.setdefault(field, {})
            values.pop(path, None)
            if raw is None:
                continue
            try:
                values[path] = _decoded(field, path, raw)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                refused += 1
        fields = {field: self._field(field, self._values[field]) for field in touched}
        self.facts = msgspec.structs.replace(self.facts, **fields)
        return refused

    def _field(self, field: str, values: Mapping[KeyPath, object]) -> object:
        """Returns one field of `Facts`, made of the values of its keys."""
        default = getattr(_NO_FACTS, field)
        if field in _SINGLE_KEY:
            return values.get((), default)
        if field in _SPANS:
            return tuple(span for path in sorted(values) for span in _spans(ModelId(path[0]), values[path]))
        if field == "models":
            return tuple(values[path] for path in sorted(values))
        if field in _BY_MODEL:
            return {ModelId(path[0]): values[path] for path in sorted(values)}
        record: dict[str, object] = {}
        for path in sorted(values):
            _graft(record, path, values[path])
        return record


def _decoded(field: str, path: KeyPath, raw: bytes) -> object:
    """Decodes a key's value.

    Raises:
        ValueError: the value is not of the field's type, or the field has no key of this path.
    """
    value = _decode[field](raw)
    depth = len(path)
    fits = depth == 0 if field in _SINGLE_KEY else 1 <= depth <= DOCUMENT_DEPTH if field == "documents" else depth == 1
    if not fits or (isinstance(value, ModelCard) and value.id != path[0]):
        raise ValueError(f"no place of {field}: {path!r}")
    return value


def _spans(model: ModelId, windows: object) -> Iterator[Span]:
    assert isinstance(windows, tuple), "decoded by _decode_spans"
    return (Span(model, start, end) for start, end in windows)


def _leaves(place: KeyPath, record: Mapping[str, object]) -> list[tuple[KeyPath, object]]:
    """Splits the record into parts with a key each.

    A part is split further down to `DOCUMENT_DEPTH`, unless one of its names cannot be part of a key.
    """
    found: list[tuple[KeyPath, object]] = []
    for name, value in record.items():
        here = (*place, name)
        if isinstance(value, dict) and len(here) < DOCUMENT_DEPTH and value and all(map(_is_name, value)):
            found += _leaves(here, value)
        else:
            found.append((here, value))
    return found


def _is_name(name: object) -> bool:
    return isinstance(name, str) and SEPARATOR not in name


def _graft(record: dict[str, object], path: KeyPath, value: object) -> None:
    """Inserts a part at its path. Where a peer published both a whole and parts of it, the parts replace the whole."""
    for name in path[:-1]:
        inner = record.get(name)
        if not isinstance(inner, dict):
            inner = record[name] = {}
        record = inner
    record[path[-1]] = value
