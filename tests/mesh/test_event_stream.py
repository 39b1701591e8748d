"""Events out of bytes, and what a reader has had."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.client import event_stream
from mesh.client.event_stream import AnswerProgress, EventDecoder
from mesh.errors import RemoteError

WIRE = ': ping\ndata: {"a": 1}\n\ndata:two\ndata: lines\r\n\r\nevent: x\nid: 3\ndata: ü\n\n'.encode()
EVENTS = ['{"a": 1}', "two\nlines", "ü"]


def chunk(seq: int, *tokens: int, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "token_ids": list(tokens)}
    return {"id": "chatcmpl-1", "choices": [choice], "mesh": {"seq": seq}}


@given(st.lists(st.integers(0, len(WIRE)), max_size=8))
def test_events_do_not_depend_on_how_their_bytes_were_cut(cuts: list[int]) -> None:
    decoder = EventDecoder("n")
    ends = [*sorted(cuts), len(WIRE)]
    pieces = [WIRE[begin:end] for begin, end in zip([0, *ends], ends)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == EVENTS


def test_an_event_that_was_cut_off_is_none() -> None:
    assert EventDecoder("n").feed(b'data: {"a": 1}\n') == []


def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_LINE_BYTES", 10)
    with pytest.raises(RemoteError, match="at most 10 bytes"):
        EventDecoder("n").feed(b"data: 12345678901")


def test_bytes_that_are_not_text_are_refused() -> None:
    with pytest.raises(RemoteError, match="UTF-8"):
        EventDecoder("n").feed(b"data: \xff\n\n")


def test_an_undisturbed_answer_is_all_new() -> None:
    progress = AnswerProgress()
    assert progress.accept(chunk(0, role="assistant"))
    assert progress.accept(chunk(1, 7, content="a"))
    assert progress.accept(chunk(3, 8, 9, content="bc"))
    assert progress.accept(chunk(3, finish="length"))
    assert (progress.seq, progress.missing_tokens, progress.duplicate_tokens) == (3, 0, 0)
    assert progress.finish_reasons == {0: "length"}


def test_chunks_that_a_resumed_stream_repeats_are_not_new() -> None:
    progress = AnswerProgress()
    ending = {"id": "chatcmpl-1", "choices": [], "usage": {"completion_tokens": 1}, "mesh": {"seq": 1, "path": []}}
    chunks = [chunk(0, role="assistant"), chunk(1, 7, content="a"), chunk(1, finish="stop"), ending]
    assert [progress.accept(each) for each in chunks] == [True] * 4
    assert [progress.accept(each) for each in chunks] == [False] * 4


def test_a_token_that_came_twice_is_counted_and_left_out() -> None:
    progress = AnswerProgress()
    progress.accept(chunk(1, 7, content="a"))
    assert not progress.accept(chunk(1, 7, content="a"))
    assert (progress.duplicate_tokens, progress.missing_tokens) == (1, 0)


def test_a_chunk_with_more_tokens_than_its_seq_repeats_some() -> None:
    progress = AnswerProgress()
    progress.accept(chunk(2, 7, 8, content="ab"))
    progress.accept(chunk(3, 8, 9, content="bc"))
    assert (progress.duplicate_tokens, progress.missing_tokens) == (1, 0)


def test_a_gap_is_counted_as_missing() -> None:
    progress = AnswerProgress()
    progress.accept(chunk(1, 7, content="a"))
    assert progress.accept(chunk(4, 9, content="c"))
    assert (progress.duplicate_tokens, progress.missing_tokens) == (0, 2)


def test_chunks_that_do_not_list_their_tokens_count_nothing() -> None:
    progress = AnswerProgress()
    progress.accept(chunk(5, content="abc"))
    assert (progress.seq, progress.missing_tokens, progress.duplicate_tokens) == (5, 0, 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=10), st.data())
def test_an_answer_resumed_anywhere_is_whole_whatever_the_grouping(groups: list[int], data: st.DataObject) -> None:
    total = sum(groups)
    progress = AnswerProgress()
    got: list[int] = []

    def chunks_after(after: int, sizes: list[int]) -> list[dict[str, Any]]:
        chunks, seq = ([chunk(0, role="assistant")] if after == 0 else []), after
        for size in sizes:
            size = min(size, total - seq)
            if size > 0:
                chunks.append(chunk(seq + size, *range(seq, seq + size), content="x"))
                seq += size
        return chunks

    first = chunks_after(0, groups)
    for each in first[: data.draw(st.integers(0, len(first)))]:
        if progress.accept(each):
            got += each["choices"][0]["token_ids"]
    for each in chunks_after(progress.seq, [data.draw(st.integers(1, 5)) for _ in range(total)]):
        if progress.accept(each):
            got += each["choices"][0]["token_ids"]
    assert got == list(range(total))
    assert (progress.missing_tokens, progress.duplicate_tokens) == (0, 0)
