"""Random kill -9 of agents, fork server and worker under tasks that hide: never two launches of one task at once."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from leoflow_celery.domain.states import TaskState
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import PATIENCE, wait_until

#: More of them take longer (LEOFLOW_TEST_CHAOS_TASKS=300 takes --timeout=3600).
TASKS = int(os.environ.get("LEOFLOW_TEST_CHAOS_TASKS", "20"))
LEASE_SECONDS = 8
SETTINGS = {
    "AGENT_REPORT_DEADLINE_SECONDS": 30,
    "AGENT_KILL_GRACE_SECONDS": 1,
    "GATEWAY_LEASE_SECONDS": LEASE_SECONDS,
    "MAINTENANCE_HEARTBEAT_TIMEOUT_SECONDS": LEASE_SECONDS,
    "MAINTENANCE_LOST_MESSAGE_SECONDS": 6,
    "MAINTENANCE_INTERVAL_SECONDS": 2,
    "MAINTENANCE_MAX_RELAUNCHES": 100,
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
    "BROKER_VISIBILITY_TIMEOUT_SECONDS": 15,
}
#: Every process of a launch has the file open and so holds its lock, whatever else it gives up.
LAUNCH = """
exec 9>>{directory}/{name}.lock
flock --nonblock 9 || echo {name} >>{directory}/overlaps
echo {name} >>{directory}/starts
{work}
"""
_SLEEP = "time.sleep({seconds})"
_PYTHON = 'python3 -c "import ctypes, os, time; {hide}; time.sleep({seconds})"'
WORK = [
    "sleep {seconds}",
    _PYTHON.replace("{hide}", "ctypes.CDLL(None).prctl(4, 0)"),
    _PYTHON.replace("{hide}", "ctypes.CDLL(None).prctl(15, b'other')"),
    "env -i setsid bash -c 'sleep 600' >/dev/null 2>&1 & sleep {seconds}",
    # A title over the whole of what /proc/<pid>/environ shows.
    "exec -a other env -i setsid -w sleep {seconds}",
]


def script(directory: Path, number: int, dice: random.Random) -> str:
    work = WORK[number % len(WORK)].format(seconds=round(dice.uniform(2, 8), 2))
    return LAUNCH.format(directory=directory, name=f"t{number}", work=work)


def test_no_task_runs_beside_itself(tmp_path: Path, redis_server: RedisServer) -> None:
    dice, directory = random.Random(), tmp_path / "locks"
    directory.mkdir()
    with System(tmp_path, redis_server.url(), **SETTINGS) as system:
        system.start_gateway()
        system.start_workers("workers.control", "workers.subprocess")
        system.start_beat()
        requests = [
            {
                "task_instance_id": f"chaos-{number}",
                "dag_id": "chaos",
                "run_id": "r",
                "task_id": f"t{number}",
                "operator": "bash",
                "entrypoint": script(directory, number, dice),
            }
            for number in range(TASKS)
        ]
        handles = system.client.submit_many(requests)
        killed: Counter[str] = Counter()
        wait_until(lambda: len(starts(directory)) >= 4, 60, "the first launches")
        for blow in blows(dice):
            if not unended(handles):
                break
            strike(blow, system, tmp_path, dice, killed)
            time.sleep(dice.uniform(0.2, 1.5))  # at any moment of a launch
        wait_until(
            lambda: not unended(handles), 240 + 4 * TASKS / PATIENCE, lambda: f"the end of {unended(handles)[:5]}"
        )
        failed = [one for handle in handles if (one := handle.task_instance()).state is not TaskState.SUCCESS]
        assert not (directory / "overlaps").exists(), (directory / "overlaps").read_text()
        assert [(one.attempt, one.reason, one.message) for one in failed] == []
        assert {"agent", "forkserver", "worker"} <= killed.keys()
        assert len(starts(directory)) > TASKS  # what was killed was launched again
        wait_until(lambda: holders(directory) == [], message=lambda: f"left running: {holders(directory)}")


def starts(directory: Path) -> list[str]:
    file = directory / "starts"
    return file.read_text().split() if file.exists() else []


def unended(handles: list) -> list[str]:
    return [str(handle) for handle in handles if handle.state() not in (TaskState.SUCCESS, TaskState.FAILED)]


def blows(dice: random.Random) -> Iterator[str]:
    """What is hit next: each of them again and again, agents most often."""
    for _ in range(2 + TASKS // 16):
        block = [*["agent"] * 6, "forkserver", "worker", "all"]
        dice.shuffle(block)
        yield from block


def strike(what: str, system: System, tmp_path: Path, dice: random.Random, killed: Counter[str]) -> None:
    """kill -9 of something; the worker is started again, as a supervisor would."""
    worker = system.process("workers.subprocess")
    forkservers = [one for one in psutil.process_iter(["cmdline"]) if _is_forkserver(one, tmp_path)]
    agents = [child for one in forkservers for child in _children(one)]
    dice.shuffle(agents)
    victims = {"agent": agents[:1], "forkserver": forkservers, "worker": [], "all": [*forkservers, *agents]}[what]
    if what in ("worker", "all"):
        worker.kill()
        worker.wait(30)
        killed["worker"] += 1
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
        killed["agent" if victim in agents else "forkserver"] += 1
    if what in ("worker", "all"):
        system.restart("workers.subprocess")


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def _is_forkserver(process: psutil.Process, tmp_path: Path) -> bool:
    """One of this test's."""
    try:
        if "leoflow_celery.agent.forkserver" not in (process.info["cmdline"] or ()):
            return False
        # Agents are forked from it and look the same; each writes into a log of its own.
        return os.readlink(f"/proc/{process.pid}/fd/1") == str(tmp_path / "attempts" / "forkserver.log")
    except (psutil.Error, OSError):
        return False


def holders(directory: Path) -> list[int]:
    """Processes that hold the lock of a task."""
    inodes = {file.stat().st_ino for file in directory.glob("*.lock")}
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return [int(line[4]) for line in lines if line[1] == "FLOCK" and int(line[5].rpartition(":")[2]) in inodes]
