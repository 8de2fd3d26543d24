import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.bundles.bundle import Bundle
from experts.bundles.signing import SignaturePolicy, check_signature, sign_bundle
from experts.errors import InvalidBundleError, SignatureError
from experts.registry.registry import Registry
from tests.experts.bad_bundles import flip_last_byte, small_bundle
from tests.experts.keys import make_keys

MakeBundle = Callable[..., Path]


def openssf(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command of the project that made the format."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path)


@pytest.fixture
def signed(make_bundle: MakeBundle, keys: tuple[Path, Path]) -> Path:
    directory = make_bundle()
    sign_bundle(directory, keys[0])
    return directory


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_what_is_signed_is_verified(curve: ec.EllipticCurve, make_bundle: MakeBundle, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, curve=curve)
    directory = make_bundle()
    digest = Bundle.open(directory).digest
    assert sign_bundle(directory, private) == directory / "model.sig"
    bundle = Bundle.open(directory)
    bundle.verify()
    assert bundle.digest == digest, "a signature is no part of a bundle's identity"
    check_signature(bundle, public)
    assert SignaturePolicy(signatures="required", public_keys=(public,)).check(bundle) == "verified"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "release.pem", "release.pub"]


def test_the_openssf_command_verifies_it(signed: Path, keys: tuple[Path, Path]) -> None:
    arguments = ("verify", "key", signed, "--signature", signed / "model.sig", "--public_key", keys[1])
    done = openssf(*arguments)
    assert done.returncode == 0, done.stderr
    flip_last_byte(signed)
    assert openssf(*arguments).returncode != 0


def test_a_signature_of_the_openssf_command_is_accepted(make_bundle: MakeBundle, keys: tuple[Path, Path]) -> None:
    directory = make_bundle()
    done = openssf("sign", "key", directory, "--private_key", keys[0], "--signature", directory / "model.sig")
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(directory)
    bundle.verify()
    check_signature(bundle, keys[1])


def test_a_key_with_a_password(make_bundle: MakeBundle, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, password="opensesame")
    directory = make_bundle()
    for wrong in (None, "wrong"):
        with pytest.raises(SignatureError, match=r"private key .*release.pem cannot be used"):
            sign_bundle(directory, private, password=wrong)
    assert not (directory / "model.sig").exists()
    sign_bundle(directory, private, password="opensesame")
    check_signature(Bundle.open(directory), public)


def test_signing_again_replaces_the_signature(signed: Path, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, "other")
    sign_bundle(signed, private)
    check_signature(Bundle.open(signed), public)


def test_only_a_sound_bundle_is_signed(make_bundle: MakeBundle, keys: tuple[Path, Path]) -> None:
    directory = make_bundle()
    flip_last_byte(directory)
    with pytest.raises(InvalidBundleError, match="is damaged"):
        sign_bundle(directory, keys[0])
    assert not (directory / "model.sig").exists()


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    _, other = make_keys(tmp_path, "other")
    with pytest.raises(SignatureError, match=r"other.pub.*Key mismatch"):
        check_signature(Bundle.open(signed), other)


@pytest.mark.parametrize("curve", ["missing", "text", "rsa-like", "curve"])
def test_keys_that_are_none(curve: str, signed: Path, tmp_path: Path) -> None:
    key = tmp_path / "bad.pub"
    if curve == "text":
        key.write_text("ssh-ed25519 AAAA")
    elif curve == "rsa-like":
        key.write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    elif curve == "curve":
        private, key = make_keys(tmp_path, "koblitz", curve=ec.SECP256K1())
        with pytest.raises(SignatureError, match="cannot be used: Unsupported key"):
            sign_bundle(signed, private)
    with pytest.raises(SignatureError, match=r"public key .* (cannot be used|is no file)"):
        check_signature(Bundle.open(signed), key)


def test_a_changed_manifest_is_not_what_was_signed(signed: Path, keys: tuple[Path, Path]) -> None:
    path = signed / "manifest.json"
    path.write_text(path.read_text().replace("for tests", "for patients"))
    with pytest.raises(SignatureError, match=r"it is of another content of manifest.json$"):
        check_signature(Bundle.open(signed), keys[1])


def test_another_bundles_signature(signed: Path, make_bundle: MakeBundle, keys: tuple[Path, Path]) -> None:
    other = make_bundle("other", seed=1)
    (other / "model.sig").write_bytes((signed / "model.sig").read_bytes())
    with pytest.raises(SignatureError, match=r"content of experts.safetensors, gate.safetensors, manifest.json"):
        check_signature(Bundle.open(other), keys[1])


def test_a_signature_that_leaves_a_file_out_is_refused(make_bundle: MakeBundle, keys: tuple[Path, Path]) -> None:
    """Properly signed, by the right key, with the experts on the list of ignored paths."""
    directory = make_bundle()
    arguments = ("sign", "key", directory, "--private_key", keys[0], "--signature", directory / "model.sig")
    done = openssf(*arguments, "--ignore-paths", directory / "experts.safetensors")
    assert done.returncode == 0, done.stderr
    with pytest.raises(SignatureError, match=r"another content of experts.safetensors$"):
        check_signature(Bundle.open(directory), keys[1])


def test_a_changed_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    path = signed / "model.sig"
    content = json.loads(path.read_bytes())
    envelope = content["dsseEnvelope"]
    octets = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    octets[-1] ^= 1
    envelope["signatures"][0]["sig"] = base64.b64encode(octets).decode()
    path.write_text(json.dumps(content))
    with pytest.raises(SignatureError, match=r"not by the key release.pub, or was changed"):
        check_signature(Bundle.open(signed), keys[1])


@given(content=st.binary(max_size=100) | st.text(max_size=50).map(str.encode) | st.sampled_from([b"{}", b"[]", b"1"]))
@settings(max_examples=50, deadline=None)
def test_whatever_a_signature_is_it_is_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    _, public = make_keys(folder)
    directory = small_bundle(str(folder))
    (directory / "model.sig").write_bytes(content)
    with pytest.raises(SignatureError):
        check_signature(Bundle.open(directory), public)


def test_the_policy(make_bundle: MakeBundle, signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    unsigned = Bundle.open(make_bundle("unsigned"))
    with_signature = Bundle.open(signed)
    public = keys[1]
    _, other = make_keys(tmp_path, "other")
    assert SignaturePolicy().check(unsigned) == "none"
    assert SignaturePolicy().check(with_signature) == "not checked"
    assert SignaturePolicy(public_keys=(public,)).check(unsigned) == "none"
    assert SignaturePolicy(public_keys=(other, public)).check(with_signature) == "verified"
    with pytest.raises(SignatureError, match="Key mismatch"):
        SignaturePolicy(public_keys=(other,)).check(with_signature)
    required = SignaturePolicy(signatures="required", public_keys=(public,))
    assert required.check(with_signature) == "verified"
    with pytest.raises(SignatureError, match="is not signed, and signatures are required"):
        required.admit(unsigned)
    with pytest.raises(SignatureError, match="no public key is given"):
        SignaturePolicy(signatures="required").check(with_signature)


def test_a_registry_keeps_the_signature_beside_the_manifest(
    signed: Path, registry: Registry, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    manifest = registry.push(signed)
    bundle = registry.open(manifest.digest)
    bundle.verify()
    check_signature(bundle, keys[1])
    assert registry.is_signed(manifest)
    path = Path(registry.root) / "bundles" / "breast" / "1.0.0" / f"{manifest.digest}.sig"
    assert path.read_bytes() == (signed / "model.sig").read_bytes()
    # And out again, in a form that the OpenSSF command takes.
    registry.pull(manifest.digest, tmp_path / "pulled")
    check_signature(Bundle.open(tmp_path / "pulled"), keys[1])


def test_signing_after_the_push_and_signing_anew(
    make_bundle: MakeBundle, registry: Registry, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    directory = make_bundle()
    manifest = registry.push(directory)
    assert not registry.is_signed(manifest)
    sign_bundle(directory, keys[0])
    assert registry.push(directory) == manifest
    check_signature(registry.open(manifest.digest), keys[1])
    private, public = make_keys(tmp_path, "next")
    sign_bundle(directory, private)
    registry.push(directory)
    check_signature(registry.open(manifest.digest), public)
    # A push without one takes nothing away.
    (directory / "model.sig").unlink()
    registry.push(directory)
    check_signature(registry.open(manifest.digest), public)


def test_the_signed_bytes_of_the_manifest_are_kept(
    make_bundle: MakeBundle, registry: Registry, keys: tuple[Path, Path]
) -> None:
    """The digest does not hang on spelling, a signature does."""
    directory = make_bundle()
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=7))
    sign_bundle(directory, keys[0])
    manifest = registry.push(directory)
    check_signature(registry.open(manifest.digest), keys[1])
    path.write_text(json.dumps(json.loads(path.read_bytes())))
    sign_bundle(directory, keys[0])
    with pytest.raises(SignatureError, match=r"another spelling of manifest.json"):
        registry.push(directory)
    check_signature(registry.open(manifest.digest), keys[1])


def test_importing_it_is_light() -> None:
    code = "import sys, experts.bundles.signing; print('model_signing' in sys.modules, 'cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
