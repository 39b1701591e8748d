"""The progress of loads, as peers see it in the facts and the operator in the log."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from mesh.ids import ModelId
from mesh.view import Facts, Loading, ModelCard, Span
from node.serving.load_state import FIRST_GUESS_S, LOG_EVERY_S, PUBLISH_EVERY_S, LoadState, eta_s
from node.serving.own_facts import OwnFacts

CARD = ModelCard(ModelId("toy"), 8, 64, "w", "n")
FIRST, SECOND = Span(CARD.id, 0, 2), Span(CARD.id, 2, 8)


@dataclass(frozen=True)
class Share:
    share: float


class Watched:
    """A node that is going to serve two spans of one model."""

    def __init__(self) -> None:
        self.published: list[Facts] = []
        self.facts = OwnFacts(Facts(), self.published.append)
        self.facts.set_model(CARD, None)
        self.facts.set_intended((FIRST, SECOND))
        self.engine: dict[Span, Share] = {}
        self.fetching: float | None = None
        self.watch = LoadState(self.facts, lambda: self.engine, lambda model: self.fetching)

    def told_at(self, now: float) -> Loading | None:
        self.watch.update(now)
        return self.facts.now.loading.get(CARD.id)


def test_progress_counts_layers_and_the_time_to_go_follows_from_it() -> None:
    node = Watched()
    assert node.told_at(100.0) == Loading(0, round(FIRST_GUESS_S))
    node.engine[FIRST] = Share(0.5)
    assert node.told_at(105.0) == Loading(12, 35), "one of eight layers after 5 s"
    node.facts.set_serving(CARD, (FIRST,))
    node.engine = {SECOND: Share(0.0)}
    assert node.told_at(110.0) == Loading(25, 30)
    node.engine = {SECOND: Share(1.0)}
    assert node.told_at(120.0) == Loading(99, 0), "it is there when it serves, not before"
    node.facts.set_serving(CARD, (FIRST, SECOND))
    assert node.told_at(125.0) is None and node.facts.now.intends == ()


def test_fetching_the_files_is_half_of_the_progress() -> None:
    node = Watched()
    node.told_at(0.0)
    node.fetching = 0.5
    assert node.told_at(10.0) == Loading(6, 150), "half of half of two of eight layers"
    node.fetching, node.engine = None, {FIRST: Share(0.5)}
    assert node.told_at(20.0) == Loading(18, 87)
    node.facts.set_serving(CARD, (FIRST,))
    node.fetching, node.engine = 1.0, {}
    assert node.told_at(30.0) == Loading(62, 18)


def test_progress_is_published_seldom_and_only_when_changed() -> None:
    node = Watched()
    for step in range(400):
        node.engine[FIRST] = Share(step / 400)
        node.told_at(step * 0.1)
    changes = [now.loading for before, now in pairwise(node.published) if before.loading != now.loading]
    assert 10 <= len(changes) <= 40.0 / PUBLISH_EVERY_S + 1
    before = len(node.published)
    node.told_at(40.0)
    published = len(node.published)
    assert published - before <= 1
    for _ in range(5):
        node.watch.update(40.0)
    assert len(node.published) == published


def test_begin_progress_and_end_of_a_load_are_logged() -> None:
    node = Watched()
    with capture_logs() as logs:
        node.told_at(0.0)
        node.told_at(LOG_EVERY_S - 0.1)
        node.engine[SECOND] = Share(0.5)
        node.told_at(LOG_EVERY_S)
        node.facts.set_serving(CARD, (FIRST, SECOND))
        node.told_at(8.0)
        node.told_at(100.0)
    begin, middle, end = logs
    assert (begin["event"], begin["model"], begin["layers"]) == ("node.loading", "toy", ["0:2", "2:8"])
    assert "model_loading" in begin["why"]
    assert (middle["event"], middle["progress"]) == ("node.loading", "38%") and middle["eta_s"] > 0
    assert (end["event"], end["layers"], end["seconds"]) == ("node.loaded", ["0:2", "2:8"], 8.0)


def test_a_changed_choice_before_the_load_is_the_same_load() -> None:
    node = Watched()
    node.told_at(0.0)
    node.facts.set_intended((SECOND,))
    node.engine[SECOND] = Share(0.5)
    assert node.told_at(10.0) == Loading(50, 10)


@pytest.mark.parametrize(
    ("share", "elapsed_s", "to_go_s"), [(0.0, 0.0, FIRST_GUESS_S), (0.0, 60.0, 60.0), (0.5, 7.0, 7.0), (1.0, 9.0, 0.0)]
)
def test_the_time_to_go_is_in_proportion_to_the_share(share: float, elapsed_s: float, to_go_s: float) -> None:
    assert eta_s(share, elapsed_s) == to_go_s
