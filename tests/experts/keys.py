"""Elliptic-curve keys as PEM files, as `openssl` makes them."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def make_keys(
    directory: Path, name: str = "release", *, curve: ec.EllipticCurve | None = None, password: str | None = None
) -> tuple[Path, Path]:
    """The paths of a private and a public key."""
    private = ec.generate_private_key(curve or ec.SECP256R1())
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password.encode())
    private_path, public_path = directory / f"{name}.pem", directory / f"{name}.pub"
    private_path.write_bytes(
        private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    public_path.write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private_path, public_path
