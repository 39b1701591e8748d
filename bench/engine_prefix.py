"""What a known beginning saves: the time to the first token of a prompt that was asked before, against one that was not.

`python -m bench.engine_prefix [--quick] [--threads N]`, or `measured` from `bench.engine`. Prompts have a thousand random
tokens; each is asked cold, then again, in turn. The second time its whole pages are copied and the rest is computed; the
answers must be equal.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from bench.engine_asking import Answer, asking
from bench.engine_figure import run
from node.engine.model.checkpoint import read_checkpoint

PROMPT_TOKENS = 1000
ANSWER_TOKENS = 4
WARM_UP_TOKENS = 40
KV_BYTES = 1 << 30  # room for all prompts and their pages


def measured(directory: Path, threads: int, rounds: int) -> dict[str, Any]:
    """`prefix_hit_ttft_ratio`: median over median, of wall time; of CPU time beside it, for busy machines."""
    vocab_size = read_checkpoint(directory).vocab_size
    numbers = torch.Generator().manual_seed(3)
    cold: list[Answer] = []
    hit: list[Answer] = []
    with asking(directory, threads, KV_BYTES) as engine:
        engine.ask(range(WARM_UP_TOKENS), ANSWER_TOKENS)
        for _ in range(rounds):
            prompt = torch.randint(0, vocab_size, (PROMPT_TOKENS,), generator=numbers).tolist()
            cold.append(engine.ask(prompt, ANSWER_TOKENS))
            hit.append(engine.ask(prompt, ANSWER_TOKENS))
            if cold[-1].cached or not hit[-1].cached:
                raise RuntimeError(f"expected a miss and a hit, got {cold[-1].cached} and {hit[-1].cached} tokens from pages")
    ttft_s = [statistics.median(each.ttft_s for each in asked) for asked in (cold, hit)]
    cpu_s = [statistics.median(each.cpu_s for each in asked) for asked in (cold, hit)]
    return {
        "prefix_hit_ttft_ratio": round(ttft_s[1] / ttft_s[0], 4),
        "prompt_tokens": PROMPT_TOKENS,
        "cached_tokens": hit[0].cached,
        "rounds": rounds,
        "cold_ttft_ms": round(ttft_s[0] * 1e3, 1),
        "hit_ttft_ms": round(ttft_s[1] * 1e3, 1),
        "cpu_ratio_whole_answers": round(cpu_s[1] / cpu_s[0], 4),
        "exact": [each.tokens for each in cold] == [each.tokens for each in hit],
    }


if __name__ == "__main__":
    run("engine_prefix", measured, rounds=5, quick_rounds=3)
