"""One tenant sends the worst that he can; another one's heartbeats and values are answered within a second.

``LEOFLOW_TEST_HOSTILE_SECONDS`` is how long, 12 unless given.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.gateway.test_process import ProcessWorld
from tests.support.postgres_databases import migrate

_SECONDS = float(os.environ.get("LEOFLOW_TEST_HOSTILE_SECONDS", "12"))
_P99_SECONDS = 1.0
#: Passes the door: only a value that is nested deeply makes it branch at every level.
_SCHEMA = {"anyOf": [{"type": "array", "items": {"$ref": "#"}}] * 3 + [{"const": "only this"}]}

#: In a process of its own: what it does to itself must not slow the one that measures.
_HOSTILE = """
import itertools, sys, threading, time
import grpc
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.gateway.harness import Agent, line

kind, address, session, token = sys.argv[1:5]
agent = Agent(address, token, session)
until = time.monotonic() + float(sys.argv[5])

done, refused = [], []

def again(work):
    while time.monotonic() < until:
        try:
            work()
            done.append(1)
        except grpc.RpcError:
            refused.append(1)

values = (
    *(b"[" * 60 + b"1" + b"]" * 60, b"[" + b"{}," * 80_000 + b"0]"),
    *(b"[" * 200_000, b"1" * 250_000, b"x" * (7 << 20)),
)

turn = itertools.cycle(values)

def push():
    agent.push(next(turn))

def logs():
    stream = agent.logs()
    stream.send(*(line(0, chr(1) * (7 << 20)) for _ in range(5)), *(line(0, chr(27)) for _ in range(2_000)))
    stream.end()
    stream.join(60)

def headers():
    agent.call("Heartbeat", pb.HeartbeatRequest(), ("x-much", "x" * 7_000))

def calls():
    from leoflow_celery.protocol.service import METHODS, serialize
    stub = agent.channel.unary_unary(METHODS["Heartbeat"].path, serialize, None)
    flying = [stub.future(pb.HeartbeatRequest(), metadata=agent.metadata, timeout=30) for _ in range(2_000)]
    for one in flying:
        one.exception()

work = {"push": push, "logs": logs, "headers": headers, "calls": calls}[kind]
threads = [threading.Thread(target=again, args=(work,)) for _ in range(4 if kind != "calls" else 1)]
for one in threads:
    one.start()
for one in threads:
    one.join()
print(kind, len(done), len(refused))
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ProcessWorld]:
    url = f"sqlite:///{tmp_path / 'leoflow.db'}"
    migrate(url)
    made = ProcessWorld(url, tmp_path, {"LEOFLOW_LOGS_MAX_TRY_BYTES": "20000000"})
    yield made
    made.close()


def test_the_p99_of_another_tenants_calls_stays_below_a_second(world: ProcessWorld) -> None:
    mine = world.submit("mine", tenant_id="other", xcom_schema={"type": "integer"})
    agent = world.agent(mine)
    agent.run()
    hostile, deadline = [], time.monotonic() + 3 * _SECONDS + 60
    for kind in ("push", "logs", "headers", "calls"):
        request = world.submit(f"hostile-{kind}", tenant_id="hostile", task_id=kind, xcom_schema=_SCHEMA)
        theirs = world.agent(request)
        theirs.run()
        assert theirs.session is not None
        token = world.tokens.mint(request, request.attempt)
        command = [sys.executable, "-c", _HOSTILE, kind, world.address, theirs.session, token, str(_SECONDS)]
        hostile.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    try:
        beats: list[float] = []
        pushes: list[float] = []
        while any(one.poll() is None for one in hostile) and time.monotonic() < deadline:
            started = time.monotonic()
            agent.heartbeat()
            beats.append(time.monotonic() - started)
            started = time.monotonic()
            assert agent.push(b"1").accepted
            pushes.append(time.monotonic() - started)
        took = sorted(beats + pushes)
        assert len(took) > 20 * _SECONDS / 12
        p99 = took[int(len(took) * 0.99) - 1]
        assert p99 < _P99_SECONDS, f"p99 of {len(took)} calls: {p99:.2f} s"
        # A heartbeat needs the event loop only. Two may meet a machine that does something else; one that stands for a
        # second because of what the hostile tenant sends does so again and again.
        assert sorted(beats)[-3] < _P99_SECONDS, f"the slowest of {len(beats)} heartbeats: {sorted(beats)[-5:]}"
    finally:
        sent = [one.communicate(timeout=120)[0].split() for one in hostile]
    assert all(int(done) + int(refused) > 0 for _, done, refused in sent), sent
    full = world.store.logs.path(world.log_key(world.submit("hostile-logs", tenant_id="hostile", task_id="logs")))
    assert 100_000 < full.stat().st_size < 20_001_000
    slowest = f"worst heartbeat {max(beats):.3f} s, push {max(pushes):.3f} s"
    print(f"p99 {p99:.3f} s, {slowest} of {len(took)} calls beside {sent}")  # noqa: T201 - for whoever runs the minute
