"""Runs to report about, as the stores would tell of them, without a store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.report.data import Found
from leoflow_celery.store.views import RunView, TaskInstanceView

#: A moment; every time of a run is seconds after it.
T0 = 1_800_000_000.0
#: What may stand in an id or a log and must not act: markup, an end of the script, ESC, a bidi override.
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[2J\u202egnp"


def view(task_id: str = "load", *, at: float = 0.0, ran: float | None = 5.0, **changes: Any) -> TaskInstanceView:
    """A try that was queued at ``at``, sent and launched a second later each, and ran for so long; None: it runs on."""
    queued = T0 + at
    fields: dict[str, Any] = {
        **dict.fromkeys(("tenant_id",), "default"),
        "dag_id": "sales",
        "run_id": "r1",
        "task_id": task_id,
        "task_instance_id": f"ti-{task_id}",
        "try_number": 1,
        "launch": 1,
        "operator": "bash",
        "executor": "subprocess",
        "state": TaskState.SUCCESS if ran is not None else TaskState.RUNNING,
        "hostname": "host-1",
        "external_name": "name",
        "queued_at": queued,
        "send_after": queued,
        "sent_at": queued + 1,
        "launched_at": queued + 2,
        "started_at": queued + 3,
        "ended_at": None if ran is None else queued + 3 + ran,
        "read_at": T0 + 1_000,
        "exit_code": None,
        "log_tail": (),
        "priority": 3,
        "memory_limit": 0,
        "oom_memory_factor": 1.0,
        "oom_relaunches": 0,
        "reschedules": 0,
        "first_reschedule_at": None,
        "owner": "",
        "relaunch": "always",
        "end_number": None,
    }
    texts = ("image", "celery_task_id", "sealed_request", "message", "last_event", "back_end", "queue_name")
    nothing = ("reason", "holder", "lease_until", "last_heartbeat_at", "cancel_requested_at")
    fields |= {**dict.fromkeys(texts, ""), "staging_claim": "", **dict.fromkeys(nothing)}
    return replace(TaskInstanceView(**fields), **changes)


def run_view(run_id: str = "r1", *, at: float = 0.0, seconds: float | None = 60.0, **changes: Any) -> RunView:
    """A run of the DAG ``sales``."""
    state = RunState.SUCCESS if seconds is not None else RunState.RUNNING
    ended = None if seconds is None else T0 + at + seconds
    return replace(RunView("default", "sales", run_id, "v1", state, T0 + at, ended), **changes)


def large(count: int) -> Found:
    """A run of so many tasks in layers of 25, each after three of the layer before; every 50th has failed."""
    specs: dict[str, dict[str, Any]] = {}
    tries, tails = [], {}
    for number in range(count):
        layer, place = divmod(number, 25)
        above = {(layer - 1) * 25 + (place + shift) % 25 for shift in (0, 1, 7)} if layer else set()
        name = f"task-{number:04d}"
        specs[name] = {"task_id": name, "type": "bash", "depends_on": [f"task-{one:04d}" for one in sorted(above)]}
        one = view(name, at=layer * 10, ran=2 + place / 10)
        if number % 50 == 49:
            one = replace(one, state=TaskState.FAILED, reason="non_zero_exit", message="exit code 3", exit_code=3)
        tries.append(one)
        tails[one.task_instance_id] = [f"line {n} of {name}" for n in range(30)]
    run = run_view(seconds=count / 2.5 + 10)
    earlier = [run_view(f"before-{n}", at=-1_000 * (n + 1), seconds=100.0 + n) for n in range(10)]
    seconds = {one.run_id: dict.fromkeys(specs, 3.0) for one in earlier}
    return Found(
        run, tries, T0 + 1_000, specs, earlier=earlier, seconds=seconds, tail_of=lambda one: tails[one.task_instance_id]
    )
