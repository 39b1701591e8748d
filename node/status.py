"""The body of `GET /mesh/status`: a pure function of the view and what the document service says of its stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from mesh.ids import ModelId, format_address
from mesh.view import Peer, View, is_exact
from rag.types import StoreInfo
from routing.coverage import coverage
from routing.loading import UNKNOWN, BeingLoaded


def status(
    view: View,
    stores: Sequence[StoreInfo],
    complete: Mapping[ModelId, bool],
    now: float,
    engine: object,
    loading: Mapping[ModelId, BeingLoaded] = MappingProxyType({}),
) -> dict[str, Any]:
    """`complete`: per model, whether a path through all its layers exists right now; `engine`: the engine's statistics;
    `loading`: of models without a path, what of them is being loaded.

    Of those, the kernels of the spans loaded here, why they were chosen, and how far those are that load; another engine
    may tell of none of these.
    """
    kernels, choices, spans_loading = (getattr(engine, name, {}) for name in ("kernels", "choices", "loading"))
    me = view.peers[view.me]
    covered = coverage(view)
    return {
        "self": {
            "id": me.id,
            "name": me.name,
            "pid": me.facts.pid,
            "http": me.facts.http,
            "gossip": format_address(me.address),
            "version": me.facts.version,
            "kernels": {f"{span.model} {span.start}:{span.end}": name for span, name in sorted(kernels.items())},
            "kernel_choices": {f"{span.model} {span.start}:{span.end}": _choice(each) for span, each in sorted(choices.items())},
            "loading": {f"{span.model} {span.start}:{span.end}": _progress(each) for span, each in sorted(spans_loading.items())},
            "frozen": view.frozen,
        },
        "nodes": [_node(peer, view, now) for peer in sorted(view.peers.values(), key=lambda peer: (peer.name, peer.id))],
        "models": [
            {
                "id": card.id,
                "layers": card.layers,
                "max_model_len": card.max_model_len,
                "complete": complete.get(card.id, False),
                "loading": _being_loaded(loading.get(card.id)),
                "min_replicas": min(view.replicas(card.id, card.layers), default=0),
                "numerics": numerics(view, card.id),
                "coverage": [
                    {"start": run.start, "end": run.end, "live": run.live, "ready": run.ready} for run in covered[card.id].runs
                ],
            }
            for card in sorted(view.models().values(), key=lambda card: card.id)
        ],
        "stores": [
            {
                "name": store.name,
                "documents": store.documents,
                "shards": store.shards,
                "replicas": store.replicas,
                "in_sync": store.in_sync,
            }
            for store in stores
        ],
    }


def numerics(view: View, model: ModelId) -> str:
    """What answers of the model promise by who serves it now: exact, approximate, mixed, or unknown where nobody does.

    Mixed: there are several kinds of node, each exact by itself. An answer is exact while one kind computes all of it.
    """
    servers = [peer for peer in view.live() if any(span.model == model for span in peer.facts.spans)]
    told = {card.numerics for peer in servers for card in peer.facts.models if card.id == model}
    if not told:
        return "unknown"
    if not all(map(is_exact, told)):
        return "approximate"
    return "exact" if len(told) == 1 else "mixed"


def _choice(choice: Any) -> dict[str, Any]:
    """Of a span's kernel (`node.engine.kernel_choice`): why, and what was measured, by kernel, if anything."""
    return {
        "portable": choice.kernels[0].compiled,
        "reason": choice.reason,
        "cpu_us": dict(choice.times_us),
        "remembered": choice.remembered,
    }


def _progress(progress: Any) -> dict[str, Any]:
    """Of a span that loads (`node.engine.progress`)."""
    return {
        "phase": progress.phase.value,
        "layers_done": progress.layers_done,
        "layers": progress.layers,
        "bytes_done": progress.bytes_done,
        "bytes": progress.bytes,
        "seconds": round(progress.seconds, 1),
    }


def _being_loaded(loads: BeingLoaded | None) -> dict[str, Any] | None:
    """Missing layers of a model that nodes load now."""
    if loads is None:
        return None
    layers = [{"start": start, "end": end} for start, end in loads.layers]
    return {"layers": layers, "progress": loads.progress, "eta_s": loads.eta_s}


def _loads(peer: Peer) -> list[dict[str, Any]]:
    """What the node says that it is loading; empty for one that is gone."""
    return [
        {
            "model": span.model,
            "start": span.start,
            "end": span.end,
            "progress": told.percent / 100,
            "eta_s": told.eta_s,
        }
        for span in sorted(peer.facts.intends)
        for told in [peer.facts.loading.get(span.model, UNKNOWN)]
    ]


def _node(peer: Peer, view: View, now: float) -> dict[str, Any]:
    is_me, is_live = peer.id == view.me, view.is_live(peer.id)
    return {
        "id": peer.id,
        "name": peer.name,
        "state": peer.state.value,
        "http": peer.facts.http,
        "gossip": format_address(peer.address),
        "region": peer.region,
        "cause": peer.cause,
        "twin": peer.facts.twin if is_live else "",
        "draining": is_live and peer.facts.draining,
        "readiness": peer.facts.readiness.value if is_live else peer.state.value,
        "spans": [{"model": span.model, "start": span.start, "end": span.end} for span in sorted(peer.facts.spans)],
        "loading": _loads(peer) if is_live else [],
        "load": msgspec.structs.asdict(peer.load) if is_live else {},  # not zeros: the dead are not idle
        "rtt_ms": None if peer.rtt_s is None else round(peer.rtt_s * 1000, 3),
        "rtt_estimate_ms": None if peer.rtt_estimate_s is None else round(peer.rtt_estimate_s * 1000, 3),
        "age_s": 0.0 if is_me else round(max(0.0, now - peer.load_at), 3),
    }
