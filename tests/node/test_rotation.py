"""Rotating the mesh key: at no moment can one node not read what another sends, whatever dies and whoever rotates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.ids import NodeId
from mesh.keys.keyring import Keyring, KeyTag, RingError, RingKey
from node.ops.rotation import RotationPhase, RotationStep, Tags, next_step, unfinished

OLD = RingKey(0, b"o" * 32)
NEW = RingKey(1, b"n" * 32)
NODES = tuple(NodeId(f"{number:016x}") for number in range(4))
A, B = NODES[:2]


def rings(*held: tuple[RingKey, ...]) -> dict[NodeId, Tags]:
    return {node: tuple(key.tag for key in keys) for node, keys in zip(NODES, held, strict=False)}


def test_all_open_by_the_key_before_any_seals_with_it_and_all_seal_before_any_drops_the_old() -> None:
    assert next_step(rings((OLD,), (OLD, NEW)), NEW.tag) == RotationStep(RotationPhase.ADD, (A,))
    assert next_step(rings((OLD, NEW), (NEW, OLD)), NEW.tag) == RotationStep(RotationPhase.USE, (A,))
    assert next_step(rings((NEW, OLD), (NEW,)), NEW.tag) == RotationStep(RotationPhase.DROP, (A,))
    assert next_step(rings((NEW,), (NEW,)), NEW.tag) is None


def test_a_newcomer_with_the_old_key_is_given_the_new_one_before_anything_else() -> None:
    assert next_step(rings((NEW, OLD), (OLD,)), NEW.tag) == RotationStep(RotationPhase.ADD, (B,))


def test_a_rotation_that_another_overtook_has_nothing_left_to_do() -> None:
    later = RingKey(2, b"l" * 32)
    assert next_step(rings((later,), (later,)), NEW.tag) is None


def test_only_what_was_begun_and_not_ended_is_unfinished() -> None:
    assert unfinished(rings((OLD,), (OLD,)).values()) is None
    assert unfinished(rings((OLD,), (OLD, NEW)).values()) == NEW.tag
    assert unfinished(rings((OLD,), (NEW,)).values()) == NEW.tag


@dataclass
class Rotator:
    """Whoever rotates: a picture of the rings, as old as its answers, and calls that are under way."""

    key: RingKey | None = None
    seen: dict[NodeId, Tags] = field(default_factory=dict)


@dataclass
class World:
    """Nodes whose rings are on disk, and calls of two rotators that arrive in any order, late, twice or never."""

    disks: dict[NodeId, Keyring] = field(default_factory=lambda: dict.fromkeys(NODES, Keyring((OLD,))))
    down: set[NodeId] = field(default_factory=set)
    away: set[NodeId] = field(default_factory=set)  # were down while a step was decided: may have missed it
    rotators: tuple[Rotator, Rotator] = field(default_factory=lambda: (Rotator(), Rotator()))
    calls: list[tuple[Rotator, NodeId, RotationPhase, RingKey]] = field(default_factory=list)
    secrets: int = 0

    @property
    def live(self) -> list[NodeId]:
        return [node for node in NODES if node not in self.down]

    def look(self, rotator: Rotator) -> None:
        """Asks every live node for its ring; a rotation that is not begun begins, one that was left is taken up."""
        rotator.seen = {node: self.disks[node].tags for node in self.live}
        rings = [self.disks[node] for node in self.live]
        if rotator.key is None and rings:
            tag = unfinished(ring.tags for ring in rings)
            self.secrets += 1
            fresh = RingKey(rings[0].newest.serial + 1, bytes([self.secrets % 256]) * 32)
            rotator.key = next((key for ring in rings if tag and (key := ring.get(tag))), None) or fresh

    def step(self, rotator: Rotator) -> bool:
        """As the shell does: the live set anew, what is known of it, and the calls of one step. False when it is done."""
        if rotator.key is None:
            return True
        known = {node: rotator.seen[node] for node in self.live if node in rotator.seen}
        if set(known) != set(self.live):
            self.look(rotator)
            return True
        if (step := next_step(known, rotator.key.tag)) is None:
            return False
        self.away |= self.down
        self.calls += [(rotator, node, step.phase, rotator.key) for node in step.nodes]
        return True

    def deliver(self, number: int, *, again: bool) -> None:
        if not self.calls:
            return
        call = self.calls[number % len(self.calls)]
        if not again:
            self.calls.remove(call)
        rotator, node, phase, key = call
        if node in self.down:
            return
        ring = self.disks[node]
        try:
            match phase:
                case RotationPhase.ADD:
                    ring = ring.add(key)
                case RotationPhase.USE:
                    ring = ring.add(key).use(key.tag)
                case RotationPhase.DROP:
                    ring = ring.drop_before(key.tag)
        except RingError:
            pass
        self.disks[node] = ring
        if rotator.key == key:
            rotator.seen[node] = ring.tags

    def check(self) -> None:
        """Whoever was never away reads whatever anybody of the kind sends."""
        always = [node for node in self.live if node not in self.away]
        for sender in always:
            for reader in always:
                assert self.disks[sender].sealing in self.disks[reader].tags, "sent what a peer cannot read"


what_happens = ["look", "step", "step", "deliver", "deliver", "twice", "lose", "die", "rise", "crash"]
moves = st.lists(st.tuples(st.sampled_from(what_happens), st.integers(0, 11)), max_size=60)


@settings(max_examples=300)
@given(moves)
def test_whatever_the_order_of_calls_nobody_sends_what_another_cannot_read_and_asking_again_ends_it(
    taken: list[tuple[str, int]],
) -> None:
    world = World()
    for move, number in taken:
        rotator = world.rotators[number % 2]
        match move:
            case "look":
                world.look(rotator)
            case "step":
                world.step(rotator)
            case "deliver" | "twice":
                world.deliver(number, again=move == "twice")
            case "lose":
                del world.calls[number % 12 : number % 12 + 1]
            case "die":
                world.down.add(NODES[number % 4])
            case "rise":
                world.down.discard(NODES[number % 4])
            case _:  # the rotator's process dies: what it knew is gone, what it sent may still arrive
                rotator.key, rotator.seen = None, {}
        world.check()
    finish(world)
    assert len({ring.tags for ring in world.disks.values()}) == 1
    assert len(world.disks[A].keys) == 1


def finish(world: World) -> None:
    """No more faults, and one who asks until it is done."""
    world.down.clear()
    for _ in range(3):  # what came late may have begun another: it is finished as well
        asker = world.rotators[0]
        asker.key, asker.seen = None, {}
        world.look(asker)
        for _ in range(20):
            going_on = world.step(asker)
            while world.calls:
                world.deliver(0, again=False)
            if not going_on:
                break


def test_the_property_catches_a_rotator_that_skips_a_phase() -> None:
    """Sealing with a key that not all open by is what the check is for."""
    world = World()
    world.disks[A] = world.disks[A].add(NEW).use(NEW.tag)
    caught: Callable[[], None] = world.check
    try:
        caught()
    except AssertionError as error:
        assert "cannot read" in str(error)
    else:
        raise AssertionError("it was not caught")


def test_tags_order_concurrent_rotations_the_same_way_everywhere() -> None:
    one, other = RingKey(1, b"x" * 32), RingKey(1, b"y" * 32)
    assert max(one.tag, other.tag) == max(other.tag, one.tag) and isinstance(one.tag, KeyTag)
