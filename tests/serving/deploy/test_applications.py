from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
)

from echovlm_ray.config import Config
from echovlm_ray.serving.cluster.settings import (
    ControlSettings,
    ReplicaSettings,
    deployments_of,
    settings_of,
)
from echovlm_ray.serving.deploy.applications import version_of
from echovlm_ray.serving.deploy.control_deployment import brief, cause
from echovlm_ray.serving.deploy.replica import environment_of

ORGANS = ("breast", "heart")


def config(**sections: Mapping[str, Any]) -> Config:
    return Config.model_validate({"model": {"checkpoint": Path("/models/demo")}, **sections})


def settings(**sections: Mapping[str, Any]) -> dict[str, ReplicaSettings]:
    return settings_of(config(**sections), ORGANS, "loopback")


def changed(before: dict[str, ReplicaSettings], after: dict[str, ReplicaSettings]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if version_of(before[name]) != version_of(after[name])}


def test_every_organ_is_an_application_of_its_own() -> None:
    assert set(settings()) == {"gateway", "vision", "router", "control", "expert-breast", "expert-heart"}
    assert set(settings()) == set(deployments_of(ORGANS))


def test_experts_in_the_router_need_no_applications() -> None:
    assert set(settings(router={"experts": "local"})) == {"gateway", "vision", "router", "control"}


def test_a_change_restarts_only_the_parts_that_it_concerns() -> None:
    before = settings()
    assert changed(before, settings()) == set()
    assert changed(before, settings(gateway={"max_requests": 3})) == {"gateway"}
    assert changed(before, settings(vision={"max_queue": 300})) == {"vision"}
    assert changed(before, settings(router={"max_queue": 3})) == {"router", "gateway"}
    assert changed(before, settings(control={"port": 3})) == {"control"}
    assert changed(before, settings(serve={"health_check_period_s": 3})) == set()
    everything = settings(model={"checkpoint": Path("/models/other")})
    assert changed(before, everything) == set(before)


def test_one_organs_resources_do_not_restart_another_organ() -> None:
    before = settings()
    after = settings(experts={"organs": {"heart": {"num_cpus": 0.5}}})
    # The router has all of them, for experts in its own process; Control, to deploy a new organ's.
    assert changed(before, after) <= {"expert-heart", "router", "control"}
    assert "expert-heart" in changed(before, after)
    assert after["expert-heart"].resources.num_cpus == 0.5


def test_control_deploys_a_new_organ_as_it_would_have_been_deployed_with_the_others() -> None:
    sections: dict[str, Mapping[str, Any]] = {"experts": {"organs": {"lung": {"num_cpus": 0.5}}}}
    control = settings(**sections)["control"]
    assert isinstance(control, ControlSettings)
    together = settings_of(config(**sections), (*ORGANS, "lung"), "loopback")["expert-lung"]
    assert version_of(control.expert_group("lung")) == version_of(together)
    assert control.expert_group("lung").resources.num_cpus == 0.5


def test_settings_survive_the_way_to_the_replica() -> None:
    for found in settings(experts={"organs": {"heart": {"replicas": 2}}}).values():
        assert type(found).model_validate(found.model_dump(mode="json")) == found


def test_the_environment_follows_the_configuration() -> None:
    environment = environment_of(settings(model={"torch_threads": 3})["router"])
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "event_engine" in environment["GRPC_EXPERIMENTS"]
    assert environment["GRPC_POLL_STRATEGY"] == "poll"
    assert "GRPC_POLL_STRATEGY" not in environment_of(settings()["gateway"])
    assert "GRPC_EXPERIMENTS" not in environment_of(settings(serve={"grpc_event_engine": True})["router"])


def test_of_a_failure_the_reason_is_shown_and_not_the_trace() -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nValueError: no GPU here\n\n'
    assert brief(trace) == "ValueError: no GPU here"
    assert brief("") == ""
    slow = "It has 1 replicas that take more than 30s to initialize.\nThis may be caused by a slow __init__ method.\n"
    assert brief(slow).startswith("It has 1 replicas that take more than 30s to initialize. This may be caused")


def test_of_an_application_that_failed_its_deployment_says_why() -> None:
    trace = "It failed to start 3 times in a row.\nTraceback\nRolloutDatabaseError: another Control uses it\n"
    deployment = DeploymentStatusOverview("DEPLOY_FAILED", "REPLICA_STARTUP_FAILED", {}, trace)  # type: ignore[arg-type]
    failed = ApplicationStatusOverview(
        ApplicationStatus.DEPLOY_FAILED, "Failed to update the deployments ['Control'].", 0.0, {"Control": deployment}
    )
    assert cause(failed) == "RolloutDatabaseError: another Control uses it"
    assert cause(replace(failed, deployments={})) == "Failed to update the deployments ['Control']."
