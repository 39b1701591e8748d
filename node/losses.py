"""What the loss of a link or of a member means for what runs here.

Two links join a pair of nodes, one dialled from each side. On the one that an entry dials go its opens and closes, on the
one that a stage dials its tokens and losses; frames that were under way are lost with either. So whichever ends, both
sides give up what they share and say so over a new link: a word lost in between costs a replay and never a token.
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
    """Membership looks at the node at once; `proven`: a link with it had been made, so its host is asked too."""

    def __call__(self, node: NodeId, *, proven: bool = False) -> None: ...


class LossHandling:
    """`doubt`: told of a peer whose link ended, so that membership looks at it at once."""

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
        """See `mesh.links.links.OnLost`: `address` is None where the peer had dialled."""
        proven = node is not None  # by its handshake
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
        """A node whose engine hangs says so itself, this one too: what waits for it goes on elsewhere if it can."""
        stalled = frozenset(peer.id for peer in view.live() if peer.stalled)
        for node in sorted(stalled - self._stalled):
            self._entry.peer_news(PeerSuspect(node))
        for node in sorted(self._stalled - stalled):
            if view.is_live(node) and view.peers[node].state is PeerState.ALIVE:
                self._entry.peer_news(PeerBack(node))
        self._stalled = stalled
        self._queue.view_changed()

    def member_changed(self, event: MemberEvent) -> None:
        """Nothing that ran on a member that is down will be heard of again."""
        if event.node == self._view().me:
            return
        if event.down:
            reason = "restarted" if event.restarted else event.after.value
            self._planning.forget(event.node)
            self._queue.node_gone(event.node)
            self._entry.peer_news(PeerGone(event.node, reason))
            self._stages.entry_lost(event.node, reason)
        if event.stalled:  # what it computes for our clients goes on elsewhere
            self._entry.peer_news(PeerGone(event.node, "stalled"))
        elif event.after is PeerState.SUSPECT:
            self._entry.peer_news(PeerSuspect(event.node))
        elif event.after is PeerState.ALIVE and event.node not in self._stalled:
            self._entry.peer_news(PeerBack(event.node))
