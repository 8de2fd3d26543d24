"""The streams to the expert groups, against real servers that misbehave."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest
import torch
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2

from experts.errors import BUNDLE_UNUSABLE
from experts.transport.codec import tensor_from_proto, tensor_to_proto
from protos import expert_pb2, expert_pb2_grpc
from router.dispatch.channel import ChannelState, ReplicaChannel
from router.dispatch.pending_call import ReplicaLostError
from router.dispatch.remote import RemoteExperts
from router.dispatch.tokens import Tokens
from router.errors import ExpertsFailedError, ExpertsUnavailableError, ExpertsUnusableError
from tests.waiting import until

X_TD = torch.arange(6.0).reshape(2, 3)
INDEX_TK = torch.zeros(2, 1, dtype=torch.int32)
WEIGHT_TK = torch.ones(2, 1)


class Replica(expert_pb2_grpc.ExpertGroupServicer):
    """Doubles what it gets, unless told otherwise."""

    def __init__(self, organ: str = "liver") -> None:
        self.organ = organ
        self.received = self.answered = 0
        # Layers that are answered only after this many seconds.
        self.delays: dict[int, float] = {}
        self.error: status_pb2.Status | None = None
        self.output: torch.Tensor | None = None
        self.break_stream = False
        # gRPC allows one write at a time; the tests have one stream to each replica.
        self.writing = asyncio.Lock()

    async def Status(
        self, request: expert_pb2.ExpertGroupStatusRequest, context: grpc.aio.ServicerContext
    ) -> expert_pb2.ExpertGroupStatusResponse:
        return expert_pb2.ExpertGroupStatusResponse(organ=self.organ)

    async def Forward(
        self, requests: AsyncIterator[expert_pb2.ForwardRequest], context: grpc.aio.ServicerContext
    ) -> None:
        async with asyncio.TaskGroup() as answers:
            async for request in requests:
                self.received += 1
                if self.break_stream:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the replica stops")
                answers.create_task(self._answer(request, context))

    async def _answer(self, request: expert_pb2.ForwardRequest, context: grpc.aio.ServicerContext) -> None:
        await asyncio.sleep(self.delays.get(request.layer, 0.0))
        response = expert_pb2.ForwardResponse(correlation_id=request.correlation_id)
        if self.error is not None:
            response.error.CopyFrom(self.error)
        else:
            output = tensor_from_proto(request.hidden_states) * 2 if self.output is None else self.output
            response.output.CopyFrom(tensor_to_proto(output))
        async with self.writing:
            await context.write(response)
        self.answered += 1


class Cluster:
    """Replicas on one event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.live: list[str] = []
        self.servers: dict[str, grpc.aio.Server] = {}

    def addresses(self, organ: str) -> list[str]:
        return list(self.live)

    def add(self, replica: Replica) -> str:
        address = asyncio.run_coroutine_threadsafe(self._start(replica), self.loop).result(10)
        self.live.append(address)
        return address

    async def _start(self, replica: Replica) -> str:
        server = grpc.aio.server()
        expert_pb2_grpc.add_ExpertGroupServicer_to_server(replica, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.servers[address] = server
        return address

    def kill(self, address: str) -> None:
        asyncio.run_coroutine_threadsafe(self.servers.pop(address).stop(None), self.loop).result(10)

    def close(self) -> None:
        for address in list(self.servers):
            self.kill(address)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    running = Cluster()
    yield running
    running.close()


@pytest.fixture
def experts(cluster: Cluster) -> Iterator[RemoteExperts]:
    remote = RemoteExperts(cluster.addresses, exchange_timeout_s=1.0)
    yield remote
    remote.close()


def send(experts: RemoteExperts, layer: int = 0) -> torch.Tensor:
    return experts.send("liver", "digest", layer, X_TD, INDEX_TK, WEIGHT_TK).result()


def threads_of(organ: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in (f"to-{organ}", f"open-{organ}")]


def test_exchanges_overlap_and_are_told_apart(cluster: Cluster) -> None:
    experts = RemoteExperts(cluster.addresses, exchange_timeout_s=30.0)
    replica = Replica()
    replica.delays = {0: 0.8, 1: 0.7}
    cluster.add(replica)
    experts.wait_until_connected(["liver"], 5)
    started = time.monotonic()
    pending = [experts.send("liver", "digest", layer, X_TD + layer, INDEX_TK, WEIGHT_TK) for layer in range(3)]
    for layer, exchange in reversed(list(enumerate(pending))):
        assert torch.equal(exchange.result(), (X_TD + layer) * 2)
    assert time.monotonic() - started < 1.4, "exchanges waited for each other"
    experts.close()


def test_nothing_waits_for_a_connection(experts: RemoteExperts, cluster: Cluster) -> None:
    started = time.monotonic()
    with pytest.raises(ExpertsUnavailableError, match="no replica is running"):
        send(experts)
    # A port without a listener.
    cluster.live.append("127.0.0.1:1")
    for _ in range(3):
        with pytest.raises(ExpertsUnavailableError, match=r"'liver' are not available: a replica is being connected"):
            send(experts)
    assert time.monotonic() - started < 3.0


def test_a_broken_stream_fails_its_exchanges_at_once(cluster: Cluster) -> None:
    experts = RemoteExperts(cluster.addresses, exchange_timeout_s=30.0)
    replica = Replica()
    replica.delays = {0: 30.0}
    address = cluster.add(replica)
    experts.wait_until_connected(["liver"], 5)
    exchange = experts.send("liver", "digest", 0, X_TD, INDEX_TK, WEIGHT_TK)
    killing = threading.Timer(0.1, cluster.kill, [address])
    killing.start()
    started = time.monotonic()
    with pytest.raises(ExpertsUnavailableError, match="broke"):
        exchange.result()
    assert time.monotonic() - started < 10, "it waited for the exchange's timeout"
    killing.join()
    experts.close()


def test_an_answer_that_came_before_the_stream_ended_is_an_answer(cluster: Cluster, experts: RemoteExperts) -> None:
    replica = Replica()
    address = cluster.add(replica)
    experts.wait_until_connected(["liver"], 5)
    exchanges = [experts.send("liver", "digest", layer, X_TD + layer, INDEX_TK, WEIGHT_TK) for layer in range(3)]
    until(lambda: replica.answered == 3)
    time.sleep(0.1)
    cluster.kill(address)
    until(lambda: experts.unavailable("liver") is not None)
    for layer, exchange in enumerate(exchanges):
        assert torch.equal(exchange.result(), (X_TD + layer) * 2)


def test_a_lost_exchange_is_sent_to_another_replica(cluster: Cluster, experts: RemoteExperts) -> None:
    replicas = [Replica(), Replica()]
    for replica in replicas:
        cluster.add(replica)
        experts.wait_until_connected(["liver"], 5)
    until(lambda: sum(channel.state is ChannelState.READY for channel in experts._refresh("liver")) == 2)
    replicas[0].break_stream = True
    replicas[1].break_stream = False
    assert all(torch.equal(send(experts), X_TD * 2) for _ in range(3))
    assert replicas[0].received >= 1
    assert replicas[1].received == 3


@pytest.mark.parametrize("code", [code_pb2.RESOURCE_EXHAUSTED, code_pb2.FAILED_PRECONDITION, code_pb2.UNAVAILABLE])
def test_passing_troubles_may_be_tried_again(cluster: Cluster, experts: RemoteExperts, code: int) -> None:
    replica = Replica()
    replica.error = status_pb2.Status(code=code, message="not now")
    cluster.add(replica)
    experts.wait_until_connected(["liver"], 5)
    with pytest.raises(ExpertsUnavailableError, match="not now"):
        send(experts)
    replica.error = None
    assert torch.equal(send(experts), X_TD * 2), "an in-stream error ended the stream"


def test_other_errors_are_final(cluster: Cluster, experts: RemoteExperts) -> None:
    replica = Replica()
    replica.error = status_pb2.Status(code=code_pb2.INTERNAL, message="a kernel failed")
    cluster.add(replica)
    experts.wait_until_connected(["liver"], 5)
    with pytest.raises(ExpertsFailedError, match="'liver' failed: a kernel failed"):
        send(experts)
    replica.error = None
    for wrong in (X_TD[:1], X_TD.half()):
        replica.output = wrong
        with pytest.raises(ExpertsFailedError, match=r"sent \(2, 3\) torch.float32 and got"):
            send(experts)


def test_a_silent_replica_is_dropped_after_the_timeout_and_probed(cluster: Cluster, experts: RemoteExperts) -> None:
    replica = Replica()
    replica.delays = {0: 30.0}
    cluster.add(replica)
    experts.wait_until_connected(["liver"], 5)
    started = time.monotonic()
    with pytest.raises(ExpertsUnavailableError, match=r"did not answer within 1 s \(router.exchange_timeout_s\)"):
        send(experts)
    assert 0.9 < time.monotonic() - started < 5
    experts.wait_until_connected(["liver"], 5)
    assert torch.equal(send(experts, layer=1), X_TD * 2)


def test_the_least_busy_replica_is_chosen(cluster: Cluster, experts: RemoteExperts) -> None:
    replicas = [Replica(), Replica(), Replica()]
    for replica in replicas:
        replica.delays = {0: 0.2}
        cluster.add(replica)
    until(lambda: all(channel.state is ChannelState.READY for channel in experts._refresh("liver")))
    pending = [experts.send("liver", "digest", 0, X_TD, INDEX_TK, WEIGHT_TK) for _ in range(6)]
    for exchange in pending:
        exchange.result()
    assert [replica.received for replica in replicas] == [2, 2, 2]


def test_an_address_that_is_gone_is_closed_after_its_last_answer(cluster: Cluster, experts: RemoteExperts) -> None:
    replica = Replica()
    replica.delays = {0: 0.2}
    cluster.add(replica)
    experts.wait_until_connected(["liver"], 5)
    (channel,) = experts._refresh("liver")
    exchange = experts.send("liver", "digest", 0, X_TD, INDEX_TK, WEIGHT_TK)
    cluster.live.clear()
    assert experts.unavailable("liver") is not None
    assert torch.equal(exchange.result(), X_TD * 2)
    until(lambda: not threads_of("liver"))
    with pytest.raises(ReplicaLostError, match="out of service"):
        channel.send(Tokens("digest", 0, X_TD, None, INDEX_TK, WEIGHT_TK))


def test_an_address_of_another_organ_is_not_used(cluster: Cluster) -> None:
    address = cluster.add(Replica("heart"))
    channel = ReplicaChannel("liver", address)
    until(lambda: channel.state is ChannelState.CLOSED)
    assert "serves 'heart'" in channel.reason


def test_closing_ends_all_threads(cluster: Cluster) -> None:
    cluster.add(Replica())
    experts = RemoteExperts(cluster.addresses, exchange_timeout_s=5.0)
    experts.wait_until_connected(["liver"], 5)
    assert threads_of("liver")
    experts.close()
    until(lambda: not threads_of("liver") and not any(t.name == "watch-experts" for t in threading.enumerate()))


def unusable() -> status_pb2.Status:
    detail = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(reason=BUNDLE_UNUSABLE, metadata={"why": "the bundle is damaged"}))
    return status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="/srv/registry", details=[detail])


def test_what_no_replica_could_load_is_not_worth_waiting_for(cluster: Cluster, experts: RemoteExperts) -> None:
    replicas = [Replica(), Replica()]
    for replica in replicas:
        replica.error = unusable()
        cluster.add(replica)
    until(lambda: experts.unavailable("liver") is None and not experts.is_connecting("liver"))
    with pytest.raises(ExpertsUnusableError, match="the bundle is damaged") as caught:
        send(experts)
    assert (caught.value.organ, caught.value.digest) == ("liver", "digest")
    assert "/srv/registry" not in str(caught.value)
    assert [replica.received for replica in replicas] == [1, 1]


@pytest.mark.parametrize("code", [code_pb2.RESOURCE_EXHAUSTED, code_pb2.FAILED_PRECONDITION])
def test_where_another_replica_may_answer_later_it_is(
    cluster: Cluster, experts: RemoteExperts, code: "code_pb2.Code.ValueType"
) -> None:
    lacking, busy = Replica(), Replica()
    lacking.error = unusable()
    busy.error = status_pb2.Status(code=code, message="later")
    cluster.add(lacking)
    cluster.add(busy)
    until(lambda: experts.unavailable("liver") is None and not experts.is_connecting("liver"))
    for _ in range(3):
        with pytest.raises(ExpertsUnavailableError) as caught:
            send(experts)
        assert not isinstance(caught.value, ExpertsUnusableError)


def test_a_replica_that_is_being_connected_is_waited_for(cluster: Cluster, experts: RemoteExperts) -> None:
    lacking = Replica()
    lacking.error = unusable()
    cluster.add(lacking)
    experts.wait_until_connected(["liver"], 5)
    # A port on which nothing listens yet.
    cluster.live.append("127.0.0.1:1")
    with pytest.raises(ExpertsUnavailableError) as caught:
        send(experts)
    assert not isinstance(caught.value, ExpertsUnusableError)


def test_a_replica_that_lacks_the_bundle_is_asked_last(cluster: Cluster, experts: RemoteExperts) -> None:
    lacking, holding = Replica(), Replica()
    lacking.error = unusable()
    cluster.add(lacking)
    cluster.add(holding)
    until(lambda: experts.unavailable("liver") is None and not experts.is_connecting("liver"))
    for _ in range(20):
        assert torch.equal(send(experts), X_TD * 2)
    assert lacking.received <= 2, "every layer paid for a second exchange"
