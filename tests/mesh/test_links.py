"""Links over real loopback sockets."""

import functools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from mesh.errors import BadRequest, DeadlineExceeded, PeerLost, Refused, RemoteError
from mesh.ids import NodeId
from mesh.keys.mesh_key import new_key
from mesh.keys.signing import IdentityKey
from mesh.links.link import PROTOCOL_VERSION, LinkConfig
from mesh.links.links import CALLS_AT_ONCE, Links
from mesh.links.tls import PeerTls
from mesh.view import Load
from mesh.wire.calls import CallReply, Header
from mesh.wire.frames import Frame, encode


async def start(nursery: trio.Nursery, name: str, cluster: str = "mesh", **more: Any) -> Links:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    links = Links(LinkConfig(NodeId(name), listener.socket.getsockname()[:2], cluster), **more)
    await nursery.start(links.run, listener)
    return links


@asynccontextmanager
async def two_nodes(**more: Any) -> AsyncIterator[tuple[Links, Links]]:
    async with trio.open_nursery() as nursery:
        a, b = await start(nursery, "a", **more), await start(nursery, "b")
        with trio.fail_after(10):
            yield a, b
        nursery.cancel_scope.cancel()


async def echo(sender: NodeId, header: Header, tail: bytes) -> CallReply:
    return {"sender": sender, **header}, tail[::-1]


async def test_a_call_is_answered_with_header_and_tail() -> None:
    async with two_nodes() as (a, b):
        b.add({"echo": echo})

        assert await a.call(b.config.address, "echo", {"x": 1}, b"abc") == ({"sender": "a", "x": 1}, b"cba")


async def test_many_calls_share_one_link_and_answers_may_come_out_of_order() -> None:
    async with two_nodes() as (a, b):
        release = trio.Event()

        async def slow(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            await release.wait()
            return {}, b""

        b.add({"echo": echo, "slow": slow})
        async with trio.open_nursery() as calls:
            calls.start_soon(a.call, b.config.address, "slow", {})
            for n in range(100):
                header, _ = await a.call(b.config.address, "echo", {"n": n})
                assert header["n"] == n
            release.set()

        assert a.counters.links_opened_total == 1


async def test_one_way_frames_arrive_in_order() -> None:
    async with two_nodes() as (a, b):
        got, done = [], trio.Event()

        def receive(sender: NodeId, header: Header, tail: bytes) -> None:
            got.append(header["n"])
            if len(got) == 500:
                done.set()

        b.add(receivers={"count": receive})
        for n in range(500):
            a.post(b.config.address, "count", {"n": n})
        await done.wait()

        assert got == list(range(500))


@pytest.mark.parametrize(
    "raised", [Refused("busy", 0.25), BadRequest("bad", "field", "code", 404), DeadlineExceeded("late"), RemoteError("c", "no")]
)
async def test_what_a_handler_raises_reaches_the_caller_as_the_same_error(raised: Exception) -> None:
    async with two_nodes() as (a, b):

        async def fail(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            raise raised

        b.add({"fail": fail})
        with pytest.raises(type(raised)) as caught:
            await a.call(b.config.address, "fail", {})
        if isinstance(caught.value, Refused):
            assert caught.value.retry_after_s == 0.25
        if isinstance(caught.value, BadRequest):
            assert (caught.value.param, caught.value.status) == ("field", 404)


async def test_a_bug_in_a_handler_is_answered_and_the_link_stays() -> None:
    async with two_nodes() as (a, b):

        async def bug(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            raise KeyError("missing")

        b.add({"bug": bug, "echo": echo})
        with pytest.raises(RemoteError):
            await a.call(b.config.address, "bug", {})
        await a.call(b.config.address, "echo", {})

        assert b.counters.handler_failures_total == 1


async def test_a_lost_peer_fails_waiting_calls_at_once_and_is_announced() -> None:
    lost = []
    async with trio.open_nursery() as nursery:
        a = await start(nursery, "a", on_lost=lambda node, address, reason: lost.append(node))
        started = trio.Event()

        async def hang(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            started.set()
            await trio.sleep_forever()
            raise AssertionError("sleeps for ever")

        async with trio.open_nursery() as other:
            b = await start(other, "b")
            b.add({"hang": hang})

            async def kill() -> None:
                await started.wait()
                other.cancel_scope.cancel()

            nursery.start_soon(kill)
            with pytest.raises(PeerLost), trio.fail_after(5):
                await a.call(b.config.address, "hang", {}, timeout_s=60)
        await trio.testing.wait_all_tasks_blocked()

        assert lost == ["b"]
        nursery.cancel_scope.cancel()


async def test_a_call_to_a_closed_port_raises_peer_lost_with_a_reason() -> None:
    async with two_nodes() as (a, _):
        with trio.socket.socket() as unused:
            await unused.bind(("127.0.0.1", 0))
            with pytest.raises(PeerLost, match="no node listens"):
                await a.call(unused.getsockname(), "echo", {})


async def test_another_cluster_label_is_refused_with_a_reason() -> None:
    async with trio.open_nursery() as nursery:
        a, b = await start(nursery, "a", cluster="red"), await start(nursery, "b", cluster="blue")
        with pytest.raises(PeerLost, match="two meshes"), trio.fail_after(5):
            await a.call(b.config.address, "echo", {})
        nursery.cancel_scope.cancel()


async def test_a_server_that_is_no_mesh_node_is_reported_as_such() -> None:
    async def http(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        a = await start(nursery, "a")
        [listener] = await nursery.start(functools.partial(trio.serve_tcp, http, 0, host="127.0.0.1"))
        with pytest.raises(PeerLost, match="not a mesh node"), trio.fail_after(5):
            await a.call(listener.socket.getsockname()[:2], "echo", {})
        nursery.cancel_scope.cancel()


async def test_garbage_on_an_inbound_link_is_counted_and_the_node_keeps_running() -> None:
    async with two_nodes() as (a, b):
        b.add({"echo": echo})
        stream = await trio.open_tcp_stream(*b.config.address)
        await stream.send_all(b"\xff" * 64)
        assert await stream.receive_some() == b""
        await stream.aclose()
        await a.call(b.config.address, "echo", {})

        assert b.counters.frames_rejected_total == 1


async def test_every_frame_carries_the_senders_load() -> None:
    received_loads = {}
    async with trio.open_nursery() as nursery:
        a = await start(
            nursery, "a", load=lambda: Load(running=3), on_load=lambda node, load: received_loads.update({node: load.running})
        )
        b = await start(
            nursery, "b", load=lambda: Load(running=7), on_load=lambda node, load: received_loads.update({node: load.running})
        )
        b.add({"echo": echo})
        await a.call(b.config.address, "echo", {})

        assert received_loads == {"a": 3, "b": 7}
        nursery.cancel_scope.cancel()


async def test_a_late_answer_after_the_deadline_changes_nothing() -> None:
    async with two_nodes() as (a, b):
        go = trio.Event()

        async def slow(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            await go.wait()
            return {}, b""

        b.add({"slow": slow, "echo": echo})
        with pytest.raises(DeadlineExceeded):
            await a.call(b.config.address, "slow", {}, timeout_s=0.05)
        go.set()
        assert (await a.call(b.config.address, "echo", {"n": 5}))[0]["n"] == 5


async def test_a_call_to_oneself_needs_no_network() -> None:
    async with two_nodes() as (a, _):
        a.add({"echo": echo})

        assert (await a.call(a.config.address, "echo", {}))[0] == {"sender": "a"}
        assert a.counters.links_opened_total == 0


async def test_a_kept_link_is_reported_at_both_ends_and_its_end_once() -> None:
    async with trio.open_nursery() as nursery:
        linked, ended = [], []
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        b = Links(LinkConfig(NodeId("b"), listener.socket.getsockname()[:2]), on_linked=lambda node: linked.append(("b", node)))
        scope = trio.CancelScope()

        async def run_b(*, task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await b.run(listener, task_status=task_status)

        await nursery.start(run_b)
        lost = trio.Event()

        def note_lost(*end: object) -> None:
            ended.append(end[:2])
            lost.set()

        a = await start(
            nursery,
            "a",
            on_linked=lambda node: linked.append(("a", node)),
            on_lost=note_lost,
        )
        with trio.fail_after(10):
            a.keep([b.config.address, a.config.address])
            a.keep([b.config.address])
            while len(linked) < 2:
                await trio.testing.wait_all_tasks_blocked(0.001)
            scope.cancel()
            await lost.wait()
        assert sorted(linked) == [("a", "b"), ("b", "a")]
        assert ended == [("b", b.config.address)]
        nursery.cancel_scope.cancel()


async def test_a_failed_kept_link_is_reported_only_when_a_call_waits() -> None:
    async with trio.open_nursery() as nursery:
        ended = []
        a = await start(nursery, "a", on_lost=lambda *end: ended.append(end[:2]))
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        unused = listener.socket.getsockname()[:2]
        await listener.aclose()
        with trio.fail_after(10):
            a.keep([unused])
            while a.counters.links_lost_total == 0:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert ended == []
            with pytest.raises(PeerLost):
                await a.call(unused, "echo", {})
            while not ended:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert ended == [(None, unused)]
        nursery.cancel_scope.cancel()


HELLO = {"version": PROTOCOL_VERSION, "cluster": "mesh", "node": "other"}


@pytest.mark.parametrize("broken", [lambda header: header["rows"][0], lambda header: header["rows"].get(1)])
async def test_a_one_way_frame_that_raises_in_its_receiver_is_counted(
    broken: Callable[[Header], None],
) -> None:
    async with two_nodes() as (a, b):
        b.add({"echo": echo}, {"rows": lambda sender, header, tail: broken(header)})
        a.post(b.config.address, "rows", {"rows": []})
        await a.call(b.config.address, "echo", {})

        assert b.counters.frames_rejected_total == 1


@pytest.mark.parametrize("hello", [HELLO | {"version": ["x" * 3000]}, HELLO | {"cluster": "x" * 3000}, HELLO | {"node": 5}])
async def test_a_hello_of_another_kind_is_refused_with_a_short_reason(hello: dict[str, object]) -> None:
    async with two_nodes() as (_, b):
        stream = await trio.open_tcp_stream(*b.config.address)
        await stream.send_all(encode(Frame("hello", hello)))

        assert 0 < len(await stream.receive_some(10_000)) < 500
        await stream.aclose()
        assert b.counters.handshakes_refused_total == 1


@pytest.mark.parametrize("hello", [Frame("hello", HELLO | {"padding": "x" * 5000}), Frame("hello", HELLO, b"tail")])
async def test_an_unauthenticated_peer_cannot_occupy_more_memory_than_a_hello(hello: Frame) -> None:
    async with two_nodes() as (_, b):
        stream = await trio.open_tcp_stream(*b.config.address)
        await stream.send_all(encode(hello)[:100])  # its lengths alone suffice to refuse it

        assert await stream.receive_some() == b""
        await stream.aclose()
        assert b.counters.frames_rejected_total == 1


async def test_an_answer_over_the_frame_limits_raises_and_the_link_stays() -> None:
    async with two_nodes() as (a, b):

        async def large(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            return {"text": "x" * (5 << 20)}, b""

        async def verbose(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            raise BadRequest("x" * (5 << 20))

        b.add({"large": large, "verbose": verbose, "echo": echo})
        with pytest.raises(RemoteError, match="too large"):
            await a.call(b.config.address, "large", {})
        with pytest.raises(BadRequest, match=r"^x+$"):
            await a.call(b.config.address, "verbose", {})
        await a.call(b.config.address, "echo", {})


async def test_answers_that_a_peer_does_not_read_stop_its_calls() -> None:
    async with two_nodes() as (_, b):
        taken = 0

        async def large(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            nonlocal taken
            taken += 1
            return {}, bytes(64 << 10)

        b.add({"large": large})
        stream = await trio.open_tcp_stream(*b.config.address)
        await stream.send_all(encode(Frame("hello", HELLO)))
        await stream.receive_some()
        with trio.move_on_after(2):  # the writes block once no call is read any more
            for number in range(1, 40_000):
                await stream.send_all(encode(Frame("large", {"padding": "x" * 2000}, number=number)))
        await stream.aclose()

        assert taken <= 4 * CALLS_AT_ONCE  # running, in the channel, in the socket's buffers


@pytest.mark.parametrize(
    ("sent", "received"), [(math.nan, 1.0), (math.inf, 3600.0), (-1.0, 0.0), (2**64 - 1, 3600.0), ("soon", 1.0), (0.5, 0.5)]
)
async def test_the_retry_wait_of_a_peer_is_clipped_to_valid_numbers(sent: object, received: float) -> None:
    async with two_nodes() as (a, b):

        async def busy(sender: NodeId, header: Header, tail: bytes) -> CallReply:
            return {"error": {"type": "Refused", "message": "busy", "retry_after_s": sent, "quota": True}}, b""

        b.add({"busy": busy})
        with pytest.raises(Refused) as refused:
            await a.call(b.config.address, "busy", {})
        assert (refused.value.retry_after_s, refused.value.quota) == (received, True)


@pytest.mark.parametrize("host", ["a..b", "\udc80", "x" * 300, ""])
async def test_an_invalid_host_raises_peer_lost(host: str) -> None:
    async with two_nodes() as (a, _):
        with pytest.raises(PeerLost):
            await a.call((host, 1), "echo", {})


@pytest.mark.parametrize(
    ("caller_keys", "reason"),
    [([b"o" * 32], "it has another mesh key, or one that was rotated away"), (None, "TLS handshake failed")],
)
async def test_refused_callers_are_reported_with_a_reason_and_connect_checks_are_not(
    caller_keys: list[bytes] | None, reason: str
) -> None:
    callee, caller = IdentityKey(b"r" * 32), IdentityKey(b"c" * 32)
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listener.socket.getsockname()[:2]
        keyed = Links(LinkConfig(callee.node, address, "mesh", PeerTls([b"k" * 32], callee)))
        other = Links(LinkConfig(caller.node, ("", 0), "mesh", PeerTls(caller_keys, caller) if caller_keys else None))
        await nursery.start(keyed.run, listener)
        await nursery.start(other.run, (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0])
        await (await trio.open_tcp_stream(*address)).aclose()
        with pytest.raises(PeerLost), trio.fail_after(5):
            await other.call(address, "echo", {})
        with trio.fail_after(5):
            while not (refused := keyed.refusals.recent(trio.current_time())):
                await trio.sleep(0.01)
        assert [(refusal.host, refusal.count) for refusal in refused] == [("127.0.0.1", 1)]
        assert refused[0].reason.startswith(reason)
        assert other.refusals.recent(trio.current_time()) != []
        nursery.cancel_scope.cancel()


async def test_a_node_must_answer_with_the_id_in_its_certificate() -> None:
    key = new_key()
    real, claimed, caller = IdentityKey(b"r" * 32), NodeId("1" * 16), IdentityKey(b"c" * 32)
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listener.socket.getsockname()[:2]
        pretender = Links(LinkConfig(claimed, address, "mesh", PeerTls([key], real)))
        honest = Links(LinkConfig(caller.node, ("", 0), "mesh", PeerTls([key], caller)))
        await nursery.start(pretender.run, listener)
        await nursery.start(honest.run, (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0])
        with pytest.raises(PeerLost, match=f"certificate is of node {real.node}"), trio.fail_after(5):
            await honest.call(address, "echo", {})
        nursery.cancel_scope.cancel()
