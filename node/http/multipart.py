"""multipart/form-data (RFC 7578), as far as file uploads need it: strict, bounded, over bytes already in memory. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mesh.errors import BadRequest

MAX_PARTS = 16
MAX_PART_HEAD_BYTES = 8 << 10
BOUNDARY = re.compile(r"multipart/form-data\s*(?:;[^;]*)*;\s*boundary=(?:\"([^\"]{1,70})\"|([^\s;\"]{1,70}))\s*(?:;.*)?$", re.I)
PARAMETER = re.compile(r";\s*(name|filename)=(?:\"((?:[^\"\\\r\n]|\\.)*)\"|([^\s;\"]+))", re.I)
ESCAPED = {"%22": '"', "%0D": "\r", "%0A": "\n", "%0d": "\r", "%0a": "\n"}  # what browsers and httpx write


@dataclass(frozen=True, slots=True)
class FormPart:
    name: str
    filename: str | None
    content: bytes


def parse_multipart(content_type: str, body: bytes) -> list[FormPart]:
    """The parts of a form, in order.

    Raises:
        BadRequest: 415 when the type is another one, 400 when the body is not in this form.
    """
    match = BOUNDARY.match(content_type.strip())
    if match is None:
        raise BadRequest("expected Content-Type: multipart/form-data with a boundary", status=415)
    fence = b"--" + (match.group(1) or match.group(2)).encode("latin-1", "replace")
    if body.startswith(fence):
        position = len(fence)
    else:
        position = body.find(b"\r\n" + fence) + 2 + len(fence)  # after a preamble
        if position < 2 + len(fence):
            raise _malformed("no part begins")
    parts: list[FormPart] = []
    while body[position : position + 2] != b"--":
        head_start = body.find(b"\r\n", position, position + 256) + 2  # some clients pad the fence's line with blanks
        if head_start < 2 or body[position : head_start - 2].strip(b" \t"):
            raise _malformed("a boundary is not followed by a new line")
        head_end = body.find(b"\r\n\r\n", head_start, head_start + MAX_PART_HEAD_BYTES)
        if head_end < 0:
            raise _malformed(f"a part's headers do not end within {MAX_PART_HEAD_BYTES} bytes")
        end = body.find(b"\r\n" + fence, head_end + 4)
        if end < 0:
            raise _malformed("the last boundary is missing")
        if len(parts) == MAX_PARTS:
            raise _malformed(f"there are more than {MAX_PARTS} parts")
        parts.append(_part(body[head_start:head_end], body[head_end + 4 : end]))
        position = end + 2 + len(fence)
    return parts


def _part(head: bytes, content: bytes) -> FormPart:
    for line in head.split(b"\r\n"):
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            break
    else:
        raise _malformed("a part has no Content-Disposition")
    try:
        text = value.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _malformed("a part's headers are not UTF-8") from error
    if text.partition(";")[0].strip().lower() != "form-data":
        raise _malformed("a part's Content-Disposition is not form-data")
    found = {key.lower(): _unescape(quoted) if quoted else plain for key, quoted, plain in PARAMETER.findall(text)}
    if "name" not in found:
        raise _malformed("a part has no name")
    return FormPart(found["name"], found.get("filename"), content)


def _unescape(quoted: str) -> str:
    plain = re.sub(r"\\([\"\\])", r"\1", quoted)  # a backslash before anything else is one: Windows paths
    return re.sub("|".join(ESCAPED), lambda match: ESCAPED[match.group()], plain)


def _malformed(what: str) -> BadRequest:
    return BadRequest(f"expected a body in multipart/form-data: {what}", code="malformed_form")
