"""The same server behind TLS."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from node.http.app import make_app
from node.http.limits import Limits
from node.http.server import Server, serve
from tests.http.fake_node import HANG, FakeNode, saying
from tests.http.served import parse_reply, read_all

STREAM = b'{"stream": true, "messages": [{"role": "user", "content": "hi"}]}'
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"


@pytest.fixture
def contexts(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context with a certificate for localhost, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(pem, key_file)
    return ours, ssl.create_default_context(cafile=str(pem))


async def test_streams_hang_ups_stalls_and_plain_http_behind_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    ours, theirs = contexts
    big = saying(["x" * 60_000] * 2_000)
    node = FakeNode([saying(), [*saying()[:3], HANG], big])
    app = make_app(node, auth=None, bound=("127.0.0.1", 0))
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    listeners = [trio.SSLListener(listener, ours, https_compatible=True)]

    async def connect() -> trio.SSLStream[trio.SocketStream]:
        return await trio.open_ssl_over_tcp_stream("127.0.0.1", port, https_compatible=True, ssl_context=theirs)

    theirs.check_hostname = False  # the name is localhost, the address a number
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[Server]) -> None:
            await serve(app, listeners, Limits(head_s=0.3, linger_s=0.1), task_status=task_status)

        server = await nursery.start(run)
        async with await connect() as client:
            await client.send_all(REQUEST % (len(STREAM), STREAM))
            reply = parse_reply(await read_all(client), "POST")
        assert reply.whole and reply.events()[-1] == "[DONE]"

        client = await connect()  # hangs up in mid-stream
        await client.send_all(REQUEST % (len(STREAM), STREAM))
        await client.receive_some(10)
        await trio.aclose_forcefully(client)
        with trio.fail_after(2):
            while node.open_generations:  # the server learns of it from the network
                await trio.sleep(0.005)

        async with await trio.open_tcp_stream("127.0.0.1", port) as plain:  # speaks HTTP where TLS is expected
            await plain.send_all(b"GET / HTTP/1.1\r\n\r\n")
            with trio.fail_after(2):
                await read_all(plain)

        client = await connect()  # stops reading, and the server is cancelled
        await client.send_all(REQUEST % (len(STREAM), STREAM))
        await client.receive_some(10)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert int(node.open_generations) == 1 and server.statistics().connections == 1
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 1
    assert node.open_generations == 0
    await trio.aclose_forcefully(client)
