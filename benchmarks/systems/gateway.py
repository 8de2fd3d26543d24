"""The whole served system, for a load generator: `python -m benchmarks.systems.gateway --checkpoint DIR`.

Prints the addresses of gateway and Control as JSON once it answers, and ends when its standard input is closed.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.systems.protocol import answers_only, parent_has_gone
from echovlm_ray.config import Config, ControlSection, GatewaySection, ModelSection, RolloutsSection, RouterSection
from echovlm_ray.serving.deploy.app import serve_system


def main() -> None:
    """Serves until the standard input is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the split folder")
    parser.add_argument("--max-batch-size", type=int, default=32, help="router.max_batch_size (default: %(default)s)")
    parser.add_argument("--token-file", type=Path, help="gateway.token_file")
    options = parser.parse_args()
    answers = answers_only()
    config = Config(
        # A swap has ended when the version before has left the memory.
        rollouts=RolloutsSection(watch_after_promotion_s=0.0),
        model=ModelSection(checkpoint=options.checkpoint),
        gateway=GatewaySection(port=0, token_file=options.token_file),
        control=ControlSection(port=0),
        router=RouterSection(max_batch_size=options.max_batch_size),
    )
    with serve_system(config, stopping=parent_has_gone) as system:
        ready = {"address": system.gateway_address, "control": system.control_address, "start_s": system.start_s}
        answers.write(json.dumps(ready) + "\n")
        sys.stdin.read()


if __name__ == "__main__":
    main()
