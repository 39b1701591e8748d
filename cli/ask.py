"""`mesh ask`: a question answered from the documents of a store, with citations."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options, output
from mesh.errors import MeshError


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    store: options.StoreOption,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=100, help="How many passages to give the model.")] = 5,
    model: options.ModelOption = None,
    max_tokens: options.MaxTokensOption = 512,
    temperature: options.TemperatureOption = None,
    seed: options.SeedOption = None,
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """Ask a question of the documents in a store; the passages it was answered from are listed at the end."""
    from mesh.client.api import citations

    params = options.sampling(max_tokens, temperature, seed, model)
    params["top_k"] = top_k
    text = ""
    with options.client(node, api_key) as client, client.ask(question, store, stream=True, **params) as stream:
        try:
            for piece in stream.texts():
                text += piece
                if not json:
                    output.piece(piece)
        except MeshError:
            if text and not json:
                output.line("")  # the error stands on a line of its own
            raise
    cited = citations(stream.progress.last or {})
    if json:
        output.as_json({"answer": text, "citations": cited, "mesh": stream.mesh})
        return
    output.line("\n")
    output.citation_list(cited)
    asked = f" --node {node[0]}" if node else ""  # only the entry keeps a record of the request
    output.note(f"(how it was routed: mesh why {stream.id}{asked})")
    shards_ok, shards_total = stream.mesh.get("shards_ok"), stream.mesh.get("shards_total")
    if shards_ok is not None and shards_ok != shards_total:
        output.note(f"only {shards_ok} of {shards_total} shards of {store} answered: passages may be missing")
