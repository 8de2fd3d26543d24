"""What was verified can be used: bundles of another floating dtype than the backbone's, on running systems."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from echovlm_ray.checkpoint.layout import ORGANS, backbone_directory
from echovlm_ray.client.control import ExpertControlClient
from tests.changed_bundles import amplified, changed_bundle
from tests.live_rollouts import WHO, ask, bundle_of, in_state, load, until
from tests.random_checkpoint import make_random
from tests.running_system import RunningSystem, running


def as_dtype(dtype: torch.dtype) -> Any:
    return lambda tensor: amplified(tensor).to(dtype)


def stage(system: RunningSystem, folder: Path, organ: str, version: str, dtype: torch.dtype) -> str:
    """Pushes and stages an organ's experts in another dtype, gate rows included; returns the digest when it is warm."""
    source = bundle_of(system, organ)
    name = str(dtype).removeprefix("torch.")
    own = str(source.manifest.torch_dtype).removeprefix("torch.")
    digest = changed_bundle(folder, source, version, as_dtype(dtype), dtype=name, gate_dtype=own).digest
    with ExpertControlClient(system.control_address) as control:
        control.push(folder)
        control.stage(organ, digest=digest, actor=WHO)
        in_state(control, organ, "warm", "failed")
        rollout = control.list(organ).rollouts[0]
        assert rollout.state == "warm", rollout.reason
    return digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)])
def test_a_candidate_of_another_dtype_answers_what_it_is_sent(
    running_system: RunningSystem, tmp_path: Path, dtype: torch.dtype
) -> None:
    system, organ, version = running_system, "vessel", f"5.0.{dtype.itemsize}{int(dtype == torch.float16)}"
    name = str(dtype).removeprefix("torch.")
    with ExpertControlClient(system.control_address) as control, load(system, (organ,), pause_s=0.05) as answered:
        digest = stage(system, tmp_path / "candidate", organ, version, dtype)
        (needed,) = control.list(organ).replicas
        sizes = {share.digest: share.resident_bytes for share in needed.bundles}
        assert sizes[digest] == sizes[bundle_of(system, organ).digest], "as large as what it was converted to"
        control.promote(organ, digest=digest, actor=WHO)
        assert ask(system, organ)[1] == version
        (replica,) = system.replicas(f"expert-{organ}")
        assert (version, name, "float32") in [
            (bundle["version"], bundle["bundle_dtype"], bundle["dtype"]) for bundle in replica["bundles"]
        ]
        control.roll_back_stable(organ, digest=digest, actor=WHO)
        until(lambda: ask(system, organ)[1] == "1.0.0", "the version before")
    assert {answer[1] for answer in answered} == {"1.0.0", version}


@pytest.fixture(scope="module")
def short_backbone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    """A bfloat16 backbone whose own experts are float32."""
    folder = tmp_path_factory.mktemp("short")
    checkpoint = folder / "checkpoint"
    make_random(checkpoint)
    weights = backbone_directory(checkpoint) / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    with running(checkpoint, folder) as system:
        yield system


@pytest.mark.thorough
def test_float32_experts_answer_on_a_bfloat16_backbone(short_backbone: RunningSystem, tmp_path: Path) -> None:
    system = short_backbone
    for organ in ORGANS:
        assert ask(system, organ)[:2] == (organ, "1.0.0")
    for dtype in (torch.float32, torch.float16):
        version = f"6.0.{dtype.itemsize}"
        digest = stage(system, tmp_path / version, "heart", version, dtype)
        with ExpertControlClient(system.control_address) as control:
            control.promote("heart", digest=digest, actor=WHO)
        assert ask(system, "heart")[:2] == ("heart", version)
    (replica,) = system.replicas("expert-heart")
    assert {bundle["dtype"] for bundle in replica["bundles"]} == {"bfloat16"}


@pytest.mark.thorough
def test_where_others_are_refused_the_rollout_fails_and_says_why(demo_checkpoint: Path, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "experts": {"other_dtype": "refuse"},
        "rollouts": {"database": f"sqlite:///{tmp_path}/rollouts.db"},
    }
    with running(demo_checkpoint, tmp_path, **sections) as system:
        changed_bundle(
            tmp_path / "candidate",
            bundle_of(system, "heart"),
            "5.1.0",
            as_dtype(torch.bfloat16),
            dtype="bfloat16",
            gate_dtype="float32",
        )
        with ExpertControlClient(system.control_address) as control:
            digest = control.push(tmp_path / "candidate").digest
            control.stage("heart", digest=digest, actor=WHO)
            until(lambda: control.list("heart").rollouts[0].state == "failed", "failed")
            reason = control.list("heart").rollouts[0].reason
        assert "are bfloat16, the backbone computes in float32" in reason
        assert ask(system, "heart")[1] == "1.0.0"
