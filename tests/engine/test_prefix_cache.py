"""The prefix cache: positions found in pages are not computed again, on any stage, and no bit of an answer depends on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from mesh.errors import Refused
from mesh.prefix import PREFIX_PAGE_TOKENS, further_names, prefix_salt
from mesh.view import Span
from node.engine.api import EngineOutput, HiddenOut, OpenSequence, Prefix, SequenceKey, TokenOut
from node.engine.kv.blocks import BLOCK_TOKENS
from node.engine.kv.cache import SequenceKV
from node.engine.kv.prefix_index import PAGES_PER_BLOCK
from tests.engine.test_worker import MODEL, Running, opening, running, wait_until

SALT = prefix_salt(b"secret", "tenant", "weights")


def numbers(seed: int, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def with_prefix(sequence: OpenSequence, tokens: tuple[int, ...], salt: bytes = SALT) -> OpenSequence:
    return replace(sequence, prefix=Prefix(salt, tuple(further_names(salt, [], tokens)), "n"))


def ask(name: str, tokens: tuple[int, ...], start: int = 0, end: int = 4, salt: bytes = SALT, **given: Any) -> OpenSequence:
    return with_prefix(opening(name, start, end, tokens, logprobs=3, **given), tokens, salt)


class SplitPath:
    """Connects the stages of a path, as `node.serving.stages` does."""

    def __init__(self, *stages: tuple[Running, int, int]) -> None:
        self.stages = stages
        self.counts: list[int] = []
        for number, (one, _, _) in enumerate(stages):
            one.forward = partial(self.forward_output, number)

    def forward_output(self, number: int, out: EngineOutput) -> None:
        if isinstance(out, HiddenOut):
            self.counts.append(out.count)
            self.stages[number + 1][0].engine.push(out)
        elif isinstance(out, TokenOut) and len(self.stages) > 1:
            self.stages[0][0].engine.token(out)

    def answer(self, name: str, tokens: tuple[int, ...], **given: Any) -> list[TokenOut]:
        """Opens the last stage first, as an entry does, and waits for the end of the answer."""
        pages = []
        for one, start, end in self.stages[:0:-1]:
            pages.append(one.engine.open(ask(name, tokens, start, end, bare=end < 4, **given)))
        first, start, end = self.stages[0]
        sequence = ask(name, tokens, start, end, **given)
        assert sequence.prefix is not None
        first.engine.open(replace(sequence, prefix=replace(sequence.prefix, elsewhere=min(pages, default=None))))
        drawn: list[TokenOut] = []
        while not drawn or drawn[-1].finish is None:
            out = self.stages[-1][0].next()
            assert isinstance(out, TokenOut), out
            drawn.append(out)
        for one, _, _ in self.stages:
            one.engine.close(sequence.key)
        return drawn


def bits(drawn: list[TokenOut]) -> list[tuple[Any, ...]]:
    """Returns everything but the keys: tokens, and logits as far as logprobs show them."""
    return [(out.position, out.token, out.finish, out.logprob, out.top) for out in drawn]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cached_answer_equals_the_cold_one_bit_by_bit(dtype: str, checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    prompts = [numbers(1, 150), numbers(1, 150)[:70] + numbers(2, 40), numbers(1, 2 * PREFIX_PAGE_TOKENS)]
    with running((directory, 0, 4), dtype=dtype) as one:
        other_salts = [prefix_salt(b"secret", f"tenant{number}", "weights") for number in range(3)]
        cold = [SplitPath((one, 0, 4)).answer(f"cold{n}", prompt, salt=other_salts[n]) for n, prompt in enumerate(prompts)]
        assert [drawn[0].cached for drawn in cold] == [0, 0, 0], "no tenant finds the pages of another"
        warm = [SplitPath((one, 0, 4)).answer(f"warm{n}", prompts[n]) for n in (0, 0, 1, 2)]
        assert [drawn[0].cached // PREFIX_PAGE_TOKENS for drawn in warm] == [0, 4, 2, 1], "one token at least is computed"
        assert [bits(drawn) for drawn in warm] == [bits(cold[n]) for n in (0, 0, 1, 2)]
        chat = prompts[0] + tuple(out.token for out in cold[0]) + numbers(5, 30)  # the next turn of a conversation
        turn = SplitPath((one, 0, 4)).answer("turn", chat)
        assert turn[0].cached == 160, "pages of the answer are kept too"
        assert bits(turn) == bits(SplitPath((one, 0, 4)).answer("coldturn", chat, salt=other_salts[0][::-1]))


def test_prompts_longer_than_a_block_are_restored_into_buffers(checkpoint_of: Callable[[str], Path]) -> None:
    prompt = numbers(3, 1000)
    with running((checkpoint_of("mistral"), 0, 4), step_tokens=256) as one:
        cold = SplitPath((one, 0, 4)).answer("cold", prompt, max_tokens=40)  # decodes past position 1024
        warm = SplitPath((one, 0, 4)).answer("warm", prompt, max_tokens=40)
        half = SplitPath((one, 0, 4)).answer("half", prompt[:600], max_tokens=3)
        assert (warm[0].cached, half[0].cached) == (992, 576)
        assert bits(cold) == bits(warm)
        statistics = one.engine.statistics().scheduler
        assert statistics.cached_tokens == 992 + 576 and statistics.prompt_tokens == 2600
        assert one.engine.load_report().kv_blocks_used == 0, "blocks of kept pages count as free"


def test_a_split_path_starts_behind_the_pages_that_all_stages_have(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("qwen3")
    prompt = numbers(4, 140)
    with running((directory, 0, 2)) as first, running((directory, 1, 3)) as middle, running((directory, 2, 4)) as last:
        path = SplitPath((first, 0, 1), (middle, 1, 3), (last, 3, 4))
        cold = path.answer("cold", prompt, max_tokens=30)
        warm = path.answer("warm", prompt, max_tokens=30)
        assert bits(warm) == bits(cold) and warm[0].cached == 128
        assert sum(path.counts) == 2 * (140 + 29) + 2 * (12 + 29), "both links carry the computed positions and no others"
        longer = prompt + tuple(out.token for out in cold)
        again = path.answer("again", longer, max_tokens=3)
        assert again[0].cached == 160, "names of the answer's pages reach the later stages"

        middle.engine.unload(Span(MODEL, 1, 3))
        middle.engine.load(directory, MODEL, 1, 3)
        path.answer("short", prompt[:70], max_tokens=3)  # now the middle stage has fewer pages than the others
        fewer = path.answer("fewer", prompt, max_tokens=30)
        assert bits(fewer) == bits(cold) and fewer[0].cached == 64


def test_activations_that_start_behind_missing_pages_are_dropped(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 2, 4)) as one:
        one.engine.open(ask("a", numbers(1, 70), 2, 4))
        one.engine.push(HiddenOut(opening("a").key, 64, 6, b"\0" * (6 * 64 * 4)))
        assert one.engine.statistics().scheduler.dropped == 1


def test_without_room_pages_are_evicted_and_sequences_are_not(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 0, 4), kv_memory_bytes=2 * BLOCK_TOKENS * 4 * 2 * 2 * 16 * 4) as one:
        assert one.engine.load_report().kv_blocks_total == 2
        path = SplitPath((one, 0, 4))
        for seed in range(6):
            assert len(path.answer(f"s{seed}", numbers(seed, 400 + 20 * seed))) == 12
        statistics = one.engine.statistics().scheduler
        assert statistics.evicted == 0 and 0 < statistics.pages <= 2 * PAGES_PER_BLOCK
        assert path.answer("again", numbers(5, 500))[0].cached == 480
        wait_until(lambda: one.engine.stored_pages(Span(MODEL, 0, 4)) <= statistics.pages + 1)
        assert path.answer("gone", numbers(0, 400))[0].cached == 0


def test_a_page_that_cannot_be_copied_is_not_offered(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running((checkpoint_of("llama"), 0, 4)) as one:
        path = SplitPath((one, 0, 4))
        with monkeypatch.context() as patch:

            def no_memory(*given: Any) -> None:
                raise MemoryError

            patch.setattr(SequenceKV, "page", no_memory)
            cold = path.answer("cold", numbers(1, 100))
        warm = path.answer("warm", numbers(1, 100))
        assert warm[0].cached == 0 and bits(warm) == bits(cold)
        assert path.answer("third", numbers(1, 100))[0].cached == 96


def test_closing_a_sequence_before_its_start_unpins_its_pages(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    two_blocks = 2 * BLOCK_TOKENS * 2 * 2 * 2 * 16 * 4
    with running((directory, 0, 2)) as first, running((directory, 2, 4), kv_memory_bytes=two_blocks) as last:
        SplitPath((first, 0, 2), (last, 2, 4)).answer("cold", numbers(1, 100))
        assert last.engine.open(ask("warm", numbers(1, 100), 2, 4)) == 3
        with pytest.raises(Refused):
            last.engine.open(opening("other", 2, 4))  # one block is the sequence's, the other has the pages that it will read
        last.engine.close(SequenceKey(opening("warm").stream, 0, 1))
        for name in ("other", "another"):
            last.engine.open(opening(name, 2, 4))
