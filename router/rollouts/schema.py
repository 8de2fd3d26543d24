"""The tables of the rollouts' database, as `migrations` leaves them."""

from sqlalchemy import Boolean, Column, Double, Index, Integer, MetaData, String, Table, Text, false, text

from router.rollouts.states import IN_FLIGHT

metadata = MetaData()

# One row: the live expert set without its members.
live_set = Table(
    "live_set",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("backbone_digest", String(128), nullable=False),
    Column("routing", String(16), nullable=False),
)

# One row: the deployment's identity, which its policies, replicas and Control share.
deployment = Table(
    "deployment",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # 32 random hexadecimal digits, created with the database.
    Column("identity", String(32), nullable=False),
    # Added to the history's length to number policies. Above zero after an older database was restored, so that Routers
    # accept its policies.
    Column("policy_offset", Integer, nullable=False),
)

live_organs = Table(
    "live_organs",
    metadata,
    Column("organ", String(64), primary_key=True),
    # The order in which the organs' partial sums are added.
    Column("position", Integer, nullable=False, unique=True),
    Column("stable_digest", String(64), nullable=False),
    # Earlier stable digests as a JSON array, the newest last.
    Column("previous", Text, nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(96), primary_key=True),
    # The number of the history entry that staged it.
    Column("sequence", Integer, nullable=False, unique=True),
    Column("organ", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    # The stable version at the time of staging; null for a new organ.
    Column("incumbent_digest", String(64), nullable=True),
    Column("state", String(16), nullable=False),
    Column("percent", Double, nullable=True),
    Column("reason", Text, nullable=False),
    Column("actor", String(200), nullable=False),
    # Whether it restores an earlier stable version.
    Column("restores", Boolean, nullable=False),
    # `RolloutPlan` in JSON.
    Column("plan", Text, nullable=False),
    # Whether the plan's steps still run; an operator's canary or shadow ends that.
    Column("automatic", Boolean, nullable=False),
    Column("next_step", Integer, nullable=False),
    # Seconds since 1970.
    Column("created_at", Double, nullable=False),
    Column("state_since", Double, nullable=False),
    Column("traffic_since", Double, nullable=True),
    Column("verify_attempts", Integer, nullable=False),
    Column("replica_losses", Integer, nullable=False),
    # Whether it is still judged after its promotion.
    Column("watching", Boolean, nullable=False, server_default=false()),
)

_IN_FLIGHT = text("state IN ({})".format(", ".join(f"'{state}'" for state in IN_FLIGHT)))
# The database enforces one rollout in flight per organ.
Index("one_in_flight", rollouts.c.organ, unique=True, sqlite_where=_IN_FLIGHT, postgresql_where=_IN_FLIGHT)

applied_files = Table(
    "applied_files",
    metadata,
    Column("file_digest", String(64), primary_key=True),
    Column("organ", String(64), nullable=False),
    Column("rollout_id", String(96), nullable=False),
    Column("applied_at", Double, nullable=False),
)

# An organ's row has the digest "".
retired = Table(
    "retired",
    metadata,
    Column("organ", String(64), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("retired_at", Double, nullable=False),
)

# Every expert set that requests were ever assigned to.
expert_sets = Table(
    "expert_sets",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("backbone_digest", String(128), nullable=False),
    Column("routing", String(16), nullable=False),
    # [organ, bundle digest] of each member in the set's order, as a JSON array.
    Column("members", Text, nullable=False),
    # Seconds since 1970.
    Column("first_given_at", Double, nullable=False),
)

shadow_reports = Table(
    "shadow_reports",
    metadata,
    Column("rollout_id", String(96), primary_key=True),
    # `ShadowReport` in JSON.
    Column("report", Text, nullable=False),
    Column("updated_at", Double, nullable=False),
)

# The result of each gate of a rollout. Written once, and never changed.
evaluations = Table(
    "evaluations",
    metadata,
    Column("rollout_id", String(96), primary_key=True),
    # The gate's index in the rollout, from 0.
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("organ", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    # `Gate` and `Evidence` in JSON.
    Column("gate", Text, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("passed", Boolean, nullable=False),
    # The figures as text.
    Column("text", Text, nullable=False),
    # Seconds since 1970.
    Column("evaluated_at", Double, nullable=False),
)

history = Table(
    "history",
    metadata,
    # From 1, without gaps.
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    # ISO 8601, UTC, as it was hashed.
    Column("at", String(32), nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(32), nullable=False),
    Column("organ", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("rollout_id", String(96), nullable=False),
    Column("from_state", String(16), nullable=False),
    Column("to_state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    # A JSON object, as it was hashed.
    Column("details", Text, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)

# One row: the newest entry's number and hash, so that missing entries at the end are found. Writers lock it.
history_head = Table(
    "history_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("count", Integer, nullable=False),
    Column("hash", String(64), nullable=False),
)
