"""A seeded run of writes, deletes, kills and partitions; then everything is healed and the history is checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from random import Random

import pytest
import trio
from trio.testing import MockClock

from mesh.errors import BadRequest, Refused
from tests.rag.small_mesh import SmallMesh, small_mesh

NODES = 4
STEPS = 32


@pytest.fixture
def jumping_clock() -> MockClock:
    return MockClock(autojump_threshold=0.01)


class History:
    """What was acknowledged: for each document whether it must be there, must not, or may be (a refused write may yet appear)."""

    def __init__(self) -> None:
        self.present: dict[str, bool | None] = {}
        self.words: dict[str, str] = {}
        self.acknowledged = 0


def word_of(seed: int, number: int) -> str:
    """A word that no other document holds; letters alone, so that the index keeps it whole."""
    digest = hashlib.blake2b(f"{seed}-{number}".encode(), digest_size=8).digest()
    return "q" + "".join(chr(ord("a") + byte % 26) for byte in digest)


async def write(mesh: SmallMesh, chance: Random, history: History, seed: int, number: int) -> None:
    documents = chance.choice(list(mesh))
    word = word_of(seed, number)
    try:
        file = await documents.put_file(f"{number}.md", f"The word {word} stands here.".encode())
    except Refused:
        return  # never attached, so no store can show it
    history.words[file.id] = word
    history.present[file.id] = None
    try:
        await documents.attach("pages", file.id)
        history.present[file.id] = True
        history.acknowledged += 1
    except Refused:
        pass


async def delete(mesh: SmallMesh, chance: Random, history: History) -> None:
    known = sorted(file_id for file_id, present in history.present.items() if present is not False)
    if not known:
        return
    file_id, documents = chance.choice(known), chance.choice(list(mesh))
    history.present[file_id] = None
    try:
        await documents.delete_file(file_id)
        history.present[file_id] = False
        history.acknowledged += 1
    except Refused:
        pass
    except BadRequest as unknown:
        # This side of a partition never heard of it, so nothing was deleted; whether it is there is as before.
        assert unknown.status == 404


async def disturb(mesh: SmallMesh, chance: Random) -> None:
    up = [number for number, site in enumerate(mesh.sites) if site.up]
    down = [number for number, site in enumerate(mesh.sites) if not site.up]
    match chance.choice(["kill", "start", "split", "heal", "rest"]):
        case "kill" if len(up) > 2:
            await mesh.kill(chance.choice(up))
        case "start" if down:
            await mesh.start(chance.choice(down))
        case "split":
            side = set(chance.sample(range(NODES), chance.choice([1, 2])))
            mesh.split(side, set(range(NODES)) - side)
        case "heal":
            mesh.heal()
        case _:
            await trio.sleep(chance.uniform(0, 3))


async def check(mesh: SmallMesh, history: History) -> None:
    for number, documents in enumerate(mesh):
        for file_id, present in history.present.items():
            result = await documents.search("pages", history.words[file_id], 3, embedding_weight=0.0)
            assert result.shards_ok == result.shards_total
            found = any(passage.file_id == file_id for passage in result.passages)
            if present is not None:
                assert found == present, f"node {number}: {file_id} found={found}, acknowledged={present}"
    answers = [await documents.search("pages", "the word that stands here", 100) for documents in mesh]
    assert all(answer == answers[0] for answer in answers)
    uploaded = {file.id for file in await next(iter(mesh)).files()}
    assert {file.id for file in await next(iter(mesh)).store_files("pages")} <= uploaded  # no passages of deleted files


@pytest.mark.parametrize("seed", range(3))
async def test_acknowledged_writes_and_deletes_hold_after_any_faults(tmp_path: Path, jumping_clock: MockClock, seed: int) -> None:
    chance, history = Random(seed), History()
    async with small_mesh(tmp_path, NODES) as mesh:
        await mesh[0].create_store("pages")
        for step in range(STEPS):
            await disturb(mesh, chance)
            await (delete(mesh, chance, history) if step % 4 == 3 else write(mesh, chance, history, seed, step))
            await trio.sleep(0.05)  # so that the order in time is the order of stamps
        mesh.heal()
        for number, site in enumerate(mesh.sites):
            if not site.up:
                await mesh.start(number)
        await trio.sleep(10)
        assert history.acknowledged > STEPS / 4, f"seed {seed}: the faults left nothing to check"
        await check(mesh, history)
