"""A small Control that sends a test's policies and records reports; and a router that follows it."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import torch

from echovlm_ray.config import RouterSection
from echovlm_ray.engine.engine import Engine
from echovlm_ray.engine.sequence import SequenceRequest
from echovlm_ray.serving.control.messages import expert_set_to_proto
from echovlm_ray.serving.grpc.interceptor import CallInterceptor
from echovlm_ray.serving.grpc.request_id import REQUEST_ID_KEY
from echovlm_ray.serving.lm.feed import RolloutFeedClient
from echovlm_ray.serving.vision.client import VisionClient
from experts.transport.inner_channel import PLAIN_CHANNELS
from protos import control_pb2, control_pb2_grpc, router_pb2, router_pb2_grpc
from router.dispatch.expert_call import ExpertPlacement
from router.dispatch.local import LocalExperts
from router.errors import UnknownExpertSetError
from router.gating.expert_gates import ExpertGates
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts.traffic import CandidateTraffic, TrafficPolicy
from tests.engines import running_engine, submit
from tests.expert_servers import expert_group
from tests.serving.router_system import RouterParts, gate_reader, router_parts
from tests.split_golden import SplitGolden, split_golden, write_golden_bundle
from tests.waiting import until_async

ALL = (0, 1, 2, 3)
ORGANS = ("breast", "liver", "heart")
TIMEOUT_S = 30


@dataclass(frozen=True)
class Versions:
    """A split checkpoint of three organs, and further versions of two of them.

    Attributes:
        digests: (organ, version) → bundle.
    """

    split: SplitGolden
    digests: Mapping[tuple[str, str], str]

    def expert_set(self, **versions: str) -> ExpertSet:
        """The set with these organs in other versions than 1.0.0."""
        members = tuple(
            ExpertSetMember(organ=organ, bundle_digest=self.digests[organ, versions.get(organ, "1.0.0")])
            for organ in dict.fromkeys([*ORGANS, *versions])
        )
        stable = self.split.expert_set
        return ExpertSet(backbone_digest=stable.backbone_digest, routing=stable.routing, members=members)

    def candidate(self, organ: str, version: str, mode: Any, percent: float) -> CandidateTraffic:
        return CandidateTraffic(
            organ=organ,
            digest=self.digests[organ, version],
            rollout_id=f"{organ}-{version}",
            mode=mode,
            percent=percent,
        )

    def placement(self) -> LocalExperts:
        """All versions of all organs, in this process."""
        organs = dict.fromkeys(organ for organ, _ in self.digests)
        return LocalExperts(
            {
                organ: expert_group(
                    organ, self.split.registry, [digest for (of, _), digest in self.digests.items() if of == organ]
                )
                for organ in organs
            }
        )


def make_versions(checkpoint: Path, directory: Path) -> Versions:
    """Version 2 and 3 differ in all weights, gates included; 1.0.1 in none; "lung" is an organ that the split lacks."""
    split = split_golden(checkpoint, directory, dict.fromkeys(ORGANS, ALL), "organs")
    digests = {(member.organ, "1.0.0"): member.bundle_digest for member in split.expert_set.members}

    def add(organ: str, version: str, change: Any) -> None:
        digests[organ, version] = write_golden_bundle(
            split.tensors, split.config, directory, organ, ALL, version=version, change=change
        )

    for organ in ("liver", "heart"):
        for version in ("2.0.0", "3.0.0"):
            generator = torch.Generator().manual_seed(int(version[0]) + len(organ))
            add(organ, version, lambda _, tensor, g=generator: tensor + 0.3 * torch.randn(tensor.shape, generator=g))
    add("liver", "1.0.1", lambda _, tensor: tensor)
    # A group refuses to load experts that compute no numbers; these answer sound inputs, and get weights that are none.
    add("liver", "9.0.0", lambda name, tensor: tensor * torch.nan if ".gate." in name else tensor)
    generator = torch.Generator().manual_seed(99)
    add("lung", "1.0.0", lambda _, tensor: tensor + 0.3 * torch.randn(tensor.shape, generator=generator))
    return Versions(split, digests)


class SmallControl(control_pb2_grpc.RolloutFeedServicer):
    """Serves `RolloutFeed`."""

    def __init__(self) -> None:
        self.policy: TrafficPolicy | None = None
        self.reports: list[control_pb2.ReportRequest] = []
        self.watchers: set[str] = set()
        # Watcher → version of the policy that it acknowledged.
        self.taken_up: dict[str, int] = {}
        # Bundle digest → version.
        self.versions: dict[str, str] = {}
        # The sets that are resident for replays, by id.
        self.replayed: dict[str, ExpertSet] = {}
        self.changed = asyncio.Condition()

    async def set(self, policy: TrafficPolicy) -> None:
        async with self.changed:
            self.policy = policy
            self.changed.notify_all()

    async def WatchPolicy(self, request: Any, context: Any) -> AsyncIterator[control_pb2.TrafficPolicy]:
        self.watchers.add(request.router)
        sent = None
        while True:
            async with self.changed:
                while self.policy is sent or self.policy is None:
                    await self.changed.wait()
                sent = self.policy
            yield policy_to_proto(sent, self.versions)

    async def TakenUp(self, request: Any, context: Any) -> control_pb2.TakenUpResponse:
        self.taken_up[request.watcher] = request.policy_version
        return control_pb2.TakenUpResponse()

    async def Report(self, request: Any, context: Any) -> control_pb2.ReportResponse:
        self.reports.append(request)
        return control_pb2.ReportResponse()

    async def Replayed(self, request: Any, context: Any) -> control_pb2.ReplayedResponse:
        if request.expert_set_id not in self.replayed:
            raise UnknownExpertSetError(request.expert_set_id)
        return control_pb2.ReplayedResponse(expert_set=expert_set_to_proto(self.replayed[request.expert_set_id]))

    def observed(self, digest: str) -> control_pb2.Observation:
        """All reports of a bundle together."""
        total = control_pb2.Observation(digest=digest)
        for report in self.reports:
            for each in report.observations:
                if each.digest == digest:
                    total.requests += each.requests
                    total.errors += each.errors
                    total.nonfinite += each.nonfinite
                    total.tokens += each.tokens
                    total.seconds_per_token.extend(each.seconds_per_token)
        return total

    @property
    def shadows(self) -> list[control_pb2.ShadowObservation]:
        return [shadow for report in self.reports for shadow in report.shadows]


def policy_to_proto(policy: TrafficPolicy, versions: Mapping[str, str] | None = None) -> control_pb2.TrafficPolicy:
    stable = policy.stable
    return control_pb2.TrafficPolicy(
        version=policy.version,
        stable=control_pb2.ExpertSet(
            id=stable.id,
            backbone_digest=stable.backbone_digest,
            routing=stable.routing,
            members=[
                control_pb2.ExpertSetMember(organ=member.organ, bundle_digest=member.bundle_digest)
                for member in stable.members
            ],
        ),
        candidates=[control_pb2.CandidateTraffic(**candidate.model_dump()) for candidate in policy.candidates],
        versions=versions,
        identity=policy.identity,
    )


@dataclass
class Control:
    """Where the small Control listens now, if it does."""

    servicer: SmallControl = field(default_factory=SmallControl)
    addresses: list[str] = field(default_factory=list)
    server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self.server = grpc.aio.server(interceptors=[CallInterceptor()])
        control_pb2_grpc.add_RolloutFeedServicer_to_server(self.servicer, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.addresses[:] = [f"127.0.0.1:{port}"]

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None


@dataclass
class WatchingRouter:
    """A router that listens to a Control."""

    stub: Any
    engine: Engine
    parts: RouterParts
    versions: Versions
    control: Control
    feed: RolloutFeedClient
    address: str
    version: int = 0

    async def policy(self, stable: ExpertSet, candidates: Iterable[CandidateTraffic] = ()) -> int:
        """Has Control send the policy, and waits for the acknowledgement."""
        self.version += 1
        await self.control.servicer.set(
            TrafficPolicy(version=self.version, stable=stable, candidates=tuple(candidates))
        )
        await until_async(lambda: self.parts.expert_sets.policy.version == self.version)
        return self.version

    async def pins(self) -> tuple[int, set[str]]:
        response = await self.stub.Pins(router_pb2.PinsRequest())
        return response.policy_version, set(response.digests)

    async def wait_for_pins(self, version: int, digests: set[str]) -> None:
        """The engine releases a run a moment after its last token."""
        async with asyncio.timeout(TIMEOUT_S):
            while await self.pins() != (version, digests):
                await asyncio.sleep(0.005)

    def generate(
        self, organs: Iterable[str] = ("liver",), tokens: int = 24, request_id: str = "", **fields: Any
    ) -> "Stream":
        fields = dict[str, Any](input_ids=[5, 6, 7, 8], ignore_eos=True) | fields
        request = router_pb2.RouterGenerateRequest(
            max_new_tokens=tokens, organ_hints=router_pb2.OrganHints(organs=organs), **fields
        )
        metadata = ((REQUEST_ID_KEY, request_id),) if request_id else ()
        return Stream(self.stub.Generate(request, timeout=TIMEOUT_S, metadata=metadata))


class Stream:
    """One running request."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self._messages = aiter(call)
        self.token_ids: list[int] = []
        self.provenance = router_pb2.Provenance()

    async def first(self) -> "Stream":
        self._take(await anext(self._messages))
        return self

    async def rest(self) -> "Stream":
        async for message in self._messages:
            self._take(message)
        return self

    def _take(self, message: router_pb2.RouterGenerateResponse) -> None:
        self.token_ids += message.token_ids
        if message.HasField("provenance"):
            self.provenance = message.provenance

    @property
    def versions(self) -> dict[str, str]:
        return {organ.organ: organ.bundle_version for organ in self.provenance.organs}


@asynccontextmanager
async def watching_router(
    versions: Versions,
    *,
    placement: ExpertPlacement | None = None,
    limits: RouterSection | None = None,
    control_runs: bool = True,
    last_known: TrafficPolicy | None = None,
    said: TrafficPolicy | None = None,
) -> AsyncIterator[WatchingRouter]:
    """A router over a real engine.

    Its Control has said nothing yet, or `said` one policy; `last_known` is what an earlier one left.
    """
    left = None if last_known is None else policy_to_proto(last_known)
    limits = limits or RouterSection(max_new_tokens=2000)
    placement = versions.placement() if placement is None else placement
    control = Control()
    if control_runs:
        await control.start()
    if said is not None:
        await control.servicer.set(said)
    with running_engine(
        versions.split,
        placement,
        max_batch_size=limits.max_batch_size,
        max_queue=limits.max_queue,
    ) as engine:
        vision = VisionClient(list, PLAIN_CHANNELS)
        feeds: list[RolloutFeedClient] = []

        async def replayed(expert_set_id: str) -> ExpertSet | None:
            return await feeds[0].replayed(expert_set_id)

        parts = router_parts(engine, versions.split, vision, limits, end_token_ids=frozenset({995}), replayed=replayed)
        feed = RolloutFeedClient(
            lambda: list(control.addresses), parts.expert_sets, parts.outcomes, report_period_s=0.05
        )
        feeds.append(feed)
        await feed.start(0.0 if left is None else 0.5, lambda: left)
        server = grpc.aio.server(interceptors=[CallInterceptor()])
        router_pb2_grpc.add_RouterServicer_to_server(parts.service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            try:
                yield WatchingRouter(stub, engine, parts, versions, control, feed, f"127.0.0.1:{port}")
            finally:
                await server.stop(None)
                await feed.stop()
                await vision.close()
                await control.stop()


class Alone:
    """The answers of a set without others: from an engine that is independent of a test's router."""

    def __init__(self, engine: Engine, versions: Versions) -> None:
        self._engine = engine
        self._versions = versions
        split = versions.split
        layers = int(str(split.config["num_hidden_layers"]))
        self._read = gate_reader(split.registry, layers, split.tensors["lm_head.weight"].dtype)

    def tokens(
        self, expert_set: ExpertSet, organs: tuple[str, ...], count: int, input_ids: Sequence[int] = (5, 6, 7, 8)
    ) -> list[int]:
        gates = {member.bundle_digest: self._read(member.bundle_digest, ()) for member in expert_set.members}
        self._engine.dispatcher.add_set(ExpertGates.of(expert_set, gates))
        request = SequenceRequest(
            input_ids=tuple(input_ids),
            position_ids_3T=torch.arange(len(input_ids)).expand(3, -1),
            position_delta=0,
            expert_set_id=expert_set.id,
            shares=tuple((organ, 1.0 / len(organs)) for organ in organs),
            max_new_tokens=count,
        )
        return submit(self._engine, replace(request)).wait_well().token_ids


@contextmanager
def alone(versions: Versions) -> Iterator[Alone]:
    with running_engine(versions.split, versions.placement(), prefix_reuse=False) as engine:
        yield Alone(engine, versions)
