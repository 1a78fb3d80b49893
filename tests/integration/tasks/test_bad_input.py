"""What cannot work says so where its sender looks, names the field or the server, and leaves no half a task."""

from __future__ import annotations

import time
from typing import Any

import pytest
from cryptography.fernet import Fernet

from leoflow_celery.client import Client
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import (
    BrokerUnavailable,
    DatabaseUnavailable,
    DecryptionFailed,
    InvalidRequest,
    NotFound,
    RequestTooLarge,
    TaskFailed,
)
from leoflow_celery.queueing.messages import seal_request
from leoflow_celery.queueing.publisher import LaunchOrder
from leoflow_celery.security import KeyRing
from leoflow_celery.store.submissions import NewTry
from tests.support.http_target import HttpTarget
from tests.support.ports import free_port
from tests.support.system import System, http_task
from tests.support.waiting import PATIENCE

URL = "http://127.0.0.1:1/"
BAD_REQUESTS = {
    "operator": {"operator": "sql"},
    "entrypoint": {"operator": "bash", "entrypoint": ""},
    "module:callable": {"operator": "python", "entrypoint": "dag"},
    "timeout_seconds": {"timeout_seconds": -1},
    "execution_mode: pod": {"timeout_seconds": 301},
    "resources.limits.cpu": {"resources": {"limits": {"cpu": "two"}}},
    "http_request.method": {"http_request": {"method": "FETCH", "url": URL}},
    "http_request.url": {"http_request": {"method": "GET", "url": "ftp://h/"}},
    "surprise": {"surprise": 1},
    "dag_id": {"dag_id": "../../etc"},
    "task_instance_id": {"task_instance_id": "a/b"},
}


@pytest.mark.parametrize("named", BAD_REQUESTS)
def test_an_invalid_request_is_refused_by_submit_and_by_dispatch(client: Client, named: str) -> None:
    request = {**http_task(URL), **BAD_REQUESTS[named]}
    with pytest.raises(InvalidRequest) as caught:
        client.submit(request)
    assert named in str(caught.value)
    sent = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")
    with pytest.raises(InvalidRequest) as from_result:
        sent.get(timeout=20)
    assert str(from_result.value) == str(caught.value)
    with pytest.raises(NotFound):
        client.task_instance(request["task_instance_id"])


@pytest.mark.parametrize("argument", ["text", 3, None, [], {}])
def test_something_else_than_a_request_is_refused(client: Client, argument: Any) -> None:
    sent = client.app.send_task("leoflow.dispatch", (argument,), queue="dispatch")
    with pytest.raises(InvalidRequest):
        sent.get(timeout=20)


@pytest.mark.parametrize("celery_id", ["x" * 256, "a\0b"])
def test_a_message_whose_id_cannot_be_recorded_is_refused_before_its_request_is(client: Client, celery_id: str) -> None:
    request = http_task(URL)
    sent = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch", task_id=celery_id)
    with pytest.raises(InvalidRequest, match="a Celery id has 1 to 255 characters"):
        sent.get(timeout=20)
    with pytest.raises(NotFound):
        client.task_instance(request["task_instance_id"])


def test_a_request_of_ten_megabytes_is_refused(client: Client) -> None:
    request = http_task(URL, http={"body": "x" * 10_000_000})
    with pytest.raises(RequestTooLarge, match="the limit is 1048576"):
        client.submit(request)
    for size, limit in ((3_000_000, "1048576"), (10_000_000, "8388608")):  # of a request, and of any message
        sent = client.app.send_task("leoflow.dispatch", (http_task(URL, http={"body": "x" * size}),), queue="dispatch")
        with pytest.raises(RequestTooLarge, match=f"the limit is {limit}"):
            sent.get(timeout=30)


def test_a_sealed_request_is_opened_with_our_key_only(system: System, client: Client, target: HttpTarget) -> None:
    request = http_task(target.url("a"))
    ours = {"sealed": client.services.keys.sealer("dispatch").seal(request)}
    assert client.app.send_task("leoflow.dispatch", (ours,), queue="dispatch").get(timeout=20)["call"] == 1
    foreign = {"sealed": KeyRing(Fernet.generate_key().decode()).sealer("dispatch").seal(request)}
    with pytest.raises(DecryptionFailed, match="another key"):
        client.app.send_task("leoflow.dispatch", (foreign,), queue="dispatch").get(timeout=20)


def test_a_row_sealed_with_another_key_fails_and_says_so(client: Client, target: HttpTarget) -> None:
    parsed = parse_request(http_task(target.url("a")))
    foreign = seal_request(KeyRing(Fernet.generate_key().decode()), parsed)
    assert seal_request(client.services.keys, parsed) != foreign
    [submitted] = client.services.store.submissions.record([NewTry(parsed, ExecutorType.INLINE, foreign)])
    client.publisher.launch(LaunchOrder(parsed, ExecutorType.INLINE, submitted.attempt, submitted.celery_task_id))
    with pytest.raises(TaskFailed) as caught:
        client.app.AsyncResult(submitted.celery_task_id).get(timeout=20)
    assert caught.value.reason == "invalid_spec"
    assert "LEOFLOW_SEAL_KEYS" in caught.value.message
    assert target.calls["a"] == 0


def test_an_unreachable_broker_is_named_without_its_password(system: System) -> None:
    port, started = free_port(), time.monotonic()
    with Client(system.load_settings(BROKER_URL=f"redis://:hunter2@127.0.0.1:{port}/0")) as lost:
        with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{port}") as caught:
            lost.submit(http_task(URL))
        assert "hunter2" not in str(caught.value)
    assert time.monotonic() - started < 10 * PATIENCE


def test_an_unreachable_database_is_named_without_its_password(system: System) -> None:
    port, started = free_port(), time.monotonic()
    url = f"postgresql://leoflow:hunter2@127.0.0.1:{port}/leoflow"
    with Client(system.load_settings(DATABASE_URL=url)) as lost:
        with pytest.raises(DatabaseUnavailable, match=f"127.0.0.1:{port}") as caught:
            lost.submit(http_task(URL))
        assert "hunter2" not in str(caught.value)
    assert time.monotonic() - started < 10 * PATIENCE


def test_a_database_without_tables_says_how_to_make_them(system: System, tmp_path: Any) -> None:
    with (
        Client(system.load_settings(DATABASE_URL=f"sqlite:///{tmp_path / 'empty.db'}")) as empty,
        pytest.raises(DatabaseUnavailable, match="leoflow db upgrade"),
    ):
        empty.submit(http_task(URL))
