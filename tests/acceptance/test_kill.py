"""kill -9 of worker, gateway and Redis in turn, in the middle of a run of 50 tasks: right states, nothing run twice."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.waiting import PATIENCE, wait_until

CHAINS, LENGTH = 10, 5
HTTP_CHAINS = 3
#: Short enough for a test, and many heartbeats long: on a busy machine one may come late.
LEASE_SECONDS = 10
SETTINGS = {
    "LEOFLOW_AGENT_HEARTBEAT_SECONDS": "1",
    "LEOFLOW_GATEWAY_LEASE_SECONDS": str(LEASE_SECONDS),
    "LEOFLOW_MAINTENANCE_HEARTBEAT_TIMEOUT_SECONDS": str(LEASE_SECONDS),
    "LEOFLOW_MAINTENANCE_LOST_MESSAGE_SECONDS": "6",
    "LEOFLOW_MAINTENANCE_INTERVAL_SECONDS": "2",
    "LEOFLOW_BROKER_VISIBILITY_TIMEOUT_SECONDS": "12",
}
LEOFLOW = (sys.executable, "-m", "leoflow_celery.cli")
VICTIMS = {"worker": "workers.lite", "gateway": "leoflow_celery.cli gateway", "redis": "-server "}


class _Target(ThreadingHTTPServer):
    """Notes every call; while ``gate`` is closed, calls wait for it to open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Counting)
        self.calls: list[str] = []
        self.waiting = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def handle_error(self, *_: object) -> None:
        return  # a client that was killed


class _Counting(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    server: _Target

    def do_GET(self) -> None:
        self.server.calls.append(self.path.lstrip("/"))
        if not self.server.gate.is_set():
            self.server.waiting.release()
            self.server.gate.wait(60 * PATIENCE)
        body = json.dumps(self.path).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def target() -> Iterator[_Target]:
    server = _Target()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _task(chain: int, link: int, starts: Path, port: int) -> dict[str, Any]:
    name = f"t{chain}_{link}"
    task: dict[str, Any] = {"task_id": name, "depends_on": [f"t{chain}_{link - 1}"] if link else []}
    if chain < HTTP_CHAINS:
        return task | {"type": "http_api", "http_request": {"method": "GET", "url": f"http://127.0.0.1:{port}/{name}"}}
    return task | {"type": "bash", "entrypoint": f"echo {name} >> {starts}; sleep 0.5"}


def _write_dag(path: Path, starts: Path, port: int) -> Path:
    tasks = [_task(chain, link, starts, port) for chain in range(CHAINS) for link in range(LENGTH)]
    head = {"schema_version": "1.0", "dag_id": "kill", "dag_version": "1", "image": "none"}
    path.write_text(json.dumps({**head, "tasks": tasks}))
    return path


def _victims(state_dir: Path, pattern: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or ())
        if pattern in command and str(state_dir) in command + (process.info["cwd"] or ""):
            found.append(process)
    return found


def _kill_once(state_dir: Path, pattern: str) -> None:
    """kill -9, and wait until a successor is there."""
    before = {process.pid for process in _victims(state_dir, pattern)}
    assert before, f"no process {pattern!r}"
    for pid in before:
        psutil.Process(pid).send_signal(signal.SIGKILL)
    wait_until(
        lambda: {process.pid for process in _victims(state_dir, pattern)} - before, 30, f"{pattern} is started again"
    )


def _ended(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10) as connection:
        return int(connection.execute("SELECT count(*) FROM task_instance WHERE state = 'success'").fetchone()[0])


def _rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.timeout(300)
def test_fifty_tasks_survive_kill_9_of_worker_gateway_and_redis(
    tmp_path: Path, target: _Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    starts, state_dir = tmp_path / "starts", tmp_path / "s"
    dag = _write_dag(tmp_path / "dag.json", starts, target.server_port)
    command = [*LEOFLOW, "lite", "run", str(dag), "--run-id", "r"]
    with (tmp_path / "out").open("wb") as out:
        run = subprocess.Popen([*command, "--state-dir", str(state_dir)], stdout=out, stderr=subprocess.STDOUT)
    try:
        database = state_dir / "leoflow.db"
        wait_until(database.exists, 30, "the system starts")
        for victim, after in zip(VICTIMS, (6, 16, 26), strict=True):
            wait_until(_at_least(database, after), 120, f"{after} tasks have ended")
            if victim == "worker":
                target.gate.clear()
                assert target.waiting.acquire(timeout=30 * PATIENCE), "an inline call is under way"
            assert run.poll() is None, "the run must be in the middle"
            _kill_once(state_dir, VICTIMS[victim])
            target.gate.set()
        assert run.wait(timeout=200 * PATIENCE) == 0, (tmp_path / "out").read_text()
    finally:
        run.terminate()
        run.wait(60 * PATIENCE)
    _check(database, starts, target.calls)
    _check_completions(database, [*LEOFLOW, "lite", "up", "--state-dir", str(state_dir)])


def _at_least(database: Path, count: int) -> Callable[[], bool]:
    def reached() -> bool:
        try:
            return _ended(database) >= count
        except sqlite3.OperationalError:
            return False

    return reached


def _check(database: Path, starts: Path, calls: list[str]) -> None:
    states = _rows(database, "SELECT task_id, try_number, state FROM task_instance")
    assert len(states) == CHAINS * LENGTH
    assert {(number, state) for _, number, state in states} == {(1, "success")}
    # Agents outlive their worker, so every command ran exactly once.
    ran = Counter(starts.read_text().split())
    assert ran == Counter({f"t{chain}_{link}": 1 for chain in range(HTTP_CHAINS, CHAINS) for link in range(LENGTH)})
    # An inline call dies with its worker: only what was claimed again, by another holder, was called again.
    claims = Counter(
        task_id
        for (task_id,) in _rows(
            database,
            "SELECT t.task_id FROM task_event e JOIN task_instance t USING (task_instance_id) "
            "WHERE e.event = 'claimed'",
        )
    )
    called = Counter(calls)
    assert set(called) == {f"t{chain}_{link}" for chain in range(HTTP_CHAINS) for link in range(LENGTH)}
    assert all(count <= claims[name] for name, count in called.items()), (called, claims)
    finished = _rows(database, "SELECT task_instance_id FROM task_event WHERE event = 'finished'")
    assert len(finished) == len(set(finished)) == CHAINS * LENGTH
    assert max(claims.values()) == 2, "the call under way when the worker died was claimed again"


def _check_completions(database: Path, up: list[str]) -> None:
    """The run may end before the last results are handed out; the next start of the system hands them out."""
    query = "SELECT celery_task_id FROM task_completion WHERE done_at IS NULL"
    system = subprocess.Popen(up, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: not _rows(database, query), 60, "every waiting Celery id is completed")
    finally:
        system.terminate()
        system.wait(60 * PATIENCE)
