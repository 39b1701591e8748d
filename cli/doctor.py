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
        report = client.doctor()
    if json:
        output.as_json(report)
    else:
        verdict = "all is well" if report["healthy"] else "something is wrong"
        output.paragraph(f"asked {report['name']} ({report['node']}): {verdict}")
        for finding in report["findings"]:
            output.paragraph(f"{finding['severity']:7}  {finding['about']}: {finding['what']}", indent=" " * 9)
            if finding["do"]:
                output.paragraph(f"{'':9}-> {finding['do']}", indent=" " * 12)
    if not report["healthy"]:
        raise typer.Exit(1)
