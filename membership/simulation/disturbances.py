"""Disturbances of a simulated mesh besides the timed deaths: churn and blocked routes."""

from __future__ import annotations

from random import Random

from membership.simulation.network import Network
from mesh.ids import NodeId

AWAY_S = 2.0  # between the stop and the restart of a node
CALM_S = 5.0  # at the end of each stretch no node leaves, so that the mesh has converged when it is checked


class Churn:
    """Stops `a_minute` of `nodes`, in turn by a crash and by leaving, and restarts each as another run."""

    def __init__(self, network: Network, nodes: list[NodeId], a_minute: float, rng: Random) -> None:
        self._network, self._nodes, self._rng = network, nodes, rng
        self._every_s = 60.0 / a_minute if a_minute and nodes else float("inf")
        self._next_at = network.now + self._every_s
        self._away: list[tuple[float, NodeId]] = []  # with the time of the restart
        self.goings = 0

    def run(self, duration_s: float) -> None:
        """Lets time pass, with churn."""
        network = self._network
        end = network.now + duration_s
        while True:
            back_at = self._away[0][0] if self._away else float("inf")
            goes_at = self._next_at if self._next_at <= end - CALM_S else float("inf")
            if min(back_at, goes_at) > end:
                break
            network.run(max(0.0, min(back_at, goes_at) - network.now))
            if back_at <= goes_at:
                self._come_back(self._away.pop(0)[1])
            else:
                self._next_at += self._every_s
                self._go()
        network.run(end - network.now)
        self._next_at = max(self._next_at, end)

    def _go(self) -> None:
        network = self._network
        here = [node for node in self._nodes if network.nodes[node].running]
        if not here:
            return
        node = self._rng.choice(here)
        (network.leave if self.goings % 2 else network.crash)(node)
        self.goings += 1
        self._away.append((network.now + AWAY_S, node))

    def _come_back(self, node: NodeId) -> None:
        it = self._network.nodes[node]
        epoch = max(it.epoch, it.core.swim.myself.epoch) + 1
        seeds = self._rng.sample(self._network.up, min(2, len(self._network.up)))
        self._network.add(seeds, number=int(node, 16), epoch=epoch)


def cut_some_ways(network: Network, nodes: list[NodeId], count: int, rng: Random) -> None:
    """Blocks `count` routes from one node to another in one direction."""
    ways = len(nodes) * (len(nodes) - 1)
    for way in rng.sample(range(ways), min(count, ways)):
        one, other = divmod(way, len(nodes) - 1)
        network.cut([nodes[one]], [nodes[other + (other >= one)]], one_way=True)


class Partition:
    """Splits the mesh into two halves; claims of one half about the other are no errors meanwhile."""

    def __init__(self, network: Network) -> None:
        self._network = network
        nodes = network.up
        self._half = set(nodes[: len(nodes) // 2])
        self._from_s = network.now
        network.cut(self._half, [node for node in nodes if node not in self._half])

    def excuses(self, at: float, by: NodeId, node: NodeId) -> bool:
        return at >= self._from_s and (by in self._half) != (node in self._half)
