"""The standard notification, through a real broker."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import redis

from leoflow_celery.domain.routing import RESULTS_QUEUE
from leoflow_celery.gateway.lifecycle import nudge_results
from leoflow_celery.queueing.messages import AdvanceTry, open_message
from leoflow_celery.services import Services
from leoflow_celery.settings import BrokerSettings
from tests.integration.gateway.harness import settings_for


def test_a_results_worker_is_asked_to_look(redis_url: str, tmp_path: Path) -> None:
    broker = BrokerSettings(url=redis_url)
    settings = settings_for(f"sqlite:///{tmp_path / 'x.db'}", tmp_path).model_copy(update={"broker": broker})
    nudge_results(Services(settings))("ti-7", 3)
    client: Any
    with redis.Redis.from_url(redis_url.replace("redis+socket://", "unix://", 1)) as client:
        keys = [key for key in client.keys("*") if RESULTS_QUEUE.encode() in key and client.type(key) == b"list"]
        (message,) = client.lrange(keys[0], 0, -1)
    found = json.loads(message)
    assert found["headers"]["task"] == "leoflow.results.advance"
    _, arguments, _ = json.loads(base64.b64decode(found["body"]))
    message = open_message(Services(settings).keys, "control", AdvanceTry, arguments["sealed"])
    assert message == AdvanceTry("ti-7", 3)
