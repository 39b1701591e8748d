"""Our matrix products beside FBGEMM's and oneDNN's: CPU time of one thread for each layer shape and number of rows.

`python -m bench.engine_products [--isa avx2] [--shape 100M,Llama-3.2-1B] [--layers qkv,down] [--rows 1,2] [--kernels …]`
measures some of them, `python -m bench.engine --only products` those that figures are asked of.

Each kernel holds whole decoder layers, as many as exceed the last-level cache several times, and works them off in the
order of a decoding step (qkv, out, gate_up, down, then the next layer). So no weight is still in the cache from its last
use, as in decoding. Kernels take turns, a pass over all of their layers each, of which the first layer is not timed: it
finds the code and the rows of another kernel in the caches. By the CPU time of the calling thread, the call at the lower quarter
counts: what others do on the machine only ever adds to it.
All kernels multiply by the same numbers: random bfloat16, which float16 and float32 hold exactly but for the smallest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.capped import ISAS, cap
from bench.engine_shapes import SHAPES, layer_shapes
from bench.machine import machine
from node.engine.kernels.machine import candidates
from node.engine.model.linear import KERNELS
from node.engine.native.library import native
from node.engine.native.product import NativeProduct

ROWS, QUICK_ROWS = (1, 2, 4, 8, 32, 128), (1, 8, 32, 128)
ROUNDS, QUICK_ROUNDS = 9, 1
CACHES, QUICK_CACHES = 3, 2  # a kernel's weights are so many times the last-level cache
USUAL_CACHE_BYTES = 32 << 20  # where the system does not tell
OPPONENTS = ("fbgemm-fp16", "onednn-fp32", "onednn-bf16")
QUANTISED = ("mesh-int8", "mesh-int4", "mesh-int8-fp32", "mesh-int4-fp32")
BYTES_EACH = {"mesh-int8": 1.0, "mesh-int4": 0.625, "mesh-int8-fp32": 1.0, "mesh-int4-fp32": 0.625}  # with scales; others: 2
USUAL = ("mesh-bf16", "mesh-fp32", "mesh-int8", "mesh-int4", *OPPONENTS)

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to multiply: `rows` is the dtype of the rows, `bytes_each` what a weight takes in memory."""

    name: str
    rows: torch.dtype
    pack: Callable[[torch.Tensor], Product]
    bytes_each: float
    ours: bool


def contenders() -> dict[str, Contender]:
    """All that exist on this machine; ours first. `mesh-fp32` multiplies float32 rows by weights held in bfloat16."""
    found = []
    if native() is not None:
        for name in ("mesh-bf16", "mesh-fp32", *QUANTISED):
            kernel = KERNELS[name]
            pack = partial(_native, quantize=kernel.quantize)
            found.append(Contender(name, kernel.dtype, pack, BYTES_EACH.get(name, 2.0), ours=True))
        found.append(Contender("mesh-fp32 of fp16", torch.float32, partial(_native, stored=torch.float16), 2.0, ours=True))
        found.append(Contender("mesh-fp32 of fp32", torch.float32, partial(_native, stored=torch.float32), 4.0, ours=True))
    for name, bytes_each in zip(OPPONENTS, (2.0, 4.0, 2.0), strict=True):
        found.append(Contender(name, KERNELS[name].dtype, partial(_packed, name), bytes_each, ours=False))
    return {each.name: each for each in found if _exists(each)}


def _native(weight: torch.Tensor, quantize: str = "none", stored: torch.dtype = torch.bfloat16) -> Product:
    if stored is torch.float32:
        weight = weight.float() + weight.float() * 2**-20  # else it would be held in bfloat16, exactly
    return NativeProduct(weight.to(stored), None, quantize)


def _packed(name: str, weight: torch.Tensor) -> Product:
    return KERNELS[name].pack(weight.to(KERNELS[name].dtype), None)


def _exists(contender: Contender) -> bool:
    try:
        contender.pack(torch.ones(64, 64, dtype=torch.bfloat16))(torch.ones(2, 64, dtype=contender.rows))
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def chosen_here() -> str:
    """The compiled kernel that a node takes for a checkpoint stored in bfloat16; empty where there is none."""
    return next((kernel.name for kernel in candidates("auto", torch.bfloat16) if kernel.compiled), "")


def cache_bytes() -> int:
    """The last-level cache, as Linux tells it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        said = path.read_text().strip()
        sizes.append(int(said[:-1]) << {"K": 10, "M": 20}[said[-1]])
    return max(sizes, default=USUAL_CACHE_BYTES)


class Model:
    """The packed layers of one contender, and what each product took."""

    def __init__(self, contender: Contender, shapes: dict[str, tuple[int, int]], least_bytes: int) -> None:
        self.contender = contender
        layer_elements = sum(inputs * outputs for inputs, outputs in shapes.values())
        self.layers = max(2, -(-least_bytes // int(layer_elements * contender.bytes_each)))
        self._shapes = shapes
        self._products: list[dict[str, Product]] = []
        for number in range(self.layers):
            generator = torch.Generator().manual_seed(number)
            self._products.append(
                {name: contender.pack(_weight(inputs, outputs, generator)) for name, (inputs, outputs) in shapes.items()}
            )

    def run(self, rows: int) -> dict[str, list[float]]:
        """CPU seconds of each product of every layer but the first."""
        numbers = torch.Generator().manual_seed(rows)
        widths = {inputs for inputs, _ in self._shapes.values()}
        given = {width: torch.randn(rows, width, generator=numbers).to(self.contender.rows) for width in sorted(widths)}
        taken: dict[str, list[float]] = {name: [] for name in self._shapes}
        for number, layer in enumerate(self._products):
            for name, product in layer.items():
                x = given[self._shapes[name][0]]
                began_s = time.thread_time()
                product(x)
                took_s = time.thread_time() - began_s
                if number:
                    taken[name].append(took_s)
        return taken


def _weight(inputs: int, outputs: int, generator: torch.Generator) -> torch.Tensor:
    weight: torch.Tensor = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return weight.bfloat16()


def measured(
    shapes: dict[str, tuple[int, int]], names: Sequence[str], rows: Sequence[int], rounds: int, least_bytes: int
) -> dict[str, dict[int, dict[str, float]]]:
    """CPU microseconds, the lower quarter: layer, rows, contender."""
    there = contenders()
    models = [Model(there[name], shapes, least_bytes) for name in names if name in there]
    found: dict[str, dict[int, dict[str, float]]] = {layer: {} for layer in shapes}
    for count in rows:
        taken: dict[str, dict[str, list[float]]] = {layer: {} for layer in shapes}
        for number in range(rounds + 1):
            for model in models:
                for layer, times_s in model.run(count).items():
                    if number:  # in the first round a kernel makes what it keeps
                        taken[layer].setdefault(model.contender.name, []).extend(times_s)
        for layer, by_name in taken.items():
            found[layer][count] = {name: round(1e6 * sorted(times_s)[len(times_s) // 4], 1) for name, times_s in by_name.items()}
    return found


def compared(
    found: dict[str, dict[int, dict[str, float]]], ours: str, beside: str | None = None
) -> Iterable[tuple[str, int, float]]:
    """Layer, rows, and how many times as fast `ours` is as `beside`, or as the fastest opponent."""
    for layer, by_rows in found.items():
        for count, times_us in by_rows.items():
            others = [times_us[name] for name in ((beside,) if beside else OPPONENTS) if name in times_us]
            if ours in times_us and others:
                yield layer, count, round(min(others) / times_us[ours], 2)


def judged_shape(found: dict[str, dict[int, dict[str, float]]], ours: str) -> dict[str, Any]:
    """The times, and the ratios that something is asked of."""
    ratios: dict[str, Any] = {"vs_best": {f"{layer} x{count}": ratio for layer, count, ratio in compared(found, ours)}}
    for name in QUANTISED:
        plain = "mesh-fp32" if name.endswith("fp32") else "mesh-bf16"
        versus = {f"{layer} x{count}": ratio for layer, count, ratio in compared(found, name, plain)}
        if versus:
            ratios[f"{name} vs {plain}"] = versus
    return {"cpu_us": found, **ratios}


def table(shape: str, found: dict[str, dict[int, dict[str, float]]], ours: str) -> str:
    """Times in microseconds, one line for each layer and row count, and our ratio to the best opponent."""
    names = list(dict.fromkeys(name for by_rows in found.values() for times_us in by_rows.values() for name in times_us))
    lines = [f"{shape}: CPU µs of one thread; last column: the fastest opponent's time over that of {ours}"]
    lines.append(f"{'layer':8}{'rows':>5}" + "".join(f"{name:>{len(name) + 2}}" for name in names) + "   ratio")
    ratios = {(layer, count): ratio for layer, count, ratio in compared(found, ours)}
    for layer, by_rows in found.items():
        for count, times_us in by_rows.items():
            times = "".join(f"{times_us.get(name, float('nan')):>{len(name) + 2}.0f}" for name in names)
            ratio = ratios.get((layer, count))
            lines.append(f"{layer:8}{count:>5}{times}" + (f"{ratio:>8.2f}{' *' if ratio < 1 else ''}" if ratio else ""))
    return "\n".join(lines)


def measure(
    shapes: Iterable[str],
    ours: str,
    layers: Sequence[str] = (),
    rows: Sequence[int] = ROWS,
    names: Sequence[str] = USUAL,
    rounds: int = ROUNDS,
    caches: int = CACHES,
) -> dict[str, Any]:
    """`products` of the report, by shape; prints a table to stderr for each as it comes."""
    least_bytes = caches * cache_bytes()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"ours": ours, "cache_mib": cache_bytes() >> 20, "weights_mib": least_bytes >> 20, "shapes": {}}
    try:
        for shape in shapes:
            wanted = {name: size for name, size in layer_shapes(SHAPES[shape]).items() if not layers or name in layers}
            found = measured(wanted, names, rows, rounds, least_bytes)
            print(table(shape, found, ours), file=sys.stderr, flush=True)
            report["shapes"][shape] = judged_shape(found, ours)
    finally:
        torch.set_num_threads(threads)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_products")
    parser.add_argument("--isa", choices=ISAS, default="native", help="avx2: everyone is capped to it")
    parser.add_argument("--shape", default=",".join(SHAPES), help="with commas between")
    parser.add_argument("--layers", default="", help="some of qkv, out, gate_up, down")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--kernels", default="", help="names of contenders, or all")
    parser.add_argument("--ours", default=chosen_here(), help="the one that is held against the best opponent")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    capped = cap(options.isa)
    found = measure(
        options.shape.split(","),
        options.ours,
        list(filter(None, options.layers.split(","))),
        [int(count) for count in options.rows.split(",")],
        list(contenders()) if options.kernels == "all" else list(filter(None, options.kernels.split(","))) or USUAL,
        options.rounds,
    )
    print(json.dumps({"bench": "engine_products", "capped": capped, **found, "machine": machine()}))


if __name__ == "__main__":
    main()
