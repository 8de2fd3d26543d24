"""With a missing, unreadable or damaged registry, cached bundles still load, and damaged ones never do."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.bundles.bundle import Bundle
from experts.bundles.manifest import Manifest
from experts.errors import InvalidBundleError, RegistryUnavailableError, SignatureError, UnknownBundleError
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.kept_bundles import KEPT_PER_ORGAN, KeptBundles
from experts.registry.registry import Registry

MakeBundle = Callable[..., Path]


@pytest.fixture
def kept(registry: Registry, tmp_path: Path) -> KeptBundles:
    return KeptBundles(registry, tmp_path / "state" / "kept")


def loaded(kept: KeptBundles, digest: str) -> ExpertGroup:
    group = ExpertGroup("breast", kept, get_kernel("reference"), device="cpu", max_resident_bytes=10**8)
    group.load(digest)
    return group


def weights_of(kept: KeptBundles) -> Path:
    (path,) = kept.directory.glob("*/experts.safetensors")
    return path


def damage(path: Path, keep_size: bool = True) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.chmod(0o600)
    path.write_bytes(bytes(content) if keep_size else bytes(content[:-40]))


def gone(registry: Registry) -> None:
    shutil.rmtree(registry.root)


def truncated(registry: Registry) -> None:
    for path in Path(registry.root).glob("files/*"):
        path.chmod(0o600)
        os.truncate(path, 100)


def manifests_lost(registry: Registry) -> None:
    shutil.rmtree(Path(registry.root) / "bundles")


@pytest.mark.parametrize("harm", [gone, truncated, manifests_lost])
def test_what_was_loaded_once_loads_again_whatever_became_of_the_registry(
    registry: Registry, pushed: Manifest, kept: KeptBundles, harm: Callable[[Registry], None]
) -> None:
    loaded(kept, pushed.digest)
    harm(registry)
    again = KeptBundles(Registry(registry.root), kept.directory)
    (resident,) = loaded(again, pushed.digest).resident()
    assert (resident.digest, resident.version) == (pushed.digest, "1.0.0")
    assert again.manifest(pushed.digest) == pushed
    assert again.open_gates(pushed.digest).gate_ED(1).shape == (3, 16)


def test_what_is_resident_does_not_change_when_the_registrys_file_is_truncated(
    registry: Registry, pushed: Manifest, kept: KeptBundles
) -> None:
    group = loaded(kept, pushed.digest)
    x_TD, index_TK, weight_TK = torch.ones(2, 16), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    before = group.forward(pushed.digest, 1, x_TD, index_TK, weight_TK)
    truncated(registry)
    assert torch.equal(group.forward(pushed.digest, 1, x_TD, index_TK, weight_TK), before)


def test_copies_are_their_users_alone(pushed: Manifest, kept: KeptBundles) -> None:
    kept.open(pushed.digest)
    for path in [kept.directory, *kept.directory.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.parametrize("keep_size", [True, False])
def test_a_damaged_copy_is_fetched_again(pushed: Manifest, kept: KeptBundles, keep_size: bool) -> None:
    loaded(kept, pushed.digest)
    damage(weights_of(kept), keep_size)
    bundle = kept.open(pushed.digest)
    bundle.verify()
    Bundle.open(weights_of(kept).parent).verify()


@pytest.mark.parametrize("keep_size", [True, False])
def test_a_damaged_copy_is_refused_where_the_registry_is_gone(
    registry: Registry, pushed: Manifest, kept: KeptBundles, keep_size: bool
) -> None:
    loaded(kept, pushed.digest)
    damage(weights_of(kept), keep_size)
    gone(registry)
    with pytest.raises((InvalidBundleError, UnknownBundleError), match=r"the registry .* has no bundle"):
        loaded(kept, pushed.digest)


def test_damaged_gate_rows_are_fetched_again_or_refused(
    registry: Registry, pushed: Manifest, kept: KeptBundles
) -> None:
    expected = registry.open(pushed.digest).gate_ED(0)
    kept.open_gates(pushed.digest)
    assert not list(kept.directory.glob("*/experts*")), "a router needs no experts"
    (gates,) = kept.directory.glob("*/gate.safetensors")
    damage(gates)
    assert torch.equal(kept.open_gates(pushed.digest).gate_ED(0), expected)
    damage(gates)
    gone(registry)
    with pytest.raises(InvalidBundleError, match=r"gate\.safetensors: its copy in .* is damaged, and the registry"):
        kept.open_gates(pushed.digest)


def test_a_copy_under_another_bundles_name_is_not_used(
    registry: Registry, pushed: Manifest, kept: KeptBundles, make_bundle: MakeBundle
) -> None:
    other = registry.push(make_bundle("other", seed=1, version="2.0.0"))
    kept.open(pushed.digest)
    (kept.directory / pushed.digest).rename(kept.directory / other.digest)
    assert kept.open(other.digest).manifest == other
    gone(registry)
    with pytest.raises(UnknownBundleError):
        kept.open(pushed.digest)


def test_a_damaged_file_of_the_registry_leaves_no_copy(registry: Registry, pushed: Manifest, kept: KeptBundles) -> None:
    for path in Path(registry.root).glob("files/*"):
        damage(path)
    with pytest.raises(InvalidBundleError, match="is damaged"):
        kept.open(pushed.digest)
    assert not list(kept.directory.glob("*/*.safetensors"))
    assert not list(kept.directory.glob("*/.*.partial"))


def test_few_versions_are_kept_and_those_in_use_always(
    registry: Registry, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    pushed = [registry.push(make_bundle(f"b{seed}", seed=seed, version=f"1.0.{seed}")) for seed in range(6)]
    kept = KeptBundles(registry, tmp_path / "kept", in_use=lambda: {pushed[0].digest})
    for age, manifest in enumerate(pushed):
        kept.open(manifest.digest)
        os.utime(kept.directory / manifest.digest, (age, age))
    found = {path.name for path in kept.directory.iterdir()}
    assert found == {manifest.digest for manifest in (pushed[0], *pushed[-2:])}
    assert len(found) == KEPT_PER_ORGAN


def test_manifests_alone_crowd_out_no_copy(registry: Registry, tmp_path: Path, make_bundle: MakeBundle) -> None:
    pushed = [registry.push(make_bundle(f"b{seed}", seed=seed, version=f"1.0.{seed}")) for seed in range(6)]
    kept = KeptBundles(registry, tmp_path / "kept")
    kept.open(pushed[0].digest)
    for manifest in pushed[1:5]:
        kept.manifest(manifest.digest)
    kept.open(pushed[5].digest)
    gone(registry)
    kept.open(pushed[0].digest).verify()
    assert kept.manifest(pushed[2].digest) == pushed[2]


def test_other_organs_copies_are_not_counted(registry: Registry, kept: KeptBundles, make_bundle: MakeBundle) -> None:
    first = registry.push(make_bundle("liver", organ="liver"))
    kept.open(first.digest)
    for seed in range(4):
        kept.open(registry.push(make_bundle(f"b{seed}", seed=seed, version=f"1.0.{seed}")).digest)
    assert (kept.directory / first.digest).is_dir()


def test_a_full_disk_takes_the_registrys_own(
    registry: Registry, pushed: Manifest, kept: KeptBundles, caplog: pytest.LogCaptureFixture
) -> None:
    # No folder can be made below a file.
    kept.directory.parent.mkdir()
    kept.directory.write_text("in the way")
    bundle = kept.open(pushed.digest)
    bundle.verify()
    assert Path(registry.root) in bundle.locations["experts.safetensors"].parents
    assert "cannot be loaded while the registry is unavailable" in caplog.text


class Unreadable:
    """A registry whose file system refuses."""

    root = "s3://models/experts"

    def open(self, digest: str) -> Bundle:
        raise PermissionError(13, "Permission denied")

    def manifest(self, digest: str) -> Manifest:
        raise PermissionError(13, "Permission denied")


def test_an_unreadable_registry_is_named_with_the_reason(tmp_path: Path) -> None:
    kept = KeptBundles(Unreadable(), tmp_path / "kept")
    for read in (kept.open, kept.open_gates, kept.manifest, kept.look):
        with pytest.raises(RegistryUnavailableError, match=r"s3://models/experts cannot be read: Permission denied"):
            read("0" * 64)


def test_a_bundle_that_was_signed_later_is_admitted(registry: Registry, pushed: Manifest, tmp_path: Path) -> None:
    def admit(bundle: Bundle) -> None:
        if bundle.signature != b"good":
            raise SignatureError("it is not signed")

    strict = KeptBundles(registry, tmp_path / "kept", admit=admit)
    KeptBundles(registry, tmp_path / "kept").open(pushed.digest)
    assert strict.open(pushed.digest).signature is None, "the group refuses it, and says why"
    signature = Path(registry.root) / "bundles" / "breast" / "1.0.0" / f"{pushed.digest}.sig"
    signature.write_bytes(b"good")
    assert strict.open(pushed.digest).signature == b"good"
    gone(registry)
    assert strict.open(pushed.digest).signature == b"good"
