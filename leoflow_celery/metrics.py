"""Prometheus metrics: one table of names, one function per thing that happens.

The first group keeps Leoflow's names, so that its dashboards go on working. The registry is our own and built on first
use: importing this module costs nothing, and importing it twice registers nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from leoflow_celery.domain.reasons import CLASS_OF, FailureReason, parse_reason
from leoflow_celery.errors import ConfigurationError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from leoflow_celery.settings import MetricsSettings

_LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_DURATIONS = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 1_800, 3_600, 7_200, 21_600, 86_400)
_SIZES = (64, 256, 1_024, 4_096, 16_384, 65_536, 131_072, 262_144)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its kind, its help text, its labels and, for a histogram, its buckets."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = _LATENCIES
    #: How a gauge of several processes becomes one value (prometheus_client's multiprocess mode).
    across_processes: Literal["mostrecent", "livesum"] = "mostrecent"


METRICS: dict[str, Metric] = {
    # Leoflow's names
    "leoflow_task_state_transitions_total": Metric(
        "counter", "Task instance state changes.", ("from_state", "to_state", "dag_id")
    ),
    "leoflow_task_duration_seconds": Metric(
        "histogram", "Run time of task instances.", ("dag_id", "task_id", "task_type"), _DURATIONS
    ),
    "leoflow_task_retries_total": Metric("counter", "Tries after the first.", ("dag_id", "task_id")),
    "leoflow_task_pod_creation_duration_seconds": Metric("histogram", "Time of the calls that create a pod."),
    "leoflow_task_cold_start_seconds": Metric("histogram", "Time from queued to running.", ("dag_id",)),
    "leoflow_xcom_size_bytes": Metric("histogram", "Size of XCom values.", ("dag_id",), _SIZES),
    "leoflow_xcom_push_total": Metric("counter", "XCom values stored.", ("dag_id",)),
    "leoflow_xcom_pull_total": Metric("counter", "XCom values read.", ("dag_id",)),
    "leoflow_xcom_rejected_total": Metric("counter", "XCom values refused.", ("reason",)),
    "leoflow_pods_created_total": Metric("counter", "Pod creations.", ("dag_id", "result")),
    "leoflow_pods_running": Metric("gauge", "Managed pods that run."),
    "leoflow_pod_pending_duration_seconds": Metric("histogram", "Time pods spent pending."),
    "leoflow_kubernetes_api_calls_total": Metric("counter", "Kubernetes API calls.", ("operation", "result")),
    "leoflow_dispatch_queue_depth": Metric("gauge", "Messages in all launch queues."),
    "leoflow_dispatch_at_capacity_total": Metric("counter", "Requests refused because their queue was full."),
    "leoflow_dispatch_latency_seconds": Metric("histogram", "Time to record and send one request."),
    "leoflow_tasks_undispatchable_total": Metric("counter", "Requests that can never be sent.", ("reason",)),
    "leoflow_auth_failures_total": Metric("counter", "Agent calls without an acceptable token.", ("reason",)),
    # Ours
    "leoflow_queue_depth": Metric("gauge", "Messages in a queue.", ("queue",)),
    "leoflow_queue_oldest_age_seconds": Metric(
        "gauge", "Age of a queue's oldest task instance or message.", ("queue",)
    ),
    "leoflow_messages_refused_total": Metric(
        "counter", "Messages that a worker refused, by what is wrong with them.", ("queue", "kind")
    ),
    "leoflow_messages_expired_total": Metric(
        "counter", "Messages that were not run because they had expired.", ("queue",)
    ),
    "leoflow_clock_offset_seconds": Metric(
        "gauge", "How far this process's clock is ahead of a server's.", ("server",)
    ),
    "leoflow_dead_letters": Metric("gauge", "Dead letters that are kept."),
    "leoflow_dead_letters_dropped_total": Metric("counter", "Dead letters that went to make room for newer ones."),
    "leoflow_claims_total": Metric("counter", "Claims, by granted or the reason of the refusal.", ("result",)),
    "leoflow_fenced_writes_total": Metric("counter", "Writes of holders that lost their claim.", ("kind",)),
    "leoflow_failures_total": Metric("counter", "Failed attempts.", ("reason", "class")),
    "leoflow_relaunches_total": Metric("counter", "Tries started again by us.", ("reason",)),
    "leoflow_reconcile_duration_seconds": Metric("histogram", "Time of one reconcile pass.", ("executor",)),
    "leoflow_staging_volumes": Metric("gauge", "Staging volumes.", ("state",)),
    "leoflow_secret_backend_failures_total": Metric(
        "counter", "Questions that a back end of variables, connections and secrets could not answer.", ("backend",)
    ),
    "leoflow_agents_connected": Metric("gauge", "Agents with an open log stream.", across_processes="livesum"),
}


class _Registered:
    """The metrics of this process in a registry of their own."""

    def __init__(self) -> None:
        import prometheus_client  # 50 ms that only processes which record should pay

        # They would double the series, and no dashboard reads them.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry()
        self.task_id_label = True
        self._metrics: dict[str, Any] = {name: self._register(name, metric) for name, metric in METRICS.items()}
        #: Finding a series anew costs more than counting in it. prometheus_client keeps every series as well.
        self._series: dict[tuple[str, ...], Any] = {}

    def _register(self, name: str, metric: Metric) -> Any:
        from prometheus_client import Counter, Gauge, Histogram

        match metric.kind:
            case "counter":
                return Counter(name, metric.text, metric.labels, registry=self.registry)
            case "gauge":
                mode = metric.across_processes
                return Gauge(name, metric.text, metric.labels, registry=self.registry, multiprocess_mode=mode)
            case "histogram":
                return Histogram(name, metric.text, metric.labels, registry=self.registry, buckets=metric.buckets)

    def of(self, name: str, *labels: str) -> Any:
        """The series of a metric with these label values."""
        if not labels:
            return self._metrics[name]
        found = self._series.get((name, *labels))
        if found is None:
            found = self._series[name, *labels] = self._metrics[name].labels(*labels)
        return found

    def task(self, task_id: str) -> str:
        """The value of a task_id label. Empty is the same as no label to Prometheus."""
        return task_id if self.task_id_label else ""


@cache
def _registered() -> _Registered:
    return _Registered()


def configure(settings: MetricsSettings) -> None:
    """Apply the settings of this process; without a call every label is filled."""
    _registered().task_id_label = settings.task_id_label


def _count(name: str, *labels: str) -> None:
    _registered().of(name, *labels).inc()


def _observe(name: str, value: float, *labels: str) -> None:
    # A clock that was set back makes a difference negative.
    _registered().of(name, *labels).observe(max(value, 0.0))


def _set(name: str, value: float, *labels: str) -> None:
    _registered().of(name, *labels).set(value)


# Task instances


def record_transition(from_state: str, to_state: str, dag_id: str) -> None:
    """A task instance changed its state."""
    _count("leoflow_task_state_transitions_total", from_state, to_state, dag_id)


def record_duration(dag_id: str, task_id: str, task_type: str, seconds: float) -> None:
    """A task instance ended after running for ``seconds``; ``task_type`` is its operator."""
    _observe("leoflow_task_duration_seconds", seconds, dag_id, _registered().task(task_id), task_type)


def record_retry(dag_id: str, task_id: str) -> None:
    """The scheduler submitted a try after the first."""
    _count("leoflow_task_retries_total", dag_id, _registered().task(task_id))


def record_cold_start(dag_id: str, seconds: float) -> None:
    """A task instance runs, ``seconds`` after it was queued."""
    _observe("leoflow_task_cold_start_seconds", seconds, dag_id)


def record_failure(reason: FailureReason | str) -> None:
    """An attempt failed for good."""
    known = parse_reason(reason)
    _count("leoflow_failures_total", known.value, CLASS_OF[known].value)


def record_relaunch(reason: FailureReason | str) -> None:
    """We started a try again."""
    _count("leoflow_relaunches_total", parse_reason(reason).value)


def record_claim(result: str) -> None:
    """An attempt asked to run: ``granted``, or why it may not (``ClaimRefused.why``)."""
    _count("leoflow_claims_total", result)


def record_fenced(kind: str) -> None:
    """A write of a holder without claim was refused: state, heartbeat, xcom or log."""
    _count("leoflow_fenced_writes_total", kind)


# XCom


def record_xcom_push(dag_id: str, size_bytes: int) -> None:
    """A value was stored."""
    _count("leoflow_xcom_push_total", dag_id)
    _observe("leoflow_xcom_size_bytes", size_bytes, dag_id)


def record_xcom_pull(dag_id: str) -> None:
    """A value was read."""
    _count("leoflow_xcom_pull_total", dag_id)


def record_xcom_rejected(reason: str) -> None:
    """A value was refused (``XComRejected.reason``)."""
    _count("leoflow_xcom_rejected_total", reason)


# Dispatch and queues


def record_dispatch(seconds: float) -> None:
    """A request was recorded and sent."""
    _observe("leoflow_dispatch_latency_seconds", seconds)


def record_at_capacity() -> None:
    """A request was refused because its queue is full."""
    _count("leoflow_dispatch_at_capacity_total")


def record_undispatchable(reason: str) -> None:
    """A request can never be sent."""
    _count("leoflow_tasks_undispatchable_total", reason)


def set_queue_depths(depths: Mapping[str, int], launch_queues: Iterable[str]) -> None:
    """The messages in every queue; those of the launch queues add up to the dispatch depth."""
    for queue, depth in depths.items():
        _set("leoflow_queue_depth", depth, queue)
    _set("leoflow_dispatch_queue_depth", sum(depths.get(queue, 0) for queue in launch_queues))


def set_queue_oldest_age(queue: str, seconds: float) -> None:
    """How long the oldest task instance of a queue has waited; 0 for an empty queue."""
    _set("leoflow_queue_oldest_age_seconds", max(seconds, 0.0), queue)


def record_refused(queue: str, kind: str) -> None:
    """A worker refused a message of a queue (``decoder.Kind``)."""
    _count("leoflow_messages_refused_total", queue, kind)


def record_expired(queue: str) -> None:
    """A message of a queue was not run: it had expired."""
    _count("leoflow_messages_expired_total", queue)


def set_clock_offset(server: str, seconds: float) -> None:
    """How far this process's clock is ahead of the clock of ``broker`` or ``database``."""
    _set("leoflow_clock_offset_seconds", seconds, server)


def set_dead_letters(number: int) -> None:
    """The dead letters that are kept."""
    _set("leoflow_dead_letters", number)


def record_dead_letters_dropped(number: int) -> None:
    """So many dead letters went to make room for newer ones."""
    _registered().of("leoflow_dead_letters_dropped_total").inc(number)


# Back ends and gateway


def record_pod_created(dag_id: str, result: str, seconds: float) -> None:
    """A pod creation ended: created, exists, transient or permanent."""
    _count("leoflow_pods_created_total", dag_id, result)
    _observe("leoflow_task_pod_creation_duration_seconds", seconds)


def record_pod_pending(seconds: float) -> None:
    """A pod left the phase Pending."""
    _observe("leoflow_pod_pending_duration_seconds", seconds)


def set_pods_running(number: int) -> None:
    """The managed pods that run."""
    _set("leoflow_pods_running", number)


def record_kubernetes_call(operation: str, result: str) -> None:
    """A Kubernetes API call ended, ``result`` being its status code or the kind of error."""
    _count("leoflow_kubernetes_api_calls_total", operation, result)


def record_reconcile(executor: str, seconds: float) -> None:
    """One pass over a back end's attempts ended."""
    _observe("leoflow_reconcile_duration_seconds", seconds, executor)


def set_staging_volumes(counts: Mapping[str, int]) -> None:
    """The staging volumes per state."""
    for state, number in counts.items():
        _set("leoflow_staging_volumes", number, state)


def set_agents_connected(number: int) -> None:
    """The agents with an open log stream to this gateway."""
    _set("leoflow_agents_connected", number)


def record_auth_failure(reason: str) -> None:
    """An agent call had no acceptable token (``InvalidToken.reason``)."""
    _count("leoflow_auth_failures_total", reason)


def record_secret_failure(backend: str) -> None:
    """A back end of variables, connections and secrets could not answer; its name is from the settings."""
    _count("leoflow_secret_backend_failures_total", backend)


# Exposition


def _exposed() -> CollectorRegistry:
    """What to show: this process, or all of a pool's when PROMETHEUS_MULTIPROC_DIR is set."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.multiprocess import MultiProcessCollector

    shown = CollectorRegistry()
    try:
        MultiProcessCollector(shown)  # type: ignore[no-untyped-call]
    except ValueError:  # the variable is not set, or is no directory
        shown.register(_registered().registry)
        ProcessCollector(registry=shown)
    return shown


def exposition() -> bytes:
    """The text that the endpoint serves."""
    from prometheus_client import generate_latest

    return generate_latest(_exposed())


def serve(port: int, address: str = "0.0.0.0") -> Callable[[], None]:  # noqa: S104 - Prometheus scrapes from outside
    """Serve the endpoint in a thread until the function returned is called. Port 0 is off.

    Raises:
        ConfigurationError: the port cannot be used.
    """
    if not port:
        return lambda: None
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, address, _exposed())
    except OSError as error:
        raise ConfigurationError(f"metrics port {port} cannot be used ({error.strerror}); set another one") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
