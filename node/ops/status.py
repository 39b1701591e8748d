"""The body of `GET /mesh/status`: a pure function of the view and the document service's report of its stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from mesh.ids import ModelId, format_address
from mesh.versions import ModelVersion, card_of, holds, replicas, versions
from mesh.view import ModelCard, Peer, Span, View, is_exact
from node.host.uncompiled import COSTS, remedy
from node.reports import (
    CoverageReport,
    HashingReport,
    KernelReport,
    LayersReport,
    LoadingReport,
    LoadPhaseReport,
    MissingLayersReport,
    ModelReport,
    NodeReport,
    SelfReport,
    SpanReport,
    StatusReport,
    StoreReport,
    UncompiledReport,
)
from rag.types import StoreInfo
from routing.coverage import Coverage, coverage
from routing.loading import UNKNOWN, BeingLoaded

if TYPE_CHECKING:
    from node.engine.kernels.kernel_choice import KernelChoice
    from node.engine.model.progress import LoadProgress
    from node.serving.library import HashingState


def status(
    view: View,
    stores: Sequence[StoreInfo],
    complete: Mapping[ModelId, bool],
    now: float,
    engine: object,
    loading: Mapping[ModelId, BeingLoaded] = MappingProxyType({}),
    hashing: Mapping[ModelId, HashingState] = MappingProxyType({}),
) -> StatusReport:
    """The report of this node.

    `complete`: per version, whether a path through all its layers exists right now; `loading`: of versions without a path, the
    missing layers that nodes are loading. `engine`: the engine's statistics; of another engine than ours some may be missing.
    `hashing`: by model, how far the hashing of its files has come.
    """
    kernels: Mapping[Span, str] = getattr(engine, "kernels", {})
    choices: Mapping[Span, KernelChoice] = getattr(engine, "choices", {})
    spans_loading: Mapping[Span, LoadProgress] = getattr(engine, "loading", {})
    me, covered = view.peers[view.me], coverage(view)
    return StatusReport(
        this=SelfReport(
            id=me.id,
            name=me.name,
            pid=me.facts.pid,
            http=me.facts.http,
            gossip=format_address(me.address),
            version=me.facts.version,
            kernels={_text(span): name for span, name in sorted(kernels.items())},
            kernel_choices={_text(span): _choice(each) for span, each in sorted(choices.items())},
            loading={_text(span): _progress(each) for span, each in sorted(spans_loading.items())},
            hashing={model: HashingReport(each.bytes_done, each.bytes) for model, each in sorted(hashing.items())},
            uncompiled=_uncompiled(me.facts.uncompiled),
            frozen=view.frozen,
        ),
        nodes=[_node(peer, view, now) for peer in sorted(view.peers.values(), key=lambda peer: (peer.name, peer.id))],
        models=[_model(version, view, complete, loading, covered) for version in versions(view)],
        stores=[
            StoreReport(
                name=store.name,
                documents=store.documents,
                shards=store.shards,
                replicas=store.replicas,
                in_sync=store.in_sync,
            )
            for store in stores
        ],
    )


def _text(span: Span) -> str:
    return f"{span.model} {span.start}:{span.end}"


def _model(
    version: ModelVersion,
    view: View,
    complete: Mapping[ModelId, bool],
    loading: Mapping[ModelId, BeingLoaded],
    covered: Mapping[ModelId, Coverage],
) -> ModelReport:
    card, name = version.card, ModelId(version.name)
    return ModelReport(
        id=card.id,
        weights=card.weights,
        name=name,
        answers=version.answers,
        layers=card.layers,
        max_model_len=card.max_model_len,
        complete=complete.get(name, False),
        loading=_being_loaded(loading.get(name)),
        min_replicas=min(replicas(view, card), default=0),
        nodes=len(version.holders),
        numerics=numerics(view, card),
        coverage=[CoverageReport(run.start, run.end, run.live, run.ready) for run in covered[name].runs],
    )


def numerics(view: View, card: ModelCard) -> str:
    """What answers of a version promise by the nodes that serve it now: exact, approximate, mixed; unknown where none does.

    Mixed: there are several kinds of node, each exact by itself. An answer is exact while one kind computes all of it.
    """
    servers = [peer for peer in view.live() if holds(peer, card) and any(span.model == card.id for span in peer.facts.spans)]
    fingerprints = {own.numerics for peer in servers if (own := card_of(peer, card.id)) is not None}
    if not fingerprints:
        return "unknown"
    if not all(map(is_exact, fingerprints)):
        return "approximate"
    return "exact" if len(fingerprints) == 1 else "mixed"


def _choice(choice: KernelChoice) -> KernelReport:
    return KernelReport(
        portable=choice.kernels[0].compiled,
        reason=choice.reason,
        cpu_us=dict(choice.times_us),
        remembered=choice.remembered,
    )


def _uncompiled(why: str) -> UncompiledReport | None:
    return UncompiledReport(why, COSTS, remedy(why)) if why else None


def _progress(progress: LoadProgress) -> LoadPhaseReport:
    return LoadPhaseReport(
        phase=progress.phase.value,
        layers_done=progress.layers_done,
        layers=progress.layers,
        bytes_done=progress.bytes_done,
        bytes=progress.bytes,
        seconds=round(progress.seconds, 1),
    )


def _being_loaded(loads: BeingLoaded | None) -> MissingLayersReport | None:
    if loads is None:
        return None
    return MissingLayersReport([LayersReport(start, end) for start, end in loads.layers], loads.progress, loads.eta_s)


def _loads(peer: Peer) -> list[LoadingReport]:
    """What the node announces that it is loading."""
    return [
        LoadingReport(span.model, span.start, span.end, progress.percent / 100, progress.eta_s)
        for span in sorted(peer.facts.intends)
        for progress in [peer.facts.loading.get(span.model, UNKNOWN)]
    ]


def _node(peer: Peer, view: View, now: float) -> NodeReport:
    is_me, is_live = peer.id == view.me, view.is_live(peer.id)
    return NodeReport(
        id=peer.id,
        name=peer.name,
        state=peer.state.value,
        http=peer.facts.http,
        gossip=format_address(peer.address),
        region=peer.region,
        cause=peer.cause,
        twin=peer.facts.twin if is_live else "",
        draining=is_live and peer.facts.draining,
        readiness=peer.facts.readiness.value if is_live else peer.state.value,
        spans=[SpanReport(span.model, span.start, span.end) for span in sorted(peer.facts.spans)],
        loading=_loads(peer) if is_live else [],
        load=msgspec.structs.asdict(peer.load) if is_live else {},  # not zeros: the dead are not idle
        rtt_ms=None if peer.rtt_s is None else round(peer.rtt_s * 1000, 3),
        rtt_estimate_ms=None if peer.rtt_estimate_s is None else round(peer.rtt_estimate_s * 1000, 3),
        age_s=0.0 if is_me else round(max(0.0, now - peer.load_at), 3),
    )
