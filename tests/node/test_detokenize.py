"""Text out of tokens: whole characters, no stop strings, and `seq` that means the same whatever way the tokens came."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from node.text.detokenize import MAX_UNSETTLED_TOKENS, TextEnd, TextState, TextStep

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


def run(state: TextState, *groups: list[int]) -> list[TextStep]:
    return [state.feed(group) for group in groups]


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
    assert state.finish("length") == TextEnd("\ufffd\ufffd\ufffd", (0, 0, 0), (), "length")


def test_an_open_character_at_the_end_is_flushed_as_a_replacement() -> None:
    state = TextState(ByteTokens(b"a", b"\xe2\x82").decode)
    assert run(state, [0], [1, END]) == [TextStep("a", (0,)), TextStep()]
    assert state.finish("stop") == TextEnd("\ufffd", (1,), (END,), "stop")


def test_a_stop_string_over_three_tokens_is_never_seen() -> None:
    state = words("one ", "EN", "D", "!", stop=("END!",))
    assert run(state, [0], [1], [2]) == [TextStep("one ", (0,)), TextStep(), TextStep()]
    assert state.feed([3]) == TextStep("", (), stopped=True)
    assert state.finish("length") == TextEnd("", (), (1, 2, 3), "stop")
    assert state.counted == 4


def test_what_only_looked_like_a_stop_string_comes_later_and_is_counted_then() -> None:
    state = words("one ", "EN", "TER", stop=("END",))
    assert run(state, [0, 1], [2]) == [TextStep("one ", (0,)), TextStep("ENTER", (1, 2))]


def test_a_token_half_of_which_may_begin_a_stop_string_waits_as_a_whole() -> None:
    state = words("one E", "at", stop=("END",))
    assert run(state, [0], [1]) == [TextStep(), TextStep("one Eat", (0, 1))]


def test_text_before_the_stop_string_in_its_first_token_goes_out_at_once_and_later_tokens_are_dropped() -> None:
    state = words("one E", "ND two", "three", stop=("END",))
    assert run(state, [0, 1, 2], [2]) == [TextStep("one ", (0,), stopped=True), TextStep(stopped=True)]
    assert state.finish("length") == TextEnd("", (), (1,), "stop")
    assert state.counted == 2


def test_include_stop_shows_it_and_nothing_after_it() -> None:
    state = words("one E", "ND two", stop=("END",), include_stop=True)
    assert run(state, [0, 1]) == [TextStep("one END", (0, 1), stopped=True)]


def test_the_stop_string_that_is_complete_first_wins_and_of_those_the_longest() -> None:
    assert run(words("abcd", stop=("bcd", "bc")), [0]) == [TextStep("a", (0,), stopped=True)]
    assert run(words("xabc", stop=("bc", "abc")), [0]) == [TextStep("x", (0,), stopped=True)]


def test_a_stop_string_within_half_a_characters_reach_is_found_at_the_end() -> None:
    state = TextState(ByteTokens(b"a.\xe2").decode, stop=(".",))
    assert run(state, [0]) == [TextStep()]
    assert state.finish("length") == TextEnd("a", (0,), (), "stop")


def test_the_token_that_ended_the_sequence_shows_no_text_unless_asked_for() -> None:
    state = words("a", "</s>", end_tokens=(1,))
    assert run(state, [0], [1]) == [TextStep("a", (0,)), TextStep()]
    assert state.finish("stop") == TextEnd("", (), (1,), "stop")
    assert run(words("a", "</s>", end_tokens=(1,), include_stop=True), [0, 1]) == [TextStep("a</s>", (0, 1))]


def test_a_token_without_text_is_counted_with_the_next_that_has_some() -> None:
    assert run(words("a"), [0, END], [0]) == [TextStep("a", (0,)), TextStep("a", (END, 0))]


def test_text_held_for_a_stop_string_is_flushed_by_the_end() -> None:
    state = words("a E", "N", stop=("END",))
    assert run(state, [0, 1, END]) == [TextStep()]
    assert state.finish("stop") == TextEnd("a EN", (0, 1), (END,), "stop")


def test_stop_strings_within_the_least_tokens_do_not_count() -> None:
    state = words("a.", "b.", stop=(".",), min_tokens=2)
    assert run(state, [0, 1, 0]) == [TextStep("a.b.a", (0, 1, 0), stopped=True)]


def test_a_stop_string_that_does_not_count_yet_is_not_held_back() -> None:
    assert run(words("a.", stop=(".", "xyz"), min_tokens=2), [0]) == [TextStep("a.", (0,))]


def test_a_prompt_that_ends_within_a_character_loses_nothing_of_the_answer() -> None:
    vocabulary = ByteTokens(b"\xe2\x82", b"\xac", b"a")
    state = TextState(vocabulary.decode, context=[0])
    assert "".join(step.text for step in run(state, [1], [2])) == "\ufffda"


def test_an_empty_stop_string_is_none() -> None:
    assert run(words("a", stop=("",)), [0]) == [TextStep("a", (0,))]


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


def transcript(steps: list[TextStep], end: TextEnd) -> dict[int, str]:
    """Text by `seq`, as a client could resume there."""
    seq, text = 0, ""
    out = {0: ""}
    every: list[TextStep | TextEnd] = [*steps, end]
    for step in every:
        seq, text = seq + len(step.token_ids), text + step.text
        assert step.token_ids or not step.text
        out[seq] = text
    return out


@settings(max_examples=300)
@given(tokens=TOKENS, cuts=st.lists(st.integers(0, 40)), stop=STOPS, include=st.booleans())
@example(tokens=[10, 8, 10, 8, 10, 8], cuts=[3], stop=[], include=False)
def test_text_and_seq_depend_on_the_tokens_alone_not_on_how_they_came(
    tokens: list[int], cuts: list[int], stop: list[str], include: bool
) -> None:
    tokens = [*tokens, END]
    vocabulary = ByteTokens(*PIECES)

    def answer(groups: list[list[int]]) -> tuple[dict[int, str], list[TextStep | TextEnd], int]:
        state = TextState(vocabulary.decode, stop, include)
        steps = run(state, *groups)
        end = state.finish("length")
        return transcript(steps, end), [*steps, end], state.counted

    fine, _, counted = answer([[token] for token in tokens])
    coarse, steps, counted_together = answer(grouped(tokens, cuts))
    assert {seq: fine.get(seq) for seq in coarse} == coarse
    assert (max(fine), fine[max(fine)], counted) == (max(coarse), coarse[max(coarse)], counted_together)
    sent = [token for step in steps for token in step.token_ids]
    assert [*sent, *steps[-1].end_token_ids] == tokens[:counted]  # type: ignore[union-attr]


@settings(max_examples=300)
@given(tokens=TOKENS, stop=STOPS)
@example(tokens=[*[10, 8] * 8, 9], stop=[])  # no token ends with a character until the last
def test_the_text_is_that_of_all_tokens_cut_at_the_stop_string_that_ends_first(tokens: list[int], stop: list[str]) -> None:
    vocabulary = ByteTokens(*PIECES)
    state = TextState(vocabulary.decode, stop)
    steps = run(state, *[[token] for token in tokens])
    end = state.finish("length")
    shown = transcript(steps, end)
    whole = vocabulary.decode(tokens)
    ends = [(whole.find(each) + len(each), whole.find(each)) for each in stop if each in whole]
    assert shown[max(shown)] == (whole[: min(ends)[1]] if ends else whole)
    assert end.finish_reason == ("stop" if ends else "length")
    for seq, text in shown.items():
        if seq < max(shown):
            assert text == vocabulary.decode(tokens[:seq])


def test_the_cost_is_linear_even_where_no_token_ends_a_character() -> None:
    for pieces in ((b"x",), (b"\x80",), (b"\xac\xe2", b"\x82"), (b"",)):
        costs = []
        for count in (400, 800):
            vocabulary = ByteTokens(*pieces)
            TextState(vocabulary.decode, stop=("xy",)).feed([index % len(pieces) for index in range(count)])
            costs.append(vocabulary.tokens_decoded)
        assert costs[1] <= 2.3 * costs[0]
        assert costs[0] <= 400 * (MAX_UNSETTLED_TOKENS * 2)


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
    state = TextState(tokenizer.decode)
    steps = run(state, *[[token] for token in tokens])
    assert "".join(step.text for step in steps) + state.finish("length").text == tokenizer.decode(tokens)
    assert not any("\ufffd" in step.text for step in steps)


def test_the_prompts_last_tokens_decide_about_the_first_space() -> None:
    tokenizer = trained(byte_level=False)
    prompt, answer = tokenizer.encode("the note").ids, tokenizer.encode("the cat").ids
    assert TextState(tokenizer.decode, context=prompt[-4:]).feed(answer).text == " the cat"
    assert TextState(tokenizer.decode).feed(answer).text == "the cat"
