"""Mutual TLS for peer links, from the mesh key alone: nothing to install, nothing to copy but the key.

The key gives a certificate authority, byte for byte the same on every node (Ed25519 signatures are deterministic). Each
node mints a short-lived certificate that names its node id; whoever shows one signed by the authority holds the key.
Host names are not checked, for a node is its id and an address is an attribute: ask `peer_node` who answered.
"""

from __future__ import annotations

import datetime
import re
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import RemoteError
from mesh.ids import NodeId
from mesh.keys import derive

CERTIFICATE_DAYS = 30
_BACKDATED = datetime.timedelta(days=1)  # for peers whose clock is behind
_CA_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gossip-mesh authority")])
# Fixed, or the authority would not be the same everywhere; its life is the key's.
_CA_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_CA_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
_CA_SERIAL = 1
_NODE_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Authority:
    """The mesh's own certificate authority."""

    key: Ed25519PrivateKey = field(repr=False)
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def authority(mesh_key: bytes) -> Authority:
    """The authority that this mesh key stands for."""
    key = Ed25519PrivateKey.from_private_bytes(derive(mesh_key, "certificate authority"))
    public = key.public_key()
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_CA_NAME)
        .issuer_name(_CA_NAME)
        .public_key(public)
        .serial_number(_CA_SERIAL)
        .not_valid_before(_CA_FROM)
        .not_valid_after(_CA_UNTIL)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, None)
    )
    return Authority(key, certificate)


def server_context(mesh_key: bytes, node: NodeId) -> ssl.SSLContext:
    """For accepted links: TLS 1.3, and the caller must show a certificate of this mesh."""
    return _context(ssl.PROTOCOL_TLS_SERVER, authority(mesh_key), node)


def client_context(mesh_key: bytes, node: NodeId) -> ssl.SSLContext:
    """For links this node opens: TLS 1.3, and whoever answers must show a certificate of this mesh."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, authority(mesh_key), node)


def renew(context: ssl.SSLContext, mesh_key: bytes, node: NodeId) -> None:
    """Gives a context in use a fresh certificate; call it well within every `CERTIFICATE_DAYS`."""
    _load_certificate(context, authority(mesh_key), node)


def peer_node(stream: Any) -> NodeId:
    """Who is at the other end of a handshaken `ssl.SSLObject`, `ssl.SSLSocket` or `trio.SSLStream`.

    Raises:
        RemoteError: the certificate names no node id.
    """
    certificate = stream.getpeercert() or {}
    for part in certificate.get("subject", ()):
        for attribute, text in part:
            if attribute == "commonName" and _NODE_ID.fullmatch(text):
                return NodeId(text)
    raise RemoteError("unknown", "its certificate names no node; expected 16 hex digits as common name")


def why_impostor(stream: Any, claimed: str) -> str | None:
    """Why the certificate at the other end does not fit the node id that came with it; None when it does."""
    try:
        certified = peer_node(stream)
    except RemoteError as error:
        return error.reason
    return None if certified == claimed else f"the certificate is of node {certified}"


def mint(signer: Authority, node: NodeId) -> tuple[bytes, bytes]:
    """A new key and certificate of one node, both PEM: (certificate, private key).

    Raises:
        ValueError: `node` is not a node id.
    """
    if not _NODE_ID.fullmatch(node):
        raise ValueError(f"expected a node id of 16 hex digits, got {node!r}")
    key = Ed25519PrivateKey.generate()
    now = datetime.datetime.now(datetime.UTC)
    authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
        .issuer_name(_CA_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(node)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(authority_key, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(signer.key, None)
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


def _context(protocol: int, signer: Authority, node: NodeId) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=signer.der)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every link shows its certificate anew
    _load_certificate(context, signer, node)
    return context


def _load_certificate(context: ssl.SSLContext, signer: Authority, node: NodeId) -> None:
    certificate, private = mint(signer, node)
    # ssl reads from files only: one in a directory of our own, gone before this returns.
    with tempfile.TemporaryDirectory(prefix="mesh-tls-") as directory:
        path = Path(directory) / "node.pem"
        path.touch(mode=0o600)
        path.write_bytes(private + certificate)
        context.load_cert_chain(path)
