"""The engine with all experts in its process: `python -m benchmarks.systems.engine --checkpoint DIR --threads N`.

It is built by the function that the served router is built by, with `router.experts: local`.
"""

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.systems.protocol import Run, now, serve_workloads
from benchmarks.timings import Timings
from benchmarks.workload import Workload
from echovlm_ray.config import ExpertsSection, ModelSection, Resources, RouterSection, ServeSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import SequenceRequest, StepOutput
from echovlm_ray.model.positions import mrope_positions
from echovlm_ray.serving.cluster.deployments.router import build_engine
from echovlm_ray.serving.cluster.deployments.settings import RouterSettings
from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.lm.request import ServedModel
from echovlm_ray.serving.served import served_checkpoint
from router.gating.organ_gate import OrganGate


def run_in_engine(engine: Engine, model: ServedModel, organ_gate: OrganGate, workload: Workload) -> Timings:
    """Submits all streams one after the other, and notes when the engine gives their tokens."""
    requests = [
        _request(model, organ_gate, prompt, organ, workload.new_tokens)
        for prompt, organ in zip(workload.prompts, workload.organs, strict=True)
    ]
    streams = [_Stream() for _ in requests]
    began = now()
    for stream, request in zip(streams, requests, strict=True):
        stream.submitted = now()
        engine.submit(request, stream.sink)
    for stream in streams:
        stream.ended.wait()
        if stream.error is not None:
            raise stream.error
    return Timings(
        workload.prompt_tokens,
        tuple(stream.submitted - began for stream in streams),
        tuple(tuple(time - began for time in stream.times) for stream in streams),
    )


class _Stream:
    def __init__(self) -> None:
        self.submitted = 0.0
        self.times: list[float] = []
        self.error: Exception | None = None
        self.ended = threading.Event()

    def sink(self, output: StepOutput | Exception) -> None:
        if isinstance(output, Exception):
            self.error = output
            self.ended.set()
            return
        self.times.append(now())
        if output.finish is not None:
            self.ended.set()


def _request(
    model: ServedModel, organ_gate: OrganGate, prompt: tuple[int, ...], organ: str, new_tokens: int
) -> SequenceRequest:
    position_ids, delta = mrope_positions(torch.tensor(prompt), [], [], model.config)
    choice = organ_gate.choose([organ] if organ else [], [], None, model.expert_set)
    return SequenceRequest(
        input_ids=prompt,
        position_ids_3T=position_ids,
        position_delta=delta,
        expert_set_id=model.expert_set.id,
        shares=choice.shares,
        max_new_tokens=new_tokens,
    )


@contextmanager
def open_engine(checkpoint: Path, threads: int, max_batch_size: int) -> Iterator[Run]:
    """The engine, loaded and started."""
    torch.set_num_threads(threads)
    settings = RouterSettings(
        model=ModelSection(checkpoint=checkpoint, torch_threads=threads, device="cpu"),
        serve=ServeSection(),
        network="loopback",
        router=RouterSection(experts="local", max_batch_size=max_batch_size, resources=Resources(num_cpus=0)),
        experts=ExpertsSection(),
        policy_file=None,
    )
    served = served_checkpoint(settings.model)
    engine, model, organ_gate = build_engine(settings, served, torch.device("cpu"), Endpoints({}))
    engine.start()
    try:
        yield lambda workload: run_in_engine(engine, model, organ_gate, workload)
    finally:
        engine.stop()


def main() -> None:
    """Runs workloads from the standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the split folder")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    parser.add_argument("--max-batch-size", type=int, required=True, help="router.max_batch_size")
    options = parser.parse_args()
    serve_workloads(lambda: open_engine(options.checkpoint, options.threads, options.max_batch_size))


if __name__ == "__main__":
    main()
