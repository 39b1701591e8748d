"""Decides what the loss of a link or of a member means for the requests and sequences of this node.

Each pair of nodes has two links, one dialled from each side. An entry sends opens and closes on the link that it dials, a stage
sends tokens and losses on the link that it dials; frames under way are lost with their link. So when either link ends, both nodes
give up the sequences that they share and report that over a new link: a lost frame costs a replay, and never a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from membership.shell.events import MemberEvent
from mesh.ids import Address, NodeId
from mesh.view import PeerState, View
from node.entry.entry import Entry
from node.entry.generation import PeerBack, PeerGone, PeerSuspect
from node.entry.path_queue import PathQueue
from node.entry.planning import Planning
from node.serving.stages import Stages


class DoubtPeer(Protocol):
    """Has membership probe a node at once. `proven`: a link with the node had been made, so refusal detection applies too."""

    def __call__(self, node: NodeId, *, proven: bool = False) -> None: ...


class LossHandling:
    """Passes lost links and changed members on to the entry, the stages and planning. `doubt`: membership's."""

    def __init__(
        self,
        view: Callable[[], View],
        entry: Entry,
        queue: PathQueue,
        stages: Stages,
        planning: Planning,
        doubt: DoubtPeer,
    ) -> None:
        self._queue = queue
        self._view = view
        self._entry = entry
        self._stages = stages
        self._planning = planning
        self._doubt = doubt
        self._stalled: frozenset[NodeId] = frozenset()  # as of the last view

    def link_lost(self, node: NodeId | None, address: Address | None, reason: str) -> None:
        """Handles the end of a link; see `mesh.links.links.OnLost`. `address`: None if the peer had dialled the link."""
        proven = node is not None  # authenticated by its handshake
        if node is None:
            node = next((peer.id for peer in self._view().peers.values() if peer.address == address), None)
        if address is not None:
            self._stages.link_lost(address, reason)
        elif node is not None:
            self._stages.entry_lost(node, reason)
        if node is not None:
            self._planning.link_lost(node)
            self._queue.node_gone(node)
            self._entry.peer_news(PeerGone(node, reason))
            self._doubt(node, proven=proven)

    def view_changed(self, view: View) -> None:
        """Handles stalls of engines that nodes publish, this node included: requests move to other nodes if they can."""
        stalled = frozenset(peer.id for peer in view.live() if peer.stalled)
        for node in sorted(stalled - self._stalled):
            self._entry.peer_news(PeerSuspect(node))
        for node in sorted(self._stalled - stalled):
            if view.is_live(node) and view.peers[node].state is PeerState.ALIVE:
                self._entry.peer_news(PeerBack(node))
        self._stalled = stalled
        self._queue.view_changed()

    def member_changed(self, event: MemberEvent) -> None:
        """Handles a change of a member: what ran on a member that is down is lost, and its own requests' sequences are freed."""
        if event.node == self._view().me:
            return
        if event.down:
            reason = "restarted" if event.restarted else event.after.value
            self._planning.forget(event.node)
            self._queue.node_gone(event.node)
            self._entry.peer_news(PeerGone(event.node, reason))
            self._stages.entry_lost(event.node, reason)
        if event.stalled:  # the requests that it computes move to other nodes
            self._entry.peer_news(PeerGone(event.node, "stalled"))
        elif event.after is PeerState.SUSPECT:
            self._entry.peer_news(PeerSuspect(event.node))
        elif event.after is PeerState.ALIVE and event.node not in self._stalled:
            self._entry.peer_news(PeerBack(event.node))
