"""A map an owner: deltas in version order, cut anywhere; deletions that stay deleted; bounds; nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membership.facts.facts import FactsBook
from membership.facts.fingerprint import Fingerprint
from membership.facts.owner_map import TOLERATED, TOMBSTONES_KEPT, DeltaOutcome, OwnerMap
from mesh.errors import LocalError
from mesh.ids import ModelId, NodeId
from mesh.view import Facts, Loading, ModelCard, Readiness, Span
from mesh.wire.facts_map import DOCUMENT_DEPTH, DecodedFacts, keys_of
from mesh.wire.sync import MAX_OWNER_BYTES, FactsDelta, FactsEntry, Sync, encode, entry_bytes

OWNER = NodeId("a" * 16)
OTHER = NodeId("b" * 16)
PLENTY_BYTES = 1 << 30


def written(*states: dict[str, bytes]) -> OwnerMap:
    owner = OwnerMap(OWNER, 1)
    for state in states:
        owner.write(state)
    return owner


def take(copy: OwnerMap, owner: OwnerMap, budget_bytes: int = PLENTY_BYTES) -> DeltaOutcome | None:
    delta = owner.delta(copy.known, budget_bytes)
    return copy.apply(delta)[0] if delta is not None else None


def test_a_small_change_of_a_large_map_is_a_small_delta() -> None:
    state = {f"key-{n}": b"v" * 1000 for n in range(500)}
    owner, copy = written(state), OwnerMap(OWNER, 1)
    take(copy, owner)
    owner.write(state | {"key-77": b"new"})
    delta = owner.delta(copy.known, PLENTY_BYTES)
    assert delta is not None and [entry.key for entry in delta.entries] == ["key-77"]
    assert copy.apply(delta) == (DeltaOutcome.NEWS, {"key-77": b"new"})
    assert copy.live() == owner.live()


def test_a_delta_that_is_cut_off_goes_on_where_it_ended() -> None:
    owner, copy = written({f"key-{n}": b"v" * 100 for n in range(50)}), OwnerMap(OWNER, 1)
    versions = []
    while copy.version < owner.version:
        assert take(copy, owner, 1000) is DeltaOutcome.NEWS
        versions.append(copy.version)
    assert len(versions) > 5 and copy.live() == owner.live()


def test_a_delta_with_a_gap_before_it_changes_nothing() -> None:
    owner, copy = written({"a": b"1"}), OwnerMap(OWNER, 1)
    take(copy, owner)
    owner.write({"a": b"1", "b": b"2"})
    owner.write({"a": b"1", "b": b"2", "c": b"3"})
    late = owner.delta((1, 2), PLENTY_BYTES)
    assert late is not None and copy.apply(late) == (DeltaOutcome.GAP, {})
    assert copy.live() == {"a": b"1"}


def test_a_deleted_key_is_deleted_in_copies_and_its_tombstone_goes_one_day() -> None:
    owner, copy = written({"a": b"1", "b": b"2"}), OwnerMap(OWNER, 1)
    take(copy, owner)
    owner.write({"b": b"2"})
    assert take(copy, owner) is DeltaOutcome.NEWS and copy.live() == {"b": b"2"} and copy.tombstones == 1
    for number in range(2 * TOMBSTONES_KEPT):
        owner.write({"b": b"2", f"short-lived-{number}": b""})
    assert owner.tombstones <= TOMBSTONES_KEPT and owner.collected > 0
    take(copy, owner)
    assert copy.live() == owner.live() and copy.tombstones <= TOMBSTONES_KEPT


def test_a_copy_older_than_the_collected_deletions_starts_over_and_keeps_no_ghost() -> None:
    owner, copy = written({"ghost": b"1", "b": b"2"}), OwnerMap(OWNER, 1)
    take(copy, owner)
    for number in range(2 * TOMBSTONES_KEPT):
        owner.write({"b": b"2", f"short-lived-{number}": b""})
    delta = owner.delta(copy.known, PLENTY_BYTES)
    assert delta is not None and delta.since == 0
    outcome, changes = copy.apply(delta)
    assert outcome is DeltaOutcome.NEWS and changes["ghost"] is None and copy.live() == owner.live()


def test_a_restarted_copy_gets_the_map_up_to_collected_in_one_piece() -> None:
    owner, copy = written({"ghost": b"1", "large": b"x" * 5000}), OwnerMap(OWNER, 1)
    take(copy, owner)
    for number in range(2 * TOMBSTONES_KEPT):
        owner.write({"large": b"x" * 5000, f"short-lived-{number}": b""})
    assert owner.delta(copy.known, 4000) is None
    assert copy.live() == {"ghost": b"1", "large": b"x" * 5000}


def test_forged_writes_above_an_owners_version_are_overridden_everywhere() -> None:
    owner, copy = written({"a": b"1", "b": b"2"}), OwnerMap(OWNER, 1)
    forged = FactsDelta(OWNER, 1, 0, 90, 0, (FactsEntry("a", 89, b"lie"), FactsEntry("z", 90, b"lie")))
    assert copy.apply(forged)[0] is DeltaOutcome.NEWS and owner.differs(forged)
    owner.outbid(forged.upto)
    assert take(copy, owner) is DeltaOutcome.NEWS and copy.live() == {"a": b"1", "b": b"2"}
    empty, liar = OwnerMap(OWNER, 1), OwnerMap(OWNER, 1)
    liar.apply(forged)
    empty.outbid(forged.upto)
    assert take(liar, empty) is DeltaOutcome.NEWS and liar.live() == {}


def test_an_owners_own_old_deltas_do_not_differ_from_its_map() -> None:
    owner = written({"a": b"1", "b": b"2"})
    old = owner.delta((1, 0), PLENTY_BYTES)
    owner.write({"b": b"3"})
    assert old is not None and not owner.differs(old)
    for number in range(2 * TOMBSTONES_KEPT):
        owner.write({f"short-lived-{number}": b""})
    assert not owner.differs(old)


@pytest.mark.parametrize(
    "delta",
    [
        FactsDelta(OWNER, 1, 0, 2, 0, (FactsEntry("a", 2, b""), FactsEntry("b", 1, b""))),
        FactsDelta(OWNER, 1, 0, 2, 0, (FactsEntry("a", 1, b""), FactsEntry("a", 2, b""))),
        FactsDelta(OWNER, 1, 0, 1, 0, (FactsEntry("a", 2, b""),)),
        FactsDelta(OWNER, 1, 1, 2, 0, (FactsEntry("a", 1, b""),)),
        FactsDelta(OWNER, 1, 2, 2, 0, ()),
        FactsDelta(OWNER, 1, 0, 2, 3, (FactsEntry("a", 2, b""),)),
    ],
)
def test_a_delta_that_no_honest_owner_makes_is_refused(delta: FactsDelta) -> None:
    copy = OwnerMap(OWNER, 1)
    assert copy.apply(delta) == (DeltaOutcome.REFUSED, {}) and copy.known == (1, 0)


def test_an_owner_may_not_write_more_than_copies_take() -> None:
    owner = written({"a": b"1"})
    for wanted in ({"a": b"x" * MAX_OWNER_BYTES}, {str(n): b"" for n in range(9000)}, {"k" * 600: b""}):
        with pytest.raises(LocalError, match="may take"):
            owner.write(wanted)
    assert owner.live() == {"a": b"1"} and owner.version == 1


def test_a_map_that_outgrows_every_bound_is_dropped_and_not_asked_for_again() -> None:
    copy = OwnerMap(OWNER, 1)
    for version in range(1, TOLERATED + 2):
        entry = FactsEntry(f"key-{version}", version, b"x" * MAX_OWNER_BYTES)
        copy.apply(FactsDelta(OWNER, 1, version - 1, version, 0, (entry,)))
    assert copy.overgrown and copy.live() == {} and copy.size_bytes == 0
    assert copy.delta((1, 0), PLENTY_BYTES) is None, "nor is it told on"


def test_a_push_repeats_a_little_of_what_came_before_it() -> None:
    owner, copy = written(*({f"key-{n}": b"v" for n in range(count)} for count in range(1, 40))), OwnerMap(OWNER, 1)
    take(copy, owner)
    for number in range(3):  # of three pushes the first two got lost
        before = owner.version
        owner.write(owner.live() | {"key-5": str(number).encode(), f"new-{number}": b""})
    push = owner.news(before, 500, PLENTY_BYTES)
    assert push is not None and len(push.entries) < 30 and copy.apply(push)[0] is DeltaOutcome.NEWS
    assert copy.live() == owner.live()


states = st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=3), max_size=6)


@given(st.lists(st.tuples(states, st.integers(0, 2), st.integers(0, 2), st.integers(60, 200)), max_size=25))
def test_copies_that_exchange_in_any_order_hold_prefixes_and_converge(
    steps: list[tuple[dict[str, bytes], int, int, int]],
) -> None:
    """The prefix: of every key the newest write up to the copy's version, and no key whose deletion is before it."""
    owner = OwnerMap(OWNER, 1)
    copies = [OwnerMap(OWNER, 1) for _ in range(3)]
    history: dict[int, dict[str, int]] = {0: {}}  # by version: which key was last written when
    for state, teller, hearer, budget_bytes in steps:
        for key, value in owner.write(state).items():
            number = len(history)
            history[number] = history[number - 1] | {key: number}
            assert value == owner.live().get(key)
        if len(owner) > 3 and teller == 2:  # sooner than it would be
            owner._collect(owner.version // 2)
        source = owner if teller == hearer else copies[teller]
        take(copies[hearer], source, budget_bytes)
        for copy in copies:
            received = {entry.key: entry.version for entry in copy._entries.values()}
            for key, version in received.items():
                assert history[copy.version].get(key, version) >= version
            current = {entry.key: entry for entry in owner._entries.values()}
            for key, value in copy.live().items():
                newest = current.get(key)
                gone = newest is None or newest.value is None
                assert not gone or copy.version < owner.version, f"a ghost: {key}"
                if newest is not None and newest.version <= copy.version:
                    assert value == newest.value
            for entry in current.values():
                if entry.version <= copy.version and entry.value is not None:
                    assert copy.live().get(entry.key) == entry.value, "a hole below its version"
    for copy in copies:
        while take(copy, owner) is not None:
            pass
        assert copy.live() == owner.live() and copy.known[1] == owner.version


cards = st.builds(
    ModelCard, st.sampled_from(["m", "org/n"]).map(ModelId), st.integers(1, 9), st.just(64), st.text(max_size=3), st.just("")
)
records = st.recursive(
    st.integers(-9, 9) | st.text(max_size=3), lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3), max_leaves=6
)
facts = st.builds(
    Facts,
    http=st.text(max_size=5),
    spans=st.lists(
        st.builds(Span, st.sampled_from(["m", "org/n"]).map(ModelId), st.integers(0, 4), st.integers(5, 9)), unique=True
    ).map(lambda spans: tuple(sorted(spans))),
    models=st.lists(cards, unique_by=lambda card: card.id).map(lambda cards: tuple(sorted(cards, key=lambda card: card.id))),
    draining=st.booleans(),
    pid=st.integers(0, 99),
    twin=st.text(max_size=5),
    uncompiled=st.text(max_size=5),
    loading=st.dictionaries(
        st.sampled_from(["m", "org/n"]).map(ModelId), st.builds(Loading, st.integers(0, 100), st.integers(0, 9))
    ),
    capacity=st.dictionaries(st.sampled_from(["m", "org/n"]).map(ModelId), st.integers(0, 9)),
    documents=st.dictionaries(
        st.text(alphabet="ab/\n\x1f", max_size=2).filter(lambda name: "\n" not in name), records, max_size=3
    ),
    readiness=st.sampled_from(Readiness),
)


@settings(max_examples=50)
@given(st.lists(facts, min_size=1, max_size=3))
def test_facts_become_keys_and_come_back_the_same_through_any_changes(received: list[Facts]) -> None:
    owner, shown = OwnerMap(OWNER, 1), DecodedFacts()
    for each in received:
        assert shown.update(owner.write(keys_of(each))) == 0
        assert shown.facts == each


def test_a_shards_new_digest_is_one_key_of_the_documents_record() -> None:
    digests = {f"store-{n}": {str(shard): [shard, 1, 2] for shard in range(8)} for n in range(20)}
    book = FactsBook(OWNER, 1, Fingerprint())
    book.publish(Facts(documents={"stores": [1], "digests": digests}))
    changed = digests | {"store-3": digests["store-3"] | {"5": [5, 1, 3]}}
    owner = book.map_of(OWNER)
    assert owner is not None and DOCUMENT_DEPTH == 3
    before = owner.version
    book.publish(Facts(documents={"stores": [1], "digests": changed}))
    assert owner.version == before + 1
    assert book.of(OWNER, 1).documents["digests"] == changed


def test_what_did_not_change_in_the_documents_stays_the_same_object() -> None:
    book = FactsBook(OWNER, 1, Fingerprint())
    book.publish(Facts(documents={"x": 1}))
    documents = book.of(OWNER, 1).documents
    book.publish(Facts(documents={"x": 1}, http="h"))
    assert book.of(OWNER, 1).documents is documents, "whoever reads it need not read it again"


def test_small_news_never_wait_for_large_maps_nor_a_large_map_for_churn() -> None:
    teller = FactsBook(NodeId("0" * 16), 1, Fingerprint())
    owners = [NodeId(f"{number:016x}") for number in range(1, 9)]
    for owner in owners:
        large = owner in owners[:4]
        book = FactsBook(owner, 1, Fingerprint())
        delta = book.publish(Facts(documents={str(n): "y" * 9000 for n in range(30)} if large else {}, http=owner))
        assert delta is not None
        teller.accept(delta)
    asker = FactsBook(OTHER, 1, Fingerprint())
    budget_bytes, rounds = 100_000, 0
    sizes = []
    while True:
        behind = {owner: asker.known(owner) for owner in owners}
        deltas, more = teller.deltas(behind, budget_bytes)
        sizes.append(sum(delta.size_bytes for delta in deltas))
        for delta in deltas:
            asker.accept(delta)
        rounds += 1
        if rounds == 1:
            assert all(asker.of(owner, 1).http == owner for owner in owners[4:]), "the small ones, in the first answer"
        if not more:
            break
        assert rounds < 30
    assert max(sizes) <= budget_bytes and rounds >= 10
    assert all(asker.known(owner) == teller.known(owner) for owner in owners)


def test_an_entrys_reckoned_size_is_not_below_what_it_takes() -> None:
    entries = tuple(FactsEntry(f"kéy-{n}", 2**40 + n, b"x" * n) for n in range(0, 400, 7))
    delta = FactsDelta(OWNER, 2**40, 0, 2**41, 0, entries)
    assert len(encode(Sync(deltas=(delta,)))) <= delta.size_bytes
    assert delta.size_bytes > sum(map(entry_bytes, entries))
