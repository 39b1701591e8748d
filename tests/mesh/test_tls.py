"""Mutual TLS from one mesh key, or from the keys of a ring during a rotation."""

from __future__ import annotations

import ssl

import pytest
import trio
import trio.testing
from cryptography import x509

from mesh.errors import RemoteError
from mesh.keys.signing import IdentityKey
from mesh.links.tls import Authority, PeerTls, authority, mint, peer_node, why_impostor

KEY, OTHER = b"k" * 32, b"o" * 32
SERVER, CLIENT, LIAR = IdentityKey(b"5" * 32), IdentityKey(b"c" * 32), IdentityKey(b"x" * 32)


TlsStream = trio.SSLStream[trio.abc.Stream]


def pair(server: PeerTls, client: PeerTls) -> tuple[TlsStream, TlsStream]:
    left: trio.abc.Stream
    right: trio.abc.Stream
    left, right = trio.testing.memory_stream_pair()
    called: TlsStream = trio.SSLStream(left, client.client, server_hostname=client.server_name)
    return called, trio.SSLStream(right, server.server, server_side=True)


async def shake(server: PeerTls, client: PeerTls) -> list[Exception]:
    """Returns the errors of a handshake and one byte each way; none when each side authenticates the other."""
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
    client, server = pair(PeerTls([KEY], SERVER), PeerTls([KEY], CLIENT))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    assert (peer_node(client), peer_node(server)) == (SERVER.node, CLIENT.node)
    assert why_impostor(client, SERVER.node) is None
    assert client.version() == "TLSv1.3"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"hello")
        assert await server.receive_some(5) == b"hello"


async def test_nodes_of_two_keys_refuse_one_another() -> None:
    assert await shake(PeerTls([KEY], SERVER), PeerTls([OTHER], CLIENT)) != []
    assert await shake(PeerTls([OTHER], SERVER), PeerTls([KEY], CLIENT)) != []
    assert await shake(PeerTls([KEY], SERVER), PeerTls([KEY], CLIENT)) == []


@pytest.mark.parametrize("server", [[KEY], [KEY, OTHER], [OTHER, KEY], [OTHER]])
@pytest.mark.parametrize("client", [[KEY], [KEY, OTHER], [OTHER, KEY], [OTHER]])
async def test_in_every_phase_of_a_rotation_nodes_with_each_others_keys_connect(server: list[bytes], client: list[bytes]) -> None:
    believed = await shake(PeerTls(server, SERVER), PeerTls(client, CLIENT)) == []
    assert believed is (client[0] in server and not set(client).isdisjoint(server))


async def test_a_node_with_the_old_key_connects_while_that_key_is_trusted() -> None:
    assert await shake(PeerTls([OTHER, KEY], SERVER), PeerTls([KEY], CLIENT)) == []


async def test_a_link_outlives_the_key_it_began_with() -> None:
    rotated = PeerTls([KEY], SERVER)
    client, server = pair(rotated, PeerTls([KEY], CLIENT))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    rotated.install([OTHER])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"still here")
        assert await server.receive_some(10) == b"still here"
    assert await shake(rotated, PeerTls([KEY], CLIENT)) != []


async def test_a_holder_of_the_mesh_key_cannot_pretend_to_be_another_node() -> None:
    """It can mint whatever it likes, with any name on it: the handshake proves which key it is."""
    client, server = pair(PeerTls([KEY], LIAR), PeerTls([KEY], CLIENT))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    assert why_impostor(client, SERVER.node) == f"the certificate is of node {LIAR.node}"


async def test_a_caller_without_a_certificate_is_refused() -> None:
    bare = PeerTls([KEY], CLIENT)
    bare.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.client.check_hostname = False
    bare.client.load_verify_locations(cadata=authority(KEY).der)
    assert await shake(PeerTls([KEY], SERVER), bare) != []


async def test_an_older_tls_is_refused() -> None:
    old = PeerTls([KEY], CLIENT)
    old.client.minimum_version = ssl.TLSVersion.TLSv1_2
    old.client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await shake(PeerTls([KEY], SERVER), old) != []


def test_the_authority_is_the_same_bytes_on_every_node() -> None:
    assert authority(KEY).der == authority(KEY).der
    assert authority(KEY).der != authority(OTHER).der
    assert "key=" not in repr(authority(KEY))


async def test_a_renewed_node_still_talks_with_a_new_certificate() -> None:
    server = PeerTls([KEY], SERVER)
    serials = []
    for _ in range(2):
        client, server_stream = pair(server, PeerTls([KEY], CLIENT))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server_stream.do_handshake)
        serials.append(client.getpeercert()["serialNumber"])
        server.renew()
    assert serials[0] != serials[1]


def test_a_certificate_is_for_the_key_that_a_node_is() -> None:
    signer: Authority = authority(KEY)
    certificate = x509.load_pem_x509_certificate(mint(signer, SERVER)[0])
    assert certificate.public_key() == SERVER.private.public_key()
    certificate.verify_directly_issued_by(signer.certificate)


@pytest.mark.parametrize("der", [None, b"", b"\x30\x03garbage", authority(KEY).der[:-9]])
def test_an_invalid_certificate_has_no_node(der: bytes | None) -> None:
    class Stranger:
        def getpeercert(self, binary_form: bool) -> bytes | None:
            return der

    with pytest.raises(RemoteError, match="of no node"):
        peer_node(Stranger())
