"""Pages that another engine computed: an answer that begins with them equals the cold one bit by bit; foreign ones stay out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from mesh.view import Span
from node.engine.api import OpenSequence, PageRequest
from node.engine.kv.blocks import BLOCK_TOKENS
from tests.engine.test_prefix_cache import SALT, SplitPath, ask, bits, numbers
from tests.engine.test_spilled_pages import PLENTY, TWO_BLOCKS
from tests.engine.test_worker import MODEL, Running, running

PROMPT = numbers(1, 200)
WHOLE = 6  # pages that a sequence of this prompt could begin behind


def own(one: Running, name: str, tokens: tuple[int, ...] = PROMPT, start: int = 0, end: int = 4, **given: Any) -> OpenSequence:
    """As an entry opens it: under the numerics of the engine, not of a test."""
    sequence = ask(name, tokens, start, end, **given)
    numerics = next(iter(one.engine.statistics().numerics.values()))
    assert sequence.prefix is not None
    return replace(sequence, prefix=replace(sequence.prefix, numerics=numerics))


class ExactPath(SplitPath):
    """Its pages are named by the engines' own numerics."""

    def answer(self, name: str, tokens: tuple[int, ...], **given: Any) -> list[Any]:
        numerics = next(iter(self.stages[0][0].engine.statistics().numerics.values()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.engine.test_prefix_cache.ask", lambda *args, **kw: _named(ask(*args, **kw), numerics))
            return super().answer(name, tokens, **given)


def _named(sequence: OpenSequence, numerics: str) -> OpenSequence:
    assert sequence.prefix is not None
    return replace(sequence, prefix=replace(sequence.prefix, numerics=numerics))


def carry(giver: Running, taker: Running, sequence: OpenSequence, most_bytes: int = PLENTY) -> int:
    """All that the giver has and the taker wants, batch after batch; how many pages came."""
    came = 0
    while True:
        wanted = taker.engine.pages.wanted(sequence)
        assert wanted is not None
        rest = replace(wanted.ask, names=wanted.ask.names[wanted.kept :])
        contents = giver.engine.pages.export_pages(rest, most_bytes) if rest.names else []
        if not contents:
            return came
        assert all(len(content) == wanted.page_bytes for content in contents)
        came += taker.engine.pages.import_pages(sequence, wanted.kept, contents)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spilled", [False, True])
def test_an_answer_from_a_peers_pages_equals_the_cold_one_bit_by_bit(
    dtype: str, spilled: bool, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = checkpoint_of("qwen3")
    little: dict[str, Any] = {"kv_memory_bytes": TWO_BLOCKS, "spill_disk_bytes": PLENTY, "spill_folder": tmp_path / "spill"}
    with (
        running((directory, 0, 4), dtype=dtype, **(little if spilled else {})) as giver,
        running((directory, 0, 4), dtype=dtype) as taker,
    ):
        there, here = ExactPath((giver, 0, 4)), ExactPath((taker, 0, 4))
        cold = there.answer("cold", PROMPT)
        if spilled:
            for seed in range(5, 9):
                there.answer(f"other{seed}", numbers(seed, 500))
            assert giver.engine.statistics().scheduler.spilled_pages > WHOLE
        assert carry(giver, taker, own(taker, "warm"), most_bytes=1) == WHOLE, "one page at least is in every answer"
        warm = here.answer("warm", PROMPT)
        assert warm[0].cached == 32 * WHOLE and bits(warm) == bits(cold)
        assert taker.engine.load_report().kv_blocks_used == 0
        assert carry(giver, taker, own(taker, "again")) == 0, "there is nothing more to want"


def test_the_stages_of_a_split_path_take_pages_each_of_its_own_layers(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    with running((directory, 0, 2)) as first, running((directory, 2, 4)) as last, running((directory, 1, 4)) as other:
        cold = ExactPath((first, 0, 2), (last, 2, 4)).answer("cold", PROMPT)
        assert carry(last, other, own(other, "warm", start=2)) == WHOLE, "as part of a wider span"
        assert carry(first, other, own(other, "warm", start=1)) == 0, "it has no pages of these layers"
        path = ExactPath((first, 0, 2), (other, 2, 4))
        warm = path.answer("warm", PROMPT)
        assert warm[0].cached == 32 * WHOLE and bits(warm) == bits(cold)


def test_pages_are_of_one_tenant_one_model_and_one_kind_of_kernel(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    with running((directory, 0, 4)) as giver, running((directory, 0, 4)) as taker:
        ExactPath((giver, 0, 4)).answer("cold", PROMPT)
        sequence = own(taker, "warm")
        wanted = taker.engine.pages.wanted(sequence)
        assert wanted is not None and wanted.whole == WHOLE and wanted.kept == 0
        assert len(giver.engine.pages.export_pages(wanted.ask, PLENTY)) == WHOLE
        changes: tuple[dict[str, Any], ...] = (
            {"model": "other"},
            {"start": 1},
            {"end": 3},
            {"start": 3, "end": 2},
            {"numerics": "n"},
            {"layout": b"of another shape"},
            {"names": own(taker, "x", salt=b"other tenant" + SALT).prefix.names},  # type: ignore[union-attr]
            {"names": ()},
            {"names": wanted.ask.names[1:2] + wanted.ask.names[:1] + (b"\0" * 16,)},
        )
        for change in changes:
            got = giver.engine.pages.export_pages(replace(wanted.ask, **change), PLENTY)
            assert len(got) == (2 if "names" in change and len(change["names"]) == 3 else 0), change
        assert taker.engine.pages.wanted(replace(sequence, prefix=None)) is None
        assert taker.engine.pages.wanted(replace(sequence, start=0, end=5)) is None, "no such layers here"
        assert taker.engine.pages.wanted(ask("other numerics", PROMPT)) is None
        assert taker.engine.pages.wanted(own(taker, "short", PROMPT[:32])) is None, "one token at least is computed"


def test_what_is_no_page_is_kept_out(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 0, 4)) as one:
        sequence = own(one, "a")
        wanted = one.engine.pages.wanted(sequence)
        assert wanted is not None
        zeros = b"\0" * wanted.page_bytes
        for damaged in (zeros[:-4], zeros + b"\0" * 4, b"", np.full(wanted.page_bytes // 4, np.nan, "<f4").tobytes()):
            with pytest.raises(ValueError, match="page"):
                one.engine.pages.import_pages(sequence, 0, [zeros, damaged])
        assert one.engine.statistics().scheduler.pages == 0
        one.engine.unload(Span(MODEL, 0, 4))
        assert one.engine.pages.import_pages(sequence, 0, [zeros]) == 0


def test_pages_of_peers_take_room_that_nobody_needs_and_no_more(checkpoint_of: Callable[[str], Path]) -> None:
    directory, long = checkpoint_of("llama"), numbers(2, 3 * BLOCK_TOKENS)
    with running((directory, 0, 4)) as giver, running((directory, 0, 4), kv_memory_bytes=TWO_BLOCKS) as taker:
        ExactPath((giver, 0, 4)).answer("cold", long)
        taker.engine.open(own(taker, "runs", numbers(3, 40), max_tokens=400))
        assert taker.engine.load_report().kv_blocks_used == 1
        wanted = taker.engine.pages.wanted(own(taker, "warm", long))
        assert wanted is not None and wanted.whole == 47
        contents = giver.engine.pages.export_pages(wanted.ask, PLENTY)
        assert len(contents) == 47
        taker.engine.pages.import_pages(own(taker, "warm", long), 0, contents)
        now = taker.engine.statistics().scheduler
        assert now.pages <= 16 and now.blocks_used == 1 and now.evicted == 0


def test_an_ask_is_bounded_before_it_is_looked_at() -> None:
    good = {"model": "m", "start": 0, "end": 4, "numerics": "n", "layout": b"l", "names": [b"x" * 16]}
    assert msgspec.convert(good, PageRequest).names == (b"x" * 16,)
    for bad in (
        {"names": [b"x" * 15]},
        {"names": [b"x" * 16] * 5000},
        {"start": -1},
        {"numerics": "n" * 201},
        {"layout": b"l" * 65},
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**good, **bad}, PageRequest)
