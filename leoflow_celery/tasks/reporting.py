"""What workers without SQL tell the queue ``results``: an attempt was started, or how it ended.

Outcomes travel sealed: messages of failures and values of XComs are nobody's business on the broker.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from celery import Celery
from tenacity import before_sleep_log, retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from leoflow_celery.app import LeoflowCelery
from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.routing import RESULTS_QUEUE
from leoflow_celery.executors.base import FailureReporter
from leoflow_celery.tasks.context import LeoflowTask, services_of
from leoflow_celery.tasks.launch_reports import LaunchReports

log = logging.getLogger(__name__)
LAUNCHED_TASK = "leoflow.results.launched"
RECORD_TASK = "leoflow.results.record"
STAGING_DELETED_TASK = "leoflow.results.staging_deleted"
PRESENT_TASK = "leoflow.results.present"
#: How long a report waits for the broker: longer than a restart of it.
_DELIVERY_SECONDS = 300

_launch_reports: weakref.WeakKeyDictionary[Celery, LaunchReports] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def launch_reports(app: Celery) -> LaunchReports:
    """Where launches of this process tell that they are done."""
    with _lock:
        if app not in _launch_reports:
            reports = _launch_reports[app] = LaunchReports(partial(_send_launched, weakref.proxy(app)))
            if isinstance(app, LeoflowCelery):
                app.before_leaving.append(reports.close)
        return _launch_reports[app]


def _send_launched(app: Celery, reports: Sequence[LaunchReport]) -> None:
    _send(app, LAUNCHED_TASK, {"launches": [report.to_json() for report in reports]})


def report_staging_deleted(task: LeoflowTask, gone: Mapping[str, str]) -> None:
    """Tell which staging volumes are gone, name → reason."""
    _send(task.app, STAGING_DELETED_TASK, {"claims": dict(gone)})


def report_present(app: Celery, back_end: BackEnd, expires_seconds: float) -> None:
    """Tell that a worker holds this back end now; one attempt, since the next word follows soon.

    Raises:
        OperationalError: the broker did not take it.
    """
    app.send_task(
        PRESENT_TASK,
        kwargs={"back_end": str(back_end)},
        queue=RESULTS_QUEUE,
        priority=0,  # before any backlog: who is not heard of is not reconciled
        ignore_result=True,
        expires=expires_seconds,
    )


def report_outcome(
    task: LeoflowTask,
    attempt: AttemptId,
    outcome: Outcome,
    *,
    unclaimed: bool = False,
    return_value: str | None = None,
) -> None:
    """Tell how an attempt ended; ``unclaimed`` limits it to one that no agent has claimed."""
    _report(task.app, attempt, outcome, {"unclaimed": unclaimed, "return_value": return_value})


def reporter(app: Celery) -> FailureReporter:
    """The FailureReporter of executors: safe to call from any thread, any number of times."""

    def report(attempt: AttemptId, outcome: Outcome, return_value: str | None = None) -> None:
        _report(app, attempt, outcome, {"return_value": return_value})

    return report


def _report(app: Celery, attempt: AttemptId, outcome: Outcome, more: Mapping[str, Any]) -> None:
    sealed = services_of(app).sealer.seal({"outcome": outcome.to_json(), **more})
    _send(app, RECORD_TASK, {"attempt": attempt.to_json(), "sealed": sealed})


@retry(
    retry=retry_if_exception_type(Exception),
    wait=wait_random_exponential(max=10),
    stop=stop_after_delay(_DELIVERY_SECONDS),
    before_sleep=before_sleep_log(log, logging.WARNING),
    reraise=True,
)
def _send(app: Celery, name: str, kwargs: dict[str, Any]) -> None:
    app.send_task(name, kwargs=kwargs, queue=RESULTS_QUEUE, ignore_result=True, kwargsrepr=_shown(kwargs))


def _shown(kwargs: Mapping[str, Any]) -> str:
    return str({name: value for name, value in kwargs.items() if name != "sealed"})
