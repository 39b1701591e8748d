"""An object of parsed JSON, or one that is to be written as JSON: the one place where the types of its values are left open."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
