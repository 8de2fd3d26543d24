"""Calls of replicas in separate processes over shared memory: the same bits, after any crash, and no leftovers."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from experts.kernels.base import NO_EXPERT
from router.dispatch.channel import ChannelState, ReplicaChannel
from router.dispatch.local import LocalExperts
from router.dispatch.remote import RemoteExperts
from router.errors import ExpertsUnavailableError
from tests.expert_servers import ROOT, ExpertProcess, expert_group, expert_process
from tests.split_golden import SplitGolden, split_golden
from tests.waiting import until

ORGAN = "liver"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def split(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitGolden:
    groups = {ORGAN: (0, 1), "heart": (2, 3)}
    return split_golden(golden_dir / "base" / "checkpoint", tmp_path_factory.mktemp("split"), groups, "organs")


@pytest.fixture(scope="module")
def digest(split: SplitGolden) -> str:
    return split.expert_set.bundle_digest(ORGAN)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    names = set(os.listdir("/dev/shm"))
    before = len(mapped(os.getpid()))
    yield
    assert not {name for name in set(os.listdir("/dev/shm")) - names if "echovlm" in name}
    until(lambda: len(mapped(os.getpid())) <= before)


@pytest.fixture
def replicas(split: SplitGolden, digest: str) -> Iterator[list[ExpertProcess]]:
    with ExitStack() as stack:
        yield [stack.enter_context(expert_process(ORGAN, split.registry, digest)) for _ in range(2)]


class Cluster:
    """A router's placement, and the addresses that it is given."""

    def __init__(self, *live: str, timeout_s: float = 10.0, shared_memory_bytes: int = 64 * MIB) -> None:
        self.live = list(live)
        self.experts = RemoteExperts(
            lambda organ: list(self.live), exchange_timeout_s=timeout_s, shared_memory_bytes=shared_memory_bytes
        )
        until(lambda: all(channel.state is ChannelState.READY for channel in self.channels()))

    def channels(self) -> list[ReplicaChannel]:
        return self.experts._refresh(ORGAN)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.experts.close()


def inputs(split: SplitGolden, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = split.tensors["lm_head.weight"].dtype
    hidden_size = int(str(split.config["hidden_size"]))
    return (
        torch.randn((tokens, hidden_size), generator=generator).to(dtype),
        torch.randint(NO_EXPERT, 2, (tokens, 2), generator=generator),
        torch.rand((tokens, 2), generator=generator).to(dtype),
    )


def freeze(replica: ExpertProcess) -> None:
    os.kill(replica.process.pid, signal.SIGSTOP)
    state = Path(f"/proc/{replica.process.pid}/stat")
    until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")


def mapped(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:echovlm" in line]


def test_every_way_gives_the_same_bits(split: SplitGolden, digest: str, replicas: list[ExpertProcess]) -> None:
    address = replicas[0].address
    local = LocalExperts({ORGAN: expert_group(ORGAN, split.registry, [digest])})
    with Cluster(address) as shared, Cluster(address, shared_memory_bytes=0) as inline:
        assert [channel.shares_memory for channel in (*shared.channels(), *inline.channels())] == [True, False]
        for tokens in (0, 1, 3, 64, 700):
            x_TD, index_TK, weight_TK = inputs(split, tokens, tokens)
            rows = [None, torch.arange(tokens)[::3]]
            for row_R in rows:
                chosen = (index_TK, weight_TK) if row_R is None else (index_TK[row_R], weight_TK[row_R])
                wanted_RD, *found = [
                    placement.send(ORGAN, digest, 1, x_TD, *chosen, row_R).result()
                    for placement in (local, shared.experts, inline.experts)
                ]
                for each in found:
                    assert torch.equal(each.view(torch.uint8), wanted_RD.view(torch.uint8))


def test_the_answer_is_read_where_the_replica_wrote_it(
    split: SplitGolden, digest: str, replicas: list[ExpertProcess]
) -> None:
    """A copy on the way back would be in other memory."""
    with Cluster(replicas[0].address) as cluster:
        exchange = cluster.experts.send(ORGAN, digest, 0, *inputs(split, 5))
        output_TD = exchange.result()
        spans = [line.split()[0].split("-") for line in mapped(os.getpid())]
        assert any(int(low, 16) <= output_TD.data_ptr() < int(high, 16) for low, high in spans)
        assert exchange.compute_s > 0


def test_answers_that_are_kept_do_not_change(split: SplitGolden, digest: str, replicas: list[ExpertProcess]) -> None:
    with Cluster(replicas[0].address) as cluster:
        kept, copies = [], []
        for seed in range(40):
            output_TD = cluster.experts.send(ORGAN, digest, 0, *inputs(split, 1 + seed % 7, seed)).result()
            if seed % 3 == 0:
                kept.append(output_TD)
                copies.append(output_TD.clone())
        first = cluster.experts.send(ORGAN, digest, 0, *inputs(split, 4, 1))
        second = cluster.experts.send(ORGAN, digest, 1, *inputs(split, 4, 2))
        dropped = cluster.experts.send(ORGAN, digest, 1, *inputs(split, 4, 3))
        del dropped
        assert not torch.equal(second.result(), first.result())
    # The router is gone; what it gave is still there.
    assert all(torch.equal(output_TD, copy) for output_TD, copy in zip(kept, copies, strict=True))


def test_over_the_budget_tensors_travel_in_the_messages_and_it_is_said_once(
    split: SplitGolden, digest: str, replicas: list[ExpertProcess], caplog: pytest.LogCaptureFixture
) -> None:
    local = LocalExperts({ORGAN: expert_group(ORGAN, split.registry, [digest])})
    with Cluster(replicas[0].address, shared_memory_bytes=64 * 1024) as cluster, caplog.at_level(logging.WARNING):
        for tokens in (500, 3, 600):
            arguments = inputs(split, tokens)
            output_TD = cluster.experts.send(ORGAN, digest, 0, *arguments).result()
            assert torch.equal(output_TD, local.send(ORGAN, digest, 0, *arguments).result())
            assert bool(is_shared(output_TD)) == (tokens == 3)
        assert cluster.channels()[0].shares_memory
    said = [record.getMessage() for record in caplog.records if "router.shared_memory_bytes" in record.getMessage()]
    assert len(said) == 1


def is_shared(tensor: torch.Tensor) -> bool:
    spans = [line.split()[0].split("-") for line in mapped(os.getpid())]
    return any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in spans)


def test_a_killed_replica_is_left_for_another_one(
    split: SplitGolden, digest: str, replicas: list[ExpertProcess], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = inputs(split, 300)
    with Cluster(*(replica.address for replica in replicas)) as cluster:
        wanted_TD = cluster.experts.send(ORGAN, digest, 0, *arguments).result().clone()
        freeze(replicas[0])
        freeze(replicas[1])
        under_way = [cluster.experts.send(ORGAN, digest, 0, *arguments) for _ in range(4)]
        assert sorted(channel.in_flight for channel in cluster.channels()) == [2, 2]
        replicas[0].process.kill()
        os.kill(replicas[1].process.pid, signal.SIGCONT)
        started = time.monotonic()
        for exchange in under_way:
            assert torch.equal(exchange.result(), wanted_TD)
        assert time.monotonic() - started < 5, "the exchange's timeout was waited for"
        cluster.live.remove(replicas[0].address)
        replicas[1].process.kill()
        with pytest.raises(ExpertsUnavailableError):
            cluster.experts.send(ORGAN, digest, 0, *arguments).result()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "the local path was blamed"


def test_a_replica_that_dies_while_it_is_not_used_is_noticed(
    split: SplitGolden, digest: str, replicas: list[ExpertProcess], caplog: pytest.LogCaptureFixture
) -> None:
    with Cluster(replicas[0].address) as cluster:
        assert cluster.experts.unavailable(ORGAN) is None
        replicas[0].process.kill()
        until(lambda: cluster.experts.unavailable(ORGAN) is not None, timeout_s=8)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "the local path was blamed"


def test_a_hung_replica_counts_as_lost_and_what_it_writes_later_does_no_harm(
    split: SplitGolden, digest: str, replicas: list[ExpertProcess]
) -> None:
    hung, other = replicas
    with Cluster(hung.address, timeout_s=1.0) as cluster:
        (channel,) = cluster.channels()
        freeze(hung)
        started = time.monotonic()
        with pytest.raises(ExpertsUnavailableError, match=r"did not answer within 1 s \(router.exchange_timeout_s\)"):
            cluster.experts.send(ORGAN, digest, 0, *inputs(split, 30)).result()
        assert 0.9 < time.monotonic() - started < 4
        assert channel.state is ChannelState.CLOSED
        cluster.live[:] = [other.address]
        cluster.experts.wait_until_connected([ORGAN], 10)
        answers = [cluster.experts.send(ORGAN, digest, 0, *inputs(split, 30, seed)).result() for seed in range(5)]
        copies = [answer.clone() for answer in answers]
        os.kill(hung.process.pid, signal.SIGCONT)
        until(lambda: not mapped(hung.process.pid))
        assert all(torch.equal(answer, copy) for answer, copy in zip(answers, copies, strict=True))
        # It is used again once it answers.
        cluster.live[:] = [hung.address]
        cluster.experts.wait_until_connected([ORGAN], 10)
        assert torch.equal(cluster.experts.send(ORGAN, digest, 0, *inputs(split, 30)).result(), copies[0])


def test_a_hung_replica_is_left_for_another_one(split: SplitGolden, digest: str, replicas: list[ExpertProcess]) -> None:
    with Cluster(*(replica.address for replica in replicas), timeout_s=1.0) as cluster:
        wanted_TD = cluster.experts.send(ORGAN, digest, 0, *inputs(split, 30)).result().clone()
        freeze(replicas[0])
        for _ in range(2):
            exchanges = [cluster.experts.send(ORGAN, digest, 0, *inputs(split, 30)) for _ in range(2)]
            assert all(torch.equal(exchange.result(), wanted_TD) for exchange in exchanges)


def test_a_replica_that_is_retired_answers_what_is_under_way(
    split: SplitGolden, digest: str, replicas: list[ExpertProcess]
) -> None:
    with Cluster(replicas[0].address) as cluster:
        (channel,) = cluster.channels()
        exchanges = [cluster.experts.send(ORGAN, digest, 0, *inputs(split, 200, seed)) for seed in range(3)]
        cluster.live.clear()
        assert "no replica is running" in str(cluster.experts.unavailable(ORGAN))
        assert all(exchange.result().isfinite().all() for exchange in exchanges)
        assert channel.in_flight == 0
        until(lambda: not mapped(replicas[0].process.pid))


ROUTER = """
import sys, time
import torch
from router.dispatch.remote import RemoteExperts
address, digest, hidden_size = sys.argv[1:]
experts = RemoteExperts(lambda organ: [address], exchange_timeout_s=60.0)
experts.wait_until_connected(["liver"], 20)
x = torch.ones(50, int(hidden_size))
send = lambda: experts.send("liver", digest, 0, x, torch.zeros(50, 2, dtype=torch.int64), torch.ones(50, 2))
send().result()
print("ready", flush=True)
pending = [send() for _ in range(20)]
time.sleep(60)
"""


def test_a_killed_router_leaves_nothing_and_the_replica_serves_on(
    split: SplitGolden, digest: str, replicas: list[ExpertProcess]
) -> None:
    replica = replicas[0]
    hidden_size = str(split.config["hidden_size"])
    for _ in range(2):
        command = [sys.executable, "-c", ROUTER, replica.address, digest, hidden_size]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as router:
            assert router.stdout is not None
            assert router.stdout.readline() == "ready\n"
            assert mapped(replica.process.pid)
            router.kill()
        until(lambda: not mapped(replica.process.pid))
    with Cluster(replica.address) as cluster:
        assert cluster.channels()[0].shares_memory
        assert cluster.experts.send(ORGAN, digest, 0, *inputs(split, 5)).result().isfinite().all()
