"""The executor of a worker's process: what it reports goes to the queue ``results``, what it notices to the metrics."""

from __future__ import annotations

from celery import Celery

from leoflow_celery import metrics
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.executors.base import Executor, Observer
from leoflow_celery.tasks.context import services_of
from leoflow_celery.tasks.reporting import reporter


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
    return services_of(app).executor(executor_type, lambda: reporter(app), observer)
