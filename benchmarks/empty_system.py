"""The floor of the demo's system, as many empty replicas: `python -m benchmarks.empty_system CHECKPOINT`.

Ray is started with the same settings, and every replica with the environment and the share of a core of the part in
whose place it stands. Prints a line once all run, and ends with its standard input.
"""

import argparse
import sys
import time
from pathlib import Path

from ray import serve
from ray.serve import Deployment, RunTarget
from ray.serve.schema import ApplicationStatus

from benchmarks.empty_replica import EmptyReplica
from echovlm_ray.config import Config, ModelSection
from echovlm_ray.serving.cluster.ray_session import local_ray
from echovlm_ray.serving.cluster.served import served_checkpoint
from echovlm_ray.serving.cluster.settings import ReplicaSettings, settings_of
from echovlm_ray.serving.deploy.applications import CONSTRUCTOR_ATTEMPTS, SHUTDOWN_POLL_S
from echovlm_ray.serving.deploy.replica import environment_of

POLL_S = 0.2


def _target(name: str, settings: ReplicaSettings) -> RunTarget:
    options = settings.serve
    undeployed: Deployment = serve.deployment(EmptyReplica)  # type: ignore[assignment] # its overloads
    deployment = undeployed.options(
        name="Empty",
        ray_actor_options={
            "num_cpus": settings.resources.num_cpus,
            "runtime_env": {"env_vars": environment_of(settings)},
        },
        health_check_period_s=options.health_check_period_s,
        health_check_timeout_s=options.health_check_timeout_s,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_S,
        max_constructor_retry_count=CONSTRUCTOR_ATTEMPTS,
        logging_config={"enable_access_log": False},
    )
    return RunTarget(deployment.bind(settings.model.torch_threads), name=name, route_prefix=None)


def _all_run(names: set[str]) -> bool:
    found = serve.status().applications
    return all(name in found and found[name].status == ApplicationStatus.RUNNING for name in names)


def main() -> None:
    """Starts the replicas, says so, and waits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the split folder whose system this is the floor of")
    config = Config(model=ModelSection(checkpoint=parser.parse_args().checkpoint))
    settings = settings_of(config, served_checkpoint(config.model).organs, "loopback")
    with local_ray(config):
        serve.run_many(
            [_target(name, part) for name, part in settings.items()],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        while not _all_run(set(settings)):
            time.sleep(POLL_S)
        print("ready", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
