"""The processes of a running system's parts, from its Control's public status."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc

from echovlm_ray.serving.cluster.system_secret import channels_to

ECHORAY = Path(sys.executable).with_name("echoray")


@dataclass(frozen=True, slots=True)
class RunningPart:
    """A process, the address of its gRPC server, and the deployment that it belongs to."""

    pid: int
    endpoint: str
    identity: str = ""

    def connect(self) -> grpc.Channel:
        """A channel to a part that serves the other parts only."""
        return channels_to(self.identity).blocking(self.endpoint)


def first_replicas(control: str) -> dict[str, RunningPart]:
    """Application → its first replica.

    Args:
        control: Control's address.
    """
    command: list[str | Path] = [ECHORAY, "status", "--json", "--control", control]
    # It ends with 1 where some part does not run.
    status = json.loads(subprocess.run(command, capture_output=True).stdout)
    return {
        application["name"]: RunningPart(int(replica["pid"]), replica["endpoint"], status["identity"])
        for application in status["applications"]
        for replica in application["replicas"][:1]
    }
