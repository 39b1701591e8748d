"""A peer that sends activations which are not finite: the sequence goes on without that peer, and the node names the peer."""

from __future__ import annotations

import pytest
import trio

from mesh.links.refusals import BAD_ACTIVATIONS
from mesh.view import PeerState
from node.engine.api import SequenceKey
from node.ops.doctor import PROBLEM, Observations, diagnosis
from tests.node.paths import SmallMesh, a_request, small_mesh
from tests.node.test_paths import EXPECTED, at_rest, run, tokens

PATHS = {"entry": (), "a": ((0, 2),), "b": ((0, 2),), "middle": ((2, 4),), "last": ((4, 6),)}


def paths_of(mesh: SmallMesh) -> list[list[str]]:
    """The nodes of each attempt of the request."""
    record = mesh.nodes["entry"].entry.recent.find("s1")
    assert record is not None
    return [[stage.node for stage in why.path] for why in record.why]


@pytest.mark.parametrize("at", [11, 15, 25])
@pytest.mark.parametrize("finder", ["middle", "last"])
async def test_the_next_attempt_avoids_the_peer_with_bad_activations(finder: str, at: int) -> None:
    async with small_mesh(**PATHS) as mesh:
        node = mesh.nodes[finder]
        node.engine.faults[at] = lambda key: node.engine.lose(key, "sent no numbers", by_previous=True)
        if finder == "last":  # the stage before it has two holders, so that another path exists
            await mesh.add("middle2", (2, 4))
        events = await run(mesh)
        await at_rest(mesh)
        assert tokens(events) == EXPECTED and events[-1].attempts == 2
        first, second = paths_of(mesh)
        sender = first[first.index(finder) - 1]
        assert sender not in second and finder in second
        assert node.stages.statistics().bad_activations_total == 1
        [refusal] = node.stages.refusals.recent(trio.current_time())
        assert (refusal.host, refusal.reason, refusal.count) == (sender, BAD_ACTIVATIONS, 1)


async def test_a_peers_persistent_bad_activations_end_the_request_with_the_reason() -> None:
    async with small_mesh(entry=(), only=((0, 3),), last=((3, 6),)) as mesh:
        engine = mesh.nodes["last"].engine

        def spoil(key: SequenceKey) -> None:
            engine.faults[10] = spoil
            engine.lose(key, "the stage before sent no numbers", by_previous=True)

        engine.faults[10] = spoil
        with pytest.raises(Exception, match="attempts in a row were lost without a token; the last: the stage before sent no"):
            await run(mesh, a_request())
        await at_rest(mesh)


async def test_bad_logits_of_the_model_end_the_request_at_once() -> None:
    async with small_mesh(**PATHS) as mesh:
        node = mesh.nodes["middle"]
        node.engine.faults[15] = lambda key: node.engine.lose(key, "a failure of the model's numbers", retryable=False)
        with pytest.raises(Exception, match="a failure of the model's numbers"):
            await run(mesh)
        await at_rest(mesh)
        assert len(paths_of(mesh)) == 1
        assert node.stages.statistics().bad_activations_total == 0 and not node.stages.refusals.recent(trio.current_time())


async def test_the_doctor_names_the_peer() -> None:
    async with small_mesh(**PATHS) as mesh:
        node = mesh.nodes["middle"]
        node.engine.faults[15] = lambda key: node.engine.lose(key, "sent no numbers", by_previous=True)
        await run(mesh)
        sender = paths_of(mesh)[0][0]
        view = mesh.view()
        assert view.peers[sender].state is PeerState.ALIVE  # type: ignore[index]
        look = Observations(
            view, node.stages.refusals.recent(trio.current_time()), {}, {}, None, [], keyless=False, key_saved=True
        )
        [finding] = [each for each in diagnosis(look) if BAD_ACTIVATIONS in each.what]
        assert finding.severity == PROBLEM and sender in finding.what and "memory" in finding.do
