"""Takes deleted files out of stores that did not hear of it in time.

A file may be attached on one side of a partition while the other side deletes it. Each write is newest where it
happened, so merging alone would leave passages of a file that is gone. Every node looks through what it holds for
documents whose file has a tombstone, and buries those after asking the file's owners: a file that was uploaded
anew meanwhile stays.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
import trio

from mesh.wire.calls import CALL_FAILURES
from rag.local import LocalStores
from rag.peers import Peers
from rag.registry import FILES, StoreEntry
from rag.replica import SHARDS

log = structlog.get_logger()

SWEEP_EVERY_S = 2.0
BATCH = 100  # documents looked into in one round


def orphans(local: LocalStores) -> list[tuple[StoreEntry, str]]:
    """Documents held here whose file is deleted, as far as is known here."""
    files = local.replica(FILES.id)
    if files is None:
        return []
    found = []
    for entry in local.registry.live():
        replica = local.replica(entry.id)
        for head in replica.documents(range(SHARDS)) if replica is not None else ():
            file = files.get(head.doc_id)
            if file is not None and file.deleted:
                found.append((entry, head.doc_id))
    return found


async def sweep(local: LocalStores, peers: Peers, write_tombstone: Callable[[StoreEntry, str], Awaitable[None]]) -> None:
    """Runs until cancelled; looks again whenever anything has changed here, and while anything is left."""
    seen = -1
    while True:
        await trio.sleep(SWEEP_EVERY_S)
        if local.changes == seen:
            continue
        changes = local.changes
        left = orphans(local)
        for entry, doc_id in left[:BATCH]:
            heads = await peers.heads([(FILES.id, doc_id)])
            head = heads.get(FILES.id, doc_id)
            if head is None or not head.deleted or not heads.certain:
                continue
            try:
                await write_tombstone(entry, doc_id)
            except CALL_FAILURES as error:
                log.info("documents_sweep_failed", store=entry.id, reason=str(error))
        seen = -1 if left else changes
