"""The fuzz target on the decoder and its corpus, run for a moment; `python -m tools.fuzz_gossip run` runs it for long."""

from __future__ import annotations

import pytest

from mesh.wire.datagram_codec import decode
from mesh.wire.gossip import Ack, BadDatagram, ConnectCheck, ConnectChecked, Gossip, Nack, Ping, PingReq
from tools.fuzz_gossip import CORPUS, Subject, fuzz, nasty_messages, seeds

ITERATIONS = 6000


def test_the_corpus_holds_every_kind_of_message_as_it_is_on_the_wire_today() -> None:
    real = {type(decode(path.read_bytes())) for path in CORPUS.glob("real-*.bin")}
    assert real == {Ping, Ack, PingReq, Nack, Gossip, ConnectCheck, ConnectChecked}
    assert {path.stem for path in CORPUS.glob("nasty-*.bin")} == set(nasty_messages())


@pytest.mark.parametrize("name", sorted(nasty_messages()))
def test_a_nasty_message_is_taken_or_refused_and_never_worse(name: str) -> None:
    raw = nasty_messages()[name]
    assert (CORPUS / f"{name}.bin").read_bytes() == raw
    Subject().take(raw)


@pytest.mark.parametrize("seed", range(2))
def test_the_decoder_and_the_core_survive_mutations_of_the_corpus(seed: int) -> None:
    subject = Subject()
    assert fuzz(seed, lambda tried: tried >= ITERATIONS, subject) is None
    assert subject.messages > 300 and subject.refused > 300, "both ways are walked"


def test_every_input_ever_found_is_survived_now() -> None:
    subject = Subject()
    for raw in seeds():
        subject.take(raw)


def test_the_target_finds_a_decoder_that_lets_a_wrong_error_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(raw: bytes) -> object:
        try:
            return decode(raw)
        except BadDatagram as error:
            raise UnicodeDecodeError("utf-8", raw, 0, 1, str(error)) from None

    monkeypatch.setattr("mesh.wire.datagram_codec.decode", leaky)
    assert fuzz(1, lambda tried: tried >= 200, Subject()) is not None
