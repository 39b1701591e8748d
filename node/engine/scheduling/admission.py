"""What no sequence may ask of a stage: told at once, before anything is held for it."""

from __future__ import annotations

from mesh.errors import BadRequest
from mesh.prefix import NAME_BYTES, PREFIX_PAGE_TOKENS
from node.engine.api import OpenSequence
from node.engine.kv.blocks import blocks_for
from node.engine.scheduling.step_plan import HeldSpan


def check(sequence: OpenSequence, held: HeldSpan) -> None:
    """Raises BadRequest: the sequence can never be served by this span, or says things that cannot be."""
    end = sequence.prompt_tokens + sequence.sampling.max_tokens
    if held.whole_only and (sequence.start, sequence.end) != (0, held.layers):
        raise BadRequest(f"{sequence.model} is served whole only, not its layers {sequence.start}:{sequence.end}", param="layers")
    if end > held.max_model_len:
        raise BadRequest(
            f"{sequence.prompt_tokens} prompt tokens and {sequence.sampling.max_tokens} new ones exceed the context of "
            f"{held.max_model_len} tokens; shorten the prompt or lower max_tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if not 1 <= sequence.prompt_tokens <= sequence.known < end:
        raise BadRequest(f"expected 1 <= prompt tokens <= known tokens < {end}, got {sequence.prompt_tokens}, {sequence.known}")
    if blocks_for(end) > held.pool.total:
        raise BadRequest(f"{end} tokens need {blocks_for(end)} KV blocks, but this node has {held.pool.total} in all")
    if sequence.start == 0 or sequence.end == held.layers:
        _check_tokens(sequence, held)
    prefix = sequence.prefix
    if prefix is not None:
        whole = sequence.known // PREFIX_PAGE_TOKENS
        if len(prefix.names) != whole or any(len(name) != NAME_BYTES for name in prefix.names):
            raise BadRequest(f"expected {whole} names of {NAME_BYTES} bytes for the pages of {sequence.known} tokens")


def _check_tokens(sequence: OpenSequence, held: HeldSpan) -> None:
    if len(sequence.tokens) != sequence.known:
        raise BadRequest(f"expected all {sequence.known} known tokens at the first and last stage, got {len(sequence.tokens)}")
    worst = max(sequence.tokens, key=lambda token: token if token >= 0 else held.vocab_size - token)
    if not 0 <= worst < held.vocab_size:
        raise BadRequest(f"token {worst} is outside the vocabulary of {held.vocab_size}", param="prompt")
