"""Which bundles the expert sets of past answers consist of, by their ids."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table. It begins with the set that is live when Control opens the database next."""
    op.create_table(
        "expert_sets",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("backbone_digest", sa.String(128), nullable=False),
        sa.Column("routing", sa.String(16), nullable=False),
        sa.Column("members", sa.Text, nullable=False),
        sa.Column("first_given_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Refuses: without the sets, past answers cannot be computed again.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("the expert sets must not be dropped; restore a backup of the database instead")
