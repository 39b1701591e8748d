"""Meshes by the thousand: shortcuts of the simulator change nothing, and size changes little."""

from __future__ import annotations

from typing import Any

import pytest

from membership.simulation.checkers import deaths_of, detection_s
from membership.simulation.network import Network
from mesh.view import PeerState


def lived_through(network: Network, nodes: int) -> tuple[str, list[int], int]:
    ids = network.found(nodes)
    network.run(1.0)
    network.crash(ids[3])
    network.kill(ids[4])
    network.run(2.0)
    network.starve(ids[5])
    network.break_links(ids[6])
    network.run(2.0)
    network.resume(ids[3])
    network.leave(ids[7])
    network.run(2.0)
    return network.trace(), [it.bytes_sent for it in network.nodes.values()], network.largest_bytes


def test_datagrams_that_travel_as_structs_give_the_same_trace_and_the_same_bytes() -> None:
    structs, octets = (lived_through(Network(5, loss=0.05, encoded=encoded), 30) for encoded in (False, True))
    assert structs == octets


def test_a_mesh_that_shares_its_first_views_lives_as_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(network: Network, nodes: int) -> list[Any]:
        ids = found(network, nodes)
        for it in network.nodes.values():
            assert all(it.core.swim.members.get(node) is not None for node in ids)
        return ids

    sharing = lived_through(Network(6, loss=0.05), 30)
    found = Network.found
    monkeypatch.setattr(Network, "found", looked_at)
    assert lived_through(Network(6, loss=0.05), 30) == sharing


def test_a_thousand_know_of_a_crash_in_half_a_second_without_a_flood() -> None:
    seed = 1
    network = Network(seed, loss=0.01, encoded=False)
    ids = network.found(1000)
    network.run(0.2)
    sent, killed_at = sum(it.bytes_sent for it in network.nodes.values()), network.now
    network.crash(ids[seed])
    network.run(0.8)
    took = detection_s(network, ids[seed], killed_at)
    assert len(took) == 999 and took[-1] < 0.5
    assert deaths_of(network, ids[2:]) == []
    assert all(network.state(by, ids[seed]) is PeerState.DEAD for by in network.up)
    news_bytes = (sum(it.bytes_sent for it in network.nodes.values()) - sent) / 1000
    assert news_bytes < 10_000, "a digest each, of a thousand, would be forty thousand"
