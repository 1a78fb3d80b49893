"""One gateway process under load: heartbeats per second, and unary calls beside a thousand open log streams.

    python -m bench.gateway [--agents 2000] [--seconds 8] [--streams 1000] [--database URL]

The floor of the heartbeats is a bare grpc.aio server that answers the same message and does nothing else, under the
same load from the same processes. The floor of the streams is the latency of unary calls without them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from cryptography.fernet import Fernet
from pydantic import SecretStr

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.queueing.messages import seal_request
from leoflow_celery.security import KeyRing, TokenIssuer
from leoflow_celery.settings import DatabaseSettings, Settings
from leoflow_celery.store import Store
from leoflow_celery.store.migrate import upgrade
from leoflow_celery.store.submissions import NewTry

_SECRET = uuid.uuid4().hex + uuid.uuid4().hex
_SEAL_KEY = Fernet.generate_key().decode()
_CLIENTS = 2
_GATEWAY = (
    "import logging, sys; from leoflow_celery.gateway import run; from leoflow_celery.settings import Settings;"
    "logging.basicConfig(level=logging.WARNING); sys.exit(run(Settings.load()))"
)
_FLOOR = """
import asyncio, sys, grpc, grpc.aio
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import METHODS, SERVICE, serialize
async def beat(request, context):
    return pb.HeartbeatResponse()
async def main():
    server = grpc.aio.server()
    method = METHODS["Heartbeat"]
    handler = grpc.unary_unary_rpc_method_handler(beat, method.request.FromString, serialize)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Heartbeat": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"gateway listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()
asyncio.run(main())
"""


@contextmanager
def server(code: str, env: dict[str, str]) -> Iterator[tuple[psutil.Process, str]]:
    """A server process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
    try:
        assert process.stdout is not None
        yield psutil.Process(process.pid), process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(30)


def load(*job: Any) -> subprocess.Popen[str]:
    """A process of bench/gateway_load.py that has begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gateway_load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    json.dump(job, process.stdin)
    process.stdin.close()
    return process


def result(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.wait() == 0, "the load failed"
    return json.loads(output.splitlines()[-1])


def submit(store: Store, count: int) -> list[list[str]]:
    """Record task instances; a token and a session for each."""
    tokens, keys = TokenIssuer(_SECRET, 3600), KeyRing(_SEAL_KEY)
    agents, tries = [], []
    for number in range(count):
        request = TaskRequest(
            task_instance_id=uuid.uuid4().hex,
            dag_id="bench",
            run_id="run",
            task_id=f"task-{number}",
            operator="bash",
            entrypoint="true",
        )
        sealed = seal_request(keys, request)
        tries.append(NewTry(request, ExecutorType.SUBPROCESS, sealed))
        agents.append([tokens.mint(request, AttemptId(request.task_instance_id)), uuid.uuid4().hex])
    for start in range(0, count, 500):
        store.submissions.record(tries[start : start + 500])
    return agents


def mebibytes(process: psutil.Process) -> str:
    return f"{process.memory_info().rss / 2**20:.0f} MiB"


def heartbeat_rate(address: str, agents: list[list[str]], seconds: float) -> float:
    jobs = [load("heartbeats", address, agents[number::_CLIENTS], seconds, 64) for number in range(_CLIENTS)]
    found = [result(job) for job in jobs]
    return float(sum(one["count"] / one["seconds"] for one in found))


def print_latencies(name: str, without: dict[str, list[float]], beside: dict[str, list[float]]) -> None:
    for method in without:
        p50 = [statistics.median(found[method]) * 1e3 for found in (without, beside)]
        p99 = [statistics.quantiles(found[method], n=100)[98] * 1e3 for found in (without, beside)]
        print(
            f"{method:<12} alone p50 {p50[0]:6.2f} ms p99 {p99[0]:6.2f} ms   {name} p50 {p50[1]:6.2f} ms "
            f"p99 {p99[1]:6.2f} ms   ratio p50 {p50[1] / p50[0]:.2f} p99 {p99[1] / p99[0]:.2f}"
        )


def bench_heartbeats(address: str, gateway: psutil.Process, agents: list[list[str]], seconds: float) -> None:
    with server(_FLOOR, {}) as (_, floor_address):
        floor = heartbeat_rate(floor_address, agents, seconds)
    before = gateway.cpu_times()
    rate = heartbeat_rate(address, agents, seconds)
    after = gateway.cpu_times()
    busy = (after.user + after.system - before.user - before.system) / seconds
    print(f"heartbeats   {rate:,.0f}/s (reach 3,000)   bare server {floor:,.0f}/s   ratio {rate / floor:.2f}")
    print(f"             {busy:.2f} cores busy, {rate / busy:,.0f} heartbeats per core second")
    print(f"memory       {mebibytes(gateway)} with {len(agents)} holders")


def bench_streams(
    address: str, gateway: psutil.Process, agents: list[list[str]], count: int, seconds: float, lines: float
) -> None:
    without = result(load("latencies", address, agents[count:], seconds, 40))
    job = load("streams", address, agents[:count], seconds + 6, lines)
    assert job.stdout is not None
    opened = time.perf_counter()
    assert job.stdout.readline().strip() == "open", "the streams did not open"
    print(f"streams      {count} open after {time.perf_counter() - opened:.1f} s, memory {mebibytes(gateway)}")
    beside = result(load("latencies", address, agents[count:], seconds, 40))
    found = result(job)
    print(f"             {found['acked']:,} lines, all on disk; about {count * lines:,.0f} lines/s while measuring")
    print_latencies("beside streams", without, beside)
    print(f"memory       {mebibytes(gateway)} after {found['acked']:,} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--streams", type=int, default=1_000)
    parser.add_argument("--lines", type=float, default=1, help="lines per second of each stream")
    parser.add_argument("--database", default="", help="default: a fresh SQLite file")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="leoflow-bench-"))
    url = options.database or f"sqlite:///{directory / 'bench.db'}"
    env = {
        "LEOFLOW_DATABASE_URL": url,
        "LEOFLOW_JWT_SECRET": _SECRET,
        "LEOFLOW_SEAL_KEYS": _SEAL_KEY,
        "LEOFLOW_LOGS_ROOT": str(directory / "logs"),
        "LEOFLOW_GATEWAY_LISTEN": "127.0.0.1:0",
    }
    store = Store(Settings(database=DatabaseSettings(url=SecretStr(url))))
    try:
        upgrade(store.database)
        agents = submit(store, options.agents + options.streams)
        with server(_GATEWAY, env) as (gateway, address):
            print(f"memory       {mebibytes(gateway)} idle")
            claims = result(load("register", address, agents, 32))
            print(f"claims       {claims['count'] / claims['seconds']:,.0f}/s (Register and RUNNING)")
            bench_heartbeats(address, gateway, agents[options.streams :], options.seconds)
            bench_streams(address, gateway, agents, options.streams, options.seconds, options.lines)
    finally:
        store.close()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
