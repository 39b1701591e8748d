"""The `mesh` command: puts the commands together and turns errors into one line and an exit code.

Importing this file must stay cheap: torch, trio and httpx are imported inside the commands that need them.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cli import ask, chat, demo, docs, doctor, key, models, nodes, output, simulate, status, up, why
from cli.load import command as load
from mesh.errors import MeshError


class OneLineErrors(TyperGroup):
    """A `MeshError` ends a command with its message on stderr and exit code 1; anything else is a bug and shows as one."""

    def invoke(self, ctx: Any) -> object:
        try:
            return super().invoke(ctx)
        except MeshError as error:
            output.error(str(error))
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=OneLineErrors,
    name="mesh",
    help="A peer-to-peer gossip inference mesh: every node the same process, one OpenAI-compatible endpoint on each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(asked: bool) -> None:
    if asked:
        output.line(version("gossip-mesh"))
        raise typer.Exit


@app.callback()
def mesh(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """A peer-to-peer gossip inference mesh: every node the same process, one OpenAI-compatible endpoint on each."""


app.command("up")(up.up)
app.command("join")(up.join)
app.command("status")(status.status)
app.command("nodes")(nodes.nodes)
app.command("models")(models.models)
app.command("chat")(chat.chat)
app.command("ask")(ask.ask)
app.add_typer(docs.app, name="docs")
app.command("why")(why.why)
app.add_typer(key.app, name="key")
app.command("load")(load.load)
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.command("demo")(demo.demo)
