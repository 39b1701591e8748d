"""Two sets of weights under one id: what status, doctor, readiness and the log report of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from msgspec import to_builtins
from structlog.testing import capture_logs

from mesh.ids import ModelId, NodeId
from mesh.view import Facts, Load, ModelCard, Peer, PeerState, Readiness, Span, View
from node.entry.canary import Canary
from node.http.surface import model_object
from node.ops.doctor import NOTE, PROBLEM, Observations, diagnosis
from node.ops.status import status
from node.reports import Finding
from node.serving.models import ServedModel, ServedModels
from node.serving.peer_models import PeerModels
from node.serving.readiness_monitor import readiness_of
from node.serving.version_watch import VersionWatch

A, B = "a" * 64, "b" * 64
TINY = ModelId("tiny")


def peer(name: str, weights: str, end: int = 4, numerics: str = "n", **changes: Any) -> Peer:
    card = ModelCard(TINY, 4, 64, weights, numerics or weights[:1])
    spans = (Span(TINY, 0, end),) if end else ()
    facts = Facts(spans=spans, models=(card,), version="1")
    return Peer(NodeId(name), f"node-{name}", ("127.0.0.1", 1), facts=facts, **changes)


def view(*peers: Peer, me: str = "") -> View:
    return View(NodeId(me or peers[0].id), MappingProxyType({each.id: each for each in peers}))


def rows(*peers: Peer) -> list[dict[str, Any]]:
    seen = view(*peers)
    return list(to_builtins(status(seen, [], {TINY: True}, 0.0, None))["models"])


def test_two_versions_of_an_id_are_two_rows() -> None:
    first, second = rows(peer("1", A), peer("2", A), peer("3", B, end=2, numerics="other"))
    assert (first["id"], first["weights"], first["name"], first["answers"], first["complete"]) == ("tiny", A, "tiny", True, True)
    assert (first["min_replicas"], first["nodes"], first["numerics"]) == (2, 2, "exact")
    assert (second["id"], second["weights"], second["name"], second["answers"]) == ("tiny", B, "tiny@bbbbbbbb", False)
    assert (second["complete"], second["min_replicas"], second["nodes"], second["numerics"]) == (False, 0, 1, "exact")
    assert [run["live"] for run in second["coverage"]] == [1, 0]


def test_nodes_with_different_weights_are_no_replicas() -> None:
    """Three versions, which must not count as three copies with `exact` answers."""
    models = rows(peer("1", A), peer("2", B), peer("3", "c" * 64))
    assert [(row["min_replicas"], row["numerics"]) for row in models] == [(1, "exact")] * 3
    assert [row["answers"] for row in models] == [True, False, False]


def test_every_node_reports_the_same_rows() -> None:
    peers = [peer("1", A), peer("2", B), peer("3", B)]
    models = [status(view(*peers, me=me), [], {}, 0.0, None).models for me in "123"]
    assert models[0] == models[1] == models[2]


def test_the_nodes_own_status_has_the_progress_of_hashing() -> None:
    hashing: Any = {"tiny": msgspec.defstruct("Hashed", ["bytes_done", "bytes"])(5, 9)}
    body = to_builtins(status(view(peer("1", "", end=0)), [], {}, 0.0, None, hashing=hashing))
    assert body["self"]["hashing"] == {"tiny": {"bytes_done": 5, "bytes": 9}}
    assert (body["models"][0]["weights"], body["models"][0]["complete"]) == ("", False)


def test_in_the_list_of_models_a_version_has_its_own_id() -> None:
    plain = model_object(ModelCard(TINY, 4, 64, A, "n"))
    other = model_object(ModelCard(ModelId("tiny@bbbbbbbb"), 4, 64, B, "n"))
    assert (plain["id"], plain["root"], plain["mesh"]["weights"]) == ("tiny", "tiny", A)
    assert (other["id"], other["root"], other["mesh"]["weights"]) == ("tiny@bbbbbbbb", "tiny", B)
    odd = model_object(ModelCard(ModelId("odd@bbbbbbbb"), 4, 64, A, "n"))
    assert odd["root"] == "odd@bbbbbbbb", "an id may look like that"


# --- mesh doctor


def found(*peers: Peer, **look: Any) -> list[Finding]:
    return diagnosis(Observations(view(*peers), free_bytes=1 << 40, **look))


def test_doctor_reports_the_nodes_of_each_version_and_a_remedy() -> None:
    [finding] = [each for each in found(peer("1", A), peer("2", B), peer("3", B)) if "sets of weights" in each.what]
    assert finding.severity == PROBLEM and finding.about == "models"
    assert finding.what == (
        "2 sets of weights are called tiny, and they are no replicas of each other: "
        "bbbbbbbb (on node-2, node-3; 2 serve it) answers to tiny; "
        "aaaaaaaa (on node-1; 1 serve it) is asked for as tiny@aaaaaaaa"
    )
    assert "the same files" in finding.do and "NAME=DIR" in finding.do


def test_doctor_counts_copies_within_a_version() -> None:
    findings = found(peer("1", A), peer("2", A), peer("3", B, end=2), missing_layers={ModelId("tiny@bbbbbbbb"): ((2, 4),)})
    severities = {each.what: each.severity for each in findings if "sets of weights" not in each.what}
    assert severities == {"no live node holds layers 2:4 of tiny@bbbbbbbb: it cannot answer": NOTE}
    alone = found(peer("1", A), peer("2", B), peer("3", B, state=PeerState.DEAD))
    assert "some layers of tiny are held 1 time: the next death stops it" in [each.what for each in alone]


def test_a_mesh_with_one_version_reports_no_versions() -> None:
    assert found(peer("1", A), peer("2", A)) == []
    assert found(peer("1", A), peer("2", A), peer("3", "", end=0)) == [], "one that still hashes its files is no version"


def test_doctor_reports_files_that_changed_under_the_node() -> None:
    [finding] = found(peer("1", A), peer("2", A), changed_files={TINY: "x.safetensors holds other bytes than were hashed"})
    assert finding.severity == PROBLEM
    assert finding.what.endswith("x.safetensors holds other bytes than were hashed") and "copy the model's files" in finding.do


# --- readiness


def test_a_node_that_hashes_and_serves_nothing_yet_is_loading() -> None:
    hashing, known = peer("1", "", end=0).facts, peer("1", A, end=0).facts
    assert readiness_of(hashing, Load(), 0.0) is Readiness.LOADING
    assert readiness_of(known, Load(), 0.0) is Readiness.WARM
    serves_another = msgspec.structs.replace(hashing, spans=(Span(ModelId("other"), 0, 4),))
    assert readiness_of(serves_another, Load(), 0.0) is Readiness.WARM


async def test_the_reason_of_an_unready_node_has_the_progress_of_hashing() -> None:
    nothing: Any = None
    seen = view(peer("1", "", end=0))
    models = PeerModels(lambda: seen, ServedModels(), nothing)
    hashing_reports = ["the files of tiny are being hashed, 1.00 of 4.00 GiB"]
    check = Canary(lambda: seen, models, nothing, lambda: hashing_reports)
    why = await check.why_not()
    assert why is not None and why.startswith(f"{hashing_reports[0]}; no live peer holds layers 0:4 of tiny")


# --- the log


def watching(weights: str) -> VersionWatch:
    async def never(version: int) -> View:
        raise AssertionError

    models, text = ServedModels(), None
    models.add(ServedModel(ModelCard(TINY, 4, 64, weights, ""), Path(), text))  # type: ignore[arg-type]
    return VersionWatch(never, models)


def test_a_node_with_other_weights_logs_that_once_and_its_end() -> None:
    mine, theirs = peer("1", A), [peer("2", B), peer("3", B)]
    watch = watching(A)
    with capture_logs() as logs:
        for seen in (view(mine), view(mine, *theirs), view(mine, *theirs, peer("4", B)), view(mine, *theirs)):
            watch.update(seen)
        assert [line["event"] for line in logs] == ["weights.other_version"], "once, whatever else changes"
        line = logs[0]
        assert (line["log_level"], line["model"], line["weights"], line["answering"]) == (
            "warning",
            "tiny",
            "aaaaaaaa",
            "bbbbbbbb",
        )
        assert (line["nodes"], line["answering_nodes"], line["asked_for_as"]) == (1, 2, "tiny@aaaaaaaa")
        watch.update(view(mine))
        watch.update(view(mine))
    assert [line["event"] for line in logs] == ["weights.other_version", "weights.answer"]
    with capture_logs() as logs:
        for other in (B, "c" * 64):
            watch.update(view(mine, peer("2", other), peer("3", other)))
    assert [line["answering"] for line in logs] == ["bbbbbbbb", "cccccccc"], "each change of the answering weights is logged"


@pytest.mark.parametrize("weights", [A, ""])
def test_answering_and_unidentified_weights_are_not_logged(weights: str) -> None:
    with capture_logs() as logs:
        watching(weights).update(view(replace(peer("1", weights), id=NodeId("1")), peer("2", A), peer("3", A)))
    assert logs == []
