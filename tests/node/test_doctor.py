"""What the doctor says of what it sees."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from mesh.ids import ModelId, NodeId
from mesh.keys.seal import SealFault
from mesh.links.refusals import UNAUTHORIZED_FRAME, Refusal
from mesh.view import Facts, Loading, ModelCard, Peer, PeerState, Readiness, Span, View
from node.host.uncompiled import BY_NAME, COSTS, NO_COMPILER
from node.ops.doctor import NOTE, PROBLEM, Observations, diagnosis
from node.reports import Finding
from rag.types import StoreInfo

MODEL = ModelId("tiny")
CARD = ModelCard(MODEL, 4, 64, "w", "n")
ME = NodeId("0" * 16)


def peer(number: int, state: PeerState = PeerState.ALIVE, cause: str = "", **facts: object) -> Peer:
    told = {"version": "1.0", "models": (CARD,), "spans": (Span(MODEL, 0, 4),), **facts}
    name, address = f"node-{number}", (f"10.0.0.{number}", 7946)
    return Peer(NodeId(f"{number:016x}"), name, address, state=state, cause=cause, facts=Facts(**told))  # type: ignore[arg-type]


def view(*peers: Peer) -> View:
    return View(ME, MappingProxyType({one.id: one for one in (peer(0), *peers)}))


WELL = Observations(view(peer(1), peer(2)), skews_s={peer(1).id: 0.1, peer(2).id: -0.3}, free_bytes=1 << 40)


def found(look: Observations) -> list[Finding]:
    return diagnosis(look)


def only(look: Observations) -> Finding:
    (finding,) = found(look)
    return finding


def test_a_mesh_that_is_well_has_no_findings() -> None:
    assert found(WELL) == []


@pytest.mark.parametrize("fault", list(SealFault))
def test_every_reason_to_refuse_a_datagram_has_words_and_something_to_do(fault: SealFault) -> None:
    finding = only(replace(WELL, refusals=[Refusal("10.0.0.7", fault.value, 3)]))
    assert finding.severity == PROBLEM and finding.do
    assert finding.what.startswith("3 datagrams in the last minute from 10.0.0.7 ")
    assert "{" not in finding.what + finding.do, "the text is filled in"


def test_another_key_is_told_with_the_file_to_copy_and_the_peer_by_name() -> None:
    finding = only(replace(WELL, refusals=[Refusal("10.0.0.1", SealFault.WRONG_KEY.value, 60)]))
    assert finding.what == (
        "60 or more datagrams in the last minute from node-1 (10.0.0.1) are sealed with another mesh key, or with none"
    )
    assert "copy the key file" in finding.do


def test_a_refused_link_is_told_with_its_own_reason() -> None:
    reason = "cluster label 'other', here 'mesh': these are two meshes"
    finding = only(replace(WELL, refusals=[Refusal("10.0.0.9", reason, 1)]))
    assert reason in finding.what and finding.about == "links"


def test_a_node_that_speaks_of_what_is_none_of_its_business_is_named() -> None:
    finding = only(replace(WELL, refusals=[Refusal(peer(1).id, UNAUTHORIZED_FRAME, 3)]))
    assert finding.severity == PROBLEM and finding.what.startswith("3 times in the last minute node-1 was not believed")
    assert "mesh key rotate" in finding.do


@pytest.mark.parametrize(
    ("state", "cause", "words"),
    [
        (PeerState.SUSPECT, "", "does not answer"),
        (PeerState.SUSPECT, "stalled", "its process still listens"),
        (PeerState.DEAD, "refused", "its process has ended"),
        (PeerState.DEAD, "timeout", "it fell silent"),
    ],
)
def test_nodes_in_trouble_are_named_with_what_is_known(state: PeerState, cause: str, words: str) -> None:
    findings = found(replace(WELL, view=view(peer(1), peer(2), peer(3, state, cause))))
    assert [(f.severity, f.about) for f in findings] == [(PROBLEM, "nodes")]
    assert findings[0].what.startswith("node-3 ") and words in findings[0].what


def test_a_stalled_engine_is_a_problem_and_a_full_one_a_remark_and_who_left_is_neither() -> None:
    look = replace(
        WELL, view=view(peer(1, readiness=Readiness.STALLED), peer(2, readiness=Readiness.OVERLOADED), peer(3, PeerState.LEFT))
    )
    assert [(f.severity, f.what.split()[0]) for f in found(look)] == [(PROBLEM, "node-1"), (NOTE, "node-2")]


def test_two_processes_with_one_identity_are_named_with_both_places() -> None:
    doubled = peer(1, twin="copy at 10.0.0.9:7946")
    finding = only(replace(WELL, view=view(doubled, peer(2))))
    assert (finding.severity, finding.about) == (PROBLEM, "nodes")
    for part in (doubled.id, "node-1 at 10.0.0.1:7946", "copy at 10.0.0.9:7946"):
        assert part in finding.what
    assert "--new-identity" in finding.do
    gone = replace(doubled, state=PeerState.LEFT)
    assert not [each for each in found(replace(WELL, view=view(gone, peer(2)))) if "identity" in each.what]


def test_layers_that_nobody_holds_are_named_with_the_command_that_mends_it() -> None:
    finding = only(replace(WELL, missing_layers={MODEL: ((1, 3),)}, not_ready="tiny lacks layers 1:3"))
    assert "layers 1:3 of tiny" in finding.what and "--layers 1:3" in finding.do


def test_layers_that_a_node_is_loading_are_a_remark_with_progress() -> None:
    loads = peer(1, spans=(Span(MODEL, 0, 1),), intends=(Span(MODEL, 1, 4),), loading={MODEL: Loading(30, 9)})
    alone = replace(WELL, view=View(ME, MappingProxyType({ME: peer(0, spans=()), loads.id: loads})), skews_s={})
    finding = only(replace(alone, missing_layers={MODEL: ((1, 4),)}, not_ready="being loaded"))
    assert (finding.severity, finding.about) == (NOTE, "models")
    assert "layers 1:4 of tiny are being loaded by node-1: 30% done, about 9 s to go" in finding.what


def test_layers_held_once_are_a_problem_among_several_and_a_remark_alone() -> None:
    several = replace(WELL, view=view(peer(1, spans=()), peer(2, spans=())))
    assert (only(several).severity, only(several).about) == (PROBLEM, "models")
    alone = found(replace(WELL, view=view(), skews_s={}))
    assert {finding.severity for finding in alone} == {NOTE}


def test_what_the_machines_can_hold_is_said_where_layers_are_short() -> None:
    look = replace(WELL, view=view(peer(1, spans=(), capacity={MODEL: 3}), peer(2, spans=())))
    assert "room for 3 layers" in only(look).do


@pytest.mark.parametrize(("skew_s", "way"), [(9.0, "ahead of"), (-400.0, "behind")])
def test_a_clock_that_is_off_is_told_with_its_direction(skew_s: float, way: str) -> None:
    finding = only(replace(WELL, skews_s={peer(1).id: skew_s, peer(2).id: 0.0}))
    assert finding.about == "clocks" and f"{abs(skew_s):.0f} s {way}" in finding.what


def test_a_peer_that_gossips_and_answers_no_call_has_its_tcp_closed() -> None:
    assert "TCP" in only(replace(WELL, skews_s={peer(1).id: None})).do


def test_two_releases_are_told_apart_by_who_runs_them() -> None:
    assert "1.0 on node-0, node-2; 2.0 on node-1" in only(replace(WELL, view=view(peer(1, version="2.0"), peer(2)))).what


def test_a_store_with_too_few_copies_is_a_problem_once_there_are_nodes_enough() -> None:
    store = StoreInfo("vs_1", "notes", 0, 1, 1, 4, 2, True)
    assert only(replace(WELL, stores=[store])).severity == PROBLEM
    fewer = replace(WELL, view=view(peer(1)), stores=[store], skews_s={})
    assert only(fewer).severity == NOTE and "only 2 nodes live" in only(fewer).do


@pytest.mark.parametrize(
    ("change", "about", "severity"),
    [
        ({"keyless": True}, "keys", NOTE),
        ({"key_saved": False}, "keys", PROBLEM),
        ({"keys_on_ring": 2}, "keys", PROBLEM),
        ({"free_bytes": 1 << 20}, "disk", PROBLEM),
        ({"not_written": "Read-only file system"}, "disk", PROBLEM),
        ({"not_ready": "no token came"}, "models", PROBLEM),
        ({"refusals": [Refusal("x", "too long", 1)]}, "links", NOTE),
    ],
)
def test_what_this_node_lacks_itself_is_told(change: dict[str, object], about: str, severity: str) -> None:
    finding = only(replace(WELL, **change))  # type: ignore[arg-type]
    assert (finding.about, finding.severity) == (about, severity)


def test_problems_come_before_remarks() -> None:
    look = replace(WELL, keyless=True, free_bytes=1)
    assert [finding.severity for finding in found(look)] == [PROBLEM, NOTE]


def test_nodes_without_the_compiled_kernel_are_named_with_the_reason_and_what_to_install() -> None:
    reason = f"{NO_COMPILER}: looked for cc, gcc, clang and the package ziglang"
    gone = peer(3, PeerState.DEAD, uncompiled=reason)
    look = replace(WELL, view=view(peer(1, uncompiled=reason), peer(2, uncompiled=reason), gone))
    finding = next(found for found in diagnosis(look) if "compiled" in found.what)
    assert finding.severity == NOTE and "apt-get install gcc" in finding.do and "pip install ziglang" in finding.do
    assert finding.what == f"without the compiled kernel: node-1, node-2 ({reason}); {COSTS}"


def test_what_to_do_without_the_compiled_kernel_depends_on_the_reason() -> None:
    elsewhere = peer(2, uncompiled="it is written for Linux on x86-64, this is Linux on aarch64")
    look = replace(WELL, view=view(peer(1, uncompiled=BY_NAME), elsewhere))
    told = {finding.what.split()[4]: finding.do for finding in diagnosis(look)}
    assert told == {"node-1": "start the node without --dtype KERNEL", "node-2": ""}
