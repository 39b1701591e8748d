"""The properties of the default model `mesh-demo`, which is part of the package, without reading its files.

`tools/default_model` trains it from scratch; README.md in its directory describes its abilities, training data and quality.
"""

from __future__ import annotations

from pathlib import Path

MODEL_ID = "mesh-demo"
DIRECTORY = Path(__file__).with_name("mesh_demo")
LAYERS = 6
MAX_MODEL_LEN = 2048  # tokens
