"""A member table for simulated meshes of thousands: the records that all nodes share from the start are stored once.

Each node copies a shared record when it first looks at that member, so memory grows with what the nodes experience, not with
the square of their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from membership.core.members import Member, Members
from membership.core.roster import MemberIds
from membership.facts.fingerprint import Fingerprint
from mesh.ids import NodeId


class SharedRecords:
    """Records of members that many nodes share; never changed."""

    def __init__(self, members: Iterable[Member]) -> None:
        """`members`: all alive."""
        self.members = {member.node: member for member in members}
        by_region: dict[str, list[NodeId]] = {}
        for member in self.members.values():
            member.listed_in = member.region
            by_region.setdefault(member.region, []).append(member.node)
        self.regions = {region: MemberIds(nodes) for region, nodes in by_region.items()}
        self.roster = MemberIds(self.members) if len(self.regions) > 1 else next(iter(self.regions.values()))
        self.standings = {member.node: (member.epoch, member.incarnation) for member in self.members.values()}
        self.share = Fingerprint(self.standings).value


class SharedMembers(Members):
    """A member table over shared records: behaves as one that holds copies of them all."""

    def __init__(self, myself: Member, fingerprint: Fingerprint) -> None:
        self._shared: dict[NodeId, Member] = {}
        self._forgotten: set[NodeId] = set()  # of the shared members
        super().__init__(myself, fingerprint)

    def found(self, records: SharedRecords) -> None:
        """Starts with these members; this node is one of them."""
        self._shared, self.roster = records.members, records.roster
        self.abroad = dict(records.regions)
        self.near = self.abroad.pop(self.region)
        self.fingerprint.found(records.standings, records.share)

    def __len__(self) -> int:
        if not self._shared:
            return len(self._by_id)
        return len(self._shared) - len(self._forgotten) + sum(node not in self._shared for node in self._by_id)

    def __iter__(self) -> Iterator[Member]:
        yield from self._by_id.values()
        for node, member in self._shared.items():
            if node not in self._by_id and node not in self._forgotten:
                yield member

    def __contains__(self, node: NodeId) -> bool:
        return node in self._by_id or (node in self._shared and node not in self._forgotten)

    def get(self, node: NodeId) -> Member | None:
        member = self._by_id.get(node)
        if member is None and node in self._shared and node not in self._forgotten:
            member = self._by_id[node] = _copied(self._shared[node])
        return member

    def peek(self, node: NodeId) -> Member | None:
        member = self._by_id.get(node)
        return member if member is not None or node in self._forgotten else self._shared.get(node)

    def put(self, member: Member) -> None:
        super().put(member)
        self._forgotten.discard(member.node)

    def forget(self, node: NodeId) -> None:
        super().forget(node)
        if node in self._shared:
            self._forgotten.add(node)


def _copied(member: Member) -> Member:
    """A node's own copy of a shared record, without any measurements."""
    standing = member.epoch, member.incarnation, member.state
    own = Member(member.node, member.description, *standing, member.since, key=member.key, signature=member.signature)
    own.listed_in = member.listed_in
    return own
