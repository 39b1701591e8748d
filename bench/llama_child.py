"""llama.cpp's side of bench.engine: run by the Python of a virtual environment that has llama-cpp-python and gguf.

`llama_child.py convert CHECKPOINT OUT f16|bf16` writes a Llama checkpoint as GGUF: the same numbers (FP16 rounds bfloat16
numbers below 6e-5), with the rows of the query and key weights in the order of llama.cpp's rotary positions.
`llama_child.py decode GGUF THREADS` loads it, then answers a line of JSON on stdin with one on stdout: `{"prompts": [[…]],
"room": N}` reads the prompts, room for N tokens each; `{"steps": N}` decodes N greedy steps of all of them.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy

BATCH_TOKENS = 2048
FILE_TYPES = {"f16": 1, "bf16": 32}  # LLAMA_FTYPE_MOSTLY_*


class Tensors:
    """The bfloat16 tensors of one safetensors file, read as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._bytes = numpy.memmap(path, mode="r", dtype=numpy.uint8)
        (header_bytes,) = struct.unpack("<Q", self._bytes[:8].tobytes())
        self._start = 8 + header_bytes
        self._header = json.loads(self._bytes[8 : self._start].tobytes())

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def bits(self, name: str) -> numpy.ndarray:
        """A tensor's bfloat16 numbers as uint16, in the tensor's shape."""
        about = self._header[name]
        if about["dtype"] != "BF16":
            raise ValueError(f"{name} is {about['dtype']}, expected BF16")
        first, end = about["data_offsets"]
        return self._bytes[self._start + first : self._start + end].view(numpy.uint16).reshape(about["shape"])


def as_float32(bits: numpy.ndarray) -> numpy.ndarray:
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def turned(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Rows of each head from halves into pairs: llama.cpp turns neighbours where transformers turns halves."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def convert(checkpoint: Path, out: Path, kind: str) -> None:
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    tensors = Tensors(checkpoint / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, bits: numpy.ndarray) -> None:
        if kind == "bf16":
            writer.add_tensor(name, bits.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, as_float32(bits).astype(numpy.float16))

    matrix("token_embd.weight", tensors.bits("model.embed_tokens.weight"))
    writer.add_tensor("output_norm.weight", as_float32(tensors.bits("model.norm.weight")))
    if not config["tie_word_embeddings"]:
        matrix("output.weight", tensors.bits("lm_head.weight"))
    for number in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{number}.", f"blk.{number}."
        for name, own in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            writer.add_tensor(f"{ours}{name}.weight", as_float32(tensors.bits(f"{theirs}{own}.weight")))
        for name, own, turn in (("q", "q_proj", heads), ("k", "k_proj", kv_heads), ("v", "v_proj", 0), ("output", "o_proj", 0)):
            bits = tensors.bits(f"{theirs}self_attn.{own}.weight")
            matrix(f"{ours}attn_{name}.weight", numpy.ascontiguousarray(turned(bits, turn) if turn else bits))
        for name in ("gate", "up", "down"):
            matrix(f"{ours}ffn_{name}.weight", tensors.bits(f"{theirs}mlp.{name}_proj.weight"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Decoder:
    """A loaded model, and one context at a time."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.cpp = llama_cpp
        self._mute = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self._mute, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the model")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads
        self.context: Any = None
        self.rows = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def begin(self, prompts: list[list[int]], room: int) -> list[int]:
        """Reads the prompts, each a sequence of its own; gives their first tokens."""
        if self.context:
            self.cpp.llama_free(self.context)
        params = self.cpp.llama_context_default_params()
        params.n_seq_max = len(prompts)
        params.n_ctx = len(prompts) * (-(-room // 256) * 256)
        params.n_batch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        self.context = self.cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.next = []
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(position, token, position, sequence, position == len(prompt) - 1)
            self.next.append(self._decode(len(prompt), [len(prompt) - 1])[0])
        self.position = len(prompts[0])
        return self.next

    def step(self) -> None:
        for sequence, token in enumerate(self.next):
            self._put(sequence, token, self.position, sequence, True)
        self.next = self._decode(len(self.next), range(len(self.next)))
        self.position += 1

    def _put(self, at: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        rows = self.rows
        rows.token[at], rows.pos[at], rows.logits[at] = token, position, wanted
        rows.n_seq_id[at] = 1
        rows.seq_id[at][0] = sequence

    def _decode(self, count: int, wanted: Any) -> list[int]:
        self.rows.n_tokens = count
        said = self.cpp.llama_decode(self.context, self.rows)
        if said:
            raise RuntimeError(f"llama_decode gave {said}")
        found = (self.cpp.llama_get_logits_ith(self.context, row) for row in wanted)
        return [int(numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()) for logits in found]


def decode(path: str, threads: int) -> None:
    decoder = Decoder(path, threads)
    features = decoder.cpp.llama_print_system_info().decode()
    print(json.dumps({"version": decoder.cpp.__version__, "features": features}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "prompts" in asked:
            print(json.dumps({"first": decoder.begin(asked["prompts"], asked["room"])}), flush=True)
            continue
        taken = []
        for _ in range(asked["steps"]):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            decoder.step()
            taken.append((time.perf_counter() - began_s, time.process_time() - began_cpu_s))
        print(json.dumps({"taken": taken}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        decode(sys.argv[2], int(sys.argv[3]))
