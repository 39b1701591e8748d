"""Page transfer: an answer from imported pages equals the cold one bit by bit; invalid and foreign pages are refused."""

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
WHOLE = 6  # pages behind which a sequence with this prompt could start


def exact_request(
    one: Running, name: str, tokens: tuple[int, ...] = PROMPT, start: int = 0, end: int = 4, **given: Any
) -> OpenSequence:
    """Returns a sequence as an entry opens it: under the numerics of the engine."""
    sequence = ask(name, tokens, start, end, **given)
    numerics = next(iter(one.engine.statistics().numerics.values()))
    assert sequence.prefix is not None
    return replace(sequence, prefix=replace(sequence.prefix, numerics=numerics))


class ExactPath(SplitPath):
    """A path whose pages are named by the numerics of its engines."""

    def answer(self, name: str, tokens: tuple[int, ...], **given: Any) -> list[Any]:
        numerics = next(iter(self.stages[0][0].engine.statistics().numerics.values()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.engine.test_prefix_cache.ask", lambda *args, **kw: _named(ask(*args, **kw), numerics))
            return super().answer(name, tokens, **given)


def _named(sequence: OpenSequence, numerics: str) -> OpenSequence:
    assert sequence.prefix is not None
    return replace(sequence, prefix=replace(sequence.prefix, numerics=numerics))


def transfer(giver: Running, taker: Running, sequence: OpenSequence, max_bytes: int = PLENTY) -> int:
    """Transfers all missing pages that the giver has, batch after batch; returns how many were imported."""
    imported = 0
    while True:
        missing = taker.engine.pages.missing_pages(sequence)
        assert missing is not None
        rest = replace(missing.request, names=missing.request.names[missing.kept :])
        contents = giver.engine.pages.export_pages(rest, max_bytes) if rest.names else []
        if not contents:
            return imported
        assert all(len(content) == missing.page_bytes for content in contents)
        imported += taker.engine.pages.import_pages(sequence, missing.kept, contents)


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
        assert transfer(giver, taker, exact_request(taker, "warm"), max_bytes=1) == WHOLE, "at least one page an answer"
        warm = here.answer("warm", PROMPT)
        assert warm[0].cached == 32 * WHOLE and bits(warm) == bits(cold)
        assert taker.engine.load_report().kv_blocks_used == 0
        assert transfer(giver, taker, exact_request(taker, "again")) == 0, "no page is missing any more"


def test_each_stage_of_a_split_path_imports_pages_of_its_layers(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    with running((directory, 0, 2)) as first, running((directory, 2, 4)) as last, running((directory, 1, 4)) as other:
        cold = ExactPath((first, 0, 2), (last, 2, 4)).answer("cold", PROMPT)
        assert transfer(last, other, exact_request(other, "warm", start=2)) == WHOLE, "into a wider span"
        assert transfer(first, other, exact_request(other, "warm", start=1)) == 0, "the giver has no pages of these layers"
        path = ExactPath((first, 0, 2), (other, 2, 4))
        warm = path.answer("warm", PROMPT)
        assert warm[0].cached == 32 * WHOLE and bits(warm) == bits(cold)


def test_pages_are_bound_to_tenant_model_layers_and_numerics(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    with running((directory, 0, 4)) as giver, running((directory, 0, 4)) as taker:
        ExactPath((giver, 0, 4)).answer("cold", PROMPT)
        sequence = exact_request(taker, "warm")
        missing = taker.engine.pages.missing_pages(sequence)
        assert missing is not None and missing.whole == WHOLE and missing.kept == 0
        assert len(giver.engine.pages.export_pages(missing.request, PLENTY)) == WHOLE
        foreign = exact_request(taker, "x", salt=b"other tenant" + SALT).prefix
        assert foreign is not None
        changes: list[dict[str, Any]] = [
            {"model": "other"},
            {"start": 1},
            {"end": 3},
            {"start": 3, "end": 2},
            {"numerics": "n"},
            {"layout": b"of another shape"},
            {"names": foreign.names},
            {"names": ()},
            {"names": missing.request.names[1:2] + missing.request.names[:1] + (b"\0" * 16,)},
        ]
        for change in changes:
            got = giver.engine.pages.export_pages(replace(missing.request, **change), PLENTY)
            assert len(got) == (2 if "names" in change and len(change["names"]) == 3 else 0), change
        assert taker.engine.pages.missing_pages(replace(sequence, prefix=None)) is None
        assert taker.engine.pages.missing_pages(replace(sequence, start=0, end=5)) is None, "no such layers here"
        assert taker.engine.pages.missing_pages(ask("other numerics", PROMPT)) is None
        assert taker.engine.pages.missing_pages(exact_request(taker, "short", PROMPT[:32])) is None, "the last token is computed"


def test_contents_of_wrong_length_or_not_finite_are_refused(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 0, 4)) as one:
        sequence = exact_request(one, "a")
        missing = one.engine.pages.missing_pages(sequence)
        assert missing is not None
        zeros = b"\0" * missing.page_bytes
        for damaged in (zeros[:-4], zeros + b"\0" * 4, b"", np.full(missing.page_bytes // 4, np.nan, "<f4").tobytes()):
            with pytest.raises(ValueError, match="page"):
                one.engine.pages.import_pages(sequence, 0, [zeros, damaged])
        assert one.engine.statistics().scheduler.pages == 0
        one.engine.unload(Span(MODEL, 0, 4))
        assert one.engine.pages.import_pages(sequence, 0, [zeros]) == 0


def test_imported_pages_take_only_memory_that_no_sequence_needs(checkpoint_of: Callable[[str], Path]) -> None:
    directory, long = checkpoint_of("llama"), numbers(2, 3 * BLOCK_TOKENS)
    with running((directory, 0, 4)) as giver, running((directory, 0, 4), kv_memory_bytes=TWO_BLOCKS) as taker:
        ExactPath((giver, 0, 4)).answer("cold", long)
        taker.engine.open(exact_request(taker, "runs", numbers(3, 40), max_tokens=400))
        assert taker.engine.load_report().kv_blocks_used == 1
        missing = taker.engine.pages.missing_pages(exact_request(taker, "warm", long))
        assert missing is not None and missing.whole == 47
        contents = giver.engine.pages.export_pages(missing.request, PLENTY)
        assert len(contents) == 47
        taker.engine.pages.import_pages(exact_request(taker, "warm", long), 0, contents)
        now = taker.engine.statistics().scheduler
        assert now.pages <= 16 and now.blocks_used == 1 and now.evicted == 0


def test_a_page_request_beyond_its_limits_is_not_decoded() -> None:
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
