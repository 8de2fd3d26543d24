"""Short-lived certificates for tests of TLS: an authority, a server, a client, and an authority that signed neither."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def write_certificates(directory: Path, *, starts_in: float = -300.0, lasts: float = 3600.0) -> None:
    """Writes ca.pem, other.pem, and server.{pem,key}, client.{pem,key} signed by ca; the server is on loopback.

    nameless.{pem,key} is a client's that holds no name.

    Args:
        directory: where they go.
        starts_in: seconds from now until the server's and the client's are valid.
        lasts: seconds from now until they are not any more.
    """
    authority = _write(directory, "ca", None)
    _write(directory, "other", None)
    _write(directory, "server", authority, starts_in, lasts)
    _write(directory, "client", authority, starts_in, lasts)
    _write(directory, "nameless", authority, starts_in, lasts, named=False)


Signer = tuple[x509.Name, ec.EllipticCurvePrivateKey]


def _write(
    directory: Path,
    name: str,
    signer: Signer | None,
    starts_in: float = -300.0,
    lasts: float = 3600.0,
    *,
    named: bool = True,
) -> Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    attribute = NameOID.COMMON_NAME if named else NameOID.ORGANIZATION_NAME
    subject = x509.Name([x509.NameAttribute(attribute, f"test {name}")])
    issuer, issuer_key = signer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.IPAddress(ipaddress.ip_address(host)) for host in ("127.0.0.1", "::1")]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(seconds=starts_in))
        .not_valid_after(now + datetime.timedelta(seconds=lasts))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
    )
    if named:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), *hosts])
        builder = builder.add_extension(names, critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    (directory / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / f"{name}.key").touch(0o600)
    (directory / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return subject, key
