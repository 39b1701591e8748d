"""`mesh key`: the mesh secret and API keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cli import options, output
from mesh.errors import BadRequest

app = typer.Typer(help="Keys: the secret that nodes share, and API keys for clients.", no_args_is_help=True)


@app.command()
def new(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to write it; else it is printed.")] = None,
) -> None:
    """Make a mesh secret. Copy it to every node and start them with --key-file."""
    from mesh.keys.mesh_key import encode_key, new_key, save_key

    if file is None:
        output.line(encode_key(new_key()))
        return
    try:
        save_key(file, new_key())
    except FileExistsError:
        raise BadRequest(f"{file} exists, and a mesh's key is never overwritten; name another file", "file") from None
    except OSError as error:
        raise BadRequest(f"cannot write {file}: {error.strerror}", "file") from None
    output.note(f"wrote {file}; copy it to every node and start them with: mesh up --key-file {file}")


@app.command()
def rotate(
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """Give a running mesh a new secret: no node restarts, nothing is refused. Run it again if it was cut off."""
    with options.client(node, api_key) as client:
        done = client.rotate_key()
        names = {peer["id"]: peer["name"] for peer in client.status()["nodes"]}
    if json:
        output.as_json(done)
        return
    begun = ", which was begun earlier" if done["finished_earlier"] else ""
    output.line(f"the mesh is under key {done['key']}{begun}: {', '.join(names.get(id, id) for id in done['nodes'])}")
    for id in done["not_saved"]:
        output.note(f"{names.get(id, id)} could not write its key file: copy a peer's there before it restarts")
    output.note("nodes that were down need the key file as it is now: copy it from a node that was there")


@app.command()
def api(
    file: Annotated[Path | None, typer.Option("--file", metavar="F", help="The nodes' key file: the hash is added.")] = None,
    label: Annotated[str, typer.Option("--label", help="Whose key it is; kept beside the hash.")] = "",
) -> None:
    """Make an API key. It is printed once; nodes keep only its hash, one a line in --api-key-file."""
    from node.http.auth import new_api_key

    secret, hashed = new_api_key(label)
    if file is None:
        output.note(f"add this line to the nodes' --api-key-file:\n{hashed}\nand give the client this key:")
    else:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "a") as lines:
                lines.write(hashed + "\n")
        except OSError as error:
            raise BadRequest(f"cannot write {file}: {error.strerror}", "file") from None
        output.note(f"added its hash to {file}; give the client this key, which is shown only now:")
    output.line(secret)
