"""A span whose workers have ended: withdrawn at once, loaded again, and the end of the node when it happens again and again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from mesh.errors import BadRequest, MeshError
from mesh.ids import ModelId
from mesh.view import Facts, ModelCard, Span
from node.engine.api import SpanLost
from node.engine.parallel.worker_group import WorkersLost
from node.serving.models import InitialModels, ServedModel, ServedModels
from node.serving.own_facts import OwnFacts
from node.serving.placement import MAX_LOSSES, RELOAD_AFTER_S, Placement
from node.serving.stages import Stages
from node.weights.verifying import FilesChanged

CARD = ModelCard(ModelId("toy"), 4, 64, "", "n-tp2")
WEIGHTS = "a" * 64
WHOLE = Span(CARD.id, 0, 4)


class LoadingEngine:
    def __init__(self) -> None:
        self.loads: list[Span] = []
        self.fails = 0  # of the loads to come, how many find their workers killed

    def statistics(self) -> object:
        return SimpleNamespace(uncompiled="no C compiler" if self.loads else "")

    def load(self, directory: Path, model: ModelId, start: int, end: int, weights: str) -> ModelCard:
        self.loads.append(Span(model, start, end))
        if self.fails:
            self.fails -= 1
            raise WorkersLost("rank 0 was killed by signal 9")
        return msgspec.structs.replace(CARD, id=model, weights=weights)


class FilesAreHere:
    async def fetch_span(self, model: ServedModel, span: Span) -> None: ...

    async def identify(self, model: ServedModel) -> ServedModel:
        return replace(model, card=msgspec.structs.replace(model.card, weights=WEIGHTS))

    async def is_unchanged(self, model: ModelId) -> bool:
        return True

    async def changed(self, model: ModelId) -> FilesChanged:
        await trio.sleep_forever()


class Placed:
    """A node pinned to the whole model, or to `layers` of it, which it serves once `placement.run` has begun."""

    def __init__(self, layers: str = "0:4", cards: tuple[ModelCard, ...] = (CARD,)) -> None:
        models = ServedModels()
        text: Any = None
        for card in cards:
            models.add(ServedModel(card, Path(card.id), text))
        self.engine: Any = LoadingEngine()
        self.published: list[Facts] = []
        self.facts = OwnFacts(Facts(version="0", pid=1), self.published.append)
        library: Any = FilesAreHere()
        membership: Any = None
        holdings = InitialModels(models, {card.id: 4 for card in cards}, (), 1 << 30)
        engine: Any = self.engine
        self.placement = Placement(layers, engine, holdings, self.facts, membership, library)

    async def serving(self) -> None:
        while self.facts.now.spans != (WHOLE,):
            await trio.sleep(0.01)


async def test_pinned_layers_of_all_models_are_published_before_the_first_load(autojump_clock: MockClock) -> None:
    other = msgspec.structs.replace(CARD, id=ModelId("other"))
    placed = Placed("0:1,2:4", (CARD, other))
    wanted = {Span(card.id, *window) for card in (CARD, other) for window in ((0, 1), (2, 4))}
    async with trio.open_nursery() as nursery:
        await nursery.start(placed.placement.run)
        assert set(placed.facts.now.intends) == wanted and not placed.engine.loads
        while set(placed.facts.now.spans) != wanted:
            await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()
        assert placed.facts.now.intends == ()
        nursery.cancel_scope.cancel()
    for facts in placed.published:
        if facts.intends:
            assert set(facts.intends) == wanted - set(facts.spans), "what is not served yet is intended, to the last"


async def test_a_span_whose_workers_ended_is_withdrawn_and_loaded_again(autojump_clock: MockClock) -> None:
    placed = Placed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(placed.placement.run)
        await placed.serving()
        placed.placement.span_lost(SpanLost(WHOLE, "rank 1 was killed by signal 9"))
        assert placed.facts.now.spans == (), "withdrawn at once, so that no new path uses it"
        lost_at = trio.current_time()
        await placed.serving()
        assert trio.current_time() - lost_at >= RELOAD_AFTER_S
        assert placed.engine.loads == [WHOLE, WHOLE]
        assert any(facts.intends == (WHOLE,) and not facts.spans for facts in placed.published), "others need not take it over"
        nursery.cancel_scope.cancel()
    serving = [facts for facts in placed.published if facts.spans]
    assert all(facts.uncompiled == "no C compiler" for facts in serving), "known before the first request can come"


async def test_workers_that_end_while_they_load_again_are_another_loss(autojump_clock: MockClock) -> None:
    placed = Placed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(placed.placement.run)
        await placed.serving()
        placed.engine.fails = MAX_LOSSES - 1
        placed.placement.span_lost(SpanLost(WHOLE, "rank 1 was killed by signal 9"))
        await placed.serving()
        assert placed.engine.loads == [WHOLE] * (MAX_LOSSES + 1)
        nursery.cancel_scope.cancel()
    placed = Placed()
    with pytest.RaisesGroup(pytest.RaisesExc(MeshError, match="workers ended 4 times"), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(placed.placement.run)
            await placed.serving()
            placed.engine.fails = 10**6
            placed.placement.span_lost(SpanLost(WHOLE, "rank 1 was killed by signal 9"))
            await trio.sleep_forever()


@pytest.mark.parametrize("layers", ["0:2", "2:4", "0:2,2:4", "0:4,1:3"])
def test_parts_of_a_whole_only_model_cannot_be_pinned(layers: str) -> None:
    whole_only = msgspec.structs.replace(CARD, whole_only="layer 1 is given per_layer_input beside the activations")
    Placed("0:4", (whole_only,))
    with pytest.raises(BadRequest, match=r"--layers \d:\d: toy is served whole only, for layer 1 .*; give --layers auto, 0:4"):
        Placed(layers, (whole_only,))


def test_a_span_that_the_engine_lost_is_passed_to_placement() -> None:
    passed: list[SpanLost] = []
    anything: Any = None
    Stages(("127.0.0.1", 1), anything, anything, anything, passed.append).carry([SpanLost(WHOLE, "gone")])
    assert passed == [SpanLost(WHOLE, "gone")]


async def test_workers_that_end_again_and_again_end_the_node(autojump_clock: MockClock) -> None:
    placed = Placed()
    again = pytest.RaisesExc(MeshError, match="workers ended 4 times in .* signal 9")
    with pytest.RaisesGroup(again, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(placed.placement.run)
            for _ in range(MAX_LOSSES + 1):
                await placed.serving()
                placed.placement.span_lost(SpanLost(WHOLE, "rank 1 was killed by signal 9"))
            await trio.sleep_forever()
    assert placed.engine.loads == [WHOLE] * (MAX_LOSSES + 1)


async def test_losses_far_apart_in_time_are_always_reloaded(autojump_clock: MockClock) -> None:
    placed = Placed()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(placed.placement.run)
        for _ in range(3 * MAX_LOSSES):
            await placed.serving()
            placed.placement.span_lost(SpanLost(WHOLE, "rank 0 ended with exit code 1"))
            await trio.sleep(300)
        await placed.serving()
        nursery.cancel_scope.cancel()
