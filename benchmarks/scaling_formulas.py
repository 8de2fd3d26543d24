"""The arithmetic of the scaling model: seconds of one decode step, and what they are spent on. See docs/scaling.md."""

from dataclasses import dataclass, replace
from enum import StrEnum

from benchmarks.scaling_system import Costs, Limit, System


class Schedule(StrEnum):
    """In what order a router computes a layer."""

    ONE = "one batch"
    # As the engine does with `router.micro_batches: 2`: both halves are begun, then both are finished.
    LAYER_BY_LAYER = "two micro-batches, layer by layer"
    # One half is finished and begun in the next layer while the other half's experts are away.
    ACROSS_LAYERS = "two micro-batches, across layers"

    @property
    def parts(self) -> int:
        """Into how many a batch is divided."""
        return 1 if self is Schedule.ONE else 2


# The chains through a layer of which the longest is its time: how many times the work before the experts (attention,
# gate, sending), the work beside them (dense MLP, shared expert), and the experts' way and work are in each.
WAYS = {
    Schedule.ONE: ((1, 1, 0), (1, 0, 1)),
    Schedule.LAYER_BY_LAYER: ((2, 2, 0), (1, 1, 1), (2, 0, 1)),
    Schedule.ACROSS_LAYERS: ((2, 2, 0), (1, 0, 1)),
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """One decode step with `requests` running at once in the whole system."""

    system: System
    requests: int
    schedule: Schedule
    costs: Costs

    @property
    def step_s(self) -> float:
        """Seconds between two tokens of a request."""
        return self.costs.seconds

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.requests / self.step_s

    @property
    def limit(self) -> Limit:
        """What most of the step is spent on."""
        return max(Limit, key=lambda limit: self.costs.get(limit, 0.0))


def predict(system: System, requests: int, context: int, schedule: Schedule | None = None) -> Prediction:
    """One decode step.

    Args:
        system: what it runs on.
        requests: running at once, in the whole system.
        context: tokens in the cache of each.
        schedule: how the router orders its work; None: the faster one of those that the engine has.

    Raises:
        ValueError: the batch of a router cannot be divided.
    """
    if requests < system.plan.routers:
        # The others have nothing to do.
        system = replace(system, plan=replace(system.plan, routers=requests))
    batch = -(-requests // system.plan.routers)
    if schedule is None:
        single = predict(system, requests, context, Schedule.ONE)
        if system.plan.expert_devices == 0 or batch < 2:
            return single
        double = predict(system, requests, context, Schedule.LAYER_BY_LAYER)
        return single if single.step_s <= double.step_s else double
    if schedule.parts > batch:
        raise ValueError(f"a batch of {batch} cannot be divided into {schedule.parts} micro-batches")
    software = system.software
    costs = _layer(system, batch, context, schedule).times(system.sizes.layers)
    costs += system.device.product(system.sizes.head, batch)
    costs += Costs({Limit.SOFTWARE: software.step_s + software.token_s * batch})
    return Prediction(system, requests, schedule, costs)


def memory_of_router(system: System, requests: int, context: int) -> float:
    """Bytes of weights and cache on the device of a router."""
    sizes, plan = system.sizes, system.plan
    parameters = sizes.backbone
    if plan.expert_devices == 0:
        parameters += sizes.vision + sizes.routed * (plan.groups if plan.mode == "clone" else 1)
    batch = -(-requests // plan.routers)
    return float((parameters + batch * context * sizes.layers * sizes.cached) * system.device.itemsize)


def _layer(system: System, batch: int, context: int, schedule: Schedule) -> Costs:
    sizes, device, software, plan = system.sizes, system.device, system.software, system.plan
    rows = batch / schedule.parts
    cached_bytes = rows * context * sizes.cached * device.itemsize
    cache = device.work(
        cached_bytes / (device.cache_bytes_per_s or device.bytes_per_s), 4 * rows * context * sizes.hidden, Limit.CACHE
    )
    before = device.product(sizes.attention, rows) + cache + device.product(sizes.small, rows)
    exchanges = plan.groups * system.chance_of_any(rows)
    before += Costs({Limit.SOFTWARE: software.layer_s + software.sequence_s * rows})
    before += Costs({Limit.DISPATCH: software.gate_s * exchanges})
    beside = system.device_beside
    local = beside.product(sizes.dense, rows) + beside.product(sizes.shared, rows)
    if plan.expert_devices == 0:
        kernel_s = exchanges * _group_kernel(system, system.typical(rows))
        experts = Costs({Limit.EXPERTS: kernel_s, Limit.DISPATCH: exchanges * software.expert_s})
        return (before + local + experts).times(schedule.parts)
    before += Costs({Limit.DISPATCH: software.exchange_s * exchanges})
    remote = _remote(system, rows)
    remote += Costs({Limit.EXPERTS: _queue(system, rows, schedule, before.seconds, local.seconds, remote.seconds)})
    ways = [before.times(b) + local.times(n) + remote.times(r) for b, n, r in WAYS[schedule]]
    return max(ways, key=lambda way: way.seconds)


def _remote(system: System, rows: float) -> Costs:
    """An exchange that does not wait for another: there, the busiest group's experts, and back."""
    sizes, itemsize = system.sizes, system.device.itemsize
    sent_rows = rows * system.plan.groups * system.hit
    row_bytes = 2 * sizes.hidden * itemsize + sizes.top_k * (4 + itemsize)
    # On a shared device the other groups' exchanges of this layer come first.
    others = (system.plan.sharing - 1) * system.chance_of_any(rows)
    own_s, other_s = (_group_kernel(system, share) for share in (system.busiest(rows), system.typical(rows)))
    return Costs(
        {
            Limit.LATENCY: 2 * system.network.latency_s,
            Limit.NETWORK: sent_rows * row_bytes / system.network.bytes_per_s,
            Limit.EXPERTS: own_s + others * other_s,
            Limit.DISPATCH: system.software.expert_s * (1 + others),
        }
    )


def _queue(system: System, rows: float, schedule: Schedule, before_s: float, local_s: float, remote_s: float) -> float:
    """Seconds that an exchange waits for those of other routers: mean value analysis of a closed network.

    Every router (or each of its two micro-batches) is a customer that comes back once a layer; the answer is exact
    for exponential service times, and a little high for these, which vary less.
    """
    exchanges = system.plan.sharing * system.chance_of_any(rows)
    # Several exchanges of a layer on one device count as one that is as long as all of them.
    service_s = (_group_kernel(system, system.typical(rows)) + system.software.expert_s) * max(1.0, exchanges)
    arrivals = min(1.0, exchanges)
    ways = WAYS[schedule]
    without_s = max(b * before_s + n * local_s + remote_s for b, n, r in ways if r)
    waiting, wait_s = 0.0, 0.0
    for customers in range(1, system.plan.routers_per_replica * schedule.parts + 1):
        # Where waiting hides behind the router's own work, nothing else keeps a layer as long as all its services.
        wait_s = max(service_s * waiting, arrivals * customers * service_s - without_s)
        cycle_s = max(b * before_s + n * local_s + r * (remote_s + wait_s) for b, n, r in ways)
        waiting = arrivals * customers * (service_s + wait_s) / cycle_s
    return wait_s


def _group_kernel(system: System, rows: float) -> float:
    """Seconds of the experts of one group for rows that came to it."""
    sizes, device, experts = system.sizes, system.device_beside, system.group_experts
    # The chance that such a row has a given one of the group's experts.
    share = sizes.top_k / sizes.experts / (1.0 if system.plan.mode == "clone" else system.hit)
    used = experts * (1.0 - float((1.0 - share) ** rows))
    reading_s = used * sizes.expert * device.itemsize / device.bytes_per_s
    return device.work(reading_s, 2 * sizes.expert * share * experts * rows, Limit.EXPERTS).seconds
