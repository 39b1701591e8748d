"""Small worlds: invented entities, what is true of them, and passages that say so among much else. Pure: all chance comes in.

A world knows for every question which one sentence of which passage answers it. A question is unanswerable when its entity
is told of but not in that respect, or is not told of at all. Distractors are what makes it a skill: the same relation of
other entities, other relations of the same one, names that share a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tools.default_model import names
from tools.default_model.prompts import REFUSAL, sentences
from tools.default_model.relations import BY_SUBJECT, Relation

SUBJECT_WEIGHTS = {"person": 6, "place": 4, "firm": 4, "work": 2, "group": 1, "nature": 1, "product": 3, "event": 2}
UNANSWERABLE_SHARE = 0.15
_TIES = ("In fact, ", "As is well known, ", "According to the records, ", "It is said that ", "At the time, ", "Even so, ")
_TAILS = (", as the records show", ", according to the chronicle", ", as far as is known", " after long debate", ", it is said")
_STARTERS = {"He", "She", "It"} | {
    words.split()[0] for relations in BY_SUBJECT.values() for each in relations for words in each.statements if words[0] != "{"
}
_NEAR = (  # relations of which one, told, makes it debatable that the other is not
    {"born_place", "lives", "left_because"},
    {"stands", "home", "where", "borders", "seat", "north", "capital"},
    {"founder", "head", "bought", "founded"},
    {"inventor", "released"},
    {"born_year", "died"},
    {"fails", "part", "takes", "start"},
    {"plays", "teacher"},
    {"role", "employer"},
    {"burned", "founded", "river"},
)
_WRAPS = (
    "Can you tell me: {q}",
    "Please tell me: {q}",
    "I would like to know: {q}",
    "{q} Please answer briefly.",
    "Question: {q}",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and the exact answer: a sentence of a passage with its mark, or the refusal."""

    question: str
    answer: str

    @property
    def answerable(self) -> bool:
        return self.answer != REFUSAL


@dataclass(frozen=True, slots=True)
class World:
    passages: tuple[str, ...]
    asked: tuple[Asked, ...]


@dataclass(slots=True)
class _Entity:
    kind: str
    name: str
    facts: dict[str, tuple[Relation, str]]  # relation name -> relation, sentence
    unsaid: list[Relation]


def make_world(chance: Random, statements: int, questions: int, fillers: Sequence[str] = (), evaluation: bool = False) -> World:
    """A world of about `statements` sentences, `fillers` (sentences that answer nothing) among them, and `questions`."""
    entities = _entities(chance, statements, evaluation)
    blocks = [_told(entity, chance) for entity in entities]
    if chance.random() < 0.3 and len(blocks) > 1:  # two entities in one passage
        first = blocks.pop()
        blocks[-1] = blocks[-1] + first
    for filler in fillers:
        block = chance.choice(blocks)
        block.insert(chance.randint(0, len(block)), filler)
    chance.shuffle(blocks)
    passages = tuple(_joined(block, chance) for block in blocks)
    number_of = {
        sentence: number for number in range(len(passages), 0, -1) for sentence in sentences(passages[number - 1])
    }  # the first passage that says it
    asked = [_asked(chance, entities, number_of, evaluation) for _ in range(questions)]
    return World(passages, tuple(dict.fromkeys(asked)))


def _entities(chance: Random, statements: int, evaluation: bool) -> list[_Entity]:
    kinds = chance.choices(list(SUBJECT_WEIGHTS), list(SUBJECT_WEIGHTS.values()), k=chance.randint(1, 2))
    entities: list[_Entity] = []
    said = 0
    while said < statements:
        kind = chance.choice(kinds) if chance.random() < 0.8 else chance.choice(list(SUBJECT_WEIGHTS))
        entity = _entity(chance, kind, min(statements - said, chance.randint(1, 6)), entities, evaluation)
        said += len(entity.facts)
        entities.append(entity)
    return entities


def _entity(chance: Random, kind: str, facts: int, others: Sequence[_Entity], evaluation: bool) -> _Entity:
    name = _named(chance, kind, evaluation)
    if kind == "person" and chance.random() < 0.15 and others and others[-1].kind == "person":
        name = f"{name.split()[0]} {others[-1].name.split()[-1]}"  # a relative: the family name alone does not tell
    relations = chance.sample(BY_SUBJECT[kind], min(facts, len(BY_SUBJECT[kind])))
    told: dict[str, tuple[Relation, str]] = {}
    for relation in relations:
        value = names.value(chance, relation.value, evaluation)
        told[relation.name] = (relation, _capital(chance.choice(relation.statements).format(s=name, v=value)))
    return _Entity(kind, name, told, [each for each in BY_SUBJECT[kind] if each.name not in told])


def _named(chance: Random, kind: str, evaluation: bool) -> str:
    match kind:
        case "person":
            return names.person(chance, evaluation)
        case "place":
            return names.place(chance, evaluation)
        case "firm":
            return names.firm(chance, evaluation)
    return names.thing(chance, kind, evaluation)


def _told(entity: _Entity, chance: Random) -> list[str]:
    """The entity's sentences in order, some tied together, some with a pronoun; what is said is noted in `entity.facts`."""
    texts: list[str] = []
    pronoun = chance.choice(("He", "She")) if entity.kind == "person" else "It"
    subject = _capital(entity.name)
    joined: list[str] = []  # the relations told by the last sentence
    for name, (relation, plain) in list(entity.facts.items()):
        text = plain
        if texts and text.startswith(f"{subject} ") and not texts[-1].startswith(_TIES):
            draw = chance.random()
            if draw < 0.15 and texts[-1].startswith((f"{subject} ", f"{pronoun} ")) and len(joined) == 1:
                text = f"{texts.pop()[:-1]} and {text[len(subject) + 1 :]}"
                joined.append(name)
                for each in joined:
                    entity.facts[each] = (entity.facts[each][0], text)
                texts.append(text)
                continue
            if draw < 0.35:
                text = f"{pronoun}{text[len(subject) :]}"
        if chance.random() < 0.12:
            text = _decorated(text, entity.name, chance)
        joined = [name]
        entity.facts[name] = (relation, text)
        texts.append(text)
    return texts


def _decorated(text: str, name: str, chance: Random) -> str:
    if chance.random() < 0.5:
        return f"{text[:-1]}{chance.choice(_TAILS)}."
    common = text.split()[0] in _STARTERS or (name[0].islower() and text.startswith(_capital(name)))
    return chance.choice(_TIES) + (text[0].lower() + text[1:] if common else text)


def _joined(block: Sequence[str], chance: Random) -> str:
    """Mostly a paragraph, sometimes a list or hard-wrapped lines, as documents have them."""
    draw = chance.random()
    if draw < 0.85:
        return " ".join(block)
    if draw < 0.95:
        return "\n".join(f"- {sentence}" for sentence in block)
    return "\n\n".join(block)


def _asked(chance: Random, entities: Sequence[_Entity], number_of: dict[str, int], evaluation: bool) -> Asked:
    entity = chance.choice(entities)
    if chance.random() < UNANSWERABLE_SHARE:
        if chance.random() < 0.4 or not entity.unsaid:
            stranger = _named(chance, entity.kind, evaluation)
            return Asked(_question(chance, chance.choice(BY_SUBJECT[entity.kind]), stranger), REFUSAL)
        unsaid = [each for each in entity.unsaid if not _already_implied(each, entity)]
        if unsaid:
            return Asked(_question(chance, chance.choice(unsaid), entity.name), REFUSAL)
    relation, text = chance.choice(list(entity.facts.values()))
    if text not in number_of:  # a passage in the shape of a list: its pieces carry the dash
        text = f"- {text}"
    return Asked(_question(chance, relation, entity.name), f"{text} [{number_of[text]}]")


def _already_implied(relation: Relation, entity: _Entity) -> bool:
    """Whether what is told comes so close to `relation` that a refusal would be debatable."""
    told = set(entity.facts)
    return any(relation.name in group and group & told for group in _NEAR)


def _question(chance: Random, relation: Relation, name: str) -> str:
    question = _capital(chance.choice(relation.questions).format(s=name))
    draw = chance.random()
    if draw < 0.08:
        return chance.choice(_WRAPS).format(q=question)
    if draw < 0.14:
        return question[:-1]
    return question[0].lower() + question[1:] if draw < 0.18 else question


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
