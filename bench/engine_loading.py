"""Peak memory while a stage loads a third of the layers, against their size. Run in a process of its own.

`python -m bench.engine_loading CHECKPOINT [--kernel NAME] [--quantize KIND]` prints one JSON object. What counts is the
process's resident set as Linux counts it (VmHWM): what it allocated, and of mapped files every page that is mapped in.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from node.engine.loading import load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.mapped import trim_heap

CLEAR_PEAK = "5"  # proc(5), clear_refs: takes the peak down to what is resident now
WITHIN_S = 300.0


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"this system does not tell {field}")


def measure(directory: Path, kernel: str, quantize: str) -> dict[str, Any]:
    """Loads the second third, which has neither embedding nor head, so that its layers are all there is.

    `ratio`: of the peak to the layers' size as they are stored; `over_held`: to what is resident in the end.
    """
    checkpoint = read_checkpoint(directory)
    third = max(1, checkpoint.layers // 3)
    load_stage(checkpoint, third, third + 1, kernel, 1, quantize)  # what loading anything needs: modules, first allocations
    gc.collect()
    trim_heap()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    loaded = load_stage(checkpoint, third, 2 * third, kernel, 1, quantize)
    peak, held = resident_bytes("VmHWM") - before, resident_bytes("VmRSS") - before
    size = loaded.stage.parameters * checkpoint.stored_dtype.itemsize
    return {
        "ratio": round(peak / size, 2),
        "over_held": round(peak / held, 2),
        "peak_mib": peak >> 20,
        "held_mib": held >> 20,
        "layers_mib": size >> 20,
        "layers": third,
        "kernel": loaded.stage.kernel.name,
    }


def measured_apart(directory: Path, kernel: str = "auto", quantize: str = "none") -> dict[str, Any]:
    chosen = ["--kernel", kernel, "--quantize", quantize]
    command = [sys.executable, "-m", "bench.engine_loading", str(directory), *chosen]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WITHIN_S)
    answer: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_loading")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kernel", default="auto", help="auto, a dtype or a kernel")
    parser.add_argument("--quantize", default="none", help="none, int8 or int4")
    options = parser.parse_args()
    print(json.dumps(measure(options.checkpoint, options.kernel, options.quantize)))


if __name__ == "__main__":
    main()
