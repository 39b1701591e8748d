"""The bytes as they were when they were written down."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("golden.json")
TRACE = Path(__file__).with_name("membership.trace.xz")


def golden(part: str) -> dict[str, str]:
    """`structs` or `encodings`: name -> bytes in hex, long ones as their SHA-256."""
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text())
    return found[part]
