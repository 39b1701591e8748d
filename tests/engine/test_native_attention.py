"""The compiled attention: what the plain model computes at any length, the same bits however cut and on whatever CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from node.engine.model.attention import Segment
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.compiled_layers import NativeLayers
from node.engine.model.linear import KERNELS
from node.engine.model.local_stage import LocalStage
from node.engine.native.library import Isa, NativeLibrary, native
from tests.engine.checkpoints import make_checkpoint
from tests.engine.offered import needs_compiled

pytestmark = needs_compiled
TOKENS = 560  # beyond the first block, so that keys and values move to a buffer on the way
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "one head for four": ("llama", {"head_dim": 64, "num_key_value_heads": 1}),
    "a head of more than a panel, no whole number of them": ("llama", {"head_dim": 40}),
    "a window": ("mistral", {}),
    "as many keys as queries": ("qwen3", {"num_key_value_heads": 4}),
}


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    found = native()
    assert found is not None
    yield found
    found.use(found.isa)


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, changes = SHAPES[request.param]
    return make_checkpoint(tmp_path_factory.mktemp("attention"), name, num_hidden_layers=2, **changes)


def tokens() -> list[int]:
    return torch.randint(0, 500, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def logits(stage: LocalStage, counts: list[int]) -> torch.Tensor:
    """Of one sequence in pieces of `counts` and the rest one by one, among another that is as long as the piece."""
    ids, kv, out, done = tokens(), stage.sequence(), [], 0
    while done < TOKENS:
        count = counts.pop(0) if counts else 1
        other = Segment(0, count, 0, stage.sequence())
        mine = Segment(count, count, done, kv)
        positions = [*range(count), *range(done, done + count)]
        at = range(count, 2 * count)
        some = ids[done : done + count]
        out.append(stage.forward(0, 2, [other, mine], positions, ids=[*some[::-1], *some], logits_at=at).clone())
        done += count
    return torch.cat(out)


def test_every_position_gets_what_the_plain_model_gives_it(checkpoint: Path) -> None:
    stage = LocalStage(read_checkpoint(checkpoint), 0, 2, KERNELS["mesh-fp32"], threads=1)
    plain = stage.reference(tokens(), None)
    stage.pack()
    assert isinstance(stage.fused, NativeLayers)
    mine = logits(stage, [300, 70, 185])
    distance = (mine - plain).norm(dim=1) / plain.norm(dim=1)
    assert distance.max() < 1e-4


@pytest.mark.parametrize("kernel", ["mesh-bf16", "mesh-fp32"])
def test_a_position_has_the_same_bits_however_the_sequence_was_cut_on_every_instruction_set_and_with_two_threads(
    kernel: str, checkpoint: Path, library: NativeLibrary
) -> None:
    stage = LocalStage(read_checkpoint(checkpoint), 0, 2, KERNELS[kernel], threads=1)
    stage.pack()
    whole = logits(stage, [TOKENS])
    assert not whole.isnan().any()
    for isa in Isa:
        if Isa.NONE < isa <= library.isa:
            assert library.use(isa) == isa
            assert torch.equal(logits(stage, [511, 33, 10]), whole)
    torch.set_num_threads(2)
    try:
        assert torch.equal(logits(stage, [64, 129, 360]), whole)
    finally:
        torch.set_num_threads(1)


def test_rows_outside_every_sequence_are_answered_by_nothing(checkpoint: Path) -> None:
    """What their attention gave is zero, so such a row is the same whatever stands in the others."""
    stage = LocalStage(read_checkpoint(checkpoint), 0, 2, KERNELS["mesh-fp32"], threads=1)
    stage.pack()
    alone = stage.forward(0, 2, [Segment(0, 1, 0, stage.sequence())], [0, 0], ids=[5, 9], logits_at=[0, 1])
    other = stage.forward(0, 2, [Segment(0, 1, 0, stage.sequence())], [0, 0], ids=[77, 9], logits_at=[0, 1])
    assert torch.equal(alone[1], other[1]) and not torch.equal(alone[0], other[0])
