"""P5 on the running system: a bad candidate changes no answer of the incumbent, and the reason is shown."""

import itertools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from echovlm_ray.checkpoint.layout import registry_root
from echovlm_ray.client.control import ExpertControlClient
from echovlm_ray.client.errors import EchoVLMError, FailedPreconditionError, InvalidRequestError, UnavailableError
from experts.bundles.bundle import Bundle
from experts.bundles.layout import expected_tensors
from experts.bundles.manifest import BundleDescription
from experts.bundles.writer import write_bundle
from protos import control_pb2
from tests.experts.bad_bundles import BAD_BUNDLES, SMALL
from tests.faults.candidates import LIMIT_BYTES, OVERFLOWS, REFUSED, REFUSED_BY_SETTING, Workshop
from tests.live_rollouts import WHO, Answered, ask, bundle_of, held, in_state, kill, load, pids_of, rollout_of, until
from tests.running_system import RunningSystem, running

ORGAN = "thyroid"
MIN_REQUESTS = 4
# What a process may keep of what it gave back: the allocator's, and the kernel's, not a bundle's 3 MB again and again.
RESIDENT_TOLERANCE_BYTES = 24_000_000
# What runs without `--every-stage`.
QUICK = ("corrupt", "wrong backbone", "other outputs")
NUMBERS = itertools.count(1)
# What lies beside the bundle's own files is not sent; and whether weights are finite, staging looks.
PUSHED = {"extra weights", "extra code", "extra pickle", "extra folder", "not a number", "one infinite gate row"}


@dataclass
class Ward:
    """A system whose incumbent is watched.

    Attributes:
        before: what the incumbent answers.
    """

    system: RunningSystem
    control: ExpertControlClient
    incumbent: Bundle
    before: Answered

    def workshop(self, folder: Path) -> Workshop:
        return Workshop(
            self.incumbent,
            f"7.0.{next(NUMBERS)}",
            folder / "candidate",
            registry_root(self.system.checkpoint),
            self.control.push,
        )

    def memory(self) -> tuple[list[tuple[str, int]], int]:
        """What the replica says that it holds, and what its process occupies."""
        (replica,) = self.control.list(ORGAN).replicas
        (pid,) = pids_of(self.system, f"expert-{ORGAN}")
        return [(share.digest, share.resident_bytes) for share in replica.bundles], psutil.Process(
            pid
        ).memory_info().rss

    def check_memory(self, shares: list[tuple[str, int]], resident: int) -> None:
        """It is what it was: at once as the replica counts it, and for the system once the replica is at rest."""
        assert self.memory()[0] == shares
        until(lambda: self.memory()[1] < resident + RESIDENT_TOLERANCE_BYTES, "memory given back", pause_s=0.5)

    @contextmanager
    def unharmed(self) -> Iterator[list[Answered]]:
        """The incumbent answers all of the block long, always the same, and afterwards the memory is what it was."""
        shares, resident = self.memory()
        with load(self.system, (ORGAN,), pause_s=0.05) as answered:
            yield answered
            until(lambda: held(self.control, ORGAN) == [{self.incumbent.digest}], "only the incumbent held")
        assert {answer for answer in answered if answer[1] == self.before[1]} == {self.before}
        assert ask(self.system, ORGAN) == self.before
        self.check_memory(shares, resident)
        assert not self.control.history(verify=True).faults

    def check_told(self, digest: str, state: str, words: str) -> control_pb2.Rollout:
        """The reason is in `list` and in the history."""
        rollout = rollout_of(self.control, ORGAN)
        assert (rollout.digest, rollout.state) == (digest, state)
        assert re.search(words, rollout.reason), rollout.reason
        (entry,) = self.control.history(ORGAN, last=1).entries
        assert (entry.rollout_id, entry.reason) == (rollout.id, rollout.reason)
        return rollout


@contextmanager
def ward_of(system: RunningSystem) -> Iterator[Ward]:
    with ExpertControlClient(system.control_address, timeout_s=10) as control:
        yield Ward(system, control, bundle_of(system, ORGAN), ask(system, ORGAN))


@pytest.fixture
def ward(running_system: RunningSystem) -> Iterator[Ward]:
    with ward_of(running_system) as ward:
        yield ward


@pytest.fixture(scope="module")
def strict_ward(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    """A system with little memory, a public key, and thresholds that few requests reach."""
    folder = tmp_path_factory.mktemp("strict")
    private, public = folder / "release.pem", folder / "release.pub"
    make: list[str | Path] = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    sections: dict[str, dict[str, Any]] = {
        "experts": {"max_resident_bytes": LIMIT_BYTES, "public_keys": [str(public)]},
        "rollouts": {
            "database": f"sqlite:///{folder}/rollouts.db",
            "thresholds": {"min_requests": MIN_REQUESTS},
        },
    }
    with running(demo_checkpoint, folder, **sections) as system, ward_of(system) as ward:
        yield ward


def refused(ward: Ward, folder: Path, kind: tuple[Callable[[Workshop], str], str]) -> None:
    make, words = kind
    with ward.unharmed():
        digest = make(ward.workshop(folder))
        ward.control.stage(ORGAN, digest=digest, actor=WHO)
        in_state(ward.control, ORGAN, "failed")
        ward.check_told(digest, "failed", words)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.thorough) for kind in REFUSED]
)
def test_a_bad_candidate_is_refused(ward: Ward, tmp_path: Path, kind: str) -> None:
    refused(ward, tmp_path, REFUSED[kind])


@pytest.mark.thorough
@pytest.mark.parametrize("kind", REFUSED_BY_SETTING)
def test_what_the_settings_do_not_allow_is_refused(strict_ward: Ward, tmp_path: Path, kind: str) -> None:
    refused(strict_ward, tmp_path, REFUSED_BY_SETTING[kind])


@pytest.mark.thorough
def test_a_candidate_that_is_slow_to_warm_is_refused(ward: Ward, tmp_path: Path) -> None:
    with ward.unharmed():
        digest = ward.workshop(tmp_path).make()
        file = {"organ": ORGAN, "digest": digest, "warm_timeout_s": 0.001}
        ward.control.apply(json.dumps(file), actor=WHO)
        in_state(ward.control, ORGAN, "failed")
        ward.check_told(digest, "failed", "slow to warm|not loaded within")


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_what_only_requests_can_show_is_rolled_back(strict_ward: Ward, tmp_path: Path, mode: str) -> None:
    ward, (make, words) = strict_ward, OVERFLOWS
    shares, resident = ward.memory()
    digest = make(ward.workshop(tmp_path))
    ward.control.stage(ORGAN, digest=digest, actor=WHO)
    in_state(ward.control, ORGAN, "warm")
    if mode == "canary":
        ward.control.canary(ORGAN, 50, digest=digest, actor=WHO)
    else:
        ward.control.shadow(ORGAN, 100, digest=digest, actor=WHO)

    def rolled_back() -> bool:
        # Only those that the candidate had to answer may fail.
        try:
            answer = ask(ward.system, ORGAN)
        except UnavailableError:
            raise
        except EchoVLMError:
            assert mode == "canary"
        else:
            assert answer == ward.before or (mode == "canary" and answer[1] != ward.before[1])
        return rollout_of(ward.control, ORGAN).state == "rolled_back"

    until(rolled_back, "rolled back", pause_s=0)
    ward.check_told(digest, "rolled_back", words)
    until(lambda: held(ward.control, ORGAN) == [{ward.incumbent.digest}], "only the incumbent held")
    assert ask(ward.system, ORGAN) == ward.before
    ward.check_memory(shares, resident)


def small_bundle(folder: Path, version: str) -> None:
    """As `BAD_BUNDLES` expect it."""
    sizes = {"num_layers": 2, "num_experts": 3, "hidden_size": 16, "intermediate_size": 24, "dtype": "float32"}
    content = SMALL.model_dump() | sizes | {"organ": ORGAN, "version": version}
    description = BundleDescription.model_validate(content)
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in expected_tensors(description).items()}
    folder.parent.mkdir()
    write_bundle(folder, description, tensors.__getitem__)


def test_no_bad_bundle_can_be_pushed(ward: Ward, tmp_path: Path) -> None:
    with ward.unharmed():
        known = {bundle.digest for bundle in ward.control.list().bundles}
        pushed = set()
        for number, (kind, (spoil, _)) in enumerate(BAD_BUNDLES.items()):
            folder = tmp_path / str(number) / "bundle"
            small_bundle(folder, f"8.0.{number}")
            spoil(folder)
            with suppress(InvalidRequestError, FailedPreconditionError):
                ward.control.push(folder)
                pushed.add(kind)
        assert pushed == PUSHED
        assert len({bundle.digest for bundle in ward.control.list().bundles} - known) == len(PUSHED)


def test_a_damaged_manifest_hides_no_other_version_and_control_starts_with_it(ward: Ward, tmp_path: Path) -> None:
    with ward.unharmed():
        workshop = ward.workshop(tmp_path)
        workshop.make()
        whole = workshop.manifest_path.read_bytes()
        workshop.manifest_path.unlink()
        workshop.manifest_path.write_bytes(whole[:100])
        try:
            with pytest.raises(FailedPreconditionError, match="is not JSON"):
                ward.control.stage(ORGAN, version=workshop.version, actor=WHO)
            assert ward.incumbent.digest in {bundle.digest for bundle in ward.control.list(ORGAN).bundles}
            kill(ward.system, "control")
            until(lambda: ward.control.list(ORGAN).bundles, "Control is back")
        finally:
            workshop.manifest_path.write_bytes(whole)
