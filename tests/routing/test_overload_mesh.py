"""Overload bends a mesh and does not break it: goodput, order and recovery in virtual time, with and without planted faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mesh.ids import NodeId
from tests.routing.overload import Faults, Mesh, Totals

NAMES = [NodeId(f"n{index:03}") for index in range(3)]
SECOND = NAMES[1]


def run(
    load: float = 1.5,
    until: float = 60.0,
    *,
    seed: int = 0,
    nodes: int = 3,
    faults: Faults | None = None,
    users: int = 0,
    arrange: Callable[[Mesh], object] = lambda mesh: None,
) -> Mesh:
    """Offers `load` times the capacity, or has closed-loop users, until then."""
    mesh = Mesh([1.0] * nodes, seed, faults)
    if users:
        mesh.users(users, until)
    else:
        mesh.offer(load * mesh.capacity, until)
    arrange(mesh)
    mesh.run(until)
    return mesh


def goodput(mesh: Mesh, begin: float = 10.0) -> float:
    """The share of its capacity at which the mesh completed requests, after the first seconds."""
    return sum(at >= begin for at in mesh.totals.done_at) / (mesh.now - begin) / mesh.capacity


def success_rate(totals: Totals) -> float:
    return totals.done / max(1, totals.done + totals.given_up + totals.failed)


def kill_and_restart(mesh: Mesh) -> None:
    mesh.after(20.0, None, lambda: mesh.kill(SECOND))
    mesh.after(30.0, None, lambda: mesh.restart(SECOND))


def lagging(mesh: Mesh) -> None:
    """One node's loop is busy: what it receives waits 0.4 s on average, at times more than a second."""
    mesh.nodes[SECOND].lag_s = lambda: mesh.rng.expovariate(1 / 0.4)


@pytest.mark.parametrize(("load", "least"), [(0.5, 0.45), (0.9, 0.8), (1.1, 0.9), (1.5, 0.9), (3.0, 0.9)])
def test_goodput_follows_the_load_and_stays_at_capacity_beyond_it(load: float, least: float) -> None:
    mesh = run(load)
    assert goodput(mesh) >= least
    assert mesh.totals.failed == 0 and mesh.totals.overtaken == 0


def test_below_capacity_requests_start_at_once_and_none_is_refused() -> None:
    totals = run(0.5).totals
    assert totals.refused == 0 and totals.opens_refused == 0 and max(wait for _, wait in totals.waits_s) < 0.1


def test_opens_are_not_wasted_on_full_nodes() -> None:
    for load in (0.9, 1.1, 3.0):
        totals = run(load).totals
        assert totals.opens_refused <= 0.5 * totals.opens, load


def test_a_thousand_users_that_retry_as_the_sdk_does_are_all_served() -> None:
    totals = run(users=1000, until=120.0).totals
    assert totals.done > 2500 and success_rate(totals) >= 0.999 and totals.failed == 0
    # Two stages may grant an entry a place each for the same request; the second grant then serves its next one.
    assert totals.overtaken <= 0.001 * totals.done


def test_a_node_killed_at_the_peak_costs_its_own_streams_alone() -> None:
    mesh = run(1.5, arrange=kill_and_restart)
    assert goodput(mesh) >= 0.85, "a third of the mesh was away for ten of sixty seconds"
    assert mesh.totals.failed == 0 and mesh.totals.given_up <= 0.005 * mesh.totals.done
    assert mesh.totals.cut <= 20, "streams of which a client had tokens, at the dead entry"


def test_after_overload_service_is_back_within_seconds() -> None:
    mesh = Mesh([1.0] * 3)
    mesh.offer(3.0 * mesh.capacity, 30.0)
    mesh.retries_until = 30.0  # these clients have gone
    mesh.run(30.0)
    mesh.offer(0.4 * mesh.capacity, 60.0)
    mesh.run(60.0)
    late = [began - 30.0 for began, wait in mesh.totals.waits_s if began > 30.0 and wait > 0.5]
    assert mesh.totals.refused > 100 and max(late) < 6.0
    assert all(not node.queue.full_nodes() for node in mesh.nodes.values())


def test_a_slow_loop_leads_to_no_loss() -> None:
    mesh = run(1.5, arrange=lagging)
    assert goodput(mesh) >= 0.75 and mesh.totals.failed == 0
    assert not any(run.core.history for node in mesh.nodes.values() for run in node.runs.values())


def test_a_slow_node_gets_less_and_holds_up_nobody() -> None:
    mesh = Mesh([1.0, 1.0, 0.25])
    mesh.offer(1.5 * mesh.capacity, 60.0)
    mesh.run(60.0)
    assert goodput(mesh) >= 0.9 and mesh.totals.failed == 0 and mesh.totals.overtaken == 0


def test_grants_that_are_lost_cost_room_for_a_while_and_no_request() -> None:
    def lossy(mesh: Mesh) -> None:
        mesh.lost_grants = 0.05

    mesh = run(1.5, arrange=lossy)
    assert goodput(mesh) >= 0.75 and mesh.totals.failed == 0


def test_a_tenant_that_floods_leaves_the_others_their_share() -> None:
    mesh = Mesh([1.0] * 3)
    mesh.offer(3.0 * mesh.capacity, 60.0, "flood")
    for tenant in ("a", "b"):
        mesh.offer(0.1 * mesh.capacity, 60.0, tenant)
    mesh.run(60.0)
    flood, others = ([wait for tenant, wait in mesh.totals.tenants if (tenant == "flood") is own] for own in (True, False))
    assert sum(others) / len(others) < 0.5 * sum(flood) / len(flood)


def test_twenty_nodes_serve_at_capacity() -> None:
    mesh = run(1.2, 8.0, nodes=20)
    assert goodput(mesh, 4.0) >= 0.9 and mesh.totals.failed == 0


# --- each of these faults must be visible to the checks above


def test_a_queue_without_order_is_caught() -> None:
    assert run(1.5, faults=Faults(unordered=True)).totals.overtaken > 10


def test_polling_is_caught() -> None:
    totals = run(1.5, 12.0, faults=Faults(polling=True)).totals
    assert totals.opens_refused > 0.9 * totals.opens


def test_taking_lateness_for_loss_is_caught() -> None:
    mesh = run(1.5, faults=Faults(late_is_lost=True), arrange=lagging)
    assert any(run.core.history for node in mesh.nodes.values() for run in node.runs.values())


def test_credits_lost_with_a_message_for_ever_are_caught() -> None:
    def lossy(mesh: Mesh) -> None:
        mesh.lost_grants = 0.05

    assert goodput(run(1.5, faults=Faults(no_renewal=True), arrange=lossy)) < 0.6
