"""Checks in a process of their own, with kernels that other packages add: they crash, hang, and eat memory."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from experts.bundles.bundle import Bundle
from experts.bundles.probe import probe_sizes
from experts.bundles.signing import SignaturePolicy, sign_bundle
from experts.checks.check import BackboneSizes, CheckRequest, CheckResult, check
from experts.checks.isolated_check import IsolatedChecks, check_in_subprocess
from experts.errors import UnknownBundleError
from experts.registry.source import BundleSource, RegistryLocation
from tests.experts.bad_bundles import BAD_BUNDLES
from tests.experts.keys import make_keys
from tests.waiting import until

MakeBundle = Callable[..., Path]
SIZES = BackboneSizes(digest="b" * 64, num_layers=2, hidden_size=16)

KERNELS = """
import ctypes, os, subprocess, sys, time
import torch
from experts.kernels.reference import ReferenceKernel

class Crashing(ReferenceKernel):
    name = "crashing"
    def load(self, weights):
        ctypes.string_at(0)

class Leaving(ReferenceKernel):
    name = "leaving"
    def load(self, weights):
        print("going", file=sys.stderr, flush=True)
        os._exit(7)

class Hanging(ReferenceKernel):
    name = "hanging"
    def load(self, weights):
        child = subprocess.Popen(["sleep", "600"])
        open(os.environ["CHILD_FILE"], "w").write(str(child.pid))
        time.sleep(600)

class Greedy(ReferenceKernel):
    name = "greedy"
    def load(self, weights):
        self.held = [torch.ones(1 << 28) for _ in range(64)]

class Talking(ReferenceKernel):
    name = "talking"
    def load(self, weights):
        print("{} not JSON", flush=True)
        os.write(1, b"nor this\\n")
        return super().load(weights)

class Failing(ReferenceKernel):
    name = "failing"
    def load(self, weights):
        raise RuntimeError("no such instruction")
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that adds kernels under the entry point group, as any other package could."""
    site = tmp_path / "site"
    information = site / "odd_kernels-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "odd_kernels.py").write_text(KERNELS)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-kernels\nVersion: 1.0\n")
    names = ("crashing", "leaving", "hanging", "greedy", "talking", "failing")
    entries = "".join(f"{name} = odd_kernels:{name.capitalize()}\n" for name in names)
    (information / "entry_points.txt").write_text(f"[echovlm_ray.kernels]\n{entries}")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    return tmp_path / "child"


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> BundleSource:
    return BundleSource(folder=make_bundle(probe=probe_sizes(3)))


def test_a_good_bundle(bundle: BundleSource) -> None:
    result = check_in_subprocess(CheckRequest(source=bundle, organ="breast", backbone=SIZES))
    assert result.reason is None
    assert result.ok
    assert (result.organ, result.version, result.signature) == ("breast", "1.0.0", "none")
    assert (result.kernel, result.dtype, result.probe_recorded) == ("auto: cpu_packed", "float32", True)
    assert result.worst_error is not None
    assert result.tolerance is not None
    assert result.worst_error < result.tolerance
    # Packed rows may be padded.
    assert result.resident_bytes is not None
    assert result.resident_bytes >= 2 * 3 * 3 * 16 * 24 * 4
    # Torch alone has more than this, and a runaway would have more than that.
    assert result.peak_bytes is not None
    assert 50_000_000 < result.peak_bytes < 2_000_000_000
    assert result.seconds is not None
    assert 0 < result.seconds < 60


def test_a_copy_stands_in_for_a_registry_that_is_gone(make_bundle: MakeBundle, tmp_path: Path) -> None:
    directory = make_bundle()
    digest = Bundle.open(directory).digest
    gone = RegistryLocation(root=str(tmp_path / "gone"))
    assert BundleSource(registry=gone, digest=digest, copy_folder=directory).open().digest == digest
    for other_digest, copy_folder in (("0" * 64, directory), (digest, tmp_path / "none"), (digest, None)):
        with pytest.raises(UnknownBundleError):
            BundleSource(registry=gone, digest=other_digest, copy_folder=copy_folder).open()
    (directory / "gate.safetensors").unlink()
    with pytest.raises(UnknownBundleError):
        BundleSource(registry=gone, digest=digest, copy_folder=directory).open()


def test_a_bundle_in_a_registry_signed(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = make_keys(tmp_path)
    directory = make_bundle()
    sign_bundle(directory, private)
    # As a person types it: relative to where the command runs.
    monkeypatch.chdir(tmp_path)
    location = RegistryLocation(root="registry")
    digest = location.open().push(directory).digest
    request = CheckRequest(
        source=BundleSource(registry=location, digest=digest),
        policy=SignaturePolicy(signatures="required", public_keys=(Path("release.pub"),)),
        kernel="reference",
        dtype="bfloat16",
    )
    assert public == tmp_path / "release.pub"
    result = check_in_subprocess(request)
    assert (result.ok, result.reason, result.signature) == (True, None, "verified")
    assert (result.kernel, result.dtype, result.probe_recorded) == ("reference", "bfloat16", False)


@pytest.mark.parametrize("kind", ["not a number", "path that leaves", "plain pickle"])
def test_a_bad_bundle_and_why(kind: str, make_bundle: MakeBundle) -> None:
    damage, reason = BAD_BUNDLES[kind]
    directory = make_bundle()
    damage(directory)
    result = check_in_subprocess(CheckRequest(source=BundleSource(folder=directory)))
    assert not result.ok
    assert re.search(reason, result.reason or "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"organ": "liver"}, "is of organ 'breast', not of 'liver'"),
        (
            {"backbone": SIZES.model_copy(update={"digest": "c" * 64})},
            "was trained against the backbone bbbbbbbbbbbb…, not cccccccccccc…",
        ),
        ({"backbone": SIZES.model_copy(update={"num_layers": 3})}, "has num_layers 2, the backbone has 3"),
        ({"backbone": SIZES.model_copy(update={"hidden_size": 8})}, "has hidden_size 16, the backbone has 8"),
        ({"kernel": "surprise"}, "there is no expert kernel 'surprise'"),
        ({"policy": SignaturePolicy(signatures="required", public_keys=(Path("/absent.pub"),))}, "is not signed"),
    ],
)
def test_what_does_not_fit(changes: dict[str, object], reason: str, bundle: BundleSource) -> None:
    # In this process: the same function, and quicker.
    with pytest.raises(ValueError, match=reason):
        check(bundle.open(), CheckRequest.model_validate({"source": bundle, **changes}))


def test_a_kernel_that_crashes(bundle: BundleSource, kernels: Path) -> None:
    result = check_in_subprocess(CheckRequest(source=bundle, kernel="crashing"))
    assert result == CheckResult(ok=False, reason="the check was ended by SIGSEGV: the bundle or the kernel crashed it")


def test_a_kernel_that_leaves(bundle: BundleSource, kernels: Path) -> None:
    result = check_in_subprocess(CheckRequest(source=bundle, kernel="leaving"))
    assert result.reason == "the check ended with exit code 7 and without a result: going"


def test_a_kernel_that_fails(bundle: BundleSource, kernels: Path) -> None:
    result = check_in_subprocess(CheckRequest(source=bundle, kernel="failing"))
    assert result.reason == "the kernel failing failed: RuntimeError: no such instruction"
    assert (result.ok, result.organ) == (False, "breast")


def test_a_kernel_that_hangs_is_killed_with_all_that_it_started(bundle: BundleSource, kernels: Path) -> None:
    started = time.monotonic()
    result = check_in_subprocess(CheckRequest(source=bundle, kernel="hanging"), timeout_s=20)
    assert result == CheckResult(ok=False, reason="the check did not end within 20 s and was killed")
    assert time.monotonic() - started < 30
    child = int(kernels.read_text())
    until(
        lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE,
        "what the kernel started outlived it",
    )


def test_a_kernel_that_eats_memory(bundle: BundleSource, kernels: Path) -> None:
    """64 GiB, on a machine that would have to kill a process for it."""
    before = psutil.virtual_memory().available
    result = check_in_subprocess(CheckRequest(source=bundle, kernel="greedy", memory_bytes=256 * 1024**2))
    assert not result.ok
    assert result.reason is not None
    assert "more than 268435456 bytes of memory, the limit memory_bytes" in result.reason
    assert result.peak_bytes is not None
    assert psutil.virtual_memory().available > before - 1_000_000_000


def test_the_bundles_own_files_do_not_count(make_bundle: MakeBundle) -> None:
    directory = make_bundle(num_layers=12, hidden_size=512, intermediate_size=512)
    assert (directory / "experts.safetensors").stat().st_size > 110_000_000
    tight = CheckRequest(source=BundleSource(folder=directory), kernel="reference", memory_bytes=96 * 1024**2)
    assert check_in_subprocess(tight).reason is None
    too_tight = tight.model_copy(update={"memory_bytes": 1024**2})
    reason = check_in_subprocess(too_tight).reason
    assert reason is not None
    assert "more than 1048576 bytes of memory" in reason


def test_what_a_kernel_prints_is_not_the_result(bundle: BundleSource, kernels: Path) -> None:
    assert check_in_subprocess(CheckRequest(source=bundle, kernel="talking")).ok


def test_the_command_itself(bundle: BundleSource) -> None:
    """JSON in, JSON out, as a Control written in another language would use it."""
    request = {"source": {"folder": str(bundle.folder)}, "kernel": "reference"}
    done = subprocess.run(
        [sys.executable, "-m", "experts.checks.check"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_a_source_is_one_place(tmp_path: Path) -> None:
    location = RegistryLocation(root="x")
    for fields in (
        {},
        {"folder": tmp_path, "digest": "0"},
        {"registry": location},
        {"digest": "0"},
        {"folder": tmp_path, "registry": location, "digest": "0"},
    ):
        with pytest.raises(ValidationError, match="either in a folder or in a registry"):
            BundleSource.model_validate(fields)


def test_what_is_not_there(tmp_path: Path) -> None:
    result = check_in_subprocess(
        CheckRequest(source=BundleSource(registry=RegistryLocation(root=str(tmp_path)), digest="0" * 64))
    )
    assert result.reason is not None
    assert "no bundle with the digest" in result.reason


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux's scheduling policies")
@pytest.mark.parametrize("idle_priority", [False, True])
def test_checks_run_at_the_priority_that_was_asked_for(bundle: BundleSource, idle_priority: bool) -> None:
    with closing(IsolatedChecks(idle_priority=idle_priority)) as checks:
        assert checks.check(CheckRequest(source=bundle)).ok
        (server,) = fork_servers()
        policy = os.sched_getscheduler(server.pid)
    assert (policy == os.SCHED_IDLE) == idle_priority


def test_what_checks_are_forked_from_runs_only_while_it_is_needed(bundle: BundleSource) -> None:
    with closing(IsolatedChecks(idle_s=0.2)) as checks:
        assert fork_servers() == []
        for _ in range(2):
            assert checks.check(CheckRequest(source=bundle)).ok
            until(lambda: fork_servers() == [])


def test_checks_share_what_they_come_from(bundle: BundleSource, make_bundle: MakeBundle) -> None:
    """Several at once; each is a process of its own, and what the first one did the others do not see."""
    with closing(IsolatedChecks()) as checks:
        bad = make_bundle(name="bad")
        BAD_BUNDLES["not a number"][0](bad)
        requests = [CheckRequest(source=bundle), CheckRequest(source=BundleSource(folder=bad))] * 3
        with ThreadPoolExecutor(len(requests)) as threads:
            results = list(threads.map(checks.check, requests))
        assert [result.ok for result in results] == [True, False] * 3
        (server,) = fork_servers()
        # Those that watched have ended, and there is nothing left to wait for.
        until(lambda: not server.children())
    assert fork_servers() == []


def test_what_checks_come_from_is_killed(bundle: BundleSource) -> None:
    with closing(IsolatedChecks()) as checks:
        assert checks.check(CheckRequest(source=bundle)).ok
        (server,) = fork_servers()
        server.kill()
        assert checks.check(CheckRequest(source=bundle)).ok
        (other,) = fork_servers()
        assert other != server
    # A later check starts it again.
    assert checks.check(CheckRequest(source=bundle)).ok
    checks.close()
    assert fork_servers() == []


def test_too_little_time_even_to_begin(bundle: BundleSource) -> None:
    result = check_in_subprocess(CheckRequest(source=bundle), timeout_s=0.05)
    assert result == CheckResult(ok=False, reason="the check did not end within 0.05 s and was killed")
    assert fork_servers() == []


def fork_servers() -> list[psutil.Process]:
    """The processes of this one that checks are forked from."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if "experts.checks.check_fork_server" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
