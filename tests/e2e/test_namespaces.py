"""Four members on four hosts: ways that work in one direction only are no death, a pulled cable is, and the mesh heals."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from bench.processes import Members
from tests.e2e.namespaces import Hosts, NoNamespaces

pytestmark = pytest.mark.e2e
LIFE_S = 7.0  # longer than a silent member of four lives
ALL = [0, 1, 2, 3]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with Hosts(4) as hosts:
            yield hosts
    except NoNamespaces as error:
        pytest.skip(str(error))
    assert not hosts.left_over()


@pytest.fixture
def members(hosts: Hosts) -> Iterator[Members]:
    commands = [hosts.within(host, [sys.executable, "-m", "bench.member", hosts.address(host)]) for host in ALL]
    members = Members([], 4, commands)
    try:
        yield members
    finally:
        members.close()


def test_a_way_cut_in_one_direction_is_no_death_while_others_are_reached(hosts: Hosts, members: Members) -> None:
    hosts.cut(1, 2)
    time.sleep(LIFE_S)
    assert members.deaths() == set(), "two relays reach it, both ways"
    assert all(members.state(by, of) in ("alive", "suspect") for by in ALL for of in ALL if by != of)


def test_a_node_that_hears_nobody_kills_nobody_whom_the_others_hear_and_is_back_when_it_hears_again(
    hosts: Hosts, members: Members
) -> None:
    for other in (0, 1, 2):
        hosts.cut(other, 3)
    members.wait_state([0, 1, 2], 3, "suspect", within_s=10)
    members.wait_state([0, 1, 2], 3, "dead", within_s=40)
    for other in (0, 1, 2):
        hosts.mend(other, 3)
    members.wait_state([0, 1, 2], 3, "alive", within_s=20)
    for other in (0, 1, 2):
        members.wait_state([3], other, "alive", within_s=10)
    assert {(by, of) for by, of in members.deaths() if by != 3} == {(0, 3), (1, 3), (2, 3)}


def test_a_pulled_cable_is_a_death_and_the_mesh_heals_when_it_is_back(hosts: Hosts, members: Members) -> None:
    hosts.unplug(3)
    members.wait_state([0, 1, 2], 3, "dead", within_s=15)
    assert {(by, of) for by, of in members.deaths() if by != 3} == {(0, 3), (1, 3), (2, 3)}
    hosts.plug(3)
    members.wait_state([0, 1, 2], 3, "alive", within_s=15)
    for other in (0, 1, 2):
        members.wait_state([3], other, "alive", within_s=5)
