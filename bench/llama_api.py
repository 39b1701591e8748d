"""llama.cpp's C API over ctypes, from whichever package holds it: xllamacpp's prebuilt library, or llama-cpp-python's.

The two structures of parameters change from one version of llama.cpp to the next. They are taken as bytes from the
library's own defaults, and only the leading numbers of the context's are set; what came of them is asked back from the
context, so that a version with another layout is refused instead of measured wrongly.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

PACKAGES = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "lib/libllama.so"}  # module: where its library lies
DISTRIBUTIONS = {"xllamacpp": "xllamacpp", "llama_cpp": "llama-cpp-python"}
PARAMETER_BYTES = 512  # more than either structure has; the callee reads its own size
NUMBERS = 16  # of the context's parameters that are looked at for the thread counts
DEFAULT_CONTEXT = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max lead the structure
DEFAULT_THREADS = (4, 4)  # n_threads, n_threads_batch


class Parameters(ctypes.Structure):
    """Either structure of parameters, as bytes."""

    _fields_ = (("numbers", c_uint32 * (PARAMETER_BYTES // 4)),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class LlamaLibrary:
    """The functions that a benchmark of decoding needs."""

    batch_init: Callable[..., Any]
    free: Callable[..., None]
    decode: Callable[..., int]
    get_logits_ith: Callable[..., Any]

    def __init__(self) -> None:
        """Raises RuntimeError: no package has the library."""
        self.module, path = _found()
        self.version = f"{DISTRIBUTIONS[self.module]} {importlib.metadata.version(DISTRIBUTIONS[self.module])}"
        loaded = self._loaded = ctypes.CDLL(str(path))
        declared = {
            "llama_print_system_info": ((), c_char_p),
            "llama_backend_init": ((), None),
            "llama_log_set": ((c_void_p, c_void_p), None),
            "llama_model_default_params": ((), Parameters),
            "llama_context_default_params": ((), Parameters),
            "llama_model_load_from_file": ((c_char_p, Parameters), c_void_p),
            "llama_model_get_vocab": ((c_void_p,), c_void_p),
            "llama_vocab_n_tokens": ((c_void_p,), c_int32),
            "llama_init_from_model": ((c_void_p, Parameters), c_void_p),
            "llama_free": ((c_void_p,), None),
            "llama_batch_init": ((c_int32, c_int32, c_int32), Batch),
            "llama_decode": ((c_void_p, Batch), c_int32),
            "llama_get_logits_ith": ((c_void_p, c_int32), POINTER(c_float)),
            "llama_n_ctx": ((c_void_p,), c_uint32),
            "llama_n_batch": ((c_void_p,), c_uint32),
            "llama_n_seq_max": ((c_void_p,), c_uint32),
            "llama_n_threads": ((c_void_p,), c_int32),
            "llama_n_threads_batch": ((c_void_p,), c_int32),
        }
        for name, (arguments, result) in declared.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
            setattr(self, name.removeprefix("llama_"), function)
        self._mute = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(lambda level, text, user: None)
        loaded.llama_log_set(self._mute, None)
        loaded.llama_backend_init()

    @property
    def features(self) -> str:
        """What instructions the build uses, in its own words."""
        said: bytes = self._loaded.llama_print_system_info()
        return said.decode().strip(" |")

    def load(self, path: str) -> c_void_p:
        """Raises RuntimeError: it cannot be loaded."""
        model = self._loaded.llama_model_load_from_file(path.encode(), self._loaded.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {Path(path).name}")
        return c_void_p(model)

    def vocab_size(self, model: c_void_p) -> int:
        return int(self._loaded.llama_vocab_n_tokens(c_void_p(self._loaded.llama_model_get_vocab(model))))

    def context(self, model: c_void_p, tokens: int, batch_tokens: int, sequences: int, threads: int) -> c_void_p:
        """Room for `sequences` of `tokens` together.

        Raises:
            RuntimeError: there is no room, or this version orders its parameters otherwise.
        """
        params = self._loaded.llama_context_default_params()
        threads_at = _threads_at(list(params.numbers[:NUMBERS]))
        params.numbers[0], params.numbers[1], params.numbers[3] = tokens, batch_tokens, sequences
        params.numbers[threads_at] = params.numbers[threads_at + 1] = threads
        made = c_void_p(self._loaded.llama_init_from_model(model, params))
        if not made:
            raise RuntimeError("llama.cpp cannot make a context")
        told = [
            getattr(self._loaded, f"llama_n_{name}")(made) for name in ("ctx", "batch", "seq_max", "threads", "threads_batch")
        ]
        if told != [tokens, batch_tokens, sequences, threads, threads]:
            raise RuntimeError(f"llama.cpp made a context of {told}, asked {[tokens, batch_tokens, sequences, threads, threads]}")
        return made


def _threads_at(numbers: list[int]) -> int:
    """Where the thread counts stand among a context's default parameters. Raises RuntimeError: the layout is unknown."""
    for at in range(len(DEFAULT_CONTEXT), len(numbers) - 1):
        if tuple(numbers[:4]) == DEFAULT_CONTEXT and tuple(numbers[at : at + 2]) == DEFAULT_THREADS:
            return at
    raise RuntimeError(f"this version of llama.cpp has other parameters than are known here: they begin with {numbers}")


def _found() -> tuple[str, Path]:
    for module, pattern in PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        found = sorted(Path(spec.origin).parent.glob(pattern))
        if found:
            if module == "xllamacpp":
                importlib.import_module(module)  # its library is an extension module
            return module, found[0]
    raise RuntimeError(f"neither {' nor '.join(PACKAGES)} is installed")
