"""Names what this project needs of Ray beyond its public interface: another version of Ray fails here first."""

import inspect
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

import pytest
from ray import serve
from ray._private import ray_constants
from ray.experimental import internal_kv
from ray.serve._private.common import DeploymentID, RunningReplicaInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.controller import ServeController
from ray.serve._private.long_poll import LongPollNamespace, UpdatedObject

from echovlm_ray.serving.cluster import ray_internals
from echovlm_ray.serving.cluster.ray_internals import UnsupportedRayError


class Nothing:
    """A deployment to give a version to."""


def parameters_of(function: Callable[..., object]) -> Collection[str]:
    return inspect.signature(function).parameters


def test_what_the_controller_answers() -> None:
    key = ray_internals.target_key("application", "deployment")
    assert key == (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(name="deployment", app_name="application"))
    assert "keys_to_snapshot_ids" in parameters_of(ServeController.listen_for_change)
    assert "names" in parameters_of(ServeController.delete_apps)
    assert {"object_snapshot", "snapshot_id"} <= set(UpdatedObject.__annotations__)
    assert "replica_metadata" in RunningReplicaInfo.__annotations__
    assert SERVE_CONTROLLER_NAME
    assert SERVE_NAMESPACE


def test_versions_of_deployments() -> None:
    deployment: Any = serve.deployment(Nothing)
    assert ray_internals.with_version(deployment, "7").version == "7"


@pytest.mark.parametrize("name", ["get", "put", "del", "list"])
def test_the_key_value_store(name: str) -> None:
    assert "namespace" in parameters_of(getattr(internal_kv, f"_internal_kv_{name}"))


def test_loopback_is_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    before = ray_constants.ENABLE_RAY_CLUSTER
    assert before
    with ray_internals.on_loopback():
        assert not ray_constants.ENABLE_RAY_CLUSTER
        assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert before == ray_constants.ENABLE_RAY_CLUSTER
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def on_loopback() -> None:
    with ray_internals.on_loopback():
        pass


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("ray.serve._private.common", lambda: ray_internals.target_key("application", "deployment")),
        ("ray.serve._private.constants", lambda: ray_internals.delete_applications([])),
        ("ray.experimental.internal_kv", lambda: ray_internals.read_record("key")),
        ("ray._private.ray_constants", on_loopback),
    ],
)
def test_another_ray_is_refused_with_its_version(
    module: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, _, name = module.rpartition(".")
    monkeypatch.delattr(sys.modules[parent], name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedRayError, match=r"install the pinned version"):
        use()
