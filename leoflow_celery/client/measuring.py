"""What submitting tells the metrics: requests sent, and requests refused. The same in a scheduler and in a worker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from leoflow_celery import metrics
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import AtCapacity, DecryptionFailed, InvalidDag, InvalidRequest, RequestTooLarge
from leoflow_celery.store.submissions import NewTry
from leoflow_celery.store.views import Submitted

#: Labels of what can never be sent.
_WHY: dict[type[Exception], str] = {
    InvalidRequest: "invalid_request",
    InvalidDag: "invalid_request",
    RequestTooLarge: "too_large",
    DecryptionFailed: "unsealable",
}


@contextmanager
def refusals_counted() -> Iterator[None]:
    """Count why a request was refused; the error goes on."""
    try:
        yield
    except AtCapacity:
        metrics.record_at_capacity()
        raise
    except tuple(_WHY) as error:
        metrics.record_undispatchable(_WHY[type(error)])
        raise


def count_submitted(tries: Sequence[NewTry], submitted: Sequence[Submitted], started: float) -> None:
    """Count what is recorded as queued since ``started`` (``time.monotonic()``); a repeated submit counts nothing."""
    seconds_each = (time.monotonic() - started) / max(len(tries), 1)
    for item, done in zip(tries, submitted, strict=True):
        if done.created:
            metrics.record_dispatch(seconds_each)
            metrics.record_transition(TaskState.NONE, TaskState.QUEUED, item.request.dag_id)
