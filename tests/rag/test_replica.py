"""Two replicas that have seen the same entries hold the same, whatever the order and however often."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.ids import NodeId
from rag.replica import EMPTY, SHARDS, DocumentHead, ListingEntry, Replica, entry_hash, shard_of

DOCS = [f"file-{number}" for number in range(12)]


@st.composite
def heads(draw: st.DrawFn) -> DocumentHead:
    """A (document, stamp) always stands for one content: no node issues a stamp twice."""
    doc_id, hlc, node = draw(st.sampled_from(DOCS)), draw(st.integers(1, 6)), draw(st.sampled_from(["a", "b", "c"]))
    deleted = entry_hash(DocumentHead(doc_id, hlc, NodeId(node))) % 3 == 0
    return DocumentHead(doc_id, hlc, NodeId(node), deleted, chunks=0 if deleted else hlc)


HISTORIES = st.lists(heads(), max_size=30)


def contents(replica: Replica) -> list[DocumentHead | None]:
    return [replica.get(doc_id) for doc_id in DOCS]


@given(HISTORIES, st.randoms(use_true_random=False))
def test_order_and_repetition_of_merges_do_not_matter(history: list[DocumentHead], chance: object) -> None:
    other = history * 2
    chance.shuffle(other)  # type: ignore[attr-defined]
    one, two = Replica(history), Replica(other)
    assert contents(one) == contents(two)
    assert one.digests() == two.digests()


@given(HISTORIES)
def test_the_greatest_stamp_of_each_document_is_what_remains(history: list[DocumentHead]) -> None:
    replica = Replica(history)
    for doc_id in DOCS:
        written = [head for head in history if head.doc_id == doc_id]
        assert replica.get(doc_id) == max(written, key=lambda head: head.stamp, default=None)


@given(HISTORIES)
def test_the_running_digest_equals_one_computed_anew(history: list[DocumentHead]) -> None:
    replica = Replica(history)
    held = [head for head in contents(replica) if head is not None]
    assert replica.digests() == Replica(held).digests()
    for shard in range(SHARDS):
        inside = [head for head in held if shard_of(head.doc_id) == shard]
        digest = replica.digest(shard)
        assert digest.entries == len(inside)
        assert digest.total == sum(map(entry_hash, inside)) % 2**64
        assert digest.documents == sum(not head.deleted for head in inside)
        assert digest.chunks == sum(head.chunks for head in inside)


@given(HISTORIES, HISTORIES)
def test_pulling_what_is_wanted_and_pushing_what_is_surplus_makes_two_replicas_equal(
    left: list[DocumentHead], right: list[DocumentHead]
) -> None:
    ours, theirs = Replica(left), Replica(right)
    for shard in range(SHARDS):
        listing = theirs.listing(shard)
        wanted, surplus = ours.wanted(shard, listing), ours.surplus(shard, listing)
        assert not set(wanted) & set(surplus)
        for doc_id in surplus:
            head = ours.get(doc_id)
            assert head is not None and theirs.merge(head)
        for doc_id in wanted:
            head = theirs.get(doc_id)
            assert head is not None and ours.merge(head)
        assert ours.digest(shard).agrees(theirs.digest(shard))
    assert contents(ours) == contents(theirs)


@given(HISTORIES)
def test_what_is_wanted_comes_oldest_first_so_that_newest_is_reached_last(history: list[DocumentHead]) -> None:
    theirs = Replica(history)
    for shard in range(SHARDS):
        wanted = [theirs.get(doc_id) for doc_id in Replica().wanted(shard, theirs.listing(shard))]
        stamps = [head.stamp for head in wanted if head is not None]
        assert stamps == sorted(stamps)
        assert not stamps or stamps[-1].hlc == theirs.digest(shard).newest


def test_an_older_copy_does_not_undo_a_delete() -> None:
    put, delete = DocumentHead("d", 5, NodeId("z"), chunks=3), DocumentHead("d", 6, NodeId("a"), deleted=True)
    replica = Replica([delete])
    assert not replica.merge(put)
    assert replica.get("d") == delete
    assert replica.documents(range(SHARDS)) == []


def test_a_listing_with_foreign_documents_asks_for_none_of_them() -> None:
    shard = shard_of("file-0")
    foreign = next(doc for doc in DOCS if shard_of(doc) != shard)
    assert Replica().wanted(shard, [ListingEntry(foreign, 9, NodeId("a")), ListingEntry("file-0", 9, NodeId("a"))]) == ["file-0"]


@given(HISTORIES, st.integers(0, 6))
def test_forgetting_until_a_moment_leaves_what_is_later(history: list[DocumentHead], hlc: int) -> None:
    replica = Replica(history)
    replica.forget_until(hlc)
    assert contents(replica) == [head if head and head.hlc > hlc else None for head in contents(Replica(history))]


def test_a_forgotten_shard_is_empty_and_the_others_are_not() -> None:
    replica = Replica(DocumentHead(doc_id, 1, NodeId("a")) for doc_id in DOCS)
    shard = shard_of(DOCS[0])
    before = replica.digests()
    replica.forget(shard)
    assert replica.digest(shard) == EMPTY
    assert replica.digests() == {other: digest for other, digest in before.items() if other != shard}
