"""How a conversation looks to this model: the chat template, and the same in Python for the data generator.

The node puts passages in front of a question as `<passage number="n" source="…">` blocks with an instruction. Half of that is the
same for every question, so the template leaves it out, and cuts passages into sentences: a label of its own in front of each, its
passage's number behind it. An answer begins with the label of the sentence that answers, or with that of none: the whole
choice is one token, and what follows is what followed that label before, number and all. Labels are special tokens:
whoever reads an answer does not see them.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_LABELS = 94  # sentences with a label of their own; the next one is called like the first again
LABELS = tuple(f"<|s{number}|>" for number in range(MAX_LABELS + 1))  # the first is that of no sentence
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SPECIAL_TOKENS = ("<|endoftext|>", USER, END, *LABELS, ASSISTANT, SYSTEM)
END_OF_TEXT, TURN_END = 0, 2  # token numbers
MARKS = tuple(f" [{number}]" for number in range(1, 21))  # one token each
REFUSAL = "The documents do not say."
_CUTS = (("\n\n", "¶"), ("\n|", "¶|"), ("\n- ", "¶- "), ("\n* ", "¶* "), ("\n#", "¶#"), ("\n", " "))
_ENDS = ((". ", ".¶"), ("? ", "?¶"), ("! ", "!¶"))

CHAT_TEMPLATE = """\
{%- set opening = '<passage number="' %}
{%- if tools %}{{ '<|system|>' }}
{%- if messages and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools you may call, one JSON object each:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'To call one, answer with {"name": NAME, "arguments": OBJECT}.' }}{% endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{{- '<|' + (message.role if message.role in ('system', 'assistant') else 'user') + '|>' }}
{%- if message.content and opening in message.content and '\\n</passage>\\n\\nQuestion: ' in message.content %}
{%- set label = namespace(number=0) %}
{%- for block in message.content.split(opening)[1:] %}
{%- set head = block.split('"', 1) %}
{%- set text = head[1].split('">\\n', 1)[1].split('</passage>', 1)[0] %}
{%- set text = text.replace('\\n\\n', '¶').replace('\\n|', '¶|').replace('\\n- ', '¶- ').replace('\\n* ', '¶* ') %}
{%- set text = text.replace('\\n#', '¶#').replace('\\n', ' ').replace('. ', '.¶').replace('? ', '?¶').replace('! ', '!¶') %}
{%- for piece in text.split('¶') %}{% if piece.strip() %}
{%- set label.number = label.number % MOST + 1 %}
{{- '<|s' ~ label.number ~ '|>' + piece.strip() + ' [' + head[0] + ']\\n' }}
{%- endif %}{% endfor %}
{%- endfor %}
{{- message.content.split('\\n</passage>\\n\\nQuestion: ')[-1].strip() }}
{%- elif message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{%- if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}""".replace("MOST", str(MAX_LABELS))


def sentences(text: str) -> list[str]:
    """A passage's text in the pieces that can be quoted, as the template cuts it: no line breaks, no white space around."""
    for old, new in (*_CUTS, *_ENDS):
        text = text.replace(old, new)
    return [piece.strip() for piece in text.split("¶") if piece.strip()]


def quotable(passages: Sequence[str]) -> list[str]:
    """The sentences of all passages, each with its passage's number behind it."""
    return [f"{piece} [{number}]" for number, text in enumerate(passages, start=1) for piece in sentences(text)]


def label(place: int, offset: int = 0) -> str:
    """The label of the sentence at `place`, counted from 0. `offset` makes training meet late labels in short contexts too."""
    return LABELS[(place + offset) % MAX_LABELS + 1]


def grounded(question: str, passages: Sequence[str], offset: int = 0) -> str:
    """What the template makes of a user's message with passages."""
    lines = [f"{label(place, offset)}{line}" for place, line in enumerate(quotable(passages))]
    return "\n".join([*lines, question.strip()])


def opening(content: str) -> str:
    """A user's turn and the beginning of the answer's."""
    return f"{USER}{content}{ASSISTANT}"


def closed(answer: str) -> str:
    """An answer to its end."""
    return f"{answer}{END}"
