"""The page at `/`: one file, nothing loaded from elsewhere, and a policy that would not let it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def page() -> str:
    return files("node.http").joinpath("dashboard.html").read_text("utf-8")


@cache
def headers() -> dict[str, str]:
    """Only the page's own script and style run, by their digests: text from the mesh can never become code."""
    policy = [
        "default-src 'none'",
        f"script-src {_digest('script')}",
        f"style-src {_digest('style')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _digest(tag: str) -> str:
    inner = re.search(rf"<{tag}>(.*?)</{tag}>", page(), re.S)
    assert inner is not None, f"dashboard.html has no <{tag}>"
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.group(1).encode()).digest()).decode()}'"
