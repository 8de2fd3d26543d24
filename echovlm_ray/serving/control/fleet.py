"""The replicas of all expert groups, reached over gRPC, and the Routers that use them."""

from collections.abc import Callable, Collection, Mapping, Sequence

import grpc

from echovlm_ray.serving.cluster.endpoints import ReplicaAddresses
from echovlm_ray.serving.grpc.replica_pool import ReplicaPool
from experts.bundles.manifest import Manifest
from experts.errors import ExpertCapacityError, InvalidBundleError, UnknownBundleError
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import expert_pb2, expert_pb2_grpc, router_pb2, router_pb2_grpc
from router.rollouts.fleet import ReplicaLostError, ReplicaResidents

STATUS_TIMEOUT_S = 5.0
PINS_TIMEOUT_S = 5.0
# For the exchanges under way to end, and the memory to be freed.
UNLOAD_TIMEOUT_S = 120.0


class GrpcFleet:
    """A `router.rollouts.fleet.Fleet` of running replicas. Safe from several threads; every method may block."""

    def __init__(
        self,
        experts: Callable[[str], Sequence[ReplicaAddresses]],
        routers: Callable[[], Sequence[ReplicaAddresses]],
        watching: Callable[[], Collection[str]],
        manifest: Callable[[str], Manifest],
        element_bytes: int,
        channels: InnerChannels = PLAIN_CHANNELS,
    ) -> None:
        """
        Args:
            experts: organ → the replicas of its group now.
            routers: the Routers' replicas now.
            watching: the Routers that are connected to Control; one that has just started is here before it is
                among `routers`.
            manifest: digest → manifest; raises `UnknownBundleError`.
            element_bytes: of the weights as replicas keep them: in the backbone's dtype, whatever the bundle has.
            channels: connects to them.
        """
        self._experts = experts
        self._routers = routers
        self._watching = watching
        self._manifest = manifest
        self._element_bytes = element_bytes
        self._pool: ReplicaPool[grpc.Channel] = ReplicaPool(channels.blocking)

    def replicas(self, organ: str) -> Sequence[str]:
        """See `Fleet`: the ids that Serve gave the replicas, which it gives to no other."""
        return [found.replica for found in self._experts(organ)]

    def resident(self, replica: str, organ: str) -> ReplicaResidents:
        """See `Fleet`.

        Raises:
            ReplicaLostError: it is gone or does not answer.
        """
        stub = expert_pb2_grpc.ExpertGroupStub(self._channel_of(replica, organ))
        try:
            status: expert_pb2.ExpertGroupStatusResponse = stub.Status(
                expert_pb2.ExpertGroupStatusRequest(), timeout=STATUS_TIMEOUT_S
            )
        except (grpc.RpcError, ValueError) as error:
            raise _converted(error) from None
        if status.organ != organ:
            raise ReplicaLostError(f"what answers in its place serves {status.organ!r}")
        return ReplicaResidents(
            {bundle.digest: bundle.resident_bytes for bundle in status.bundles},
            status.limit_bytes,
            {loading.digest: loading.progress for loading in status.loading},
        )

    def load(self, replica: str, organ: str, digest: str, timeout_s: float) -> None:
        """See `Fleet`.

        Raises:
            TimeoutError: it did not load within `timeout_s` seconds.
        """
        stub = expert_pb2_grpc.ExpertGroupStub(self._channel_of(replica, organ))
        try:
            stub.Load(expert_pb2.LoadRequest(bundle_digest=digest), timeout=timeout_s)
        except (grpc.RpcError, ValueError) as error:
            if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(f"it was not loaded within {timeout_s:g} s") from None
            raise _converted(error) from None

    def unload(self, replica: str, organ: str, digest: str) -> None:
        stub = expert_pb2_grpc.ExpertGroupStub(self._channel_of(replica, organ))
        try:
            stub.Unload(expert_pb2.UnloadRequest(bundle_digest=digest), timeout=UNLOAD_TIMEOUT_S)
        except (grpc.RpcError, ValueError) as error:
            raise _converted(error) from None

    def load_bytes(self, organ: str, digest: str) -> int:
        """See `Fleet`: a kernel may pad, so it may be a little more."""
        return self._manifest(digest).num_expert_parameters * self._element_bytes

    def pinned(self) -> Collection[str]:
        """See `Fleet`.

        Raises:
            ReplicaLostError: no Router is known, one does not answer, one has no policy yet, or one is connected that
                cannot be asked yet.
        """
        routers = self._routers()
        if not routers:
            raise ReplicaLostError("no Router is known")
        if len(connected := [name for name in self._watching() if name]) > len(routers):
            raise ReplicaLostError(f"{len(connected)} Routers are connected and only {len(routers)} can be asked")
        stubs = [router_pb2_grpc.RouterStub(self._pool.channel(router.address)) for router in routers]
        try:
            calls = [stub.Pins.future(router_pb2.PinsRequest(), timeout=PINS_TIMEOUT_S) for stub in stubs]
            answers: list[router_pb2.PinsResponse] = [call.result() for call in calls]
        except (grpc.RpcError, ValueError) as error:
            raise _converted(error) from None
        digests: set[str] = set()
        for pins in answers:
            if not pins.policy_version:
                raise ReplicaLostError("a Router has no policy yet")
            digests.update(pins.digests)
        return digests

    def policies(self, timeout_s: float = 1.0) -> dict[str, int]:
        """The number of the policy that each Router applies, by replica; those that do not answer in time are left out.

        Args:
            timeout_s: for all of them together.
        """
        routers = self._routers()
        try:
            stubs = [router_pb2_grpc.RouterStub(self._pool.channel(router.address)) for router in routers]
            calls = [stub.Pins.future(router_pb2.PinsRequest(), timeout=timeout_s) for stub in stubs]
        except ValueError:
            return {}
        versions = {}
        for router, call in zip(routers, calls, strict=True):
            try:
                versions[router.replica] = int(call.result().policy_version)
            except grpc.RpcError:
                continue
        return versions

    def close(self) -> None:
        """Closes all channels; calls under way end."""
        self.keep_only(())

    def keep_only(self, addresses: Collection[str]) -> None:
        """Closes the channels to all other addresses."""
        for channel in self._pool.keep_only(addresses):
            channel.close()

    def _channel_of(self, replica: str, organ: str) -> grpc.Channel:
        for found in self._experts(organ):
            if found.replica == replica:
                return self._pool.channel(found.address)
        raise ReplicaLostError("it does not run any more")


# What replicas answer, in the types that the controller tells apart.
_ERRORS: Mapping[grpc.StatusCode, Callable[[str], Exception]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExpertCapacityError,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidBundleError,
    grpc.StatusCode.NOT_FOUND: UnknownBundleError,
}
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


def _converted(error: grpc.RpcError | ValueError) -> Exception:
    if isinstance(error, ValueError):
        # So gRPC refuses calls on a channel that was closed because its replica is gone.
        return ReplicaLostError("it does not run any more")
    code = error.code()
    if code in _LOST:
        # gRPC's own texts name addresses.
        return ReplicaLostError(f"it does not answer ({code.name})")
    return _ERRORS.get(code, RuntimeError)(str(error.details()))
