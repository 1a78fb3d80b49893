"""The public API: submit requests, look at what became of them, read values and logs, cancel.

>>> from leoflow_celery import submit
>>> handle = submit({"task_instance_id": "…", "dag_id": "…", "run_id": "…", "task_id": "…",
...                  "operator": "bash", "entrypoint": "echo hello"})     # doctest: +SKIP
>>> handle.get(timeout=60)                                                # doctest: +SKIP
"""

from leoflow_celery.client.client import Client
from leoflow_celery.client.handle import Handle, wait

__all__ = ["Client", "Handle", "wait"]
