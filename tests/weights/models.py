"""Small made-up models on disk for the tests of weights: directories of bytes that no loader need understand."""

from __future__ import annotations

import json
import random
from pathlib import Path

from mesh.ids import ModelId
from mesh.manifest import TensorEntry
from mesh.view import ModelCard
from node.checkpoints.safetensors_header import make_header
from node.weights.catalogue import Catalogue, identify
from node.weights.hashing import HashingProgress

LAYERS, VOCABULARY = 3, 40
CARD = ModelCard(ModelId("tiny"), LAYERS, 64, "", "")


def tensors(width: int = 16) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype, shape)"""
    named: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("F32", (VOCABULARY, width)),
        "lm_head.weight": ("BF16", (VOCABULARY, width)),
    }
    for number in range(LAYERS):
        named[f"model.layers.{number}.mlp.weight"] = ("F32", (width, 3, width))
        named[f"model.layers.{number}.norm.weight"] = ("BF16", (width + 1,))
    return {**named, "model.norm.weight": ("F32", (width,))}


def contents(named: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, bytes]:
    """The same bytes for the same names and shapes."""
    return {
        name: random.Random(name).randbytes(TensorEntry(name, dtype, shape, b"").size_bytes)
        for name, (dtype, shape) in named.items()
    }


def write_file(path: Path, named: dict[str, tuple[str, tuple[int, ...]]], added: dict[str, int] | None = None) -> None:
    """A safetensors file. `added`: to the first byte of a tensor, by its name."""
    head, _ = make_header([TensorEntry(name, dtype, shape, b"") for name, (dtype, shape) in named.items()])
    written = contents(named)
    for name, more in (added or {}).items():
        written[name] = bytes([(written[name][0] + more) % 256]) + written[name][1:]
    path.write_bytes(head + b"".join(written.values()))


def write_model(directory: Path, *, files: int = 1, width: int = 16, **config: object) -> Path:
    """A model cut into `files` files."""
    directory.mkdir(parents=True)
    told = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, **config}
    (directory / "config.json").write_text(json.dumps(told))
    (directory / "tokenizer.json").write_text('{"tokens": []}')
    (directory / "modeling_evil.py").write_text("raise SystemExit('executed')")
    named = list(tensors(width).items())
    for number in range(files):
        write_file(directory / f"model-{number}.safetensors", dict(named[number::files]))
    return directory


def whole_catalogue(directory: Path, kept_in: Path) -> Catalogue:
    return identify(directory, kept_in, HashingProgress()).catalogue


def content_of(catalogue: Catalogue, name: str, number: int) -> bytes:
    """The bytes of a piece that the catalogue must have."""
    content = catalogue.read(name, number)
    assert content is not None
    return content
