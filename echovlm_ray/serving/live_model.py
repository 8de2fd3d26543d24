"""What the gateway says about the model, with the experts that are live now."""

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence

import grpc

from echovlm_ray.serving.gateway import ModelDescription, OrganDescription
from echovlm_ray.serving.known_policy import check_identity
from experts.manifest import Manifest
from protos import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0


class LiveModel:
    """Follows Control's policy; while Control is away it says what it last knew. Belongs to one event loop."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        description: ModelDescription,
        find: Callable[[str, str], Manifest],
        channel_options: Sequence[tuple[str, int | str]] = (),
        identity: str = "",
    ) -> None:
        """Takes its parts.

        Args:
            addresses: where Control's internal server is now; empty while it is away.
            description: of the checkpoint as it is.
            find: organ and version → manifest; may block, and is called on a thread.
            channel_options: of the connection.
            identity: of the deployment; another one's policy is refused. "" accepts all.
        """
        self._addresses = addresses
        self._current = description
        self._version = 0
        self._find = find
        self._options = list(channel_options)
        self._identity = identity
        self._task: asyncio.Task[None] | None = None

    def describe(self) -> ModelDescription:
        """What is served at this moment."""
        return self._current

    async def start(self) -> None:
        """Begins to follow."""
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Ends."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            known = self._version
            for address in self._addresses():
                try:
                    await self._watch(address)
                except grpc.aio.AioRpcError as error:
                    logger.debug("Control does not answer: %s", error.code())
                except Exception:
                    logger.exception("the live experts cannot be described; the description before them stays")
            pause = FIRST_PAUSE_S if self._version > known else min(2 * pause, LONGEST_PAUSE_S)
            await asyncio.sleep(pause)

    async def _watch(self, address: str) -> None:
        async with grpc.aio.insecure_channel(address, options=self._options) as channel:
            # Without a name, as this is no Router, whose pins Control would ask for.
            request = control_pb2.WatchPolicyRequest(identity=self._identity, policy_version=self._version)
            async for policy in control_pb2_grpc.RolloutFeedStub(channel).WatchPolicy(request):
                check_identity(policy, self._identity, "Control")
                if policy.version > self._version:
                    organs = await asyncio.to_thread(self._describe, policy)
                    self._version = policy.version
                    self._current = dataclasses.replace(
                        self._current, expert_set_id=policy.stable.id, organs=tuple(organs)
                    )

    def _describe(self, policy: control_pb2.TrafficPolicy) -> list[OrganDescription]:
        organs = []
        for member in policy.stable.members:
            version = policy.versions[member.bundle_digest]
            num_experts = self._find(member.organ, version).num_experts
            organs.append(OrganDescription(member.organ, version, member.bundle_digest, num_experts))
        return organs
