"""Which executor a task gets, and the Celery task and queue of each executor.

The rule is the contract's Router: http_api runs inline in the control plane unless it asks for ``execution_mode:
pod``; everything else runs on the standard executor or the one the request names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from leoflow_celery.domain.fields import MAX_NAME_CHARACTERS, is_printable, printable
from leoflow_celery.domain.request import Operator, TaskRequest
from leoflow_celery.domain.staging import check_claims
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
#: What is said again every so often expires after this. Celery sets it by the sender's clock and compares it with the
#: receiver's: minutes, which no two clocks that anybody looks after differ by.
EXPIRY_SECONDS = 600.0
MAINTENANCE_QUEUE = "maintenance"
LAUNCH_QUEUES = tuple(QUEUE_OF.values())
ALL_QUEUES = (*LAUNCH_QUEUES, DISPATCH_QUEUE, RESULTS_QUEUE, MAINTENANCE_QUEUE)


def held_key(*queues: str) -> str:
    """The key of Redis under which a worker of these queues holds its messages.

    Launch workers of each executor have one of their own: who may touch theirs need not touch another's.
    """
    homes = {queue.partition(".")[0] for queue in queues}
    home = homes.pop() if len(homes) == 1 else ""
    return f"unacked.{home}" if home in _OWN_HELD else "unacked"


#: Inline workers belong to the control plane.
_OWN_HELD = frozenset(LAUNCH_QUEUES) - {QUEUE_OF[ExecutorType.INLINE]}
#: Where a user's task goes that names no queue: the one that Celery's workers consume when they are told none.
USER_QUEUE = "celery"
#: Keys of the broker, of results and of ours in Redis, beside which queues are keys, too.
_RESERVED_QUEUES = (
    *("_kombu.", "unacked", "celery-task-meta-", "celery-taskset-meta-", "celeryev", "celery.pidbox"),
    *("reply.celery.pidbox", "chord-unlock-", "lock:", "xcom:", "xcom-keys:", "launched", "dead-letters"),
)
#: Executors whose attempts and volumes live elsewhere and are compared with SQL.
RECONCILED = (ExecutorType.KUBERNETES, ExecutorType.DOCKER)


#: What the names of our tasks begin with.
OUR_PREFIX = "leoflow."
_CELERY_PREFIX = "celery."


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
    CANCEL_TRY = "leoflow.results.cancel"

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


def user_task_problem(name: str) -> str:
    """Why a user may not have a Celery task sent; nothing when he may."""
    if not 0 < len(name) <= MAX_NAME_CHARACTERS or not is_printable(name):
        return f"a task's name is a printable text of 1 to {MAX_NAME_CHARACTERS} characters"
    if name.startswith(OUR_PREFIX) and name != TaskName.DISPATCH:
        return f"{name!r} is a task of this system; name a task of your own, or {TaskName.DISPATCH.value!r}"
    if name.startswith(_CELERY_PREFIX):
        return f"{name!r} is a task of Celery itself; name a task of your own"
    return ""


def user_queue_problem(queue: str, task: str = "") -> str:
    """Why a user's task may not be sent to a queue; nothing when it may. ``leoflow.dispatch`` has its own."""
    if queue == DISPATCH_QUEUE and task == TaskName.DISPATCH:
        return ""
    if not 0 < len(queue) <= MAX_NAME_CHARACTERS or not is_printable(queue):
        return f"a queue's name is a printable text of 1 to {MAX_NAME_CHARACTERS} characters"
    if queue in ALL_QUEUES or queue.startswith(tuple(f"{name}." for name in LAUNCH_QUEUES)):
        return f"{queue!r} is a queue of this system; name a queue of your own"
    if queue.startswith(_RESERVED_QUEUES):
        return f"{queue!r} is a name that the broker keeps for itself; name a queue of your own"
    return ""


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


#: What a call in the control plane has no use for: no container, process or memory is its own. An image and a staging
#: volume are not among them, since a DAG gives them to all of its tasks.
_OF_AN_AGENT = (
    *("resources", "execution", "pod_override", "oom_memory_factor", "image_pull_policy"),
    *("task_secret_name", "task_secret_mount_path", "agent_tls_ca_config_map"),
)


def check_inline_fields(request: TaskRequest) -> None:
    """Refuse what an inline task sets and nobody would do.

    Raises:
        InvalidRequest: names the field, its value when it is short, and the fix.
    """
    given = request.model_dump(mode="json", include=set(_OF_AN_AGENT), exclude_defaults=True)
    for field, value in given.items():
        place = field
        while isinstance(value, dict) and value:
            name, value = next(iter(value.items()))
            place = printable(f"{place}.{name}", 200)
        # A part of a Pod may hold the value of a variable, which may be secret.
        is_shown = field != "pod_override" and isinstance(value, str | int | float)
        shown = f" (got {printable(str(value), 80)!r})" if is_shown else ""
        raise InvalidRequest(
            f"{place}: has no effect on a call that the control plane makes{shown}; remove {field}, or set "
            "execution_mode: pod to run the call in an agent",
            place,
        )


def check_agent(request: TaskRequest, executor: ExecutorType) -> None:
    """Refuse an agent for a container where there is none.

    Raises:
        InvalidRequest: names the field, the executor and the fix.
    """
    if request.agent is not None and executor not in RECONCILED:
        raise InvalidRequest(
            f"agent: {request.agent!r} is for pods and containers, and the {executor} executor starts none; leave it "
            "out, or name the kubernetes or docker executor",
            "agent",
        )


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator lets requests ask for; ``permitted`` empty is the standard executor and the inline one."""

    standard: ExecutorType
    max_inline_seconds: int
    permitted: frozenset[ExecutorType] = frozenset()

    def check_executor(self, executor: ExecutorType) -> None:
        """Refuse an executor that the operator does not offer.

        Raises:
            InvalidRequest: names the executor, those that are permitted, and the setting.
        """
        permitted = self.permitted or {self.standard, ExecutorType.INLINE}
        if executor not in permitted:
            raise InvalidRequest(
                f"executor: {executor.value!r} is not permitted here; use {' or '.join(sorted(permitted))}, or have "
                "LEOFLOW_DISPATCH_PERMITTED_EXECUTORS name it",
                "executor",
            )


def check_callback(request: TaskRequest) -> None:
    """Refuse a result callback that is not a user's task on a user's queue.

    Raises:
        InvalidRequest: names the field, the value and the fix.
    """
    if request.result_callback is not None:
        for field, problem in callback_problems(request.result_callback.task, request.result_callback.queue).items():
            raise InvalidRequest(f"{field}: {problem}", field)


def callback_problems(task: str, queue: str | None) -> dict[str, str]:
    """What is wrong with a result callback: field → problem."""
    # Not leoflow.dispatch either: the final event, which is what a callback gets, is no request.
    name = f"{task!r} is a task of this system; name a task of your own" if task == TaskName.DISPATCH else ""
    found = {"result_callback.task": name or user_task_problem(task)}
    found["result_callback.queue"] = user_queue_problem(queue) if queue else ""
    return {field: problem for field, problem in found.items() if problem}


def check_task(request: TaskRequest, policy: Policy) -> ExecutorType:
    """The executor of a request that nothing there would refuse.

    Raises:
        InvalidRequest: names what would be refused, and the fix.
    """
    executor = executor_for(request, policy.standard)
    policy.check_executor(executor)
    if executor is ExecutorType.INLINE:
        check_inline_timeout(request, policy.max_inline_seconds)
        check_inline_fields(request)
    check_agent(request, executor)
    check_secrets(request, executor)
    check_callback(request)
    check_claims(request)
    return executor


def host_queue(executor: ExecutorType, host: str) -> str:
    """The queue that one host's workers consume beside the executor's own, e.g. ``docker.host-1``."""
    return f"{QUEUE_OF[executor]}.{host}"


def queue_for_task(name: str) -> str | None:
    """The queue of one of our Celery tasks, or None for a task that is not ours."""
    return TaskName(name).queue if name in TASK_NAMES else None
