"""How soon other nodes send a node no new work after it publishes a stall: the cores of a mesh on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import MappingProxyType

import pytest
from msgspec import to_builtins

from membership.simulation.network import Network
from mesh.ids import ModelId, NodeId
from mesh.view import Facts, Load, ModelCard, PeerState, Readiness, Span, View
from node.ops.status import status
from node.serving.own_facts import OwnFacts
from node.serving.readiness_monitor import CHECK_EVERY_S, ReadinessMonitor
from routing.path import plan
from routing.policies import policy_named

MODEL, LAYERS = ModelId("tiny"), 4
CARD = ModelCard(MODEL, LAYERS, 4096, "weights", "numerics")
TRIES = 8  # for each of eight nodes
OVERDUE_AFTER_S = 1.0  # as the engine judges a step much longer than all before
FULL = Load(running=60, waiting=3, kv_blocks_used=96, kv_blocks_total=100)


def view_of(network: Network, by: NodeId) -> View:
    core = network.nodes[by].core
    peers = {member.node: core.peer(member.node) for member in core.swim.members}
    return View(by, MappingProxyType({node: peer for node, peer in peers.items() if peer is not None}))


def chosen(network: Network, by: NodeId) -> set[NodeId]:
    """The nodes that this node would send a request now, over some tries."""
    view = view_of(network, by)
    paths = (plan(view, MODEL, LAYERS, policy_named("mesh"), Random(f"{by} {n}"), network.now) for n in range(TRIES))
    return {node for path in paths for node in path.nodes}


class Serving:
    """Nodes of a mesh that each hold the whole model; the first one's engine and load are as the test sets them."""

    def __init__(self, seed: int) -> None:
        self.network = Network(seed, loss=0.01)
        self.ids = self.network.grow(8)
        self.load = Load(kv_blocks_total=100)
        self.step_began_at: float | None = None
        facts = Facts(spans=(Span(MODEL, 0, LAYERS),), models=(CARD,))
        for node in self.ids:
            self.network.publish(node, facts)
        own = OwnFacts(facts, lambda changed: self.network.publish(self.ids[0], changed))
        self.monitor = ReadinessMonitor(own, lambda: self.load, self._overdue_s)
        self.network.run(1.0)

    def _overdue_s(self) -> float:
        return 0.0 if self.step_began_at is None else max(0.0, self.network.now - self.step_began_at - OVERDUE_AFTER_S)

    def run_until(self, condition: Callable[[], bool], within_s: float) -> None:
        """Lets time pass, with the first node's regular checks of its engine."""
        end = self.network.now + within_s
        while not condition():
            assert self.network.now < end, f"not within {within_s} s"
            self.network.run(CHECK_EVERY_S)
            self.monitor.check(self.network.now)

    def passed_over(self) -> bool:
        """Whether no node, itself included, would send the first node new requests."""
        return all(self.ids[0] not in chosen(self.network, by) for by in self.network.up)


@pytest.mark.parametrize("seed", range(2))
def test_a_hung_engine_gets_no_new_work_within_two_seconds(seed: int) -> None:
    mesh = Serving(seed)
    assert not mesh.passed_over()
    mesh.step_began_at = mesh.network.now
    mesh.run_until(mesh.passed_over, within_s=2.0)
    states = {mesh.network.state(by, mesh.ids[0]) for by in mesh.ids}
    assert states == {PeerState.ALIVE}, f"seed {seed}: it answers every ping"
    mesh.step_began_at = None
    mesh.run_until(lambda: not mesh.passed_over(), within_s=1.0)


@pytest.mark.parametrize("seed", range(2))
def test_an_overloaded_node_is_avoided_in_a_second_until_it_has_room(seed: int) -> None:
    mesh = Serving(seed)
    mesh.load = FULL
    assert not mesh.passed_over()

    def seen_by_others() -> set[Readiness]:
        return {view_of(mesh.network, by).peers[mesh.ids[0]].facts.readiness for by in mesh.ids}

    mesh.run_until(lambda: seen_by_others() == {Readiness.OVERLOADED}, within_s=1.0)
    assert mesh.passed_over(), f"seed {seed}"
    mesh.load = Load(kv_blocks_total=100)
    mesh.run_until(lambda: seen_by_others() == {Readiness.WARM}, within_s=4.0)
    assert not mesh.passed_over()


@pytest.mark.parametrize("silent", [True, False])
def test_no_node_sees_a_dead_node_as_idle_or_ready(silent: bool) -> None:
    mesh = Serving(1)
    for node in mesh.ids[1:]:
        mesh.network.nodes[node].core.set_load(FULL, mesh.network.now)
    (mesh.network.kill if silent else mesh.network.crash)(mesh.ids[0])
    mesh.network.run_until(mesh.passed_over, within_s=3.0)  # long before membership declares a silent node dead
    mesh.network.run(15.0)
    assert mesh.passed_over()
    for by in mesh.network.up:
        body = to_builtins(status(view_of(mesh.network, by), [], {}, mesh.network.now, {}))
        (dead,) = [node for node in body["nodes"] if node["id"] == mesh.ids[0]]
        assert (dead["state"], dead["readiness"], dead["load"]) == ("dead", "dead", {})
