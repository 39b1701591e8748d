"""`mesh docs`: the documents that questions are answered from."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli import options, output
from mesh.errors import BadRequest

app = typer.Typer(help="Documents: add, list, search and remove.", no_args_is_help=True)


@app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files and folders.")],
    store: options.StoreOption,
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """Add files and folders to a store, which is made if need be. What is unchanged is left alone."""
    from mesh.client.client import read_documents

    documents = list(read_documents(paths))
    if not documents:
        raise BadRequest(f"expected files, found none in {', '.join(str(path) for path in paths)}", "path")
    begun = time.monotonic()
    with options.client(node, api_key) as client, output.Bar(len(documents), "documents", shown=not json) as bar:
        outcomes = client.docs.add_documents(documents, store, lambda added: bar.advance(added.name))
    if json:
        output.as_json([asdict(added) for added in outcomes])
        return
    for added in outcomes:
        if added.outcome == "skipped":
            output.note(f"skipped {added.name}: {added.reason}")
    counts = Counter(added.outcome for added in outcomes)
    counted = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    output.line(f"{store}: {counted} in {time.monotonic() - begun:.1f} s")


@app.command("list")
def list_(
    store: Annotated[str | None, typer.Option("--store", metavar="NAME", help="Without it, the stores are listed.")] = None,
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """The documents of a store, or the stores."""
    with options.client(node, api_key) as client:
        rows = client.docs.list(store) if store is not None else client.docs.stores()
    if json:
        output.as_json(rows)
    elif store is None:
        shown = [(row.get("name"), (row.get("file_counts") or {}).get("total", "?"), row["id"]) for row in rows]
        output.table(("STORE", "DOCUMENTS", "ID"), shown, empty="no stores; make one with: mesh docs add PATH --store NAME")
    else:
        files = [(row["filename"] or "?", row.get("bytes") or row.get("usage_bytes") or 0, row["id"]) for row in rows]
        output.table(("DOCUMENT", "BYTES", "ID"), files, empty=f"no documents in {store}")


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    store: options.StoreOption,
    top_k: Annotated[int, typer.Option("--top-k", min=1, max=100, help="How many passages.")] = 5,
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """The passages of a store that fit best."""
    with options.client(node, api_key) as client:
        found = client.docs.search(store, query, top_k=top_k)
    if json:
        output.as_json(found)
        return
    rows = []
    for passage in found:
        text = " ".join(" ".join(part.get("text", "") for part in passage.get("content", ())).split())
        rows.append((round(passage["score"], 4), passage["filename"], text if len(text) <= 120 else text[:119] + "…"))
    output.table(("SCORE", "DOCUMENT", "PASSAGE"), rows, empty=f"nothing found in {store}", keys=2, wraps=("PASSAGE",))


@app.command()
def remove(
    documents: Annotated[list[str], typer.Argument(metavar="DOCUMENT...", help="File names or ids.")],
    store: options.StoreOption,
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """Take documents out of a store."""
    with options.client(node, api_key) as client:
        removed = client.docs.remove(store, documents)
    if json:
        output.as_json(list(removed))
    else:
        output.line(f"removed {len(removed)} document(s) from {store}")
