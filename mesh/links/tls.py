"""Mutual TLS for peer links, from the mesh key alone: nothing to install, nothing to copy but the key.

The key gives a certificate authority, byte for byte the same on every node (Ed25519 signatures are deterministic). Each
node mints a short-lived certificate for the key it is (`mesh.keys.signing`): the authority's signature shows that it holds the
mesh key, the handshake that it is that node. Host names are not checked, for an address is an attribute: ask `peer_node` which
node answered.

While keys are rotated a node trusts the authorities of all keys on its ring. It shows the certificate of its sealing key; but a
caller says, as the server's name, which authority it knows, and is shown a certificate of that one if this node has it.
"""

from __future__ import annotations

import datetime
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import RemoteError
from mesh.ids import NodeId
from mesh.keys.mesh_key import derive
from mesh.keys.signing import KEY_BYTES, IdentityKey, node_of

CERTIFICATE_DAYS = 30
_BACKDATED = datetime.timedelta(days=1)  # for peers whose clock is behind
_CA_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gossip-mesh authority")])
# Fixed, or the authority would not be the same everywhere; its life is the key's.
_CA_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_CA_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
_CA_SERIAL = 1


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


class PeerTls:
    """The contexts of one node, for accepted links and for those it opens: TLS 1.3, and both sides authenticate.

    `install` makes them anew. Links that are open keep what they began with.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext
    server_name: str  # what this node asks for when it calls

    def __init__(self, mesh_keys: Sequence[bytes], identity: IdentityKey) -> None:
        self._identity = identity
        self.install(mesh_keys)

    def install(self, mesh_keys: Sequence[bytes]) -> None:
        """Shows the first key's certificate, trusts all. Also renews certificates: call it well within `CERTIFICATE_DAYS`."""
        self._keys = tuple(mesh_keys)
        trusted = [authority(key) for key in self._keys]
        servers = [_context(ssl.PROTOCOL_TLS_SERVER, signer, trusted, self._identity) for signer in trusted]
        by_name = dict(zip(map(_server_name, self._keys), servers, strict=True))

        self._for_strangers = _context(ssl.PROTOCOL_TLS_SERVER, trusted[0], trusted, self._identity)

        def show_one_it_knows(stream: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
            stream.context = by_name.get(name, self._for_strangers) if name is not None else first

        servers[0].sni_callback = show_one_it_knows
        self.server, self.server_name = servers[0], _server_name(self._keys[0])
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, trusted[0], trusted, self._identity)

    def asked_for_another_key(self, stream: Any) -> bool:
        """Whether the caller at the other end of an accepted link named an authority that is not of this ring.

        Its own end of the handshake fails without a word, so that is all that there is to tell it from one that only knocked.
        """
        return stream.context is self._for_strangers

    def renew(self) -> None:
        self.install(self._keys)


def peer_node(stream: Any) -> NodeId:
    """The node at the other end of a handshaken `ssl.SSLObject`, `ssl.SSLSocket` or `trio.SSLStream`, from its key.

    Raises:
        RemoteError: it showed no certificate of a node.
    """
    der = stream.getpeercert(binary_form=True)
    try:
        public = x509.load_der_x509_certificate(der).public_key() if der else None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        public = None
    raw = public.public_bytes_raw() if isinstance(public, Ed25519PublicKey) else b""
    if len(raw) != KEY_BYTES:
        raise RemoteError("unknown", "its certificate is of no node; expected one for an Ed25519 key")
    return node_of(raw)


def why_impostor(stream: Any, claimed: str) -> str | None:
    """Why the certificate at the other end does not fit the node id that came with it; None when it does."""
    try:
        certified = peer_node(stream)
    except RemoteError as error:
        return error.reason
    return None if certified == claimed else f"the certificate is of node {certified}"


def mint(signer: Authority, identity: IdentityKey) -> tuple[bytes, bytes]:
    """A new certificate of one node and its key, both PEM: (certificate, private key)."""
    key, node = identity.private, identity.node
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


def _server_name(mesh_key: bytes) -> str:
    return f"{derive(mesh_key, 'authority name', 8).hex()}.mesh"


def _context(protocol: int, signer: Authority, trusted: Sequence[Authority], identity: IdentityKey) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for one in trusted:
        context.load_verify_locations(cadata=one.der)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every link shows its certificate anew
    certificate, private = mint(signer, identity)
    # ssl reads from files only: one in a directory of our own, gone before this returns.
    with tempfile.TemporaryDirectory(prefix="mesh-tls-") as directory:
        path = Path(directory) / "node.pem"
        path.touch(mode=0o600)
        path.write_bytes(private + certificate)
        context.load_cert_chain(path)
    return context
