"""`/metrics`: the statistics of every part as Prometheus text. A pure function of them.

Names follow from the statistics: part `engine`, field `steps_total` is `mesh_engine_steps_total`. A field
that ends in `_total` is a counter, any other number a gauge, a mapping of numbers one with the label `key`;
what is no number is left out. A `Load` gives vLLM's names too, where they mean the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.view import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Number = int | float


class _Families(Collector):
    """A registry needs an object with `collect`; this one holds all metrics already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def render(statistics: Mapping[str, object]) -> bytes:
    """The statistics by part as the exposition text."""
    families: dict[str, Metric] = {}
    for part, value in sorted(statistics.items()):
        for name, samples in figures(f"mesh_{part}", value):
            families.setdefault(name, _family(name, samples))
    load = _own_load(statistics)
    if load is not None:
        families["vllm:num_requests_running"] = _family("vllm:num_requests_running", {"": load.running})
        families["vllm:num_requests_waiting"] = _family("vllm:num_requests_waiting", {"": load.waiting})
    registry = CollectorRegistry()
    registry.register(_Families(list(families.values())))
    return generate_latest(registry)


def figures(name: str, value: object) -> Iterator[tuple[str, dict[str, Number]]]:
    """Metric names and their samples by label; a single figure has the label ''."""
    fields = _fields(value)
    if isinstance(value, (bool, int, float)):
        yield _clean(name), {"": value}
    elif fields is not None:
        for field, inner in fields.items():
            yield from figures(f"{name}_{field}", inner)
    elif isinstance(value, Mapping):
        numbers = {str(key): inner for key, inner in value.items() if isinstance(inner, (bool, int, float))}
        if numbers:
            yield _clean(name), numbers
        for key, inner in value.items():
            if _fields(inner) is not None:
                yield from figures(f"{name}_{key}", inner)


def _fields(value: object) -> dict[str, object] | None:
    """The fields of a dataclass or a struct, unconverted; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, msgspec.Struct):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    return None


def _family(name: str, samples: Mapping[str, Number]) -> Metric:
    labels = [] if "" in samples else ["key"]
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, name.removeprefix("mesh_").replace("_", " "), labels=labels)
    for label, value in samples.items():
        family.add_metric([label] if labels else [], float(value))
    return family


def _own_load(statistics: Mapping[str, object]) -> Load | None:
    """The node's own load: the part of that name, else the first field of a part that is one."""
    parts = [statistics.get("load"), *statistics.values()]
    inner = [field for part in parts for field in (_fields(part) or {}).values()]
    return next((value for value in [*parts, *inner] if isinstance(value, Load)), None)


def _clean(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_:]", "_", name)
