"""The description of the model in the gateway, with the experts that are live now."""

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from echovlm_ray.serving.cluster.policy_follower import PolicyFollower
from echovlm_ray.serving.core.description import ModelDescription, OrganDescription
from experts.bundles.manifest import Manifest
from experts.errors import InvalidBundleError, RegistryUnavailableError, UnknownBundleError
from experts.transport.inner_channel import PLAIN_CHANNELS, InnerChannels
from protos import control_pb2

logger = logging.getLogger(__name__)


class LiveModel:
    """Follows Control's policy, and uses the last one while Control is unavailable. For one event loop."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        description: ModelDescription,
        manifest: Callable[[str], Manifest],
        channels: InnerChannels = PLAIN_CHANNELS,
        identity: str = "",
    ) -> None:
        """
        Args:
            addresses: where Control's internal server is now; empty while it is away.
            description: of the checkpoint as it is.
            manifest: digest → manifest; may block, and is called on a thread.
            channels: connects to Control.
            identity: of the deployment; another one's policy is refused. "" accepts all.
        """
        # Never used again by another process.
        self.name = f"gateway-{uuid.uuid4().hex}"
        self._current = description
        self._manifest = manifest
        watcher = partial(control_pb2.WatchPolicyRequest, gateway=self.name, identity=identity)
        self._follower = PolicyFollower(addresses, self._take, channels, watcher=watcher)

    def describe(self) -> ModelDescription:
        """The current description of the model."""
        return self._current

    async def start(self) -> None:
        """Begins to follow."""
        await self._follower.start()

    async def stop(self) -> None:
        """Ends."""
        await self._follower.close()

    async def _take(self, policy: control_pb2.TrafficPolicy) -> None:
        organs = await asyncio.to_thread(self._describe, policy)
        self._current = dataclasses.replace(
            self._current, expert_set_id=policy.stable.id, organs=tuple(organs), policy_version=policy.version
        )

    def _describe(self, policy: control_pb2.TrafficPolicy) -> list[OrganDescription]:
        return [
            describe_organ(
                member.organ, member.bundle_digest, self._manifest, policy.versions.get(member.bundle_digest, "")
            )
            for member in policy.stable.members
        ]


def describe_organ(organ: str, digest: str, manifest: Callable[[str], Manifest], version: str = "") -> OrganDescription:
    """What is said of an organ. Of a bundle whose manifest is lost, only what is given: its experts are not counted.

    Args:
        organ: the organ.
        digest: its bundle.
        manifest: digest → manifest.
        version: of the bundle, if it is known.
    """
    try:
        found = manifest(digest)
    except (UnknownBundleError, RegistryUnavailableError, InvalidBundleError) as error:
        logger.warning("the bundle of %s cannot be described: %s", organ, error)
        return OrganDescription(organ, version, digest, 0)
    return OrganDescription(organ, found.version, digest, found.num_experts)
