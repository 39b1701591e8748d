"""The default model `mesh-demo`, a part of the package: what can be said of it without reading it.

`tools/default_model` trains it from scratch; the README.md in its directory says what it can do, what it learned from, how well.
"""

from __future__ import annotations

from pathlib import Path

MODEL_ID = "mesh-demo"
DIRECTORY = Path(__file__).with_name("mesh_demo")
LAYERS = 6
MAX_MODEL_LEN = 2048  # tokens
