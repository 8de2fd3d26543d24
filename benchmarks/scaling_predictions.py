"""Queries of the scaling model: the best plan for a number of GPUs, when overlapping pays, and the model's accuracy."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.host_costs import ExchangeCosts, ProductRates, SoftwareCosts
from benchmarks.scaling_formulas import Prediction, Schedule, memory_of_router, predict
from benchmarks.scaling_system import Device, Limit, Mode, Network, Plan, Sizes, Software, System, sizes_of
from echovlm_ray.checkpoint.layout import ORGANS
from echovlm_ray.checkpoint.schema import ModelShape

GPUS_PER_HOST = 8
# Of a device's memory; the rest is for activations and the libraries.
USABLE_MEMORY = 0.9
MEASURED, CAPTURED = "measured", "captured"
LONGEST_LATENCY_S = 0.1


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What is not measured here: a GPU like an H100, and two kinds of network.

    Attributes:
        memory_gbs: 3,350 GB/s of HBM3, of which kernels should reach 0.7.
        tflops: 989 dense in bfloat16, of which half.
        memory_gb: of one GPU.
        host_latency_us: one way between processes of one host: half of what shared memory takes for a round trip
            (DESIGN section 7: 79 µs).
        host_gbs: a router's rows through shared memory, with a copy over PCI Express at either end.
        latency_us: one way between hosts: half of what gRPC takes over TCP (96 µs), and the wire.
        network_gbs: of one gRPC stream between hosts (8 MiB there and back in 7.8 ms).
        expert_us: what an exchange occupies the expert process for, beside the kernel.
        captured_layer_us: software of a layer where a CUDA graph does most of it.
    """

    memory_gbs: float = 0.7 * 3350
    tflops: float = 0.5 * 989
    memory_gb: float = 80
    host_latency_us: float = 40
    host_gbs: float = 20
    latency_us: float = 60
    network_gbs: float = 2.2
    expert_us: float = 50
    captured_layer_us: float = 20

    @property
    def device(self) -> Device:
        """One GPU."""
        return Device(1e9 * self.memory_gbs, 1e12 * self.tflops, 1e9 * self.memory_gb)

    def network(self, gpus: int) -> Network:
        """Between routers and expert replicas: in one host as long as the GPUs fit there."""
        if gpus <= GPUS_PER_HOST:
            return Network(1e-6 * self.host_latency_us, 1e9 * self.host_gbs)
        return Network(1e-6 * self.latency_us, 1e9 * self.network_gbs)


def software_of(result: Mapping[str, Any], dtype: str, expert_s: float) -> Software:
    """What `benchmarks.host_costs` measured of the software.

    Raises:
        ValueError: it did not measure that dtype.
    """
    if dtype not in result["software"]:
        raise ValueError(
            f"the host's costs have no {dtype}, only {', '.join(result['software'])}: "
            f"run `python -m benchmarks.host_costs --dtype {dtype}`"
        )
    costs, exchange = SoftwareCosts(**result["software"][dtype]), ExchangeCosts(**result["exchange"])
    return Software(
        layer_s=costs.layer_s,
        sequence_s=costs.sequence_s,
        step_s=costs.step_s,
        token_s=costs.token_s,
        gate_s=costs.gate_s,
        exchange_s=exchange.send_s,
        expert_s=expert_s,
    )


def plans(gpus: int, groups: int, mode: Mode) -> Iterator[Plan]:
    """All ways to divide the GPUs: one for everything; or an eighth for vision, the rest for routers and experts."""
    if gpus == 1:
        yield Plan(mode, groups=groups)
        return
    vision = max(1, gpus // 8)
    for routers in range(1, gpus - vision):
        yield Plan(mode, routers, groups, gpus - vision - routers, vision)


def best(system: System, gpus: int, requests: int, context: int) -> Prediction | None:
    """The plan with the most tokens/s, of two equal ones that with fewer routers; None if the cache fits in none."""
    found: Prediction | None = None
    for plan in plans(gpus, system.plan.groups, system.plan.mode):
        candidate = replace(system, plan=plan)
        if plan.routers > requests or (
            memory_of_router(candidate, requests, context) > USABLE_MEMORY * system.device.memory_bytes
        ):
            continue
        prediction = predict(candidate, requests, context)
        if found is None or prediction.tokens_per_s > 1.0001 * found.tokens_per_s:
            found = prediction
    return found


def latency_at_which_two_pay(system: System, requests: int, context: int, schedule: Schedule) -> float | None:
    """The one-way latency from which a schedule with two micro-batches wins; None if that is beyond 0.1 s."""

    def gain(latency_s: float) -> float:
        slow = replace(system, network=replace(system.network, latency_s=latency_s))
        return predict(slow, requests, context, Schedule.ONE).step_s - predict(slow, requests, context, schedule).step_s

    low, high = 0.0, LONGEST_LATENCY_S
    if gain(high) <= 0:
        return None
    if gain(low) > 0:
        return 0.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (low, middle) if gain(middle) > 0 else (middle, high)
    return high


def hidden_latency(system: System, requests: int, context: int) -> float:
    """The one-way latency up to which the way to the experts costs nothing: dense MLP and shared expert take longer."""

    def visible(latency_s: float) -> bool:
        slow = replace(system, network=replace(system.network, latency_s=latency_s))
        return predict(slow, requests, context, Schedule.ONE).costs.get(Limit.LATENCY, 0.0) > 0

    low, high = 0.0, LONGEST_LATENCY_S
    if visible(1e-9):
        return 0.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (low, middle) if visible(middle) else (middle, high)
    return low


@dataclass(frozen=True, slots=True)
class Check:
    """One measured figure and its prediction."""

    dtype: str
    placement: str
    organs: int
    batch: int
    measured: float
    predicted: Prediction

    @property
    def is_crowded(self) -> bool:
        """Whether there were more processes than cores."""
        return self.placement == "remote" and self.organs > 1

    @property
    def error(self) -> float:
        """How much more tokens/s are predicted than were measured, as a share of the latter."""
        return self.predicted.tokens_per_s / self.measured - 1


def machine_system(result: Mapping[str, Any], dtype: str, placement: str, organs: int) -> System:
    """The machine that was measured: a core for the router, and one for all expert processes.

    The two share the memory. Half of what a round trip takes beside sending and kernel occupies the experts' core.
    """
    exchange = ExchangeCosts(**result["exchange"])
    away_s = max(0.0, exchange.round_trip_s - exchange.send_s) / 2
    remote = placement == "remote"
    costs = SoftwareCosts(**result["software"][dtype])
    alone, contended = (
        Device(
            rates.bytes_per_s,
            rates.flops_per_s,
            memory_bytes=float("inf"),
            itemsize={"float32": 4, "bfloat16": 2}[dtype],
            overlaps=False,
            cache_bytes_per_s=costs.cache_bytes_per_s,
        )
        for rates in (ProductRates(**result["products"][dtype][name]) for name in ("alone", "shared"))
    )
    return System(
        sizes_of(ModelShape.from_config(result["config"])),
        alone,
        software_of(result, dtype, costs.kernel_s + (away_s if remote else 0.0)),
        Network(away_s / 2, exchange.bytes_per_s),
        Plan(groups=organs, expert_devices=1 if remote else 0, in_turn=True),
        contended,
    )


def check(result: Mapping[str, Any]) -> list[Check]:
    """Every figure of decoding, predicted."""
    checks = []
    for found in result["decoding"]:
        dtype, placement, organs, batch = (found[name] for name in ("dtype", "placement", "organs", "batch"))
        prediction = predict(machine_system(result, dtype, placement, organs), batch, found["context"], Schedule.ONE)
        checks.append(Check(dtype, placement, organs, batch, found["tokens_per_s"], prediction))
    return checks


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the prediction."""

    software: str
    gpus: int
    requests: int
    prediction: Prediction | None


def lines_of(
    sizes: Sizes, result: Mapping[str, Any], assumptions: Assumptions, options: argparse.Namespace
) -> list[Line]:
    """All predictions, first with the measured software costs, then with CUDA graphs."""
    measured = software_of(result, "bfloat16", 1e-6 * assumptions.expert_us)
    captured = replace(measured, layer_s=1e-6 * assumptions.captured_layer_us, sequence_s=0.0)
    groups = len(ORGANS) if options.mode == "clone" else sizes.experts
    wanted = [
        (name, software, gpus, requests)
        for name, software in ((MEASURED, measured), (CAPTURED, captured))
        for gpus in options.gpus
        for requests in options.batches
    ]
    lines = []
    for name, software, gpus, requests in track(wanted, "predicting", console=Console(stderr=True)):
        plan = Plan(options.mode, groups=groups)
        system = System(sizes, assumptions.device, software, assumptions.network(gpus), plan)
        lines.append(Line(name, gpus, requests, best(system, gpus, requests, options.context)))
    return lines
