"""Mutual TLS for peer links, derived from the mesh key alone: no certificates to install or copy.

The key gives a certificate authority, byte for byte the same on every node (Ed25519 signatures are deterministic). Each
node mints a short-lived certificate for its identity key (`mesh.keys.signing`): the authority's signature proves that it holds
the mesh key, the handshake that it is that node. Host names are not checked, because a node may change its address: `peer_node`
returns which node answered.

While keys are rotated, a node trusts the authorities of all keys on its ring. It presents the certificate of its sealing key,
unless the caller names another authority of the ring as the server's name: then the certificate that this authority signed.
"""

from __future__ import annotations

import datetime
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio
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
_BACKDATED = datetime.timedelta(days=1)  # for peers whose clock is slow
_CA_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gossip-mesh authority")])
# Fixed, so that the authority is the same on every node; it is valid for as long as the mesh key is used.
_CA_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_CA_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
_CA_SERIAL = 1


class CertificateSource(Protocol):
    """The end of a TLS connection after its handshake, as `ssl.SSLObject` and `ssl.SSLSocket` are."""

    def getpeercert(self, binary_form: bool) -> bytes | None:
        """Returns the certificate at the other end, in DER; None without one."""


TlsEnd = CertificateSource | trio.SSLStream[trio.abc.Stream]


@dataclass(frozen=True, slots=True)
class Authority:
    """The mesh's own certificate authority."""

    key: Ed25519PrivateKey = field(repr=False)
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def authority(mesh_key: bytes) -> Authority:
    """Returns the certificate authority of this mesh key."""
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
    """The TLS contexts of one node, for accepted links and for its own: TLS 1.3, and both sides authenticate.

    `install` replaces them. Open links keep the context that they began with.
    """

    server: ssl.SSLContext
    client: ssl.SSLContext
    server_name: str  # names the authority that this node asks for when it calls

    def __init__(self, mesh_keys: Sequence[bytes], identity: IdentityKey) -> None:
        self._identity = identity
        self.install(mesh_keys)

    def install(self, mesh_keys: Sequence[bytes]) -> None:
        """Presents the first key's certificate, trusts all keys, renews certificates: call it well within `CERTIFICATE_DAYS`."""
        self._keys = tuple(mesh_keys)
        trusted = [authority(key) for key in self._keys]
        servers = [_context(ssl.PROTOCOL_TLS_SERVER, signer, trusted, self._identity) for signer in trusted]
        by_name = dict(zip(map(_server_name, self._keys), servers, strict=True))

        self._for_other_keys = _context(ssl.PROTOCOL_TLS_SERVER, trusted[0], trusted, self._identity)

        # The caller names its authority in the handshake, and gets the certificate which that authority signed. A name that is
        # not of this ring selects a context of its own, so that `asked_for_another_key` recognises the failed handshake.
        def select_context(stream: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
            stream.context = by_name.get(name, self._for_other_keys) if name is not None else first

        servers[0].sni_callback = select_context
        self.server, self.server_name = servers[0], _server_name(self._keys[0])
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, trusted[0], trusted, self._identity)

    def asked_for_another_key(self, stream: trio.abc.Stream) -> bool:
        """Returns whether the caller of an accepted link named an authority that is not of this ring.

        The caller closes such a handshake without a reason, so only the name distinguishes it from a connect check.
        """
        return isinstance(stream, trio.SSLStream) and stream.context is self._for_other_keys

    def renew(self) -> None:
        self.install(self._keys)


def peer_node(stream: TlsEnd) -> NodeId:
    """Returns the id of the node at the other end, derived from the key in its certificate.

    Raises:
        RemoteError: it presented no certificate of a node.
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


def why_impostor(stream: TlsEnd, claimed: str) -> str | None:
    """Returns why the certificate at the other end does not match the node id in its hello; None where it does."""
    try:
        certified = peer_node(stream)
    except RemoteError as error:
        return error.reason
    return None if certified == claimed else f"the certificate is of node {certified}"


def mint(signer: Authority, identity: IdentityKey) -> tuple[bytes, bytes]:
    """Returns a new certificate of one node and its private key, both as PEM."""
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
    for each in trusted:
        context.load_verify_locations(cadata=each.der)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # no session is resumed: every link presents its certificate
    certificate, private = mint(signer, identity)
    # `ssl` reads keys from files only: this one is in a private directory, which is removed before this function returns.
    with tempfile.TemporaryDirectory(prefix="mesh-tls-") as directory:
        path = Path(directory) / "node.pem"
        path.touch(mode=0o600)
        path.write_bytes(private + certificate)
        context.load_cert_chain(path)
    return context
