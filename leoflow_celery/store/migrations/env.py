"""Alembic's entry point: runs inside the connection that ``store.migrate`` hands over."""

from __future__ import annotations

from alembic import context

from leoflow_celery.store.models import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
