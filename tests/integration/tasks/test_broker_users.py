"""Every kind of process under the Redis user that docs/operations.md gives it, and what a right too few looks like."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from leoflow_celery.cli.doctor import check_broker
from leoflow_celery.domain.states import TaskState
from tests.support.flower import FlowerSite
from tests.support.http_target import HttpTarget
from tests.support.ports import free_port
from tests.support.redis_server import SERVERS, RedisServer
from tests.support.system import ROOT, System, http_task
from tests.support.waiting import wait_until

PASSWORD = secrets.token_hex(12)


def documented_rules() -> dict[str, list[str]]:
    """User → rules, as an operator copies them."""
    text = (ROOT / "docs/operations.md").read_text()
    lines = re.findall(r"^ACL SETUSER (\S+) (.*)$", text, re.MULTILINE)
    return {user: rules.replace("PASSWORD", PASSWORD).split() for user, rules in lines}


class Users:
    """A server that knows nobody but the documented users and its administrator."""

    def __init__(self, server: RedisServer) -> None:
        self._port = server.port
        self.admin = redis.Redis(port=server.port, username="admin", password=PASSWORD)
        with redis.Redis(port=server.port) as anybody:
            anybody.execute_command("ACL", "SETUSER", "admin", "on", f">{PASSWORD}", "~*", "&*", "+@all")
            for user, rules in documented_rules().items():
                anybody.execute_command("ACL", "SETUSER", user, *rules)
        self.change("default", "off")

    def change(self, user: str, *rules: str) -> None:
        self.admin.execute_command("ACL", "SETUSER", user, *rules)

    def url(self, user: str) -> str:
        return f"redis://leoflow-{user}:{PASSWORD}@127.0.0.1:{self._port}/0"

    def env(self, user: str) -> dict[str, str]:
        return {"LEOFLOW_BROKER_URL": self.url(user)}

    def denied(self) -> list[str]:
        """What was refused, by user and object; not how redis-py calls itself, which Redis 6.2 does not keep."""
        found = [one for one in self.admin.acl_log() if (one["reason"], one["object"]) != ("command", "client")]
        return sorted({f"{one['username']}: {one['reason']} {one['object']}" for one in found})


@pytest.fixture
def redis_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, kind=getattr(request, "param", ""))
    server.start()
    yield server
    with redis.Redis(port=server.port, username="admin", password=PASSWORD) as admin:
        admin.execute_command("ACL", "SETUSER", "default", "reset", "on", "nopass", "~*", "&*", "+@all")
    server.stop()


@pytest.fixture
def users(redis_server: RedisServer) -> Iterator[Users]:
    found = Users(redis_server)
    yield found
    found.admin.close()


@pytest.fixture
def system(tmp_path: Path, users: Users) -> Iterator[System]:
    with System(tmp_path, users.url("control"), MAINTENANCE_INTERVAL_SECONDS=1, XCOM_BACKEND="redis") as system:
        yield system


@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)
def test_every_process_works_under_its_own_user(users: Users, system: System, target: HttpTarget) -> None:
    system.start_gateway()
    system.start_worker("workers.subprocess", env=users.env("subprocess"))
    for module in ("workers.control", "workers.inline"):
        system.start_worker(module)
    system.start_beat(env=users.env("beat"))
    site = FlowerSite(f"http://127.0.0.1:{free_port()}", "ops", secrets.token_hex(12))
    flower = (sys.executable, "-m", "celery", "-A", "leoflow_celery.app", "flower", "--address=127.0.0.1")
    env = {**users.env("flower"), "FLOWER_BASIC_AUTH": f"{site.user}:{site.password}"}
    system.start("flower", *flower, f"--port={site.url.rpartition(':')[2]}", env=env)
    site.wait_until_up()
    wait_until(lambda: len(site.workers()) >= 3, 60, "Flower to know the workers", 0.5)

    code = {"operator": "python", "entrypoint": "dag:rows", "source": "def rows():\n    return [1, 2]\n"}
    rows = system.client.submit({**http_task("http://unused/"), "http_request": None, **code})
    call = system.client.submit(http_task(target.url("call")))
    assert rows.get(timeout=60) == [1, 2]
    call.get(timeout=60)
    site.wait_for_state(rows.id, "SUCCESS")

    publisher = Celery("publisher", broker=users.url("publisher"), backend=users.url("publisher"), set_as_current=False)
    options = {"global_keyprefix": "leoflow:"}
    publisher.conf.update(broker_transport_options=options, result_backend_transport_options=options)
    try:
        publisher.send_task("leoflow.dispatch", [http_task(target.url("sent"))], queue="dispatch").get(timeout=60)
    finally:
        publisher.close()
    system.process("workers.control").wait_for_line("leoflow.maintenance.reap.* succeeded", 60)
    launching = f"subprocess:{system.client.services.keys.keys('subprocess')[0]}"
    for user, seal_keys in (("subprocess", launching), ("control", system.settings.security.seal_keys)):
        found = check_broker(system.load_settings(BROKER_URL=users.url(user), SEAL_KEYS=seal_keys))
        assert found.ok, found.sentence
    assert [path for path, _ in site.everything()]
    # A worker that is killed leaves messages that another one puts back; that needs the same rights.
    system.process("workers.subprocess").kill()
    system.start_worker("workers.subprocess", name="again", env=users.env("subprocess"))
    assert users.denied() == []
    assert "Traceback" not in system.output()


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (("-rpop",), r"RPOP on 'leoflow:inline'"),
        (("-client|tracking",), r"CLIENT on 'TRACKING'"),
        (("-psubscribe",), r"PSUBSCRIBE on 'leoflow:/0\.celery\.pidbox'"),
        (("resetchannels", "&leoflow:*"), r"PSUBSCRIBE on 'leoflow:/0\.celery\.pidbox'"),
        (("-setex",), r"SETEX on 'leoflow:celery-task-meta-"),
        (("resetkeys", "~other:*"), r"RPOP on 'leoflow:inline' .* and \d+ more"),
        (("-time",), r"TIME as user"),
    ],
)
def test_a_right_too_few_ends_the_start_with_one_sentence(
    users: Users, system: System, rules: tuple[str, ...], said: str
) -> None:
    users.change("leoflow-control", *rules)
    command = (sys.executable, "-m", "celery", "-A", "workers.inline", "worker", "-l", "INFO")
    worker = system.start("inline", *command)
    wait_until(lambda: worker.returncode, 60, worker.output)
    assert re.search(f"the worker does not start: .* does not permit {said}.*docs/operations.md", worker.output())
    assert "Traceback" not in worker.output()
    assert PASSWORD not in worker.output()
    found = check_broker(system.settings)
    assert not found.ok
    assert "docs/operations.md" in found.sentence


def test_a_right_that_is_taken_away_is_waited_for(users: Users, system: System, target: HttpTarget) -> None:
    worker = system.start_worker("workers.inline")
    system.start_worker("workers.control")
    users.change("leoflow-control", "-rpop", "-evalsha", "-eval", "-publish", "-hset")
    worker.wait_for_line("(?i)no ?perm", 60)
    users.change("leoflow-control", "+rpop", "+evalsha", "+eval", "+publish", "+hset")
    handle = system.client.submit(http_task(target.url("call")))
    handle.get(timeout=120)
    assert handle.state() is TaskState.SUCCESS
    assert worker.returncode is None


def test_a_password_is_changed_while_workers_work(users: Users, system: System, target: HttpTarget) -> None:
    """A user has both for as long as it takes; a process that still has the old one after that waits."""
    worker = system.start_worker("workers.inline")
    fresh = secrets.token_hex(12)
    users.change("leoflow-control", f">{fresh}")
    users.change("leoflow-control", f"<{PASSWORD}")
    users.admin.execute_command("CLIENT", "KILL", "USER", "leoflow-control")
    worker.wait_for_line("(?i)(invalid username-password|wrongpass)", 60)
    url = users.url("control").replace(PASSWORD, fresh)
    system.start_worker("workers.inline", name="fresh", env={"LEOFLOW_BROKER_URL": url})
    assert worker.returncode is None
    users.change("leoflow-control", f">{PASSWORD}")
    system.client.submit(http_task(target.url("call"))).get(timeout=120)
    wait_until(lambda: len(system.client.app.control.ping(timeout=1)) == 2, 120, "both workers to hear")
    assert PASSWORD not in worker.output()


#: What a launch worker of docker that was taken over tries, and whether only newer servers can refuse it.
ATTACKS: list[tuple[tuple[Any, ...], bool]] = [
    (("RPOP", "leoflow:k8s"), False),
    (("LPUSH", "leoflow:subprocess", "x"), False),
    (("LPUSH", "leoflow:maintenance", "x"), False),
    (("LRANGE", "leoflow:dispatch", 0, -1), False),
    (("LPUSH", "leoflow:inline\x06\x163", "x"), False),
    (("HGETALL", "leoflow:unacked"), False),
    (("DEL", "leoflow:unacked.k8s"), False),
    (("EVAL", "return redis.call('HGETALL', KEYS[1])", 1, "leoflow:unacked.subprocess"), False),
    (("SET", "leoflow:celery-task-meta-of-another", "{}"), False),
    (("GET", "leoflow:celery-task-meta-of-another"), False),
    (("PUBLISH", "leoflow:celery-task-meta-of-another", "{}"), False),
    (("GET", "leoflow:xcom:default:d:r:t:return_value"), False),
    (("SET", "leoflow:mark", "1"), False),
    (("DEL", "leoflow:lock:reconcile.kubernetes"), False),
    (("SADD", "leoflow:_kombu.binding.dispatch", "x"), False),
    (("RENAME", "leoflow:docker", "leoflow:k8s"), False),
    (("SCAN", 0), False),
    (("KEYS", "*"), False),
    (("RANDOMKEY",), False),
    (("FLUSHALL",), False),
    (("ACL", "LIST"), False),
    (("RPOP", "leoflow:results"), True),
    (("HGETALL", "leoflow:launched"), True),
    (("LRANGE", "leoflow:results", 0, -1), True),
]


@pytest.mark.parametrize("redis_server", SERVERS, indirect=True)
def test_a_launch_worker_that_was_taken_over_touches_nothing_of_another_queue(
    users: Users, redis_server: RedisServer
) -> None:
    told = users.admin.execute_command("HELLO")
    told = told if isinstance(told, dict) else dict(zip(told[::2], told[1::2], strict=True))
    is_newer = told[b"version"] >= b"7"
    if is_newer:
        rules = documented_rules()["leoflow-docker"]
        written = ("~leoflow:results*", "~leoflow:launched*")
        users.change("leoflow-docker", *(f"%W{rule}" if rule in written else rule for rule in rules))
    with redis.Redis.from_url(users.url("docker")) as worker:
        for command, needs_newer in ATTACKS:
            if needs_newer and not is_newer:
                continue
            with pytest.raises(redis.exceptions.NoPermissionError):
                worker.execute_command(*command)
        worker.lpush("leoflow:results", "x")
        worker.hset("leoflow:launched", "x", "x")


@pytest.mark.parametrize("redis_server", ["valkey"], indirect=True)
def test_a_launch_worker_works_with_what_newer_servers_take_away(users: Users, system: System) -> None:
    rules = documented_rules()["leoflow-subprocess"]
    written = ("~leoflow:results*", "~leoflow:launched*")
    users.change("leoflow-subprocess", *(f"%W{rule}" if rule in written else rule for rule in rules))
    system.start_gateway()
    system.start_worker("workers.subprocess", env=users.env("subprocess"))
    system.start_worker("workers.control")
    code = {"operator": "bash", "entrypoint": "echo 7"}
    handle = system.client.submit({**http_task("http://unused/"), "http_request": None, **code})
    handle.get(timeout=60)
    broken = {**code, "operator": "bash", "entrypoint": "kill -9 $PPID"}
    lost = system.client.submit({**http_task("http://unused/"), "http_request": None, **broken})
    wait_until(lambda: lost.task_instance().is_terminal or lost.task_instance().launch > 1, 60, "the end to be told")
    assert users.denied() == []
