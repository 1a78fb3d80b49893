"""kill -9 of the broker in the middle of a call: the worker lives, the call is made once, the next task runs.

Celery 5.7.0 workers exit there; ``leoflow_celery.app.consumer`` is what keeps ours.
"""

from __future__ import annotations

from leoflow_celery.domain.states import TaskState
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


def test_a_worker_outlives_its_broker_and_runs_nothing_twice(
    own_system: System, redis_server: RedisServer, target: HttpTarget
) -> None:
    client = own_system.client
    worker = own_system.start_worker("workers.lite")
    running = client.submit(http_task(target.hold("a")))
    wait_until(lambda: target.calls["a"] and running.result.state == "STARTED", 20, "the call")

    redis_server.kill()
    worker.wait_for_line("Connection to broker lost", 20)
    redis_server.start()
    wait_until(lambda: worker.output().count("Connected to redis") >= 2, 30, worker.output)

    following = client.submit(http_task(target.url("b")))
    assert following.get(timeout=30)["call"] == 1
    assert running.state() is TaskState.RUNNING
    target.release("a")
    assert running.get(timeout=30) == {"path": "/200/a", "call": 1}
    # Its message came over a connection that is gone: acknowledging it there is what kills a worker of Celery 5.7.0.
    worker.wait_for_line(rf"Task \S+\[{running.id}\] succeeded", 20)
    assert client.submit(http_task(target.url("c"))).get(timeout=30)["call"] == 1
    assert (target.calls["a"], running.task_instance().launch) == (1, 1)
    assert worker.returncode is None
    assert worker.terminate() == 0
