"""The floor: plain Celery tasks without any of ours, on the same broker, pool and serializer."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from typing import Any

import requests
from celery import Celery

_URL = os.environ["LEOFLOW_BROKER_URL"]
app = Celery("floor", broker=_URL, backend=_URL)
app.conf.update(
    task_default_queue="floor",
    broker_transport_options={"global_keyprefix": "floor:"},
    result_backend_transport_options={"global_keyprefix": "floor:"},
    worker_pool="threads",
    worker_prefetch_multiplier=1,
    task_acks_late=True,
    worker_send_task_events=True,
    task_send_sent_event=True,
    worker_hijack_root_logger=True,
)


@app.task(name="floor.noop")
def noop() -> None:
    return None


@app.task(name="floor.get")
def get(url: str) -> Any:
    return requests.get(url, timeout=60).json()


@app.task(name="floor.python")
def python() -> int:
    return subprocess.run([sys.executable, "-c", "pass"], check=True).returncode


@app.task(name="floor.post")
def post(namespace: str, pod: dict[str, Any], secret: dict[str, Any] | None) -> None:
    from bench.cluster import post_pair

    post_pair(_client(), namespace, pod, secret)


@functools.cache
def _client() -> Any:
    from bench.cluster import official_client

    return contextlib.ExitStack().enter_context(official_client(int(os.environ["BENCH_CONNECTIONS"])))
