"""The process of a node: takes everything that can fail at the start, runs the node, says how it ended."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import structlog
import trio

from mesh.errors import BadRequest, MeshError
from mesh.files import text_of
from mesh.ids import ModelId
from mesh.keys.keyring import Keyring, load_keyring
from mesh.keys.mesh_key import BadKeyFile
from node.checkpoints.capacity import layers_that_fit, memory_budget_bytes, needed_mib
from node.checkpoints.model_directory import require_checkpoint
from node.config import NodeConfig
from node.engine.api import Engine, EngineConfig
from node.host.environment import data_home
from node.host.identity import Identity, take_free_identity, take_identity
from node.host.logs import configure
from node.host.sockets import open_listener, open_peer_sockets
from node.http.auth import ApiKeys
from node.process import Node
from node.serving.models import InitialModels, ServedModel, ServedModels, split_references
from node.text.tokenizer import ModelText

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
KV_SHARE = 0.25  # of the node's memory; the rest is for weights

log = structlog.get_logger()


def run(config: NodeConfig, announce: Callable[[str], None]) -> NoReturn:
    """Runs a node until it is told to stop, and ends the process with exit code 0.

    Raises MeshError when it cannot start, or must end.
    Ctrl-C before the node takes its signals over is a KeyboardInterrupt, as of any program.
    """
    # Generation-2 scans over a model's objects cost a third of the CPU at 2,000 streams; see docs/decisions.
    gc.set_threshold(50_000, 50, 100)
    early: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: early.append(number))  # until trio takes it over
    try:
        trio.run(_run, config, announce, early)
    except BaseExceptionGroup as group:
        if group.split(KeyboardInterrupt)[1] is None:
            raise KeyboardInterrupt from None
        expected = group.subgroup(MeshError)
        if expected is None or group.split(MeshError)[1] is not None:
            raise
        raise _first(expected) from None
    _end_process()


def _end_process() -> NoReturn:
    """At once: a load or a step may still run in a thread, and with torch an orderly end takes seconds."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


async def _run(config: NodeConfig, announce: Callable[[str], None], early: list[int]) -> None:
    with trio.open_signal_receiver(*_STOP_SIGNALS) as signals:
        node = None if early else await _unless_told(signals, partial(_make, config))
        if node is not None:
            await node.run(announce, signals)


async def _unless_told(signals: AsyncIterator[int], make: Callable[[], Awaitable[Node]]) -> Node | None:
    """What `make` makes; None when a signal came first."""
    made: Node | None = None

    async def wait(scope: trio.CancelScope) -> None:
        await anext(signals)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, nursery.cancel_scope)
        made = await make()
        nursery.cancel_scope.cancel()
    return made


async def _make(config: NodeConfig) -> Node:
    """Takes everything that can fail at the start."""
    identity = _take_identity(config)
    configure(config.log_format, config.name or identity.id[:8])
    log.info("node.starting", id=identity.id, data_dir=str(identity.directory))
    keyring = _load_keyring(config)
    api_keys = _load_api_keys(config)
    sockets = await open_peer_sockets(config.bind, config.join)
    http_listener = await open_listener(config.http, "--http")
    budget_bytes = memory_budget_bytes(config.memory_bytes)
    engine, holdings = await trio.to_thread.run_sync(_prepare, config, identity.directory, budget_bytes, abandon_on_cancel=True)
    return Node(
        config,
        identity,
        sockets,
        http_listener,
        engine,
        holdings,
        keyring,
        api_keys,
    )


def _take_identity(config: NodeConfig) -> Identity:
    """A node with a name is the same node, with the same documents, whenever it is started by that name."""
    if config.data_dir is not None:
        return take_identity(config.data_dir, new=config.new_identity)
    if config.name:
        return take_identity(data_home() / f"name-{quote(config.name, safe='')}", new=config.new_identity)
    return take_free_identity(data_home(), new=config.new_identity)


def _prepare(config: NodeConfig, directory: Path, budget_bytes: int) -> tuple[Engine, InitialModels]:
    """Reads the models' configs and tokenizers, before any weights (*blocking*, seconds: torch is imported here)."""
    references, wanted = split_references(config.models, joins=bool(config.join))
    for _, directory_of_model in references:
        require_checkpoint(directory_of_model)  # before torch is imported, which takes seconds
    from node.engine.default_model import DIRECTORY, MODEL_ID
    from node.engine.worker import TorchEngine

    engine = TorchEngine(
        EngineConfig(
            device=config.device,
            dtype=config.dtype,
            quantize=config.quantize,
            graphs=config.graphs,
            tensor_parallel=config.tensor_parallel,
            threads=config.threads,
            kv_memory_bytes=int(KV_SHARE * budget_bytes),
            spill_memory_bytes=config.spill_memory_bytes,
            spill_disk_bytes=config.spill_disk_bytes,
            spill_folder=directory / "kv-spill",
        )
    )
    models, capacity = ServedModels(), {}
    if not references and not wanted:
        references = [(ModelId(MODEL_ID), DIRECTORY)]
    share_bytes = budget_bytes // (len(references) + len(wanted))
    for model, directory in references:
        card = engine.inspect(directory, model)
        if card.whole_only:
            log.info("model.whole_only", model=model, why=card.whole_only)
        models.add(ServedModel(card, directory, ModelText.load(directory)))
        fit = capacity[model] = layers_that_fit(directory, card.layers, share_bytes)
        if config.layers == "auto" and fit < card.layers:
            do = f"give --memory {needed_mib(directory, len(references) + len(wanted))}MiB or more to hold it whole"
            log.warning("model.does_not_fit", model=model, layers=card.layers, fit=fit, share_mib=share_bytes >> 20, do=do)
    return engine, InitialModels(models, capacity, tuple(wanted), share_bytes)


def _load_keyring(config: NodeConfig) -> Keyring | None:
    if config.key_file is None:
        log.warning("node.no_mesh_key", why="loopback only: without a mesh key anyone who reaches this node could join it")
        return None
    try:
        return load_keyring(config.key_file)
    except BadKeyFile as error:
        raise BadRequest(str(error), "key_file") from None


def _load_api_keys(config: NodeConfig) -> ApiKeys | None:
    if config.api_key_file is None:
        return None
    try:
        return ApiKeys.parse(text_of(config.api_key_file.read_bytes()).splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text file; `mesh key api` writes one"
        raise BadRequest(f"--api-key-file {config.api_key_file}: {reason}", "api_key_file") from None


def _first(group: BaseExceptionGroup[MeshError]) -> MeshError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, MeshError)
    return error
