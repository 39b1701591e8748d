"""How a conversation looks to this model: the chat template, and the same in Python for the data generator.

The node puts passages in front of a question as `<passage number="n" source="…">` blocks with an instruction. Half of that is the
same for every question, so the template leaves it out, and cuts passages into sentences, each with its passage's
number behind it. What is left to learn is to find the sentence and to copy it, number and all. The question stands before the
passages too, so that a reader from left to right knows what to look for.
"""

from __future__ import annotations

from collections.abc import Sequence

END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2  # token numbers
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = tuple(f" [{number}]" for number in range(1, 21))  # one token each
REFUSAL = "The documents do not say."
_CUTS = (("\n\n", "¶"), ("\n|", "¶|"), ("\n- ", "¶- "), ("\n* ", "¶* "), ("\n#", "¶#"), ("\n", " "))
_ENDS = ((". ", ".¶"), ("? ", "?¶"), ("! ", "!¶"))

CHAT_TEMPLATE = """\
{%- set opening = '<passage number="' %}
{%- macro sentences(block) %}
{%- set head = block.split('"', 1) %}
{%- set text = head[1].split('">\\n', 1)[1].split('</passage>', 1)[0] %}
{%- set text = text.replace('\\n\\n', '¶').replace('\\n|', '¶|').replace('\\n- ', '¶- ').replace('\\n* ', '¶* ') %}
{%- set text = text.replace('\\n#', '¶#').replace('\\n', ' ').replace('. ', '.¶').replace('? ', '?¶').replace('! ', '!¶') %}
{%- for piece in text.split('¶') %}{% if piece.strip() %}{{ piece.strip() + ' [' + head[0] + ']\\n' }}{% endif %}{% endfor %}
{%- endmacro %}
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools you may call, one JSON object each:\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
{{- 'To call one, answer with {"name": NAME, "arguments": OBJECT}.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content and opening in message.content and '\\n</passage>\\n\\nQuestion: ' in message.content %}
{%- set asked = message.content.split('\\n</passage>\\n\\nQuestion: ')[-1].strip() %}
{{- asked + '\\n' }}
{%- for block in message.content.split(opening)[1:] %}{{ sentences(block) }}{% endfor %}
{{- asked }}
{%- elif message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def sentences(text: str) -> list[str]:
    """A passage's text in the pieces that can be quoted, as the template cuts it: no line breaks, no white space around."""
    for old, new in (*_CUTS, *_ENDS):
        text = text.replace(old, new)
    return [piece.strip() for piece in text.split("¶") if piece.strip()]


def grounded(question: str, passages: Sequence[str]) -> str:
    """What the template makes of a user's message with passages."""
    lines = [f"{piece} [{number}]" for number, text in enumerate(passages, start=1) for piece in sentences(text)]
    return "\n".join([question.strip(), *lines, question.strip()])


def opening(content: str) -> str:
    """A user's turn and the beginning of the answer's."""
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
