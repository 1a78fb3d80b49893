"""A system whose k8s and docker workers are scripted, and what they wrote down."""

from __future__ import annotations

import json
import secrets
import sys
from typing import Any

from leoflow_celery.client import Handle
from leoflow_celery.domain.attempt import attempt_name
from leoflow_celery.store.presence import Kind
from tests.support.process import ManagedProcess
from tests.support.system import System, wait_for_worker
from tests.support.waiting import wait_until

#: Maintenance runs only when a test sends it.
SETTINGS = {
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
    "MAINTENANCE_INTERVAL_SECONDS": 30,
    "MAINTENANCE_LOST_MESSAGE_SECONDS": 60,
    "DOCKER_TERMINATION_GRACE_SECONDS": 7,
}


class BackEnds:
    """Submits to a system, starts its scripted workers and reads what they wrote down."""

    def __init__(self, system: System) -> None:
        self.system, self.client, self.redis = system, system.client, system.redis
        self.store = self.client.services.store

    def start(self, queue: str, host: str = "", name: str = "", *options: str) -> ManagedProcess:
        """A worker that is known to be there when this returns."""
        name = name or f"{queue}-{host}"
        module = "tests.integration.tasks.scripted_back_end"
        command = (sys.executable, "-m", "celery", "-A", module, "worker", "-l", "INFO", "-n", f"{name}@%h", *options)
        worker = self.system.start(name, *command, env={"LEOFLOW_TEST_QUEUE": queue, "LEOFLOW_DOCKER_HOST": host})
        wait_for_worker(worker)
        return worker

    def wait_until_present(self, *back_ends: str) -> None:
        wait_until(lambda: set(back_ends) <= set(self.present()), 60, lambda: f"{back_ends}, not {self.present()}")

    def present(self) -> list[str]:
        return [str(one) for one in self.store.presence.back_ends()]

    def announce(self, back_end: str) -> None:
        """Say that a back end is there, for a worker that comes later."""
        self.store.presence.keep_present(Kind.BACK_END, back_end)

    def submit(self, executor: str, task_id: str, run_id: str = "", **fields: Any) -> Handle:
        identity = secrets.token_hex(8)
        request = {
            "task_instance_id": identity,
            "dag_id": "d",
            "run_id": run_id or identity,
            "task_id": task_id,
            "operator": "bash",
            "entrypoint": "true",
            "executor": executor,
            **fields,
        }
        return self.client.submit(request)

    def calls(self, method: str) -> list[tuple[str, dict[str, Any]]]:
        """(host, details) of each call, oldest first."""
        found = (json.loads(item) for item in self.redis.lrange("calls", 0, -1))
        return [(host, details) for host, called, details in found if called == method]

    def wait_for_calls(self, method: str, count: int, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
        def matching() -> list[tuple[str, dict[str, Any]]]:
            return [one for one in self.calls(method) if fields.items() <= one[1].items()]

        return wait_until(
            lambda: found if len(found := matching()) >= count else None, 60, lambda: f"{method} {fields}: {matching()}"
        )

    def wait_until_launched(self, handle: Handle) -> None:
        wait_until(lambda: handle.task_instance().launched_at, 60, "the launch to be recorded")

    def maintain(self, name: str) -> None:
        self.system.maintain(name)
        wait_until(lambda: self.client.services.queues.depth("maintenance") == 0, 60, name)


def name_of(handle: Handle) -> str:
    view = handle.task_instance()
    return attempt_name(view.attempt, view.dag_id, view.task_id)
