"""No secret of a request is readable in Redis, in Celery events, in SQL, in files or in any process's output.

Canary values travel in every field that may hold a secret, through inline and subprocess tasks, good and bad; then
everything that anybody could read is searched for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from leoflow_celery.client import Handle
from leoflow_celery.errors import InvalidRequest, TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.monitor import Monitor
from tests.support.redis_server import RedisServer
from tests.support.redis_spy import RedisSpy, dump
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

PLACES = ("env", "header", "body", "query", "user", "call_args", "source", "agent_token")
CANARY = {place: f"c4n4ry-{place}-7d1f" for place in PLACES}
#: Two dots and a header that says JSON: any signed token.
TOKEN = re.compile(r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}")


def leaks(text: str) -> list[str]:
    """The canaries, and the beginnings of tokens, in a text."""
    found = [canary for canary in CANARY.values() if canary in text]
    return found + [token[:12] + "…" for token in TOKEN.findall(text)]


def secret_call(target: HttpTarget, name: str, status: int = 200, **fields: Any) -> dict[str, Any]:
    url = target.url(name, status).replace("http://", f"http://{CANARY['user']}:pw@") + f"?key={CANARY['query']}"
    headers = {"X-Key": f"Bearer {CANARY['header']}", "X-Token": "{{ env.TOKEN }}"}
    call = {"headers": headers, "body": {"password": CANARY["body"]}}
    return http_task(url, method="POST", http=call, env={"TOKEN": CANARY["env"]}, **fields)


def secret_python(source: str, **fields: Any) -> dict[str, Any]:
    return {
        **http_task("http://unused/"),
        "http_request": None,
        "operator": "python",
        "entrypoint": "dag:check",
        "source": f"# {CANARY['source']}\nimport os\n{source}",
        "env": {"TOKEN": CANARY["env"]},
        "call_args": {"password": CANARY["call_args"]},
        **fields,
    }


#: Uses its secrets, prints none, and returns nothing secret.
USES_SECRETS = "def check(password):\n    return [len(password), len(os.environ['TOKEN'])]\n"
FAILS = "def check(password):\n    raise ValueError('no luck')\n"


@pytest.fixture
def system(tmp_path: Path, redis_server: RedisServer) -> Iterator[System]:
    with System(tmp_path, redis_server.url(), GATEWAY_LEASE_SECONDS=6) as system:
        yield system


@pytest.fixture
def target() -> Iterator[HttpTarget]:
    with HttpTarget() as http_target:
        yield http_target


@pytest.fixture
def spy(redis_server: RedisServer) -> Iterator[RedisSpy]:
    redis_server.start()
    with RedisSpy(redis_server.port) as started:
        yield started


def files_of(system: System) -> Iterator[tuple[str, str]]:
    """Every file below the system's directory: SQLite and its journal, task logs, what processes printed."""
    for path in sorted(system.directory.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(system.directory)), path.read_bytes().decode(errors="replace")


def submit_all(system: System, target: HttpTarget) -> dict[str, Handle]:
    client = system.client
    target.hold("held")
    return {
        "good": client.submit(secret_call(target, "good")),
        "bad": client.submit(secret_call(target, "bad", status=400)),
        "own token": client.submit(secret_call(target, "own", agent_token=CANARY["agent_token"])),
        "held": client.submit(secret_call(target, "held")),
        "uses secrets": client.submit(secret_python(USES_SECRETS)),
        "fails": client.submit(secret_python(FAILS)),
    }


def outcomes(handles: dict[str, Handle]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, handle in handles.items():
        try:
            found[name] = handle.get(timeout=60)
        except TaskFailed as error:
            found[name] = error.reason
    return found


def test_no_canary_is_readable_anywhere(system: System, target: HttpTarget, spy: RedisSpy) -> None:
    client = system.client
    handles = submit_all(system, target)
    sealed = {"sealed": client.services.keys.sealer("dispatch").seal(secret_call(target, "sealed"))}
    dispatched = client.app.send_task("leoflow.dispatch", (sealed,), queue="dispatch")
    queued = dump(system.redis)
    assert handles["held"].attempt.task_instance_id in queued, "the dump shows no messages at all"
    assert leaks(queued) == []

    with Monitor(client.app) as monitor:
        system.start_gateway()
        system.start_workers("workers.inline", "workers.subprocess", "workers.control")
        wait_until(lambda: target.calls["held"], 60, "the held call")
        unacknowledged = dump(system.redis)
        assert "unacked" in unacknowledged
        assert leaks(unacknowledged) == []
        target.release("held")
        values = outcomes(handles)
        assert dispatched.get(timeout=60)["call"] == 1
        monitor.wait_for(handles["good"].id, "task-succeeded")
        for name in ("bad", "fails"):
            monitor.wait_for(handles[name].id, "task-failed")

    # The secrets did reach those they were for.
    assert CANARY["body"].encode() in b"".join(target.bodies)
    assert values["uses secrets"] == [len(CANARY["call_args"]), len(CANARY["env"])]
    assert (values["bad"], values["fails"]) == ("http_status", "non_zero_exit")

    system.close()
    searched = {"events": str(monitor.events), "commands": spy.seen(), "at rest": dump(system.redis)}
    searched |= dict(files_of(system))
    assert {"leoflow.db", "workers.inline.out", "gateway.out"} <= searched.keys()
    assert "leoflow.execute.subprocess" in searched["commands"]
    assert "task-failed" in searched["events"]
    assert any(name.endswith("1.log") and text for name, text in searched.items())
    assert {name: found for name, text in searched.items() if (found := leaks(text))} == {}


def test_a_plain_dispatch_message_is_shown_nowhere_but_in_its_queue(system: System, target: HttpTarget) -> None:
    """A plain Celery client puts repr(arguments) into headers that workers show: ours must not."""
    publisher = Celery("publisher", broker=system.broker_url, backend=system.broker_url, set_as_current=False)
    publisher.conf.broker_transport_options = {"global_keyprefix": "leoflow:"}
    publisher.conf.result_backend_transport_options = {"global_keyprefix": "leoflow:"}
    with Monitor(system.client.app) as monitor:
        system.start_workers("workers.inline", "workers.control")
        good = publisher.send_task("leoflow.dispatch", (secret_call(target, "good"),), queue="dispatch")
        named = publisher.send_task("leoflow.dispatch", kwargs={"request": secret_call(target, "b")}, queue="dispatch")
        invalid = [
            publisher.send_task("leoflow.dispatch", (request,), queue="dispatch")
            for request in invalid_requests(target)
        ]
        assert good.get(timeout=30)["call"] == named.get(timeout=30)["call"] == 1
        for result in invalid:
            with pytest.raises(InvalidRequest):
                result.get(timeout=30)
        monitor.wait_for(good.id, "task-succeeded")
        monitor.wait_for(invalid[-1].id, "task-failed")
        assert monitor.of(good.id, "task-received")
    wait_until(lambda: system.client.services.queues.depth("dispatch") == 0, 20, "the queue to be empty")
    publisher.close()
    searched = {"events": str(monitor.events), "at rest": dump(system.redis), **dict(files_of(system))}
    assert {name: found for name, text in searched.items() if (found := leaks(text))} == {}


def invalid_requests(target: HttpTarget) -> list[dict[str, Any]]:
    """Requests with a mistake next to a secret, where a careless message would repeat it."""
    good = secret_call(target, "never")
    return [
        {**good, "env": {"TOKEN": [CANARY["env"]]}},
        {**good, "env": CANARY["env"]},
        {**good, "env": {f"A={CANARY['env']}": "b"}},
        {**good, "http_request": {**good["http_request"], "headers": [CANARY["header"]]}},
        {**good, "http_request": {**good["http_request"], "url": f"ftp://{CANARY['user']}@h/?k={CANARY['query']}"}},
        {**good, "http_request": CANARY["body"]},
        {**good, "call_args": [CANARY["call_args"]]},
        {**good, "source": [CANARY["source"]]},
        {**good, "agent_token": {"token": CANARY["agent_token"]}},
        {**good, "password": CANARY["env"]},
    ]
