"""Two processes with one identity, simulated: the calls of `membership.shell.twin_calls` on the network's virtual wires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from membership.core.effects import FindTwin, MembershipEffect, ProcessDisplaced
from membership.simulation.nodes import SimNode
from mesh.ids import Address
from mesh.wire.twin import TwinAnswer

if TYPE_CHECKING:
    from membership.simulation.network import Network

NO_ANSWER_S = 2.0  # the timeout of the real call


def carry_out(network: Network, it: SimNode, effect: MembershipEffect) -> None:
    match effect:
        case FindTwin(to=place):
            _ask(network, it, place)
        case ProcessDisplaced():
            network.crash(it.id)  # its process ends at once, without leaving
        case _:
            pass


def _ask(network: Network, it: SimNode, place: Address) -> None:
    run = it.core.swim.refutation.twins.run(network.now)
    peer = network.connects(it, place)

    def come_back(answer: TwinAnswer | None) -> None:
        if it.running and not it.paused:
            network.carry_out(it, it.core.twin_found(place, answer, network.now))

    def arrive() -> None:
        if peer is None or not peer.running or peer.paused or peer.core.me != it.core.me:
            network.later(0.0 if peer is not None and (peer.refuses or peer.running) else NO_ANSWER_S, come_back, None)
            return
        answer, effects = peer.core.twin_asked(run, network.now)
        network.carry_out(peer, effects)
        network.later(network.ways.delay_s(peer.id, it.id), come_back, answer)

    network.later(network.ways.delay_s(it.id, peer.id if peer is not None else it.id), arrive)
