"""How fast a prompt is read: 512 tokens alone, ours beside transformers' forward and llama.cpp, taking turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from bench import llama_side
from bench.engine_sides import Step, faster, judged_by, plain_model, timed
from bench.llama_side import LlamaCpp
from node.engine.model.attention import Segment
from node.engine.model.stage import Stage

PROMPT_TOKENS = 512
TRIAL_TOKENS = 64  # by which the dtype is found that suits transformers
LLAMA_KINDS = ("f16", "bf16")


def prompt(vocab_size: int, tokens: int) -> list[int]:
    numbers = torch.Generator().manual_seed(5)
    return torch.randint(0, vocab_size, (tokens,), generator=numbers).tolist()


def read_by_us(stage: Stage, ids: list[int]) -> int:
    """The token after the prompt."""
    segments = [Segment(0, len(ids), 0, stage.sequence())]
    logits = stage.forward(0, stage.layers, segments, range(len(ids)), ids=ids, logits_at=[len(ids) - 1])
    return int(logits[0].argmax())


@torch.inference_mode()
def read_by_transformers(model: Any, ids: list[int]) -> int:
    out = model(torch.tensor([ids]), past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    return int(out.logits[0, -1].argmax())


def best_model(directory: Path, threads: int) -> tuple[torch.dtype, Any]:
    """transformers' model in the dtype in which it reads a prompt faster here."""
    best: tuple[float, torch.dtype] | None = None
    for dtype in (torch.bfloat16, torch.float32):
        model = plain_model(directory, dtype)
        ids = prompt(model.config.vocab_size, TRIAL_TOKENS)
        took = [timed(lambda model=model, ids=ids: read_by_transformers(model, ids)) for _ in range(2)]
        best = min(best or (float("inf"), dtype), (min(map(judged_by(threads).of, took)), dtype), key=lambda pair: pair[0])
        del model
        gc.collect()
    assert best is not None
    return best[1], plain_model(directory, best[1])


def measured(
    directory: Path, stage: Stage, threads: int, rounds: int, with_llama: bool, tokens: int = PROMPT_TOKENS
) -> dict[str, Any]:
    """`prefill_vs_hf`: the median time of transformers over ours; `prefill`: all sides."""
    dtype, model = best_model(directory, threads)
    ids = prompt(model.config.vocab_size, tokens)
    no_llama = llama_side.absent() if with_llama else "left out"
    children = {} if no_llama else {kind: LlamaCpp(llama_side.convert(directory, kind), threads) for kind in LLAMA_KINDS}
    sides: dict[str, Callable[[], Step]] = {
        "ours": lambda: timed(lambda: read_by_us(stage, ids)),
        "hf": lambda: timed(lambda: read_by_transformers(model, ids)),
        **{kind: lambda child=child: child.read([ids]) for kind, child in children.items()},  # type: ignore[misc]
    }
    try:
        taken: dict[str, list[Step]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, side in sides.items():
                step = side()
                if number:  # in the first round memory is cold
                    taken[name].append(step)
    finally:
        for child in children.values():
            child.close()
    return {"prefill_vs_hf": compared(taken, threads)["hf"], "prefill": _told(taken, threads, tokens, dtype, no_llama)}


def compared(taken: dict[str, list[Step]], threads: int) -> dict[str, float]:
    """How many times as long each side takes as ours, by the clock that counts here."""
    of = judged_by(threads).of
    median_s = {name: statistics.median(map(of, steps)) for name, steps in taken.items()}
    return {name: round(each / median_s["ours"], 2) for name, each in median_s.items() if name != "ours"}


def _told(taken: dict[str, list[Step]], threads: int, tokens: int, dtype: torch.dtype, no_llama: str) -> dict[str, Any]:
    cpu_s = {name: statistics.median(step.cpu_s for step in steps) for name, steps in taken.items()}
    wall_s = {name: statistics.median(step.wall_s for step in steps) for name, steps in taken.items()}
    llama = faster({kind: taken[kind] for kind in LLAMA_KINDS if kind in taken}, threads)
    return {
        "tokens": tokens,
        "vs_hf": round(wall_s["hf"] / wall_s["ours"], 2),
        "vs_hf_cpu_time": round(cpu_s["hf"] / cpu_s["ours"], 2),
        "vs_llamacpp": round(wall_s[llama] / wall_s["ours"], 2) if llama else None,
        "vs_llamacpp_cpu_time": round(cpu_s[llama] / cpu_s["ours"], 2) if llama else None,
        "hf_dtype": str(dtype).removeprefix("torch."),
        "llamacpp_weights": llama or no_llama,
        "tokens_a_cpu_s": {name: round(tokens / each, 1) for name, each in cpu_s.items()},
        "ms": {name: round(1e3 * each, 1) for name, each in wall_s.items()},
        "cpu_ms": {name: round(1e3 * each, 1) for name, each in cpu_s.items()},
        "rounds": len(taken["hf"]),
    }
