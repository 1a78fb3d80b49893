"""A publisher with kombu alone, for brokers beyond Redis: ``with_kombu.py URL REQUEST_JSON``. Prints its result."""

import json
import sys
import time
import uuid

from kombu import Connection, Queue

PREFIX = "leoflow:"


def main() -> None:
    request, task_id = json.loads(sys.argv[2]), str(uuid.uuid4())
    with Connection(sys.argv[1], transport_options={"global_keyprefix": PREFIX}) as connection:
        connection.Producer(serializer="json").publish(
            [[request], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}],
            routing_key="dispatch",
            declare=[Queue("dispatch", routing_key="dispatch")],
            headers={"lang": "py", "task": "leoflow.dispatch", "id": task_id, "root_id": task_id},
            correlation_id=task_id,
        )
        client = connection.default_channel.client
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = client.get(f"{PREFIX}celery-task-meta-{task_id}")
            if found and json.loads(found)["status"] in ("SUCCESS", "FAILURE"):
                sys.stdout.write(found.decode())
                break
            time.sleep(0.05)
    assert not [name for name in sys.modules if name.startswith(("leoflow", "celery"))]


main()
