"""Rollouts, bundles and expert sets as protobuf messages."""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from functools import partial

from experts.bundles.digest import canonical_json
from experts.bundles.manifest import Manifest
from protos import control_pb2
from router.gating.expert_set import ExpertSet
from router.rollouts.fleet_view import OrganView, ReplicaView
from router.rollouts.history import Entry
from router.rollouts.organ_problem import OrganProblem
from router.rollouts.outcome import Outcome
from router.rollouts.precondition import Precondition
from router.rollouts.records import Rollout
from router.rollouts.shadow import ShadowReport
from router.rollouts.traffic import TrafficPolicy

# Digest → version.
VersionOf = Callable[[str], str]


def expert_set_to_proto(expert_set: ExpertSet) -> control_pb2.ExpertSet:
    """The message of a set."""
    return control_pb2.ExpertSet(
        id=expert_set.id,
        backbone_digest=expert_set.backbone_digest,
        routing=expert_set.routing,
        members=[
            control_pb2.ExpertSetMember(organ=member.organ, bundle_digest=member.bundle_digest)
            for member in expert_set.members
        ],
    )


def policy_to_proto(policy: TrafficPolicy, version_of: VersionOf) -> control_pb2.TrafficPolicy:
    """The message of a policy, without unknown versions."""
    versions = {digest: version_of(digest) for digest in policy.digests}
    return control_pb2.TrafficPolicy(
        version=policy.version,
        stable=expert_set_to_proto(policy.stable),
        candidates=[control_pb2.CandidateTraffic(**candidate.model_dump()) for candidate in policy.candidates],
        versions={digest: version for digest, version in versions.items() if version},
        identity=policy.identity,
    )


def bundle_to_proto(manifest: Manifest, in_use: Collection[str]) -> control_pb2.BundleInfo:
    """The message of a bundle; live if its digest is in use."""
    return control_pb2.BundleInfo(
        organ=manifest.organ,
        name=manifest.name,
        version=manifest.version,
        digest=manifest.digest,
        description=manifest.description,
        num_experts=manifest.num_experts,
        size_bytes=manifest.size_bytes,
        live=manifest.digest in in_use,
    )


def rollout_to_proto(
    rollout: Rollout,
    version_of: VersionOf,
    shadow: ShadowReport | None = None,
    waits_for: str = "",
    gates: Sequence[control_pb2.Gate] = (),
) -> control_pb2.Rollout:
    """The message of a rollout with its shadow report, its conditions and its gates."""
    message = control_pb2.Rollout(
        id=rollout.id,
        organ=rollout.organ,
        version=version_of(rollout.digest),
        digest=rollout.digest,
        incumbent_digest=rollout.incumbent_digest or "",
        state=str(rollout.state),
        percent=rollout.percent or 0.0,
        reason=rollout.reason,
        actor=rollout.actor,
        created_at=rollout.created_at,
        state_since=rollout.state_since,
        restores=rollout.restores,
        waits_for=waits_for,
        gates=gates,
    )
    if shadow is not None and shadow.requests:
        message.shadow.CopyFrom(
            control_pb2.ShadowReport(
                requests=shadow.requests,
                identical=shadow.identical,
                token_overlap=shadow.token_overlap or 0.0,
                mean_first_divergence=shadow.mean_first_divergence,
                latency_ratio=shadow.latency_ratio,
            )
        )
    return message


def expected_of(message: control_pb2.Expected) -> Precondition:
    """The precondition in a message."""
    return Precondition(
        rollout_id=message.rollout_id,
        state=message.state,
        percent=message.percent if message.HasField("percent") else None,
        stable_digest=message.stable_digest,
        nothing_in_flight=message.nothing_in_flight,
    )


def residents_to_proto(view: OrganView, is_spare: Callable[[str, str], bool]) -> list[control_pb2.ReplicaResidents]:
    """The messages of an organ's replicas; one that does not answer has no bundles.

    Args:
        view: the replicas.
        is_spare: organ and digest → whether that version is only loaded for a rollback.
    """
    return [
        control_pb2.ReplicaResidents(
            organ=view.organ,
            replica=replica.replica,
            limit_bytes=replica.residents.limit_bytes if replica.residents else 0,
            bundles=_shares(replica, partial(is_spare, view.organ)),
        )
        for replica in view.replicas
    ]


def problem_to_proto(problem: OrganProblem, version_of: VersionOf) -> control_pb2.OrganProblem:
    """The message of an organ's problem."""
    return control_pb2.OrganProblem(
        organ=problem.organ,
        version=version_of(problem.digest),
        digest=problem.digest,
        replicas=problem.replicas,
        holding=problem.holding,
        reasons=[control_pb2.ReplicaProblem(replica=replica, text=text) for replica, text in problem.reasons],
    )


def outcome_to_proto(outcome: Outcome, version_of: VersionOf, *, dry_run: bool) -> control_pb2.OperationResponse:
    """The response to an operator."""
    return control_pb2.OperationResponse(
        changed=outcome.changed and not dry_run,
        steps=outcome.steps,
        rollout=rollout_to_proto(outcome.rollout, version_of) if outcome.rollout else None,
        memory=[
            control_pb2.ReplicaMemory(
                replica=memory.replica,
                resident_bytes=memory.resident_bytes,
                needed_bytes=memory.needed_bytes,
                limit_bytes=memory.limit_bytes,
                fits=memory.fits,
            )
            for memory in outcome.memory
        ],
    )


def entry_to_proto(entry: Entry) -> control_pb2.HistoryEntry:
    """The message of a history entry."""
    more = {"digest": entry.digest, "from_state": entry.from_state, "to_state": entry.to_state}
    details = {**entry.details, **{name: value for name, value in more.items() if value}}
    return control_pb2.HistoryEntry(
        sequence=entry.sequence,
        time=datetime.fromisoformat(entry.at).timestamp(),
        organ=entry.organ,
        rollout_id=entry.rollout_id,
        event=entry.action,
        actor=entry.actor,
        reason=entry.reason,
        details_json=canonical_json(details).decode(),
        hash=entry.hash,
    )


def _shares(replica: ReplicaView, is_spare: Callable[[str], bool]) -> list[control_pb2.ResidentShare]:
    if replica.residents is None:
        return []
    held = [
        control_pb2.ResidentShare(digest=digest, resident_bytes=size, progress=1.0, spare=is_spare(digest))
        for digest, size in replica.residents.bytes_by_digest.items()
    ]
    loading = [
        # Progress 1 means done, so a running load stays below.
        control_pb2.ResidentShare(digest=digest, progress=min(progress, 0.999))
        for digest, progress in replica.residents.loading.items()
        if digest not in replica.residents.bytes_by_digest
    ]
    return held + loading
