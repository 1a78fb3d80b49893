"""Let a task release its place until later: how often it did, and when for the first time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task_instance", sa.Column("reschedules", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("task_instance", sa.Column("first_reschedule_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("task_instance", "first_reschedule_at")
    op.drop_column("task_instance", "reschedules")
