"""Links over real loopback sockets."""

import functools
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from mesh.errors import BadRequest, DeadlineExceeded, PeerLost, Refused, RemoteError
from mesh.ids import NodeId
from mesh.links import LinkConfig, Links
from mesh.view import Load


async def start(nursery, name, cluster="mesh", **more):
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    links = Links(LinkConfig(NodeId(name), listener.socket.getsockname()[:2], cluster), **more)
    await nursery.start(links.run, listener)
    return links


@asynccontextmanager
async def two_nodes(**more):
    async with trio.open_nursery() as nursery:
        a, b = await start(nursery, "a", **more), await start(nursery, "b")
        with trio.fail_after(10):
            yield a, b
        nursery.cancel_scope.cancel()


async def echo(sender, header, tail):
    return {"sender": sender, **header}, tail[::-1]


async def test_a_call_is_answered_with_header_and_tail():
    async with two_nodes() as (a, b):
        b.add({"echo": echo})

        assert await a.call(b.config.address, "echo", {"x": 1}, b"abc") == ({"sender": "a", "x": 1}, b"cba")


async def test_many_calls_share_one_link_and_answers_may_come_out_of_order():
    async with two_nodes() as (a, b):
        release = trio.Event()

        async def slow(sender, header, tail):
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


async def test_one_way_frames_arrive_in_order():
    async with two_nodes() as (a, b):
        got, done = [], trio.Event()

        def receive(sender, header, tail):
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
async def test_what_a_handler_raises_reaches_the_caller_as_the_same_error(raised):
    async with two_nodes() as (a, b):

        async def fail(sender, header, tail):
            raise raised

        b.add({"fail": fail})
        with pytest.raises(type(raised)) as caught:
            await a.call(b.config.address, "fail", {})
        if isinstance(raised, Refused):
            assert caught.value.retry_after_s == 0.25
        if isinstance(raised, BadRequest):
            assert (caught.value.param, caught.value.status) == ("field", 404)


async def test_a_bug_in_a_handler_is_answered_and_the_link_lives_on():
    async with two_nodes() as (a, b):

        async def bug(sender, header, tail):
            return header["missing"], b""

        b.add({"bug": bug, "echo": echo})
        with pytest.raises(RemoteError):
            await a.call(b.config.address, "bug", {})
        await a.call(b.config.address, "echo", {})

        assert b.counters.handler_failures_total == 1


async def test_a_lost_peer_fails_waiting_calls_at_once_and_is_announced():
    lost = []
    async with trio.open_nursery() as nursery:
        a = await start(nursery, "a", on_lost=lambda node, address, reason: lost.append(node))
        started = trio.Event()

        async def hang(sender, header, tail):
            started.set()
            await trio.sleep_forever()

        async with trio.open_nursery() as other:
            b = await start(other, "b")
            b.add({"hang": hang})

            async def kill():
                await started.wait()
                other.cancel_scope.cancel()

            nursery.start_soon(kill)
            with pytest.raises(PeerLost), trio.fail_after(5):
                await a.call(b.config.address, "hang", {}, timeout_s=60)
        await trio.testing.wait_all_tasks_blocked()

        assert lost == ["b"]
        nursery.cancel_scope.cancel()


async def test_nobody_listening_is_peer_lost_with_a_reason():
    async with two_nodes() as (a, _):
        with trio.socket.socket() as unused:
            await unused.bind(("127.0.0.1", 0))
            with pytest.raises(PeerLost, match="no node listens"):
                await a.call(unused.getsockname(), "echo", {})


async def test_another_cluster_label_is_refused_in_plain_words():
    async with trio.open_nursery() as nursery:
        a, b = await start(nursery, "a", cluster="red"), await start(nursery, "b", cluster="blue")
        with pytest.raises(PeerLost, match="two meshes"), trio.fail_after(5):
            await a.call(b.config.address, "echo", {})
        nursery.cancel_scope.cancel()


async def test_a_server_that_is_no_mesh_node_is_named_so():
    async def http(stream):
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        a = await start(nursery, "a")
        [listener] = await nursery.start(functools.partial(trio.serve_tcp, http, 0, host="127.0.0.1"))
        with pytest.raises(PeerLost, match="not a mesh node"), trio.fail_after(5):
            await a.call(listener.socket.getsockname()[:2], "echo", {})
        nursery.cancel_scope.cancel()


async def test_garbage_on_an_inbound_link_is_counted_and_the_node_lives():
    async with two_nodes() as (a, b):
        b.add({"echo": echo})
        stream = await trio.open_tcp_stream(*b.config.address)
        await stream.send_all(b"\xff" * 64)
        assert await stream.receive_some() == b""
        await stream.aclose()
        await a.call(b.config.address, "echo", {})

        assert b.counters.frames_rejected_total == 1


async def test_every_frame_carries_the_senders_load():
    heard = {}
    async with trio.open_nursery() as nursery:
        a = await start(nursery, "a", load=lambda: Load(running=3), on_load=lambda node, load: heard.update({node: load.running}))
        b = await start(nursery, "b", load=lambda: Load(running=7), on_load=lambda node, load: heard.update({node: load.running}))
        b.add({"echo": echo})
        await a.call(b.config.address, "echo", {})

        assert heard == {"a": 3, "b": 7}
        nursery.cancel_scope.cancel()


async def test_a_late_answer_after_the_deadline_changes_nothing():
    async with two_nodes() as (a, b):
        go = trio.Event()

        async def slow(sender, header, tail):
            await go.wait()
            return {}, b""

        b.add({"slow": slow, "echo": echo})
        with pytest.raises(DeadlineExceeded):
            await a.call(b.config.address, "slow", {}, timeout_s=0.05)
        go.set()
        assert (await a.call(b.config.address, "echo", {"n": 5}))[0]["n"] == 5


async def test_a_call_to_oneself_needs_no_network():
    async with two_nodes() as (a, _):
        a.add({"echo": echo})

        assert (await a.call(a.config.address, "echo", {}))[0] == {"sender": "a"}
        assert a.counters.links_opened_total == 0


async def test_a_kept_link_is_told_of_at_both_ends_and_its_end_costs_nobody_an_answer():
    async with trio.open_nursery() as nursery:
        told, ended = [], []
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        b = Links(LinkConfig(NodeId("b"), listener.socket.getsockname()[:2]), on_linked=lambda node: told.append(("b", node)))
        scope = trio.CancelScope()

        async def run_b(*, task_status):
            with scope:
                await b.run(listener, task_status=task_status)

        await nursery.start(run_b)
        lost = trio.Event()
        a = await start(
            nursery,
            "a",
            on_linked=lambda node: told.append(("a", node)),
            on_lost=lambda *end: (ended.append(end[:2]), lost.set()),
        )
        with trio.fail_after(10):
            a.keep([b.config.address, a.config.address])
            a.keep([b.config.address])
            while len(told) < 2:
                await trio.testing.wait_all_tasks_blocked(0.001)
            scope.cancel()
            await lost.wait()
        assert sorted(told) == [("a", "b"), ("b", "a")]
        assert ended == [("b", None)]
        nursery.cancel_scope.cancel()


async def test_a_kept_link_that_never_comes_about_is_nobodys_loss_but_a_calls_is():
    async with trio.open_nursery() as nursery:
        ended = []
        a = await start(nursery, "a", on_lost=lambda *end: ended.append(end[:2]))
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nobody = listener.socket.getsockname()[:2]
        await listener.aclose()
        with trio.fail_after(10):
            a.keep([nobody])
            while a.counters.links_lost_total == 0:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert ended == []
            with pytest.raises(PeerLost):
                await a.call(nobody, "echo", {})
            while not ended:
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert ended == [(None, nobody)]
        nursery.cancel_scope.cancel()
