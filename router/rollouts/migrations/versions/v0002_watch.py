"""Whether a stable version is still judged after its promotion."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the column; what was promoted before is not watched any more."""
    op.add_column("rollouts", sa.Column("watching", sa.Boolean, nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Refuses: the history is append-only.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("the history must not be dropped; restore a backup of the database instead")
