"""One authority and the certificates it signs: what the parts of a Kubernetes know each other by."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import os
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS = 30  # a node lives for a session; an old one is not worth keeping

# file: (common name, organisation). Kubernetes reads a user's name and group from these two.
CLIENTS = {
    "admin": ("kubernetes-admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kube-proxy": ("system:kube-proxy", ""),
    "kubelet": ("system:node:lab", "system:nodes"),
    "kubelet-2": ("system:node:lab-2", "system:nodes"),
    "apiserver-kubelet": ("kube-apiserver-kubelet-client", "system:masters"),
    "front-proxy": ("front-proxy", ""),
}


def write(folder: Path, names: list[str], addresses: list[str]) -> None:
    """Write the authority, the serving certificates and the clients' to ``folder``, keys readable by their
    owner alone.

    names, addresses  what the API server may be called
    """
    folder.mkdir(mode=0o700, parents=True)
    authority = _key()
    root = _certificate("bits-to-pods", "", authority, authority, issuer="bits-to-pods", is_authority=True)
    _store(folder / "ca.crt", _pem(root))
    _store(folder / "sa.key", _private(service_account := _key()))
    public = service_account.public_key()
    _store(
        folder / "sa.pub",
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    )
    for file, common_name, organisation in (
        ("apiserver", "kube-apiserver", ""),
        ("kubelet-serving", "system:node:lab", "system:nodes"),
    ):
        key = _key()
        certificate = _certificate(
            common_name, organisation, key, authority, names=names, addresses=addresses
        )
        _store(folder / f"{file}.crt", _pem(certificate))
        _store(folder / f"{file}.key", _private(key))
    for file, (common_name, organisation) in CLIENTS.items():
        key = _key()
        _store(folder / f"{file}.crt", _pem(_certificate(common_name, organisation, key, authority)))
        _store(folder / f"{file}.key", _private(key))


def kubeconfig(folder: Path, client: str, server: str, context: str) -> str:
    """A kubeconfig with everything inside it, for the client of that name."""

    def encoded(name: str) -> str:
        return base64.b64encode((folder / name).read_bytes()).decode()

    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "contexts": [{"name": context, "context": {"cluster": context, "user": client}}],
            "clusters": [
                {
                    "name": context,
                    "cluster": {"server": server, "certificate-authority-data": encoded("ca.crt")},
                }
            ],
            "users": [
                {
                    "name": client,
                    "user": {
                        "client-certificate-data": encoded(f"{client}.crt"),
                        "client-key-data": encoded(f"{client}.key"),
                    },
                }
            ],
        },
        sort_keys=False,
    )


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _certificate(
    common_name: str,
    organisation: str,
    key: ec.EllipticCurvePrivateKey,
    authority: ec.EllipticCurvePrivateKey,
    *,
    issuer: str = "bits-to-pods",
    is_authority: bool = False,
    names: list[str] | None = None,
    addresses: list[str] | None = None,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organisation:
        subject.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if not is_authority:
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] if names else [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names:
        alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        alternatives += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses or []]
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(authority, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def _store(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
