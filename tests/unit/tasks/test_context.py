"""The base of our tasks."""

from __future__ import annotations

import pytest
from celery import Celery, Task
from celery.exceptions import Reject

from leoflow_celery.tasks.context import LeoflowTask


def test_a_message_whose_retry_the_broker_refused_goes_back_to_it(monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object, **__: object) -> None:
        raise Reject(OSError("away"), requeue=False)

    monkeypatch.setattr(Task, "retry", refused)
    app = Celery(set_as_current=False)

    @app.task(base=LeoflowTask)
    def task() -> None: ...

    with pytest.raises(Reject) as caught:
        task.retry(exc=ValueError())
    assert caught.value.requeue
    assert isinstance(caught.value.reason, OSError)
