"""Elementary functions that no machine computes otherwise: how good they are, and their bits for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from node.engine.native import portable

POINTS = np.random.Generator(np.random.Philox(4)).uniform(-1, 1, 20_000)


def relative(found: np.ndarray, meant: np.ndarray) -> float:
    return float(np.max(np.abs(found - meant) / np.abs(meant)))


def test_they_are_the_functions_they_are_named_after() -> None:
    assert relative(portable.exp(POINTS * 700), np.exp(POINTS * 700)) < 4e-15
    assert (
        relative(portable.exp32((POINTS * 80).astype(np.float32)), np.exp((POINTS * 80).astype(np.float32).astype(float))) < 3e-7
    )
    above_zero = np.exp(POINTS * 600)
    assert np.max(np.abs(portable.log(above_zero) - np.log(above_zero))) < 2e-13
    near_one = 1 + POINTS * 1e-6
    assert relative(portable.log(near_one), np.log(near_one)) < 1e-15
    sine, cosine = portable.sin_cos(POINTS * 1.5e6)
    assert np.max(np.abs(sine - np.sin(POINTS * 1.5e6))) < 1e-15
    assert np.max(np.abs(cosine - np.cos(POINTS * 1.5e6))) < 1e-15
    assert relative(portable.power(np.full(20_000, 5e5), POINTS), 5e5**POINTS) < 1e-13


def test_edges() -> None:
    assert portable.exp(np.array([0.0])).tolist() == [1.0]
    assert portable.exp32(np.array([0.0, -np.inf], dtype=np.float32)).tolist() == [1.0, pytest.approx(1.6e-38, rel=0.1)]
    assert portable.log(np.array([1.0])).tolist() == [0.0]
    assert [part.tolist() for part in portable.sin_cos(np.array([0.0]))] == [[0.0], [1.0]]
    for bad in (2e6, np.nan, -np.inf):
        with pytest.raises(ValueError, match="angles of at most"):
            portable.sin_cos(np.array([bad]))


def test_their_bits_are_pinned_for_ever() -> None:
    """Two machines, and two versions of the program, must agree on each."""
    found = (
        portable.exp(POINTS * 700),
        portable.exp32((POINTS * 80).astype(np.float32)),
        portable.log(np.abs(POINTS)),
        *portable.sin_cos(POINTS * 1e5),
        portable.power(np.full(20_000, 1e4), POINTS),
    )
    digest = hashlib.blake2b(b"".join(each.tobytes() for each in found), digest_size=8).hexdigest()
    assert digest == "70030b517fa825db"


def test_torch_uses_them_within_the_mode() -> None:
    exponents, angles = torch.arange(0, 96, 2, dtype=torch.float32) / 96, torch.arange(1000.0)
    outside = 1e4**exponents
    with portable.PortableMath():
        inside = 1e4**exponents
        turned = angles.cos(), angles.sin(), (angles / 100).exp(), (angles + 1).log(), (angles + 1) ** exponents[5], angles * 2
    assert torch.equal(inside, torch.from_numpy(portable.power(np.full(48, 1e4), exponents.double().numpy())).float())
    torch.testing.assert_close(inside, outside, rtol=2e-7, atol=0)
    for found, meant in zip(turned, (angles.cos(), angles.sin(), (angles / 100).exp(), (angles + 1).log())):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, meant, rtol=3e-7, atol=1e-7)
    torch.testing.assert_close(turned[4], (angles + 1) ** exponents[5], rtol=2e-7, atol=0)
    assert torch.equal(turned[5], angles * 2)
