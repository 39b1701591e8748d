"""The client's decisions, without sockets: each flow is sent the outcomes of its effects."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mesh.client.event_stream import AnswerProgress
from mesh.client.flow import (
    ClientCore,
    ConnectionFailed,
    Flow,
    FlowEffect,
    HttpResponse,
    KnownNodes,
    NoNodeAnswers,
    ReadBody,
    RetryBudget,
    RetrySchedule,
    SendRequest,
    Sleep,
    YieldChunk,
    error_of,
    retry_after_s,
)
from mesh.errors import BadRequest, DeadlineExceeded, PeerLost, Refused, RemoteError

A, B, C = "http://a:1", "http://b:1", "http://c:1"


def answer(node: str, status: int = 200, body: Any = None, **headers: str) -> HttpResponse:
    return HttpResponse(
        node, status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body or {}).encode()
    )


def caller(*urls: str, budget: RetryBudget = RetryBudget(), learned: bool = True, answered: bool = True) -> ClientCore:  # noqa: B008
    nodes = KnownNodes(urls, lambda: 0.5)
    nodes.learned, nodes.answered = learned, answered
    keys = iter(f"key-{number}" for number in range(100))
    return ClientCore(nodes, "secret", budget, lambda: 0.5, lambda: next(keys))


def play(flow: Flow[Any], respond: Callable[[FlowEffect], Any], limit: int = 200) -> tuple[list[FlowEffect], Any]:
    """Runs the flow with the outcomes of `respond`. Returns its effects and its result."""
    effects: list[FlowEffect] = []
    outcome: Any = None
    while len(effects) < limit:
        try:
            effects.append(flow.send(outcome))
        except StopIteration as end:
            return effects, end.value
        outcome = respond(effects[-1])
    raise AssertionError(f"no end after {limit} effects")


def scripted(*outcomes: Any) -> Callable[[FlowEffect], Any]:
    """Returns the outcomes of `SendRequest` and `ReadBody` in turn; the other effects have none."""
    left = iter(outcomes)
    return lambda effect: next(left) if isinstance(effect, SendRequest | ReadBody) else None


def sent(effects: list[FlowEffect]) -> list[tuple[str, str]]:
    return [(effect.node, effect.path) for effect in effects if isinstance(effect, SendRequest)]


def event(seq: int, text: str) -> bytes:
    chunk = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": text}, "token_ids": [seq]}], "mesh": {"seq": seq}}
    return f"data: {json.dumps(chunk)}\n\n".encode()


def streaming(subject: ClientCore) -> tuple[Flow[None], AnswerProgress, RetrySchedule]:
    progress, tries = AnswerProgress(), RetrySchedule(subject.nodes, subject.budget, subject.draw)
    return subject.stream("/v1/chat/completions", b"{}", progress, tries), progress, tries


def test_the_first_call_learns_the_other_nodes() -> None:
    subject = caller(A, learned=False)
    status = {"nodes": [{"http": A, "state": "alive"}, {"http": B + "/", "state": "suspect"}, {"http": C, "state": "dead"}]}
    effects, _ = play(subject.call("GET", "/x"), scripted(answer(A, body=status), answer(A)))
    assert sent(effects) == [(A, "/mesh/status"), (A, "/x")]
    assert subject.nodes.order() == [A, B]


def test_a_broken_call_goes_to_the_next_node_at_once() -> None:
    subject = caller(A, B)
    effects, reply = play(subject.call("POST", "/x", b"{}"), scripted(ConnectionFailed("refused"), answer(B)))
    assert sent(effects) == [(A, "/x"), (B, "/x")]
    assert reply.node == B
    assert subject.nodes.order() == [B, A]


def test_only_the_tries_of_one_post_share_an_idempotency_key() -> None:
    subject = caller(A, B)
    effects, _ = play(subject.call("POST", "/x", b"{}"), scripted(ConnectionFailed("refused"), answer(B)))
    more, _ = play(subject.call("POST", "/x", b"{}"), scripted(answer(B), answer(B)))
    keys = [effect.headers.get("idempotency-key") for effect in (*effects, *more) if isinstance(effect, SendRequest)]
    assert keys == ["key-0", "key-0", None, "key-1"]  # the third fetches the status, because a node was lost
    assert all(effect.headers["authorization"] == "Bearer secret" for effect in effects if isinstance(effect, SendRequest))


def test_a_wrong_address_is_not_retried() -> None:
    flow = caller(A, learned=False, answered=False).call("GET", "/x")
    with pytest.raises(NoNodeAnswers, match=r"no node answers \(http://a:1: connection refused\); start one with `mesh up`"):
        play(flow, lambda effect: ConnectionFailed("connection refused"))


def test_nodes_that_answered_before_are_asked_again_until_the_budget_is_spent() -> None:
    waited: list[float] = []

    def respond(effect: FlowEffect) -> Any:
        if isinstance(effect, Sleep):
            waited.append(effect.seconds)
            return None
        return ConnectionFailed("connection refused")

    with pytest.raises(NoNodeAnswers):
        play(caller(A, B, budget=RetryBudget(retries=5, waiting_s=30)).call("GET", "/x"), respond)
    assert waited == [0.1, 0.2]  # after each round over both nodes, doubling


def test_the_time_a_call_may_wait_is_bounded_too() -> None:
    respond = scripted(*[answer(A, 503, retry_after="20")] * 9)
    effects: list[FlowEffect] = []

    def noted(effect: FlowEffect) -> object:
        effects.append(effect)
        return respond(effect)

    with pytest.raises(Refused):
        play(caller(A, budget=RetryBudget(retries=100, waiting_s=30)).call("GET", "/x"), noted)
    assert [effect.seconds for effect in effects if isinstance(effect, Sleep)] == [20.0]


def test_after_a_full_node_the_next_is_called_without_a_pause() -> None:
    effects, reply = play(caller(A, B).call("GET", "/x"), scripted(answer(A, 503, retry_after="7"), answer(B)))
    assert sent(effects) == [(A, "/x"), (B, "/x")]
    assert reply.node == B


def test_when_all_nodes_are_full_the_shortest_wait_is_honoured() -> None:
    outcomes = (answer(A, 503, retry_after="7"), answer(B, 503, retry_after="9", retry_after_ms="2500"), answer(A))
    effects, _ = play(caller(A, B).call("GET", "/x"), scripted(*outcomes))
    assert [effect.seconds for effect in effects if isinstance(effect, Sleep)] == [2.5]


def test_a_quota_is_waited_for_since_it_holds_on_every_node() -> None:
    effects, _ = play(caller(A, B).call("GET", "/x"), scripted(answer(A, 429, retry_after="3"), answer(A)))
    assert [type(effect) for effect in effects] == [SendRequest, Sleep, SendRequest]
    assert effects[1] == Sleep(3.0)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, BadRequest), (401, BadRequest), (404, BadRequest), (409, BadRequest), (504, DeadlineExceeded), (500, RemoteError)],
)
def test_what_another_node_would_answer_alike_is_not_retried(status: int, kind: type[Exception]) -> None:
    body = {"error": {"message": "no such model", "param": "model", "code": "model_not_found"}}
    with pytest.raises(kind, match="no such model"):
        play(caller(A, B).call("POST", "/x"), scripted(answer(A, status, body)))


def test_an_error_keeps_its_field_and_code() -> None:
    error = error_of(answer(A, 404, {"error": {"message": "m", "param": "model", "code": "model_not_found"}}))
    assert isinstance(error, BadRequest)
    assert (error.param, error.code, error.status) == ("model", "model_not_found", 404)


def test_an_error_that_is_not_json_has_the_node_and_status() -> None:
    assert "http://a:1 answered 418" in str(error_of(HttpResponse(A, 418, {}, b"<html>")))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "3", "retry-after-ms": "1500"}, 1.5),
        ({}, 1.0),
        ({"retry-after": "Wed, 21 Oct"}, 1.0),
    ],
)
def test_retry_after_in_milliseconds_comes_first(headers: dict[str, str], seconds: float) -> None:
    assert retry_after_s(headers) == seconds


@pytest.mark.parametrize("url", ["", "host:80", "ftp://host", "http://", "http://host:port", "http://h:99999", "http://h/path"])
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="expected a node's URL"):
        KnownNodes([url], lambda: 0.0)


def test_calls_spread_over_the_live_nodes_and_come_to_failed_ones_last() -> None:
    drawn = iter([0.0, 0.99, 0.99])
    nodes = KnownNodes([A, B, C], lambda: next(drawn), spread=True)
    assert nodes.order() == [A, B, C]
    assert nodes.order() == [C, A, B]
    nodes.failed(A)
    assert nodes.order() == [C, B, A]


def test_a_stream_ends_with_done() -> None:
    flow, progress, _ = streaming(caller(A))
    effects, _ = play(flow, scripted(answer(A, x_mesh_stream="chatcmpl-1"), event(1, "a") + event(2, "b") + b"data: [DONE]\n\n"))
    assert [effect.chunk["mesh"]["seq"] for effect in effects if isinstance(effect, YieldChunk)] == [1, 2]
    assert (progress.stream, progress.seq, progress.resumes) == ("chatcmpl-1", 2, 0)


@pytest.mark.parametrize("end", [b"", ConnectionFailed("the connection broke off")])
def test_a_stream_that_ends_without_done_is_resumed_at_another_node(end: bytes | ConnectionFailed) -> None:
    flow, progress, tries = streaming(caller(A, B))
    outcomes = (
        *(answer(A, x_mesh_stream="chatcmpl-1"), event(1, "a"), end),
        *(answer(B, x_mesh_stream="chatcmpl-1"), event(2, "b"), b"data: [DONE]\n\n"),
    )
    effects, _ = play(flow, scripted(*outcomes))
    assert sent(effects) == [(A, "/v1/chat/completions"), (B, "/v1/streams/chatcmpl-1?starting_after=1")]
    assert [effect.chunk["choices"][0]["token_ids"] for effect in effects if isinstance(effect, YieldChunk)] == [[1], [2]]
    assert (progress.resumes, tries.retries) == (1, 1)


def test_a_stream_without_an_id_is_posted_again_with_the_same_key() -> None:
    flow, _, _ = streaming(caller(A, B))
    effects, _ = play(flow, scripted(ConnectionFailed("no answer in time"), answer(B), event(1, "a") + b"data: [DONE]\n\n"))
    posts = [effect for effect in effects if isinstance(effect, SendRequest)]
    assert [post.node for post in posts] == [A, B]
    assert posts[0].headers["idempotency-key"] == posts[1].headers["idempotency-key"]


def test_a_takeover_under_way_is_waited_for() -> None:
    flow, progress, _ = streaming(caller(A, B))
    outcomes = (
        *(answer(A, x_mesh_stream="chatcmpl-1"), event(1, "a"), b""),
        *(answer(B, 503, retry_after_ms="400"), answer(B), b"data: [DONE]\n\n"),
    )
    effects, _ = play(flow, scripted(*outcomes))
    # A is called last, after B's refusal; the third call of the script resumes the stream, at either node.
    assert [path for _, path in sent(effects)][1:] == ["/v1/streams/chatcmpl-1?starting_after=1"] * 2
    assert progress.resumes == 1


def test_a_stream_that_no_node_can_resume_ends_with_peer_lost() -> None:
    flow, _, _ = streaming(caller(A, B))
    outcomes = (
        answer(A, x_mesh_stream="chatcmpl-1"),
        event(1, "a"),
        b"",
        answer(B, 404, {"error": {"message": "unknown stream"}}),
    )
    with pytest.raises(
        PeerLost, match=r"chatcmpl-1 broke after 1 tokens .* http://b:1 cannot go on with it: unknown stream; ask again"
    ):
        play(flow, scripted(*outcomes))


def test_an_error_event_is_final() -> None:
    flow, _, _ = streaming(caller(A, B))
    failed = b'data: {"error": {"message": "out of memory", "type": "server_error"}}\n\n'
    with pytest.raises(RemoteError, match="out of memory"):
        play(flow, scripted(answer(A, x_mesh_stream="chatcmpl-1"), event(1, "a") + failed))


def test_the_budget_of_a_stream_begins_anew_with_each_token_that_came() -> None:
    subject = caller(A, budget=RetryBudget(retries=2, waiting_s=30))
    flow, progress, tries = streaming(subject)
    # Each connection gives one token and breaks: nine breaks with a budget of two retries.
    gave = False

    def respond(effect: FlowEffect) -> Any:
        nonlocal gave
        if isinstance(effect, SendRequest):
            gave = False
            return answer(A, x_mesh_stream="chatcmpl-1")
        if isinstance(effect, ReadBody):
            if progress.seq == 9:
                return b"data: [DONE]\n\n"
            if gave:
                return b""
            gave = True
            return event(progress.seq + 1, "a")
        return None

    play(flow, respond)
    assert (progress.seq, tries.retries) == (9, 8)


def test_a_stream_that_gets_no_further_gives_up() -> None:
    flow, _, _ = streaming(caller(A, budget=RetryBudget(retries=3, waiting_s=30)))

    def respond(effect: FlowEffect) -> Any:
        return (
            answer(A, x_mesh_stream="chatcmpl-1")
            if isinstance(effect, SendRequest)
            else b""
            if isinstance(effect, ReadBody)
            else None
        )

    with pytest.raises(NoNodeAnswers, match="ended without"):
        play(flow, respond)


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (405, {"error": {"message": "this path does not take this method"}}, "keeps no stream for another node"),
        (501, {}, "keeps no stream for another node"),
        (404, {"error": {"message": "there is no stream chatcmpl-1"}}, "there is no stream chatcmpl-1"),
    ],
)
def test_the_reason_why_no_node_resumes_a_stream_is_readable(status: int, body: Any, reason: str) -> None:
    flow, progress, _ = streaming(caller(A, B))
    outcomes = [
        answer(A, x_mesh_stream="chatcmpl-1"),
        event(1, "w"),
        ConnectionFailed("connection reset"),
        answer(B, status, body),
    ]
    with pytest.raises(PeerLost, match=reason) as lost:
        play(flow, scripted(*outcomes))
    assert progress.seq == 1 and "after 1 tokens" in str(lost.value) and "ask again" in str(lost.value)
    assert str(status) not in str(lost.value) and "method" not in str(lost.value)
