"""Peak memory while a stage loads a third of the layers, against their size. Run in a process of its own.

`python -m bench.engine_loading CHECKPOINT` prints one JSON object. All resident memory counts, mapped files as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from node.engine.checkpoint import read_checkpoint
from node.engine.loading import load_stage

CLEAR_PEAK = "5"  # proc(5), clear_refs: takes the peak down to what is resident now
WITHIN_S = 300.0


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise ValueError(f"this system does not tell {field}")


def measure(directory: Path) -> dict[str, Any]:
    """Loads the second third, which has neither embedding nor head, so that its layers are all there is."""
    checkpoint = read_checkpoint(directory)
    third = max(1, checkpoint.layers // 3)
    load_stage(checkpoint, third, third + 1, "auto", 1)  # what loading anything needs: modules, kernels, first allocations
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    loaded = load_stage(checkpoint, third, 2 * third, "auto", 1)
    peak = resident_bytes("VmHWM") - before
    size = loaded.stage.parameters * checkpoint.stored_dtype.itemsize
    return {"ratio": round(peak / size, 2), "peak_mib": peak >> 20, "layers_mib": size >> 20, "kernel": loaded.stage.kernel.name}


def measured_apart(directory: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.engine_loading", str(directory)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WITHIN_S)
    answer: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
