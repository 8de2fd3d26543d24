"""The arithmetic of the scaling model: sizes, hand-worked cases, limits, and what must grow or fall with what."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling_formulas import Schedule, memory_of_router, predict
from benchmarks.scaling_model import RELEASED, RESULTS, arguments, main
from benchmarks.scaling_predictions import (
    Assumptions,
    best,
    check,
    hidden_latency,
    latency_at_which_two_pay,
    lines_of,
    machine_system,
    plans,
)
from benchmarks.scaling_report import markdown
from benchmarks.scaling_system import Device, Limit, Network, Plan, Software, System, sizes_of
from echovlm_ray.checkpoint.schema import ModelShape

SIZES = sizes_of(ModelShape.from_config(RELEASED))
GPU = Assumptions().device
FAST = Network(latency_s=1e-6, bytes_per_s=1e11)
NO_SOFTWARE = Software()
APART = Plan(routers=1, groups=7, expert_devices=7)
CONTEXT = 1024

counts = st.integers(1, 300)
routers, expert_devices = st.integers(1, 9), st.integers(0, 30)
plan_strategy = st.one_of(
    st.builds(Plan, st.just("clone"), routers, st.integers(1, 7), expert_devices, in_turn=st.booleans()),
    st.builds(Plan, st.just("partition"), routers, st.sampled_from((1, 2, 4)), expert_devices),
)
software_strategy = st.builds(Software, *(st.floats(0, 1e-3) for _ in range(7)))
system_strategy = st.builds(
    System,
    sizes=st.just(SIZES),
    device=st.builds(replace, st.just(GPU), overlaps=st.booleans()),
    software=software_strategy,
    network=st.builds(Network, st.floats(1e-6, 1e-2), st.floats(1e8, 1e12)),
    plan=plan_strategy,
)


def system(
    plan: Plan = APART, software: Software = NO_SOFTWARE, network: Network = FAST, device: Device = GPU
) -> System:
    return System(SIZES, device, software, network, plan)


def test_the_released_sizes() -> None:
    assert SIZES.total == pytest.approx(11.68e9, abs=0.005e9)
    assert SIZES.routed == pytest.approx(1.70e9, abs=0.005e9)
    assert SIZES.vision == pytest.approx(0.68e9, abs=0.005e9)
    assert SIZES.expert == 3 * 3584 * 1408
    assert SIZES.cached * SIZES.layers * 2 == 56 * 1024
    layer = SIZES.attention + SIZES.dense + SIZES.shared + SIZES.small
    outside = 2 * SIZES.head + SIZES.vision + SIZES.routed
    # What remains is norms.
    assert SIZES.total - outside - SIZES.layers * layer == (2 * SIZES.layers + 1) * 3584


def test_a_model_without_experts_is_refused() -> None:
    stock = {name: size for name, size in RELEASED.items() if "moe" not in name and "shared" not in name}
    with pytest.raises(ValueError, match="describes none"):
        sizes_of(ModelShape.from_config(stock))


def test_one_request_on_one_gpu_reads_every_active_weight_once() -> None:
    found = predict(system(Plan(groups=7)), 1, CONTEXT)
    active = SIZES.layers * (SIZES.attention + SIZES.dense + SIZES.shared + SIZES.small + 2 * SIZES.expert) + SIZES.head
    cache = SIZES.layers * SIZES.cached * CONTEXT
    assert found.step_s == pytest.approx(2 * (active + cache) / GPU.bytes_per_s, rel=1e-9)
    assert found.costs[Limit.EXPERTS] == pytest.approx(SIZES.layers * 4 * SIZES.expert / GPU.bytes_per_s)
    assert found.limit is Limit.WEIGHTS


def test_a_layer_apart_takes_the_longer_of_both_ways() -> None:
    kernel_s = 2 * SIZES.expert * 2 / GPU.bytes_per_s
    beside_s = 2 * (SIZES.dense + SIZES.shared) / GPU.bytes_per_s
    bytes_there_and_back = 2 * 3584 * 2 + 2 * (4 + 2)
    near = predict(system(network=Network(1e-6, 1e9)), 1, CONTEXT)
    far = predict(system(network=Network(1e-3, 1e9)), 1, CONTEXT)
    away_s = 2e-3 + kernel_s + bytes_there_and_back / 1e9
    assert far.step_s - near.step_s == pytest.approx(SIZES.layers * (away_s - beside_s), rel=1e-9)
    assert near.costs.get(Limit.LATENCY, 0.0) == near.costs.get(Limit.EXPERTS, 0.0) == 0.0


def test_the_way_is_hidden_up_to_a_latency() -> None:
    apart = system()
    hidden_s = hidden_latency(apart, 8, CONTEXT)

    def step_s(latency_s: float) -> float:
        return predict(replace(apart, network=replace(FAST, latency_s=latency_s)), 8, CONTEXT, Schedule.ONE).step_s

    assert hidden_s > 1e-5
    assert step_s(0.9 * hidden_s) == step_s(0.1 * hidden_s)
    assert step_s(hidden_s + 1e-5) == pytest.approx(step_s(0.0) + SIZES.layers * 2e-5, rel=1e-3)


def test_two_micro_batches_pay_across_layers_where_the_way_is_long_and_never_layer_by_layer() -> None:
    """A decode step is the reading of weights: both halves read them all."""
    apart = system()
    pays_s = latency_at_which_two_pay(apart, 8, CONTEXT, Schedule.ACROSS_LAYERS)
    assert pays_s is not None
    assert pays_s > hidden_latency(apart, 8, CONTEXT)
    assert latency_at_which_two_pay(apart, 8, CONTEXT, Schedule.LAYER_BY_LAYER) is None
    for latency_s, wins in ((0.9 * pays_s, False), (1.1 * pays_s, True)):
        slow = replace(apart, network=replace(FAST, latency_s=latency_s))
        one, two = (predict(slow, 8, CONTEXT, schedule) for schedule in (Schedule.ONE, Schedule.ACROSS_LAYERS))
        assert (two.step_s < one.step_s) is wins


def test_two_micro_batches_pay_layer_by_layer_where_rows_cost_and_weights_do_not() -> None:
    computing = system(device=replace(GPU, bytes_per_s=1e15, flops_per_s=1e13), network=Network(1e-6, 2e8))
    found = predict(computing, 256, 1)
    assert found.schedule is Schedule.LAYER_BY_LAYER
    assert found.step_s < predict(computing, 256, 1, Schedule.ONE).step_s


@pytest.mark.parametrize(
    ("limit", "changed", "requests", "context"),
    [
        (Limit.WEIGHTS, system(), 1, CONTEXT),
        (Limit.COMPUTE, system(device=replace(GPU, flops_per_s=1e12)), 64, CONTEXT),
        (Limit.CACHE, system(), 64, 100_000),
        (Limit.LATENCY, system(network=Network(5e-3, 1e11)), 1, CONTEXT),
        (Limit.NETWORK, system(network=Network(1e-6, 1e6)), 8, CONTEXT),
        (Limit.EXPERTS, system(Plan(routers=64, groups=7, expert_devices=1)), 512, CONTEXT),
        (Limit.DISPATCH, system(software=Software(exchange_s=5e-3)), 8, CONTEXT),
        (Limit.SOFTWARE, system(software=Software(layer_s=5e-3)), 8, CONTEXT),
    ],
)
def test_limits(limit: Limit, changed: System, requests: int, context: int) -> None:
    assert predict(changed, requests, context).limit is limit


@settings(max_examples=150, deadline=None)
@given(system_strategy, counts, st.integers(1, 4096), st.floats(1.0, 10.0))
def test_better_hardware_is_never_slower(given_system: System, requests: int, context: int, factor: float) -> None:
    step_s = predict(given_system, requests, context).step_s
    device, network, software = given_system.device, given_system.network, given_system.software
    better = [
        replace(given_system, device=replace(device, bytes_per_s=device.bytes_per_s * factor)),
        replace(given_system, device=replace(device, flops_per_s=device.flops_per_s * factor)),
        replace(given_system, network=replace(network, latency_s=network.latency_s / factor)),
        replace(given_system, network=replace(network, bytes_per_s=network.bytes_per_s * factor)),
        replace(given_system, software=replace(software, layer_s=software.layer_s / factor)),
        replace(given_system, software=replace(software, gate_s=software.gate_s / factor)),
    ]
    for system_ in better:
        # Where routers queue, a faster router comes back sooner and waits longer: it gains less, never nothing.
        assert predict(system_, requests, context).step_s <= step_s * (1 + 1e-9)


@settings(max_examples=150, deadline=None)
@given(system_strategy, counts, st.integers(1, 4096))
def test_costs_add_up_and_more_context_costs_more(given_system: System, requests: int, context: int) -> None:
    found = predict(given_system, requests, context)
    assert all(seconds >= 0 for seconds in found.costs.values())
    assert found.tokens_per_s * sum(found.costs.values()) == pytest.approx(requests)
    assert predict(given_system, requests, 2 * context).step_s >= found.step_s
    assert found.costs[found.limit] == max(found.costs.values())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(8, 512))
def test_a_replica_never_serves_more_than_it_can(routers: int, groups: int, requests: int) -> None:
    """However many routers send to one device, it works for no more than all of the time."""
    plan = Plan(routers=routers, groups=groups, expert_devices=groups)
    slow = replace(GPU, bytes_per_s=GPU.bytes_per_s / 5)
    crowded = system(plan, device=slow)
    batch = -(-requests // routers)
    found = predict(crowded, requests, CONTEXT, Schedule.ONE)
    exchanges_per_s = min(routers, requests) * crowded.chance_of_any(batch) * SIZES.layers / found.step_s
    least_s = SIZES.expert * 2 * 2 / slow.bytes_per_s
    assert exchanges_per_s * least_s <= 1.0


@pytest.mark.parametrize(("batch", "groups", "hit"), [(1, 7, 1 / 7), (16, 7, 1 / 7), (64, 7, 1 / 7), (40, 4, 0.5)])
def test_the_busiest_group(batch: int, groups: int, hit: float) -> None:
    plan = Plan("clone" if groups == 7 else "partition", groups=groups, expert_devices=groups)
    numbers = random.Random(0)
    drawn = [max(sum(numbers.random() < hit for _ in range(batch)) for _ in range(groups)) or 1 for _ in range(2000)]
    found = system(plan)
    assert found.hit == pytest.approx(hit)
    assert found.busiest(batch) == pytest.approx(sum(drawn) / len(drawn), rel=0.05)
    assert found.chance_of_any(batch) * found.typical(batch) == pytest.approx(batch * hit)


def test_requests_dealt_in_turn_are_spread_evenly() -> None:
    even = system(replace(APART, in_turn=True))
    assert [even.chance_of_any(rows) * 7 for rows in (1, 7, 8)] == pytest.approx([1, 7, 7])
    assert [even.busiest(rows) for rows in (1, 7, 8, 14)] == [1, 1, 2, 2]


def test_partition_sends_each_token_to_each_of_its_experts() -> None:
    partition = system(Plan("partition", groups=4, expert_devices=4), network=Network(1e-6, 1e6))
    clone = system(network=Network(1e-6, 1e6))
    seconds = [predict(found, 1, CONTEXT).costs[Limit.NETWORK] for found in (partition, clone)]
    assert seconds[0] == pytest.approx(2 * seconds[1])
    with pytest.raises(ValueError, match="4 experts cannot be divided among 3 groups"):
        system(Plan("partition", groups=3))


def test_a_batch_of_one_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="a batch of 1 cannot be divided into 2"):
        predict(system(), 1, CONTEXT, Schedule.LAYER_BY_LAYER)


def test_memory_of_a_router() -> None:
    cache = 8 * CONTEXT * 56 * 1024
    assert memory_of_router(system(), 8, CONTEXT) == 2 * SIZES.backbone + cache
    together = memory_of_router(system(Plan(groups=7)), 8, CONTEXT)
    assert together == 2 * (SIZES.total + 6 * SIZES.routed) + cache


def test_plans_use_all_gpus_and_the_best_is_best() -> None:
    assert [plan.devices for plan in plans(1, 7, "clone")] == [1]
    found = list(plans(8, 7, "clone"))
    assert {plan.devices for plan in found} == {8}
    assert {plan.vision_devices for plan in found} == {1}
    chosen = best(system(), 8, 16, CONTEXT)
    assert chosen is not None
    candidates = [predict(system(plan), 16, CONTEXT).tokens_per_s for plan in found]
    assert chosen.tokens_per_s >= max(candidates) / 1.0002
    assert best(system(Plan(groups=7)), 1, 512, 100_000) is None


def measured() -> dict[str, Any]:
    """What is measured of a machine that does exactly what the formulas say."""
    result: dict[str, Any] = {
        "machine": "A machine.",
        "config": RELEASED,
        "products": {
            "bfloat16": {
                "alone": {"bytes_per_s": 3e10, "flops_per_s": 5e11},
                "shared": {"bytes_per_s": 2e10, "flops_per_s": 4e11},
            }
        },
        "software": {
            "bfloat16": {
                "layer_s": 4e-4,
                "sequence_s": 2e-5,
                "step_s": 5e-4,
                "token_s": 4e-5,
                "gate_s": 4e-5,
                "kernel_s": 5e-5,
                "cache_bytes_per_s": 8e9,
            }
        },
        "exchange": {"send_s": 1e-4, "round_trip_s": 4e-4, "bytes_per_s": 1e9},
        "decoding": [],
    }
    for placement in ("remote", "in process"):
        for organs, batch in ((1, 1), (1, 8), (7, 8)):
            case = {"dtype": "bfloat16", "placement": placement, "organs": organs, "batch": batch}
            found = predict(machine_system(result, "bfloat16", placement, organs), batch, 100, Schedule.ONE)
            result["decoding"].append(case | {"context": 100, "tokens_per_s": found.tokens_per_s})
    return result


def test_the_check_tells_the_error() -> None:
    result = measured()
    assert [found.error for found in check(result)] == pytest.approx([0.0] * 6)
    result["decoding"][0]["tokens_per_s"] *= 2
    assert check(result)[0].error == pytest.approx(-0.5)


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    costs, output = tmp_path / "costs.json", tmp_path / "model.md"
    costs.write_text(json.dumps(measured()))
    options = ["--costs", str(costs), "--output", str(output), "--gpus", "1", "8", "--batches", "1", "16"]
    monkeypatch.setattr("sys.argv", ["scaling_model", *options, "--plot"])
    main()
    text = output.read_text()
    assert "11.68 B parameters" in text
    assert text.count("| all on one |") == 4
    assert text.count("mean error 0%, largest 0%") == 2
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["scaling_model", *options, "--json", "--latency-us", "7"])
    capsys.readouterr()
    main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["assumptions"]["latency_us"] == 7
    assert len(printed["predictions"]) == 8
    for prediction in printed["predictions"]:
        assert sum(prediction["costs_s"].values()) == pytest.approx(prediction["step_s"])
    monkeypatch.setattr("sys.argv", ["scaling_model", "--costs", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit):
        main()
    assert "run `python -m benchmarks.host_costs` first" in capsys.readouterr().err


def test_the_committed_result_is_made_of_the_committed_costs() -> None:
    result = json.loads((RESULTS / "host_costs.json").read_text())
    options = arguments().parse_args([])
    lines = lines_of(SIZES, result, Assumptions(), options)
    text = markdown(SIZES, lines, check(result), Assumptions(), options.mode, options.context, result["machine"])
    committed = (RESULTS / "scaling_model.md").read_text()
    assert committed.startswith(text), "run `python -m benchmarks.scaling_model --plot`"
