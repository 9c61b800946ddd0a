"""Revisions of the run store, run by alembic."""
