"""P1 and P2 through the served system: token ids and patches in at the router, logits out."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
import yaml

from experts.transport.codec import tensor_from_proto
from protos import router_pb2, router_pb2_grpc
from tests.golden_cases import GoldenRow, golden_rows, router_request
from tests.running_system import ECHORAY, RunningSystem, running

ORGANS = ("breast", "liver")
GROUPS = {"breast": [2, 0], "liver": [3], "heart": [1]}


def split(source: Path, directory: Path, routing: str) -> Path:
    target = directory / routing
    options = ["--organs", ",".join(ORGANS)]
    if routing == "flat":
        groups = directory / "groups.yaml"
        groups.write_text(yaml.safe_dump(GROUPS))
        options = ["--groups", str(groups)]
    subprocess.run([ECHORAY, "checkpoint", "split", source, target, *options], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module", params=[("base", "organs"), ("base", "flat"), ("bf16", "organs")], ids="-".join)
def served(
    request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, RunningSystem]]:
    variant, routing = request.param
    directory = tmp_path_factory.mktemp(f"{variant}-{routing}")
    checkpoint = split(golden_dir / variant / "checkpoint", directory, routing)
    with running(checkpoint, directory) as system:
        yield variant, routing, system


def generate(channel: grpc.Channel, row: GoldenRow, organs: tuple[str, ...]) -> tuple[list[int], torch.Tensor]:
    token_ids: list[int] = []
    logits = []
    stub = router_pb2_grpc.RouterStub(channel)
    summary: router_pb2.RouterSummary | None = None
    for response in stub.Generate(router_request(row, organs=organs), timeout=60):
        token_ids += response.token_ids
        logits.append(tensor_from_proto(response.logits))
        if response.HasField("summary"):
            summary = response.summary
    assert summary is not None
    assert summary.completion_tokens == len(token_ids)
    assert sum(organ.routed_share for organ in summary.provenance.organs) == pytest.approx(1.0)
    if organs:
        assert {organ.organ for organ in summary.provenance.organs} == set(organs)
    return token_ids, torch.cat(logits)


def test_golden_cases_through_the_served_system(served: tuple[str, str, RunningSystem], golden_dir: Path) -> None:
    variant, routing, system = served
    (router,) = system.replicas("router")
    rows = list(golden_rows(golden_dir, variant))
    # Two organs at once, so that batches mix them; in a flat set no organ is chosen.
    choices: list[tuple[str, ...]] = [("breast",), ("liver",)] if routing == "organs" else [()]
    work = [(row, choices[index % len(choices)]) for index, row in enumerate(rows)]
    with system.inner_channel(router["endpoint"]) as channel, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda item: generate(channel, *item), work))
    for row, (token_ids, logits_TV) in zip(rows, answers, strict=True):
        prompt = len(row.input_ids)
        row.check_logits(logits_TV[:prompt])
        row.check_tokens(token_ids)
        assert len(logits_TV) == prompt + len(token_ids) - 1


def test_two_organs_of_identical_copies_equal_the_released_model(
    served: tuple[str, str, RunningSystem], golden_dir: Path
) -> None:
    variant, routing, system = served
    if routing == "flat":
        pytest.skip("a flat set has one gate, so there is no share to divide")
    (router,) = system.replicas("router")
    with system.inner_channel(router["endpoint"]) as channel:
        for row in list(golden_rows(golden_dir, variant))[:3]:
            token_ids, logits_TV = generate(channel, row, ORGANS)
            row.check_logits(logits_TV[: len(row.input_ids)])
            row.check_tokens(token_ids)
