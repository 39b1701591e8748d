"""Four members on four hosts: a way that works in one direction is no death, a pulled cable is, and the mesh heals."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bench.processes import Members
from tests.e2e.namespaces import Hosts, NoNamespaces

pytestmark = pytest.mark.e2e


def test_a_one_way_cut_is_no_death_a_pulled_cable_is_and_the_mesh_heals() -> None:
    try:
        hosts = Hosts(4).__enter__()
    except NoNamespaces as error:
        pytest.skip(str(error))
    with hosts:
        commands = [hosts.within(host, [sys.executable, "-m", "bench.member", hosts.address(host)]) for host in range(4)]
        members = Members([], 4, commands)
        try:
            hosts.cut(1, 2)
            time.sleep(8)  # longer than a silent member of four lives
            assert members.deaths() == set(), "two relays reach it, both ways"
            hosts.mend(1, 2)
            hosts.unplug(3)
            members.wait_state([0, 1, 2], 3, "dead", within_s=15)
            assert {(by, of) for by, of in members.deaths() if by != 3} == {(0, 3), (1, 3), (2, 3)}
            hosts.plug(3)
            members.wait_state([0, 1, 2], 3, "alive", within_s=15)
            for number in (0, 1, 2):
                members.wait_state([3], number, "alive", within_s=5)
        finally:
            members.close()
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert hosts.address(0) and f"{hosts._tag}h" not in listed, "nothing is left"
