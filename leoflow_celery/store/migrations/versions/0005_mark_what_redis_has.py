"""Mark how far Redis has come, so that a Redis that went back is found out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "redis_mark",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("identity", sa.String(length=255), nullable=False),
        sa.Column("mark", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_redis_mark")),
    )


def downgrade() -> None:
    op.drop_table("redis_mark")
