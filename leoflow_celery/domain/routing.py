"""Which executor a task gets, and the Celery task and queue of each executor.

The rule is the contract's Router: http_api runs inline in the control plane unless it asks for ``execution_mode:
pod``; everything else runs on the standard executor or the one the request names.
"""

from __future__ import annotations

from enum import StrEnum

from leoflow_celery.domain.request import Operator, TaskRequest
from leoflow_celery.errors import InvalidRequest


class ExecutorType(StrEnum):
    """The four ways to run a task."""

    KUBERNETES = "kubernetes"
    DOCKER = "docker"
    SUBPROCESS = "subprocess"
    INLINE = "inline"


QUEUE_OF: dict[ExecutorType, str] = {
    ExecutorType.KUBERNETES: "k8s",
    ExecutorType.DOCKER: "docker",
    ExecutorType.SUBPROCESS: "subprocess",
    ExecutorType.INLINE: "inline",
}
DISPATCH_QUEUE = "dispatch"
RESULTS_QUEUE = "results"
MAINTENANCE_QUEUE = "maintenance"
LAUNCH_QUEUES = tuple(QUEUE_OF.values())
ALL_QUEUES = (*LAUNCH_QUEUES, DISPATCH_QUEUE, RESULTS_QUEUE, MAINTENANCE_QUEUE)

#: Executors whose attempts and volumes live elsewhere and are compared with SQL.
RECONCILED = (ExecutorType.KUBERNETES, ExecutorType.DOCKER)


#: What the names of our tasks begin with.
OUR_PREFIX = "leoflow."


class TaskName(StrEnum):
    """Every Celery task of ours. The last part of a back end's task is its executor."""

    DISPATCH = "leoflow.dispatch"

    EXECUTE_KUBERNETES = "leoflow.execute.kubernetes"
    EXECUTE_DOCKER = "leoflow.execute.docker"
    EXECUTE_SUBPROCESS = "leoflow.execute.subprocess"
    EXECUTE_INLINE = "leoflow.execute.inline"
    RECONCILE_KUBERNETES = "leoflow.reconcile.kubernetes"
    RECONCILE_DOCKER = "leoflow.reconcile.docker"
    STOP_KUBERNETES = "leoflow.stop.kubernetes"
    STOP_DOCKER = "leoflow.stop.docker"
    STAGING_KUBERNETES = "leoflow.staging.kubernetes"
    STAGING_DOCKER = "leoflow.staging.docker"

    RECORD_END = "leoflow.results.record"
    RECORD_STAGING = "leoflow.results.staging_deleted"
    RECORD_PRESENCE = "leoflow.results.present"
    ADVANCE_TRY = "leoflow.results.advance"

    SEND_DUE = "leoflow.maintenance.send_due"
    COMPLETE_DUE = "leoflow.maintenance.complete_due"
    REAP = "leoflow.maintenance.reap"
    REQUEST_RECONCILE = "leoflow.maintenance.reconcile"
    REQUEST_STAGING = "leoflow.maintenance.collect_staging"
    EXPIRE_XCOMS = "leoflow.maintenance.expire_xcoms"
    PRUNE_LOGS = "leoflow.maintenance.prune_logs"
    PRUNE_HISTORY = "leoflow.maintenance.prune_history"

    @classmethod
    def of(cls, kind: str, executor: ExecutorType) -> TaskName:
        """The task of a back end: ``kind`` is execute, reconcile, stop or staging.

        Raises:
            ValueError: the executor has none of that kind.
        """
        return cls(f"{OUR_PREFIX}{kind}.{executor}")

    @property
    def queue(self) -> str:
        """The executor's or the control plane's own queue."""
        kind, _, what = self.removeprefix(OUR_PREFIX).partition(".")
        queues = {"dispatch": DISPATCH_QUEUE, "results": RESULTS_QUEUE, "maintenance": MAINTENANCE_QUEUE}
        return queues[kind] if kind in queues else QUEUE_OF[ExecutorType(what)]

    @property
    def is_monitored(self) -> bool:
        """Whether a monitor hears of it: of attempts and requests, not of the system's own work."""
        return self.startswith((f"{OUR_PREFIX}execute.", TaskName.DISPATCH))


TASK_NAMES = frozenset(TaskName)


def executor_of_task(name: str) -> ExecutorType:
    """The executor of a back end's task."""
    return ExecutorType(name.rpartition(".")[2])


def is_monitored(name: str) -> bool:
    """Whether a monitor hears of a Celery task, ours or a user's."""
    return not name.startswith(OUR_PREFIX) or (name in TASK_NAMES and TaskName(name).is_monitored)


def executor_for(request: TaskRequest, standard: ExecutorType) -> ExecutorType:
    """The executor of a request; ``standard`` is the system's LEOFLOW_EXECUTOR_TYPE.

    Raises:
        InvalidRequest: the executor named contradicts ``execution_mode``.
    """
    wants_agent = request.operator is not Operator.HTTP_API or request.execution_mode == "pod"
    if request.executor is not None:
        chosen = ExecutorType(request.executor)
        if chosen is not ExecutorType.INLINE and request.execution_mode == "inline":
            raise InvalidRequest(
                f"executor: {chosen.value!r} contradicts execution_mode 'inline'; leave one of the two out", "executor"
            )
        if chosen is ExecutorType.INLINE and wants_agent:
            raise InvalidRequest(
                "executor: 'inline' contradicts execution_mode 'pod'; name kubernetes, docker or subprocess", "executor"
            )
        return chosen
    return standard if wants_agent else ExecutorType.INLINE


def check_inline_timeout(request: TaskRequest, max_duration_seconds: int) -> None:
    """Refuse an inline task that asks for more time than the control plane gives, for all of it or for one attempt.

    Raises:
        InvalidRequest: names the timeout, the cap and ``execution_mode: pod``.
    """
    asked: dict[str, float] = {"timeout_seconds": request.timeout_seconds}
    call = request.http_request
    if call is not None and "timeout_seconds" in call.model_fields_set:  # its default is cut to a cap below
        asked["http_request.timeout_seconds"] = call.timeout_seconds
    for field, seconds in asked.items():
        if seconds > max_duration_seconds:
            raise InvalidRequest(
                f"{field}: {seconds:.10g} is above the inline cap of {max_duration_seconds} s; "
                "set execution_mode: pod to run the call in an agent, or ask for less",
                field,
            )


def check_secrets(request: TaskRequest, executor: ExecutorType) -> None:
    """Refuse secrets that nobody would resolve: the task would start without them.

    The gateway resolves ``env``; ``k8s_secret`` is put into pods by the kubernetes executor.

    Raises:
        InvalidRequest: names the secret and its source.
    """
    resolved = {"env"} | ({"k8s_secret"} if executor is ExecutorType.KUBERNETES else set())
    if executor is ExecutorType.INLINE:
        resolved = set()
    for index, secret in enumerate(request.secrets):
        if secret.source not in resolved:
            known = " or ".join(repr(one) for one in sorted(resolved)) or "none: put it into http_request"
            raise InvalidRequest(
                f"secrets.{index}.source: {secret.source!r} of {secret.name!r} is not resolved by the {executor} "
                f"executor; it takes {known}",
                f"secrets.{index}.source",
            )


def check_task(request: TaskRequest, standard: ExecutorType, max_inline_seconds: int) -> ExecutorType:
    """The executor of a request that nothing there would refuse.

    Raises:
        InvalidRequest: names what would be refused, and the fix.
    """
    executor = executor_for(request, standard)
    if executor is ExecutorType.INLINE:
        check_inline_timeout(request, max_inline_seconds)
    check_secrets(request, executor)
    return executor


def host_queue(executor: ExecutorType, host: str) -> str:
    """The queue that one host's workers consume beside the executor's own, e.g. ``docker.host-1``."""
    return f"{QUEUE_OF[executor]}.{host}"


def queue_for_task(name: str) -> str | None:
    """The queue of one of our Celery tasks, or None for a task that is not ours."""
    return TaskName(name).queue if name in TASK_NAMES else None
