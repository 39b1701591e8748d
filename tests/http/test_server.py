"""The server on raw sockets: framing, deadlines, stalled readers, drain, cancellation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from node.http.connection import AsgiMessage
from node.http.errors import ClientGone
from node.http.limits import Limits
from node.requests import TextDelta
from tests.http.fake_node import HANG, FakeNode, saying, started
from tests.http.served import Served, parse_replies, parse_reply, read_all, served, serving

CHAT_BODY = b'{"messages": [{"role": "user", "content": "hi"}]}'
STREAM_BODY = b'{"stream": true, "messages": [{"role": "user", "content": "hi"}]}'
SHORT = Limits(head_s=0.1, body_s=0.1, keep_alive_s=0.1, write_s=0.2, linger_s=0.2)


def post(body: bytes, *extra: str, path: str = "/v1/chat/completions") -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *extra]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def exchange(site: Served, raw: bytes) -> bytes:
    """Everything that comes back for `raw`, the client's side left open."""
    async with await site.connect() as client:
        await client.send_all(raw)
        return await read_all(client)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # a TLS hello
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost : localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nhost: localhost\r\nexpect: a-pony\r\ncontent-length: 1\r\n\r\n", 417),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 9_000 + b"\r\n", 431),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (post(b"", "x: y").replace(b"content-length: 0", b"content-length: 99999999"), 413),
    ],
)
async def test_broken_framing_is_answered_in_the_error_form_and_ends_the_connection(raw: bytes, status: int) -> None:
    async with served(limits=Limits(linger_s=0.05)) as site:
        reply = parse_reply(await exchange(site, raw))
        assert reply.status == status
        assert reply.error["message"] and reply.headers["x-request-id"] and reply.headers["x-mesh-node"]
        assert (await site.ask("GET", "/health")).status == 200


async def test_a_chunked_body_beyond_the_limit_is_refused_while_it_is_still_coming() -> None:
    async with served(limits=Limits(body_bytes=100_000, linger_s=0.05)) as site:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        reply = parse_reply(await exchange(site, head + (b"4000\r\n" + b"a" * 0x4000 + b"\r\n") * 8))
    assert reply.status == 413 and reply.error["code"] == "body_too_large"


async def test_a_client_that_sends_its_large_body_to_the_end_still_reads_why_it_was_refused() -> None:
    async with served(limits=Limits(body_bytes=100_000)) as site, await site.connect() as client:
        await client.send_all(post(b"x" * 8_000_000))
        await client.send_eof()
        reply = parse_reply(await read_all(client), "POST")
    assert reply.status == 413


async def test_the_bodies_of_all_requests_together_are_bounded_and_given_back() -> None:
    async with served(FakeNode([[started(), HANG]]), Limits(bodies_bytes=120, linger_s=0.05)) as site:
        async with await site.connect() as first:
            await first.send_all(post(STREAM_BODY))
            await first.receive_some(1)
            assert site.server.statistics().bodies_bytes == len(STREAM_BODY)
            reply = await site.ask("POST", "/v1/chat/completions", STREAM_BODY)
            assert reply.status == 503 and reply.headers["retry-after"]
        with trio.fail_after(2):
            await site.node.left.wait()
        assert (await site.ask("POST", "/v1/chat/completions", STREAM_BODY)).status == 200
        assert site.server.statistics().bodies_bytes == 0


async def test_a_chunked_upload_arrives_whole() -> None:
    async with served() as site:
        pieces = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in (CHAT_BODY[:7], CHAT_BODY[7:]))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        reply = parse_reply(await exchange(site, head + pieces + b"0\r\nx-trailer: 1\r\n\r\n"))
    assert reply.status == 200


async def test_slow_heads_and_bodies_get_408_and_a_silent_connection_just_ends() -> None:
    async with served(limits=SHORT) as site:
        head = parse_reply(await exchange(site, b"GET / HT"))
        body = parse_reply(await exchange(site, post(CHAT_BODY)[:-3]))
        silent = await exchange(site, b"")
        idle = parse_replies(await exchange(site, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"), ["GET"])
    assert head.status == 408 and head.error["code"] == "request_timeout"
    assert body.status == 408 and body.error["code"] == "request_timeout"
    assert silent == b""
    assert [reply.status for reply in idle] == [200]


@pytest.mark.parametrize("kept_alive", [False, True])
async def test_a_head_that_trickles_does_not_outlive_its_deadline(kept_alive: bool) -> None:
    async with served(limits=replace(SHORT, keep_alive_s=60)) as site, await site.connect() as client:
        if kept_alive:
            await client.send_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await client.receive_some(4096)

        async def trickle() -> None:
            try:
                while True:
                    await client.send_all(b"x")
                    await trio.sleep(0.01)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            with trio.fail_after(3):
                reply = parse_reply(await read_all(client))
            nursery.cancel_scope.cancel()
    assert reply.status == 408


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with served() as site:
        get = b"GET %b HTTP/1.1\r\nhost: localhost\r\n\r\n"
        last = b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        raw = post(CHAT_BODY) + get % b"/health" + post(STREAM_BODY) + last
        replies = parse_replies(await exchange(site, raw), ["POST", "GET", "POST", "GET"])
    assert [reply.status for reply in replies] == [200, 200, 200, 404]
    assert replies[0].json()["object"] == "chat.completion"
    assert replies[2].events()[-1] == "[DONE]"


async def test_a_client_that_pipelines_more_than_is_read_ahead_just_waits() -> None:
    node = FakeNode([saying(pause_s=0.02)])
    async with served(node, Limits(pipelined_bytes=5_000)) as site, await site.connect() as client:
        get = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        await client.send_all(post(CHAT_BODY) + get * 400 + get.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        replies = parse_replies(await read_all(client), ["POST"] + ["GET"] * 401)
    assert replies[0].json()["usage"]["completion_tokens"] == 5
    assert [reply.status for reply in replies] == [200] * 402


async def test_a_body_nobody_wanted_does_not_become_the_next_request() -> None:
    async with served() as site:
        smuggled = b"GET /mesh/status HTTP/1.1\r\nhost: localhost\r\n\r\n"
        raw = post(smuggled, path="/nowhere") + b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        replies = parse_replies(await exchange(site, raw), ["POST", "GET"])
    assert [reply.status for reply in replies] == [404, 200]
    assert replies[1].json()["status"] == "ok"


async def test_expect_100_continue_is_answered_before_the_body_is_sent() -> None:
    async with served() as site, await site.connect() as client:
        request = post(CHAT_BODY, "expect: 100-continue", "connection: close")
        await client.send_all(request[: -len(CHAT_BODY)])
        assert (await client.receive_some(4096)).startswith(b"HTTP/1.1 100 ")
        await client.send_all(CHAT_BODY)
        assert parse_reply(await read_all(client)).status == 200


async def test_a_refused_upload_is_never_asked_for() -> None:
    async with served(limits=SHORT) as site:
        raw = post(CHAT_BODY, "expect: 100-continue", path="/nowhere")[: -len(CHAT_BODY)]
        reply = await exchange(site, raw)
    assert b" 100 " not in reply and parse_reply(reply).status == 404


async def test_head_has_the_headers_of_get_and_no_body() -> None:
    async with served() as site:
        got, head = await site.ask("GET", "/health"), await site.ask("HEAD", "/health")
        missing = await site.ask("HEAD", "/nowhere")
    assert head.status == 200 and head.body == b"" and head.headers["content-length"] == got.headers["content-length"]
    assert missing.status == 404 and missing.body == b""


async def test_http_1_0_gets_a_stream_that_ends_with_the_connection() -> None:
    async with served() as site:
        head = f"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: {len(STREAM_BODY)}\r\n\r\n"
        raw = await exchange(site, head.encode() + STREAM_BODY)
    assert b"transfer-encoding" not in raw.lower() and raw.endswith(b"data: [DONE]\n\n")


async def test_an_absolute_target_is_served_by_its_path() -> None:
    async with served() as site:
        raw = b"GET http://localhost/health?x=1 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        assert parse_reply(await exchange(site, raw)).status == 200


async def test_cancelling_a_server_whose_client_stopped_reading_is_immediate_and_runs_the_cleanup() -> None:
    node = FakeNode([saying(["x" * 60_000] * 2_000)])
    async with served(node) as site, await site.connect() as client:
        await client.send_all(post(STREAM_BODY))
        await client.receive_some(1)
        await trio.testing.wait_all_tasks_blocked(0.05)  # the server's writer among them: the buffers are full
        assert node.open_generations == 1
        began = trio.current_time()
        site.scope.cancel()
        with trio.fail_after(2):
            await site.stopped.wait()
        assert trio.current_time() - began < 1
        assert node.open_generations == 0


async def test_a_reader_that_stalls_longer_than_the_write_deadline_is_dropped() -> None:
    node = FakeNode([saying(["x" * 60_000] * 2_000)])
    async with served(node, SHORT) as site, await site.connect() as client:
        await client.send_all(post(STREAM_BODY))
        with trio.fail_after(5):
            await node.left.wait()
        assert site.server.statistics().stalled_readers_total == 1
        raw = await read_all(client)
        assert not parse_reply(raw, "POST").whole


async def test_nothing_follows_a_chunk_that_was_torn_by_a_failure() -> None:
    huge = TextDelta(0, "x" * 20_000_000, (1,), 1)
    node = FakeNode([[started(), huge, 0.1, RuntimeError("while the writer waits for its reader")]])
    async with served(node) as site, await site.connect() as client:
        await client.send_all(post(STREAM_BODY))
        with trio.fail_after(5):
            await node.left.wait()
        raw = await read_all(client)
    assert not parse_reply(raw, "POST").whole
    assert b"error" not in raw


async def test_drain_lets_a_stream_end_and_closes_idle_connections_at_once() -> None:
    node = FakeNode([saying(pause_s=0.02)])
    async with served(node) as site, await site.connect() as idle, await site.connect() as streaming:
        await idle.send_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await idle.receive_some(4096)
        await streaming.send_all(post(STREAM_BODY))
        first = bytes(await streaming.receive_some(4096))
        site.server.drain(within_s=5)
        with trio.fail_after(1):
            assert await idle.receive_some(4096) == b""
        with pytest.raises(OSError):
            while True:
                await (await site.connect()).aclose()
                await trio.sleep(0.001)
        reply = parse_reply(first + await read_all(streaming), "POST")
        assert reply.whole and reply.events()[-1] == "[DONE]"
        with trio.fail_after(1):
            await site.stopped.wait()


async def test_a_stream_that_outlives_the_drain_is_cut_without_its_end() -> None:
    node = FakeNode([[*saying()[:3], HANG]])
    async with served(node) as site, await site.connect() as client:
        await client.send_all(post(STREAM_BODY))
        first = bytes(await client.receive_some(4096))
        site.server.drain(within_s=0.05)
        with trio.fail_after(2):
            reply = parse_reply(first + await read_all(client), "POST")
        assert not reply.whole and b"error" not in reply.body
        assert node.open_generations == 0


async def test_one_connection_too_many_is_told_so() -> None:
    async with served(limits=Limits(connections=1)) as site:
        async with await site.connect() as first:
            await first.send_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await first.receive_some(4096)
            reply = await site.ask("GET", "/health")
            assert reply.status == 503 and reply.error["code"] == "overloaded"
            assert int(reply.headers["retry-after"]) >= 1
        await trio.testing.wait_all_tasks_blocked(0.01)  # the server has seen the first one close
        assert (await site.ask("GET", "/health")).status == 200


async def test_an_application_that_stops_in_the_middle_leaves_an_answer_that_is_not_whole() -> None:
    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async with serving(half) as (_, port, *_):
        async with await trio.open_tcp_stream("127.0.0.1", port) as client:
            await client.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            reply = parse_reply(await read_all(client))
    assert reply.body == b"half" and not reply.whole


async def test_the_application_hears_of_a_disconnect_and_can_send_no_more() -> None:
    heard: list[AsgiMessage] = []
    over = trio.Event()

    async def patient(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        heard.append(await receive())
        with pytest.raises(ClientGone):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"late"})
        over.set()

    async with serving(patient) as (_, port, *_):
        client = await trio.open_tcp_stream("127.0.0.1", port)
        await client.send_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await client.aclose()
        with trio.fail_after(2):
            await over.wait()
    assert heard == [{"type": "http.disconnect"}]
