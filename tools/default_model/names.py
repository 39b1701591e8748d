"""Invented names and the values that facts are made of. Pure: all chance comes in.

Names come from syllables. One in `HELD_OUT` of all words made so, chosen by a checksum of its letters, is kept for evaluation
and never occurs in training: a held-out world has names that the model has not met.
"""

from __future__ import annotations

import zlib
from random import Random

HELD_OUT = 8

_ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "qu",
    "r",
    "s",
    "sh",
    "sk",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "y",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ei", "ia", "oa", "ou", "a", "e", "i", "o", "u"]
_CODAS = ["", "", "", "l", "m", "n", "nd", "r", "rk", "rn", "s", "sk", "st", "t", "th", "x"]
_PLACE_ENDINGS = ["ton", "burg", "vik", "mouth", "ford", "dale", "holm", "stad", "wick", "a", "ia", "ora"]
_PERSON_ENDINGS = ["a", "o", "en", "is", "ka", "el", "an", "i", "us", "ine"]
_FIRM_ENDINGS = ["Works", "Systems", "and Sons", "Group", "Mills", "Press", "Labs", "Foods", "Lines", "Bank"]

THINGS = {
    "work": ["bridge", "tower", "library", "museum", "theatre", "lighthouse", "canal", "castle", "harbour", "observatory"],
    "group": ["orchestra", "choir", "football club", "order", "union", "society", "academy", "league"],
    "nature": ["river", "lake", "mountain", "forest", "valley", "island", "glacier", "desert"],
    "product": ["engine", "camera", "compiler", "radio", "telescope", "printer", "protocol", "database", "vaccine", "glider"],
    "event": ["festival", "battle", "treaty", "fair", "expedition", "conference", "strike", "tournament"],
}
ROLES = [
    "painter",
    "baker",
    "surgeon",
    "lawyer",
    "pilot",
    "gardener",
    "teacher",
    "sailor",
    "chemist",
    "poet",
    "judge",
    "miner",
    "weaver",
    "composer",
    "printer",
    "farmer",
    "engineer",
    "historian",
    "dentist",
    "sculptor",
    "carpenter",
    "astronomer",
    "librarian",
    "mayor",
    "nurse",
    "clerk",
    "butcher",
    "photographer",
]
MATERIALS = [
    "granite",
    "oak",
    "brick",
    "marble",
    "steel",
    "glass",
    "copper",
    "clay",
    "limestone",
    "bronze",
    "timber",
    "slate",
    "iron",
    "sandstone",
]
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "grey", "purple", "orange", "brown", "silver", "golden"]
GOODS = [
    "wool",
    "salt",
    "glass",
    "paper",
    "copper",
    "tea",
    "silk",
    "wheat",
    "cheese",
    "tin",
    "clocks",
    "boats",
    "leather",
    "honey",
    "wine",
    "bells",
    "carpets",
    "ceramics",
    "timber",
    "coal",
    "soap",
    "sugar",
    "maps",
    "lenses",
    "pianos",
    "bicycles",
    "batteries",
    "candles",
    "rope",
    "olives",
]
INSTRUMENTS = ["violin", "flute", "organ", "drums", "piano", "harp", "cello", "guitar", "trumpet", "clarinet", "accordion"]
SUBJECTS = [
    "algebra",
    "botany",
    "geology",
    "logic",
    "music",
    "rhetoric",
    "optics",
    "medicine",
    "law",
    "astronomy",
    "grammar",
    "economics",
    "navigation",
]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ANIMALS = [
    "cats",
    "dogs",
    "horses",
    "goats",
    "parrots",
    "snakes",
    "bees",
    "pigeons",
    "rabbits",
    "owls",
    "foxes",
    "bears",
    "wolves",
    "eagles",
    "otters",
]
REASONS = [
    "a flood",
    "a fire",
    "a lack of money",
    "heavy storms",
    "a shortage of workers",
    "a change of law",
    "an earthquake",
    "poor health",
    "a broken pump",
    "the end of the war",
    "falling prices",
    "a dispute over land",
    "an outbreak of fever",
    "a power failure",
    "a software error",
]
STAGES = [
    "network",
    "cable",
    "router",
    "backup",
    "journal",
    "cache",
    "scheduler",
    "replica",
    "certificate",
    "index",
    "queue",
    "sensor",
]


def held_out(word: str) -> bool:
    return zlib.crc32(word.lower().encode()) % HELD_OUT == 0


def coined(chance: Random, ending: str, evaluation: bool) -> str:
    """An invented word in capitals' style, from the training or the evaluation part of all such words."""
    while True:
        middle = "".join(chance.choice(_ONSETS) + chance.choice(_VOWELS) for _ in range(chance.choice((1, 1, 2))))
        word = (middle + chance.choice(_CODAS) + ending).capitalize()
        if held_out(word) == evaluation:
            return word


def person(chance: Random, evaluation: bool) -> str:
    first = coined(chance, chance.choice(_PERSON_ENDINGS), evaluation)
    return f"{first} {coined(chance, chance.choice(('', 'er', 'sen', 'ov', 'ley', 'man', 'ez', '')), evaluation)}"


def place(chance: Random, evaluation: bool) -> str:
    prefix = chance.choice(("", "", "", "", "New ", "Port ", "Upper "))
    return prefix + coined(chance, chance.choice(_PLACE_ENDINGS), evaluation)


def firm(chance: Random, evaluation: bool) -> str:
    return f"{coined(chance, '', evaluation)} {chance.choice(_FIRM_ENDINGS)}"


def thing(chance: Random, kind: str, evaluation: bool) -> str:
    """Such as `the Velora Bridge`, `the bridge of Velora`, `the Velora`."""
    noun = chance.choice(THINGS[kind])
    word = coined(chance, chance.choice(("", "a", "is", "or")), evaluation)
    form = chance.random()
    if form < 0.6:
        return f"the {word} {noun if chance.random() < 0.5 else noun.title()}"
    return f"the {noun} of {word}" if form < 0.85 else f"the {noun} {word}"


def value(chance: Random, kind: str, evaluation: bool) -> str:
    """A value of the kind that a relation asks for."""
    match kind:
        case "year":
            return str(chance.randint(1100, 2024))
        case "date":
            return f"{chance.randint(1, 28)} {chance.choice(MONTHS)} {chance.randint(1700, 2024)}"
        case "month":
            return chance.choice(MONTHS)
        case "day":
            return chance.choice(DAYS)
        case "count":
            return str(chance.choice((chance.randint(2, 99), chance.randint(100, 999), 10 * chance.randint(100, 9999))))
        case "large":
            return chance.choice((f"{chance.randint(1, 900)},{chance.randint(0, 999):03d}", f"{chance.randint(2, 90)} million"))
        case "time":
            return f"{chance.randint(2, 59)} {chance.choice(('seconds', 'minutes', 'hours', 'days', 'weeks', 'years'))}"
        case "person":
            return person(chance, evaluation)
        case "place":
            return place(chance, evaluation)
        case "firm":
            return firm(chance, evaluation)
        case "coined":
            return coined(chance, chance.choice(("", "a", "ine", "ium")), evaluation)
        case "pair":
            return " and ".join(chance.sample(GOODS, 2))
        case "command":
            return f"{coined(chance, '', evaluation).lower()} --{chance.choice(STAGES)} {chance.randint(1, 9)}"
    pools = {
        "role": ROLES, "material": MATERIALS, "colour": COLOURS, "goods": GOODS, "instrument": INSTRUMENTS,
        "subject": SUBJECTS, "animals": ANIMALS, "reason": REASONS, "part": STAGES,
    }  # fmt: skip
    return chance.choice(pools[kind])
