from pathlib import Path

import pytest

from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.config import Config, ContradictionError, ExpertsSection
from echovlm_ray.serving.control.bundles import open_registry, registry_location, signature_policy
from echovlm_ray.serving.deploy.preflight import check, resolve_paths
from experts.bundles.signing import SignaturePolicy, sign_bundle
from experts.errors import SignatureError
from experts.registry.registry import Registry
from tests.checkpoint.support import make_split
from tests.experts.keys import make_keys

OFF = {"port": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "split"
    make_split(golden_dir / "base" / "checkpoint", directory, organs=("breast",))
    return directory


def test_without_a_registry_the_checkpoints_own(checkpoint: Path) -> None:
    assert registry_location(ExpertsSection(), checkpoint).root == str(registry_root(checkpoint))
    digest = read_index(checkpoint).organs[0].bundle_digest
    assert open_registry(ExpertsSection(), checkpoint).open(digest).digest == digest


def test_with_one_both_are_read(checkpoint: Path, tmp_path: Path) -> None:
    section = ExpertsSection(registry=str(tmp_path / "shared"), registry_cache_bytes=1000)
    location = registry_location(section, checkpoint)
    assert (location.root, location.cache_bytes) == (str(tmp_path / "shared"), 1000)
    registry = open_registry(section, checkpoint)
    digest = read_index(checkpoint).organs[0].bundle_digest
    assert registry.open(digest).digest == digest
    assert [manifest.digest for manifest in registry.list()] == [digest]


def test_a_registry_that_cannot_be_names_the_field(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^experts.registry: .*Protocol not known"):
        open_registry(ExpertsSection(registry="nowhere://x"), checkpoint)


def test_the_policy_is_the_sections() -> None:
    section = ExpertsSection(signatures="required", public_keys=(Path("a.pub"),))
    assert signature_policy(section) == SignaturePolicy(signatures="required", public_keys=(Path("a.pub"),))


def test_signatures_that_nothing_can_have_are_a_contradiction() -> None:
    with pytest.raises(ValueError, match=r"experts.public_keys names no key") as caught:
        Config.model_validate({"experts": {"signatures": "required"}})
    error = caught.value.errors()[0]["ctx"]["error"]  # type: ignore[attr-defined]
    assert isinstance(error, ContradictionError)


def config_of(checkpoint: Path, **experts: object) -> Config:
    return Config.model_validate(
        {"model": {"checkpoint": checkpoint}, "gateway": OFF, "control": OFF, "experts": experts}
    )


def test_unsigned_bundles_are_found_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    required = config_of(checkpoint, signatures="required", public_keys=[public], registry=str(tmp_path / "shared"))
    with pytest.raises(ValueError, match=r"experts.public_keys /absent.pub is no file"):
        check(config_of(checkpoint, public_keys=["/absent.pub"]), local=True)
    with pytest.raises(SignatureError, match="is not signed, and signatures are required"):
        check(required, local=True)
    # Signed and pushed into the shared registry, the same bundle may serve.
    digest = read_index(checkpoint).organs[0].bundle_digest
    Registry(registry_root(checkpoint)).pull(digest, tmp_path / "pulled")
    sign_bundle(tmp_path / "pulled", private)
    Registry(tmp_path / "shared").push(tmp_path / "pulled")
    check(required, local=True)


def test_paths_become_absolute(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experts = resolve_paths(config_of(checkpoint, registry="shared", public_keys=["a.pub"])).experts
    assert (experts.registry, experts.public_keys) == (str(tmp_path / "shared"), (tmp_path / "a.pub",))
    assert resolve_paths(config_of(checkpoint, registry="s3://b/x")).experts.registry == "s3://b/x"
