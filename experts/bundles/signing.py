"""Signatures of bundles, in the format of the OpenSSF model-signing specification, made with elliptic-curve keys.

A signature lists `manifest.json` and every weight file with its SHA-256, so it covers the whole bundle. The command
`model_signing verify key` of that project also verifies a bundle's folder, and its signatures are accepted here.

Checking a signature reads no weights: it is compared with the digests in the manifest, and `Bundle.verify` compares
those with the files. Both must pass before a bundle is used.
"""

import base64
import hashlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from experts.bundles.bundle import SIGNATURE_NAME, Bundle
from experts.bundles.manifest import MANIFEST_NAME
from experts.errors import SignatureError

if TYPE_CHECKING:
    from model_signing import hashing

SignatureState = Literal["verified", "not checked", "none"]


class SignaturePolicy(BaseModel):
    """Which bundles may load.

    With public keys, every signature must be by one of them, for any value of `signatures`. An unsigned bundle is
    refused only if signatures are required.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # "required" refuses bundles that are not signed by one of the keys.
    signatures: Literal["optional", "required"] = "optional"
    # PEM files.
    public_keys: tuple[Path, ...] = ()

    def check(self, bundle: Bundle) -> SignatureState:
        """Whether the bundle's signature was verified, not checked because there is no key, or is missing.

        Raises:
            SignatureError: the policy does not let this bundle load.
        """
        title = f"bundle {bundle.manifest.name} {bundle.manifest.version}"
        if bundle.signature is None:
            if self.signatures == "required":
                raise SignatureError(
                    f"{title} is not signed, and signatures are required: sign it with `echoray experts sign`, push it "
                    'again, or set experts.signatures to "optional"'
                )
            return "none"
        if not self.public_keys:
            if self.signatures == "required":
                raise SignatureError(f"{title} cannot be checked: signatures are required and no public key is given")
            return "not checked"
        reasons = []
        for key in self.public_keys:
            try:
                check_signature(bundle, key)
            except SignatureError as error:
                reasons.append(str(error))
            else:
                return "verified"
        raise SignatureError(f"{title}: {'; '.join(dict.fromkeys(reasons))}")

    def admit(self, bundle: Bundle) -> None:
        """Like `check`, without a result; for `ExpertGroup`.

        Raises:
            SignatureError: the policy does not allow it.
        """
        self.check(bundle)


def sign_bundle(directory: Path, private_key: Path, *, password: str | None = None) -> Path:
    """Verifies a bundle's folder, signs it, and writes the signature to the folder. Replaces an older one.

    Args:
        directory: the bundle's folder.
        private_key: a PEM file with a key on the curve P-256, P-384 or P-521.
        password: of the key, if it has one.

    Returns:
        The path of the signature.

    Raises:
        InvalidBundleError: the bundle does not match its manifest.
        SignatureError: the key cannot be used.
    """
    bundle = Bundle.open(directory)
    bundle.verify()
    _require_library()
    from model_signing import signing

    try:
        # The library passes the password to `cryptography`, which takes bytes.
        signer = signing.Config().use_elliptic_key_signer(  # type: ignore[no-untyped-call]
            private_key=private_key,
            password=password.encode() if password is not None else None,  # type: ignore[arg-type]
        )
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise SignatureError(f"the private key {private_key} cannot be used: {_reason(error)}") from error
    target = directory / SIGNATURE_NAME
    partial = directory.parent / f".{directory.name}.{os.urandom(8).hex()}.sig"
    try:
        signer.set_hashing_config(_known_digests(bundle)).sign(directory, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def check_signature(bundle: Bundle, public_key: Path) -> None:
    """Checks that a bundle's signature is by a key and covers its manifest and all its files. Reads no weights.

    Raises:
        SignatureError: there is none, it is by another key, or it covers other contents.
    """
    if bundle.signature is None:
        raise SignatureError("it is not signed")
    if not public_key.is_file():
        raise SignatureError(f"the public key {public_key} is no file: give the path of a PEM file")
    _require_library()
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    try:
        verifier = verifying.Config().use_elliptic_key_verifier(  # type: ignore[no-untyped-call]
            public_key=public_key
        )
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise SignatureError(f"the public key {public_key} cannot be used: {_reason(error)}") from error
    verifier.set_hashing_config(_known_digests(bundle))
    with tempfile.TemporaryDirectory(prefix="echovlm-signature-") as folder:
        # The library only reads signatures from files.
        path = Path(folder) / SIGNATURE_NAME
        path.write_bytes(bundle.signature)
        try:
            verifier.verify(Path(folder), path)
        except InvalidSignature as error:
            raise SignatureError(f"the signature is not by the key {public_key.name}, or was changed") from error
        except Exception as error:
            # A hostile file may make the library's parsers raise anything; it is not a valid signature then.
            reason = _reason(error)
            if reason.startswith("Signature mismatch") and (differing := _differing(bundle)):
                # The library formats digests as Python objects.
                reason = f"it is of another content of {', '.join(differing)}"
            raise SignatureError(
                f"the signature cannot be verified with the key {public_key.name}: {reason}"
            ) from error


def _digests(bundle: Bundle) -> dict[str, str]:
    """The files that a signature must cover: name → SHA-256 of the bytes on disk."""
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    return {**digests, MANIFEST_NAME: hashlib.sha256(bundle.manifest_bytes).hexdigest()}


def _differing(bundle: Bundle) -> list[str]:
    """The files for which a valid signature has another digest or none."""
    envelope = json.loads(bundle.signature or b"{}")["dsseEnvelope"]
    resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    signed = {resource["name"]: resource["digest"] for resource in resources}
    expected = _digests(bundle)
    return sorted(name for name in signed.keys() | expected.keys() if signed.get(name) != expected.get(name))


def _known_digests(bundle: Bundle) -> "hashing.Config":
    """A hashing configuration that uses the manifest's digests instead of reading the files again.

    It ignores a signature's list of excluded paths: a signature must cover all files.
    """
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    serialization = manifest.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
    )
    digests = _digests(bundle)
    items = [serialization.new_item(name, Digest("sha256", bytes.fromhex(digests[name]))) for name in sorted(digests)]
    known = manifest.Manifest(f"{bundle.manifest.organ}-{bundle.manifest.version}", items, serialization)

    class KnownDigests(hashing.Config):
        """Always returns the bundle's digests."""

        def hash(self, *arguments: object, **options: object) -> manifest.Manifest:
            """The bundle's digests."""
            return known

    return KnownDigests()  # type: ignore[no-untyped-call]


def _require_library() -> None:
    if importlib.util.find_spec("model_signing") is None:
        raise SignatureError("signatures need the package model-signing: pip install 'echovlm-ray[serve]'")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
