"""The executor of a worker's process: what it reports goes to the control plane, what it notices to the metrics."""

from __future__ import annotations

from celery import Celery

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.routing import RECONCILED, ExecutorType
from leoflow_celery.errors import LeoflowError
from leoflow_celery.executors.base import Executor, FailureReporter, Observer
from leoflow_celery.queueing.messages import AttemptEnded
from leoflow_celery.queueing.publisher import Publisher
from leoflow_celery.tasks.context import services_of


class ClusterMetrics(Observer):
    """What is noticed of the Kubernetes API; of other servers there is no metric."""

    def api_call(self, operation: str, result: str) -> None:
        metrics.record_kubernetes_call(operation, result)

    def pending(self, seconds: float) -> None:
        metrics.record_pod_pending(seconds)

    def running(self, count: int) -> None:
        metrics.set_pods_running(count)


def executor_of(app: Celery, executor_type: ExecutorType) -> Executor:
    """The one executor of a type in this process.

    Raises:
        ConfigurationError: this version has no such back end, or what it needs is not installed.
    """
    observer = ClusterMetrics if executor_type is ExecutorType.KUBERNETES else Observer
    return services_of(app).executor(executor_type, lambda: reporter(app, executor_type), observer)


def host_of(app: Celery, executor_type: ExecutorType) -> str:
    """The host whose back end this process holds; empty where an executor has one back end, or nobody knows yet."""
    if executor_type not in RECONCILED:
        return ""
    try:
        return str(getattr(executor_of(app, executor_type), "host", ""))
    except LeoflowError:
        return ""


def reporter(app: Celery, executor_type: ExecutorType) -> FailureReporter:
    """The FailureReporter of an executor: safe to call from any thread, any number of times."""

    def report(attempt: AttemptId, outcome: Outcome, return_value: str | None = None) -> None:
        ended = AttemptEnded(attempt, outcome, return_value=return_value, host=host_of(app, executor_type))
        Publisher(app, services_of(app)).attempt_ended(executor_type, ended)

    return report
