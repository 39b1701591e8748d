"""Makes and answers the calls of `mesh.wire.twin`: the shell around `membership.core.twins`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable

import msgspec
import trio

from membership.core.core import MembershipCore
from membership.core.effects import FindTwin, MembershipEffect, ProcessDisplaced, TwinSeen
from mesh.errors import BadRequest, MeshError
from mesh.ids import Address, NodeId
from mesh.keys.signing import Signer
from mesh.view import View
from mesh.wire.calls import Call, CallReply, Handlers, Header
from mesh.wire.twin import CHALLENGE_BYTES, TWIN_KIND, WHERE_KIND, ProcessRun, SignedAnswer, TwinAnswer, TwinQuestion, statement

CALL_TIMEOUT_S = 2.0
ASKED_AT_START = 8  # seeds; more would give no other answer


class TwinCalls:
    """`start`: runs a call in the background; `settle`: carries out what the core answers.

    `on_seen` is called with every other live process of this identity; `on_displaced` with the one that displaces this.
    """

    def __init__(
        self,
        me: NodeId,
        signer: Signer,
        call: Call,
        view: Callable[[], View],
        core: MembershipCore,
        start: Callable[..., None],
        settle: Callable[[list[MembershipEffect]], None],
    ) -> None:
        self._me, self._signer, self._call, self._view = me, signer, call, view
        self._core, self._start, self._settle = core, start, settle
        self.handlers: Handlers = {TWIN_KIND: self._on_twin, WHERE_KIND: self._on_where}
        self.on_seen: Callable[[ProcessRun], None] = lambda twin: None
        self.on_displaced: Callable[[ProcessRun], None] = lambda by: None

    def carry_out(self, effect: MembershipEffect) -> None:
        """Carries out the effects of `membership.core.twins`; ignores any other."""
        match effect:
            case FindTwin(to=place):
                self._start(self._find, place)
            case TwinSeen(run=twin):
                self.on_seen(twin)
            case ProcessDisplaced(by=by):
                self.on_displaced(by)

    async def _find(self, place: Address) -> None:
        answer = await self.ask(place)
        self._settle(self._core.twin_found(place, answer, trio.current_time()))

    def _run(self) -> ProcessRun:
        return self._core.swim.refutation.twins.run(trio.current_time())

    async def ask(self, place: Address) -> TwinAnswer | None:
        """Returns the verified answer of a process with this node's key at `place`; None: there is none."""
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        question = msgspec.to_builtins(TwinQuestion(challenge, self._run()), builtin_types=(bytes,))
        try:
            header, _ = await self._call(place, TWIN_KIND, question, timeout_s=CALL_TIMEOUT_S)
            signed = msgspec.convert(header, SignedAnswer)
        except (MeshError, msgspec.ValidationError):
            return None
        said = statement(self._me, challenge, signed.answer)
        return signed.answer if self._signer.verifier.holds(self._signer.public_key, said, signed.signature) else None

    async def older_elsewhere(self, seeds: Iterable[Address]) -> ProcessRun | None:
        """Returns a live process of this identity known to one of the `seeds`. Called at the start, before anything is sent."""
        own = self._run().address
        places: set[Address] = set()
        found: list[ProcessRun] = []

        async def look(seed: Address) -> None:
            place = await self._where(seed)
            if place is None or place == own or place in places:
                return
            places.add(place)
            answer = await self.ask(place)
            if answer is not None and answer.run.address != own and answer.run.age_s >= self._run().age_s:
                found.append(answer.run)

        async with trio.open_nursery() as nursery:
            for seed in list(dict.fromkeys(seeds))[:ASKED_AT_START]:
                if seed != own:
                    nursery.start_soon(look, seed)
        return min(found, key=lambda run: run.address, default=None)

    async def _where(self, seed: Address) -> Address | None:
        try:
            header, _ = await self._call(seed, WHERE_KIND, {"node": self._me}, timeout_s=CALL_TIMEOUT_S)
        except MeshError:
            return None  # the join reports why
        host, port = header.get("host"), header.get("port")
        return (host, port) if isinstance(host, str) and type(port) is int and 0 < port < 65536 else None

    async def _on_twin(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        try:
            question = msgspec.convert(header, TwinQuestion)
        except msgspec.ValidationError as error:
            raise BadRequest(f"no question of a twin: {error}") from None
        if sender != self._me:
            raise BadRequest(f"{sender} is not {self._me}: only a process of the same node may ask")
        answer, effects = self._core.twin_asked(question.run, trio.current_time())
        self._settle(effects)
        signature = self._signer.sign(statement(self._me, question.challenge, answer))
        return msgspec.to_builtins(SignedAnswer(answer, signature), builtin_types=(bytes,)), b""

    async def _on_where(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        view, node = self._view(), header.get("node")
        if not isinstance(node, str) or not view.is_live(NodeId(node)):
            return {}, b""
        host, port = view.peers[NodeId(node)].address
        return {"host": host, "port": port}, b""
