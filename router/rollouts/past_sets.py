"""Every expert set that requests were ever assigned to, by id; for replays."""

import json

from sqlalchemy import Connection, insert, select

from router.errors import UnknownExpertSetError
from router.gating.expert_set import ExpertSet, ExpertSetMember
from router.rollouts import schema
from router.rollouts.traffic import TrafficPolicy, given_sets


def record(connection: Connection, policy: TrafficPolicy, now: float) -> None:
    """Stores the new expert sets of a policy; `now` is in seconds since 1970."""
    table = schema.expert_sets
    sets = {expert_set.id: expert_set for expert_set in given_sets(policy)}
    known = set(connection.execute(select(table.c.id).where(table.c.id.in_(sets))).scalars())
    rows = [
        {
            "id": set_id,
            "backbone_digest": expert_set.backbone_digest,
            "routing": expert_set.routing,
            "members": json.dumps([[member.organ, member.bundle_digest] for member in expert_set.members]),
            "first_given_at": now,
        }
        for set_id, expert_set in sets.items()
        if set_id not in known
    ]
    if rows:
        connection.execute(insert(table), rows)


def find(connection: Connection, expert_set_id: str) -> ExpertSet:
    """The expert set of an id.

    Raises:
        UnknownExpertSetError: no request of this deployment was ever assigned to it.
    """
    table = schema.expert_sets
    row = connection.execute(select(table).where(table.c.id == expert_set_id)).first()
    if row is None:
        raise UnknownExpertSetError(expert_set_id)
    members = tuple(ExpertSetMember(organ=organ, bundle_digest=digest) for organ, digest in json.loads(row.members))
    return ExpertSet(backbone_digest=row.backbone_digest, routing=row.routing, members=members)
