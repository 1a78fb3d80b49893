"""What runs periodically: ``celery -A leoflow_celery.beat_schedule beat``.

Two beats send everything twice; the tasks are single-flight, so that is harmless. A message that no worker
takes for minutes expires.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from celery.schedules import schedule
from celery.signals import beat_init

from leoflow_celery import metrics
from leoflow_celery.agent.linux import hide_from_our_user
from leoflow_celery.app import create_app
from leoflow_celery.app.clocks import reading
from leoflow_celery.app.extras import touch_with_messages
from leoflow_celery.app.logging import show_fields
from leoflow_celery.domain.routing import EXPIRY_SECONDS, MAINTENANCE_QUEUE

hide_from_our_user()
app = create_app()
touch_with_messages(app.settings.health.file)


@beat_init.connect
def start_extras(**_: object) -> None:
    """Show the fields of log lines; open beat's Prometheus endpoint when LEOFLOW_METRICS_PORT names a port."""
    show_fields()
    metrics.serve(app.settings.metrics.port)
    reading(lambda: app.services, "beat", with_sql=False).start()


class Every(schedule):
    """Celery's schedule, which waits until its last time comes again when the host's clock was set back."""

    run_every: timedelta

    def is_due(self, last_run_at: datetime) -> Any:
        now = datetime.now(UTC)
        return super().is_due(last_run_at if last_run_at <= now else now - self.run_every)


_SETTINGS = app.settings.maintenance
_EVERY = {
    "send_due": _SETTINGS.interval_seconds,
    "complete_due": _SETTINGS.interval_seconds,
    "reap": _SETTINGS.interval_seconds,
    "reconcile": _SETTINGS.interval_seconds,
    "collect_staging": _SETTINGS.staging_interval_seconds,
    "expire_xcoms": _SETTINGS.housekeeping_interval_seconds,
    "prune_logs": _SETTINGS.housekeeping_interval_seconds,
    "prune_history": _SETTINGS.housekeeping_interval_seconds,
}
app.conf.beat_schedule = {
    name: {
        "task": f"leoflow.maintenance.{name}",
        "schedule": Every(seconds, app=app),
        "options": {"queue": MAINTENANCE_QUEUE, "expires": EXPIRY_SECONDS, "ignore_result": True},
    }
    for name, seconds in _EVERY.items()
}
