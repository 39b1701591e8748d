"""Which files are read and how they become text.

Plain text in its many names, in UTF-8, or UTF-16 with a byte order mark. Everything else is refused by name, with
what would work: a format is not guessed, and a binary file is not indexed as noise.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from mesh.errors import BadRequest
from mesh.files import text_of as decoded

MAX_FILE_BYTES = 8 << 20
MAX_NAME_CHARS = 255
PLAIN_SUFFIXES = frozenset(
    """
    .md .markdown .mdx .txt .text .rst .adoc .asciidoc .org .tex .log .csv .tsv .json .jsonl .yaml .yml .toml .ini .cfg
    .conf .env .properties .py .pyi .js .mjs .ts .tsx .jsx .java .kt .scala .go .rs .c .h .cc .cpp .hpp .cs .swift .rb
    .php .pl .lua .r .jl .sh .bash .zsh .sql .proto .css .xml .html .htm .svg .srt .vtt .diff .patch .gradle .cmake .tf
    """.split()  # noqa: SIM905  (a list literal would be three times as long)
)
PLAIN_NAMES = frozenset(
    ["readme", "license", "licence", "changelog", "makefile", "dockerfile", "authors", "notice", "copying", "todo"]
)


def check_name(name: str) -> str:
    """The file's name if it is one of a type that is read.

    Raises:
        BadRequest: names the type and those that are read.
    """
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise BadRequest(f"expected a file name of 1 to {MAX_NAME_CHARS} printable characters", "file")
    path = PurePosixPath(name.replace("\\", "/"))
    suffix = path.suffix.lower()
    if suffix not in PLAIN_SUFFIXES and (suffix or path.name.lower() not in PLAIN_NAMES):
        raise BadRequest(
            f"cannot read {suffix or 'files without a suffix'} ({path.name!r}); "
            "give plain text (.md, .txt, .rst, source code …) in UTF-8",
            "file",
            "unsupported_file",
        )
    return name


def text_of(name: str, content: bytes) -> str:
    """The file's text, with line ends as `\\n`: the text that passages and citations count characters in.

    Raises:
        BadRequest: a type that is not read, too large, not text, or nothing but white space.
    """
    check_name(name)
    if len(content) > MAX_FILE_BYTES:
        raise BadRequest(f"{name!r} has {len(content)} bytes, at most {MAX_FILE_BYTES} are taken; split it", "file", status=413)
    try:
        text = decoded(content)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{name!r} is not {error.encoding} text (byte {error.start}); save it as UTF-8", "file") from None
    if "\0" in text:
        raise BadRequest(f"{name!r} holds NUL characters: it is a binary file, not text", "file")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise BadRequest(f"{name!r} holds no text", "file")
    return text
