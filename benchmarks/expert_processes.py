"""The served expert groups, each in a separate process, but without Ray.

Beside the served group's service and server, such a process notes when its kernel was at work, and says so when asked:
`ExpertProcess.busy`. All processes of a Linux machine share the clock of `time.perf_counter`.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch

from benchmarks.served_group import served_group
from benchmarks.systems.protocol import answers_only
from echovlm_ray.checkpoint.layout import read_index, registry_root
from echovlm_ray.config import Config, ExpertsSection, ModelSection
from experts.group import ExpertGroup
from experts.kernels.base import ExpertKernel, ExpertWeights, PreparedExperts
from experts.kernels.registry import get_kernel
from experts.registry.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 10

# Begin and end of one call of a kernel, in `time.perf_counter` seconds.
Busy = tuple[float, float]


class _NotedExperts:
    """Prepared experts that record their calls."""

    def __init__(self, prepared: PreparedExperts, busy: list[Busy]) -> None:
        self._prepared = prepared
        self._busy = busy

    @property
    def nbytes(self) -> int:
        return self._prepared.nbytes

    def forward(self, x_TD: torch.Tensor, expert_index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        output_TD = self._prepared.forward(x_TD, expert_index_TK, weight_TK)
        self._busy.append((began, time.perf_counter()))
        return output_TD


class NotedKernel:
    """A kernel that notes when it is at work; computes nothing itself."""

    def __init__(self, kernel: ExpertKernel) -> None:
        """`kernel` is what really computes."""
        self._kernel = kernel
        self.busy: list[Busy] = []

    @property
    def name(self) -> str:
        """The other kernel's."""
        return self._kernel.name

    def load(self, weights: ExpertWeights) -> PreparedExperts:
        """Prepares the weights with the other kernel."""
        return _NotedExperts(self._kernel.load(weights), self.busy)


class ExpertProcess:
    """The parent's side of one expert group's process."""

    def __init__(self, organ: str, process: "subprocess.Popen[str]") -> None:
        """Does not wait until it serves; see `wait_until_ready`."""
        self.organ = organ
        self.address = ""
        self._process = process

    def wait_until_ready(self) -> None:
        """Waits until it serves; then `address` is set.

        Raises:
            RuntimeError: it ended instead; its error is on the standard error.
        """
        self.address = self._read()

    def busy(self) -> list[Busy]:
        """The kernel's busy intervals since the last call."""
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write("busy\n")
        stdin.flush()
        return [(began, ended) for began, ended in json.loads(self._read())]

    def _read(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline().strip()):
            raise RuntimeError(f"the expert process of {self.organ} ended with {self._process.wait()}")
        return line


@contextmanager
def expert_processes(checkpoint: Path, organs: Sequence[str], threads: int = 1) -> Iterator[list[ExpertProcess]]:
    """One process for each organ, all of them ready.

    Args:
        checkpoint: a split folder.
        organs: whose experts.
        threads: of torch, in each.
    """
    with ExitStack() as stack:
        processes = [
            ExpertProcess(organ, stack.enter_context(_started(checkpoint, organ, threads))) for organ in organs
        ]
        for process in processes:
            process.wait_until_ready()
        yield processes


@contextmanager
def _started(checkpoint: Path, organ: str, threads: int) -> Iterator["subprocess.Popen[str]"]:
    # Ray is in there, and the process itself has no use for it.
    from echovlm_ray.serving.cluster.settings import expert_application, settings_of
    from echovlm_ray.serving.deploy.replica import environment_of

    config = Config(model=ModelSection(checkpoint=checkpoint, torch_threads=threads, device="cpu"))
    settings = settings_of(config, (organ,), "loopback")[expert_application(organ)]
    command = [sys.executable, "-m", "benchmarks.expert_processes", str(checkpoint), organ]
    environment = os.environ | environment_of(settings)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        # A closed standard input ends it.
        process.stdin.close()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


async def _serve(directory: Path, organ: str, answers: IO[str]) -> None:
    section = ExpertsSection()
    # As a replica on a CPU does.
    os.nice(section.niceness)
    expert_set = read_index(directory).expert_set()
    kernel = NotedKernel(get_kernel(section.kernel))
    group = ExpertGroup(
        organ,
        Registry(registry_root(directory)),
        kernel,
        device="cpu",
        max_resident_bytes=section.max_resident_bytes,
        backbone_digest=expert_set.backbone_digest,
    )
    group.load(expert_set.bundle_digest(organ))
    async with served_group(group) as address:
        print(address, file=answers)
        while await asyncio.to_thread(sys.stdin.readline):
            busy = kernel.busy.copy()
            kernel.busy.clear()
            print(json.dumps(busy), file=answers)


def main() -> None:
    """Serves one organ until the standard input is closed; prints its address, then answers queries."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a split folder")
    parser.add_argument("organ", help="whose experts")
    options = parser.parse_args()
    # See `environment_of`.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    asyncio.run(_serve(options.checkpoint, options.organ, answers_only()))


if __name__ == "__main__":
    main()
