"""Add where a try goes and its memory growth, and how often a completion failed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("task_instance", sa.Column("back_end", sa.String(length=255), nullable=False, server_default=""))
    op.add_column("task_instance", sa.Column("queue_name", sa.String(length=255), nullable=False, server_default=""))
    op.add_column("task_instance", sa.Column("staging_claim", sa.String(length=255), nullable=False, server_default=""))
    op.add_column("task_instance", sa.Column("memory_limit", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("task_instance", sa.Column("oom_memory_factor", sa.Double(), nullable=False, server_default="1"))
    op.add_column("task_instance", sa.Column("oom_relaunches", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("task_completion", sa.Column("failures", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("task_completion") as table:
        table.drop_column("failures")
    with op.batch_alter_table("task_instance") as table:
        for name in ("oom_relaunches", "oom_memory_factor", "memory_limit", "staging_claim", "queue_name", "back_end"):
            table.drop_column(name)
