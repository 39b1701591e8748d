"""The services behind HTTP: status, and work that must not block other clients."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import to_builtins
from numpy.typing import NDArray

from mesh.ids import ModelId, NodeId
from mesh.view import APPROXIMATE, Facts, Loading, ModelCard, Peer, PeerState, Span, View
from node.engine.kernels.kernel_choice import KernelChoice
from node.engine.model.linear import KERNELS
from node.engine.model.progress import LoadPhase, LoadProgress
from node.host.uncompiled import COSTS, TURNED_OFF, remedy
from node.ops.status import status
from node.serving.models import ServedModels
from node.surface import Surface
from rag.service import Documents
from routing.loading import being_loaded


class CountingEmbedder:
    """Records the thread that each call ran in."""

    dim, identity = 4, "counting"

    def __init__(self) -> None:
        self.threads: set[threading.Thread] = set()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.threads.add(threading.current_thread())
        return np.ones((len(texts), self.dim), np.float32)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        self.threads.add(threading.current_thread())
        return [len(text) for text in texts]


async def no_call(*args: object, **kwargs: object) -> None:
    raise AssertionError("nobody is asked")


async def test_embedding_and_counting_do_not_block_the_event_loop(tmp_path: Path) -> None:
    view = View(NodeId("a" * 16))
    embedder: Any = CountingEmbedder()
    absent: Any = None
    models: Any = ServedModels()
    call: Any = no_call
    documents = Documents(view.me, tmp_path, embedder, lambda: view, call, lambda told: None, lambda: 0.0)
    surface = Surface(lambda: view, models, absent, absent, documents, embedder, dict, absent, None)

    assert len(await surface.embed(["one", "two"])) == 2
    assert await surface.count_embed_tokens(["one", "three"]) == 8
    assert threading.current_thread() not in embedder.threads


def test_status_has_the_kernel_and_load_progress_of_each_span() -> None:
    me = Peer(NodeId("a" * 16), "n", ("127.0.0.1", 1))
    view = View(me.id, {me.id: me})
    engine = SimpleNamespace(
        kernels={Span(ModelId("m"), 0, 6): "mesh-bf16 on amx"},
        choices={Span(ModelId("m"), 0, 6): KernelChoice((KERNELS["mesh-bf16"],), "the first", {"mesh-bf16": 10.5}, True)},
        loading={Span(ModelId("m"), 6, 8): LoadProgress(LoadPhase.PACKING, 1, 2, 300, 400, 2.04)},
    )
    told = to_builtins(status(view, [], {}, 0.0, engine))["self"]
    assert told["kernels"] == {"m 0:6": "mesh-bf16 on amx"}
    choice = {"portable": True, "reason": "the first", "cpu_us": {"mesh-bf16": 10.5}, "remembered": True}
    assert told["kernel_choices"] == {"m 0:6": choice}
    assert told["loading"] == {
        "m 6:8": {"phase": "packing", "layers_done": 1, "layers": 2, "bytes_done": 300, "bytes": 400, "seconds": 2.0}
    }
    assert to_builtins(status(view, [], {}, 0.0, None))["self"]["loading"] == {}, "another engine may tell of nothing"


def test_status_has_a_remedy_for_a_missing_compiled_kernel() -> None:
    told = [
        to_builtins(status(View(me.id, {me.id: me}), [], {}, 0.0, None))["self"]["uncompiled"]
        for me in (Peer(NodeId("a" * 16), "n", ("127.0.0.1", 1), facts=Facts(uncompiled=why)) for why in ("", TURNED_OFF))
    ]
    assert told == [None, {"why": TURNED_OFF, "costs": COSTS, "do": remedy(TURNED_OFF)}]
    assert "MESH_CPU_ISA" in remedy(TURNED_OFF)


def serving(number: int, numerics: str, spans: int = 1) -> Peer:
    """A node with the card of model m and this fingerprint, which serves the model if `spans`."""
    card = ModelCard(ModelId("m"), 6, 4096, "w", numerics)
    facts = Facts(spans=(Span(card.id, 0, 6),) * spans, models=(card,))
    return Peer(NodeId(f"{number:016x}"), f"n{number}", ("127.0.0.1", number + 1), facts=facts)


@pytest.mark.parametrize(
    ("peers", "promise"),
    [
        ([serving(0, "aa"), serving(1, "aa")], "exact"),
        ([serving(0, "aa"), serving(1, "bb")], "mixed"),
        ([serving(0, "aa"), serving(1, APPROXIMATE + "1")], "approximate"),
        ([serving(0, ""), serving(1, "", spans=0)], "approximate"),
        ([serving(0, "aa", spans=0)], "unknown"),
        ([serving(0, "aa"), serving(1, "", spans=0)], "exact"),
    ],
)
def test_status_has_the_numerics_of_each_model(peers: list[Peer], promise: str) -> None:
    view = View(peers[0].id, {peer.id: peer for peer in peers})
    assert to_builtins(status(view, [], {}, 0.0, None))["models"][0]["numerics"] == promise


def test_status_has_the_progress_of_each_load() -> None:
    card = ModelCard(ModelId("m"), 6, 4096, "w", "")
    loading = Facts(models=(card,), intends=(Span(card.id, 2, 6),), loading={card.id: Loading(40, 7)})
    peers = [
        Peer(NodeId(f"{number:016x}"), f"n{number}", ("127.0.0.1", number + 1), state=state, facts=loading)
        for number, state in enumerate((PeerState.ALIVE, PeerState.DEAD))
    ]
    view = View(peers[0].id, {peer.id: peer for peer in peers})
    missing = being_loaded(view, card.id, ((0, 6),))
    assert missing is not None
    told = to_builtins(status(view, [], {}, 0.0, None, {card.id: missing}))
    assert [node["loading"] for node in told["nodes"]] == [
        [{"model": "m", "start": 2, "end": 6, "progress": 0.4, "eta_s": 7}],
        [],
    ]
    assert told["models"][0]["loading"] == {"layers": [{"start": 2, "end": 6}], "progress": 0.4, "eta_s": 7.0}
    assert to_builtins(status(view, [], {card.id: True}, 0.0, None))["models"][0]["loading"] is None
