"""What a node reports to operators: the bodies of `GET /mesh/status`, `/mesh/doctor`, `/mesh/requests/{id}`, key rotation.

Field names are part of the HTTP interface. Times are in the unit that the name ends with.
"""

from __future__ import annotations

import msgspec

from mesh.ids import ModelId, NodeId, StreamId


class LayersReport(msgspec.Struct, frozen=True):
    """Decoder layers `[start, end)`."""

    start: int
    end: int


class SpanReport(msgspec.Struct, frozen=True):
    """Layers `[start, end)` of a model that a node serves."""

    model: ModelId
    start: int
    end: int


class LoadingReport(msgspec.Struct, frozen=True):
    """Layers that a peer is loading, `progress` from 0 to 1."""

    model: ModelId
    start: int
    end: int
    progress: float
    eta_s: float


class KernelReport(msgspec.Struct, frozen=True):
    """Why a span's kernel was chosen, and the CPU time that was measured by kernel, if any."""

    portable: bool
    reason: str
    cpu_us: dict[str, float]
    remembered: bool


class LoadPhaseReport(msgspec.Struct, frozen=True):
    """How far this node's engine is with a span."""

    phase: str
    layers_done: int
    layers: int
    bytes_done: int
    bytes: int
    seconds: float


class HashingReport(msgspec.Struct, frozen=True):
    bytes_done: int
    bytes: int


class UncompiledReport(msgspec.Struct, frozen=True):
    """Why this node computes without the compiled kernel, what that costs, and what to do."""

    why: str
    costs: str
    do: str


class SelfReport(msgspec.Struct, frozen=True):
    """The node that answers; spans by the text `MODEL START:END`."""

    id: NodeId
    name: str
    pid: int
    http: str
    gossip: str
    version: str
    kernels: dict[str, str]
    kernel_choices: dict[str, KernelReport]
    loading: dict[str, LoadPhaseReport]
    hashing: dict[str, HashingReport]
    uncompiled: UncompiledReport | None
    frozen: bool


class NodeReport(msgspec.Struct, frozen=True):
    """A member. `load` is empty for one that is gone."""

    id: NodeId
    name: str
    state: str
    http: str
    gossip: str
    region: str
    cause: str
    twin: str
    draining: bool
    readiness: str
    spans: list[SpanReport]
    loading: list[LoadingReport]
    load: dict[str, float]
    rtt_ms: float | None
    rtt_estimate_ms: float | None
    age_s: float


class MissingLayersReport(msgspec.Struct, frozen=True):
    """Missing layers of a model that nodes are loading now."""

    layers: list[LayersReport]
    progress: float
    eta_s: float


class CoverageReport(msgspec.Struct, frozen=True):
    """Layers `[start, end)` that equally many nodes hold, `ready` of them ready."""

    start: int
    end: int
    live: int
    ready: int


class ModelReport(msgspec.Struct, frozen=True):
    """One version of a model: rows of one `id` with different `weights` share nothing but the id."""

    id: ModelId
    weights: str
    name: ModelId
    answers: bool
    layers: int
    max_model_len: int
    complete: bool
    loading: MissingLayersReport | None
    min_replicas: int
    nodes: int
    numerics: str
    coverage: list[CoverageReport]


class StoreReport(msgspec.Struct, frozen=True):
    name: str
    documents: int
    shards: int
    replicas: int
    in_sync: bool


class StatusReport(msgspec.Struct, frozen=True, rename={"this": "self"}):
    """The mesh as one node sees it."""

    this: SelfReport
    nodes: list[NodeReport]
    models: list[ModelReport]
    stores: list[StoreReport]


class Finding(msgspec.Struct, frozen=True):
    """`about`: keys, versions, clocks, nodes, models, documents, disk, links."""

    severity: str
    about: str
    what: str
    do: str


class DoctorReport(msgspec.Struct, frozen=True):
    """`healthy`: no finding is a problem. Problems come first."""

    node: NodeId
    name: str
    healthy: bool
    findings: list[Finding]


class RotationReport(msgspec.Struct, frozen=True):
    """`not_saved`: nodes that use the new key but could not write their key file."""

    key: str
    finished_earlier: bool
    nodes: list[NodeId]
    not_saved: list[NodeId]


class StageReport(msgspec.Struct, frozen=True):
    """One stage of a path: `node` computes layers `[start, end)`."""

    node: NodeId
    start: int
    end: int


class CandidateReport(msgspec.Struct, frozen=True):
    """A peer that was considered for a stage, with the terms of its score in ms."""

    stage: int
    rank: int
    node: NodeId
    terms_ms: dict[str, float]


class PlanReport(msgspec.Struct, frozen=True):
    """One plan of one choice of a request: the path, its cost, and what it was compared with."""

    choice: int
    attempt: int
    weights: str
    path: list[StageReport]
    cost_ms: float
    candidates: list[CandidateReport]


class RequestReport(msgspec.Struct, frozen=True):
    """What became of a request; `why` has one entry for each plan."""

    id: StreamId
    entry: NodeId
    state: str
    seq: int
    attempts: int
    path: list[StageReport]
    journal: list[object]
    why: list[PlanReport]
