"""The process of a node: takes everything that can fail at the start, runs the node, says how it ended."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from mesh.errors import BadRequest, MeshError
from mesh.ids import ModelId
from mesh.keys import BadKeyFile, load_key
from node.capacity import layers_that_fit, memory_budget_bytes
from node.config import NodeConfig, cache_home, data_home
from node.engine.api import Engine, EngineConfig
from node.http.auth import ApiKeys
from node.identity import take_free_identity, take_identity
from node.logs import configure
from node.model_text import ModelText
from node.models import Models, ServedModel, parse_reference
from node.process import Node
from node.sockets import open_listener, open_peer_sockets

KV_SHARE = 0.25  # of the node's memory; the rest is for weights

log = structlog.get_logger()


def run(config: NodeConfig, announce: Callable[[str], None]) -> int:
    """Runs a node until it is told to stop: 0. Raises MeshError when it cannot start, or must end.

    Ctrl-C before the node takes its signals over is a KeyboardInterrupt, as of any program.
    """
    # Generation-2 scans over a model's objects cost a third of the CPU at 2,000 streams; see docs/decisions.
    gc.set_threshold(50_000, 50, 100)
    try:
        trio.run(_run, config, announce)
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is None:
            raise KeyboardInterrupt from None
        expected = group.subgroup(MeshError)
        if expected is None or group.split(MeshError)[1] is not None:
            raise
        raise _first(expected) from None
    return 0


async def _run(config: NodeConfig, announce: Callable[[str], None]) -> None:
    identity = take_identity(config.data_dir) if config.data_dir else take_free_identity(data_home())
    configure(config.log_format, config.name or identity.id[:8])
    mesh_key = _load_mesh_key(config)
    api_keys = _load_api_keys(config)
    sockets = await open_peer_sockets(config.bind, config.join)
    http_listener = await open_listener(config.http, "--http")
    budget_bytes = memory_budget_bytes(config.memory_bytes)
    prepared = await trio.to_thread.run_sync(_prepare, config, budget_bytes, abandon_on_cancel=True)
    await Node(
        config,
        identity,
        sockets,
        http_listener,
        prepared.engine,
        prepared.models,
        prepared.capacity,
        mesh_key,
        api_keys,
    ).run(announce)


@dataclass(frozen=True, slots=True)
class _Prepared:
    engine: Engine
    models: Models
    capacity: dict[ModelId, int]  # layers this node could hold


def _prepare(config: NodeConfig, budget_bytes: int) -> _Prepared:
    """Reads the models' configs and tokenizers, before any weights (*blocking*, seconds: torch is imported here)."""
    references = [parse_reference(reference) for reference in config.models]
    from node.engine.default_model import MODEL_ID, ensure_default_model
    from node.engine.worker import TorchEngine

    engine = TorchEngine(
        EngineConfig(
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
            kv_memory_bytes=int(KV_SHARE * budget_bytes),
        )
    )
    models, capacity = Models(), {}
    if not references:
        references = [(ModelId(MODEL_ID), ensure_default_model(cache_home() / "models"))]
    for model, directory in references:
        card = engine.inspect(directory, model)
        models.add(ServedModel(card, directory, ModelText.load(directory)))
        capacity[model] = layers_that_fit(directory, card.layers, budget_bytes // len(references))
    return _Prepared(engine, models, capacity)


def _load_mesh_key(config: NodeConfig) -> bytes | None:
    if config.key_file is None:
        log.warning("node.no_mesh_key", why="loopback only: without a mesh key anyone who reaches this node could join it")
        return None
    try:
        return load_key(config.key_file)
    except BadKeyFile as error:
        raise BadRequest(str(error), "key_file") from None


def _load_api_keys(config: NodeConfig) -> ApiKeys | None:
    if config.api_key_file is None:
        return None
    try:
        return ApiKeys.parse(config.api_key_file.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text file; `mesh key api` writes one"
        raise BadRequest(f"--api-key-file {config.api_key_file}: {reason}", "api_key_file") from None


def _first(group: BaseExceptionGroup[MeshError]) -> MeshError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, MeshError)
    return error
