"""`mesh doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

import typer

from cli import options, output


def doctor(
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """What is wrong with the mesh as one node sees it, and what to do: exit code 0 when it is well, 1 when not."""
    with options.client(node, api_key) as client:
        told = client.doctor()
    if json:
        output.as_json(told)
    else:
        output.paragraph(f"asked {told['name']} ({told['node']}): {'all is well' if told['healthy'] else 'something is wrong'}")
        for finding in told["findings"]:
            output.paragraph(f"{finding['severity']:7}  {finding['about']}: {finding['what']}", indent=" " * 9)
            if finding["do"]:
                output.paragraph(f"{'':9}-> {finding['do']}", indent=" " * 12)
    if not told["healthy"]:
        raise typer.Exit(1)
