"""llama.cpp's side of bench.engine: run by the Python of a virtual environment that has xllamacpp or llama-cpp-python.

`python -m bench.llama_child GGUF THREADS` loads the file and says what build it is, then answers a line of JSON on stdin with one
on stdout: `{"prompts": [[…]], "room": N}` reads the prompts, room for N tokens each, and gives their first tokens and what
reading took; `{"steps": N}` decodes N greedy steps of all of them and gives what each took, in wall and in CPU time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy

from bench.llama_api import LlamaLibrary

BATCH_TOKENS = 2048
PADDED_TOKENS = 256  # llama.cpp's contexts are multiples of it


class Decoder:
    """A loaded model, and one context at a time."""

    def __init__(self, path: str, threads: int) -> None:
        self.library = LlamaLibrary()
        self._model = self.library.load(path)
        self._vocab_size = self.library.vocab_size(self._model)
        self._threads = threads
        self._context: Any = None
        self._rows = self.library.batch_init(BATCH_TOKENS, 0, 1)

    def begin(self, prompts: list[list[int]], room: int) -> list[int]:
        """Reads the prompts, each a sequence of its own; gives their first tokens."""
        if self._context:
            self.library.free(self._context)
        tokens = len(prompts) * (-(-room // PADDED_TOKENS) * PADDED_TOKENS)
        self._context = self.library.context(self._model, tokens, min(tokens, BATCH_TOKENS), len(prompts), self._threads)
        self._next = []
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(position, token, position, sequence, position == len(prompt) - 1)
            self._next += self._decode(len(prompt), [len(prompt) - 1])
        self._position = len(prompts[0])
        return self._next

    def step(self) -> None:
        for sequence, token in enumerate(self._next):
            self._put(sequence, token, self._position, sequence, True)
        self._next = self._decode(len(self._next), range(len(self._next)))
        self._position += 1

    def _put(self, at: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        rows = self._rows
        rows.token[at], rows.pos[at], rows.logits[at] = token, position, wanted
        rows.n_seq_id[at] = 1
        rows.seq_id[at][0] = sequence

    def _decode(self, count: int, wanted: Sequence[int]) -> list[int]:
        self._rows.n_tokens = count
        said = self.library.decode(self._context, self._rows)
        if said:
            raise RuntimeError(f"llama_decode gave {said}")
        found = (self.library.get_logits_ith(self._context, row) for row in wanted)
        return [int(numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()) for logits in found]


def main(path: str, threads: int) -> None:
    decoder = Decoder(path, threads)
    print(json.dumps({"version": decoder.library.version, "features": decoder.library.features}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        if "prompts" in asked:
            first = decoder.begin(asked["prompts"], asked["room"])
            took = time.perf_counter() - began_s, time.process_time() - began_cpu_s
            print(json.dumps({"first": first, "took": took}), flush=True)
            continue
        taken = []
        for _ in range(asked["steps"]):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            decoder.step()
            taken.append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
        print(json.dumps({"taken": taken}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
