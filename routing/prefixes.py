"""Which peers were sent which prompt beginnings: what an entry knows of others' caches without being told.

Pages are named by hashes (`mesh.prefix`), each over all that stands before it, so a name a peer was sent says that it had
every earlier one too. It may have dropped them since: the figure is a hint for the score, and a wrong one costs the
prefill that would have been due anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from mesh.ids import NodeId

REMEMBERED_NAMES = 32_768  # of all peers together: a million tokens of prompts
PREFIX_KEY_PAGES = 4  # the home of a prompt follows from its first pages: what conversations of one kind share


class PrefixMemory:
    def __init__(self, page_tokens: int, remembered: int = REMEMBERED_NAMES) -> None:
        self._page_tokens = page_tokens
        self._remembered = remembered
        self._nodes: OrderedDict[bytes, set[NodeId]] = OrderedDict()

    def sent(self, names: Sequence[bytes], nodes: Iterable[NodeId]) -> None:
        """A prompt with pages of these names was taken up by the nodes."""
        for name in reversed(names):  # so that the beginnings are forgotten last
            known = self._nodes.pop(name, set())
            self._nodes[name] = known | set(nodes)
        while len(self._nodes) > self._remembered:
            self._nodes.popitem(last=False)

    def cached_tokens(self, names: Sequence[bytes]) -> dict[NodeId, int]:
        """How many tokens of a prompt with these pages each node may still have."""
        found: dict[NodeId, int] = {}
        for count, name in enumerate(names, 1):
            for node in self._nodes.get(name, ()):
                if found.get(node, 0) == (count - 1) * self._page_tokens:
                    found[node] = count * self._page_tokens
        return found

    def forget(self, node: NodeId) -> None:
        """The node died or restarted: its memory is empty."""
        for name, nodes in list(self._nodes.items()):
            nodes.discard(node)
            if not nodes:
                del self._nodes[name]


def prefix_key(names: Sequence[bytes]) -> bytes:
    """What the rendezvous home of a prompt is found by; empty for a prompt without a whole page."""
    return names[min(len(names), PREFIX_KEY_PAGES) - 1] if names else b""
