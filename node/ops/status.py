"""The body of `GET /mesh/status`: a pure function of the view and what the document service says of its stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from mesh.ids import ModelId, format_address
from mesh.versions import ModelVersion, card_of, holds, replicas, versions
from mesh.view import ModelCard, Peer, View, is_exact
from node.host.uncompiled import COSTS, remedy
from rag.types import StoreInfo
from routing.coverage import Coverage, coverage
from routing.loading import UNKNOWN, BeingLoaded


def status(
    view: View,
    stores: Sequence[StoreInfo],
    complete: Mapping[ModelId, bool],
    now: float,
    engine: object,
    loading: Mapping[ModelId, BeingLoaded] = MappingProxyType({}),
    hashing: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """`complete`: per version, whether a path through all its layers exists right now; `engine`: the engine's statistics;
    `loading`: of versions without a path, what of them is being loaded.

    Of those, the kernels of the spans loaded here, why they were chosen, and how far those are that load; another engine
    may tell of none of these. `hashing`: of each model of this node whose files are being hashed, how far that has come.
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
            "hashing": {model: {"bytes_done": each.bytes_done, "bytes": each.bytes} for model, each in sorted(hashing.items())},
            "uncompiled": _uncompiled(me.facts.uncompiled),
            "frozen": view.frozen,
        },
        "nodes": [_node(peer, view, now) for peer in sorted(view.peers.values(), key=lambda peer: (peer.name, peer.id))],
        "models": [_model(version, view, complete, loading, covered) for version in versions(view)],
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


def _model(
    version: ModelVersion,
    view: View,
    complete: Mapping[ModelId, bool],
    loading: Mapping[ModelId, BeingLoaded],
    covered: Mapping[ModelId, Coverage],
) -> dict[str, Any]:
    """One set of weights: rows of one `id` and other `weights` share nothing but the id."""
    card, name = version.card, ModelId(version.name)
    return {
        "id": card.id,
        "weights": card.weights,
        "name": name,
        "answers": version.answers,
        "layers": card.layers,
        "max_model_len": card.max_model_len,
        "complete": complete.get(name, False),
        "loading": _being_loaded(loading.get(name)),
        "min_replicas": min(replicas(view, card), default=0),
        "nodes": len(version.holders),
        "numerics": numerics(view, card),
        "coverage": [{"start": run.start, "end": run.end, "live": run.live, "ready": run.ready} for run in covered[name].runs],
    }


def numerics(view: View, card: ModelCard) -> str:
    """What answers of a version promise by the nodes that serve it now: exact, approximate, mixed; unknown where none does.

    Mixed: there are several kinds of node, each exact by itself. An answer is exact while one kind computes all of it.
    """
    servers = [peer for peer in view.live() if holds(peer, card) and any(span.model == card.id for span in peer.facts.spans)]
    told = {own.numerics for peer in servers if (own := card_of(peer, card.id)) is not None}
    if not told:
        return "unknown"
    if not all(map(is_exact, told)):
        return "approximate"
    return "exact" if len(told) == 1 else "mixed"


def _choice(choice: Any) -> dict[str, Any]:
    """Of a span's kernel (`node.engine.kernels.kernel_choice`): why, and what was measured, by kernel, if anything."""
    return {
        "portable": choice.kernels[0].compiled,
        "reason": choice.reason,
        "cpu_us": dict(choice.times_us),
        "remembered": choice.remembered,
    }


def _uncompiled(why: str) -> dict[str, str] | None:
    """That layers are computed here without the compiled kernel."""
    return {"why": why, "costs": COSTS, "do": remedy(why)} if why else None


def _progress(progress: Any) -> dict[str, Any]:
    """Of a span that loads (`node.engine.model.progress`)."""
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
