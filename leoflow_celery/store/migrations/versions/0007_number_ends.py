"""Number ends for the feed; a try has an owner, and says when it may be started again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_UNNUMBERED = sa.text("end_number IS NULL AND ended_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("task_instance", sa.Column("owner", sa.String(length=255), nullable=False, server_default=""))
    op.add_column("task_instance", sa.Column("relaunch", sa.String(length=32), nullable=False, server_default="always"))
    op.add_column("task_instance", sa.Column("end_number", sa.BigInteger(), nullable=True))
    op.create_index("ix_task_instance_end_number", "task_instance", ["end_number"], unique=True)
    op.create_index(
        "ix_task_instance_unnumbered",
        "task_instance",
        ["ended_at"],
        sqlite_where=_UNNUMBERED,
        postgresql_where=_UNNUMBERED,
    )
    op.create_table(
        "counter",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counter")),
    )


def downgrade() -> None:
    op.drop_table("counter")
    op.drop_index("ix_task_instance_unnumbered", "task_instance")
    op.drop_index("ix_task_instance_end_number", "task_instance")
    op.drop_column("task_instance", "end_number")
    op.drop_column("task_instance", "relaunch")
    op.drop_column("task_instance", "owner")
