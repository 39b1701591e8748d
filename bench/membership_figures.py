"""What the runs of `bench.membership` come to, as far as they have been made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from bench.bounds import rate_bound
from bench.membership_runs import PARTS, Run
from membership.simulation.checkers import percentile

Came = Mapping[str, Any]
"""What came of one run."""


def figures(runs: Iterable[Run], came: Mapping[str, Came]) -> dict[str, Any]:
    """Of each part that something is known of. `came`: by the names of the runs."""
    cells: dict[str, dict[str, list[Came]]] = {part: {} for part in PARTS}
    for run in sorted(runs, key=lambda run: (run.seed, run.name)):
        if run.name in came:
            cells[run.part].setdefault(run.cell, []).append(came[run.name])
    return {part: _part(part, cells[part]) for part in PARTS if cells[part]}


def _part(part: str, cells: Mapping[str, list[Came]]) -> dict[str, Any]:
    in_order = sorted(cells.items(), key=lambda cell: (not cell[0].isdigit(), int(cell[0]) if cell[0].isdigit() else cell[0]))
    match part:
        case "partition_heal_s":
            return {cell: _took(came) for cell, came in in_order}
        case "join_100_s":
            (came,) = cells.values()
            return {**_took(came), "within_1_s": sum(each["s"] is not None and each["s"] < 1 for each in came)}
        case "bytes_per_node_s":
            return {cell: round(came[0]["bytes_s"]) for cell, came in in_order}
        case _:
            return {cell: _told(came) for cell, came in in_order}


def _told(came: list[Came]) -> dict[str, Any]:
    deaths = [death for each in came for death in each["deaths"]]
    wronged = sum(each["false_deaths"] for each in came)
    return {
        "first_p50_s": _seconds([death["first_s"] for death in deaths], 0.5),
        "every_node_p50_s": _seconds([death["last_s"] for death in deaths], 0.5),
        "every_node_p99_s": _seconds([death["last_s"] for death in deaths], 0.99),
        "passed_over_p50_s": _seconds([death["passed_over_s"] for death in deaths], 0.5),
        "false_deaths": wronged,
        "false_deaths_a_run_95_bound": round(rate_bound(wronged, len(came)), 4),
        "unheard": sum(each["unheard"] for each in came),
        "runs": len(came),
    }


def _took(came: list[Came]) -> dict[str, Any]:
    """`never`: runs that were given up."""
    took_s = [each["s"] for each in came if each["s"] is not None]
    return {
        "p50": _seconds(took_s, 0.5),
        "max": _seconds(took_s, 1.0),
        "never": len(came) - len(took_s),
        "runs": len(came),
    }


def _seconds(values: list[float], share: float) -> float | None:
    return round(percentile(sorted(values), share), 4) if values else None
