"""Run by alembic itself, on the connection and inside the transaction that `router.rollouts.database` opened."""

from alembic import context

from router.rollouts.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
