"""A publisher that knows Redis and JSON, as one in Go or Rust would: ``raw_redis.py URL REQUEST_JSON [priority]``.

Prints the result that its task id got.
"""

import base64
import json
import sys
import time
import uuid

import redis

PREFIX = "leoflow:"  # LEOFLOW_BROKER_KEY_PREFIX of the system
STEP_SEPARATOR = "\x06\x16"


def message(task_id: str, request: dict, priority: int) -> str:
    body = json.dumps([[request], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"lang": "go", "task": "leoflow.dispatch", "id": task_id, "root_id": task_id},
            "properties": {
                "correlation_id": task_id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "dispatch"},
                "priority": priority,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def queue_key(priority: int) -> str:
    """0 is served first. The ten priorities share four lists: 0-2, 3-5, 6-8, 9."""
    step = priority // 3 * 3
    return f"{PREFIX}dispatch{STEP_SEPARATOR}{step}" if step else f"{PREFIX}dispatch"


def main() -> None:
    client = redis.Redis.from_url(sys.argv[1])
    request, task_id = json.loads(sys.argv[2]), str(uuid.uuid4())
    priority = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    client.lpush(queue_key(priority), message(task_id, request, priority))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = client.get(f"{PREFIX}celery-task-meta-{task_id}")
        if found and json.loads(found)["status"] in ("SUCCESS", "FAILURE"):
            sys.stdout.write(found.decode())
            break
        time.sleep(0.05)
    client.close()
    assert not [name for name in sys.modules if name.startswith(("leoflow", "celery", "kombu"))]


main()
