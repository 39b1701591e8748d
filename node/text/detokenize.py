"""From token ids to the text a client sees: a pure function of (request, token ids), one token at a time.

Three things hold text back. A character may be spread over several tokens. A stop string may have begun. And text
goes out only in whole tokens, because `seq` counts tokens: the text between two values of `seq` must not depend on
how the tokens arrived, or a reader that resumes at n would get letters twice or never. So the tokens that may be
counted, the *boundaries*, are found token by token, whatever the grouping:

* a token is a boundary when the text up to it ends with a whole character (or with bytes that can no longer become one);
* it is out once all its text lies before the first character that may belong to a stop string;
* one without text (an end-of-sequence token) is counted with the next text, or with the end.

Detokenising looks at a short window, not at the whole answer: the last settled tokens as context (their text decides
about the space between words), then those not settled yet. The idea of vLLM's and TGI's incremental detokenisers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Decode = Callable[[list[int]], str]
"""Text of a run of tokens: special tokens left out, no clean-up of spaces, U+FFFD for bytes that are no character."""

REPLACEMENT = "\ufffd"

SETTLING_TOKENS = 3
"""A character has at most four bytes: with three more tokens that brought bytes, an open one is complete or never will be."""

MAX_UNSETTLED_TOKENS = 64
"""A run of tokens that never ends on a character boundary is no text; after this many it goes out as it is.
It bounds the work per token."""

MAX_CONTEXT_TOKENS = 16
"""Context grows while it has no text of its own (special tokens), to at most this."""


@dataclass(frozen=True, slots=True)
class TextStep:
    """What new tokens bring. `token_ids` are those by which `seq` advances together with `text`.

    `stopped`: a stop string is complete. The choice wants no more tokens; `finish` comes next.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class TextEnd:
    """What the end brings: held text with its tokens, then the last tokens, which have no text of their own."""

    text: str
    token_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    finish_reason: str


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
        stop: Sequence[str] = (),
        include_stop: bool = False,
        *,
        end_tokens: Iterable[int] = (),
        context: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """`end_tokens`: those that end the sequence when drawn; they have no text, special or not, but for `include_stop`.

        `context`: the prompt's last few tokens, where the answer's first space depends on them. Stop strings that are
        complete within the first `min_tokens` tokens do not count.
        """
        textless = frozenset() if include_stop else frozenset(end_tokens)
        self._decode: Decode = lambda tokens: decode([token for token in tokens if token not in textless])
        self._stop = tuple(text for text in stop if text)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._context = list(context)[-MAX_CONTEXT_TOKENS:]
        self._context_text = self._decode(self._context) if self._context else ""
        if self._context_text.endswith(REPLACEMENT):  # the prompt ends within a character: it is no context
            self._context, self._context_text = [], ""
        self._unsettled: list[_Unsettled] = []
        self._settled_tokens = 0
        self._held = ""  # settled text that is not out yet
        self._held_tokens: deque[tuple[int, int]] = deque()  # (token, end of its text in `_held`); no text: where it was
        self._immune = 0  # length of `_held` in which a stop string may not end
        self._counted = 0
        self._stopped = False

    @property
    def counted(self) -> int:
        """Tokens counted so far: this choice's part of `seq`; after the end its completion tokens."""
        return self._counted

    def feed(self, tokens: Sequence[int]) -> TextStep:
        """Takes the next tokens. After the token that completed a stop string all others are dropped, now and later."""
        steps: list[TextStep] = []
        for token in tokens:
            if self._stopped:
                break
            self._take(token)
            self._cut_at_stop()
            steps.append(self._flush(final=self._stopped))
        return TextStep(
            "".join(step.text for step in steps),
            tuple(token for step in steps for token in step.token_ids),
            self._stopped,
        )

    def finish(self, reason: str) -> TextEnd:
        """The sequence ended with the tokens fed so far: what was held back goes out, half a character as U+FFFD.

        The reason is "stop" where a stop string was found, else the given one.
        """
        if not self._stopped:
            self._settle_rest()
            self._cut_at_stop()
        step = self._flush(final=True)
        rest = tuple(token for token, _ in self._held_tokens)
        self._counted += len(rest)
        self._held_tokens.clear()
        return TextEnd(step.text, step.token_ids, rest, "stop" if self._stopped else reason)

    # Detokenisation: tokens become settled text, with its boundaries.

    def _take(self, token: int) -> None:
        """One more token: settles what can be."""
        window = [*self._context, *(waiting.token for waiting in self._unsettled), token]
        whole = self._decode(window)
        known = len(self._context_text)
        self._unsettled.append(_Unsettled(token, whole[known:]))
        if not whole[known:].endswith(REPLACEMENT) or len(self._unsettled) >= MAX_UNSETTLED_TOKENS:
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
        """The first `count` unsettled tokens are final: their text comes with the one that completed it. The rest wait in
        a new window.
        """
        settled, rest = self._unsettled[:count], self._unsettled[count:]
        text = settled[-1].new_text
        last = next(index for index, waiting in enumerate(settled) if waiting.new_text == text)
        for index, waiting in enumerate(settled):
            self._hold(waiting.token, text if index == last else "")
        tokens = [waiting.token for waiting in settled]
        self._context = tokens if text else [*self._context, *tokens][-MAX_CONTEXT_TOKENS:]
        self._context_text = self._decode(self._context)
        self._unsettled = [_Unsettled(waiting.token, waiting.new_text[len(text) :]) for waiting in rest]

    def _settle_rest(self) -> None:
        if self._unsettled:
            self._settle(len(self._unsettled))

    def _hold(self, token: int, text: str) -> None:
        self._held += text
        self._held_tokens.append((token, len(self._held)))
        self._settled_tokens += 1
        if self._settled_tokens <= self._min_tokens:
            self._immune = len(self._held)

    # Stop strings: which of the settled text may go out.

    def _cut_at_stop(self) -> None:
        """Cuts the held text at the stop string that was complete first, if there is one."""
        found: tuple[int, int] | None = None  # (end, start): of those that end together the longest
        for stop in self._stop:
            start = self._held.find(stop, max(0, self._immune - len(stop) + 1))
            if start >= 0 and (found is None or (start + len(stop), start) < found):
                found = (start + len(stop), start)
        if found is None:
            return
        self._stopped = True
        cut = found[0] if self._include_stop else found[1]
        self._held = self._held[:cut]
        self._held_tokens = deque((token, min(end, cut)) for token, end in self._held_tokens)

    def _may_begin_stop(self) -> int:
        """Length of the held text's longest end with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0

    # Counting: whole tokens, with all their text.

    def _flush(self, *, final: bool) -> TextStep:
        """Sends the tokens up to the last one that brings text, all of it before a stop string's possible beginning.

        Tokens without text wait for the next that has some, or for the end.
        """
        if not self._held:
            return TextStep()
        safe = len(self._held) - (0 if final else self._may_begin_stop())
        count, text_end = 0, 0
        for index, (_, end) in enumerate(self._held_tokens):
            if end > safe:
                break
            if end > text_end:
                count, text_end = index + 1, end
        if count == 0:
            return TextStep()
        token_ids = tuple(self._held_tokens.popleft()[0] for _ in range(count))
        text, self._held = self._held[:text_end], self._held[text_end:]
        self._held_tokens = deque((token, end - text_end) for token, end in self._held_tokens)
        self._immune = max(0, self._immune - text_end)
        self._counted += count
        return TextStep(text, token_ids)
