"""The first tables: the live set, rollouts, rollout files, retired versions, shadow reports, history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

IN_FLIGHT = sa.text("state IN ('staged', 'verified', 'warm', 'shadow', 'canary')")


def upgrade() -> None:
    """Makes the tables."""
    _make_live_set()
    _make_rollouts()
    _make_history()


def _make_live_set() -> None:
    op.create_table(
        "live_set",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("backbone_digest", sa.String(128), nullable=False),
        sa.Column("routing", sa.String(16), nullable=False),
    )
    op.create_table(
        "live_organs",
        sa.Column("organ", sa.String(64), primary_key=True),
        sa.Column("position", sa.Integer, nullable=False, unique=True),
        sa.Column("stable_digest", sa.String(64), nullable=False),
        sa.Column("previous", sa.Text, nullable=False),
    )


def _make_rollouts() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String(96), primary_key=True),
        sa.Column("sequence", sa.Integer, nullable=False, unique=True),
        sa.Column("organ", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("incumbent_digest", sa.String(64), nullable=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("percent", sa.Double, nullable=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("restores", sa.Boolean, nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("automatic", sa.Boolean, nullable=False),
        sa.Column("next_step", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("state_since", sa.Double, nullable=False),
        sa.Column("traffic_since", sa.Double, nullable=True),
        sa.Column("verify_attempts", sa.Integer, nullable=False),
        sa.Column("replica_losses", sa.Integer, nullable=False),
    )
    op.create_index(
        "one_in_flight", "rollouts", ["organ"], unique=True, sqlite_where=IN_FLIGHT, postgresql_where=IN_FLIGHT
    )
    op.create_table(
        "applied_files",
        sa.Column("file_digest", sa.String(64), primary_key=True),
        sa.Column("organ", sa.String(64), nullable=False),
        sa.Column("rollout_id", sa.String(96), nullable=False),
        sa.Column("applied_at", sa.Double, nullable=False),
    )
    op.create_table(
        "retired",
        sa.Column("organ", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("retired_at", sa.Double, nullable=False),
    )
    op.create_table(
        "shadow_reports",
        sa.Column("rollout_id", sa.String(96), primary_key=True),
        sa.Column("report", sa.Text, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
    )


def _make_history() -> None:
    op.create_table(
        "history",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("organ", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("rollout_id", sa.String(96), nullable=False),
        sa.Column("from_state", sa.String(16), nullable=False),
        sa.Column("to_state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("previous_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    head = op.create_table(
        "history_head",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.bulk_insert(head, [{"id": 1, "count": 0, "hash": "0" * 64}])


def downgrade() -> None:
    """Refuses: the history is append-only.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("the history must not be dropped; restore a backup of the database instead")
