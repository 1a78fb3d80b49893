"""Two tenants with two DAGs each, real agents' calls, and every back end: who is told what."""

from __future__ import annotations

import json
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from leoflow_celery.domain.states import TaskState
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.gateway.harness import Agent, World, refused
from tests.support.secret_backend import install
from tests.support.waiting import wait_until

TASKS = [(tenant, dag) for tenant in ("acme", "beta") for dag in ("sales", "stock")]
SECRETS = ({"name": "PASSWORD", "source": "env", "reference": "password"},)

#: What every back end below knows: (tenant, DAG or None for all) → kind → name → value.
KNOWN: dict[tuple[str, str | None], dict[str, dict[str, str]]] = {
    ("acme", None): {
        "variables": {"region": "acme", "table": "acme"},
        "connections": {"db": "postgres://acme"},
        "secrets": {"password": "acme-pw"},
    },
    ("acme", "sales"): {"variables": {"table": "acme-sales"}, "secrets": {"password": "acme-sales-pw"}},
    ("beta", None): {"variables": {"region": "beta"}, "secrets": {"other": "beta-pw"}},
    ("beta", "stock"): {"connections": {"db": "postgres://beta-stock"}, "secrets": {"password": "beta-stock-pw"}},
}


def expected(tenant: str, dag: str, kind: str) -> dict[str, str]:
    return KNOWN.get((tenant, None), {}).get(kind, {}) | KNOWN.get((tenant, dag), {}).get(kind, {})


def files(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    root = directory / "values"
    for (tenant, dag), kinds in KNOWN.items():
        for kind, values in kinds.items():
            place = root / "tenants" / tenant / (f"dags/{dag}" if dag else ".") / kind
            place.mkdir(parents=True)
            for name, value in values.items():
                (place / name).write_text(f"{value}\n")
    return {"secret_files": root}


def environment(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for (tenant, dag), kinds in KNOWN.items():
        for kind, values in kinds.items():
            marker = kind.removesuffix("s").upper()
            scope = f"DAG_{marker}__{tenant}__{dag}" if dag else f"{marker}__{tenant}"
            for name, value in values.items():
                monkeypatch.setenv(f"LEOFLOW_VALUE_{scope}__{name}", value)
    return {"secret_backends": ("environment",)}


_COMMAND = """
import json, sys
known = json.loads(sys.argv[1])
question = json.load(sys.stdin)
values = {}
for scope in (f"{question['tenant_id']}/", f"{question['tenant_id']}/{question['dag_id']}"):
    values.update(known.get(scope, {}).get(question["kind"] + "s", {}))
print(json.dumps({"values": values, "ttl_seconds": 30}))
"""


def program(directory: Path, body: str, name: str = "command") -> Path:
    path = directory / name
    path.write_text(f"#!{sys.executable} -S\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def command(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    known = json.dumps({f"{tenant}/{dag or ''}": kinds for (tenant, dag), kinds in KNOWN.items()})
    return {"secret_backends": ("command",), "secret_command": f"{program(directory, _COMMAND)} '{known}'"}


@pytest.mark.parametrize("backend", [files, environment, command])
def test_every_task_is_told_what_its_tenant_and_dag_may_see(
    make_world: Callable[..., World],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: Callable[..., dict[str, Any]],
) -> None:
    world = make_world(allow_insecure_secrets=True, **backend(tmp_path, monkeypatch))
    for tenant, dag in [*TASKS, ("default", "sales")]:
        request = world.submit(f"{tenant}-{dag}", tenant_id=tenant, dag_id=dag, secrets=SECRETS)
        agent = world.agent(request)
        agent.register()
        assert variables(agent) == expected(tenant, dag, "variables")
        assert connections(agent) == expected(tenant, dag, "connections")
        password = expected(tenant, dag, "secrets").get("password")
        if password is None:
            error = refused(agent.spec)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert f"unknown to tenant {tenant!r} and DAG {dag!r}" in error.details()
            assert (world.view(request).state, world.view(request).reason) == (TaskState.FAILED, "unknown_secret")
        else:
            assert dict(agent.spec().environment) == {"PASSWORD": password}


def test_a_package_in_front_of_files(
    make_world: Callable[..., World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site"))
    settings = files(tmp_path, monkeypatch) | {"secret_backends": ("vault", "files")}
    world = make_world(allow_insecure_secrets=True, **settings)
    for tenant, dag in TASKS:
        agent = world.agent(world.submit(f"{tenant}-{dag}", tenant_id=tenant, dag_id=dag, secrets=SECRETS))
        agent.register()
        own = {"who": f"{tenant}/{dag}/variable", "password": f"of {tenant}"}
        assert variables(agent) == expected(tenant, dag, "variables") | own
        assert dict(agent.spec().environment) == {"PASSWORD": f"of {tenant}"}
    broken = world.agent(world.submit("broken", tenant_id="acme", dag_id="broken", secrets=SECRETS))
    broken.register()
    for ask in (lambda: variables(broken), broken.spec):
        error = refused(ask)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "canary" not in error.details()


def test_a_flat_directory_stays_the_standard_tenants(make_world: Callable[..., World], tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "password").write_text("hunter2\n")
    flat = tmp_path / "flat"
    world = make_world(allow_insecure_secrets=True, variables_path=flat, connections_path=flat, secrets_path=flat)
    standard, other = (
        world.agent(world.submit(tenant, tenant_id=tenant, secrets=SECRETS)) for tenant in ("default", "acme")
    )
    standard.register()
    other.register()
    assert variables(standard) == connections(standard) == {"password": "hunter2"}
    assert dict(standard.spec().environment) == {"PASSWORD": "hunter2"}
    assert variables(other) == connections(other) == {}
    assert "unknown to tenant 'acme'" in refused(other.spec).details()


class TestACommandThatFails:
    @pytest.mark.parametrize(
        ("body", "says"),
        [
            ("print('canary')", "the command's output is not valid JSON"),
            ("import os\nwhile True: os.write(1, b'canary' * 10_000)", "printed more than 1048576 bytes"),
            ("import sys\nsys.exit('canary')", "ended with status 1"),
            ("import time\nwhile True: time.sleep(60)", "did not answer within 1 s"),
        ],
    )
    def test_the_agent_hears_to_come_again_and_the_try_lives(
        self, make_world: Callable[..., World], tmp_path: Path, body: str, says: str
    ) -> None:
        path = program(tmp_path, body)
        world = make_world(
            allow_insecure_secrets=True,
            secret_backends=("command",),
            secret_command=str(path),
            secret_command_timeout_seconds=1,
        )
        request = world.submit(secrets=SECRETS)
        agent = world.agent(request)
        agent.register()
        for ask in (lambda: variables(agent), agent.spec):
            error = refused(ask)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert says in error.details()
            assert "canary" not in error.details()
        assert not world.view(request).is_terminal
        program(tmp_path, 'print(\'{"values": {"password": "x"}}\')')

        def answered() -> bool:
            try:
                return dict(agent.spec().environment) == {"PASSWORD": "x"}
            except grpc.RpcError:
                return False

        wait_until(answered, 20)

    def test_a_tenant_that_asks_in_a_loop_holds_up_nobody(
        self, make_world: Callable[..., World], tmp_path: Path
    ) -> None:
        body = """
import json, sys, time
tenant = json.load(sys.stdin)["tenant_id"]
while tenant == "evil": time.sleep(60)
print(json.dumps({"values": {"who": tenant}}))"""
        world = make_world(
            allow_insecure_secrets=True,
            secret_backends=("command",),
            secret_command=str(program(tmp_path, body)),
            secret_command_timeout_seconds=30,
            secret_timeout_seconds=30,
            secret_threads=4,
        )
        good = world.agent(world.submit("good", tenant_id="good"))
        good.register()
        asked: list[Any] = []
        method: Any = None
        for number in range(10):
            evil = world.agent(world.submit(f"evil-{number}", tenant_id="evil", dag_id=f"dag-{number}"))
            evil.register()
            method = evil.channel.unary_unary(
                "/leoflow.agent.v1.AgentService/GetVariables",
                pb.GetVariablesRequest.SerializeToString,
                pb.GetVariablesResponse.FromString,
            )
            asked += [method.future(pb.GetVariablesRequest(), timeout=60, metadata=evil.metadata) for _ in range(20)]
        wait_until(lambda: running(tmp_path / "command") == 2, 20)
        began = time.monotonic()
        assert variables(good) == {"who": "good"}
        for _ in range(5):
            assert not good.heartbeat().should_terminate
        assert good.report(pb.TASK_STATE_SUCCESS).acknowledged
        assert time.monotonic() - began < 15
        assert running(tmp_path / "command") == 2
        for one in asked:
            one.cancel()
        assert world.gateway is not None
        stopping = threading.Thread(target=world.gateway.stop)
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
        wait_until(lambda: running(tmp_path / "command") == 0, 5)


def running(path: Path) -> int:
    """Processes that run this program."""
    count = 0
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                count += str(path).encode() in (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
    return count


def test_a_root_that_goes_away_fails_no_task(make_world: Callable[..., World], tmp_path: Path) -> None:
    root = tmp_path / "values"
    place = root / "tenants" / "acme" / "secrets"
    place.mkdir(parents=True)
    (place / "password").write_text("x")
    world = make_world(allow_insecure_secrets=True, secret_files=root)
    request = world.submit(tenant_id="acme", secrets=SECRETS)
    agent = world.agent(request)
    agent.register()
    root.rename(tmp_path / "away")
    assert refused(agent.spec).code() is grpc.StatusCode.UNAVAILABLE
    assert not world.view(request).is_terminal
    (tmp_path / "away").rename(root)
    assert dict(agent.spec().environment) == {"PASSWORD": "x"}


def variables(agent: Agent) -> dict[str, str]:
    return dict(agent.call("GetVariables", pb.GetVariablesRequest()).variables)


def connections(agent: Agent) -> dict[str, str]:
    return dict(agent.call("GetConnections", pb.GetConnectionsRequest()).connection_uris)
