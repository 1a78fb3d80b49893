"""Keep the DAG of a run, sealed, and which of its tries were cleared; find runs by their start."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("dag_run", sa.Column("sealed_dag", sa.Text(), nullable=False, server_default=""))
    op.create_index("ix_dag_run_started", "dag_run", ["tenant_id", "started_at"])
    op.create_index("ix_dag_run_dag_started", "dag_run", ["tenant_id", "dag_id", "started_at"])
    op.create_table(
        "task_clear",
        sa.Column("tenant_id", sa.String(length=512), nullable=False),
        sa.Column("dag_id", sa.String(length=512), nullable=False),
        sa.Column("run_id", sa.String(length=512), nullable=False),
        sa.Column("task_id", sa.String(length=512), nullable=False),
        sa.Column("last_try", sa.Integer(), nullable=False),
        sa.Column("cleared_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "dag_id", "run_id", "task_id", name=op.f("pk_task_clear")),
    )


def downgrade() -> None:
    op.drop_table("task_clear")
    op.drop_index("ix_dag_run_dag_started", "dag_run")
    op.drop_index("ix_dag_run_started", "dag_run")
    op.drop_column("dag_run", "sealed_dag")
