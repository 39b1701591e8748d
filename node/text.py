"""From token ids to the text a client sees: a pure function of (request, token ids), one token at a time.

Three things hold text back. A character may be spread over several tokens. A stop string may have begun. And text
goes out only in whole tokens, because `seq` counts tokens: the text between two values of `seq` must not depend on
how the tokens arrived, or a reader that resumes at n would get letters twice or never. So the tokens that may be
counted, the *boundaries*, are found token by token, whatever the grouping:

* a token is a boundary when the text up to it ends with a whole character (or with bytes that can no longer become one);
* it is out once all its text lies before the first character that may belong to a stop string.

Detokenising looks at a short window, not at the whole answer: the last settled tokens as context (their text decides
about the space between words), then those not settled yet. The idea of vLLM's and TGI's incremental detokenisers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh.errors import LocalError

Decode = Callable[[list[int]], str]
"""Text of a run of tokens: special tokens left out, no clean-up of spaces, U+FFFD for bytes that are no character."""

REPLACEMENT = "\ufffd"

SETTLING_TOKENS = 3
"""A character has at most four bytes: with three more tokens that brought bytes, an open one is complete or never will be."""

MOST_UNSETTLED_TOKENS = 64
"""A run of tokens that never ends on a character boundary is no text; after this many it goes out as it is.
It bounds the work per token."""

MOST_CONTEXT_TOKENS = 16
"""Context grows while it has no text of its own (special tokens), to at most this."""


@dataclass(frozen=True, slots=True)
class TextStep:
    """What one `feed` brings. `token_ids` are those by which `seq` advances with `text`; with a `finish_reason` the
    choice is over, and `end_token_ids` are the last ones, which brought no text.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    end_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A token after which the text may still change: the window's new text with it as the last token."""

    token: int
    new_text: str


class TextState:
    """One choice's text. Not shared, holds no reference to the network or the engine."""

    def __init__(
        self,
        decode: Decode,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        context: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """`context`: the prompt's last few tokens, where the answer's first space depends on them.

        Stop strings that are complete within the first `min_tokens` tokens do not count.
        """
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._context = [token for token in context][-MOST_CONTEXT_TOKENS:]
        self._context_text = decode(self._context) if self._context else ""
        if self._context_text.endswith(REPLACEMENT):  # the prompt ends within a character: it is no context
            self._context, self._context_text = [], ""
        self._unsettled: list[_Unsettled] = []
        self._settled_tokens = 0
        self._held = ""  # settled text that is not out yet
        self._held_tokens: deque[tuple[int, int | None]] = deque()  # (token, end of its text in `_held`; None: no boundary)
        self._immune = 0  # length of `_held` in which a stop string may not end
        self._counted = 0
        self._finish_reason: str | None = None

    @property
    def counted(self) -> int:
        """Tokens counted so far: this choice's part of `seq`; after the end its completion tokens."""
        return self._counted

    @property
    def finish_reason(self) -> str | None:
        """None while the choice goes on."""
        return self._finish_reason

    def feed(self, tokens: Sequence[int], finish: str | None = None) -> TextStep:
        """Takes the next tokens; `finish` says that the engine ended the sequence with the last of them.

        A stop string ends the choice with "stop"; tokens that came after its last one are dropped, now and later.
        With `finish` "stop" the last token is the one that ended the sequence, and its text is shown only with
        `include_stop`.

        Raises:
            LocalError: `finish` "stop" without the token that ended the sequence.
        """
        if self._finish_reason is not None:
            return TextStep()
        if finish == "stop" and not tokens:
            raise LocalError('finish "stop" comes with the token that ended the sequence')
        steps: list[TextStep] = []
        for index, token in enumerate(tokens):
            last = finish is not None and index == len(tokens) - 1
            if last and finish == "stop" and not self._include_stop:
                self._settle_rest()
                if not self._cut_at_stop():
                    self._hold(token, "", boundary=True)
                return _joined([*steps, self._end("stop")])
            self._take(token)
            if last:
                self._settle_rest()
            if self._cut_at_stop():
                return _joined([*steps, self._end("stop")])
            if not last:
                steps.append(self._flush())
        if finish is not None:
            self._settle_rest()
            steps.append(self._end("stop" if self._cut_at_stop() else finish))
        return _joined(steps)

    # Detokenisation: tokens become settled text, with its boundaries.

    def _take(self, token: int) -> None:
        """One more token: settles what can be."""
        window = [*self._context, *(waiting.token for waiting in self._unsettled), token]
        whole = self._decode(window)
        known = len(self._context_text)
        self._unsettled.append(_Unsettled(token, whole[known:]))
        if not whole[known:].endswith(REPLACEMENT) or len(self._unsettled) >= MOST_UNSETTLED_TOKENS:
            self._settle(len(self._unsettled))
            return
        settled = self._surely_settled()
        if settled:
            self._settle(settled)

    def _surely_settled(self) -> int:
        """How many of the unsettled tokens end where no later byte can change the text: 0 or the furthest such one."""
        newest = self._unsettled[-1].new_text
        bytes_after = 0
        for index in range(len(self._unsettled) - 1, 0, -1):
            earlier = self._unsettled[index - 1].new_text
            if self._unsettled[index].new_text != earlier:
                bytes_after += 1
            if bytes_after >= SETTLING_TOKENS:
                return index if newest.startswith(earlier) else 0
        return 0

    def _settle(self, count: int) -> None:
        """The first `count` unsettled tokens are final: the last of them is a boundary. The rest wait in a new window."""
        settled, rest = self._unsettled[:count], self._unsettled[count:]
        text = settled[-1].new_text
        for waiting in settled[:-1]:
            self._hold(waiting.token, "", boundary=False)
        self._hold(settled[-1].token, text, boundary=True)
        tokens = [waiting.token for waiting in settled]
        self._context = tokens if text else [*self._context, *tokens][-MOST_CONTEXT_TOKENS:]
        self._context_text = self._decode(self._context)
        self._unsettled = []
        for waiting in rest:
            self._unsettled.append(_Unsettled(waiting.token, waiting.new_text[len(text) :]))

    def _settle_rest(self) -> None:
        if self._unsettled:
            self._settle(len(self._unsettled))

    def _hold(self, token: int, text: str, *, boundary: bool) -> None:
        self._held += text
        self._held_tokens.append((token, len(self._held) if boundary else None))
        self._settled_tokens += 1
        if self._settled_tokens <= self._min_tokens:
            self._immune = len(self._held)

    # Stop strings: which of the settled text may go out.

    def _cut_at_stop(self) -> bool:
        """Cuts the held text at the stop string that was complete first, if there is one."""
        found: tuple[int, int] | None = None  # (end, start): of those that end together the longest
        for stop in self._stop:
            start = self._held.find(stop, max(0, self._immune - len(stop) + 1))
            if start >= 0 and (found is None or (start + len(stop), start) < found):
                found = (start + len(stop), start)
        if found is None:
            return False
        end, start = found
        self._held = self._held[: end if self._include_stop else start]
        return True

    def _may_begin_stop(self) -> int:
        """Length of the held text's longest end with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0

    # Counting: whole tokens, with all their text.

    def _flush(self) -> TextStep:
        """Sends the tokens up to the last boundary before anything that may be a stop string's beginning."""
        safe = len(self._held) - self._may_begin_stop()
        count, text_end = 0, 0
        for index, (_, end) in enumerate(self._held_tokens):
            if end is not None:
                if end > safe:
                    break
                count, text_end = index + 1, end
        if count == 0:
            return TextStep()
        token_ids = tuple(self._held_tokens.popleft()[0] for _ in range(count))
        text, self._held = self._held[:text_end], self._held[text_end:]
        self._held_tokens = deque((token, None if end is None else end - text_end) for token, end in self._held_tokens)
        self._immune = max(0, self._immune - text_end)
        self._counted += count
        return TextStep(text, token_ids)

    def _end(self, reason: str) -> TextStep:
        """Everything goes out: with the text the tokens that brought it, then those that brought none."""
        bearing, reached = 0, 0
        for index, (_, end) in enumerate(self._held_tokens):
            if reached < len(self._held):
                bearing = index + 1
            if end is not None:
                reached = min(end, len(self._held))
        tokens = tuple(token for token, _ in self._held_tokens)
        step = TextStep(self._held, tokens[:bearing], reason, tokens[bearing:])
        self._counted += len(tokens)
        self._finish_reason = reason
        self._held = ""
        self._held_tokens.clear()
        return step


def _joined(steps: list[TextStep]) -> TextStep:
    """The steps of one `feed` as one; only the last can be an end."""
    if not steps:
        return TextStep()
    return TextStep(
        "".join(step.text for step in steps),
        tuple(token for step in steps for token in step.token_ids),
        steps[-1].finish_reason,
        steps[-1].end_token_ids,
    )
