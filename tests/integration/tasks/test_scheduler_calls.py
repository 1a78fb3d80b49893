"""What a scheduler needs of a client: calls that do not wait, ends, cancels and new inputs for many tries."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.client import Client
from leoflow_celery.client.client import Capacity
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import InvalidRequest, NotFound, Unavailable
from leoflow_celery.queueing.messages import open_request
from leoflow_celery.store.logs import LogRecord
from tests.support.silent_server import SilentServer
from tests.support.system import System
from tests.support.waiting import PATIENCE, wait_until


def _request(name: str, **fields: Any) -> dict[str, Any]:
    ids = {"task_instance_id": name, "dag_id": "d", "run_id": "r", "task_id": f"t-{name}"}
    return {**ids, "operator": "exec", "argv": ["cat"], "stdin": "first", "owner": "s", **fields}


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[System]:
    """A system whose broker takes connections and says nothing."""
    with SilentServer() as server, System(tmp_path, f"redis://127.0.0.1:{server.port}/0") as system:
        yield system


def _client(system: System, **overrides: object) -> Client:
    return Client(system.load_settings(BROKER_SOCKET_TIMEOUT_SECONDS=2, BROKER_CONNECT_TIMEOUT_SECONDS=2, **overrides))


def test_what_is_sent_later_is_recorded_at_once_while_the_broker_is_silent(silent: System) -> None:
    with _client(silent, DISPATCH_QUEUE_LIMITS="subprocess=1") as client:
        started = time.monotonic()
        handles = client.within(1.0 * PATIENCE).submit_many([_request("a"), _request("b")], send="later")
        assert time.monotonic() - started < 1.0 * PATIENCE
        assert [handle.created for handle in handles] == [True, True]
        views = [client.task_instance(name) for name in "ab"]
        assert [(view.state, view.sent_at) for view in views] == [(TaskState.QUEUED, None)] * 2
        assert client.cancel_many(["a", "nobody", "b"]) == ["a", "b"]
        assert client.cancel_many(["a", "b"]) == []
        assert {view.task_instance_id for view in client.ends(0, "s").tries} == {"a", "b"}
        assert [view.reason for view in client.ended(["a", "b"])] == ["cancelled"] * 2


def test_a_call_with_a_limit_does_not_wait_for_a_database_that_is_silent(silent: System) -> None:
    with SilentServer() as server:
        client = _client(silent, DATABASE_URL=f"postgresql://u@127.0.0.1:{server.port}/d")
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"ended has no answer after 0\.3 s"):
            client.within(0.3).ended(["a"])
        assert time.monotonic() - started < 1.0 * PATIENCE


def test_a_limit_changes_no_answer_and_no_error(own_system: System) -> None:
    client = own_system.client.within(30)
    assert client.submit_many([_request("a")])[0].created
    with pytest.raises(NotFound):
        client.task_instance("nobody")
    with pytest.raises(InvalidRequest, match="argv"):
        client.submit_many([_request("b", argv=[])])


def test_a_thread_sends_what_was_to_be_sent_later(own_system: System) -> None:
    client = own_system.client
    client.submit_many([_request("a"), _request("b")], send="later")
    wait_until(lambda: all(client.task_instance(name).sent_at for name in "ab"), 20, "both are sent")
    assert own_system.client.services.queues.waiting("subprocess") == 2
    assert client.capacity("subprocess") == Capacity(ExecutorType.SUBPROCESS, 2, 0)
    with pytest.raises(InvalidRequest, match="'lambda' is not an executor"):
        client.capacity("lambda")


def test_closing_a_client_sends_what_it_was_to_send(own_system: System) -> None:
    client = Client(own_system.settings)
    client.submit_many([_request(f"ti-{number}") for number in range(50)], send="later")
    client.close()
    assert all(own_system.client.task_instance(f"ti-{number}").sent_at for number in range(50))


def test_the_next_launch_gets_what_was_refreshed(own_system: System) -> None:
    client = own_system.client
    client.submit(_request("a", env={"KEPT": "1"}, stdin="first"))
    assert client.refresh("a", stdin="second")
    request = open_request(client.services.keys, client.task_instance("a").sealed_request)
    assert (request.stdin, request.env, request.argv, request.owner) == ("second", {"KEPT": "1"}, ("cat",), "s")
    with pytest.raises(InvalidRequest, match="env"):
        client.refresh("a", env={"NOT=GOOD": "1"})
    client.cancel("a")
    assert not client.refresh("a", stdin="third")
    with pytest.raises(NotFound):
        client.refresh("nobody", stdin="x")


def test_a_log_is_read_from_a_line_on(own_system: System) -> None:
    client = own_system.client
    client.submit(_request("a"))
    with client.services.store.logs.writer(client.task_instance("a").log_key) as log:
        log.append(LogRecord(0.0, "info", "stdout", f"line {number}") for number in range(5))
    assert [line["msg"] for line in client.task_logs("a", after=3)] == ["line 3", "line 4"]
    assert [line["msg"] for line in client.logs("d", "r", "t-a", after=4)] == ["line 4"]
    assert list(client.task_logs("a", after=5)) == []
