"""One choice's text, with the log-probabilities of the tokens that it goes out with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from node.entry.generation_events import EmitToken
from node.requests import GenerateRequest, TokenLogprob
from node.text.detokenize import Decode, TextState

CONTEXT_TOKENS = 4  # of the prompt: whether the answer's first word begins with a space may depend on them


@dataclass(frozen=True, slots=True)
class ChoiceStep:
    """What one token brings out. With `finish_reason` the choice is over; `end_token_ids` are last and brought no text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None = None
    end_token_ids: tuple[int, ...] = ()


class ChoiceText:
    def __init__(self, decode: Decode, request: GenerateRequest, prompt: Sequence[int], end_tokens: Sequence[int]) -> None:
        self.whole = ""
        self._decode = decode
        self._wants_logprobs = request.sampling.logprobs is not None
        self._held: deque[TokenLogprob] = deque()  # of tokens whose text is not out yet
        self._state = TextState(
            decode,
            request.stop,
            request.include_stop,
            end_tokens=end_tokens,
            context=prompt[-CONTEXT_TOKENS:],
            min_tokens=request.sampling.min_tokens,
        )

    def feed(self, emit: EmitToken) -> ChoiceStep:
        """The next token; never called again after an outcome with a finish reason."""
        if self._wants_logprobs:
            self._held.append(self._logprob(emit))
        step = self._state.feed([emit.token])
        if emit.finish is None and not step.stopped:
            return self._outcome(step.text, step.token_ids, None, ())
        end = self._state.finish(emit.finish or "stop")
        return self._outcome(step.text + end.text, step.token_ids + end.token_ids, end.finish_reason, end.end_token_ids)

    def _outcome(self, text: str, token_ids: tuple[int, ...], reason: str | None, end_token_ids: tuple[int, ...]) -> ChoiceStep:
        self.whole += text
        counted = min(len(token_ids), len(self._held))
        logprobs = tuple(self._held.popleft() for _ in range(counted))
        return ChoiceStep(text, token_ids, logprobs, reason, end_token_ids)

    def _logprob(self, emit: EmitToken) -> TokenLogprob:
        top = tuple((token, self._decode([token]), logprob) for token, logprob in emit.top)
        return TokenLogprob(emit.token, self._decode([emit.token]), emit.logprob or 0.0, top)
