"""The registry on a real S3 server: moto's, over HTTP."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import boto3  # type: ignore[import-untyped]
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem  # type: ignore[import-untyped]

from experts.bundles.bundle import Bundle
from experts.bundles.signing import SignaturePolicy, check_signature, sign_bundle
from experts.errors import ExpertCapacityError, InvalidBundleError, UnknownBundleError
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from experts.registry.source import RegistryLocation
from tests.experts.keys import make_keys

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    name = f"models-{uuid4().hex}"
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return name


@pytest.fixture
def location(server: str, bucket: str, tmp_path: Path) -> RegistryLocation:
    return RegistryLocation(
        root=f"s3://{bucket}/experts", options={"endpoint_url": server}, cache_directory=tmp_path / "cache"
    )


def keys_in(server: str, bucket: str) -> list[str]:
    found = boto3.client("s3", endpoint_url=server).list_objects_v2(Bucket=bucket)
    return sorted(entry["Key"] for entry in found.get("Contents", []))


def test_push_find_list_open(
    location: RegistryLocation, server: str, bucket: str, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    directory = make_bundle()
    registry = location.open()
    assert registry.list() == []
    manifest = registry.push(directory)
    before = keys_in(server, bucket)
    assert before == sorted(
        [
            "experts/bundles/breast/1.0.0/manifest.json",
            *(f"experts/files/{entry.sha256}.safetensors" for entry in manifest.files),
        ]
    )
    assert registry.push(directory) == manifest
    assert keys_in(server, bucket) == before
    # Another reader, which has not seen the push.
    other = location.open()
    assert other.list() == [manifest]
    assert other.find("breast", "1.0.0") == manifest
    other.open(manifest.digest).verify(finite=True)
    other.pull(manifest.digest, tmp_path / "pulled")
    assert Bundle.open(tmp_path / "pulled").digest == manifest.digest
    with pytest.raises(UnknownBundleError, match=r"it has 1.0.0"):
        other.find("breast", "2.0.0")


def test_the_endpoint_may_come_from_the_environment(
    bucket: str, server: str, make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    registry = Registry(f"s3://{bucket}/from-environment", cache_directory=tmp_path / "cache")
    assert registry.list() == []
    digest = registry.push(make_bundle()).digest
    registry.open(digest).verify()


def test_a_group_loads_from_it(location: RegistryLocation, make_bundle: MakeBundle, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    directory = make_bundle()
    sign_bundle(directory, private)
    digest = location.open().push(directory).digest
    policy = SignaturePolicy(signatures="required", public_keys=(public,))
    group = ExpertGroup(
        "breast",
        location.open(),
        get_kernel("reference"),
        device="cpu",
        max_resident_bytes=10**8,
        admit=policy.admit,
    )
    assert group.load(digest).version == "1.0.0"
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_versions_are_immutable(location: RegistryLocation, make_bundle: MakeBundle) -> None:
    first = location.open().push(make_bundle("one"))
    with pytest.raises(InvalidBundleError, match=r"another bundle of breast 1.0.0.*raise the version"):
        location.open().push(make_bundle("two", seed=1))
    assert location.open().list() == [first]


def test_two_pushes_at_once(location: RegistryLocation, make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Of different bundles of one version, each signed: one wins, and its signature is its own."""
    private, public = make_keys(tmp_path)
    directories = [make_bundle(f"bundle{seed}", seed=seed) for seed in range(4)]
    for directory in directories:
        sign_bundle(directory, private)

    def push(directory: Path) -> str | None:
        try:
            return location.open().push(directory).digest
        except InvalidBundleError:
            return None

    with ThreadPoolExecutor(4) as pool:
        winners = [digest for digest in pool.map(push, directories) if digest]
    assert len(winners) == 1
    bundle = location.open().open(winners[0])
    bundle.verify()
    check_signature(bundle, public)


@pytest.mark.parametrize("stop_at", ["put_file", "pipe_file"])
def test_a_push_killed_half_way_is_invisible(
    stop_at: str, location: RegistryLocation, make_bundle: MakeBundle, server: str, bucket: str
) -> None:
    """Killed before the second file, and before the manifest."""
    directory = make_bundle()
    code = f"""
import os, signal
from pathlib import Path
from s3fs import S3FileSystem
from experts.registry.source import RegistryLocation
original, calls = S3FileSystem.{stop_at}, []
def stop(self, *arguments, **options):
    calls.append(1)
    if {stop_at!r} == "pipe_file" or len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **options)
S3FileSystem.{stop_at} = stop
RegistryLocation.model_validate_json({location.model_dump_json()!r}).open().push(Path({str(directory)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(keys_in(server, bucket)) == (1 if stop_at == "put_file" else 2), "killed at another moment than meant"
    registry = location.open()
    assert registry.list() == []
    with pytest.raises(UnknownBundleError, match="it has no bundles at all"):
        registry.find("breast", "1.0.0")
    manifest = registry.push(directory)
    registry.open(manifest.digest).verify()


def test_what_was_changed_in_the_bucket_is_refused(
    location: RegistryLocation, make_bundle: MakeBundle, server: str, bucket: str, tmp_path: Path
) -> None:
    manifest = location.open().push(make_bundle())
    key = f"experts/files/{manifest.files[0].sha256}.safetensors"
    client = boto3.client("s3", endpoint_url=server)
    content = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(Bucket=bucket, Key=key, Body=content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InvalidBundleError, match=r"experts.safetensors: is damaged"):
        location.open().open(manifest.digest)
    client.delete_object(Bucket=bucket, Key=key)
    with pytest.raises(InvalidBundleError, match="missing in the registry"):
        location.open().open(manifest.digest)


def rot(path: Path) -> None:
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_copy_that_rots_is_fetched_once_more(
    location: RegistryLocation, make_bundle: MakeBundle, server: str, bucket: str, tmp_path: Path
) -> None:
    manifest = location.open().push(make_bundle())
    experts = next(entry for entry in manifest.files if entry.path == "experts.safetensors")
    bundle = location.open().open(manifest.digest)
    weights = bundle.load_layer(0)
    copy = bundle.locations[experts.path]
    good = copy.read_bytes()
    rot(copy)
    # Also when it rots after a first look at it.
    bundle.verify()
    assert copy.read_bytes() == good
    assert bundle.load_layer(0).down_EDF.equal(weights.down_EDF)

    rot(copy)
    boto3.client("s3", endpoint_url=server).delete_object(
        Bucket=bucket, Key=f"experts/files/{experts.sha256}.safetensors"
    )
    with pytest.raises(InvalidBundleError, match="missing in the registry"):
        location.open().open(manifest.digest).verify()
    assert not copy.exists()


def test_the_cache_has_a_limit(location: RegistryLocation, make_bundle: MakeBundle) -> None:
    manifest = location.open().push(make_bundle())
    small = location.model_copy(update={"cache_bytes": manifest.size_bytes - 1})
    with pytest.raises(ExpertCapacityError, match="registry_cache_bytes"):
        small.open().open(manifest.digest)


def test_fallbacks(location: RegistryLocation, make_bundle: MakeBundle, tmp_path: Path) -> None:
    """A checkpoint's own registry is read besides; what it has need not be fetched; pushes never go there."""
    own = Registry(tmp_path / "own")
    both, only_own = make_bundle("both"), make_bundle("own-only", organ="liver")
    first, second = own.push(both), own.push(only_own)
    layered = location.model_copy(update={"fallbacks": (str(tmp_path / "own"),)})
    registry = layered.open()
    assert registry.list() == [first, second]
    assert registry.find("liver", "1.0.0") == second
    registry.open(second.digest).verify()
    registry.push(both)
    registry.open(first.digest).verify()
    assert not (tmp_path / "cache").exists(), "nothing was fetched"
    third = registry.push(make_bundle("new", version="2.0.0", seed=1))
    registry.open(third.digest).verify()
    assert (tmp_path / "cache").exists()
    assert [manifest.version for manifest in own.list("breast")] == ["1.0.0"]
    with pytest.raises(InvalidBundleError, match="another bundle of liver"):
        registry.push(make_bundle("clash", organ="liver", seed=5))
    with pytest.raises(UnknownBundleError, match=r"\(nor .*own\) has no bundle"):
        registry.open("0" * 64)


def test_a_server_that_is_not_there(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default is to try again for a quarter of a minute.
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    registry = Registry(
        f"s3://{bucket}/experts", options={"endpoint_url": "http://127.0.0.1:9"}, cache_directory=tmp_path / "cache"
    )
    code = "import socket; s=socket.socket(); print(s.connect_ex(('127.0.0.1', 9)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout != "0\n"
    with pytest.raises(OSError, match=r"cannot be reached|Could not connect|127.0.0.1:9"):
        registry.list()


def test_a_file_system_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="Protocol not known"):
        Registry("nowhere://x")
