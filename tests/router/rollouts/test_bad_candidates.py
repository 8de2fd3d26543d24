"""P5 with real expert groups and a real registry: a bad candidate never displaces the incumbent."""

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from experts.bundles.digest import canonical_json
from experts.bundles.layout import expected_tensors
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle
from experts.errors import InvalidBundleError
from experts.group import ExpertGroup
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.controller import RolloutController
from router.rollouts.database import Database
from router.rollouts.fleet import ReplicaResidents
from router.rollouts.health import HealthMonitor
from router.rollouts.operations import RolloutOperations
from router.rollouts.records import Rollout
from router.rollouts.settings import RolloutPlan
from router.rollouts.states import State
from router.rollouts.store import RolloutStore
from tests.router.rollouts.support import QUICK, settle

BACKBONE = "b" * 64
LIMIT_BYTES = 100_000


class GroupFleet:
    """Two real expert groups of one organ, in this process."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.groups = {
            name: ExpertGroup(
                "heart",
                registry,
                get_kernel("reference"),
                device="cpu",
                max_resident_bytes=LIMIT_BYTES,
                backbone_digest=BACKBONE,
            )
            for name in ("heart-1", "heart-2")
        }
        self.delay_s = 0.0

    def replicas(self, organ: str) -> Sequence[str]:
        return list(self.groups) if organ == "heart" else []

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        residents = self.groups[replica].resident()
        return ReplicaResidents({each.digest: each.resident_bytes for each in residents}, LIMIT_BYTES)

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        time.sleep(self.delay_s)
        self.groups[replica].load(digest)

    def unload(self, replica: str, organ: str, digest: str) -> None:
        self.groups[replica].unload(digest)

    def load_bytes(self, organ: str, digest: str) -> int:
        manifest = self.registry.open(digest).manifest
        return manifest.num_expert_parameters * manifest.torch_dtype.itemsize

    def pinned(self) -> Collection[str]:
        return ()

    def held(self) -> list[list[str]]:
        return [[each.digest for each in group.resident()] for group in self.groups.values()]


class BundleVerifier:
    """The registry's own checks."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def verify(self, organ: str, digest: str) -> None:
        bundle = self.registry.open(digest)
        if bundle.manifest.backbone_digest != BACKBONE:
            raise InvalidBundleError("it was trained against another backbone")
        bundle.verify(finite=True)


class TrustingVerifier:
    """Lets everything through, so that the replicas must refuse what is bad."""

    def verify(self, organ: str, digest: str) -> None:
        return


@dataclass
class Ward:
    folder: Path
    registry: Registry
    fleet: GroupFleet
    store: RolloutStore
    operations: RolloutOperations
    incumbent: str
    before: list[torch.Tensor]

    def push(self, version: str, *, poison: str = "", **changes: object) -> str:
        return push(self.registry, self.folder / version, version, poison=poison, **changes)

    def file_of(self, digest: str, index: int = 0) -> Path:
        return list(self.registry.open(digest).locations.values())[index]

    def answers(self) -> list[torch.Tensor]:
        return answers(self.fleet, self.incumbent)

    def roll_out(self, digest: str, *, trusting: bool = False, plan: RolloutPlan | None = None) -> Rollout:
        verifier = TrustingVerifier() if trusting else BundleVerifier(self.registry)
        controller = RolloutController(self.store, self.fleet, verifier, QUICK, HealthMonitor())
        self.operations.stage("heart", digest, actor="ann", plan=plan or RolloutPlan(promote=True))
        deadline = time.monotonic() + 20
        while self.store.snapshot().in_flight:
            controller.reconcile_once()
            assert time.monotonic() < deadline
            # While all this goes on, the incumbent answers as ever.
            assert all(map(torch.equal, self.answers(), self.before))
            time.sleep(0.002)
        settle(controller)
        return self.store.rollouts("heart", limit=1)[0]


def push(registry: Registry, directory: Path, version: str, *, poison: str = "", **changes: object) -> str:
    fields: dict[str, object] = {
        "name": "heart experts",
        "organ": "heart",
        "version": version,
        "description": "for tests",
        "authors": "the tests",
        "license": "Apache-2.0",
        "intended_use": "tests only",
        "backbone_digest": BACKBONE,
        "num_layers": 2,
        "num_experts": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "dtype": "float32",
    }
    description = BundleDescription.model_validate({**fields, **changes})
    generator = torch.Generator().manual_seed(int(version[0]))
    tensors = {
        name: (torch.randn(shape, generator=generator) / 4).to(dtype)
        for name, (dtype, shape) in expected_tensors(description).items()
    }
    if poison:
        next(iter(tensors.values())).view(-1)[5] = float(poison)
    write_bundle(directory, description, tensors.__getitem__)
    return registry.push(directory).digest


def answers(fleet: GroupFleet, digest: str) -> list[torch.Tensor]:
    x_TD = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)
    expert_index_TK = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]], dtype=torch.int32)
    return [
        group.forward(digest, layer, x_TD, expert_index_TK, torch.full((4, 2), 0.5))
        for group in fleet.groups.values()
        for layer in range(2)
    ]


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    registry = Registry(tmp_path / "registry")
    incumbent = push(registry, tmp_path / "first", "1.0.0")
    fleet = GroupFleet(registry)
    for replica in fleet.groups:
        fleet.load(replica, "heart", incumbent, 1)
    database = Database(f"sqlite:///{tmp_path}/rollouts.db")
    store = RolloutStore(database)
    member = ExpertSetMember(organ="heart", bundle_digest=incumbent)
    store.adopt(ExpertSet(backbone_digest=BACKBONE, routing="organs", members=(member,)), actor="start")
    operations = RolloutOperations(store, fleet, QUICK)
    yield Ward(tmp_path, registry, fleet, store, operations, incumbent, answers(fleet, incumbent))
    database.close()


def corrupt(ward: Ward) -> str:
    digest = ward.push("2.0.0")
    with ward.file_of(digest).open("r+b") as file:
        file.seek(-7, 2)
        file.write(b"\x42")
    return digest


def truncated(ward: Ward) -> str:
    digest = ward.push("2.0.0")
    with ward.file_of(digest).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    return digest


def gone(ward: Ward) -> str:
    digest = ward.push("2.0.0")
    ward.file_of(digest).unlink()
    return digest


def wrong_shape(ward: Ward) -> str:
    """A manifest, with a digest of its own, that claims another size than its files have."""
    digest = ward.push("2.0.0")
    path = next(iter((ward.folder / "registry" / "bundles" / "heart" / "2.0.0").glob("manifest.json")))
    manifest = {**json.loads(path.read_text()), "intermediate_size": 28}
    path.chmod(0o644)
    path.write_bytes(canonical_json(manifest))
    (changed,) = [each.digest for each in ward.registry.list("heart") if each.version == "2.0.0"]
    assert changed != digest
    return changed


BAD: dict[str, tuple[Callable[[Ward], str], str]] = {
    "corrupt": (corrupt, "SHA-256|digest"),
    "truncated": (truncated, "bytes"),
    "gone": (gone, "named by the manifest and missing"),
    "wrong shape": (wrong_shape, "shape"),
    "wrong backbone": (lambda ward: ward.push("2.0.0", backbone_digest="c" * 64), "against (another|the) backbone"),
    "unknown": (lambda ward: "d" * 64, "has no bundle with the digest"),
}


@pytest.mark.parametrize("trusting", [False, True], ids=["by the verifier", "by the replicas"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_is_refused(ward: Ward, name: str, trusting: bool) -> None:
    make, words = BAD[name]
    check_refused(ward, ward.roll_out(make(ward), trusting=trusting), words)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused(ward: Ward, value: str) -> None:
    check_refused(ward, ward.roll_out(ward.push("2.0.0", poison=value)), "finite|not a number|NaN|infinite")


def test_a_bundle_that_is_too_large_is_refused_and_a_dry_run_says_so_before(ward: Ward) -> None:
    large = ward.push("2.0.0", intermediate_size=600)
    memory = ward.operations.stage("heart", large, actor="ann", dry_run=True).memory
    assert [(each.limit_bytes, each.fits) for each in memory] == [(LIMIT_BYTES, False)] * 2
    assert memory[0].needed_bytes == 2 * 3 * 3 * 16 * 600 * 4
    check_refused(ward, ward.roll_out(large), "above the limit max_resident_bytes = 100000")


def test_a_bundle_that_is_slow_to_warm_is_refused(ward: Ward) -> None:
    ward.fleet.delay_s = 0.4
    rollout = ward.roll_out(ward.push("2.0.0"), plan=RolloutPlan(promote=True, warm_timeout_s=0.15))
    time.sleep(0.4)
    controller = RolloutController(ward.store, ward.fleet, TrustingVerifier(), QUICK, HealthMonitor())
    settle(controller)
    check_refused(ward, rollout, "slow to warm")


def test_a_good_bundle_is_promoted_and_the_old_one_unloaded(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = ward.push("2.0.0")
    # The incumbent answers until then; afterwards nothing pins it here.
    monkeypatch.setattr(ward.fleet, "pinned", lambda: [ward.incumbent])
    rollout = ward.roll_out(digest)
    assert rollout.state == State.STABLE
    assert ward.fleet.held() == [[ward.incumbent, digest]] * 2
    monkeypatch.undo()
    settle(RolloutController(ward.store, ward.fleet, TrustingVerifier(), QUICK, HealthMonitor()))
    assert ward.fleet.held() == [[digest]] * 2


def check_refused(ward: Ward, rollout: Rollout, words: str) -> None:
    assert rollout.state == State.FAILED
    assert re.search(words, rollout.reason), rollout.reason
    assert ward.store.history("heart")[-1].reason == rollout.reason
    assert ward.store.policy().stable.bundle_digest("heart") == ward.incumbent
    assert ward.fleet.held() == [[ward.incumbent]] * 2
    assert all(map(torch.equal, ward.answers(), ward.before))
    assert ward.store.verify_history().intact
