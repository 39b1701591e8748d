"""Authentication: API keys where there are some, otherwise only clients on this machine.

A key file has one line a key: the SHA-256 of the key in hex, then, if wanted, a label. Keys are random and
long, so a plain hash suffices; the file gives none of them away. Without keys the Host and Origin headers
must name this machine, or a web page could reach the node through its visitor's browser (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from mesh.errors import BadRequest
from mesh.ids import Address, parse_address

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/metrics", "/openapi.json"})
"""Served without a key."""

KEY_PREFIX = "mk-"


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """Hashes of the keys that are let in, with their labels."""

    labels: Mapping[bytes, str]

    @classmethod
    def parse(cls, lines: Iterable[str]) -> ApiKeys:
        """The lines of a key file; empty ones and those that begin with # count for nothing.

        Raises:
            BadRequest: a line of another form (with its number, not its text), or no key at all.
        """
        labels: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            digest, _, label = line.strip().partition(" ")
            if not digest or digest.startswith("#"):
                continue
            try:
                raw = bytes.fromhex(digest)
            except ValueError:
                raw = b""
            if len(raw) != 32:
                raise BadRequest(
                    f"line {number}: expected a key hash of 64 hex digits, as `mesh key api` writes it", "api_key_file"
                )
            labels[raw] = label.strip()
        if not labels:
            raise BadRequest("expected at least one key hash; make a key with `mesh key api`", "api_key_file")
        return cls(labels)

    def tenant(self, authorization: str | None) -> str:
        """Whose key an `Authorization` header holds: a name for quotas and scopes, not the key.

        Takes as long for a wrong key as for any right one.

        Raises:
            BadRequest: 401, no key or none of ours.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            wanted = "this node asks for an API key: expected a header Authorization: Bearer KEY (mesh commands: --api-key)"
            raise BadRequest(wanted, status=401, code="missing_api_key")
        digest = key_hash(key.strip())
        found = b""
        for known in self.labels:
            if hmac.compare_digest(known, digest):
                found = known
        if not found:
            raise BadRequest("the API key is not one of this mesh", status=401, code="invalid_api_key")
        return found.hex()[:16]


def key_hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def new_api_key(label: str = "") -> tuple[str, str]:
    """A fresh key, and the line of the key file that lets it in."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    label = " ".join(label.split())
    return key, f"{key_hash(key).hex()} {label}".rstrip()


def check_origin(host: str | None, origin: str | None, bound: Address) -> None:
    """Lets in only requests that name this machine, however the browser was led here.

    Args:
        host: the Host header; None (HTTP/1.0, so no browser) passes.
        origin: the Origin header, which browsers send with all but plain reads of their own site.

    Raises:
        BadRequest: 403.
    """
    if host is not None and not _is_here(_host_name(host), bound):
        raise BadRequest(
            "expected a Host header that names this machine; to serve other names, give the node API keys",
            status=403,
            code="foreign_host",
        )
    if origin is not None and not _is_here(_origin_name(origin), bound):
        raise BadRequest("expected no Origin header of another site", status=403, code="foreign_origin")


def _is_here(name: str | None, bound: Address) -> bool:
    if not name:
        return False
    if name in ("localhost", "::1", bound[0].lower()):
        return True
    octets = name.split(".")
    return len(octets) == 4 and octets[0] == "127" and all(part.isascii() and part.isdigit() for part in octets)


def _host_name(host: str) -> str | None:
    """The name in `NAME`, `NAME:PORT`, `[V6]` or `[V6]:PORT`, lower case; None for any other form."""
    has_port = ":" in host.rpartition("]")[2]
    try:
        name, _ = parse_address(host if has_port else f"{host}:0", default_host="")
    except ValueError:
        return None
    return name.lower()


def _origin_name(origin: str) -> str | None:
    try:
        parts = urlsplit(origin)
        return parts.hostname if parts.scheme in ("http", "https") else None
    except ValueError:
        return None
