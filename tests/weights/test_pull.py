"""Which piece is asked of whom: losses, liars, silences, latecomers, restarts."""

from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.ids import NodeId
from mesh.manifest import WeightPiece
from node.weights.pull import (
    ASK_TIMEOUT_S,
    ASKS_IN_ALL,
    ASKS_PER_SOURCE,
    FIRST_REST_S,
    LACKS_FOR_S,
    MAX_REST_S,
    AskFailed,
    AskPiece,
    HashMismatch,
    NotHeld,
    PieceKept,
    Pull,
    PullDone,
    PullEffect,
    PullEvent,
    SourcesChanged,
)


def pieces(count: int, name: str = "t") -> list[WeightPiece]:
    return [WeightPiece(name, number, number, 1, b"") for number in range(count)]


def sources(*names: str) -> SourcesChanged:
    return SourcesChanged(tuple(map(NodeId, names)))


def asks(effects: Sequence[PullEffect]) -> list[AskPiece]:
    return [effect for effect in effects if isinstance(effect, AskPiece)]


def test_asks_go_to_all_sources_evenly_and_no_more_than_may_be_under_way() -> None:
    effects = asks(Pull(pieces(100)).receive(sources("a", "b", "c", "d", "e"), 0.0))
    per_source = [sum(ask.node == node for ask in effects) for node in "abcde"]
    assert len(effects) == ASKS_IN_ALL
    assert max(per_source) <= ASKS_PER_SOURCE and max(per_source) - min(per_source) <= 1
    assert len({ask.piece for ask in effects}) == len(effects)


def test_the_end_is_told_once_when_every_piece_is_kept() -> None:
    pull = Pull(pieces(2))
    first, second = asks(pull.receive(sources("a"), 0.0))
    assert pull.receive(PieceKept(first.number), 1.0) == []
    assert not pull.done
    assert pull.receive(PieceKept(second.number), 1.0) == [PullDone()]
    assert pull.done and not pull.starved
    assert pull.receive(PieceKept(second.number), 2.0) == []
    assert pull.tick(99.0) == []


def test_a_lie_costs_a_retry_elsewhere_and_the_liar_is_never_asked_again() -> None:
    pull = Pull(pieces(30))
    effects = asks(pull.receive(sources("good", "liar"), 0.0))
    lie = next(ask for ask in effects if ask.node == "liar")
    again = asks(pull.receive(HashMismatch(lie.number), 1.0))
    for ask in asks(effects):
        if ask.node == "good":
            again += asks(pull.receive(PieceKept(ask.number), 2.0))
    assert lie.piece in {ask.piece for ask in asks(again)}
    assert {ask.node for ask in asks(again)} == {"good"}
    assert pull.statistics().lies_total == 1
    assert all(ask.node == "good" for ask in asks(pull.tick(10_000.0)))


def test_with_liars_alone_it_waits_for_an_honest_one() -> None:
    pull = Pull(pieces(1))
    (ask,) = asks(pull.receive(sources("liar"), 0.0))
    assert pull.receive(HashMismatch(ask.number), 1.0) == []
    assert pull.starved and pull.deadline == float("inf")
    (ask,) = asks(pull.receive(sources("liar", "good"), 2.0))
    assert ask.node == "good"


def test_a_source_that_fails_rests_longer_each_time_and_a_success_forgives_it() -> None:
    pull = Pull(pieces(1))
    now, rests = 0.0, []
    (ask,) = asks(pull.receive(sources("a"), now))
    for _ in range(9):
        assert pull.receive(AskFailed(ask.number), now) == []
        rests.append(pull.deadline - now)
        now = pull.deadline
        (ask,) = asks(pull.tick(now))
    assert rests[:3] == [FIRST_REST_S, 2 * FIRST_REST_S, 4 * FIRST_REST_S] and rests[-1] == MAX_REST_S

    pull = Pull(pieces(ASKS_PER_SOURCE + 1))
    first, second, *_ = asks(pull.receive(sources("a"), 0.0))
    pull.receive(AskFailed(first.number), 0.0)
    pull.tick(FIRST_REST_S)
    pull.receive(PieceKept(second.number), 1.0)
    pull.receive(AskFailed(next(iter(pull._asked))), 2.0)
    assert pull._sources[NodeId("a")].resting_until == 2.0 + FIRST_REST_S


def test_a_lost_link_is_one_failure_however_much_was_under_way() -> None:
    pull = Pull(pieces(ASKS_PER_SOURCE))
    for ask in asks(pull.receive(sources("a"), 0.0)):
        pull.receive(AskFailed(ask.number), 1.0)
    assert pull.deadline == 1.0 + FIRST_REST_S


def test_a_source_that_is_busy_is_left_alone_as_long_as_it_asked_for() -> None:
    pull = Pull(pieces(1))
    (ask,) = asks(pull.receive(sources("a"), 0.0))
    assert pull.receive(AskFailed(ask.number, rest_s=3.0), 10.0) == []
    assert pull.deadline == 13.0
    assert pull.tick(12.9) == []
    assert asks(pull.tick(13.0))[0].piece == ask.piece


def test_who_lacks_a_tensor_is_asked_for_others_meanwhile_and_for_it_later() -> None:
    pull = Pull([*pieces(1, "x"), *pieces(1, "y")])
    first, second = asks(pull.receive(sources("a"), 0.0))
    assert pull.receive(NotHeld(first.number), 1.0) == []
    assert pull.receive(PieceKept(second.number), 1.0) == []
    assert pull.deadline == 1.0 + LACKS_FOR_S
    (again,) = asks(pull.tick(1.0 + LACKS_FOR_S))
    assert again.piece.name == "x"


def test_pieces_that_nobody_at_hand_has_do_not_hide_those_behind_them() -> None:
    rare, common = pieces(500, "rare"), pieces(5, "common")
    pull = Pull([*rare, *common])
    open_asks = asks(pull.receive(sources("a"), 0.0))
    got = set()
    for _ in range(2000):
        if not open_asks:
            break
        ask = open_asks.pop()
        event = NotHeld(ask.number) if ask.piece.name == "rare" else PieceKept(ask.number)
        got |= {ask.piece} if isinstance(event, PieceKept) else set()
        open_asks += asks(pull.receive(event, 0.0))
    assert got == set(common)


def test_a_silent_source_is_passed_over_and_what_it_brings_late_still_counts() -> None:
    pull = Pull(pieces(1))
    (ask,) = asks(pull.receive(sources("slow"), 0.0))
    assert pull.deadline == ASK_TIMEOUT_S
    assert pull.tick(ASK_TIMEOUT_S) == []
    (elsewhere,) = asks(pull.receive(sources("slow", "fast"), ASK_TIMEOUT_S))
    assert elsewhere.node == "fast"
    assert pull.receive(PieceKept(ask.number), ASK_TIMEOUT_S + 1) == [PullDone()]
    assert pull.receive(PieceKept(elsewhere.number), ASK_TIMEOUT_S + 2) == []
    assert pull.statistics().pieces_kept == 1


def test_a_lie_that_comes_late_is_a_lie() -> None:
    pull = Pull(pieces(1))
    (ask,) = asks(pull.receive(sources("slow"), 0.0))
    pull.tick(ASK_TIMEOUT_S)
    assert pull.receive(HashMismatch(ask.number), ASK_TIMEOUT_S + 1) == [], "its rest is over, and still it is not asked again"
    assert pull.tick(10_000.0) == []


def test_a_source_that_left_is_asked_for_nothing_more() -> None:
    pull = Pull(pieces(10))
    pull.receive(sources("a", "b"), 0.0)
    effects = asks(pull.receive(sources("b"), 1.0))
    for number in list(pull._asked):
        effects += asks(pull.receive(AskFailed(number, rest_s=0.0), 2.0))
    assert {ask.node for ask in asks(effects)} == {"b"}


FATES = st.sampled_from(["kept", "kept", "kept", "failed", "busy", "silent", "lied", "lacks", "restart", "leaves"])


@settings(max_examples=60)
@given(st.integers(1, 40), st.lists(FATES, max_size=120), st.randoms(use_true_random=False))
def test_whatever_happens_on_the_way_every_piece_arrives_once_an_honest_source_is_there(
    count: int, fates: list[str], rng: Random
) -> None:
    """Random orders of answers, losses, lies and restarts; then one honest source, and all must come."""
    every = pieces(count)
    kept: set[WeightPiece] = set()  # the disk
    lied: set[str] = set()
    under_way: dict[int, AskPiece] = {}
    now, pull = 0.0, Pull(every)

    def took(effects: Sequence[PullEffect]) -> None:
        for ask in asks(effects):
            assert ask.node not in lied and ask.piece not in kept
            under_way[ask.number] = ask
        assert len(pull._asked) <= ASKS_IN_ALL
        for node in "abc":
            assert sum(asked.node == node for asked in pull._asked.values()) <= ASKS_PER_SOURCE

    took(pull.receive(sources("a", "b", "c"), now))
    for fate in fates:
        now += rng.choice([0.0, 0.1, 5.0])
        if fate == "restart":
            pull, under_way = Pull([piece for piece in every if piece not in kept]), {}
            lied.clear()
            took(pull.receive(sources("a", "b", "c"), now))
        elif fate == "leaves":
            took(pull.receive(sources(*rng.sample("abc", rng.randint(0, 3))), now))
        elif fate == "silent" or not under_way:
            now = min(max(now, pull.deadline), now + 60.0)
            took(pull.tick(now))
        else:
            ask = under_way.pop(rng.choice(list(under_way)))
            if fate == "kept":
                kept.add(ask.piece)
                took(pull.receive(PieceKept(ask.number), now))
            elif fate == "lied":
                lied.add(ask.node)
                took(pull.receive(HashMismatch(ask.number), now))
            else:
                events: dict[str, PullEvent] = {
                    "failed": AskFailed(ask.number),
                    "busy": AskFailed(ask.number, 1.0),
                    "lacks": NotHeld(ask.number),
                }
                took(pull.receive(events[fate], now))
    took(pull.receive(sources("honest"), now))
    for _ in range(4 * count + 200):
        if pull.done:
            break
        honest = [ask for ask in under_way.values() if ask.node == "honest"]
        for ask in honest:
            del under_way[ask.number]
            kept.add(ask.piece)
            took(pull.receive(PieceKept(ask.number), now))
        if not honest:
            assert pull.deadline < float("inf"), "it would wait for ever"
            now = max(now, pull.deadline)
            took(pull.tick(now))
    assert pull.done and kept == set(every)
