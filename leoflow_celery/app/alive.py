"""A file whose age tells whether a worker or beat is alive: asking costs a look at a clock, not a Celery command.

A process that hangs or lost its broker stops touching it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from celery.signals import after_task_publish, heartbeat_sent
from celery.utils.dispatch import Signal

log = logging.getLogger(__name__)


def touch_with_heartbeats(file: Path | None) -> None:
    """Touch ``file`` with each heartbeat of this worker; without a connection there are none."""
    _touch_with(heartbeat_sent, file)


def touch_with_messages(file: Path | None) -> None:
    """Touch ``file`` whenever this process published a task."""
    _touch_with(after_task_publish, file)


def _touch_with(signal: Signal, file: Path | None) -> None:
    if file is None:
        return
    path = file

    def touch(**_: Any) -> None:
        try:
            path.touch()
        except OSError as error:
            log.warning("health.not_touched", extra={"file": str(path), "error": str(error)})

    signal.connect(touch, weak=False, dispatch_uid=f"leoflow-alive-{path}")
