"""Which deployment a database belongs to, and by how much its policies' numbers are ahead of its history."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table with its one row: a random identity."""
    deployment = op.create_table(
        "deployment",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("identity", sa.String(32), nullable=False),
        sa.Column("policy_offset", sa.Integer, nullable=False),
    )
    op.bulk_insert(deployment, [{"id": 1, "identity": uuid.uuid4().hex, "policy_offset": 0}])


def downgrade() -> None:
    """Refuses: without its identity, a database can be mistaken for another deployment's.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("the identity must not be dropped; restore a backup of the database instead")
