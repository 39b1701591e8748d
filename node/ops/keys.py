"""The mesh key in a running node: its ring, the file it lives in, and what peers and operators ask of it.

A peer call `mesh.key` shows a ring (`do` "show") or takes one step of a rotation (`mesh.keys.keyring`, `node.ops.rotation`).
The link is under the mesh key already; a key that travels is sealed once more under one that both sides hold. A node that was
away while keys were changed notices that it cannot read its peers' datagrams, and asks one of them, as long as its own key still
lets it in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog
import trio

from mesh.errors import BadRequest, Refused, RemoteError
from mesh.ids import NodeId
from mesh.keys.keyring import MAX_KEYS, MAX_SERIAL, Keyring, KeyTag, RingError, RingKey, save_keyring, unwrap, wrap
from mesh.keys.seal import KeySeal, SealFault
from mesh.links.tls import PeerTls
from mesh.view import Peer, View
from mesh.wire.calls import CALL_FAILURES, Call, CallReply, Handlers, Header
from node.ops.rotation import RotationPhase, Tags, next_step, unfinished
from node.reports import RotationReport

KIND = "mesh.key"
CALL_S = 3.0
LOOK_S = 1.0  # how often a node looks whether there are datagrams that it cannot read
ASKED_AT_ONCE = 3
RETRY_S = 0.5
PATIENCE_S = 30.0  # for live nodes that do not answer: by then they have, or are dead
LINGER_S = 3.0  # before the old key goes: datagrams on their way, and handshakes that began under it, end before
RENEW_S = 24 * 3600.0  # certificates are fresh each day

log = structlog.get_logger()

_UNREAD = SealFault.WRONG_KEY, SealFault.DAMAGED  # the envelope's name of a key is short: another's may be the same


class MeshKeys:
    """One node's ring, wherever it is in use. Changes reach the seal and the links at once, and the file if it can be written."""

    def __init__(self, ring: Keyring, path: Path, seal: KeySeal, tls: PeerTls, view: Callable[[], View], call: Call) -> None:
        self.ring = ring
        self._path = path
        self._seal, self._tls = seal, tls
        self._view, self._call = view, call
        self.saved = True  # the file holds this ring
        self._rotating = trio.Lock()
        self.handlers: Handlers = {KIND: self._answer}

    async def run(self, dropped: Callable[[SealFault], int]) -> None:
        """Until cancelled. `dropped`: how many datagrams were refused so far, by reason."""
        seen, looks = 0, 0
        await self._catch_up()
        while True:
            await trio.sleep(LOOK_S)
            looks += 1
            if (unread := sum(map(dropped, _UNREAD))) != seen:
                seen = unread
                await self._catch_up()
            if looks % round(RENEW_S / LOOK_S) == 0:
                self._tls.renew()

    async def rotate(self) -> RotationReport:
        """Gives the mesh a new key, or ends the rotation that was begun and left; see `node.ops.rotation`.

        Raises:
            Refused: one is under way from here.
            BadRequest: a live node does not take part. Nothing is lost: asking again goes on from there.
        """
        if self._rotating.locked():
            raise Refused("a rotation is under way from this node; ask again when it has ended")
        async with self._rotating:
            rings = await self._rings({})
            begun = unfinished(rings.values())
            if begun is not None and self.ring.get(begun) is None:
                await self._catch_up()  # another node has it, and shows it to a holder of the old one
            key = self.ring.successor() if begun is None else self.ring.get(begun)
            if key is None:
                raise BadRequest(f"key {begun.name if begun else ''} of a rotation begun elsewhere is out of reach; ask again")
            log.info("key.rotating", key=key.tag.name, begun_before=begun is not None)
            unsaved = await self._bring_to(key, rings)
            log.info("key.rotated", key=key.tag.name)
            return RotationReport(
                key=key.tag.name,
                finished_earlier=begun is not None,
                nodes=sorted(peer.id for peer in self._view().live()),
                not_saved=sorted(unsaved),
            )

    async def _bring_to(self, key: RingKey, rings: dict[NodeId, Tags]) -> set[NodeId]:
        """Step by step, each taken by all live nodes before the next; which of them could not write their key file."""
        unsaved: dict[NodeId, bool] = {}
        runs = {peer.id: peer.epoch for peer in self._view().live()}
        lingered = False
        patience_ends_at = trio.current_time() + PATIENCE_S
        while True:
            now = {peer.id: peer.epoch for peer in self._view().live()}
            rings = {node: tags for node, tags in rings.items() if now.get(node) == runs.get(node)}  # of the same process
            rings |= await self._rings(rings)
            runs = {peer.id: peer.epoch for peer in self._view().live()}
            rings = {node: tags for node, tags in rings.items() if node in runs}
            step = next_step(rings, key.tag)
            if step is None:
                return {node for node, saved in unsaved.items() if not saved}
            if step.phase is RotationPhase.DROP and not lingered:
                await trio.sleep(LINGER_S)
                lingered = True
                continue  # with the live nodes of now
            answers: dict[NodeId, Header] = {}
            async with trio.open_nursery() as nursery:
                for node in step.nodes:
                    nursery.start_soon(self._ask, self._view().peers[node], step.phase, key, answers)
            for node, answer in answers.items():
                rings[node], unsaved[node] = _tags(node, answer), answer.get("saved") is True
            if answers:
                patience_ends_at = trio.current_time() + PATIENCE_S
            elif trio.current_time() > patience_ends_at:
                silent = ", ".join(self._view().peers[node].name or node for node in step.nodes if node in self._view().peers)
                raise BadRequest(
                    f"rotation stopped before step {step.phase.value!r}: no answer from {silent}. Nothing is lost and all keys "
                    "in use stay valid; start or stop these nodes and run mesh key rotate again",
                    code="rotation_unfinished",
                    status=409,
                )
            else:
                await trio.sleep(RETRY_S)

    async def _rings(self, known: dict[NodeId, Tags]) -> dict[NodeId, Tags]:
        """Of all live nodes that are not `known`; waits for those that do not answer until they do or die.

        Raises:
            BadRequest: a live node does not answer.
        """
        found: dict[NodeId, Tags] = {}
        gives_up_at = trio.current_time() + PATIENCE_S
        while missing := [peer for peer in self._view().live() if peer.id not in known and peer.id not in found]:
            answers: dict[NodeId, Header] = {}
            async with trio.open_nursery() as nursery:
                for peer in missing:
                    nursery.start_soon(self._ask, peer, None, None, answers)
            found |= {node: _tags(node, answer) for node, answer in answers.items()}
            if not answers:
                if trio.current_time() > gives_up_at:
                    names = ", ".join(peer.name for peer in missing)
                    raise BadRequest(f"no answer from {names}: start or stop them and run mesh key rotate again", status=409)
                await trio.sleep(RETRY_S)
        return found

    async def _ask(self, peer: Peer, phase: RotationPhase | None, key: RingKey | None, answers: dict[NodeId, Header]) -> None:
        """One call; no entry in `answers` when it fails."""
        request: dict[str, object] = {"do": phase.value if phase else "show", "ring": _told(self.ring)}
        tail = b""
        try:
            if key is not None:
                under = self._shared_with(peer, key) if phase is not RotationPhase.DROP else None
                request |= {"serial": key.tag.serial, "name": key.tag.name, "under": under.tag.name if under else ""}
                tail = wrap(key, under) if under else b""
            header, _ = await self._call(peer.address, KIND, request, tail, timeout_s=CALL_S)
            _tags(peer.id, header)
            answers[peer.id] = header
        except (*CALL_FAILURES, RingError) as error:
            log.warning("key.step_failed", peer=peer.id, step=phase.value if phase else "show", reason=str(error)[:300])

    def _shared_with(self, peer: Peer, key: RingKey) -> RingKey:
        """What `key` is sealed under: the key that this node itself seals with, or, when that is the one, any other."""
        return next((other for other in self.ring.keys if other.tag != key.tag), key)

    async def _answer(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        """One call of a peer. Raises BadRequest: malformed, or no step for this ring."""
        try:
            what = header.get("do")
            if what == "show":
                return self._shown(header)
            tag = KeyTag(_serial(header.get("serial")), str(header.get("name"))[:8])
            match what:
                case RotationPhase.ADD | RotationPhase.USE:
                    self._take(self._unwrapped(tag, header, tail, sender))
                    if what == RotationPhase.USE:
                        self._change(self.ring.use(tag))
                case RotationPhase.DROP:
                    self._change(self.ring.drop_before(tag))
                case _:
                    raise BadRequest(f"expected do: show, add, use or drop, got {str(what)[:20]!r}")
        except RingError as error:
            raise BadRequest(str(error)) from None
        return self._shown({})

    def _unwrapped(self, tag: KeyTag, header: Header, tail: bytes, sender: NodeId) -> RingKey:
        if (known := self.ring.get(tag)) is not None:
            return known
        under = next((key for key in self.ring.keys if key.tag.name == header.get("under")), None)
        if under is None:
            raise RingError(f"the key from {sender} is sealed under one that is not on this ring")
        key = unwrap(tag.serial, tail, under)
        if key.tag != tag:
            raise RingError(f"the key from {sender} is not the one that it is called")
        return key

    def _shown(self, asked: Header) -> CallReply:
        """This ring, as it may be published; and to a peer that holds an older key, the newer ones, sealed under that."""
        reply: dict[str, object] = {"ring": _told(self.ring), "saved": self.saved}
        theirs = _tags_in(asked.get("ring"))
        under = max((key for key in self.ring.keys if key.tag in theirs), key=lambda key: key.tag, default=None)
        if under is not None:
            newer = [key for key in self.ring.keys if key.tag > under.tag]
            reply |= {"under": under.tag.name, "newer": [[key.serial, wrap(key, under)] for key in newer]}
        return reply, b""

    async def _catch_up(self) -> None:
        """Asks a few peers for keys that this node missed. What cannot be had now is asked for again."""
        peers = [peer for peer in self._view().live() if peer.id != self._view().me][:ASKED_AT_ONCE]
        answers: dict[NodeId, Header] = {}
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(self._ask, peer, None, None, answers)
        for peer_id, answer in answers.items():
            try:
                self._learn(answer)
            except (RingError, TypeError, ValueError) as error:
                log.warning("key.answer_refused", peer=peer_id, reason=str(error)[:300])

    def _learn(self, answer: Header) -> None:
        under = next((key for key in self.ring.keys if key.tag.name == answer.get("under")), None)
        newer = answer.get("newer")
        if under is None or not isinstance(newer, list):
            return
        for serial, wrapped in newer[:MAX_KEYS]:
            self._take(unwrap(_serial(serial), bytes(wrapped), under))
        for sealing in _tags_in(answer.get("ring"))[:1]:
            if self.ring.get(sealing) is not None:
                self._change(self.ring.use(sealing))  # the peer seals with it, so all nodes that took part can read it

    def _take(self, key: RingKey) -> None:
        self._change(self.ring.add(key))

    def _change(self, ring: Keyring) -> None:
        if ring == self.ring and self.saved:
            return
        if ring != self.ring:
            log.info("key.ring", keys=[tag.name for tag in ring.tags])
            self.ring = ring
            self._seal.install(ring.secrets)
            self._tls.install(ring.secrets)
        try:
            save_keyring(self._path, ring)
            self.saved = True
        except OSError as error:
            self.saved = False
            log.error("key.not_saved", file=str(self._path), reason=error.strerror)


def _told(ring: Keyring) -> list[list[int | str]]:
    return [[tag.serial, tag.name] for tag in ring.tags]


def _serial(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SERIAL:
        raise RingError(f"a key's serial is a number up to {MAX_SERIAL}, got {str(value)[:20]!r}")
    return value


def _tags_in(received: object) -> Tags:
    """Returns the ring that a peer sent; empty when it is none."""
    if not isinstance(received, list) or len(received) > MAX_KEYS:
        return ()
    tags = []
    for entry in received:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) and len(entry[1]) == 8):
            return ()
        tags.append(KeyTag(_serial(entry[0]), entry[1]))
    return tuple(tags)


def _tags(node: NodeId, answer: Header) -> Tags:
    """Raises RemoteError when the answer names no ring."""
    if not (tags := _tags_in(answer.get("ring"))):
        raise RemoteError(node, "its answer names no keys")
    return tags
