"""Writes a Llama checkpoint as GGUF: run by the Python of a virtual environment that has gguf.

`python -m bench.llama_convert CHECKPOINT OUT KIND`; KIND is one of f16, bf16, q8_0, q4_0. f16 and bf16 hold the same numbers
as the checkpoint (f16 rounds bfloat16 numbers below 6e-5). The rows of the query and key weights are put in the order of
llama.cpp's rotary positions.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy

FILE_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # LLAMA_FTYPE_MOSTLY_*


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
        elif kind == "f16":
            writer.add_tensor(name, as_float32(bits).astype(numpy.float16))
        else:
            held = gguf.GGMLQuantizationType[kind.upper()]
            writer.add_tensor(name, gguf.quants.quantize(as_float32(bits), held), raw_dtype=held)

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


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
