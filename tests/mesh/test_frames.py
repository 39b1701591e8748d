"""Frames: what goes in comes out, however the bytes are cut; anything else is refused before it is kept."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.view import Load
from mesh.wire.frames import Frame, FrameError, FrameReader, encode

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
frames = st.builds(
    Frame,
    kind=st.text(min_size=1, max_size=20),
    header=st.dictionaries(st.text(max_size=8), values, max_size=5),
    tail=st.binary(max_size=200),
    number=st.integers(0, 2**40),
    is_reply=st.booleans(),
    load=st.none() | st.builds(Load, running=st.integers(0, 99), prefill_tok_s=st.floats(0, 1e6, width=32)),
)


@given(st.lists(frames, max_size=5), st.lists(st.integers(1, 50), max_size=30))
def test_frames_survive_any_cutting_of_the_stream(sent: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(encode(frame) for frame in sent)
    reader, received, at = FrameReader(), [], 0
    for cut in [*cuts, len(stream)]:
        received += reader.feed(stream[at : at + cut])
        at += cut
    assert received == sent


@given(st.binary(max_size=300))
def test_any_bytes_give_frames_or_a_frame_error(data: bytes) -> None:
    try:
        FrameReader().feed(data)
    except FrameError:
        pass


@pytest.mark.parametrize("lengths", [(1 << 30, 0), (0, 1 << 31), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_a_length_over_the_limit_is_refused_before_the_body_arrives(lengths: tuple[int, int]) -> None:
    with pytest.raises(FrameError, match="over the limit"):
        FrameReader().feed(struct.pack(">II", *lengths))


def test_a_header_that_is_no_map_is_refused() -> None:
    with pytest.raises(FrameError):
        FrameReader().feed(struct.pack(">II", 1, 0) + b"\x01")


def test_an_oversized_frame_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="too large"):
        encode(Frame("x", {"a": b"\0" * (5 << 20)}))


def test_the_answer_of_an_http_server_is_named_as_such() -> None:
    with pytest.raises(FrameError, match="an HTTP server answers there; give the node's gossip address"):
        FrameReader().feed(b"HTTP/1.1 400 Bad Request\r\n\r\n")
