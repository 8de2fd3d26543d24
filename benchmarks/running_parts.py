"""Which process is which part of a system that runs, asked of its Control as a user asks."""

import json
import subprocess
import sys
from pathlib import Path

ECHORAY = Path(sys.executable).with_name("echoray")


def first_replicas(control: str) -> dict[str, int]:
    """Application → the process id of its first replica.

    Args:
        control: Control's address.
    """
    command: list[str | Path] = [ECHORAY, "status", "--json", "--control", control]
    # It ends with 1 where some part does not run.
    status = json.loads(subprocess.run(command, capture_output=True).stdout)
    return {
        application["name"]: int(application["replicas"][0]["pid"])
        for application in status["applications"]
        if application["replicas"]
    }
