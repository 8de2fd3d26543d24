"""An engine in this process, with its experts in it too or in processes of their own, to look inside while it runs."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.expert_processes import ExpertProcess, expert_processes
from benchmarks.systems.protocol import now
from benchmarks.timings import Timings
from benchmarks.workload import Workload
from echovlm_ray.config import Config, ModelSection, Resources, RouterSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.runner import ModelRunner
from echovlm_ray.engine.sequence import SequenceRequest, StepOutput
from echovlm_ray.model.configuration import EchoVLMTextConfig
from echovlm_ray.model.positions import mrope_positions
from echovlm_ray.serving.cluster.endpoints import Endpoints
from echovlm_ray.serving.cluster.served import served_checkpoint
from echovlm_ray.serving.cluster.settings import ROUTER, RouterSettings, expert_application, settings_of
from echovlm_ray.serving.deploy.replica import environment_of
from echovlm_ray.serving.deploy.router_deployment import build_engine
from echovlm_ray.serving.lm.request import ServedModel
from router.dispatch.remote import RemoteExperts
from router.gating.expert_set import ExpertSet
from router.gating.organ_gate import OrganGate

Placement = Literal["remote", "in process"]
DTypeName = Literal["auto", "float32", "bfloat16"]
CONNECT_SECONDS = 30


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


@dataclass(frozen=True, slots=True)
class MeasuredEngine:
    """A running engine.

    Attributes:
        run: runs a workload to its end.
        expert_set: that its requests are pinned to.
        processes: of its experts; none where they are in this process.
    """

    engine: Engine
    run: Callable[[Workload], Timings]
    expert_set: ExpertSet
    processes: list[ExpertProcess]

    @property
    def runner(self) -> ModelRunner:
        """What computes the engine's steps."""
        return self.engine._runner

    @property
    def config(self) -> EchoVLMTextConfig:
        """The language model's configuration."""
        config = self.runner.model.config.text_config
        assert isinstance(config, EchoVLMTextConfig)
        return config


class _FixedEndpoints(Endpoints):
    """The addresses of processes outside Ray Serve."""

    def __init__(self, processes: list[ExpertProcess]) -> None:
        super().__init__({})
        self._addresses = {expert_application(process.organ): (process.address,) for process in processes}

    def of(self, application: str) -> tuple[str, ...]:
        return self._addresses.get(application, ())


@contextmanager
def measured_engine(
    checkpoint: Path,
    placement: Placement,
    *,
    organs: Sequence[str] = (),
    dtype: DTypeName = "auto",
    max_batch_size: int = 32,
    threads: int = 1,
) -> Iterator[MeasuredEngine]:
    """The engine that the served router builds, running.

    Args:
        checkpoint: a split folder.
        placement: where the experts are.
        organs: which organs' experts have a process; none names all of them.
        dtype: that the weights are converted to; "auto" leaves them as they are. Remote experts keep their own.
        max_batch_size: of the engine.
        threads: of torch, in every process.
    """
    torch.set_num_threads(threads)
    settings = _settings(checkpoint, placement, dtype, max_batch_size, threads)
    served = served_checkpoint(settings.model)
    with ExitStack() as stack:
        processes = []
        if placement == "remote":
            processes = stack.enter_context(expert_processes(checkpoint, organs or served.organs, threads))
        engine, model, organ_gate = build_engine(settings, served, torch.device("cpu"), _FixedEndpoints(processes))
        engine.start()
        stack.callback(engine.stop)
        experts = engine._runner.dispatcher.placement
        if isinstance(experts, RemoteExperts):
            experts.wait_until_connected([process.organ for process in processes], CONNECT_SECONDS)

        def run(workload: Workload) -> Timings:
            return run_in_engine(engine, model, organ_gate, workload)

        yield MeasuredEngine(engine, run, served.expert_set, processes)


def router_environment(threads: int) -> dict[str, str]:
    """The environment of a served router's process."""
    return environment_of(_settings(Path("checkpoint"), "remote", "auto", 1, threads))


def become_router_process(module: str) -> None:
    """Starts this program again with the environment of a served router's process, unless it has it already.

    The allocator and gRPC read theirs once, when a process begins.

    Args:
        module: that runs as `__main__`.
    """
    environment = router_environment(1)
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | environment)


def _settings(
    checkpoint: Path, placement: Placement, dtype: DTypeName, max_batch_size: int, threads: int
) -> RouterSettings:
    config = Config(
        model=ModelSection(checkpoint=checkpoint, torch_threads=threads, device="cpu", dtype=dtype),
        router=RouterSection(
            experts="remote" if placement == "remote" else "local",
            max_batch_size=max_batch_size,
            resources=Resources(num_cpus=0),
        ),
    )
    settings = settings_of(config, (), "loopback")[ROUTER]
    assert isinstance(settings, RouterSettings)
    return settings
