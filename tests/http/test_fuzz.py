"""Whatever bytes come, the server answers 4xx or 5xx in the error form, or closes, and goes on."""

from __future__ import annotations

import msgspec
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest
from mesh.ids import StreamId
from node.http.limits import Limits
from node.http.multipart import parse_multipart
from node.http.openai import parse_chat, parse_completion
from node.requests import GenerateRequest
from tests.http.served import parse_reply, read_all, served

QUICK = Limits(head_s=0.05, body_s=0.05, keep_alive_s=0.05, linger_s=0.02)
CHAT_BODY = b'{"messages":[{"role":"user","content":"hello"}]}'
SEEDS = (
    b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(CHAT_BODY), CHAT_BODY),
    b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nd\r\n{"prompt":""}\r\n0\r\n\r\n',
    b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    b"content-length: 6\r\n\r\n--b--\r",
)


@st.composite
def mangled_requests(draw: st.DrawFn) -> bytes:
    """A request with some bytes replaced, doubled, dropped or cut."""
    raw = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw) - 1))
        match draw(st.sampled_from(("replace", "insert", "drop", "double"))):
            case "replace":
                raw[at] = draw(st.integers(0, 255))
            case "insert":
                raw[at:at] = draw(st.binary(min_size=1, max_size=6))
            case "drop" if len(raw) > 8:
                del raw[at : at + draw(st.integers(1, 6))]
            case _:
                raw[at:at] = raw[at : at + 20]
    return bytes(raw)


@settings(max_examples=60)
@given(st.lists(st.one_of(st.binary(max_size=400), mangled_requests()), min_size=1, max_size=4))
def test_any_bytes_are_answered_or_ended_and_the_server_stays_up(inputs: list[bytes]) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            async with served(limits=QUICK) as site:
                for raw in inputs:
                    async with await site.connect() as client:
                        try:
                            await client.send_all(raw)
                        except trio.BrokenResourceError:
                            continue
                        answer = await read_all(client)
                    if answer:
                        assert answer.startswith(b"HTTP/1.1 ")
                        if answer.split(b" ", 2)[1] not in (b"200", b"100"):
                            reply = parse_reply(answer)
                            assert 400 <= reply.status <= 504 and (not reply.body or reply.error)
                assert (await site.ask("GET", "/health")).status == 200
                assert site.app.statistics().failures_total == 0
                assert site.node.open_generations == 0

    trio.run(main)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "max_tokens", "max_completion_tokens",
    "logit_bias", "logprobs", "top_logprobs", "stream", "stream_options", "stop_token_ids", "mesh", "tools", "tool_choice",
    "response_format", "model", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens",
)  # fmt: skip


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=5), st.booleans())
def test_any_json_is_a_valid_request_or_a_refusal_that_names_a_field(fields: dict[str, object], chat: bool) -> None:
    fields.setdefault("messages" if chat else "prompt", [{"role": "user", "content": "x"}] if chat else "x")
    raw = msgspec.json.encode(fields)
    try:
        asked = (parse_chat if chat else parse_completion)(raw, StreamId("cmpl-s"))
    except BadRequest as refused:
        assert refused.status == 400 and refused.param
        return
    for request in asked.generations:
        check_ranges(request)


def check_ranges(request: GenerateRequest) -> None:
    """What the node may rely on."""
    sampling = request.sampling
    assert 0 <= sampling.temperature <= 2 and 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1 and sampling.top_k >= 0
    assert sampling.repetition_penalty > 0 and sampling.min_tokens >= 0 and 1 <= request.n <= 16
    assert request.max_tokens is None or 1 <= request.max_tokens < 2**31
    assert request.seed is None or -(2**63) <= request.seed < 2**63
    assert sum(given is not None for given in (request.messages, request.prompt, request.prompt_ids)) == 1


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_any_body_is_a_request_or_a_refusal(raw: bytes) -> None:
    try:
        parse_chat(raw, StreamId("s"))
    except BadRequest as refused:
        assert refused.status == 400


@settings(max_examples=150)
@given(
    st.lists(
        st.sampled_from([b"--b", b"--", b"\r\n", b"\r\n\r\n", b'content-disposition: form-data; name="a"', b"x", b"\x00\xff"]),
        max_size=14,
    )
)
def test_any_form_is_parsed_or_refused(pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    try:
        parts = parse_multipart("multipart/form-data; boundary=b", body)
    except BadRequest as refused:
        assert refused.status == 400
        return
    assert all(part.content in body for part in parts)


@given(st.binary(max_size=200), st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=30))
def test_a_form_gives_back_what_was_put_in(content: bytes, filename: str) -> None:
    quoted = filename.replace("\\", "\\\\").replace('"', "%22")
    if "%22" in filename or b"--boundary" in content:
        return
    body = (
        b'--boundary\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nassistants\r\n'
        b'--boundary\r\nContent-Disposition: form-data; name="file"; filename="' + quoted.encode() + b'"\r\n'
        b"Content-Type: text/plain\r\n\r\n" + content + b"\r\n--boundary--\r\n"
    )
    purpose, file = parse_multipart('multipart/form-data; boundary="boundary"', body)
    assert (purpose.name, purpose.filename, purpose.content) == ("purpose", None, b"assistants")
    assert (file.name, file.content) == ("file", content)
    if not any(escape in filename for escape in ("%0D", "%0A", "%0d", "%0a")):
        assert file.filename == filename
