"""The ring: which key seals, which only opens, and that no step leads back."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.keys.keyring import (
    MAX_KEYS,
    Keyring,
    KeyTag,
    RingError,
    RingKey,
    load_keyring,
    save_keyring,
    unwrap,
    wrap,
)
from mesh.keys.mesh_key import BadKeyFile, encode_key, new_key

OLD, NEW, NEWER = (RingKey(serial, bytes([serial + 1]) * 32) for serial in range(3))
RING = Keyring((OLD,))


def test_a_key_is_added_then_used_then_alone() -> None:
    added = RING.add(NEW)
    assert (added.sealing, added.tags) == (OLD.tag, (OLD.tag, NEW.tag))
    used = added.use(NEW.tag)
    assert (used.sealing, set(used.tags)) == (NEW.tag, {OLD.tag, NEW.tag})
    assert used.drop_before(NEW.tag) == Keyring((NEW,))


def test_steps_that_come_twice_or_late_change_nothing() -> None:
    done = Keyring((NEWER,))
    assert done.add(NEW) == done.use(NEW.tag) == done.drop_before(OLD.tag) == done
    assert RING.add(NEW).add(NEW) == RING.add(NEW)


def test_an_unknown_key_is_not_used_nor_a_sealing_key_dropped() -> None:
    with pytest.raises(RingError, match="never added"):
        RING.use(NEW.tag)
    with pytest.raises(RingError, match="still sealing"):
        RING.add(NEW).drop_before(NEW.tag)


def test_a_ring_is_bounded() -> None:
    ring = RING
    for serial in range(1, MAX_KEYS):
        ring = ring.add(RingKey(serial, bytes([serial]) * 32))
    with pytest.raises(RingError, match="1 to 8 keys"):
        ring.add(RingKey(99, b"x" * 32))


steps = st.lists(st.tuples(st.sampled_from(["add", "use", "drop"]), st.sampled_from([OLD, NEW, NEWER])), max_size=12)


def step(ring: Keyring, what: str, key: RingKey) -> Keyring:
    match what:
        case "add":
            return ring.add(key)
        case "use":
            return ring.use(key.tag)
        case _:
            return ring.drop_before(key.tag)


@given(steps)
def test_in_any_order_of_steps_the_sealing_key_never_gets_older(taken: list[tuple[str, RingKey]]) -> None:
    ring = RING
    for what, key in taken:
        before = ring
        try:
            ring = step(ring, what, key)
        except RingError:
            assert ring is before
        assert ring.sealing >= before.sealing
        assert len(set(ring.tags)) == len(ring.tags)


def test_a_successor_is_later_and_new_each_time() -> None:
    one, other = RING.successor(), RING.successor()
    assert one.serial == other.serial == 1 and one != other and one.tag > OLD.tag


def test_among_equal_serials_the_higher_name_is_later() -> None:
    assert KeyTag(1, "aa") < KeyTag(1, "ab") < KeyTag(2, "00")


def test_a_wrapped_key_opens_under_its_wrapping_key_alone() -> None:
    wrapped = wrap(NEW, OLD)
    assert unwrap(NEW.serial, wrapped, OLD) == NEW
    assert NEW.secret not in wrapped
    for serial, content, under in ((NEW.serial, wrapped, NEWER), (9, wrapped, OLD), (-1, wrapped, OLD), (NEW.serial, b"", OLD)):
        with pytest.raises(RingError):
            unwrap(serial, content, under)


def test_a_saved_ring_loads_equal_and_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "key"
    ring = RING.add(NEW).use(NEW.tag)
    save_keyring(path, ring)
    assert load_keyring(path) == ring
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_disk_that_keeps_nothing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "key"
    save_keyring(path, RING)
    with pytest.raises(OSError):
        save_keyring(tmp_path / "absent" / "key", RING.add(NEW))
    path.chmod(0o600)
    assert load_keyring(path) == RING


@pytest.mark.parametrize("line", ["KEY x", "KEY 1 2", "KEY -1", "KEY 99999999999", "KEY ²"])
def test_a_line_that_is_no_key_is_refused_without_showing_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "key"
    key = encode_key(new_key())
    path.write_text(line.replace("KEY", key))
    path.chmod(0o600)
    with pytest.raises(BadKeyFile, match="not a key and its serial") as refused:
        load_keyring(path)
    assert key not in str(refused.value)


def test_secrets_do_not_show_in_texts() -> None:
    assert "\\x01" not in repr(RING) and "secret" not in repr(OLD)
