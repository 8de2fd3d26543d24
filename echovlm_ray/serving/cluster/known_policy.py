"""The traffic policy for a replica that starts: from Control, or from its last file while Control is unavailable.

Control writes every policy to a file before it publishes it, so a replica that starts without Control misses at most
the last change, which it gets when Control is available again.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf import json_format

from experts.transport.inner_channel import InnerChannels
from protos import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0


class ForeignPolicyError(ValueError):
    """A policy of another deployment. The text says how to use it on purpose."""


def check_identity(policy: control_pb2.TrafficPolicy, identity: str, origin: str) -> None:
    """Checks that a policy is of this deployment; one without an identity is from before there were any.

    Args:
        policy: the policy.
        identity: of this deployment; "" accepts all.
        origin: where the policy comes from, for the text.

    Raises:
        ForeignPolicyError: it is of another one.
    """
    if identity and policy.identity and policy.identity != identity:
        raise ForeignPolicyError(
            f"the policy of {origin} is of the deployment {policy.identity[:12]}…, and this one is {identity[:12]}…: "
            "give this system its own rollouts.database, or replace the other one on purpose with `echoray serve "
            "--take-over`"
        )


def write_policy(path: Path, policy: control_pb2.TrafficPolicy) -> None:
    """Replaces the file in one step.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json_format.MessageToJson(policy, preserving_proto_field_name=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    partial = Path(name)
    try:
        with open(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        # On a full disk it is tried again and again.
        partial.unlink(missing_ok=True)


def read_policy(path: Path) -> control_pb2.TrafficPolicy | None:
    """The last policy that Control wrote; None where there is none that can be read."""
    try:
        return json_format.Parse(path.read_text(), control_pb2.TrafficPolicy())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, json_format.ParseError) as error:
        logger.warning("%s is passed over: %s", path, type(error).__name__)
        return None


def ask_policy(
    addresses: Sequence[str], channels: InnerChannels, timeout_s: float = ASK_TIMEOUT_S
) -> control_pb2.TrafficPolicy | None:
    """The policy that Control has now; None if it does not answer in time.

    Args:
        addresses: of Control's internal server.
        channels: connects to it.
        timeout_s: how long to wait for each address.
    """
    for address in addresses:
        with channels.blocking(address) as channel:
            stub = control_pb2_grpc.RolloutFeedStub(channel)
            try:
                # Without a name: no one goes on with the answer.
                stream = stub.WatchPolicy(control_pb2.WatchPolicyRequest(), timeout=timeout_s)
                policy: control_pb2.TrafficPolicy = next(iter(stream))
                stream.cancel()
            except (grpc.RpcError, StopIteration):
                continue
            return policy
    return None


def wanted_digests(policy: control_pb2.TrafficPolicy, organ: str) -> list[str]:
    """The bundles of an organ that a policy may send requests to, the stable one first."""
    stable = [member.bundle_digest for member in policy.stable.members if member.organ == organ]
    candidates = [candidate.digest for candidate in policy.candidates if candidate.organ == organ]
    return list(dict.fromkeys(stable + candidates))
