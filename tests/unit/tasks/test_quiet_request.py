"""What a worker tells anybody about a dispatch message."""

from __future__ import annotations

import json
from typing import Any

from celery import Celery
from kombu.transport.memory import Channel
from kombu.transport.virtual import Message

from leoflow_celery.tasks.dispatch import QuietRequest

CANARY = "c4n4ry"


def received(app: Celery) -> QuietRequest:
    """A request for a message that a publisher sent with everything readable."""
    body = json.dumps([[{"env": {"A": CANARY}}], {"more": CANARY}, {}])
    shown = repr({"env": CANARY})
    payload: dict[str, Any] = {
        "body": body,
        "headers": {"id": "1", "task": "t", "argsrepr": shown, "kwargsrepr": shown, "lang": "py"},
        "properties": {"delivery_tag": "1", "delivery_info": {}},
        "content-type": "application/json",
        "content-encoding": "utf-8",
    }
    connection = app.connection_for_read()
    return QuietRequest(Message(payload, channel=Channel(connection.transport)), app=app, task=app.tasks["t"])


def test_no_argument_is_shown_to_events_logs_or_inspect():
    app = Celery(broker="memory://", set_as_current=False)

    @app.task(name="t")
    def task(*_: object, **__: object) -> None: ...

    request = received(app)
    shown = [
        request.argsrepr,
        request.kwargsrepr,
        repr(request),
        request.humaninfo(),
        request.info(),
        request.info(True),
    ]
    assert CANARY not in str(shown)
    assert request.args[0]["env"] == {"A": CANARY}
