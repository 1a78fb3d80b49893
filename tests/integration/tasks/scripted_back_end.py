"""A worker of queue k8s or docker whose back end starts nothing: it writes down each call, and does as Redis says.

``celery -A tests.integration.tasks.scripted_back_end worker``; LEOFLOW_TEST_QUEUE names the queue, LEOFLOW_DOCKER_HOST
the host. Calls go to the Redis list ``calls`` as ``[host, method, details]``.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis

from leoflow_celery.app import create_app
from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.routing import RECONCILED
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.errors import TransientLaunchError
from leoflow_celery.executors.base import FailureReporter, Launched, LaunchSpec, Observer, Reconciled
from leoflow_celery.executors.registry import BACK_ENDS
from leoflow_celery.settings import Settings
from tests.support.waiting import wait_until


class WrittenDown:
    """A ReconcilableExecutor that follows keys of the broker's Redis.

    ``busy``: so many launches fail for now. ``gone``: the set of names that a reconcile reports as deleted. ``held``:
    a reconcile waits while it exists, and a launch while ``held_launch`` does.
    """

    def __init__(self, host: str, client: redis.Redis[bytes], reporter: FailureReporter, observer: Observer) -> None:
        self.host, self._redis, self._reporter, self._observer = host, client, reporter, observer

    def _write(self, method: str, details: Any) -> None:
        self._redis.rpush("calls", json.dumps([self.host, method, details]))

    def execute(self, launch: LaunchSpec) -> Launched:
        memory = launch.request.resources.limits.memory
        self._write("execute", {"task": launch.request.task_id, "launch": launch.attempt.launch, "memory": memory})
        if int(self._redis.decr("busy")) >= 0:
            self._observer.api_call("create_pod", "429")
            raise TransientLaunchError(FailureReason.LAUNCH_FAILED, "busy", retry_after_seconds=0.1)
        self._observer.api_call("create_pod", "ok")
        wait_until(lambda: not self._redis.exists("held_launch"), 60, "the test to let go", interval=0.05)
        return Launched(launch.name, host=self.host)

    def cancel(self, name: str, grace_seconds: float) -> None:
        self._write("cancel", {"name": name, "grace_seconds": grace_seconds})

    def reconcile(self, expectation: Expectation) -> Reconciled:
        self._write("reconcile", expectation.to_json())
        wait_until(lambda: not self._redis.exists("held"), 60, "the test to let go", interval=0.05)
        gone = {name.decode() for name in self._redis.smembers("gone")}
        for name, one in expectation.attempts.items():
            if name in gone:
                self._reporter(one.attempt, Outcome.failed(FailureReason.POD_DELETED, "somebody deleted it"))
        self._observer.running(len(expectation.attempts))
        self._observer.pending(1.5)
        return Reconciled(len(expectation.attempts), len(gone))

    def collect_staging(self, plan: StagingPlan) -> dict[str, str]:
        self._write("collect_staging", plan.to_json())
        return dict(plan.delete)

    def close(self) -> None:
        self._redis.close()


def create(settings: Settings, reporter: FailureReporter, observer: Observer) -> WrittenDown:
    return WrittenDown(settings.docker.host, redis.Redis.from_url(settings.broker.url), reporter, observer)


if "LEOFLOW_TEST_QUEUE" in os.environ:
    BACK_ENDS.update(dict.fromkeys(RECONCILED, __name__))
    app = create_app(os.environ["LEOFLOW_TEST_QUEUE"])
