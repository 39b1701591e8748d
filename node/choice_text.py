"""One choice's text, with the log-probabilities of the tokens that it goes out with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from node.generation import Emit
from node.requests import GenerateRequest, TokenLogprob
from node.text import Decode, TextState, TextStep

CONTEXT_TOKENS = 4  # of the prompt: whether the answer's first word begins with a space may depend on them


class ChoiceText:
    def __init__(self, decode: Decode, request: GenerateRequest, prompt: Sequence[int]) -> None:
        self.whole = ""
        self._decode = decode
        self._wants_logprobs = request.sampling.logprobs is not None
        self._held: deque[TokenLogprob] = deque()  # of tokens whose text is not out yet
        self._state = TextState(
            decode,
            stop=request.stop,
            include_stop=request.include_stop,
            context=prompt[-CONTEXT_TOKENS:],
            min_tokens=request.sampling.min_tokens,
        )

    def feed(self, emit: Emit) -> tuple[TextStep, tuple[TokenLogprob, ...]]:
        """What the next token brings out, and the log-probabilities of the tokens that go with it."""
        if self._wants_logprobs:
            self._held.append(self._logprob(emit))
        step = self._state.feed([emit.token], emit.finish)
        self.whole += step.text
        counted = min(len(step.token_ids), len(self._held))
        return step, tuple(self._held.popleft() for _ in range(counted))

    def _logprob(self, emit: Emit) -> TokenLogprob:
        top = tuple((token, self._decode([token]), logprob) for token, logprob in emit.top)
        return TokenLogprob(emit.token, self._decode([emit.token]), emit.logprob or 0.0, top)
