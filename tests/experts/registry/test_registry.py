import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch

from experts.bundles.bundle import Bundle
from experts.bundles.writer import derive_bundle
from experts.errors import InvalidBundleError, UnknownBundleError
from experts.registry.registry import Registry
from experts.registry.store import RemoteStore

MakeBundle = Callable[..., Path]


@pytest.fixture(params=["local", "memory"])
def any_registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    if request.param == "local":
        yield Registry(tmp_path / "registry")
        return
    root = f"memory://{uuid4().hex}/experts"
    yield Registry(root, cache_directory=tmp_path / "cache")
    filesystem, path = fsspec.core.url_to_fs(root)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def files_of(registry_root: Path) -> list[str]:
    return sorted(str(path.relative_to(registry_root)) for path in registry_root.rglob("*") if path.is_file())


def test_what_is_pushed_is_found(any_registry: Registry, make_bundle: MakeBundle) -> None:
    directory = make_bundle()
    pushed = any_registry.push(directory)
    assert any_registry.find("breast", "1.0.0") == pushed
    assert any_registry.list() == [pushed]
    bundle = any_registry.open(pushed.digest)
    bundle.verify(finite=True)
    assert bundle.digest == pushed.digest
    assert torch.equal(bundle.load_layer(1).gate_EFD, Bundle.open(directory).load_layer(1).gate_EFD)
    # And by a reader that has not seen the push.
    again = Registry(any_registry.root, cache_directory=any_registry_cache(any_registry))
    assert again.open(pushed.digest).manifest == pushed


def any_registry_cache(registry: Registry) -> Path | None:
    return registry._store._cache.directory if isinstance(registry._store, RemoteStore) else None


def test_pushing_again_changes_nothing(registry: Registry, make_bundle: MakeBundle) -> None:
    directory = make_bundle()
    first = registry.push(directory)
    root = Path(registry.root)
    before = {name: (root / name).stat() for name in files_of(root)}
    assert registry.push(directory) == first
    assert {name: (root / name).stat() for name in files_of(root)} == before


def test_the_layout_is_by_digest(registry: Registry, make_bundle: MakeBundle) -> None:
    manifest = registry.push(make_bundle())
    assert files_of(Path(registry.root)) == sorted(
        ["bundles/breast/1.0.0/manifest.json", *(f"files/{entry.sha256}.safetensors" for entry in manifest.files)]
    )


def test_versions_are_immutable(any_registry: Registry, make_bundle: MakeBundle) -> None:
    first = any_registry.push(make_bundle("one"))
    with pytest.raises(InvalidBundleError, match=r"another bundle of breast 1.0.0.*raise the version"):
        any_registry.push(make_bundle("two", seed=1))
    assert any_registry.list() == [first]


def test_listing_is_by_organ_and_version(any_registry: Registry, make_bundle: MakeBundle) -> None:
    for index, (organ, version) in enumerate([("liver", "1.10.0"), ("liver", "1.9.0"), ("breast", "2.0.0")]):
        any_registry.push(make_bundle(f"bundle{index}", organ=organ, version=version))
    found = [(manifest.organ, manifest.version) for manifest in any_registry.list()]
    assert found == [("breast", "2.0.0"), ("liver", "1.9.0"), ("liver", "1.10.0")]
    assert [manifest.version for manifest in any_registry.list("liver")] == ["1.9.0", "1.10.0"]
    assert any_registry.list("thyroid") == []


def test_what_is_not_there_is_named(any_registry: Registry, make_bundle: MakeBundle) -> None:
    with pytest.raises(UnknownBundleError, match="no bundle with the digest"):
        any_registry.open("0" * 64)
    any_registry.push(make_bundle())
    with pytest.raises(UnknownBundleError, match=r"it has 1.0.0"):
        any_registry.find("breast", "3.0.0")
    with pytest.raises(UnknownBundleError, match="it has none of it, and bundles of breast"):
        any_registry.find("../../etc", "../passwd")
    with pytest.raises(UnknownBundleError):
        any_registry.open("../../etc/passwd")


def test_copies_are_stored_once(registry: Registry, make_bundle: MakeBundle, tmp_path: Path) -> None:
    source = Bundle.open(make_bundle())
    registry.push(tmp_path / "bundle")
    organs = ["gynaecology", "heart", "kidney", "liver", "thyroid", "vessel"]
    for organ in organs:
        derive_bundle(tmp_path / organ, source, {"organ": organ})
        registry.push(tmp_path / organ)
    root = Path(registry.root)
    assert len(list((root / "files").iterdir())) == 2
    assert len({manifest.digest for manifest in registry.list()}) == 7
    inodes = {
        os.stat(registry.open(manifest.digest).locations["experts.safetensors"]).st_ino for manifest in registry.list()
    }
    assert len(inodes) == 1


def test_linking_takes_no_room_and_copying_is_independent(registry: Registry, make_bundle: MakeBundle) -> None:
    linked = registry.push(make_bundle("linked", version="1.0.0"), link=True)
    copied = registry.push(make_bundle("copied", version="2.0.0", seed=1))
    for name, manifest, same in (("linked", linked, True), ("copied", copied, False)):
        stored = registry.open(manifest.digest).locations["experts.safetensors"]
        assert os.path.samefile(stored, Path(registry.root).parent / name / "experts.safetensors") is same
        # Owners write where they may; others at least get an error.
        assert stored.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("link", [False, True])
def test_a_damaged_bundle_is_not_pushed(link: bool, any_registry: Registry, make_bundle: MakeBundle) -> None:
    directory = make_bundle()
    content = bytearray((directory / "experts.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "experts.safetensors").write_bytes(content)
    with pytest.raises(InvalidBundleError, match=r"experts.safetensors: is damaged"):
        any_registry.push(directory, link=link)
    assert any_registry.list() == []


def test_a_known_file_does_not_hide_a_damaged_source(registry: Registry, make_bundle: MakeBundle) -> None:
    directory = make_bundle()
    registry.push(directory)
    shutil.rmtree(Path(registry.root) / "bundles")
    content = bytearray((directory / "gate.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "gate.safetensors").write_bytes(content)
    with pytest.raises(InvalidBundleError, match=r"gate.safetensors: is damaged"):
        registry.push(directory)


def test_two_pushes_at_once_of_the_same(any_registry: Registry, make_bundle: MakeBundle) -> None:
    directory = make_bundle()
    with ThreadPoolExecutor(8) as pool:
        manifests = list(pool.map(any_registry.push, [directory] * 16))
    assert len({manifest.digest for manifest in manifests}) == 1
    any_registry.open(manifests[0].digest).verify()


def test_two_pushes_at_once_of_different_bundles(any_registry: Registry, make_bundle: MakeBundle) -> None:
    directories = [make_bundle(f"bundle{seed}", seed=seed) for seed in range(8)]

    def push(directory: Path) -> str | None:
        try:
            return any_registry.push(directory).digest
        except InvalidBundleError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [digest for digest in pool.map(push, directories) if digest]
    assert winners == [any_registry.find("breast", "1.0.0").digest]


def test_a_push_killed_half_way_is_invisible_and_harmless(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """The process is killed in the middle of copying the experts, and again before the manifest has its name."""
    directory, root = make_bundle(), tmp_path / "registry"
    for stop_at in ("copy_checked", "os.link"):
        code = f"""
import os, signal
from pathlib import Path
import experts.registry.store as store
def stop(*arguments, **options):
    if {stop_at!r} == "copy_checked":
        arguments[1].write(b"half"); arguments[1].flush()
    os.kill(os.getpid(), signal.SIGKILL)
store.{stop_at} = stop
from experts.registry.registry import Registry
Registry({str(root)!r}).push(Path({str(directory)!r}))
"""
        killed = subprocess.run([sys.executable, "-c", code], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert any(path.endswith(".partial") for path in files_of(root)), "it was killed too early to prove anything"
        registry = Registry(root)
        assert registry.list() == []
        with pytest.raises(UnknownBundleError, match="it has no bundles at all"):
            registry.find("breast", "1.0.0")
    manifest = registry.push(directory)
    registry.open(manifest.digest).verify()
    assert registry.list() == [manifest]


def test_half_an_upload_is_replaced(make_bundle: MakeBundle, tmp_path: Path) -> None:
    root = f"memory://{uuid4().hex}"
    registry = Registry(root, cache_directory=tmp_path / "cache")
    directory = make_bundle()
    entry = Bundle.open(directory).manifest.files[0]
    filesystem, path = fsspec.core.url_to_fs(root)
    filesystem.pipe_file(f"{path}/files/{entry.sha256}.safetensors", b"half")
    registry.open(registry.push(directory).digest).verify()


def test_fetched_files_are_checked_and_kept(make_bundle: MakeBundle, tmp_path: Path) -> None:
    root = f"memory://{uuid4().hex}"
    cache = tmp_path / "cache"
    registry = Registry(root, cache_directory=cache)
    manifest = registry.push(make_bundle())
    filesystem, path = fsspec.core.url_to_fs(root)
    entry = manifest.files[0]
    remote = f"{path}/files/{entry.sha256}.safetensors"
    content = filesystem.cat_file(remote)

    filesystem.pipe_file(remote, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InvalidBundleError, match=r"experts.safetensors: is damaged"):
        registry.open(manifest.digest)
    filesystem.pipe_file(remote, content + b"x")
    with pytest.raises(InvalidBundleError, match=r"experts.safetensors: is damaged"):
        registry.open(manifest.digest)
    assert list(cache.glob("*.safetensors")) == list(cache.glob(".*.partial")) == []

    filesystem.pipe_file(remote, content)
    registry.open(manifest.digest).verify()
    filesystem.rm_file(remote)
    # From the cache now.
    registry.open(manifest.digest).verify()
    assert sorted(file.name for file in cache.glob("*.safetensors")) == sorted(
        f"{entry.sha256}.safetensors" for entry in manifest.files
    )
    shutil.rmtree(cache)
    with pytest.raises(InvalidBundleError, match="missing in the registry"):
        registry.open(manifest.digest)


def test_a_damaged_neighbour_hides_nothing_that_is_asked_for_by_digest(
    registry: Registry, make_bundle: MakeBundle
) -> None:
    manifest = registry.push(make_bundle())
    neighbour = Path(registry.root) / "bundles" / "aorta" / "1.0.0"
    neighbour.mkdir(parents=True)
    (neighbour / "manifest.json").write_text("{")
    assert Registry(registry.root).open(manifest.digest).digest == manifest.digest
    with pytest.raises(InvalidBundleError, match=r"aorta/1.0.0/manifest.json"):
        registry.list()


def test_a_manifest_in_another_ones_place_is_refused(registry: Registry, make_bundle: MakeBundle) -> None:
    registry.push(make_bundle())
    bundles = Path(registry.root) / "bundles"
    shutil.copytree(bundles / "breast", bundles / "liver")
    with pytest.raises(InvalidBundleError, match="changed by hand"):
        registry.find("liver", "1.0.0")


def test_a_registry_replaced_under_its_reader_is_read_anew(registry: Registry, make_bundle: MakeBundle) -> None:
    old = registry.push(make_bundle("old"))
    shutil.rmtree(registry.root)
    new = Registry(registry.root).push(make_bundle("new", seed=1))
    assert registry.open(new.digest).digest == new.digest
    with pytest.raises(UnknownBundleError):
        registry.open(old.digest)


@pytest.mark.parametrize("damage", ["missing", "short", "link"])
def test_missing_files_are_found_at_opening(damage: str, registry: Registry, make_bundle: MakeBundle) -> None:
    manifest = registry.push(make_bundle())
    stored = registry.open(manifest.digest).locations["gate.safetensors"]
    content = stored.read_bytes()
    stored.unlink()
    if damage == "short":
        stored.write_bytes(content[:-1])
    if damage == "link":
        stored.with_suffix(".real").write_bytes(content)
        stored.symlink_to(stored.with_suffix(".real"))
    with pytest.raises(InvalidBundleError, match=r"gate.safetensors"):
        registry.open(manifest.digest)
