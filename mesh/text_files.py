"""The text of a file that a person wrote: with or without a byte order mark, whatever editor put it there. Pure."""

from __future__ import annotations

import codecs

BYTE_ORDER_MARKS = (  # the longer ones first: the mark of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def text_of(raw: bytes) -> str:
    """The text without its mark, which tells the encoding; without one it is UTF-8.

    Raises:
        UnicodeDecodeError: it is not text of that encoding.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding)
    return raw.decode()
