"""Text out of tokens: whole characters, no stop strings, and `seq` that means the same whatever way the tokens came."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mesh.errors import LocalError
from node.text import MOST_UNSETTLED_TOKENS, TextState, TextStep

END = 999
"""A special token: it has no text."""


class ByteTokens:
    """A byte-level tokenizer: token i stands for `vocabulary[i]`; it counts the work asked of it."""

    def __init__(self, *vocabulary: bytes) -> None:
        self.vocabulary = vocabulary
        self.tokens_decoded = 0

    def decode(self, tokens: list[int]) -> str:
        self.tokens_decoded += len(tokens)
        return b"".join(self.vocabulary[token] for token in tokens if token != END).decode("utf-8", "replace")


def run(state: TextState, *groups: list[int], finish: str | None = None) -> list[TextStep]:
    return [state.feed(group, finish if index == len(groups) - 1 else None) for index, group in enumerate(groups)]


def words(*texts: str, **options: object) -> TextState:
    return TextState(ByteTokens(*(text.encode() for text in texts)).decode, **options)  # type: ignore[arg-type]


def test_plain_tokens_go_out_one_by_one() -> None:
    state = words("Hello", " world")
    assert run(state, [0], [1]) == [TextStep("Hello", (0,)), TextStep(" world", (1,))]
    assert state.counted == 2


def test_half_a_character_waits_and_is_counted_with_the_token_that_completes_it() -> None:
    tokens = ByteTokens(b"a\xf0\x9f", b"\x98", b"\x80b")
    assert run(TextState(tokens.decode), [0], [1], [2]) == [TextStep(), TextStep(), TextStep("a😀b", (0, 1, 2))]


def test_bytes_that_are_no_character_do_not_hold_the_stream_for_long() -> None:
    state = TextState(ByteTokens(b"\x80").decode)
    steps = run(state, *([0] for _ in range(10)))
    assert [step.text for step in steps] == ["", "", "", *["\ufffd"] * 7]
    assert state.feed([], "length") == TextStep("\ufffd\ufffd\ufffd", (0, 0, 0), "length")


def test_an_open_character_at_the_end_is_flushed_as_a_replacement() -> None:
    state = TextState(ByteTokens(b"a", b"\xe2\x82").decode)
    assert run(state, [0], [1], finish="length") == [TextStep("a", (0,)), TextStep("\ufffd", (1,), "length")]


def test_a_stop_string_over_three_tokens_is_never_seen() -> None:
    state = words("one ", "EN", "D", "!", stop=("END!",))
    assert run(state, [0], [1], [2]) == [TextStep("one ", (0,)), TextStep(), TextStep()]
    assert state.feed([3]) == TextStep("", (), "stop", (1, 2, 3))
    assert (state.counted, state.finish_reason) == (4, "stop")


def test_what_only_looked_like_a_stop_string_comes_later_and_is_counted_then() -> None:
    state = words("one ", "EN", "TER", stop=("END",))
    assert run(state, [0, 1], [2]) == [TextStep("one ", (0,)), TextStep("ENTER", (1, 2))]


def test_a_token_half_of_which_may_begin_a_stop_string_waits_as_a_whole() -> None:
    state = words("one E", "at", stop=("END",))
    assert run(state, [0], [1]) == [TextStep(), TextStep("one Eat", (0, 1))]


def test_text_before_the_stop_string_in_its_first_token_goes_out_at_the_end() -> None:
    state = words("one E", "ND two", "three", stop=("END",))
    assert run(state, [0, 1, 2]) == [TextStep("one ", (0,), "stop", (1,))]
    assert state.feed([2], "length") == TextStep()
    assert state.counted == 2


def test_include_stop_shows_it_and_nothing_after_it() -> None:
    state = words("one E", "ND two", stop=("END",), include_stop=True)
    assert run(state, [0, 1]) == [TextStep("one END", (0, 1), "stop")]


def test_the_stop_string_that_is_complete_first_wins_and_of_those_the_longest() -> None:
    assert run(words("abcd", stop=("bcd", "bc")), [0]) == [TextStep("a", (0,), "stop")]
    assert run(words("xabc", stop=("bc", "abc")), [0]) == [TextStep("x", (0,), "stop")]


def test_a_stop_string_wins_over_the_length_and_a_stop_token_shows_no_text() -> None:
    assert run(words("a.", stop=(".",)), [0], finish="length") == [TextStep("a", (0,), "stop")]
    assert run(words("a", "</s>"), [0, 1], finish="stop") == [TextStep("a", (0,), "stop", (1,))]
    assert run(words("a", "</s>", include_stop=True), [0, 1], finish="stop") == [TextStep("a</s>", (0, 1), "stop")]
    assert run(words("a."), [0, END], finish="stop") == [TextStep("a.", (0,), "stop", (END,))]


def test_text_held_for_a_stop_string_is_flushed_by_the_end() -> None:
    state = words("a E", "N", stop=("END",))
    assert run(state, [0, 1, END], finish="stop") == [TextStep("a EN", (0, 1), "stop", (END,))]


def test_stop_strings_within_the_least_tokens_do_not_count() -> None:
    state = words("a.", "b.", stop=(".",), min_tokens=2)
    assert run(state, [0, 1, 0]) == [TextStep("a.b.a", (0, 1, 0), "stop")]


def test_an_empty_stop_string_is_none() -> None:
    assert run(words("a", stop=("",)), [0]) == [TextStep("a", (0,))]


def test_a_stop_without_its_token_is_our_own_mistake() -> None:
    with pytest.raises(LocalError):
        words("a").feed([], "stop")


PIECES = [
    b"a",
    b" b",
    b"END",
    b"E",
    b"N",
    b"D.",
    b"\xe2\x82\xac",
    b"\xe2",
    b"\x82",
    b"\xac",
    b"\xac\xe2",
    b"\xf0\x9f",
    b"\x98\x80",
    b"\xff",
    b"",
]
TOKENS = st.lists(st.sampled_from([*range(len(PIECES)), END]), max_size=40)
STOPS = st.lists(st.sampled_from(["END", "ND.", "bE", "a a", "€E", "EE"]), max_size=2, unique=True)


def grouped(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    return [tokens[start:end] for start, end in pairwise(edges)] or [[]]


def transcript(steps: list[TextStep]) -> dict[int, str]:
    """Text by `seq`, the seq of the last text before an end included."""
    seq, text = 0, ""
    out = {0: ""}
    for step in steps:
        seq, text = seq + len(step.token_ids), text + step.text
        out[seq] = text
    return out


@settings(max_examples=300)
@given(
    tokens=TOKENS,
    cuts=st.lists(st.integers(0, 40)),
    stop=STOPS,
    include=st.booleans(),
    finish=st.sampled_from(["length", "stop"]),
)
@example(tokens=[10, 8, 10, 8, 10, 8], cuts=[3], stop=[], include=False, finish="length")
def test_text_and_seq_depend_on_the_tokens_alone_not_on_how_they_came(
    tokens: list[int], cuts: list[int], stop: list[str], include: bool, finish: str
) -> None:
    tokens = [*tokens, END]
    vocabulary = ByteTokens(*PIECES)

    def steps(groups: list[list[int]]) -> tuple[list[TextStep], TextState]:
        state = TextState(vocabulary.decode, stop=stop, include_stop=include)
        return run(state, *groups, finish=finish), state

    (singly, one), (together, other) = steps([[token] for token in tokens]), steps(grouped(tokens, cuts))
    fine, coarse = transcript(singly), transcript(together)
    assert {seq: fine.get(seq) for seq in coarse} == coarse
    last_fine, last_coarse = max(fine), max(coarse)
    assert (last_fine, fine[last_fine]) == (last_coarse, coarse[last_coarse])
    assert (one.counted, one.finish_reason) == (other.counted, other.finish_reason)
    sent = [token for step in together for token in (*step.token_ids, *step.end_token_ids)]
    assert sent == tokens[: one.counted]


@settings(max_examples=300)
@given(tokens=TOKENS, stop=STOPS)
def test_the_text_is_that_of_all_tokens_cut_at_the_stop_string_that_ends_first(tokens: list[int], stop: list[str]) -> None:
    vocabulary = ByteTokens(*PIECES)
    state = TextState(vocabulary.decode, stop=stop)
    shown = transcript(run(state, *[[token] for token in tokens], [], finish="length"))
    whole = vocabulary.decode(tokens)
    ends = [(whole.find(each) + len(each), whole.find(each)) for each in stop if each in whole]
    assert shown[max(shown)] == (whole[: min(ends)[1]] if ends else whole)
    assert state.finish_reason == ("stop" if ends else "length")
    for seq, text in shown.items():
        if seq < max(shown):
            assert text == vocabulary.decode(tokens[:seq])


def test_the_cost_is_linear_even_where_no_token_ends_a_character() -> None:
    for piece in (b"x", b"\x80", b"\xac\xe2", b""):
        costs = []
        for count in (400, 800):
            vocabulary = ByteTokens(piece)
            TextState(vocabulary.decode, stop=("xy",)).feed([0] * count)
            costs.append(vocabulary.tokens_decoded)
        assert costs[1] <= 2.1 * costs[0]
        assert costs[0] <= 400 * (MOST_UNSETTLED_TOKENS * 2)


TEXT = "The €5 note, naïve café — 日本語 の 文章 and 😀😀👩‍👩‍👧 emoji\n\n  indented\tcode: x = [1, 2];  "


def trained(*, byte_level: bool) -> Tokenizer:
    """A tiny BPE as in the field: byte-level (GPT-2, Llama 3), or with `▁` for spaces and byte tokens (Llama 2)."""
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
        return tokenizer
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Tehnotacdi", "▁t", "he", "▁the"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "t"), ("h", "e"), ("▁t", "he")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("byte_level", [True, False])
def test_real_tokenizers_give_the_same_text_piece_by_piece(byte_level: bool) -> None:
    tokenizer = trained(byte_level=byte_level)
    tokens = tokenizer.encode(TEXT).ids
    steps = run(TextState(tokenizer.decode), *[[token] for token in tokens], [], finish="length")
    assert "".join(step.text for step in steps) == tokenizer.decode(tokens)
    assert not any("\ufffd" in step.text for step in steps)


def test_the_prompts_last_tokens_decide_about_the_first_space() -> None:
    tokenizer = trained(byte_level=False)
    prompt, answer = tokenizer.encode("the note").ids, tokenizer.encode("the cat").ids
    assert TextState(tokenizer.decode, context=prompt[-4:]).feed(answer).text == " the cat"
    assert TextState(tokenizer.decode).feed(answer).text == "the cat"
