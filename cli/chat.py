"""`mesh chat`: talk to a model of the mesh."""

from __future__ import annotations

import select
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options, output
from mesh.errors import BadRequest, MeshError

if TYPE_CHECKING:
    from mesh.client.client import Client
    from mesh.client.params import ChatParams

PIPE_WAIT_S = 0.5
TOO_LONG = ("context_length_exceeded", "body_too_large")  # error codes that a shorter conversation would not get

ChatMessage = dict[str, Any]


def chat(
    message: Annotated[
        str | None, typer.Argument(help="One message; piped input follows it. With neither, a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before the conversation.")] = None,
    model: options.ModelOption = None,
    max_tokens: options.MaxTokensOption = 512,
    temperature: options.TemperatureOption = None,
    seed: options.SeedOption = None,
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer; at the prompt, Ctrl-C or Ctrl-D ends the conversation."""
    params = options.sampling(max_tokens, temperature, seed, model)
    history: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    with options.client(node, api_key) as client:
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read()
        elif message is not None:
            message = "\n\n".join(part for part in (message, piped_beside()) if part.strip())
        if message is None:
            converse(client, history, params)
        elif message.strip():
            answer(client, [*history, {"role": "user", "content": message}], params)
        else:
            raise BadRequest('expected a message, got none; type one: mesh chat "…"', "message")


def piped_beside() -> str:
    """What is piped in beside a message; a pipe in which nothing comes is not waited for."""
    if sys.stdin.isatty():
        return ""
    try:
        ready, _, _ = select.select([sys.stdin], [], [], PIPE_WAIT_S)
    except (OSError, ValueError):
        return sys.stdin.read()  # not a file of the system's: a caller's own buffer, which is there at once
    return sys.stdin.read() if ready else ""


def converse(client: Client, history: list[ChatMessage], params: ChatParams) -> None:
    """A conversation until the end of input. A failed answer is not the end of it, and leaves no trace in it."""
    try:
        import readline  # noqa: F401  (makes input() editable)
    except ImportError:
        pass
    while True:
        try:
            message = input("> ")
        except (EOFError, KeyboardInterrupt):
            output.line()
            return
        if not message.strip():
            continue
        try:
            history = turn(client, history, message, params)
        except MeshError as error:
            output.line()
            output.error(str(error))


def turn(client: Client, history: Sequence[ChatMessage], message: str, params: ChatParams) -> list[ChatMessage]:
    """Answers a message; the conversation with both. Where it is too long for the model the oldest turns are left out.

    Raises:
        MeshError: there is no answer; the conversation is as it was. BadRequest: the message alone is too long.
    """
    asked: list[ChatMessage] = [*history, {"role": "user", "content": message}]
    while True:
        try:
            text = answer(client, asked, params)
            break
        except BadRequest as error:
            if error.code not in TOO_LONG:
                raise
            shorter = without_oldest_turn(asked)
            if shorter is None:
                what = "this message alone is too long; shorten it, or lower --max-tokens (what was said before is kept)"
                raise BadRequest(f"{what}: {error}", error.param, error.code, error.status) from None
            asked = shorter
    if left_out := len(history) + 1 - len(asked):
        output.note(
            f"(the conversation is longer than the model can read: its oldest {left_out} messages are left out from now on)"
        )
    if not text:
        return asked[:-1]  # it was stopped before anything came
    return [*asked, {"role": "assistant", "content": text}]


def without_oldest_turn(asked: Sequence[ChatMessage]) -> list[ChatMessage] | None:
    """The conversation without its first user message and what followed it; None: only the last message is left.

    The system message stays.
    """
    users = [place for place, message in enumerate(asked) if message["role"] == "user"]
    if len(users) < 2:
        return None
    return [*asked[: users[0]], *asked[users[1] :]]


def answer(client: Client, history: Sequence[ChatMessage], params: ChatParams) -> str:
    """Streams one answer to the screen; what of it came, when Ctrl-C stopped it."""
    text = ""
    with client.chat(history, stream=True, **params) as stream:
        try:
            for piece in stream.texts():
                output.piece(piece)
                text += piece
        except KeyboardInterrupt:
            output.note("\nstopped")
    output.line()
    if stream.progress.resumes:
        output.note(f"(a node was lost on the way; {stream.progress.resumes} time(s) the answer went on elsewhere)")
    return text
