"""Decode speed of the built-in engine against plain transformers, in one process, taking turns.

`python -m bench.engine [--quick] [--threads N] [--out FILE]`; the last line is one JSON object.

The model is Llama-shaped with random weights, about 100 million parameters, stored in bfloat16. Ours is the stage as the
engine runs it: own attention and KV, packed linears, the kernel that a node would choose here, the exactness rules on.
The opponent is the model's own forward with a DynamicCache and SDPA, which computes no sampling either, in whichever of
float32 and bfloat16 is faster for it on this machine at that batch. Both decode greedily from the same prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from bench.machine import machine
from node.engine.attention import Segment
from node.engine.checkpoint import read_checkpoint
from node.engine.loading import Loaded, is_exact, load_stage

PROMPT_TOKENS = 64
BATCHES = (1, 8, 32)


def make_checkpoint(directory: Path) -> None:
    config = LlamaConfig(
        vocab_size=16_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def prompts(batch: int) -> torch.Tensor:
    """`[batch, PROMPT_TOKENS]`, the same for everyone."""
    return torch.randint(0, 16_000, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch))


class Ours:
    """Greedy decoding of a batch on a loaded stage."""

    def __init__(self, loaded: Loaded, batch: int) -> None:
        self.stage = loaded.stage
        self.caches = [self.stage.sequence() for _ in range(batch)]
        self.position = PROMPT_TOKENS
        self.tokens = []
        for cache, prompt in zip(self.caches, prompts(batch).tolist()):
            logits = self._forward([Segment(0, PROMPT_TOKENS, 0, cache)], range(PROMPT_TOKENS), prompt, [PROMPT_TOKENS - 1])
            self.tokens += logits.argmax(-1).tolist()

    def _forward(self, segments: list[Segment], positions: Any, ids: list[int], at: Any) -> torch.Tensor:
        return self.stage.forward(0, self.stage.layers, segments, positions, ids=ids, logits_at=at)

    def step(self) -> list[int]:
        segments = [Segment(row, 1, self.position, cache) for row, cache in enumerate(self.caches)]
        logits = self._forward(segments, [self.position] * len(segments), self.tokens, range(len(segments)))
        self.position += 1
        self.tokens = logits.argmax(-1).tolist()
        return self.tokens


class Plain:
    """Greedy decoding of a batch with transformers as it comes."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.tokens = self._forward(prompts(batch))

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def step(self) -> list[int]:
        self.tokens = self._forward(self.tokens)
        return self.tokens[:, 0].tolist()


def interleaved_s(runners: dict[str, Callable[[], Any]], rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds a step: each runner runs `steps` steps in turn, `rounds` times; one turn before does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name, step in runners.items():
            for _ in range(steps):
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
                step()
                if number:
                    times[name].append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
    return times


def measure(loaded: Loaded, plain: dict[str, Any], batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """One row of the report; figures come from the median step. CPU time is what remains comparable on a busy machine."""
    runners: dict[str, Callable[[], Any]] = {"ours": Ours(loaded, batch).step}
    runners |= {name: Plain(model, batch).step for name, model in plain.items()}
    times = interleaved_s(runners, rounds, steps)
    seconds = {name: statistics.median(wall for wall, _ in taken) for name, taken in times.items()}
    cpu_s = {name: statistics.median(cpu for _, cpu in taken) for name, taken in times.items()}
    opponent = min(plain, key=lambda name: seconds[name])
    return {
        "batch": batch,
        "ours_tok_s": round(batch / seconds["ours"], 1),
        "hf_tok_s": round(batch / seconds[opponent], 1),
        "vs_hf": round(seconds[opponent] / seconds["ours"], 2),
        "vs_hf_cpu_time": round(min(cpu_s[name] for name in plain) / cpu_s["ours"], 2),
        "hf_dtype": opponent,
        "ours_step_ms": round(seconds["ours"] * 1e3, 2),
        "ours_cpu_ms": round(cpu_s["ours"] * 1e3, 2),
        "hf_step_ms": {name: round(seconds[name] * 1e3, 2) for name in plain},
        "hf_cpu_ms": {name: round(cpu_s[name] * 1e3, 2) for name in plain},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer steps: ends within a minute")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, the same for both sides")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds, steps = (4, 8) if options.quick else (12, 16)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        make_checkpoint(directory)
        checkpoint = read_checkpoint(directory)
        began_s = time.perf_counter()
        loaded = load_stage(checkpoint, 0, checkpoint.layers, "auto", options.threads)
        load_s = time.perf_counter() - began_s
        plain = {
            str(dtype).removeprefix("torch."): AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
            ).eval()
            for dtype in (torch.bfloat16, torch.float32)
        }
        here = machine()
        kernel, threads = loaded.stage.kernel.name, options.threads
        print(
            f"{here['cpu']}, {here['isa']}, load {here['load_average']}; {kernel}, {threads} thread(s)",
            file=sys.stderr,
            flush=True,
        )
        rows = []
        for batch in BATCHES:
            rows.append(measure(loaded, plain, batch, rounds, steps))
            print(rows[-1], file=sys.stderr, flush=True)
    report = {
        "bench": "engine",
        "command": "python -m bench.engine" + (" --quick" if options.quick else "") + f" --threads {options.threads}",
        "rows": rows,
        "isa": here["isa"],
        "kernel": loaded.stage.kernel.name,
        "threads": options.threads,
        "exact": is_exact(loaded.numerics),
        "parameters": loaded.stage.parameters,
        "load_s": round(load_s, 2),
        "machine": here,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
