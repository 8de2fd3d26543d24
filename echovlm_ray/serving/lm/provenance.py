"""The provenance of an answer: its experts, and the share of each organ."""

from collections.abc import Mapping

from echovlm_ray.serving.lm.admission import PinnedExperts
from protos import router_pb2


def provenance_of(experts: PinnedExperts, routed_pairs: Mapping[str, int]) -> router_pb2.Provenance:
    """The provenance of a request's expert set.

    Args:
        experts: the request's.
        routed_pairs: (token, layer, expert) pairs per organ.
    """
    expert_set = experts.expert_set
    versions = {bundle.organ: bundle.version for bundle in experts.used}
    total = sum(routed_pairs.values())
    organs = [
        router_pb2.OrganProvenance(
            organ=organ,
            bundle_version=versions[organ],
            bundle_digest=expert_set.bundle_digest(organ),
            routed_share=pairs / total,
        )
        for organ, pairs in routed_pairs.items()
        if pairs
    ]
    return router_pb2.Provenance(
        expert_set_id=expert_set.id,
        backbone_digest=expert_set.backbone_digest,
        organ_source=experts.choice.source,
        organs=organs,
    )
