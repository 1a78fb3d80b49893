"""What a publisher may not hand over, at the real queue: our own tasks, ids of other tries, volumes of other runs."""

from __future__ import annotations

import base64
import json
import secrets
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import signature
from celery.result import AsyncResult

from leoflow_celery.client import Client
from leoflow_celery.domain.attempt import AttemptId, celery_task_id
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import InvalidRequest, NotFound, TaskFailed
from leoflow_celery.store.submissions import NewTry
from tests.integration.tasks.conftest import UserCalls
from tests.support.http_target import HttpTarget
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

URL = "http://127.0.0.1:1/"
Json = dict[str, Any]


def forged(task: str, queue: str | None = None, **kwargs: Any) -> Json:
    options = {"queue": queue} if queue else {}
    return {"task": task, "args": [], "kwargs": kwargs, "options": options, "subtask_type": None, "immutable": True}


def push(system: System, arguments: Any, task_id: str, embed: Json | None = None, **headers: Any) -> None:
    """A dispatch message from somebody who can write to Redis."""
    context = {"callbacks": None, "errbacks": None, "chain": None, "chord": None, **(embed or {})}
    body = json.dumps([arguments, {}, context])
    message = {
        "body": base64.b64encode(body.encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "go", "task": "leoflow.dispatch", "id": task_id, "root_id": task_id, **headers},
        "properties": {
            "correlation_id": task_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "dispatch"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
    system.redis.lpush("leoflow:dispatch", json.dumps(message))


def wait_for_quiet(system: System) -> None:
    """Until nothing waits in, or is held of, the queues that a forged message went through."""
    queues = system.client.services.queues
    wait_until(lambda: not any(queues.depth(name) for name in ("dispatch", "inline", "results")), 30, "quiet queues")


@pytest.fixture
def victim(client: Client) -> AttemptId:
    """A queued try of somebody else, whose message is not sent: nobody but a forger would start it."""
    request = parse_request(http_task(URL))
    [submitted] = client.services.store.submissions.record([NewTry(request, ExecutorType.INLINE, "sealed")])
    client.services.store.submissions.mark_sent([submitted.attempt])
    return submitted.attempt


FORGERIES: dict[str, Callable[[AttemptId], Json]] = {
    "launch": lambda victim: forged("leoflow.execute.inline", attempt=victim.to_json()),
    "launch on our queue": lambda victim: forged("user.note", "inline", attempt=victim.to_json()),
    "announce": lambda _: forged("leoflow.results.present", "results", back_end="docker:evil"),
    "in a group": lambda victim: {
        **forged(
            "celery.group", tasks=[forged("user.note", "user"), forged("leoflow.execute.inline", victim=str(victim))]
        ),
        "subtask_type": "group",
    },
    "renamed by headers": lambda victim: {
        **forged("user.note", "user", attempt=victim.to_json()),
        "options": {"queue": "user", "headers": {"task": "leoflow.execute.inline"}},
    },
}


@pytest.mark.parametrize("field", ["callbacks", "errbacks", "chain", "chord"])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_signature_of_ours_is_refused_before_anything_is_recorded(
    system: System, client: Client, victim: AttemptId, field: str, forgery: str
) -> None:
    item, request, task_id = FORGERIES[forgery](victim), http_task(URL), str(uuid.uuid4())
    push(system, [request], task_id, {field: item if field == "chord" else [item]}, group="g", group_index=0)
    with pytest.raises(InvalidRequest) as caught:
        AsyncResult(task_id, app=client.app).get(timeout=30)
    assert caught.value.field == field
    with pytest.raises(NotFound):
        client.task_instance(request["task_instance_id"])
    wait_for_quiet(system)
    view = client.task_instance(victim.task_instance_id)
    assert (view.state, view.holder) == (TaskState.QUEUED, None)


@pytest.mark.parametrize("arguments", [[], [{}], [{}, {}], ["text"]], ids=repr)
def test_a_message_that_fails_before_or_in_the_task_sends_no_forged_errback_and_writes_to_no_id_in_its_chain(
    system: System, client: Client, victim: AttemptId, target: HttpTarget, user_calls: UserCalls, arguments: Any
) -> None:
    others = client.submit(http_task(target.url("a")))
    assert others.get(timeout=20)["call"] == 1
    task_id = str(uuid.uuid4())
    chain = [{**forged("user.note", "user"), "options": {"queue": "user", "task_id": others.id}}]
    embed = {"errbacks": [forged("leoflow.execute.inline", attempt=victim.to_json())], "chain": chain}
    push(system, arguments, task_id, embed)
    result = AsyncResult(task_id, app=client.app)
    wait_until(lambda: result.state == "FAILURE", 30, lambda: f"FAILURE, not {result.state}")
    wait_for_quiet(system)
    assert AsyncResult(others.id, app=client.app).get(timeout=5)["call"] == 1
    assert client.task_instance(victim.task_instance_id).state is TaskState.QUEUED
    # What is fine goes out as ever.
    push(system, arguments, str(uuid.uuid4()), {"errbacks": [forged("user.note", "user")]})
    user_calls.wait_for("user.note")


STRANGERS: dict[str, tuple[Any, Json]] = {
    "a good request": ([http_task(URL, "stranger")], {}),
    "a bad request": ([{}], {}),
    "no request": ([], {}),
    "a message that expired": ([http_task(URL)], {"expires": "2020-01-01T00:00:00+00:00"}),
    "a moment that no clock has": ([http_task(URL)], {"eta": "9999-12-31T23:59:59-14:00"}),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_the_result_of_a_finished_try_stays_whatever_comes_under_its_id(
    system: System, client: Client, target: HttpTarget, stranger: str
) -> None:
    own = client.submit(http_task(target.url("a", status=404)))
    beside = client.app.send_task("leoflow.dispatch", (http_task(target.url("b")),), queue="dispatch")
    with pytest.raises(TaskFailed):
        own.get(timeout=20)
    assert beside.get(timeout=20)["call"] == 1
    before = [system.redis.get(f"leoflow:celery-task-meta-{name}") for name in (own.id, beside.id)]
    arguments, headers = STRANGERS[stranger]
    for celery_id in (own.id, beside.id):
        push(system, arguments, celery_id, **headers)
    wait_until(lambda: system.client.services.queues.waiting("dispatch") == 0, 30, "the messages are taken")
    wait_for_quiet(system)
    after = [system.redis.get(f"leoflow:celery-task-meta-{name}") for name in (own.id, beside.id)]
    assert after == before
    with pytest.raises(NotFound):
        client.task_instance("stranger")


def test_the_id_of_a_try_cannot_be_taken_before_it_is_submitted(
    system: System, client: Client, target: HttpTarget
) -> None:
    identity = secrets.token_hex(8)
    celery_id = celery_task_id(identity, 1)
    for arguments in ([http_task(target.url("strangers"))], [{}], []):
        push(system, arguments, celery_id)
    wait_until(lambda: system.client.services.queues.waiting("dispatch") == 0, 30, "the messages are taken")
    wait_for_quiet(system)
    assert system.redis.get(f"leoflow:celery-task-meta-{celery_id}") is None
    handle = client.submit(http_task(target.url("own"), identity))
    assert (handle.id, handle.get(timeout=20)["path"]) == (celery_id, "/200/own")
    assert target.calls == {"own": 1}


def test_the_same_message_again_is_its_own(client: Client, target: HttpTarget) -> None:
    request, celery_id = http_task(target.url("a")), str(uuid.uuid4())
    for _ in range(2):
        sent = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch", task_id=celery_id)
        assert sent.get(timeout=20)["call"] == 1
    # A publisher may use the try's own id as well.
    identity = secrets.token_hex(8)
    options: Json = {"queue": "dispatch", "task_id": celery_task_id(identity, 1)}
    sent = client.app.send_task("leoflow.dispatch", (http_task(target.url("b"), identity),), **options)
    assert sent.get(timeout=20)["call"] == 1


def test_an_id_in_a_chain_that_is_anothers_is_refused(system: System, client: Client, target: HttpTarget) -> None:
    others = client.app.send_task("leoflow.dispatch", (http_task(target.url("a")),), queue="dispatch")
    assert others.get(timeout=20)["call"] == 1
    step = {**forged("user.note", "user"), "options": {"queue": "user", "task_id": others.id}}
    task_id = str(uuid.uuid4())
    push(system, [http_task(target.url("b"))], task_id, {"chain": [step]})
    with pytest.raises(InvalidRequest, match=f"chain: '{others.id}' is the Celery id of another try"):
        AsyncResult(task_id, app=client.app).get(timeout=20)
    assert others.get(timeout=5)["call"] == 1
    assert target.calls == {"a": 1}


@pytest.mark.parametrize("celery_id", ["a\nforged log line", "a\x1b[2J", "a\u202eb", "a\u200bb"])
def test_an_id_that_forges_logs_is_refused(client: Client, celery_id: str) -> None:
    sent = client.app.send_task("leoflow.dispatch", (http_task(URL),), queue="dispatch", task_id=celery_id)
    with pytest.raises(InvalidRequest, match="a Celery id has 1 to 255 characters"):
        sent.get(timeout=20)


REFUSED: list[tuple[Json, str]] = [
    ({"result_callback": {"task": "leoflow.results.present"}}, "result_callback.task"),
    ({"result_callback": {"task": "leoflow.stop.docker", "queue": "docker"}}, "result_callback.task"),
    ({"result_callback": {"task": "leoflow.dispatch"}}, "result_callback.task"),
    ({"result_callback": {"task": "celery.backend_cleanup"}}, "result_callback.task"),
    ({"result_callback": {"task": "user.note", "queue": "k8s"}}, "result_callback.queue"),
    ({"result_callback": {"task": "user.note", "queue": "docker.h1"}}, "result_callback.queue"),
    ({"staging_claim": "leoflow-staging-d-other"}, "staging_claim"),
    (
        {
            "executor": "kubernetes",
            "execution_mode": "pod",
            "pod_override": {
                "spec": {"volumes": [{"persistentVolumeClaim": {"claimName": "leoflow-staging-d-other"}}]},
            },
        },
        "pod_override.spec.volumes.0.persistentVolumeClaim.claimName",
    ),
    ({"task_instance_id": "a\u202eb"}, "task_instance_id"),
    ({"image": "a\x1b[2J"}, "image"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_request_that_names_what_is_not_its_own_is_refused_at_both_doors(
    client: Client, changes: Json, field: str
) -> None:
    request = {**http_task(URL), **changes}
    with pytest.raises(InvalidRequest) as caught:
        client.submit(request)
    assert caught.value.field == field
    sent = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")
    with pytest.raises(InvalidRequest) as from_result:
        sent.get(timeout=20)
    assert str(from_result.value) == str(caught.value)


def test_a_link_of_ours_is_refused_by_submit(client: Client) -> None:
    request = http_task(URL)
    for field in ("link", "link_error"):
        with pytest.raises(InvalidRequest) as caught:
            client.submit(request, **{field: signature("leoflow.execute.inline", app=client.app)})
        assert caught.value.field == field
    with pytest.raises(NotFound):
        client.task_instance(request["task_instance_id"])


def test_an_executor_that_is_not_permitted_is_refused(system: System) -> None:
    with Client(system.load_settings(DISPATCH_PERMITTED_EXECUTORS="")) as client:
        for changes in ({"executor": "docker"}, {"executor": "kubernetes", "execution_mode": "pod"}):
            with pytest.raises(InvalidRequest, match="LEOFLOW_DISPATCH_PERMITTED_EXECUTORS name it") as caught:
                client.submit({**http_task(URL), **changes})
            assert caught.value.field == "executor"


def test_what_was_recorded_before_is_checked_again_and_stops_nobody(
    system: System, client: Client, victim: AttemptId, target: HttpTarget, user_calls: UserCalls
) -> None:
    request, store = parse_request(http_task(target.hold("a"))), client.services.store
    handle = client.submit(request)
    wait_until(lambda: target.calls["a"], 20, "the call")
    item = forged("leoflow.execute.inline", attempt=victim.to_json())
    for waiting, context in {
        "forged": {"callbacks": [item], "chain": [item], "task": "leoflow.dispatch"},
        "fine": {"callbacks": [{**forged("user.note", "user"), "immutable": False}], "task": "leoflow.dispatch"},
    }.items():
        store.completions.register(f"{waiting}-{handle.id}", request.task_instance_id, 1, context)
    target.release("a")
    for waiting in ("forged", "fine"):
        assert AsyncResult(f"{waiting}-{handle.id}", app=client.app).get(timeout=20)["call"] == 1
    assert user_calls.wait_for("user.note") == [[handle.get(timeout=20)]]
    wait_for_quiet(system)
    assert client.task_instance(victim.task_instance_id).state is TaskState.QUEUED
    assert "completion.refused" in system.output()
