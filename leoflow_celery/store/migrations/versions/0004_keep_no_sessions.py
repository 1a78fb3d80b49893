"""Keep no agent's session: a holder is a hash of its attempt and session, and an event names none."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_TRIES = sa.table(
    "task_instance",
    *(sa.column(name) for name in ("task_instance_id", "try_number", "launch", "state", "holder")),
)
#: Every other holder has a name that opens nothing; a session that holds one of these words was nobody's.
_NAMES = ("worker:%", "foreign:%", "agent:%", "renewing:%")
_IS_SESSION = sa.and_(_TRIES.c.holder.is_not(None), *(_TRIES.c.holder.not_like(name) for name in _NAMES))
_IS_LIVE = _TRIES.c.state.in_(["queued", "running"])


def upgrade() -> None:
    connection = op.get_bind()
    # Agents that run go on with the session they have.
    for task_instance_id, try_number, launch, _, session in connection.execute(
        sa.select(_TRIES).where(_IS_SESSION, _IS_LIVE)
    ).all():
        text = f"{task_instance_id}\x00{try_number}\x00{launch}\x00{session}"
        holder = f"agent:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
        of_try = sa.and_(_TRIES.c.task_instance_id == task_instance_id, _TRIES.c.try_number == try_number)
        connection.execute(sa.update(_TRIES).where(of_try).values(holder=holder))
    connection.execute(sa.update(_TRIES).where(_IS_SESSION, ~_IS_LIVE).values(holder=None))
    without = "json_remove(details, '$.holder')"
    if connection.dialect.name == "postgresql":
        without = "((details::jsonb) - 'holder')::json"
    op.execute(f"UPDATE task_event SET details = {without} WHERE event = 'claimed'")  # noqa: S608 - our own text


def downgrade() -> None:
    """Nothing to take back: a session cannot be found from its hash."""
