"""Replays a trace on a new core: the changes of its view, and whether it answers each input as recorded."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import MemberChanged, MembershipEffect
from membership.trace import trace_format
from membership.trace.recording import answer_to_newcomer
from membership.trace.trace_format import BadTrace, TraceRecord, answer_hash
from mesh.errors import MeshError
from mesh.ids import Address, NodeId
from mesh.keys.signing import Ed25519Verifier, SignatureVerifier
from mesh.view import PeerState

_NOWHERE: Address = ("", 0)


@dataclass(frozen=True, slots=True)
class TracedEvent:
    """A change in the node's view. `at_s`: by its own clock."""

    at_s: float
    node: NodeId
    name: str
    before: PeerState | None
    after: PeerState
    cause: str


@dataclass(slots=True)
class Replay:
    """`exact`: it began with the node's first input. `differs_at`: then, the first input answered otherwise."""

    exact: bool
    inputs: int = 0
    agreed: int = 0
    differs_at: int | None = None
    began_s: float = 0.0
    ended_s: float = 0.0
    events: list[TracedEvent] = field(default_factory=list)


@dataclass(slots=True)
class ReplaySigner:
    """Returns the signatures that the trace holds; it has no key."""

    public_key: bytes
    verifier: SignatureVerifier
    signatures: deque[bytes] = field(default_factory=deque)

    def sign(self, statement: bytes) -> bytes:
        return self.signatures.popleft() if self.signatures else bytes(64)


def replay(records: list[TraceRecord], verifier: SignatureVerifier | None = None) -> Replay:
    """Replays the records on a new core. `verifier`: of their signatures, unless they are real ones.

    Raises:
        BadTrace: it begins with neither a start nor a checkpoint, or holds what no core survives.
    """
    try:
        return _replayed(records, verifier or Ed25519Verifier())
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MeshError, TypeError, ValueError) as error:
        raise BadTrace(f"the trace leads its core astray: {error!r}") from None


def _replayed(records: list[TraceRecord], verifier: SignatureVerifier) -> Replay:
    first = records[0]
    signer = ReplaySigner(b"", verifier, deque(first.signatures))
    core = _made(first.input, signer)
    found = Replay(isinstance(first.input, trace_format.StartInput), 1, 1, None, first.input.now, first.input.now)
    for number, record in enumerate(records[1:], 1):
        signer.signatures = deque(record.signatures)
        answer, effects = _play(core, record.input)
        found.inputs += 1
        if answer_hash(answer) == record.answer:
            found.agreed += 1
        elif found.exact and found.differs_at is None:
            found.differs_at = number
        found.ended_s = max(found.ended_s, record.input.now)
        found.events += _events(core, effects, found.ended_s)
    return found


def _made(first: trace_format.Input, signer: ReplaySigner) -> MembershipCore:
    match first:
        case trace_format.StartInput(now=now, me=me, public_key=public_key, config=config, seed=seed):
            signer.public_key = public_key
            return MembershipCore(me, signer, _config(config), Random(seed), now)
        case trace_format.CheckpointInput(now=now, me=me, seed=seed, known=known, linked=linked, seeds=seeds):
            signer.public_key = me.key
            core = MembershipCore(me, signer, MembershipConfig(), Random(seed), now)
            core.learn(_NOWHERE, known, now)
            for node in linked:
                core.linked(node)
            for address in seeds:
                core.remember_seed(address)
            core.rng.seed(seed)
            return core
        case _:
            raise BadTrace("expected a trace that begins with a start or a checkpoint")


def _config(given: dict[str, float]) -> MembershipConfig:
    """Builds the recorded config. Raises TypeError for an unknown field, ValueError for a value out of bounds."""
    whole = {name: int(value) if isinstance(getattr(MembershipConfig(), name), int) else value for name, value in given.items()}
    return MembershipConfig(**whole)  # type: ignore[arg-type]


def _play(core: MembershipCore, given: trace_format.Input) -> tuple[object, list[MembershipEffect]]:
    """Gives the core one input; returns its answer, and the effects in it."""
    answer: object = None
    effects: list[MembershipEffect] = []
    match given:
        case trace_format.DatagramInput(now=now, source=source, message=message, arrived_at=arrived_at):
            answer = effects = core.receive(source, message, now, arrived_at)
        case trace_format.TickInput(now=now):
            answer = effects = core.tick(now)
        case trace_format.LoadInput(now=now, load=load):
            core.set_load(load, now)
        case trace_format.LoadNotedInput(now=now, node=node, load=load):
            answer = core.note_load(node, load, now)
        case trace_format.LinkUpInput(node=node):
            core.linked(node)
        case trace_format.LinkLostInput(now=now, node=node, proven=proven):
            answer = effects = core.lost(node, now, proven=proven)
        case trace_format.StreamAnsweredInput(now=now, seq=seq, by=by):
            answer = effects = core.stream_answered(seq, by, now)
        case trace_format.ConnectTriedInput(now=now, number=number, refused=refused):
            answer = effects = core.tried(number, refused, now)
        case trace_format.FactsPublishedInput(now=now, facts=facts):
            answer = effects = core.publish(facts, now)
        case trace_format.SyncAskedInput(now=now, asker=asker, sync=sync):
            answer = synced, effects = core.answer(asker, sync, now)
        case trace_format.SyncAnsweredInput(now=now, source=source, synced=synced):
            answer = _, effects = core.learn(source, synced, now)
        case trace_format.SeedKnownInput(address=address):
            core.remember_seed(address)
        case trace_format.TwinAskedInput(now=now, by=by):
            answer = _, effects = core.twin_asked(by, now)
        case trace_format.TwinFoundInput(now=now, place=place, answer=found):
            answer = effects = core.twin_found(place, found, now)
        case trace_format.LeaveInput(now=now):
            answer = effects = core.leave(now)
        case trace_format.CheckpointInput(now=now, seed=seed):
            answer_to_newcomer(core, now)
            core.rng.seed(seed)
        case trace_format.StartInput():
            raise BadTrace("expected one start, at the beginning")
    return answer, effects


def _events(core: MembershipCore, effects: list[MembershipEffect], at_s: float) -> list[TracedEvent]:
    events = []
    for effect in effects:
        if isinstance(effect, MemberChanged) and (effect.before is not effect.after or effect.restarted or effect.stalled):
            member = core.swim.members.get(effect.node)
            name, cause = (member.name, member.cause) if member is not None else ("", "")
            events.append(TracedEvent(at_s, effect.node, name, effect.before, effect.after, cause))
    return events
