"""What the small model learns from: worlds, questions about prose, prompts. Every answer is in the passages, word for word."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rag.context import build
from rag.types import Passage
from tools.default_model import names, tasks
from tools.default_model.bm25 import Bm25
from tools.default_model.inquiries import Rarity, ask_about, stems
from tools.default_model.prompts import CHAT_TEMPLATE, LABELS, REFUSAL, grounded, opening, sentences
from tools.default_model.prose import Prose, paragraphs_of
from tools.default_model.relations import BY_SUBJECT
from tools.default_model.vocabulary import train_tokenizer
from tools.default_model.worlds import World, make_world

ROOT = Path(__file__).parents[2]
TEXTS = st.text(alphabet=st.sampled_from('ab .\n?!|-#*>"[1]¶é'), min_size=1, max_size=80)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    chance = Random(3)
    texts = [text for _ in range(200) for text in make_world(chance, 10, 3).passages]
    made: Any = PreTrainedTokenizerFast  # untyped
    found: PreTrainedTokenizerFast = made(tokenizer_object=train_tokenizer(texts, 600), chat_template=CHAT_TEMPLATE)
    return found


def quotable(world: World) -> set[str]:
    return {f"{piece} [{number}]" for number, text in enumerate(world.passages, start=1) for piece in sentences(text)}


@given(st.integers(0, 2**32), st.integers(2, 30))
def test_an_answer_of_a_world_is_one_of_its_sentences_with_its_number_or_the_refusal(seed: int, statements: int) -> None:
    world = make_world(Random(seed), statements, 6, fillers=["Nothing is said here."])
    assert world.asked
    assert all(asked.answer in quotable(world) or asked.answer == REFUSAL for asked in world.asked)


def test_a_seed_makes_one_world() -> None:
    assert make_world(Random(5), 12, 4) == make_world(Random(5), 12, 4) != make_world(Random(6), 12, 4)


def test_names_of_evaluation_worlds_never_occur_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[bool, set[str]] = {True: set(), False: set()}
    coined = names.coined

    def noted(chance: Random, ending: str, evaluation: bool) -> str:
        made[evaluation].add(word := coined(chance, ending, evaluation))
        return word

    monkeypatch.setattr(names, "coined", noted)
    for evaluation in (True, False):
        before = len(made[not evaluation])
        texts = [text for seed in range(300) for text in make_world(Random(seed), 12, 4, evaluation=evaluation).passages]
        assert len(made[not evaluation]) == before, "a world takes all its names from one part"
        assert any(word in text for word in made[evaluation] for text in texts[:20])
    assert len(made[True]) > 1000 < len(made[False]) and not made[True] & made[False]
    assert all(names.held_out(word) for word in made[True])


def test_relations_name_their_subject_everywhere_and_their_value_in_every_statement() -> None:
    relations = [relation for each in BY_SUBJECT.values() for relation in each]
    assert len(relations) > 50
    for relation in relations:
        assert len(relation.statements) >= 3 and len(relation.questions) >= 3, relation
        assert all("{s}" in text and "{v}" in text for text in relation.statements), relation
        assert all("{s}" in text and "{v}" not in text and text.endswith("?") for text in relation.questions), relation


def test_questions_about_prose_fit_the_sentence_that_answers_better_than_any_other() -> None:
    paragraphs = [
        "The scheduler keeps a queue of waiting rows. A row leaves the queue when its blocks are free.",
        "A certificate proves who a node is. Without a certificate a node listens on loopback only.",
        "The journal records every token before the client sees it. Two peers hold a copy of the journal.",
    ]
    rarity = Rarity([*paragraphs, *["Nothing of the kind is said here."] * 400])
    chance = Random(2)
    found = [asked for _ in range(60) for asked in ask_about(paragraphs, rarity, chance, 3)]
    assert len(found) > 60
    pieces = [piece for text in paragraphs for piece in sentences(text)]
    for asked in found:
        assert tasks.quoted(asked.answer)[0] in pieces
        scores = {piece: rarity.fit(set(stems(asked.question)), set(stems(piece))) for piece in pieces}
        assert max(scores, key=scores.__getitem__) == tasks.quoted(asked.answer)[0], asked


@given(st.lists(TEXTS, min_size=1, max_size=4), TEXTS.filter(str.strip))
def test_the_template_and_the_generator_make_the_same_prompt(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], question: str
) -> None:
    passages = [Passage("file-0", 'a "quoted" name.md', text, 0, len(text), 1.0) for text in texts]
    content = build(question, passages, 1 << 20, len).prompt
    shown = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    assert shown == opening(grounded(question, texts))


def test_a_sentence_has_a_label_and_after_the_last_label_they_begin_again(tokenizer: PreTrainedTokenizerFast) -> None:
    passages = [" ".join(f"Sentence {number}." for number in range(60)), " ".join(f"Piece {number}." for number in range(60))]
    shown = grounded("What?", passages).splitlines()
    assert shown[0] == "<|s1|>Sentence 0. [1]" and shown[93] == "<|s94|>Piece 33. [2]" and shown[94] == "<|s1|>Piece 34. [2]"
    assert all(
        tokenizer.tokenize(each) == [each] and not tokenizer.decode(tokenizer.encode(each), skip_special_tokens=True)
        for each in LABELS
    )
    assert tokenizer.decode(tokenizer.encode("<|s7|>So it is. [1]<|end|>"), skip_special_tokens=True) == "So it is. [1]"


def test_the_template_leaves_other_messages_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": 'What is <passage number="1"?'},
    ]
    shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert shown == (
        '<|system|>Be brief.<|user|>Hello!<|assistant|>Good day.<|end|><|user|>What is <passage number="1"?<|assistant|>'
    )


def test_a_citation_is_one_token_and_digits_stand_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("done. [12]")[-1] == " [12]"
    assert tokenizer.tokenize("in 1904")[-4:] == ["1", "9", "0", "4"]
    for text in ("naïve 李白 🦊\n\n\tx", "A [1] b [20] c [21]"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prose_is_sentences_and_no_parameters_code_or_headings() -> None:
    kept = "Returns the nearest node that answers, or nothing. The search is exact, and its cost grows with the number of nodes."
    docstring = f"""{kept}

    Args:
        nodes: the nodes to be searched, in any order at all, as long as none of them occurs more than once in the list.

    >>> nearest([1, 2, 3]) and this is a line of code that is long enough to count as a paragraph of prose, if it were one.
    """
    assert list(paragraphs_of(docstring)) == [kept]


def test_prose_is_kept_with_its_sources(tmp_path: Path) -> None:
    from tools.default_model.prose import Source

    prose = Prose(("One paragraph.",), (Source("here", "MIT", 1, 14),))
    prose.save(tmp_path / "prose.json")
    assert Prose.load(tmp_path / "prose.json") == prose


def test_the_questions_on_the_documents_are_answered_there_word_for_word() -> None:
    asked = json.loads(tasks.QUESTIONS.read_text())
    assert len(asked) == 30
    for each in asked:
        assert tasks.holds((ROOT / each["document"]).read_text(), each["answers"]), each


def test_bm25_prefers_the_rare_word_and_the_shorter_text() -> None:
    texts = ["the mesh and the node", "the mesh has a journal", "the mesh has a journal and much more besides, such as shards"]
    assert Bm25(texts).best("Which mesh has a journal?", 2) == [1, 2]


def test_outputs_are_judged_by_sentence_and_number() -> None:
    assert tasks.quoted("It opened in 1904. [3]") == ("It opened in 1904.", 3)
    assert tasks.quoted("It opened.") == ("It opened.", 0)
    assert tasks.holds("The `mesh`  is\nup. [1]", ["the mesh is up"]) and not tasks.holds("The mesh.", ["is up"])
