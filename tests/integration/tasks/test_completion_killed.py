"""kill -9 of a control worker that completes: everybody hears it, and hardly anybody twice."""

from __future__ import annotations

import json
import secrets
from collections import Counter

from leoflow_celery.domain.outcome import Outcome
from tests.support.system import System
from tests.support.waiting import wait_until

TRIES = 200
AT_MOST_TWICE = 5


def callbacks(system: System) -> Counter[str]:
    """How often each callback was sent, by its id: nobody takes them from their queue."""
    messages = system.redis.lrange("leoflow:user", 0, -1)
    return Counter(json.loads(message)["headers"]["id"] for message in messages)


def test_a_control_worker_killed_in_the_middle_repeats_a_few_callbacks_under_their_ids(own_system: System) -> None:
    client = own_system.client
    run, callback = secrets.token_hex(8), {"task": "user.note", "queue": "user"}
    request = {"dag_id": "d", "run_id": run, "operator": "bash", "entrypoint": "true", "executor": "kubernetes"}
    names = [f"{run}-{number}" for number in range(TRIES)]
    tries = [{**request, "task_instance_id": name, "task_id": name, "result_callback": callback} for name in names]
    handles = client.submit_many(tries)
    for handle in handles:  # ended, and nobody was told
        client.services.store.attempts.finish(handle.attempt, Outcome.success())

    worker = own_system.start_worker("workers.control", name="victim")
    own_system.maintain("complete_due")
    wait_until(lambda: own_system.redis.llen("leoflow:user") >= 12, 30, worker.output)
    worker.kill()
    killed_at = sum(callbacks(own_system).values())
    assert killed_at < TRIES, "it was done before it was killed"

    survivor = own_system.start_worker("workers.control", name="survivor")

    def all_told() -> bool:
        own_system.maintain("complete_due")
        return len(callbacks(own_system)) == TRIES and not client.services.store.completions.take(0.001)

    wait_until(all_told, 60, survivor.output)
    twice = [count for count in callbacks(own_system).values() if count > 1]
    assert len(twice) <= AT_MOST_TWICE
    assert set(twice) <= {2}
    assert handles[-1].result.state == "SUCCESS"
