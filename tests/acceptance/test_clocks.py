"""A fleet whose clocks differ by minutes: right states, one run each, true durations."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.cli.doctor import check_clocks
from leoflow_celery.domain.states import TaskState
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.requirements import require
from tests.support.system import System, http_task, wait_for_worker
from tests.support.waiting import wait_until

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
#: Seconds that each process's clock is ahead.
OFFSETS = {
    "gateway": 60,
    "workers.control": 20,
    "workers.subprocess": -120,
    "workers.inline": -120,
    "beat": 0,
    "publisher": 60,
}
LEASE_SECONDS = 6
RUN_SECONDS = 3
SUBMIT = """
import json, sys
from leoflow_celery.client import Client
with Client() as client:
    for request in json.load(open(sys.argv[1])):
        client.submit(request)
print("submitted", flush=True)
"""


def with_clock(name: str) -> dict[str, str]:
    """The environment of a process whose wall clock is off, and whose monotonic clock is not."""
    if not OFFSETS[name]:
        return {}
    return {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME": f"{OFFSETS[name]:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


@pytest.fixture
def fleet(tmp_path: Path, redis_server: RedisServer, postgres_url: str) -> Iterator[System]:
    if not LIBRARIES:
        require("faketime", "no libfaketime below /usr/lib (Debian's package faketime)")
    overrides = {
        "GATEWAY_LEASE_SECONDS": LEASE_SECONDS,
        "MAINTENANCE_HEARTBEAT_TIMEOUT_SECONDS": LEASE_SECONDS,
        "MAINTENANCE_LOST_MESSAGE_SECONDS": 10,
        "MAINTENANCE_INTERVAL_SECONDS": 1,
    }
    with System(tmp_path, redis_server.url(), postgres_url, **overrides) as system:
        schedule = ("beat", "-l", "INFO", "-s", str(tmp_path / "schedule"), "--pidfile=")
        celery = (sys.executable, "-m", "celery")
        gateway = system.start(
            "gateway", sys.executable, "-m", "leoflow_celery.cli", "gateway", env=with_clock("gateway")
        )
        workers = [
            system.start(name, *celery, "-A", name, "worker", "-l", "INFO", "-n", f"{name}@%h", env=with_clock(name))
            for name in ("workers.control", "workers.subprocess", "workers.inline")
        ]
        gateway.wait_for_line("gateway listening on", 60)
        for worker in workers:
            wait_for_worker(worker)
        system.start("beat", *celery, "-A", "beat_schedule", *schedule, env=with_clock("beat"))
        yield system


def test_every_task_runs_once_and_ends_right_whatever_the_clocks_say(fleet: System, tmp_path: Path) -> None:
    client = fleet.client
    with HttpTarget() as target:
        bash = [
            {
                "task_instance_id": f"bash-{number}",
                "dag_id": "d",
                "run_id": "r",
                "task_id": f"bash-{number}",
                "operator": "bash",
                "entrypoint": f"echo {number} >> {tmp_path}/ran; sleep {RUN_SECONDS}",
            }
            for number in range(3)
        ]
        requests = [*bash, http_task(target.url("short"), "short"), http_task(target.hold("long"), "long")]
        (tmp_path / "requests.json").write_text(json.dumps(requests))
        fleet.start(
            "publisher", sys.executable, "-c", SUBMIT, tmp_path / "requests.json", env=with_clock("publisher")
        ).wait_for_line("submitted", 60)
        get = client.services.store.attempts.get
        wait_until(lambda: target.calls["long"] and get("long").state is TaskState.RUNNING, 60, "the long call")
        begun = get("long").started_at
        assert begun is not None
        # Two leases long, of the database's clock: its holder renews and nobody takes it.
        wait_until(
            lambda: (get("long").last_heartbeat_at or 0.0) > begun + 2 * LEASE_SECONDS, 60, "heartbeats of two leases"
        )
        target.release("long")
        ids = [request["task_instance_id"] for request in requests]
        wait_until(lambda: all(get(name).is_terminal for name in ids), 90, lambda: str([get(name) for name in ids]))
        assert {name: (get(name).state, get(name).launch) for name in ids} == dict.fromkeys(ids, (TaskState.SUCCESS, 1))
        assert dict(target.calls) == {"short": 1, "long": 1}
    assert sorted((tmp_path / "ran").read_text().split()) == ["0", "1", "2"]
    for name in ids[:3]:
        view = get(name)
        assert view.started_at is not None
        assert view.ended_at is not None
        assert RUN_SECONDS - 0.5 < view.ended_at - view.started_at < RUN_SECONDS + 30
        assert abs(view.queued_at - time.time()) < 120
    assert fleet.process("beat").returncode is None
    assert "maintenance.reap" in fleet.process("workers.control").output()
    assert "message.expired" not in fleet.output()
    assert "Discarding revoked task" not in fleet.output()


def test_doctor_tells_whose_clock_is_wrong(fleet: System) -> None:
    def said() -> str:
        return check_clocks(fleet.settings).sentence

    wait_until(lambda: said().count("against the broker") >= 4, 60, said)
    found = dict(re.findall(r"(gateway|worker:\S+?)@\S+ against the broker ([+-][\d.]+) s", said()))
    rounded = {name: round(float(seconds) / 10) * 10 for name, seconds in found.items()}
    assert rounded["gateway"] == 60
    assert rounded["worker:inline"] == rounded["worker:subprocess"] == -120
    assert sorted(rounded.values()) == [-120, -120, 20, 60]
    assert "beat@" not in said()  # its clock is right
