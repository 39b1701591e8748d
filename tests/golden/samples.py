"""Makes a fixed sample of any message type: the same type always gives the same value, whatever its name and module."""

from __future__ import annotations

import builtins
import enum
import re
from typing import Any

import msgspec
from msgspec import inspect

FIRST_NUMBER = 3
PATTERNED = ("0123456789abcdef", "5a" * 32)  # an id, a hash


def sample(kind: Any) -> Any:
    """A value of `kind` (a msgspec struct or any annotation that msgspec understands), from its form alone."""
    return _value(inspect.type_info(kind), "value")


def _value(info: inspect.Type, name: str) -> Any:
    match info:
        case inspect.StructType():
            return info.cls(**{field.name: _value(field.type, field.encode_name) for field in info.fields})
        case inspect.NamedTupleType():
            return info.cls(*(_value(field.type, field.encode_name) for field in info.fields))
        case inspect.UnionType():
            return _value(next(each for each in info.types if not isinstance(each, inspect.NoneType)), name)
        case inspect.Metadata():
            return _value(info.type, name)
        case inspect.StrType() if info.pattern is not None:
            return next(each for each in PATTERNED if re.search(info.pattern, each))
        case inspect.StrType():
            return (name * 40)[: _length(info, len(name))]
        case inspect.BytesType() | inspect.ByteArrayType():
            return bytes((number * 7 + len(name)) % 256 for number in range(_length(info, len(name))))
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return max(FIRST_NUMBER, info.ge or 0, (info.gt or -1) + 1)
        case inspect.FloatType():
            return max(0.5, info.ge or 0.0)
        case inspect.EnumType():
            return list(info.cls)[-1]
        case inspect.LiteralType():
            return info.values[0]
        case inspect.TupleType():
            return tuple(_value(each, f"{name}{number}") for number, each in enumerate(info.item_types))
        case inspect.VarTupleType():
            return tuple(_value(info.item_type, f"{name}{number}") for number in range(_length(info, 2)))
        case inspect.ListType():
            return [_value(info.item_type, f"{name}{number}") for number in range(_length(info, 2))]
        case inspect.FrozenSetType():
            return frozenset({_value(info.item_type, f"{name}0")})
        case inspect.DictType():
            return {_value(info.key_type, f"{name}-key"): _value(info.value_type, f"{name}-value")}
        case inspect.AnyType() | inspect.CustomType(cls=builtins.object):
            return {name: [1, "two", None]}
    raise AssertionError(f"no sample for {info!r} of {name}: add its form here")


def _length(info: Any, wanted: int) -> int:
    least, most = info.min_length or 0, info.max_length
    return max(least, wanted if most is None else min(wanted, most))


def structs_of(module: Any) -> list[type[msgspec.Struct]]:
    """The message types that a module defines itself, in their order there."""
    found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    return [each for each in found if each.__module__ == module.__name__ and not issubclass(each, enum.Enum)]
