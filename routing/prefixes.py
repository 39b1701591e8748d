"""Records which prompt beginnings an entry has sent to which peers, as an estimate of what is in their caches.

Pages are named by hashes (`mesh.prefix`), each over all tokens up to its end, so a peer that was sent a page was sent every
earlier page too. The peer may have evicted them since: the estimate is a hint for the score, and a wrong one costs no more than
the prefill that would have been due anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from mesh.ids import NodeId

REMEMBERED_NAMES = 32_768  # of all peers together: a million tokens of prompts
PREFIX_KEY_PAGES = 4  # a prompt's rendezvous home depends on so many first pages, which similar conversations share


class PrefixMemory:
    """The nodes that were sent each page, for the `remembered` pages sent latest."""

    def __init__(self, page_tokens: int, remembered: int = REMEMBERED_NAMES) -> None:
        self._page_tokens = page_tokens
        self._remembered = remembered
        self._nodes: OrderedDict[bytes, set[NodeId]] = OrderedDict()

    def sent(self, names: Sequence[bytes], nodes: Iterable[NodeId]) -> None:
        """Records that the nodes have opened a prompt with pages of these names."""
        for name in reversed(names):  # so that a prompt's first pages are forgotten last
            known = self._nodes.pop(name, set())
            self._nodes[name] = known | set(nodes)
        while len(self._nodes) > self._remembered:
            self._nodes.popitem(last=False)

    def cached_tokens(self, names: Sequence[bytes]) -> dict[NodeId, int]:
        """How many tokens from the beginning of a prompt with these pages each node may have cached."""
        found: dict[NodeId, int] = {}
        for count, name in enumerate(names, 1):
            for node in self._nodes.get(name, ()):
                if found.get(node, 0) == (count - 1) * self._page_tokens:
                    found[node] = count * self._page_tokens
        return found

    def forget(self, node: NodeId) -> None:
        """Drops a node that died or restarted, and so has an empty cache."""
        for name, nodes in list(self._nodes.items()):
            nodes.discard(node)
            if not nodes:
                del self._nodes[name]


def prefix_key(names: Sequence[bytes]) -> bytes:
    """The key of a prompt's rendezvous home; empty for a prompt without a whole page."""
    return names[min(len(names), PREFIX_KEY_PAGES) - 1] if names else b""
