"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.errors import BadRequest
from mesh.ids import Address, parse_address

if TYPE_CHECKING:
    from mesh.client.client import Client
    from mesh.client.params import ChatParams

NodeOption = Annotated[
    list[str],
    typer.Option("--node", metavar="URL", envvar="MESH_NODE", help="A node to ask, else http://127.0.0.1:8000; repeatable."),
]
DEFAULT_NODE = "http://127.0.0.1:8000"
ApiKeyOption = Annotated[
    str | None, typer.Option("--api-key", envvar="MESH_API_KEY", help="The API key, where nodes ask for one.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StoreOption = Annotated[str, typer.Option("--store", metavar="NAME", help="The document store.")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="ID", help="The model; the mesh's default when not given.")]
MaxTokensOption = Annotated[int | None, typer.Option("--max-tokens", min=1, help="The longest answer, in tokens.")]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", min=0.0, max=2.0, help="0 is greedy; the model's own when not given.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Equal seeds give equal answers.")]

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def client(node: list[str], api_key: str | None) -> Client:
    """A client of the named nodes. Imports httpx."""
    from mesh.client.client import Client

    urls = [url for given in node or [DEFAULT_NODE] for url in given.split(",") if url]
    return Client([url if "://" in url else f"http://{url}" for url in urls], api_key)


def address(text: str, option: str) -> Address:
    """Raises BadRequest naming the option."""
    try:
        return parse_address(text)
    except ValueError as error:
        raise BadRequest(f"{option}: {error}", option.lstrip("-")) from None


def size_bytes(text: str, option: str) -> int:
    """`1500000`, `512MiB`, `2G` (powers of 1024, as is usual for memory), `2GB` (powers of 1000).

    Raises:
        BadRequest: any other form.
    """
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise BadRequest(f"{option}: expected a size such as 512MiB or 4G, got {text!r}", option.lstrip("-"))
    number, unit, binary = match.groups()

    base = 1000 if unit and not binary and text.strip()[-1] in "bB" else 1024
    exponent = "kmgt".index(unit.lower()) + 1 if unit else 0
    return int(float(number) * base**exponent)


def sampling(max_tokens: int | None, temperature: float | None, seed: int | None, model: str | None) -> ChatParams:
    """The parameters of a request that were given."""
    given: ChatParams = {}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if temperature is not None:
        given["temperature"] = temperature
    if seed is not None:
        given["seed"] = seed
    if model is not None:
        given["model"] = model
    return given


def existing_file(path: Path | None, option: str) -> Path | None:
    """Raises BadRequest when a file that was named is not there."""
    if path is not None and not path.is_file():
        raise BadRequest(f"{option}: expected a file, got {str(path)!r}, which is none", option.lstrip("-"))
    return path
