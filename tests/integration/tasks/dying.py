"""A worker whose tasks die with their process: ``celery -A tests.integration.tasks.dying worker -P processes``."""

from __future__ import annotations

import os
import signal

import redis

from workers.inline import app

__all__ = ["app"]


@app.task(name="user.die")
def die(key: str, times: int) -> int:
    """Count the call, and die with ``times`` of them."""
    with redis.Redis.from_url(os.environ["LEOFLOW_BROKER_URL"]) as client:
        number = int(client.incr(key))
    if number <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
