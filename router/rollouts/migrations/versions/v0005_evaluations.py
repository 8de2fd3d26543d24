"""What the evaluations of versions found."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "evaluations",
        sa.Column("rollout_id", sa.String(96), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("organ", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("gate", sa.Text, nullable=False),
        sa.Column("evidence", sa.Text, nullable=False),
        sa.Column("passed", sa.Boolean, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("evaluated_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Refuses: evaluations are the reason for promotions that the history tells of.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("the evaluations must not be dropped; restore a backup of the database instead")
