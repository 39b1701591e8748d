"""Documents over several nodes: what was acknowledged is found everywhere, what was deleted stays deleted."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from mesh.errors import BadRequest, Refused
from rag.replica import SHARDS
from rag.wire import Operation
from tests.rag.small_mesh import SmallMesh, small_mesh

TOPICS = ["otters", "violins", "granite", "lighthouses", "saffron", "glaciers", "typewriters", "beekeeping", "tides", "mosaics"]


@pytest.fixture
def jumping_clock() -> MockClock:
    """Jumps when all have been idle for a moment: disk threads are not seen by the clock, and mostly end within it."""
    return MockClock(autojump_threshold=0.02)


def text_about(topic: str) -> bytes:
    return f"# About {topic}\n\nThis page tells of {topic} and of nothing else.\n\nMore on {topic} follows.\n".encode()


async def ingest(mesh: SmallMesh, node: int, store: str, topics: list[str]) -> dict[str, str]:
    await mesh[node].create_store(store)
    ids = {}
    for topic in topics:
        file = await mesh[node].put_file(f"{topic}.md", text_about(topic))
        await mesh[node].attach(store, file.id)
        ids[topic] = file.id
    return ids


async def test_every_node_finds_every_acknowledged_document_at_once(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 5) as mesh:
        ids = await ingest(mesh, 0, "pages", TOPICS)
        for documents in mesh:
            assert [info.name for info in documents.stores()] == ["pages"]
            assert {file.id for file in await documents.files()} == set(ids.values())
            assert {file.id for file in await documents.store_files("pages")} == set(ids.values())
            for topic, file_id in ids.items():
                result = await documents.search("pages", f"tell me about {topic}", 3)
                assert (result.shards_ok, result.shards_total) == (SHARDS, SHARDS)
                assert result.passages[0].file_id == file_id
                info, content = await documents.file(file_id)
                assert content == text_about(topic) and info.name == f"{topic}.md"
                passage = result.passages[0]
                assert content.decode()[passage.start : passage.end] == passage.text


async def test_all_nodes_give_bit_identical_answers(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 5) as mesh:
        for node in range(5):  # written from different nodes, so replicas hold them in different order
            await ingest(mesh, node, "pages", TOPICS[node::5])
        for query in ("violins and tides", "nothing else", "granite"):
            results = [await documents.search("pages", query, 10) for documents in mesh]
            assert all(result == results[0] for result in results)
            assert results[0].passages


async def test_documents_survive_the_loss_of_a_node(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 4) as mesh:
        ids = await ingest(mesh, 1, "pages", TOPICS)
        for lost in range(4):
            await mesh.kill(lost)
            for documents in mesh:
                for topic, file_id in ids.items():
                    result = await documents.search("pages", topic, 1)
                    assert (result.passages[0].file_id, result.shards_ok) == (file_id, SHARDS)
                    assert (await documents.file(file_id))[1] == text_about(topic)
            await mesh.start(lost)
            await trio.sleep(3)


async def test_a_write_while_an_owner_is_down_reaches_it_when_it_is_back(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await ingest(mesh, 0, "pages", TOPICS[:3])
        await mesh.kill(2)
        ids = await ingest(mesh, 0, "pages", TOPICS[3:])
        await mesh.start(2)
        store = mesh[0].store("pages").id
        await mesh.agree(store)
        await mesh.kill(0)
        await mesh.kill(1)
        for topic, file_id in ids.items():
            assert (await mesh[2].search("pages", topic, 1)).passages[0].file_id == file_id


async def test_a_document_deleted_while_a_node_was_down_never_comes_back(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        ids = await ingest(mesh, 0, "pages", TOPICS)
        await mesh.kill(2)
        await mesh[0].delete_file(ids["otters"])
        await mesh[1].detach("pages", ids["tides"])
        await mesh.start(2)
        await mesh.agree(mesh[0].store("pages").id)
        await trio.sleep(20)  # many rounds of repair
        for documents in mesh:
            found = {passage.file_id for passage in (await documents.search("pages", "otters tides", 50)).passages}
            assert not found & {ids["otters"], ids["tides"]}
            with pytest.raises(BadRequest) as gone:
                await documents.file(ids["otters"])
            assert gone.value.status == 404
            assert (await documents.file(ids["tides"]))[0].name == "tides.md"  # only taken out of the store


async def test_a_store_deleted_and_made_anew_while_a_node_was_down_starts_empty(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await ingest(mesh, 0, "pages", TOPICS[:4])
        await mesh.kill(2)
        await mesh[0].delete_store("pages")
        with pytest.raises(BadRequest):
            mesh[1].store("pages")
        ids = await ingest(mesh, 1, "pages", TOPICS[5:6])
        await mesh.start(2)
        await trio.sleep(5)
        for documents in mesh:
            assert {file.id for file in await documents.store_files("pages")} == set(ids.values())
            assert documents.store("pages").documents == 1


async def test_both_sides_of_a_partition_take_writes_and_agree_after_it(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        ids = await ingest(mesh, 0, "pages", TOPICS[:3])
        mesh.split([0, 1], [2])
        left = await ingest(mesh, 0, "pages", TOPICS[3:5])
        right = await ingest(mesh, 2, "pages", TOPICS[5:7])
        await mesh[2].delete_file(ids["otters"])
        await mesh[0].create_store("made left")
        await mesh[2].create_store("made right")
        mesh.heal()
        await mesh.agree(mesh[0].store("pages").id)
        await trio.sleep(1)  # for gossip to tell so
        expected = ({*ids.values(), *left.values(), *right.values()}) - {ids["otters"]}
        for documents in mesh:
            assert {file.id for file in await documents.store_files("pages")} == expected
            assert [info.name for info in documents.stores()] == sorted(
                ["pages", "made left", "made right"], key=lambda name: documents.store(name).id
            )
            assert documents.store("pages").in_sync


async def test_an_answer_of_which_a_part_is_missing_says_so(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 5) as mesh:
        ids = await ingest(mesh, 0, "pages", TOPICS)
        await trio.sleep(2)
        for number in (1, 2, 3, 4):
            await mesh.kill(number)
        result = await mesh[0].search("pages", "anything", 50)
        assert result.shards_ok < result.shards_total
        assert {passage.file_id for passage in result.passages} < set(ids.values())
        with pytest.raises(Refused):
            await mesh[0].store_files("pages")


async def test_a_write_waits_until_a_dead_owner_is_noticed(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 2) as mesh:
        await mesh[0].create_store("pages")
        mesh.unnoticed = True
        await mesh.kill(1)
        with trio.fail_after(9):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mesh[0].put_file, "a.md", b"text")
                await trio.sleep(3)
                mesh.unnoticed = False
        mesh.unnoticed = True
        with pytest.raises(Refused, match="2 are needed"):
            await mesh[0].put_file("b.md", b"text")


async def test_a_hanging_owner_delays_a_write_by_the_grace_alone(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh[0].create_store("pages")
        file = await mesh[0].put_file("a.md", b"text")
        mesh.hanging.add(mesh.sites[2].id)
        started = trio.current_time()
        await mesh[0]._write(
            mesh[0]._local.registry.find("pages"),
            Operation(mesh[0]._head(file.id, deleted=True)),
        )
        assert trio.current_time() - started < 1.0


async def test_a_joining_node_serves_whole_answers_before_it_holds_anything(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 4) as mesh:
        await mesh.kill(3)
        mesh.sites[3].documents = None  # never seen
        ids = await ingest(mesh, 0, "pages", TOPICS)
        await trio.sleep(1)
        await mesh.start(3)
        mesh[3]._local.registry.merge(mesh[0]._local.registry.find("pages"))  # as the first gossip brings it
        for topic, file_id in ids.items():
            result = await mesh[3].search("pages", topic, 1)
            assert (result.passages[0].file_id, result.shards_ok) == (file_id, SHARDS)


async def test_copies_move_to_new_owners_and_are_dropped_by_old_ones_only_then(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 4) as mesh:
        await mesh.kill(3)
        mesh.sites[3].documents = None
        ids = await ingest(mesh, 0, "pages", TOPICS)
        await mesh.start(3)
        await trio.sleep(10)
        store = mesh[0].store("pages").id
        held = [set(digests) for digests in mesh.digests(store)]
        for shard in range(SHARDS):
            owners = {int(node, 16) for node in mesh[0]._peers.owners(store, shard)}
            holders = {number for number, shards in enumerate(held) if shard in shards}
            assert holders in (owners, set())
        assert sum(documents.statistics().dropped_shards_total for documents in mesh) > 0
        for documents in mesh:
            assert {file.id for file in await documents.store_files("pages")} == set(ids.values())


async def test_re_adding_what_is_unchanged_embeds_and_writes_nothing(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        ids = await ingest(mesh, 0, "pages", TOPICS[:2])
        embedded = [site.embedder.passages_embedded for site in mesh.sites]
        writes = [documents.statistics().writes_total for documents in mesh]
        assert await ingest(mesh, 1, "pages", TOPICS[:2]) == ids
        assert [site.embedder.passages_embedded for site in mesh.sites] == embedded
        assert [documents.statistics().writes_total for documents in mesh] == writes


async def test_replicas_never_embed(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh.kill(2)
        await ingest(mesh, 0, "pages", TOPICS[:3])
        await mesh.start(2)
        await mesh.agree(mesh[0].store("pages").id)
        assert [site.embedder.passages_embedded > 0 for site in mesh.sites] == [True, False, False]


async def test_a_stamp_from_a_clock_that_is_far_ahead_is_refused(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh[0].create_store("pages")
        mesh.sites[0].clock_error_s = 3600.0
        with pytest.raises(Refused, match="clock"):
            await mesh[0].put_file("a.md", b"text")


async def test_clocks_that_differ_by_less_do_not_undo_a_later_delete(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        mesh.sites[0].clock_error_s = 50.0
        ids = await ingest(mesh, 0, "pages", TOPICS[:1])
        await mesh[1].delete_file(ids[TOPICS[0]])  # its clock is 50 s behind the write that it deletes
        await trio.sleep(3)
        for documents in mesh:
            assert await documents.files() == []
            assert await documents.store_files("pages") == []


async def test_a_file_deleted_on_one_side_and_attached_on_the_other_leaves_no_passages(
    tmp_path: Path, jumping_clock: MockClock
) -> None:
    async with small_mesh(tmp_path, 3) as mesh:
        await mesh[0].create_store("pages")
        file = await mesh[0].put_file("a.md", b"otters swim")
        mesh.split([0, 1], [2])
        await mesh[0].delete_file(file.id)
        await trio.sleep(0.05)
        await mesh[2].attach("pages", file.id)  # the later write, on a side that has not heard of the delete
        mesh.heal()
        await trio.sleep(10)
        for documents in mesh:
            assert await documents.store_files("pages") == await documents.files() == []
            assert (await documents.search("pages", "otters", 5)).passages == ()


async def test_a_write_to_a_store_that_was_deleted_since_is_not_taken(tmp_path: Path, jumping_clock: MockClock) -> None:
    async with small_mesh(tmp_path, 1) as mesh:
        await mesh[0].create_store("pages")
        local = mesh[0]._local
        old_entry = local.registry.find("pages")
        late = Operation(mesh[0]._head("late", deleted=True))
        await mesh[0].delete_store("pages")
        assert (await local.apply(old_entry, [late])).rejected == ("a store that was deleted",)
        await mesh[0].create_store("pages")
        assert (await local.apply(old_entry, [late])).rejected == ("a store that was deleted",)
        now = Operation(mesh[0]._head("now", deleted=True))
        assert (await local.apply(old_entry, [now])).accepted == 1
