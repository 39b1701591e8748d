"""One node's documents over its life: restarts, damage, large registries, and what it refuses."""

from __future__ import annotations

import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from mesh.errors import BadRequest, Refused
from rag import report
from rag.wire import Summary
from tests.rag.fakes import HashingEmbedder
from tests.rag.small_mesh import small_mesh


@pytest.fixture
def jumping_clock() -> MockClock:
    """Jumps when all have been idle for a moment: disk threads are not seen by the clock, and mostly end within it."""
    return MockClock(autojump_threshold=0.02)


async def test_a_node_alone_keeps_everything_over_a_restart(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 1) as mesh:
        await mesh[0].create_store("pages")
        file = await mesh[0].put_file("a.md", b"# Otters\n\nOtters swim.\n")
        await mesh[0].attach("pages", file.id)
        before = await mesh[0].search("pages", "otters", 5)
        mesh.sites[0].clock_error_s = -30.0  # the clock went back while the node was down
        await mesh.kill(0)
        await mesh.start(0)
        assert await mesh[0].search("pages", "otters", 5) == before
        assert mesh[0].store("pages").documents == 1
        await mesh[0].delete_file(file.id)
        assert await mesh[0].files() == await mesh[0].store_files("pages") == []


async def test_a_damaged_file_is_moved_aside_and_refilled_by_peers(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh[0].create_store("pages")
        ids = {(await mesh[0].put_file(f"{n}.md", f"text number {n}".encode())).id for n in range(8)}
        for file_id in ids:
            await mesh[0].attach("pages", file_id)
        gone = await mesh[0].put_file("gone.md", b"to be deleted")
        await mesh[0].attach("pages", gone.id)
        await mesh.kill(2)
        await mesh[0].delete_file(gone.id)
        store = mesh[0].store("pages").id
        damaged = mesh.sites[2].directory / f"{store}.sqlite"
        await trio.to_thread.run_sync(damaged.write_bytes, b"noise" * 5000)
        await mesh.start(2)
        assert mesh[2].statistics().damaged_files == 1
        await mesh.agree(store)
        assert {file.id for file in await mesh[2].store_files("pages")} == ids
        assert await trio.Path(mesh.sites[2].directory / f"{store}.sqlite.damaged-1").exists()


async def test_a_lost_registry_comes_back_from_gossip(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh[0].create_store("pages")
        await mesh.kill(2)
        for path in await trio.to_thread.run_sync(lambda: list(mesh.sites[2].directory.glob("registry*"))):
            await trio.Path(path).unlink()
        await mesh.start(2)
        await trio.sleep(2)
        assert mesh[2].store("pages").name == "pages"


async def test_a_registry_too_large_for_gossip_still_reaches_a_newcomer(
    tmp_path: Path, jumping_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MAX_PUBLISHED_BYTES", 16 << 10)  # so that 200 stores are too many
    async with small_mesh(tmp_path, 2) as mesh:
        await mesh.kill(1)
        mesh.sites[1].documents = None
        names = [f"a store with a rather long name, number {number}" for number in range(200)]
        for name in names:
            await mesh[0].create_store(name)
        await trio.sleep(1)
        assert msgspec.convert(mesh.sites[0].facts.documents, Summary).brief
        file = await mesh[0].put_file("a.md", b"text")
        await mesh[0].attach(names[7], file.id)
        await mesh.start(1)
        await mesh.until(lambda: {info.name for info in mesh[1].stores()} == set(names), "the newcomer knows every store", 60)
        await mesh.agree(mesh[0].store(names[7]).id)
        await mesh[0].delete_store(names[3])
        with pytest.raises(BadRequest):
            mesh[1].store(names[3])


async def test_gossip_that_makes_no_sense_is_counted_and_ignored(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 2) as mesh:
        await mesh[0].create_store("pages")
        await trio.sleep(1)
        mesh.sites[1].publish({"stores": 7, "digests": "x"})
        mesh.sites[1].publish = lambda record: None
        await trio.sleep(2)
        assert mesh[0].statistics().malformed_gossip_total > 0
        file = await mesh[0].put_file("a.md", b"text")
        assert (await mesh[1].file(file.id))[1] == b"text"


async def test_calls_before_the_files_are_open_are_refused(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 1) as mesh:
        handlers = mesh[0].handlers
        await mesh.kill(0)
        with pytest.raises(Refused):
            await handlers["documents.summary"](mesh.sites[0].id, {}, b"")


async def test_each_error_names_its_field(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 2) as mesh:
        documents = mesh[0]
        await documents.create_store("pages")
        file = await documents.put_file("a.md", b"text")
        unknown = "file-" + "0" * 24
        calls: list[tuple[Callable[[], Awaitable[object]], str, int]] = [
            (lambda: documents.create_store(""), "name", 400),
            (lambda: documents.delete_store("nowhere"), "store", 404),
            (lambda: documents.put_file("a.pdf", b"text"), "file", 400),
            (lambda: documents.file(unknown), "file_id", 404),
            (lambda: documents.delete_file(unknown), "file_id", 404),
            (lambda: documents.attach("nowhere", file.id), "store", 404),
            (lambda: documents.attach("pages", unknown), "file_id", 404),
            (lambda: documents.detach("pages", file.id), "file_id", 404),
            (lambda: documents.store_files("nowhere"), "store", 404),
            (lambda: documents.search("nowhere", "q", 5), "store", 404),
            (lambda: documents.search("pages", " ", 5), "query", 400),
            (lambda: documents.search("pages", "q", 0), "max_num_results", 400),
            (lambda: documents.search("pages", "q", 101), "max_num_results", 400),
            (lambda: documents.search("pages", "q", 5, embedding_weight=0.0, text_weight=0.0), "ranking_options", 400),
            (lambda: documents.search("pages", "q", 5, text_weight=float("nan")), "ranking_options", 400),
        ]
        for call, param, status in calls:
            with pytest.raises(BadRequest) as refused:
                await call()
            assert (refused.value.param, refused.value.status) == (param, status)


async def test_an_unknown_file_is_unknown_while_one_owner_is_down(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh.kill(1)
        with pytest.raises(BadRequest) as refused:
            await mesh[0].file("file-" + "0" * 24)
        assert refused.value.status == 404
        await mesh.kill(2)
        with pytest.raises(Refused):  # a file may have been written to the two that are gone
            await mesh[0].file("file-" + "0" * 24)


async def test_a_hanging_peer_does_not_hold_a_read_up(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        file = await mesh[0].put_file("a.md", b"text")
        mesh.hanging.add(mesh.sites[1].id)
        started = trio.current_time()
        assert (await mesh[0].file(file.id))[1] == b"text"
        assert trio.current_time() - started < 1.0


async def test_a_delete_that_does_not_reach_a_quorum_says_so_and_can_be_done_again(
    tmp_path: Path, jumping_clock: MockClock
) -> None:
    async with small_mesh(tmp_path, 2) as mesh:
        await mesh[0].create_store("pages")
        file = await mesh[0].put_file("a.md", b"text")
        await mesh[0].attach("pages", file.id)
        await mesh.kill(1)
        mesh.unnoticed = True
        with pytest.raises(Refused, match="2 are needed"):
            await mesh[0].delete_file(file.id)
        mesh.unnoticed = False
        await mesh[0].delete_file(file.id)
        assert await mesh[0].files() == await mesh[0].store_files("pages") == []


async def test_a_copy_that_breaks_while_in_use_leaves_the_others_answering(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh[0].create_store("pages")
        file = await mesh[0].put_file("a.md", b"otters swim")
        await mesh[0].attach("pages", file.id)
        opened_store = mesh[0]._local._opened_stores[mesh[0].store("pages").id]
        opened_store.file.path = opened_store.file.path.with_name("broken")  # what its index will open
        await trio.Path(opened_store.file.path).write_bytes(b"noise" * 5000)
        result = await mesh[0].search("pages", "otters", 1)
        assert (result.passages[0].file_id, result.shards_ok) == (file.id, 8)
        again = await mesh[1].search("pages", "otters", 1)
        assert again == result


async def test_vectors_of_another_embedder_are_not_mixed_in(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 2) as mesh:
        await mesh[0].create_store("pages")
        file = await mesh[0].put_file("a.md", b"text")
        await mesh.kill(1)
        mesh.sites[1].embedder = HashingEmbedder("another:64")
        await mesh.start(1)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: mesh[1].attach("pages", file.id),
            lambda: mesh[1].search("pages", "text", 1),
        ]
        for call in calls:
            with pytest.raises(BadRequest) as refused:
                await call()
            assert refused.value.code == "embedder_mismatch"
        assert (await mesh[1].search("pages", "text", 1, embedding_weight=0.0)).shards_ok == 8


async def test_a_directory_that_cannot_be_written_ends_the_service_with_a_reason(tmp_path: Path) -> None:
    blocked = tmp_path / "0000000000000000"
    await trio.to_thread.run_sync(blocked.write_text, "a file where the directory should be")
    with pytest.raises(ExceptionGroup) as ended:
        async with small_mesh(tmp_path, 1):
            pass
    assert ended.value.split(FileExistsError)[0] is not None
    assert stat.S_ISREG((await trio.Path(blocked).stat()).st_mode)
