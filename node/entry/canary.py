"""Decides whether this node is ready: a canary request has brought a token through a complete path.

A canary runs when the served spans have changed since the last one, never on a timer, so that an idle mesh computes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import trio

from mesh.errors import MeshError
from mesh.ids import ModelId, StreamId
from mesh.versions import versions
from mesh.view import View
from node.entry.entry import Entry
from node.requests import GenerateRequest, SamplingParams
from node.serving.peer_models import PeerModels
from routing.loading import BeingLoaded, being_loaded, no_path
from routing.path import uncovered

CANARY_TIMEOUT_S = 10.0
RETRY_S = 1.0  # after a canary that failed


class Canary:
    """Runs canary requests through this node's own entry, and reports which models lack a complete path."""

    def __init__(
        self, view: Callable[[], View], models: PeerModels, entry: Entry, hashing: Callable[[], list[str]] = list
    ) -> None:
        """`hashing`: a sentence for each model whose files are being hashed (`ModelLibrary.hashing`)."""
        self._view = view
        self._hashing = hashing
        self._models = models
        self._entry = entry
        self._proved: object = None  # `_served` when the last canary succeeded
        self._failure = ""
        self._failed_at = 0.0
        self._lock = trio.Lock()

    def missing_layers(self) -> dict[ModelId, tuple[tuple[int, int], ...]]:
        """Versions of models without a complete path, by the name that requests use, with their uncovered layers."""
        view = self._view()
        known = {version.name: version.card for version in versions(view)}
        gaps = {ModelId(name): uncovered(view, card.id, card.layers, card.weights) for name, card in known.items()}
        return {model: missing for model, missing in gaps.items() if missing}

    def being_loaded(self) -> dict[ModelId, BeingLoaded]:
        """The models without a complete path whose missing layers some node is loading now."""
        view, missing = self._view(), self.missing_layers()
        incomplete = {name: version.card for version in versions(view) if (name := ModelId(version.name)) in missing}
        loads = {name: being_loaded(view, card.id, missing[name], card.weights) for name, card in incomplete.items()}
        return {name: each for name, each in loads.items() if each is not None}

    async def why_not(self) -> str | None:
        """Returns None when ready, else the reason. Runs a canary unless one has succeeded with what is served now."""
        missing = self.missing_layers()
        complete = self._models.complete()
        if not complete:
            view, known = self._view(), [version for version in versions(self._view()) if version.name in missing]
            gaps = [str(no_path(view, each.card.id, missing[ModelId(each.name)], each.card.weights)) for each in known]
            return "; ".join([*self._hashing(), *gaps]) or "no model is known here yet"
        async with self._lock:  # concurrent callers share one canary
            served = self._served()
            if self._proved == served:
                return None
            if self._failure and trio.current_time() - self._failed_at < RETRY_S:
                return self._failure
            for model in complete:  # one model that answers is enough
                failure = await self._canary(model)
                if failure is None:
                    break
            if failure is None:
                self._proved = served
            self._failure, self._failed_at = failure or "", trio.current_time()
            return failure

    def _served(self) -> object:
        """What the mesh serves now, to compare with `==`: it changes with every span, version and restart."""
        return frozenset(
            (peer.id, peer.epoch, peer.facts.spans, tuple(card.weights for card in peer.facts.models))
            for peer in self._view().live()
        )

    async def _canary(self, model: ModelId) -> str | None:
        """Requests one token of the model; returns None, or why none came."""
        request = GenerateRequest(
            id=StreamId(f"canary-{secrets.token_hex(8)}"),
            model=model,
            prompt_ids=(0,),
            sampling=SamplingParams(temperature=0.0, ignore_eos=True),
            max_tokens=1,
            deadline_s=CANARY_TIMEOUT_S,
        )
        try:
            async with self._entry.generate(request) as events:
                async for _ in events:
                    pass
        except MeshError as error:
            return f"no token came through a path of {model}: {error}"
        return None
