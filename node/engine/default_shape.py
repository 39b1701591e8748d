"""What can be said of the default model without making it, and without torch."""

from __future__ import annotations

MODEL_ID = "mesh-demo"
LAYERS = 6
MAX_MODEL_LEN = 4096  # tokens
