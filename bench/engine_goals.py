"""What is asked of the engine's figures, put beside them, and which of them miss it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

AT_MOST = {
    "invariance_overhead",
    "short",
    "long",
    "prefix_hit_ttft_ratio",
    "peak_load_ratio",
    "context_step_ratio",
}  # of others: at least
OF_ROWS: dict[int, dict[str, float]] = {
    1: {"vs_hf": 2.0, "vs_generate_batch": 4.0, "vs_llamacpp": 1.0, "bandwidth_fraction": 0.65},
    8: {"vs_hf": 1.4, "vs_generate_batch": 4.0, "vs_llamacpp": 1.0},
    32: {"vs_hf": 1.25, "vs_generate_batch": 4.0, "vs_llamacpp": 1.0},
}
OF_PRODUCTS = {"vs_best": 1.0, "mesh-int8 vs mesh-bf16": 1.0, "mesh-int4 vs mesh-bf16": 1.0}  # for each layer and row count
OF_QUANTISED = {"int8_vs_stored": 1.0, "int4_vs_stored": 1.0}  # for each batch
BY_EITHER_CLOCK = {"vs_hf", "vs_llamacpp"}  # measured in wall and in CPU time; the report says by which they are judged
ASKED: dict[str, Any] = {
    "invariance_overhead": {"short": 0.15, "long": 0.03},
    "split2_ratio": 0.9,
    "prefix_hit_ttft_ratio": 0.1,
    "spec_speedup_copy_task": 1.8,
    "peak_load_ratio": 1.3,
    "prefill_vs_hf": 1.1,
    "context_step_ratio": 3.0,
    "exact": True,
}


OF_PARTS = {"products": OF_PRODUCTS, "quantised": OF_QUANTISED}


def judged(report: dict[str, Any]) -> dict[str, Any]:
    """The report with what is `asked` beside its figures, all that `missed` it, and what was `not_measured`."""
    rows = [{**row, "asked": OF_ROWS.get(row["batch"], {})} for row in report.get("rows", [])]
    suffix = "_cpu_time" if report.get("judged_by") == "cpu_time" else ""
    found = [*_of_rows(rows, suffix), *_of_report(report), *_of_products(report), *_of_quantised(report)]
    return {
        **report,
        **({"rows": rows} if rows else {}),
        "asked": {name: asked for name, asked in {**ASKED, **OF_PARTS}.items() if name in report},
        "missed": [f"{name}: {figure}, asked {asked}" for name, figure, asked, key in found if _misses(key, figure, asked)],
        "not_measured": [name for name in ("rows", *OF_PARTS, *ASKED) if name not in report]
        + [name for name, figure, _, _ in found if figure is None],
    }


Compared = tuple[str, Any, Any, str]
"""A figure's name in words, the figure, what is asked of it, and its key."""


def _of_rows(rows: list[dict[str, Any]], suffix: str) -> Iterator[Compared]:
    for row in rows:
        for key, asked in row["asked"].items():
            judged_key = key + suffix if key in BY_EITHER_CLOCK else key
            yield f"{judged_key} at batch {row['batch']}", row.get(judged_key), asked, key


def _of_report(report: dict[str, Any]) -> Iterator[Compared]:
    for key, asked in ASKED.items():
        if key not in report:
            continue
        if isinstance(asked, dict):
            for part, each in asked.items():
                yield f"{key} {part}", report[key].get(part), each, part
        else:
            yield key, report[key], asked, key
    for part in (report.get("split"), report.get("prefix"), *report.get("speculation", {}).values()):
        if isinstance(part, dict) and "exact" in part:
            yield "answers of a part of the bench equal", part["exact"], True, "exact"


def _of_products(report: dict[str, Any]) -> Iterator[Compared]:
    for shape, figures in report.get("products", {}).get("shapes", {}).items():
        for key, asked in OF_PRODUCTS.items():
            for where, ratio in figures.get(key, {}).items():
                yield f"products of {shape}, {key}, {where}", ratio, asked, key


def _of_quantised(report: dict[str, Any]) -> Iterator[Compared]:
    for row in report.get("quantised", {}).get("rows", []):
        for key, asked in OF_QUANTISED.items():
            yield f"{key} at batch {row['batch']}", row.get(key), asked, key


def _misses(key: str, figure: Any, asked: Any) -> bool:
    if figure is None:
        return False
    return bool(figure > asked) if key in AT_MOST else bool(figure < asked)
