"""What is decided between Airflow and this system, without either: requests for workloads, and what an end means."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason, parse_reason
from leoflow_celery.domain.request import RelaunchMode
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.store.views import TaskInstanceView

#: The interpreter of the image or host that the agent runs python tasks with must have Airflow.
ARGV = ("{python}", "-m", "leoflow_celery.airflow.worker")
#: The key of a task's ``executor_config`` that is ours.
CONFIG_KEY = "leoflow"
#: Request fields that a DAG may set there.
PERMITTED = frozenset(
    {
        *("executor", "image", "image_pull_policy", "resources", "execution", "env", "timeout_seconds", "priority"),
        *("staging_claim", "staging_size", "staging_storage_class", "staging_access_mode", "secrets"),
        *("task_secret_name", "task_secret_mount_path", "pod_override", "docker_override", "oom_memory_factor"),
    }
)
_MESSAGE_LINES = 10
_KILLED_EXIT_CODE = 128 + signal.SIGKILL
_EXECUTORS = frozenset(one.value for one in ExecutorType)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a deployment sets for all tasks."""

    owner: str = "airflow"
    #: Empty: the system's standard executor.
    executor: str = ""
    image: str = ""
    #: What workers on a host of ours see of the scheduler's configuration; images bring their own.
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Work:
    """A workload of Airflow as this system names it. ``input`` is its JSON, with a token in it."""

    identity: str
    dag_id: str
    run_id: str
    task_id: str
    try_number: int
    input: str = field(repr=False)
    queue: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


def mapped(task_id: str, map_index: int) -> str:
    """The task id of one member of a mapped task: they share everything else, and each has its own log."""
    return task_id if map_index < 0 else f"{task_id}[{map_index}]"


def request_of(work: Work, defaults: Defaults) -> dict[str, Any]:
    """The request that runs a workload.

    Raises:
        InvalidRequest: ``executor_config`` asks for what a task may not set.
    """
    wish = work.config.get(CONFIG_KEY, {})
    if not isinstance(wish, Mapping):
        raise InvalidRequest(f"executor_config[{CONFIG_KEY!r}] is not a dictionary of request fields", CONFIG_KEY)
    for name in wish:
        if name not in PERMITTED:
            known = ", ".join(sorted(PERMITTED))
            raise InvalidRequest(
                f"executor_config[{CONFIG_KEY!r}]: a task cannot set {name!r}; it may set {known}", CONFIG_KEY
            )
    by_queue = work.queue if work.queue in _EXECUTORS else ""
    executor = wish.get("executor") or by_queue or defaults.executor
    return {
        "image": defaults.image,
        **wish,
        **({"executor": executor} if executor else {}),
        "task_instance_id": work.identity,
        "dag_id": work.dag_id,
        "run_id": work.run_id,
        "task_id": work.task_id,
        "try_number": work.try_number,
        "operator": "exec",
        "argv": list(ARGV),
        "stdin": work.input,
        "env": {**(defaults.env if executor in ("", "subprocess") else {}), **wish.get("env", {})},
        "owner": defaults.owner,
        # From Airflow's own start call on, only Airflow may start it again.
        "relaunch": RelaunchMode.BEFORE_START.value,
    }


class Verdict(Enum):
    """What Airflow is told of an end."""

    #: The process ended; the worker has told Airflow how.
    SUCCESS = "success"
    #: Nothing of the try runs any more, and Airflow has to judge what that means.
    FAILED = "failed"
    #: The try goes on with another hand-over: nothing that the user did ended it.
    GIVE_BACK = "give_back"
    #: Airflow refused to let it run: another copy does, or it is over.
    NOTHING = "nothing"


def verdict(view: TaskInstanceView) -> Verdict:
    """What an ended try of ours means for Airflow."""
    if view.state is TaskState.SUCCESS:
        return Verdict.SUCCESS
    if view.state is TaskState.SKIPPED:
        return Verdict.NOTHING
    reason = parse_reason(view.reason)
    if reason is FailureReason.SUPERSEDED:
        return Verdict.NOTHING
    if reason is FailureReason.NON_ZERO_EXIT and view.exit_code == _KILLED_EXIT_CODE:
        # Airflow's supervisor, which would have reported the end of a task that was killed, was killed itself.
        return Verdict.GIVE_BACK
    return Verdict.GIVE_BACK if CLASS_OF[reason] is FailureClass.INFRASTRUCTURE else Verdict.FAILED


def text_of(view: TaskInstanceView) -> str:
    """Why it ended, for people: the reason, the sentence and the last lines."""
    head = (
        f"{view.reason or view.state.value}: {view.message}" if view.message else str(view.reason or view.state.value)
    )
    return "\n".join([head, *view.log_tail[-_MESSAGE_LINES:]])
