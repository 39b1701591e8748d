"""M1 to M10, the invariants of membership, against adversaries that hypothesis draws; and each of them shown to be able to fail.

What the numbers mean: `tests.membership.hostile_mesh`, `tests.membership.hostile_node`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from membership.core import (
    allowance,
    claim_verifier,
    claims,
    dissemination,
    exchanges,
    members,
    node_state,
    refusal_detection,
    refutation,
    suspicion,
    swim,
)
from membership.core.effects import MembershipEffect
from membership.core.members import Member
from membership.facts import fingerprint
from mesh.ids import NodeId
from mesh.view import PeerState
from mesh.wire import datagram_codec
from mesh.wire.gossip import REFUSED, Alive, Claim, Dead, Left, Suspect
from tests.membership.hostile_mesh import HostileMesh
from tests.membership.hostile_node import HostileNode

Mutation = Callable[[pytest.MonkeyPatch], None]
MESH = settings(max_examples=14, stateful_step_count=50, deadline=None)
NODE = settings(max_examples=14, stateful_step_count=40, deadline=None)


def test_a_mesh_keeps_m1_to_m7_and_m9_in_any_message_order() -> None:
    run_state_machine_as_test(HostileMesh, settings=MESH)


def test_a_node_keeps_m8_to_m10_for_any_input() -> None:
    run_state_machine_as_test(HostileNode, settings=NODE)


def as_it_is_said(claim: Claim, *_: object) -> Claim:
    return claim


def deaf(self: refutation.Refutation, *_: object) -> list[Claim]:
    return []


def convicts_at_once(
    self: refusal_detection.RefusalDetection, member: Member, now: float, *, hearsay: bool = False
) -> list[MembershipEffect]:
    self._claims.declare(Dead(member.node, member.epoch, member.incarnation, self._state.me, REFUSED), now)
    return []


def believes(self: claims.ClaimProcessing, member: Member, claim: Dead, now: float) -> list[Claim]:
    self._become(member, claim, now, by=claim.by)
    return []


def believes_the_past(self: claims.ClaimProcessing, claim: Claim, now: float, own: Alive | Left | None = None) -> list[Claim]:
    member = self._state.members.get(claim.node)
    if (
        member is None
        or claim.node == self._state.me
        or not isinstance(claim, Suspect)
        or claim.incarnation >= member.incarnation
    ):
        return _apply(self, claim, now, own)
    self._become(member, claim, now, by=claim.by)
    return []


def keeps_to_the_first(self: fingerprint.Fingerprint, node: NodeId, epoch: int, incarnation: int) -> None:
    if self._of(node) is None:
        _live(self, node, epoch, incarnation)


def leaks(raw: bytes) -> object:
    raise KeyError(raw)


def swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(members.SEVERITY, PeerState.LEFT, 2)
    patch.setitem(members.SEVERITY, PeerState.DEAD, 3)


def silenced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dissemination.Rumours, "put", lambda *_: None)
    patch.setattr(exchanges.Exchanges, "take", lambda *_: False)


def planted(target: object, name: str, value: object) -> Mutation:
    return lambda patch: patch.setattr(target, name, value)


_live = fingerprint.Fingerprint.live
_apply = claims.ClaimProcessing.apply
FAULTS: list[tuple[str, str, type[RuleBasedStateMachine], Mutation]] = [
    ("M1", "accusations go as high as anybody says", HostileMesh, planted(claims, "limited_to_own", as_it_is_said)),
    ("M1", "signatures are not looked at", HostileMesh, planted(claim_verifier.ClaimVerifier, "verifies", lambda *_: True)),
    (
        "M2|standing never goes back",
        "a stale suspicion is believed",
        HostileMesh,
        planted(claims.ClaimProcessing, "apply", believes_the_past),
    ),
    ("M3", "nobody refutes", HostileMesh, planted(refutation.Refutation, "apply", deaf)),
    ("M4: ended", "a failed probe accuses nobody", HostileMesh, planted(swim.Swim, "_probe_failed", lambda *_: None)),
    ("M4: .* ended,", "suspicions never end", HostileMesh, planted(suspicion.Suspicion, "deadline", property(lambda self: 1e9))),
    ("M[35]", "nothing is told or compared afterwards", HostileMesh, silenced),
    (
        "M5",
        "a fingerprint keeps to the first standing",
        HostileMesh,
        planted(fingerprint.Fingerprint, "live", keeps_to_the_first),
    ),
    ("M6", "a verdict overrides a goodbye", HostileMesh, swapped),
    ("M7", "hearsay kills", HostileMesh, planted(claims.ClaimProcessing, "_apply_reported_death", believes)),
    (
        "M7: no host",
        "an end of a link is proof enough",
        HostileMesh,
        planted(refusal_detection.RefusalDetection, "open_case", convicts_at_once),
    ),
    ("M8: a datagram", "claims beyond the frame", HostileNode, planted(node_state, "claim_budget_bytes", lambda bare: 1600)),
    ("M8: .* members", "the table has no bound", HostileNode, planted(members.Members, "__len__", lambda self: 2)),
    ("M9: .* quiet", "rumours are told for ever", HostileMesh, planted(node_state, "transmit_limit", lambda *_: 10**9)),
    ("M9: .* stranger", "answers are not counted", HostileNode, planted(allowance.Allowance, "covered", lambda self, sent: sent)),
    ("M10: .* neither", "the decoder raises what it likes", HostileNode, planted(datagram_codec, "_decoded", leaks)),
    ("M10: no message", "loads are not looked at", HostileNode, planted(datagram_codec, "load_is_sane", lambda load: True)),
]

SEARCHES = 8


@pytest.mark.parametrize(("broken", "name", "machine", "plant"), FAULTS, ids=[name for _, name, _, _ in FAULTS])
def test_a_planted_fault_breaks_its_invariant(
    broken: str, name: str, machine: type[RuleBasedStateMachine], plant: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which sequences are tried follows from the machine's name; a fault may break another assertion first, so several are."""
    plant(monkeypatch)
    once = settings(MESH, phases=(Phase.generate,), database=None, derandomize=True, report_multiple_bugs=False)
    found = []
    for number in range(SEARCHES):
        searched: Any = type(f"{machine.__name__}{number or ''}", (machine,), {})
        with pytest.raises(AssertionError) as raised:
            run_state_machine_as_test(searched, settings=settings(once, max_examples=300))
        found.append(str(raised.value).splitlines()[0])
        if re.search(broken, found[-1]):
            return
    pytest.fail(f"{name}: expected {broken}, found {found}")
