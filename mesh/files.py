"""Decodes text files written by hand, and replaces files atomically."""

from __future__ import annotations

import codecs
import os
import tempfile
from pathlib import Path

BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16, whose mark is the beginning of that of UTF-32
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def text_of(raw: bytes) -> str:
    """Returns the text without its byte order mark, which selects the encoding; text without a mark is UTF-8.

    Raises:
        UnicodeDecodeError: the bytes are not text of that encoding.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding)
    return raw.decode()


def replace_file(path: Path, content: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Writes `content` to a new file in the same directory and renames it to `path`: readers see the old or the new content.

    The temporary file has an unpredictable name, so that no symbolic link can be prepared for it, and is removed on failure.
    `durable`: the content is on disk before the rename, so that this also holds after a power failure. *Blocking*.

    Raises:
        OSError: the directory cannot be written or the disk is full; `path` is unchanged.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, mode)
            if durable:
                os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
