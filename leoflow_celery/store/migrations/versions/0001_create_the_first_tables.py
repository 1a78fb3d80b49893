"""Create the first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dag_run",
        sa.Column("tenant_id", sa.String(length=512), nullable=False),
        sa.Column("dag_id", sa.String(length=512), nullable=False),
        sa.Column("run_id", sa.String(length=512), nullable=False),
        sa.Column("dag_version", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("tenant_id", "dag_id", "run_id", name=op.f("pk_dag_run")),
    )
    op.create_table(
        "lease",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("holder", sa.String(length=255), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_lease")),
    )
    op.create_table(
        "staging_volume",
        sa.Column("claim_name", sa.String(length=255), nullable=False),
        sa.Column("tenant_id", sa.String(length=512), nullable=False),
        sa.Column("dag_id", sa.String(length=512), nullable=False),
        sa.Column("run_id", sa.String(length=512), nullable=False),
        sa.Column("size", sa.String(length=64), nullable=False),
        sa.Column("backend", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_reason", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("claim_name", name=op.f("pk_staging_volume")),
    )
    with op.batch_alter_table("staging_volume", schema=None) as batch_op:
        batch_op.create_index(
            "ix_staging_volume_active",
            ["backend"],
            unique=False,
            sqlite_where=sa.text("deleted_at IS NULL"),
            postgresql_where=sa.text("deleted_at IS NULL"),
        )

    op.create_table(
        "task_completion",
        sa.Column("celery_task_id", sa.String(length=255), nullable=False),
        sa.Column("task_instance_id", sa.String(length=512), nullable=False),
        sa.Column("try_number", sa.Integer(), nullable=False),
        sa.Column("context", sa.JSON(), nullable=False),
        sa.Column("result_callback", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("done_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("celery_task_id", name=op.f("pk_task_completion")),
    )
    with op.batch_alter_table("task_completion", schema=None) as batch_op:
        batch_op.create_index(
            "ix_task_completion_open",
            ["created_at"],
            unique=False,
            sqlite_where=sa.text("done_at IS NULL"),
            postgresql_where=sa.text("done_at IS NULL"),
        )
        batch_op.create_index("ix_task_completion_try", ["task_instance_id", "try_number"], unique=False)

    op.create_table(
        "task_event",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("task_instance_id", sa.String(length=512), nullable=False),
        sa.Column("try_number", sa.Integer(), nullable=False),
        sa.Column("launch", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("event", sa.String(length=32), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_task_event")),
    )
    with op.batch_alter_table("task_event", schema=None) as batch_op:
        batch_op.create_index("ix_task_event_attempt", ["task_instance_id", "try_number"], unique=False)

    op.create_table(
        "task_instance",
        sa.Column("task_instance_id", sa.String(length=512), nullable=False),
        sa.Column("try_number", sa.Integer(), nullable=False),
        sa.Column("launch", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(length=512), nullable=False),
        sa.Column("dag_id", sa.String(length=512), nullable=False),
        sa.Column("run_id", sa.String(length=512), nullable=False),
        sa.Column("task_id", sa.String(length=512), nullable=False),
        sa.Column("operator", sa.String(length=32), nullable=False),
        sa.Column("executor", sa.String(length=32), nullable=False),
        sa.Column("image", sa.Text(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("celery_task_id", sa.String(length=64), nullable=False),
        sa.Column("sealed_request", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("last_event", sa.Text(), nullable=False),
        sa.Column("log_tail", sa.JSON(), nullable=False),
        sa.Column("holder", sa.String(length=255), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("hostname", sa.String(length=255), nullable=False),
        sa.Column("external_name", sa.String(length=255), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("send_after", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("launched_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("task_instance_id", "try_number", name=op.f("pk_task_instance")),
    )
    with op.batch_alter_table("task_instance", schema=None) as batch_op:
        batch_op.create_index(
            "ix_task_instance_live",
            ["state", "queued_at"],
            unique=False,
            sqlite_where=sa.text("state IN ('queued', 'running')"),
            postgresql_where=sa.text("state IN ('queued', 'running')"),
        )
        batch_op.create_index("ix_task_instance_run", ["tenant_id", "dag_id", "run_id", "task_id"], unique=False)

    op.create_table(
        "xcom",
        sa.Column("tenant_id", sa.String(length=512), nullable=False),
        sa.Column("dag_id", sa.String(length=512), nullable=False),
        sa.Column("run_id", sa.String(length=512), nullable=False),
        sa.Column("task_id", sa.String(length=512), nullable=False),
        sa.Column("key", sa.String(length=512), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("content_type", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "dag_id", "run_id", "task_id", "key", name=op.f("pk_xcom")),
    )
    with op.batch_alter_table("xcom", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_xcom_expires_at"), ["expires_at"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("xcom", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_xcom_expires_at"))

    op.drop_table("xcom")
    with op.batch_alter_table("task_instance", schema=None) as batch_op:
        batch_op.drop_index("ix_task_instance_run")
        batch_op.drop_index(
            "ix_task_instance_live",
            sqlite_where=sa.text("state IN ('queued', 'running')"),
            postgresql_where=sa.text("state IN ('queued', 'running')"),
        )

    op.drop_table("task_instance")
    with op.batch_alter_table("task_event", schema=None) as batch_op:
        batch_op.drop_index("ix_task_event_attempt")

    op.drop_table("task_event")
    with op.batch_alter_table("task_completion", schema=None) as batch_op:
        batch_op.drop_index("ix_task_completion_try")
        batch_op.drop_index(
            "ix_task_completion_open",
            sqlite_where=sa.text("done_at IS NULL"),
            postgresql_where=sa.text("done_at IS NULL"),
        )

    op.drop_table("task_completion")
    with op.batch_alter_table("staging_volume", schema=None) as batch_op:
        batch_op.drop_index(
            "ix_staging_volume_active",
            sqlite_where=sa.text("deleted_at IS NULL"),
            postgresql_where=sa.text("deleted_at IS NULL"),
        )

    op.drop_table("staging_volume")
    op.drop_table("lease")
    op.drop_table("dag_run")
