"""Mutual TLS out of one key."""

from __future__ import annotations

import ssl

import pytest
import trio
import trio.testing

from mesh.errors import RemoteError
from mesh.ids import NodeId
from mesh.tls import authority, client_context, mint, peer_node, renew, server_context

KEY, OTHER = b"k" * 32, b"o" * 32
SERVER, CLIENT = NodeId("5" * 16), NodeId("c" * 16)


TlsStream = trio.SSLStream[trio.abc.Stream]


def pair(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[TlsStream, TlsStream]:
    left, right = trio.testing.memory_stream_pair()
    return trio.SSLStream(left, client), trio.SSLStream(right, server, server_side=True)


async def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> list[Exception]:
    """What either side raised on a handshake and one byte each way; none when both believe the other."""
    raised: list[Exception] = []
    client_stream, server_stream = pair(server, client)

    async def talk(stream: TlsStream) -> None:
        try:
            await stream.do_handshake()
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b"x"
        except (trio.BrokenResourceError, AssertionError) as error:
            raised.append(error)
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, client_stream)
        nursery.start_soon(talk, server_stream)
    return raised


async def test_two_nodes_of_one_key_talk_and_know_who_the_other_is() -> None:
    client, server = pair(server_context(KEY, SERVER), client_context(KEY, CLIENT))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    assert (peer_node(client), peer_node(server)) == (SERVER, CLIENT)
    assert client.version() == "TLSv1.3"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"hello")
        assert await server.receive_some(5) == b"hello"


async def test_nodes_of_two_keys_refuse_one_another() -> None:
    assert await shake(server_context(KEY, SERVER), client_context(OTHER, CLIENT)) != []
    assert await shake(server_context(OTHER, SERVER), client_context(KEY, CLIENT)) != []
    assert await shake(server_context(KEY, SERVER), client_context(KEY, CLIENT)) == []


async def test_a_caller_without_a_certificate_is_refused() -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.load_verify_locations(cadata=authority(KEY).der)
    assert await shake(server_context(KEY, SERVER), bare) != []


async def test_an_older_tls_is_refused() -> None:
    old = client_context(KEY, CLIENT)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await shake(server_context(KEY, SERVER), old) != []


def test_the_authority_is_the_same_bytes_on_every_node() -> None:
    assert authority(KEY).der == authority(KEY).der
    assert authority(KEY).der != authority(OTHER).der
    assert "key=" not in repr(authority(KEY))


async def test_a_renewed_context_still_talks_with_a_new_certificate() -> None:
    server = server_context(KEY, SERVER)
    serials = []
    for _ in range(2):
        client, server_stream = pair(server, client_context(KEY, CLIENT))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server_stream.do_handshake)
        serials.append(client.getpeercert()["serialNumber"])
        renew(server, KEY, SERVER)
    assert serials[0] != serials[1]


def test_only_node_ids_get_certificates() -> None:
    with pytest.raises(ValueError, match="16 hex digits"):
        mint(authority(KEY), NodeId("someone else"))


def test_a_certificate_without_a_node_is_no_peer() -> None:
    class Stranger:
        def getpeercert(self) -> dict[str, object]:
            return {"subject": ((("commonName", "example.org"),),)}

    with pytest.raises(RemoteError, match="names no node"):
        peer_node(Stranger())
