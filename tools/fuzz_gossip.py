"""Feeds mutated datagrams to the gossip decoder, and what still decodes to a membership core.

`python -m tools.fuzz_gossip corpus` writes the corpus anew: real messages of a simulated mesh, and nasty ones made by hand.
`python -m tools.fuzz_gossip run --seconds 600 [--seed N]` mutates it for so long; an input that breaks a rule is written
to the corpus as `found-*.bin`, and the exit code is 1. A short run of the same is in the tests.
The rules: the decoder gives a message or BadDatagram, nothing else; what it refuses changes nothing; a core survives whatever
it gives, uses its deadline up, and its answers fit their datagrams.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import SendDatagram
from membership.simulation.network import Network
from membership.simulation.nodes import SimNode
from membership.simulation.signer import StandInSigner
from mesh.ids import Address, NodeId
from mesh.view import Load
from mesh.wire import datagram_codec
from mesh.wire.gossip import MAX_MESSAGE_BYTES, Alive, BadDatagram, Claim, GossipMessage, Left
from mesh.wire.load import pack_load
from mesh.wire.statements import alive_statement, left_statement

CORPUS = Path(__file__).parent.parent / "tests" / "membership" / "corpus"
_ODD_BYTES = bytes(
    [0x00, 0x01, 0x7F, 0x80, 0x90, 0xA0, 0xC0, 0xC1, 0xC4, 0xC6, 0xC7, 0xCA, 0xCB, 0xCF, 0xD3, 0xD9, 0xDB, 0xDC, 0xDD, 0xDF, 0xFF]
)
_ODD_RUNS = (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\x7f\xff\xff\xff", b"\xcb\x7f\xf8" + bytes(6), b"\x91" * 64)
_VALUES_SHARE = 0.4
_FRESH_AFTER = 200  # messages taken by one core: then a new one, so that none is poisoned for good


class Subject:
    """A core that takes what decodes; `take` raises whatever rule an input breaks."""

    def __init__(self) -> None:
        self.messages = self.refused = 0
        self._now = 0.0
        self._core = _core()

    def take(self, raw: bytes) -> None:
        """Raises AssertionError, or what the decoder or the core should not have raised."""
        try:
            message = datagram_codec.decode(raw)
        except BadDatagram:
            self.refused += 1
            return
        self.messages += 1
        if self.messages % _FRESH_AFTER == 0:
            self._core, self._now = _core(), 0.0
        self._now += 0.01
        effects = self._core.receive(("10.9.9.9", 7000), message, self._now)
        effects += self._core.tick(self._now)
        assert self._core.deadline > self._now, "a tick that leaves its deadline where it was is called for ever"
        for effect in effects:
            if isinstance(effect, SendDatagram):
                sent = datagram_codec.encode(effect.message)
                assert len(sent) <= MAX_MESSAGE_BYTES, f"an answer of {len(sent)} bytes"
                assert isinstance(datagram_codec.decode(sent), GossipMessage), "what we send, we can read"


def _core() -> MembershipCore:
    me = Alive(NodeId("0" * 16), 1, 0, "subject", "10.0.0.1", 7000)
    return MembershipCore(me, StandInSigner(me.node), MembershipConfig(members_max=64), Random(1), 0.0)


def mutated(seeds: list[bytes], rng: Random) -> bytes:
    """One of `seeds`, changed in one to four ways: its bytes, or the values in it."""
    chosen = rng.choice(seeds)
    if rng.random() < _VALUES_SHARE and (other := _with_other_values(chosen, rng)) is not None:
        return other
    raw = bytearray(chosen)
    for _ in range(rng.randint(1, 4)):
        rng.choice(_MUTATIONS)(raw, seeds, rng)
    return bytes(raw)


def _with_other_values(raw: bytes, rng: Random) -> bytes | None:
    """Returns the message with a few values replaced and its claims signed by the nodes that they name; None: it is invalid."""
    try:
        parts = msgspec.to_builtins(datagram_codec.decode(raw))
        for _ in range(rng.randint(1, 4)):
            _replace_a_value(parts, rng)
        message = msgspec.convert(parts, GossipMessage)
        return datagram_codec.encode(_signed(message))
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError):
        return None


def _replace_a_value(parts: list[Any], rng: Random) -> None:
    within = parts
    while (nested := [part for part in within if isinstance(part, list) and part]) and rng.random() < 0.8:
        within = rng.choice(nested)
    at = rng.randrange(len(within))
    match within[at]:
        case bool():
            within[at] = not within[at]
        case int():
            within[at] = rng.choice((0, 1, within[at] + 1, max(0, within[at] - 1), 2**31, 2**32, 2**48, 2**48 - 1))
        case float():
            within[at] = rng.choice((0.0, -1.0, 1e300, float("nan"), float("inf")))
        case str() as text:
            within[at] = rng.choice(("", "0" * 16, "f" * 16, text[::-1], "\0", "é" * 8, "refused", "a", "s", "d", "l"))
        case list() as some:
            within[at] = some + some if rng.random() < 0.7 else []
        case _:
            within[at] = rng.choice((None, b"", b"\xff" * 22, bytes(22)))


def _signed(message: GossipMessage) -> GossipMessage:
    """Signs each own claim with the key of the node that it names: an attacker may have any key but those of others."""
    claims: list[Claim] = []
    for claim in message.claims:
        if isinstance(claim, Alive | Left):
            signer = StandInSigner(claim.node)
            statement = alive_statement(claim) if isinstance(claim, Alive) else left_statement(claim)
            claim = msgspec.structs.replace(claim, signature=signer.sign(statement))
            if isinstance(claim, Alive):
                claim = msgspec.structs.replace(claim, key=signer.public_key)
        claims.append(claim)
    return msgspec.structs.replace(message, claims=tuple(claims))


def _flip(raw: bytearray, seeds: list[bytes], rng: Random) -> None:
    if raw:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def _replace(raw: bytearray, seeds: list[bytes], rng: Random) -> None:
    if raw:
        raw[rng.randrange(len(raw))] = rng.choice(_ODD_BYTES)


def _insert(raw: bytearray, seeds: list[bytes], rng: Random) -> None:
    at = rng.randint(0, len(raw))
    raw[at:at] = rng.choice(_ODD_RUNS) if rng.random() < 0.3 else bytes([rng.randrange(256)])


def _delete(raw: bytearray, seeds: list[bytes], rng: Random) -> None:
    at = rng.randint(0, len(raw))
    del raw[at : at + rng.randint(1, 8)]


def _repeat(raw: bytearray, seeds: list[bytes], rng: Random) -> None:
    at = rng.randint(0, len(raw))
    raw[at:at] = raw[at : at + rng.randint(1, 40)]


def _splice(raw: bytearray, seeds: list[bytes], rng: Random) -> None:
    other = rng.choice(seeds)
    raw[rng.randint(0, len(raw)) :] = other[rng.randint(0, len(other)) :]


_MUTATIONS: tuple[Callable[[bytearray, list[bytes], Random], None], ...] = (_flip, _replace, _insert, _delete, _repeat, _splice)


def seeds() -> list[bytes]:
    """The corpus, in an order that depends on nothing."""
    return [path.read_bytes() for path in sorted(CORPUS.glob("*.bin"))]


def real_messages() -> dict[str, bytes]:
    """The longest of each kind that a stormy mesh of our own sends, in its order of kinds."""
    longest: dict[str, bytes] = {}
    network = Network(7, loss=0.1)
    send = network._send

    def watch(it: SimNode, to: Address, message: GossipMessage) -> None:
        kind, datagram = type(message).__name__.lower(), datagram_codec.encode(message)
        if len(datagram) > len(longest.get(kind, b"")):
            longest[kind] = datagram
        send(it, to, message)

    network._send = watch  # type: ignore[method-assign]
    ids = network.grow(10)
    network.crash(ids[3])
    network.run(2)
    network.kill(ids[4])
    network.run(6)
    network.leave(ids[5])
    network.run(2)
    return {f"real-{kind}": raw for kind, raw in sorted(longest.items())}


def nasty_messages() -> dict[str, bytes]:
    """Made by hand: what an attacker, a broken disk or another version would send."""
    pack = msgspec.msgpack.encode
    node, reader = b"\xaa" * 8, bytes(8)
    load = pack_load(Load(), 0)

    def head(kind: int, counters: bytes = b"\1\0", load: bytes = load) -> bytes:
        return bytes((kind,)) + node + bytes(8) + load + bytes(2) + counters

    def gossip_of(*claims: object) -> bytes:
        return head(5) + pack([list(claims)])

    return {
        "nasty-empty": b"",
        "nasty-head-cut-off": head(5)[:-1],
        "nasty-array-of-4-billion": head(5) + b"\xdd\xff\xff\xff\xff",
        "nasty-never-used": head(5) + b"\xc1",
        "nasty-deep": head(5) + b"\x91" * 1200,
        "nasty-deep-map": head(5) + b"\x81\xa1a" * 400,
        "nasty-map-not-array": head(5) + pack({"claims": []}),
        "nasty-no-claims": head(5) + pack([]),
        "nasty-extension": gossip_of(msgspec.msgpack.Ext(1, b"x" * 20)),
        "nasty-kind-0": head(0),
        "nasty-kind-255": head(255),
        "nasty-load-of-255": head(5, load=b"\xff" * len(load)),
        "nasty-counter-without-an-end": head(5, counters=b"\xff" * 20),
        "nasty-counter-longer-than-it-needs": head(5, counters=b"\x80\x00\0"),
        "nasty-epoch-at-its-bound": gossip_of(["a", node, 2**48, 2**48, "n", "h", 1, ""]),
        "nasty-sender-at-its-bound": head(5, counters=2 * (b"\xff" * 6 + b"\x3f")),
        "nasty-about-the-reader": gossip_of(["d", reader, 1, 2**48, node], ["s", reader, 1, 5, node], ["l", reader, 9, 9]),
        "nasty-own-word-for-the-reader": gossip_of(["a", reader, 7, 7, "me", "10.0.0.1", 1, ""]),
        "nasty-surrogates": gossip_of(["a", node, 1, 1, "n", "h", 1, ""]).replace(b"\xa1n", b"\xa3\xed\xa0\x80"),
        "nasty-host-of-nul": gossip_of(["a", node, 1, 1, "\0", "\0", 0, "\0"]),
        "nasty-id-of-7": gossip_of(["l", node[:7], 1, 1]),
        "nasty-id-is-text": gossip_of(["l", "a" * 16, 1, 1]),
        "nasty-by-nobody": gossip_of(["s", node, 1, 1]),
        "nasty-tag-is-a-list": gossip_of([[], node, 1, 1]),
        "nasty-too-many-claims": gossip_of(*[["l", node, 1, 1]] * 50),
        "nasty-ping-without-target": head(1) + bytes(4),
        "nasty-ping-for-another": head(1) + b"\xff" * 4 + b"\xbb" * 8 + pack([[], b"\xff" * 22]),
        "nasty-where-too-long": head(2) + bytes(4) + pack([[], b"x" * 40]),
        "nasty-where-is-text": head(2) + bytes(4) + pack([[], "x" * 22]),
        "nasty-refused-is-7": head(7) + bytes(4) + b"\7",
        "nasty-one-byte-too-long": b"\xdc" * (MAX_MESSAGE_BYTES + 1),
        "nasty-trailing": gossip_of() + b"\x00",
    }


def write_corpus() -> int:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for path in CORPUS.glob("*.bin"):
        if not path.name.startswith("found-"):
            path.unlink()
    made = real_messages() | nasty_messages()
    for name, raw in made.items():
        (CORPUS / f"{name}.bin").write_bytes(raw)
    return len(made)


def fuzz(seed: int, until: Callable[[int], bool], subject: Subject) -> bytes | None:
    """Returns the first input that breaks a rule, from `seed` on; None once `until`, given the number of inputs, is true."""
    rng, corpus, tried = Random(seed), seeds(), 0
    while not until(tried):
        raw = mutated(corpus, rng)
        tried += 1
        try:
            subject.take(raw)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            print(f"input {tried} of seed {seed} breaks a rule: {error!r}", file=sys.stderr)
            return raw
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["corpus", "run"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.what == "corpus":
        print(json.dumps({"written": write_corpus()}))
        return
    ends_at, subject = time.monotonic() + given.seconds, Subject()
    found = fuzz(given.seed, lambda tried: time.monotonic() > ends_at, subject)
    print(json.dumps({"seed": given.seed, "messages": subject.messages, "refused": subject.refused, "found": found is not None}))
    if found is not None:
        (CORPUS / f"found-{hashlib.blake2b(found, digest_size=6).hexdigest()}.bin").write_bytes(found)
        sys.exit(1)


if __name__ == "__main__":
    main()
