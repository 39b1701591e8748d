"""`mesh chat`: talk to a model of the mesh."""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options, output
from mesh.errors import BadRequest, MeshError

if TYPE_CHECKING:
    from mesh.client import Client

PIPE_WAIT_S = 0.5


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
    said: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    with options.client(node, api_key) as client:
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read()
        elif message is not None:
            message = "\n\n".join(part for part in (message, piped_beside()) if part.strip())
        if message is None:
            converse(client, said, params)
        elif message.strip():
            answer(client, [*said, {"role": "user", "content": message}], params)
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


def converse(client: Client, said: list[dict[str, Any]], params: dict[str, object]) -> None:
    """A conversation until the end of input. A failed answer is not the end of it."""
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
        said.append({"role": "user", "content": message})
        try:
            said.append({"role": "assistant", "content": answer(client, said, params)})
        except MeshError as error:
            output.line()
            output.error(str(error))
            said.pop()


def answer(client: Client, said: list[dict[str, Any]], params: dict[str, object]) -> str:
    """Streams one answer to the screen; what of it came, when Ctrl-C stopped it."""
    text = ""
    with client.chat(said, stream=True, **params) as stream:
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
