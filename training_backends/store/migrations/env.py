"""Alembic environment: runs the revisions in the given transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
