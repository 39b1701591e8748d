"""`mesh simulate`: the node's own membership by the hundred, in virtual time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options, output
from mesh.errors import BadRequest

if TYPE_CHECKING:
    from membership.simulation.scenario import Death, Scenario, ScenarioResult


_LARGE = 2000  # nodes: from this size on the progress is shown


def replayed(path: Path, json: bool) -> None:
    """The events that the node saw, and whether the core answers today as it did then.

    Raises:
        BadRequest: not readable, or no trace of this version.
        typer.Exit: with 1 when a replay that should be exact is not.
    """
    from membership.trace.replay import replay
    from membership.trace.trace_format import BadTrace, read

    try:
        found = replay(read(path.read_bytes()))
    except (OSError, BadTrace) as error:
        raise BadRequest(f"--replay {path}: {error}", "replay") from None
    if json:
        output.as_json(asdict(found))
    else:
        rows = [
            (
                f"{event.at_s - found.began_s:.3f}",
                event.name or "-",
                event.before or "-",
                event.after,
                event.cause or "-",
                event.node,
            )
            for event in found.events
        ]
        output.table(("AT S", "NAME", "BEFORE", "AFTER", "CAUSE", "ID"), rows, empty="nothing happened")
        kind = "from the node's first input" if found.exact else "from a checkpoint, so only close"
        output.line(f"{found.inputs} inputs over {found.ended_s - found.began_s:.1f} s, {kind}; {found.agreed} answered as then")
        if found.differs_at is not None:
            output.line(f"the first that was answered otherwise: number {found.differs_at}")
    if found.exact and found.differs_at is not None:
        raise typer.Exit(1)


def show(scenario: Scenario, outcome: ScenarioResult) -> None:
    """The deaths as a table, and what became of the rest. From "SUSPECT S" on no node gives it new work."""
    rows = [
        (
            death.node,
            *(round(s, 3) for s in (death.passed_over_s, death.first_s, death.p50_s, death.p99_s, death.last_s)),
            f"{death.heard}/{death.observers}",
        )
        for death in outcome.deaths
    ]
    output.table(("KILLED", "SUSPECT S", "FIRST S", "P50 S", "P99 S", "LAST S", "HEARD BY"), rows, empty="nobody was killed")
    if scenario.churn_a_minute:
        output.line(f"{outcome.goings} nodes went and came back meanwhile")
    if scenario.partition_s:
        healed = "never" if outcome.heal_s is None else f"{outcome.heal_s:.2f} s"
        output.line(f"one mesh again after a partition of {scenario.partition_s:g} s: {healed}")
    output.line(f"false deaths: {outcome.false_deaths}; idle: {outcome.idle_bytes_node_s:.0f} bytes/s sent a node")
    output.line(f"trace {outcome.trace}; {outcome.virtual_s:.0f} virtual seconds in {outcome.wall_s:.1f} s")


def noted(death: Death) -> None:
    """One line on stderr, for a mesh so large that the table takes minutes."""
    output.note(f"{death.node} was killed; {death.heard} of {death.observers} know, the last after {death.last_s:.2f} s")


def simulate(
    nodes: Annotated[int, typer.Option("--nodes", min=2, max=10_000, help="How many nodes; ten thousand take minutes.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random: one seed, one run.")] = 1,
    loss: Annotated[float, typer.Option("--loss", min=0.0, max=0.9, help="The share of datagrams that get lost.")] = 0.0,
    kill: Annotated[int, typer.Option("--kill", min=0, help="How many are killed, one after the other.")] = 3,
    silent: Annotated[bool, typer.Option("--silent", help="Their hosts vanish too: nothing says that they are dead.")] = False,
    starved: Annotated[int, typer.Option("--starved", min=0, help="How many read all input 0.5 to 2.5 s late.")] = 0,
    delay: Annotated[
        float, typer.Option("--delay", metavar="MS", min=0.01, max=1000, help="Of one way, on average: 0.4 to 1.6 of it.")
    ] = 1.25,
    one_way: Annotated[
        int, typer.Option("--one-way", min=0, help="How many ways between two nodes carry nothing in one direction.")
    ] = 0,
    churn: Annotated[
        float, typer.Option("--churn", min=0, max=600, help="How many a minute crash, or leave, and come back meanwhile.")
    ] = 0.0,
    partition: Annotated[
        float, typer.Option("--partition", metavar="S", min=0, max=3600, help="For so long the mesh is cut in two, at the end.")
    ] = 0.0,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay", metavar="FILE", help="Instead: lead a core through the trace of a real node (`mesh up --trace-mb`)."
        ),
    ] = None,
    json: options.JsonOption = False,
) -> None:
    """Simulate a mesh and its deaths: how soon each survivor knows, and whether anyone was wronged."""
    if replay is not None:
        replayed(replay, json)
        return
    from membership.simulation.scenario import Scenario
    from membership.simulation.scenario import simulate as run

    if kill + starved >= nodes:
        raise BadRequest(f"expected fewer killed and starved nodes than {nodes}, got {kill + starved}", "kill")
    ways = (nodes - kill - starved) * (nodes - kill - starved - 1)
    if one_way > ways:
        raise BadRequest(
            f"expected at most {ways} cut ways between the nodes that are not killed or starved, got {one_way}", "one_way"
        )
    scenario = Scenario(
        nodes, seed, loss, kill, silent, starved, delay_ms=delay, one_way=one_way, churn_a_minute=churn, partition_s=partition
    )
    outcome = run(scenario, noted) if nodes >= _LARGE else run(scenario)
    if json:
        output.as_json(asdict(outcome))
    else:
        show(scenario, outcome)
    if not outcome.well:
        raise typer.Exit(1)
