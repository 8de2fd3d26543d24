"""The health of an expert replica: whether it has loaded the live version of its organ."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from echovlm_ray.serving.cluster.known_policy import wanted_digests
from echovlm_ray.serving.cluster.policy_follower import PolicyFollower
from echovlm_ray.serving.grpc.health import organ_service
from experts.group import ExpertGroup
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2

logger = logging.getLogger(__name__)

PERIOD_S = 0.5


class OrganPolicy:
    """What Control says of one organ: the bundles that its requests may get.

    Attributes:
        newest: the policy that is known; None before the first.
    """

    def __init__(self, organ: str, newest: control_pb2.TrafficPolicy | None) -> None:
        """Takes what is known at the start."""
        self.organ = organ
        self.newest = newest

    @property
    def wanted(self) -> list[str]:
        """The digests that requests may get, the stable one first; none while nothing is known."""
        return [] if self.newest is None else wanted_digests(self.newest, self.organ)

    def version(self, digest: str) -> str:
        """The version of a bundle; "" where it is not known."""
        return "" if self.newest is None else self.newest.versions.get(digest, "")


class OrganHealth:
    """Publishes SERVING of the organ's service while the stable version is resident. Belongs to one event loop.

    Of an organ that only a candidate serves yet, the candidate is what counts. Before the first policy is known, any
    resident version does.
    """

    def __init__(
        self,
        group: ExpertGroup,
        addresses: Callable[[], Sequence[str]],
        publish: Callable[[str, bool], Awaitable[None]],
        policy: OrganPolicy,
        channels: InnerChannels = PLAIN_CHANNELS,
        identity: str = "",
    ) -> None:
        """
        Args:
            group: what is resident, and what could not be loaded.
            addresses: where Control's internal server is now; empty while it is away.
            publish: is called with the organ's service and whether it serves.
            policy: of the group's organ; kept up to date from now on.
            channels: connects to Control.
            identity: of the deployment; another one's policy is refused. "" accepts all.
        """
        self._group = group
        self._publish = publish
        self._policy = policy
        self._said: bool | None = None
        watcher = partial(control_pb2.WatchPolicyRequest, identity=identity)
        self._follower = PolicyFollower(addresses, self._take, channels, watcher=watcher)
        self._task: asyncio.Task[None] | None = None

    @property
    def serving(self) -> bool:
        """Whether the organ's requests can be answered here."""
        resident = {resident.digest for resident in self._group.resident()}
        wanted = self._policy.wanted
        return bool(resident) if not wanted else wanted[0] in resident

    def problem(self) -> str:
        """Why they cannot, for operators; "" if they can."""
        wanted = self._policy.wanted
        if self.serving or not wanted:
            return ""
        digest = wanted[0]
        failure = self._group.failure(digest)
        reason = failure.text if failure is not None else "it is not loaded yet"
        return f"does not hold {self._group.organ} {self._policy.version(digest) or digest[:12]}: {reason}"

    async def start(self) -> None:
        """Begins to publish."""
        await self._say()
        await self._follower.start()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends."""
        await self._follower.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _take(self, policy: control_pb2.TrafficPolicy) -> None:
        self._policy.newest = policy
        await self._say()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            await self._say()

    async def _say(self) -> None:
        serving = self.serving
        if serving != self._said:
            self._said = serving
            if not serving:
                logger.warning("this replica %s", self.problem() or "holds nothing")
            await self._publish(organ_service(self._group.organ), serving)
