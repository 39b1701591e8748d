from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest
from rag.parse import MAX_FILE_BYTES, text_of


@pytest.mark.parametrize("name", ["a.md", "a.MD", "notes.txt", "b/guide.rst", "Makefile", "README", "deep\\path\\x.py"])
def test_plain_text_is_read_under_its_many_names(name: str) -> None:
    assert text_of(name, "Grüße\r\nzwei\rdrei".encode()) == "Grüße\nzwei\ndrei"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_understood_and_left_out(encoding: str) -> None:
    assert text_of("a.txt", "łódź".encode(encoding)) == "łódź"


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.exe", "unknown", "a.md.zip", ""])
def test_other_types_are_refused_by_name(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        text_of(name, b"text")
    assert name[-3:] in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"caf\xe9 au lait", b"a\0b", b"", b" \n\t "])
def test_bytes_that_are_not_text_are_refused(content: bytes) -> None:
    with pytest.raises(BadRequest):
        text_of("a.txt", content)


def test_a_file_over_the_bound_is_refused_as_too_large() -> None:
    with pytest.raises(BadRequest) as refused:
        text_of("a.txt", b"x" * (MAX_FILE_BYTES + 1))
    assert refused.value.status == 413


@given(st.text(st.characters(min_codepoint=0, max_codepoint=0x10FFFF), max_size=60), st.binary(max_size=60))
def test_any_name_and_bytes_give_text_or_bad_request(name: str, content: bytes) -> None:
    try:
        assert text_of(name, content).strip()
    except BadRequest as error:
        assert error.param == "file"
