"""`Facts` as the keys of a replicated map, so that a small change of them is a small delta.

A key is a path: the field's name, then what is told of (a model, a place in the documents' record), with a line feed
between. A field at its default has no key. Keys that this version does not know are kept and passed on, and not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mesh.ids import ModelId
from mesh.view import Facts, Layer, Loading, ModelCard, Readiness, Span

SEPARATOR = "\n"
DOCUMENT_DEPTH = 3  # levels of the documents' record with keys of their own: a shard's digest is one

KeyPath = tuple[str, ...]

_NO_FACTS = Facts()
_PLAIN = ("http", "draining", "version", "pid", "readiness", "twin", "uncompiled")  # fields that are one key each
_WINDOWS = ("spans", "intends")  # fields that are one key a model, told as (start, end) pairs
_BY_MODEL = ("capacity", "loading")  # fields that are one key a model, told as their value

_encoder = msgspec.msgpack.Encoder(order="sorted")  # equal values are equal bytes
_windows_decoder = msgspec.msgpack.Decoder(tuple[tuple[Layer, Layer], ...])
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    "http": msgspec.msgpack.Decoder(str),
    "draining": msgspec.msgpack.Decoder(bool),
    "version": msgspec.msgpack.Decoder(str),
    "pid": msgspec.msgpack.Decoder(Annotated[int, Meta(ge=0)]),
    "twin": msgspec.msgpack.Decoder(Annotated[str, Meta(max_length=256)]),
    "uncompiled": msgspec.msgpack.Decoder(Annotated[str, Meta(max_length=512)]),
    "readiness": msgspec.msgpack.Decoder(Readiness),
    "spans": _windows_decoder,
    "intends": _windows_decoder,
    "capacity": msgspec.msgpack.Decoder(Layer),
    "loading": msgspec.msgpack.Decoder(Loading),
    "models": msgspec.msgpack.Decoder(ModelCard),
    "documents": msgspec.msgpack.Decoder(),
}


def keys_of(facts: Facts) -> dict[str, bytes]:
    """What the owner of these facts writes: every key with its value."""
    told: dict[KeyPath, Any] = {}
    for field in _PLAIN:
        if (value := getattr(facts, field)) != getattr(_NO_FACTS, field):
            told[(field,)] = value
    for field in _WINDOWS:
        for span in getattr(facts, field):
            told.setdefault((field, span.model), []).append((span.start, span.end))
    for card in facts.models:
        told["models", card.id] = card
    for field in _BY_MODEL:
        for model, value in getattr(facts, field).items():
            told[field, model] = value
    for place, value in _leaves((), facts.documents):
        told["documents", *place] = value
    return {SEPARATOR.join(path): _encoder.encode(value) for path, value in told.items()}


class DecodedFacts:
    """The facts that an owner's map shows, kept up key by key."""

    def __init__(self) -> None:
        self.facts = _NO_FACTS
        self._values: dict[str, dict[KeyPath, object]] = {}  # by field

    def update(self, changes: Mapping[str, bytes | None]) -> int:
        """Takes in keys with their new values, None for one that is gone; how many held nothing that can be shown."""
        refused = 0
        touched: set[str] = set()
        for key, raw in changes.items():
            field, *rest = key.split(SEPARATOR)
            if field not in _decoders:
                continue
            path = tuple(rest)
            touched.add(field)
            values = self._values.setdefault(field, {})
            values.pop(path, None)
            if raw is None:
                continue
            try:
                values[path] = _shown(field, path, raw)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                refused += 1
        fields = {field: self._field(field, self._values[field]) for field in touched}
        self.facts = msgspec.structs.replace(self.facts, **fields)
        return refused

    def _field(self, field: str, values: Mapping[KeyPath, Any]) -> object:
        """One field of `Facts` out of the values of its keys."""
        default = getattr(_NO_FACTS, field)
        if field in _PLAIN:
            return values.get((), default)
        if field in _WINDOWS:
            return tuple(Span(ModelId(path[0]), *window) for path in sorted(values) for window in values[path])
        if field == "models":
            return tuple(values[path] for path in sorted(values))
        if field in _BY_MODEL:
            return {ModelId(path[0]): values[path] for path in sorted(values)}
        record: dict[str, object] = {}
        for path in sorted(values):
            _graft(record, path, values[path])
        return record


def _shown(field: str, path: KeyPath, raw: bytes) -> object:
    """A key's value, decoded.

    Raises:
        ValueError: it is not of the field's shape, or the key names no place that the field has.
    """
    value = _decoders[field].decode(raw)
    depth = len(path)
    fits = depth == 0 if field in _PLAIN else 1 <= depth <= DOCUMENT_DEPTH if field == "documents" else depth == 1
    if not fits or (field == "models" and value.id != path[0]):
        raise ValueError(f"no place of {field}: {path!r}")
    return value


def _leaves(place: KeyPath, record: Mapping[str, Any]) -> list[tuple[KeyPath, Any]]:
    """The record cut into parts that get a key each: as deep as keys go, and no further than all names can be part of one."""
    found: list[tuple[KeyPath, object]] = []
    for name, value in record.items():
        here = (*place, name)
        inner = isinstance(value, dict) and len(here) < DOCUMENT_DEPTH and bool(value) and all(map(_is_name, value))
        found += _leaves(here, value) if inner else [(here, value)]
    return found


def _is_name(name: object) -> bool:
    return isinstance(name, str) and SEPARATOR not in name


def _graft(record: dict[str, object], path: KeyPath, value: object) -> None:
    """Puts a part back into its place; where a peer told both a whole and parts of it, the parts count."""
    for name in path[:-1]:
        inner = record.get(name)
        if not isinstance(inner, dict):
            inner = record[name] = {}
        record = inner
    record[path[-1]] = value
