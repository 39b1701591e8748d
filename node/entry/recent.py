"""Records of running and recent requests, for `GET /mesh/requests/{id}` and `mesh why`. Bounded, in memory, without prompts."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from mesh.ids import NodeId, StreamId
from node.entry.generation import Generation, GenerationPhase
from node.reports import PlanReport, RequestReport, StageReport
from routing.path import PathStages

REMEMBERED = 4096

_STATE = {
    GenerationPhase.NEW: "queued",
    GenerationPhase.QUEUED: "queued",
    GenerationPhase.WAITING: "queued",
    GenerationPhase.OPENING: "queued",
    GenerationPhase.RUNNING: "running",
    GenerationPhase.DONE: "done",
    GenerationPhase.FAILED: "failed",
    GenerationPhase.CANCELLED: "cancelled",
}


@dataclass(slots=True)
class RequestRecord:
    """One request at its entry, updated while it runs and kept for a while after."""

    stream: StreamId
    request_id: str
    entry: NodeId
    seq: int = 0
    generations: dict[int, Generation] = field(default_factory=dict)
    last_paths: dict[int, PathStages] = field(default_factory=dict)  # by choice
    why: list[PlanReport] = field(default_factory=list)
    _final_state: str | None = None
    _final_attempts: int = 1

    def state(self) -> str:
        if self._final_state is not None:
            return self._final_state
        states = [_STATE[generation.phase] for generation in self.generations.values()]
        for state in ("running", "queued", "failed", "cancelled", "done"):
            if state in states:
                return state
        return "queued"

    @property
    def attempts(self) -> int:
        """1 and one more for each path that was lost; of several choices, the most."""
        lost = (len(generation.history) for generation in self.generations.values())
        return max(self._final_attempts, 1 + max(lost, default=0))

    def close(self) -> None:
        """Marks the request as ended: keeps its final state and count of attempts, and drops the answer's tokens."""
        self._final_state, self._final_attempts = self.state(), self.attempts
        self.generations = {}

    def report(self) -> RequestReport:
        return RequestReport(
            id=self.stream,
            entry=self.entry,
            state=self.state(),
            seq=self.seq,
            attempts=self.attempts,
            path=[StageReport(stage.node, stage.start, stage.end) for stage in self.last_paths.get(0, ())],
            journal=[],
            why=self.why,
        )


class RecentRequests:
    """The newest `REMEMBERED` records, found by stream id, else by x-request-id (the newest request with that id)."""

    def __init__(self) -> None:
        self._by_stream: OrderedDict[StreamId, RequestRecord] = OrderedDict()
        self._by_request_id: dict[str, StreamId] = {}

    def add(self, record: RequestRecord) -> None:
        self._by_stream[record.stream] = record
        if record.request_id:
            self._by_request_id[record.request_id] = record.stream
        while len(self._by_stream) > REMEMBERED:
            _, oldest = self._by_stream.popitem(last=False)
            if self._by_request_id.get(oldest.request_id) == oldest.stream:
                del self._by_request_id[oldest.request_id]

    def find(self, name: str) -> RequestRecord | None:
        # The stream id goes first: no client chooses one, while any client may send the x-request-id of another request.
        record = self._by_stream.get(StreamId(name))
        return record or self._by_stream.get(self._by_request_id.get(name, StreamId("")))
