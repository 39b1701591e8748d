"""What counts up is a Prometheus counter by its name, and what was dropped says why."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from membership.core.swim import SwimStatistics
from membership.shell.events import MembershipStatistics
from node.entry.entry import EntryCounters
from node.http.metrics import render
from node.serving.stages import StagesStatistics
from node.weights.pull import PullStatistics
from rag.report import DocumentStatistics

GAUGES = {  # as of now: these go up and down
    "members", "view_version", "frozen", "swim", "rumours", "suspects", "health_score", "lag_s",
    "stores", "documents", "chunks", "files", "damaged_files",
    "speaking", "pieces", "pieces_kept", "bytes_kept", "bytes_all",
}  # fmt: skip


def test_every_figure_is_a_counter_or_known_to_be_none() -> None:
    for kind in (MembershipStatistics, SwimStatistics, DocumentStatistics, EntryCounters, StagesStatistics, PullStatistics):
        names = {field.name for field in dataclasses.fields(kind)}
        assert {name for name in names if not name.endswith("_total")} <= GAUGES, kind


def test_drops_are_one_counter_with_the_reason_as_its_label() -> None:
    swim = SwimStatistics(*([0] * len(dataclasses.fields(SwimStatistics))))
    values: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(MembershipStatistics)} | {"swim": swim, "members": {}}
    values["datagrams_dropped_total"] = MappingProxyType({"wrong key": 3, "too long": 1})
    text = render({"membership": MembershipStatistics(**values)}).decode()
    assert "# TYPE mesh_membership_datagrams_dropped_total counter" in text
    assert 'mesh_membership_datagrams_dropped_total{key="wrong key"} 3.0' in text
    assert "# TYPE mesh_membership_swim_probes_failed_total counter" in text
    assert "# TYPE mesh_membership_view_version gauge" in text
