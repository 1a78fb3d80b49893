"""The gateway as a process with real agents: signals, kill -9, restarts."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.states import TaskState
from tests.integration.gateway.harness import JWT_SECRET, SEAL_KEY, Agent, World, line, refused, settings_for
from tests.support.ports import free_port
from tests.support.process import ManagedProcess
from tests.support.waiting import PATIENCE, wait_until

_GATEWAY = (
    "import sys; from leoflow_celery.gateway import run; from leoflow_celery.settings import Settings;"
    "sys.exit(run(Settings.load()))"
)


class ProcessWorld(World):
    """A world whose gateway is a process. Its broker does not exist: nobody can be told of an end."""

    def __init__(
        self, database_url: str, directory: Path, environment: dict[str, str] | None = None, **gateway: str
    ) -> None:
        super().__init__(settings_for(database_url, directory))
        self.address = f"127.0.0.1:{free_port()}"
        self.directory = directory
        env = {
            "LEOFLOW_DATABASE_URL": database_url,
            "LEOFLOW_JWT_SECRET": JWT_SECRET,
            "LEOFLOW_SEAL_KEYS": SEAL_KEY,
            "LEOFLOW_LOGS_ROOT": str(self.settings.logs.root),
            "LEOFLOW_GATEWAY_LISTEN": self.address,
            "LEOFLOW_GATEWAY_HEARTBEAT_FLUSH_SECONDS": "0.2",
            "LEOFLOW_GATEWAY_SHUTDOWN_GRACE_SECONDS": "60",
            "LEOFLOW_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
            **{f"LEOFLOW_GATEWAY_{name.upper()}": value for name, value in gateway.items()},
            **(environment or {}),
        }
        command = [sys.executable, "-c", _GATEWAY]
        self.process = ManagedProcess(command, directory / "gateway.log", env, name="gateway")
        self.wait_until_up()

    def wait_until_up(self) -> None:
        self.process.wait_for_port(int(self.address.rpartition(":")[2]))

    def agent_with(self, token: str, session: str | None = "") -> Agent:
        agent = Agent(self.address, token, session)
        self._agents.append(agent)
        return agent

    def agent_process(self, request: TaskRequest, **more_env: str) -> ManagedProcess:
        env = {
            "LEOFLOW_CONTROL_PLANE_ADDR": self.address,
            "LEOFLOW_AGENT_TOKEN": self.tokens.mint(request, request.attempt),
            "LEOFLOW_TASK_INSTANCE_ID": request.task_instance_id,
            "LEOFLOW_AGENT_KILL_GRACE_SECONDS": "1",
            **more_env,
        }
        name = f"agent-{request.task_instance_id}"
        return ManagedProcess(
            [sys.executable, "-m", "leoflow_celery.agent"], self.directory / f"{name}.log", env, name=name
        )

    def close(self) -> None:
        super().close()
        self.process.stop()


@pytest.fixture
def world(migrated_database_url: str, tmp_path: Path) -> Iterator[ProcessWorld]:
    made = ProcessWorld(migrated_database_url, tmp_path)
    yield made
    made.close()


def test_sigterm_writes_what_is_in_memory_and_exits_0(world: ProcessWorld) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(*(line(number) for number in range(1, 101)))
    wait_until(lambda: logs.acked == 100)
    agent.heartbeat()
    beaten = time.time()
    assert world.process.terminate() == 0
    assert time.time() - beaten < 4 * PATIENCE, "open streams do not use up the grace"
    logs.join()
    assert logs.code is grpc.StatusCode.UNAVAILABLE
    assert (world.view(request).last_heartbeat_at or 0) > beaten - 1
    output = world.process.output()
    assert f"gateway listening on {world.address}" in output
    assert "Traceback" not in output


def test_kill_9_in_the_middle_neither_loses_nor_doubles_lines(world: ProcessWorld) -> None:
    request = world.submit()
    agent = world.agent(request)
    agent.run()
    logs = agent.logs()
    logs.send(*(line(number) for number in range(1, 3_001)))
    wait_until(lambda: logs.acked > 0, 10)
    world.process.kill()
    logs.join()
    world.process.restart()
    world.wait_until_up()
    again = agent.logs()
    again.send(*(line(number) for number in range(logs.acked + 1, 4_001)))
    again.end()
    again.join(30)
    assert again.acked == 4_000
    assert world.log(request) == [f"line {number}" for number in range(1, 4_001)]


def test_a_real_agent_runs_a_task(world: ProcessWorld) -> None:
    upstream = world.agent(world.submit("ti-a", task_id="extract"))
    upstream.run()
    upstream.push(b'"from upstream"')
    script = 'echo "got $LEOFLOW_XCOM_ROWS"; echo oops >&2; echo \'{"n": 1}\' > "$LEOFLOW_RETURN_VALUE_PATH"'
    request = world.submit("ti-b", task_id="load", entrypoint=script, xcom_input={"rows": "extract"})
    with world.agent_process(request) as agent:
        assert agent.wait() == 0
    view = world.view(request)
    assert (view.state, view.exit_code) == (TaskState.SUCCESS, 0)
    lines = world.log(request)
    assert 'got "from upstream"' in lines
    assert "oops" in lines
    value = world.store.xcom.get(world.tokens.verify(world.tokens.mint(request, request.attempt)).xcom_key())
    assert value is not None
    assert json.loads(value.value) == {"n": 1}
    assert "Traceback" not in world.process.output(), "a broker that is away fails no report"


def test_real_agents_wait_for_a_back_end_and_get_their_own_tenants_values(
    migrated_sqlite: Path, tmp_path: Path
) -> None:
    repaired, asked = tmp_path / "repaired", tmp_path / "asked"
    script = f"""
    question=$(cat); echo "$question" >> {asked}
    [ -e {repaired} ] || {{ echo "the store is sealed" >&2; exit 1; }}
    tenant=$(echo "$question" | sed 's/.*"tenant_id": "\\([a-z]*\\)".*/\\1/')
    echo "{{\\"values\\": {{\\"password\\": \\"canary-of-$tenant\\"}}}}"
    """
    command = tmp_path / "command"
    command.write_text(f"#!/bin/sh\n{script}")
    command.chmod(0o755)
    shutil.copyfile(migrated_sqlite, tmp_path / "leoflow.db")
    world = ProcessWorld(
        f"sqlite:///{tmp_path / 'leoflow.db'}",
        tmp_path,
        allow_insecure_secrets="true",
        secret_backends="command",
        secret_command=str(command),
    )
    agents = {}
    try:
        for tenant in ("acme", "beta"):
            check = f'[ "$AIRFLOW_VAR_PASSWORD $PASSWORD" = "canary-of-{tenant} canary-of-{tenant}" ]'
            secrets = ({"name": "PASSWORD", "source": "env", "reference": "password"},)
            request = world.submit(tenant, tenant_id=tenant, entrypoint=check, secrets=secrets)
            agents[tenant] = (request, world.agent_process(request))
        wait_until(lambda: asked.exists() and all(tenant in asked.read_text() for tenant in agents), 20)
        wait_until(lambda: world.process.output().count("secrets.command_failed") >= 4, 20)
        repaired.touch()
        for request, agent in agents.values():
            assert agent.wait() == 0, agent.output() + str(world.log(request))
            assert world.view(request).state is TaskState.SUCCESS
        assert "the store is sealed" in world.process.output()
        assert "canary" not in world.process.output()
        assert "Traceback" not in world.process.output()
    finally:
        for _, agent in agents.values():
            agent.stop()
        world.close()


def test_a_real_agent_survives_kill_9_of_the_gateway(world: ProcessWorld) -> None:
    marker = world.directory / "go-on"
    script = (
        f"for i in $(seq 400); do echo line $i; done; while [ ! -e {marker} ]; do sleep 0.05; done; echo end; exit 3"
    )
    request = world.submit(entrypoint=script)
    with world.agent_process(request) as agent:
        wait_until(lambda: any("line" in text for text in world.log(request)), 20)
        world.process.kill()
        marker.touch()
        world.process.restart()
        world.wait_until_up()
        assert agent.wait() == 1
    view = world.view(request)
    assert (view.state, view.reason, view.exit_code) == (TaskState.FAILED, "non_zero_exit", 3)
    lines = [text for text in world.log(request) if text.startswith(("line ", "end"))]
    assert lines == [*(f"line {number}" for number in range(1, 401)), "end"]
    assert "end" in view.log_tail


def test_a_cancel_stops_a_real_agent_within_seconds(world: ProcessWorld) -> None:
    request = world.submit(entrypoint="echo started; sleep 600")
    with world.agent_process(request) as agent:
        wait_until(lambda: "started" in world.log(request), 20)
        asked = time.monotonic()
        world.store.attempts.request_cancel(request.task_instance_id)
        wait_until(lambda: world.view(request).is_terminal, 10)
        assert time.monotonic() - asked < 10, "long before the next regular heartbeat"
        agent.wait()
    assert world.view(request).reason == "cancelled"


def test_two_real_agents_of_one_attempt_run_the_code_once(world: ProcessWorld) -> None:
    counted = world.directory / "runs"
    request = world.submit(entrypoint=f"echo run >> {counted}; sleep 1")
    with world.agent_process(request) as first, world.agent_process(request) as second:
        assert {first.wait(), second.wait()} == {0}
    assert counted.read_text() == "run\n"
    assert world.view(request).state is TaskState.SUCCESS


def test_a_database_without_tables_is_answered_and_not_fatal(tmp_path: Path) -> None:
    world = ProcessWorld(f"sqlite:///{tmp_path / 'empty.db'}", tmp_path)
    try:
        stranger = TaskRequest(
            task_instance_id="ti", dag_id="d", run_id="r", task_id="t", operator="bash", entrypoint="true"
        )
        error = refused(world.agent(stranger).register)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "leoflow db upgrade" in error.details()
        assert world.process.terminate() == 0
    finally:
        world.close()


def test_a_real_agent_renews_its_token_and_outlives_an_outage_longer_than_that(
    migrated_database_url: str, tmp_path: Path
) -> None:
    world = ProcessWorld(migrated_database_url, tmp_path, environment={"LEOFLOW_AGENT_TOKEN_RENEWED_TTL_SECONDS": "2"})
    marker = tmp_path / "go-on"
    request = world.submit(entrypoint=f"echo begun; while [ ! -e {marker} ]; do sleep 0.05; done; echo end")
    try:
        with world.agent_process(request, LEOFLOW_AGENT_HEARTBEAT_SECONDS="0.3") as agent:
            wait_until(lambda: "begun" in world.log(request), 20)
            assert str(world.view(request).holder).startswith("renewing:")
            began = time.monotonic()
            wait_until(lambda: time.monotonic() - began > 5, 10, "two lives of a token")
            world.process.kill()
            down = time.monotonic()
            wait_until(lambda: time.monotonic() - down > 3, 10, "its token expires")
            world.process.restart()
            world.wait_until_up()
            beaten = time.time()
            wait_until(lambda: (world.view(request).last_heartbeat_at or 0) > beaten, 20)
            marker.touch()
            assert agent.wait() == 0
            output = agent.output()
        assert world.view(request).state is TaskState.SUCCESS
        assert "end" in world.log(request)
        for text in (output, world.process.output()):
            assert "Traceback" not in text
        events = [event.event for event in world.store.events.of(request.task_instance_id)]
        assert events.count("claimed") == 1, "to register again is no new claim"
    finally:
        world.close()
