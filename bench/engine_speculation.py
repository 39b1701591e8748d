"""What guessing saves an answer that copies, and costs one that does not: the same engine with and without, in turn.

`python -m bench.engine_speculation [--quick] [--threads N]`, or `measured` from `bench.engine`. The copying model is the one
given, retaught (`bench.copying`): its layers compute all that they did, and it recites passages that it knows. The prompt
holds a passage in which one token of sixteen is another, as where a text is to be corrected: so guesses go wrong now and
then. The other task is the model as it was, with random weights, drawing at temperature 1: nobody could guess its
answers. All answers must be equal with and without.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.copying import teach_to_copy
from bench.engine_asking import Answer, Asking, asking
from bench.engine_figure import run
from node.engine.model.checkpoint import read_checkpoint

PASSAGE_TOKENS = 160
ALTERED = 16  # each so-manieth token
BEGUN_TOKENS = 8  # of the answer, so that it is clear what to recite
ANSWER_TOKENS = 96
LAYER_SHARE = 0.03  # much more, and it loses the thread
KV_BYTES = 1 << 29


def make_copying(source: Path, target: Path) -> None:
    """The model in `source`, retaught, in `target`; its head becomes its own if it was the embedding's."""
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    tied = config.tie_word_embeddings
    config.tie_word_embeddings = False
    model: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.bfloat16, local_files_only=True)
    if tied:
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    teach_to_copy(model, PASSAGE_TOKENS, LAYER_SHARE)
    model.save_pretrained(target)


def _altered(passage: int, strays: list[int]) -> list[int]:
    """The prompt: the passage with some tokens replaced by strays, then its true beginning."""
    true = range(passage * PASSAGE_TOKENS, (passage + 1) * PASSAGE_TOKENS)
    with_strays = [strays[at] if at % ALTERED == ALTERED - 1 else token for at, token in enumerate(true)]
    return with_strays + list(true[:BEGUN_TOKENS])


def _in_turn(engine: Asking, prompts: list[list[int]], temperature: float) -> tuple[list[Answer], list[Answer]]:
    """All prompts without and with guesses, each first once for nothing, so that its pages are there both times."""
    taken: tuple[list[Answer], list[Answer]] = ([], [])
    for prompt in prompts:
        engine.ask(prompt, 1)
        for guesses in (False, True):
            engine.engine.speculates = guesses
            taken[guesses].append(engine.ask(prompt, ANSWER_TOKENS, temperature))
    return taken


def _figures(engine: Asking, prompts: list[list[int]], temperature: float) -> dict[str, Any]:
    engine.engine.speculates = True
    engine.ask(prompts[0], ANSWER_TOKENS, temperature)  # what steps of these sizes cost is learnt before
    before = engine.engine.statistics().scheduler
    without, with_guesses = _in_turn(engine, prompts, temperature)
    after = engine.engine.statistics().scheduler
    guessed, true = after.guessed_tokens - before.guessed_tokens, after.true_guesses - before.true_guesses
    wall_s = [statistics.median(each.took_s for each in taken) for taken in (without, with_guesses)]
    cpu_s = [statistics.median(each.cpu_s for each in taken) for taken in (without, with_guesses)]
    return {
        "speedup": round(wall_s[0] / wall_s[1], 3),
        "speedup_cpu_time": round(cpu_s[0] / cpu_s[1], 3),
        "without_tok_s": round(ANSWER_TOKENS / wall_s[0], 1),
        "with_tok_s": round(ANSWER_TOKENS / wall_s[1], 1),
        "guessed_tokens": guessed,
        "true_guesses": true,
        "exact": [each.tokens for each in without] == [each.tokens for each in with_guesses],
    }


def measured(directory: Path, threads: int, rounds: int) -> dict[str, Any]:
    """`spec_speedup_copy_task`, and `spec_speedup_other_task`, which is 1 where guessing knows when to stop."""
    vocab_size = read_checkpoint(directory).vocab_size
    numbers = torch.Generator().manual_seed(5)
    random = torch.randint(0, vocab_size, (rounds, PASSAGE_TOKENS + BEGUN_TOKENS), generator=numbers).tolist()
    altered = [_altered(passage % (vocab_size // PASSAGE_TOKENS), strays) for passage, *strays in random]
    with tempfile.TemporaryDirectory() as folder:
        make_copying(directory, Path(folder))
        with asking(Path(folder), threads, KV_BYTES) as engine:
            copying = _figures(engine, altered, temperature=0.0)
    with asking(directory, threads, KV_BYTES) as engine:
        other = _figures(engine, random, temperature=1.0)
    return {
        "spec_speedup_copy_task": copying["speedup"],
        "spec_speedup_other_task": other["speedup"],
        "answer_tokens": ANSWER_TOKENS,
        "rounds": rounds,
        "copying": copying,
        "other": other,
    }


if __name__ == "__main__":
    run("engine_speculation", measured, rounds=5, quick_rounds=2)
