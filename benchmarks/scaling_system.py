"""The scaling model's description of a system: sizes, devices, network, software, and placement."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from echovlm_ray.checkpoint.schema import ModelShape, part_of

Mode = Literal["clone", "partition"]


class Limit(StrEnum):
    """What a step's time can be spent on."""

    WEIGHTS = "weights bandwidth"
    COMPUTE = "compute"
    CACHE = "KV cache reads"
    LATENCY = "network latency"
    NETWORK = "network bandwidth"
    EXPERTS = "expert kernels"
    DISPATCH = "host of a dispatch"
    SOFTWARE = "software overhead"


class Costs(dict[Limit, float]):
    """Seconds by what they are spent on."""

    def __add__(self, other: Mapping[Limit, float]) -> "Costs":
        """One after the other."""
        return Costs({limit: self.get(limit, 0.0) + other.get(limit, 0.0) for limit in {**self, **other}})

    def times(self, factor: float) -> "Costs":
        """So many times."""
        return Costs({limit: seconds * factor for limit, seconds in self.items()})

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(self.values())


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of parameters; those from `attention` to `expert` are of one layer, `expert` is one routed expert."""

    hidden: int
    layers: int
    experts: int
    top_k: int
    # Numbers that a token leaves in the cache, in one layer.
    cached: int
    attention: int
    dense: int
    shared: int
    small: int
    expert: int
    head: int
    routed: int
    vision: int
    total: int

    @property
    def backbone(self) -> int:
        """The parameters in a router."""
        return self.total - self.routed - self.vision


def sizes_of(shape: ModelShape) -> Sizes:
    """The sizes of a model, from the tensors that its config.json asks for.

    Raises:
        ValueError: the model has no routed experts.
    """
    if not shape.has_experts or shape.num_experts_per_tok is None:
        raise ValueError("the scaling model is of a mixture of experts; this config.json describes none")
    parts: Counter[str] = Counter()
    for name, dimensions in (shape.backbone_tensors() | shape.routed_tensors()).items():
        parts[part_of(name) or "unknown"] += math.prod(dimensions)
    layers, head_dim = shape.num_hidden_layers, shape.hidden_size // shape.num_attention_heads
    return Sizes(
        hidden=shape.hidden_size,
        layers=layers,
        experts=shape.num_experts,
        top_k=shape.num_experts_per_tok,
        cached=2 * shape.num_key_value_heads * head_dim,
        attention=parts["attention"] // layers,
        dense=parts["dense MLP"] // layers,
        shared=parts["shared experts"] // layers,
        small=(parts["gates"] + parts["coefficients"]) // layers,
        expert=parts["routed experts"] // (layers * shape.num_experts),
        head=shape.vocab_size * shape.hidden_size,
        routed=parts["routed experts"],
        vision=parts["vision"],
        total=parts.total(),
    )


@dataclass(frozen=True, slots=True)
class Device:
    """One processor; rates are those that its kernels reach, not those of its data sheet.

    Attributes:
        overlaps: True where a product reads weights while it computes, so that it takes the longer of the two times;
            False where it takes their sum (CPU cores: see the check in results/scaling_model.md).
        cache_bytes_per_s: at which keys and values are read; they are gathered, so it may be less than for weights.
    """

    bytes_per_s: float
    flops_per_s: float
    memory_bytes: float
    itemsize: int = 2
    overlaps: bool = True
    cache_bytes_per_s: float | None = None

    def product(self, parameters: float, rows: float, reading: Limit = Limit.WEIGHTS) -> Costs:
        """Multiplies rows by matrices of that many parameters in all; `reading` names the time to read them."""
        return self.work(parameters * self.itemsize / self.bytes_per_s, 2 * parameters * rows, reading)

    def work(self, reading_s: float, flops: float, reading: Limit) -> Costs:
        """Something that takes `reading_s` to read and has so many operations."""
        computing_s = flops / self.flops_per_s
        if not self.overlaps:
            return Costs({reading: reading_s, Limit.COMPUTE: computing_s})
        return Costs({reading: reading_s} if reading_s >= computing_s else {Limit.COMPUTE: computing_s})


@dataclass(frozen=True, slots=True)
class Network:
    """Between a router and the expert replicas: one way, and in each direction of one router's connection."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Software:
    """Seconds of the processor that drives the device; in series with everything else.

    Attributes:
        layer_s: Python and launches of a layer.
        sequence_s: what a layer's attention adds for every sequence.
        step_s: scheduling and the like, once a step.
        token_s: sampling and delivery of one token.
        gate_s: gate, gather and scatter of one exchange.
        exchange_s: handing one exchange over to another process.
        expert_s: what an exchange occupies the expert process for, beside their products.
    """

    layer_s: float = 0.0
    sequence_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0
    gate_s: float = 0.0
    exchange_s: float = 0.0
    expert_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Which device does what.

    Attributes:
        routers: router replicas; requests are divided evenly among them.
        groups: organs with a copy of all experts each (clone), or parts of the experts (partition).
        expert_devices: devices with expert groups; 0 where the router computes the experts itself. With fewer devices
            than groups several groups share one; with more, groups have replicas.
        vision_devices: have no part in decoding.
        in_turn: True where requests are dealt to the organs in turn; False where each picks one by chance.
    """

    mode: Mode = "clone"
    routers: int = 1
    groups: int = 7
    expert_devices: int = 0
    vision_devices: int = 0
    in_turn: bool = False

    @property
    def devices(self) -> int:
        """How many in all."""
        return self.routers + self.expert_devices + self.vision_devices

    @property
    def sharing(self) -> int:
        """Groups on one expert device."""
        return -(-self.groups // self.expert_devices)

    @property
    def routers_per_replica(self) -> int:
        """How many routers send to the same expert replica."""
        return -(-self.routers // max(1, self.expert_devices // self.groups))


@dataclass(frozen=True, slots=True)
class System:
    """All that a prediction depends on, but for the load.

    Attributes:
        contended: what a device reaches while router and experts compute beside each other, where they share one
            memory; None: the same as ever.
    """

    sizes: Sizes
    device: Device
    software: Software
    network: Network
    plan: Plan
    contended: Device | None = None

    def __post_init__(self) -> None:
        if self.plan.mode == "partition" and self.sizes.experts % self.plan.groups:
            raise ValueError(
                f"{self.sizes.experts} experts cannot be divided among {self.plan.groups} groups; "
                "give a number of groups that divides them"
            )

    @property
    def device_beside(self) -> Device:
        """The device while router and experts compute beside each other; alone where the router computes both."""
        return self.device if self.plan.expert_devices == 0 else self.contended or self.device

    @property
    def group_experts(self) -> int:
        """Experts of one group."""
        return self.sizes.experts if self.plan.mode == "clone" else self.sizes.experts // self.plan.groups

    @property
    def hit(self) -> float:
        """The chance that a token has an expert in a given group: organs, and experts, are equally often chosen."""
        if self.plan.mode == "clone":
            return 1 / self.plan.groups
        experts, top_k = self.sizes.experts, self.sizes.top_k
        return 1 - math.comb(experts - self.group_experts, top_k) / math.comb(experts, top_k)

    def chance_of_any(self, rows: float) -> float:
        """The chance that a given group gets any of the rows."""
        if self.plan.in_turn:
            return min(1.0, rows * self.hit)
        return 1.0 - float((1.0 - self.hit) ** rows)

    def typical(self, rows: float) -> float:
        """Rows of a group that gets any, expected."""
        return rows * self.hit / self.chance_of_any(rows)

    def busiest(self, rows: float) -> float:
        """Rows of the group that gets most of them, expected; groups are taken as independent of each other."""
        if self.plan.in_turn or self.hit >= 1.0:
            return max(1.0, float(math.ceil(rows * self.hit)))
        # Σ P(most > m), from the binomial distribution of one group's rows.
        count = math.ceil(rows)
        expected, below = 0.0, 0.0
        for own in range(count):
            ways = math.lgamma(count + 1) - math.lgamma(own + 1) - math.lgamma(count - own + 1)
            below += math.exp(ways + own * math.log(self.hit) + (count - own) * math.log1p(-self.hit))
            expected += 1.0 - min(1.0, below) ** self.plan.groups
        return max(1.0, self.typical(rows), expected)
