"""GetTaskSpec, FetchXCom and PushXCom over real connections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa

from leoflow_celery.agent.inputs import declared_inputs
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.security import KeyRing
from tests.integration.gateway.harness import SEAL_KEY, World, refused

HTTP = {"method": "POST", "url": "http://example.test/x", "headers": {"a": "b"}, "body": {"n": 1}}


def test_a_spec_says_everything_the_agent_needs(world: World) -> None:
    request = world.submit(
        operator="python",
        entrypoint="dag:load",
        dag_version="7",
        env={"A": "1"},
        xcom_input={"rows": "extract"},
        call_args={"limit": [1, None]},
        timeout_seconds=90,
    )
    agent = world.agent(request)
    agent.register()
    spec = agent.spec()
    assert (spec.tenant_id, spec.dag_id, spec.run_id, spec.task_id) == ("default", "sales", "run:1", "load")
    assert (spec.dag_version, spec.try_number, spec.operator, spec.entrypoint) == ("7", 1, "python", "dag:load")
    assert dict(spec.environment) == {"A": "1"}
    assert dict(spec.xcom_input_mapping) == {"rows": "extract"}
    assert spec.execution_timeout_seconds == 90
    assert json.loads(spec.call_args_json) == {"limit": [1, None]}


def test_an_http_task_carries_its_call(sqlite_world: World) -> None:
    agent = sqlite_world.agent(sqlite_world.submit(operator="http_api", entrypoint="", http_request=HTTP))
    agent.register()
    call = json.loads(agent.spec().extra.fields["http_request"].string_value)
    assert (call["method"], call["url"], call["body"]) == ("POST", "http://example.test/x", {"n": 1})


@pytest.mark.parametrize(
    ("executor", "expected"),
    [(ExecutorType.KUBERNETES, "/staging"), (ExecutorType.DOCKER, "/staging"), (ExecutorType.SUBPROCESS, None)],
)
def test_the_staging_directory_is_named_where_it_is_mounted(
    sqlite_world: World, executor: ExecutorType, expected: str | None
) -> None:
    agent = sqlite_world.agent(sqlite_world.submit(staging_claim="c", recorded_executor=executor))
    agent.register()
    assert agent.spec().environment.get("LEOFLOW_STAGING_DIR") == expected


def test_a_spec_is_for_the_holder_alone(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    assert refused(sqlite_world.agent(request).spec).code() is grpc.StatusCode.ABORTED
    holder = sqlite_world.agent(request)
    holder.register()
    holder.report(pb.TASK_STATE_SUCCESS)
    assert refused(holder.spec).code() is grpc.StatusCode.ABORTED


def test_a_request_sealed_with_another_key_is_named_as_such(make_world: Callable[..., World]) -> None:
    world = make_world()
    request = world.submit()
    with world.store.database.transaction() as connection:
        connection.execute(sa.text("UPDATE task_instance SET sealed_request = 'gAAAAAbroken'"))
    agent = world.agent(request)
    agent.register()
    error = refused(agent.spec)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "LEOFLOW_SEAL_KEYS" in error.details()


def test_a_request_that_older_rules_let_in_ends_with_the_rule_it_breaks(sqlite_world: World) -> None:
    request = sqlite_world.submit()
    stored = {**request.model_dump(mode="json", exclude_defaults=True), "env": {"LEOFLOW_AGENT_X": "c4n4ry"}}
    sealed = KeyRing(SEAL_KEY).sealer("request").seal({"request": stored})
    with sqlite_world.store.database.transaction() as connection:
        connection.execute(sa.text("UPDATE task_instance SET sealed_request = :sealed"), {"sealed": sealed})
    agent = sqlite_world.agent(request)
    agent.register()
    assert refused(agent.spec).code() is grpc.StatusCode.FAILED_PRECONDITION
    view = sqlite_world.view(request)
    assert (view.state, view.reason) == (TaskState.FAILED, "invalid_spec")
    assert "env: " in view.message
    assert "breaks a rule of this one" in view.message
    assert "c4n4ry" not in view.message


SECRETS = ({"name": "PASSWORD", "source": "env", "reference": "db-password"},)


def secrets_directory(path: Path, **values: str) -> Path:
    path.mkdir()
    for name, value in values.items():
        (path / name.replace("_", "-")).write_text(value)
    return path


def test_a_secret_becomes_a_variable(make_world: Callable[..., World], tmp_path: Path) -> None:
    path = secrets_directory(tmp_path / "secrets", db_password="hunter2\n")
    world = make_world(secrets_path=path, allow_insecure_secrets=True)
    agent = world.agent(world.submit(secrets=SECRETS, env={"A": "1"}))
    agent.register()
    assert dict(agent.spec().environment) == {"A": "1", "PASSWORD": "hunter2"}


def test_an_unknown_secret_ends_the_attempt_at_once(make_world: Callable[..., World], tmp_path: Path) -> None:
    world = make_world(secrets_path=secrets_directory(tmp_path / "secrets"), allow_insecure_secrets=True)
    request = world.submit(secrets=SECRETS)
    agent = world.agent(request)
    agent.register()
    error = refused(agent.spec)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "db-password" in error.details()
    view = world.view(request)
    assert (view.state, view.reason) == (TaskState.FAILED, "unknown_secret")
    assert "LEOFLOW_GATEWAY_SECRET_BACKENDS" in view.message
    assert world.gateway is not None
    assert world.gateway.finished.get(timeout=5) == ("ti-1", 1)


def test_secrets_do_not_travel_in_plain_text(make_world: Callable[..., World], tmp_path: Path) -> None:
    world = make_world(secrets_path=secrets_directory(tmp_path / "secrets", db_password="hunter2"))
    request = world.submit(secrets=SECRETS)
    agent = world.agent(request)
    agent.register()
    error = refused(agent.spec)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "LEOFLOW_GATEWAY_ALLOW_INSECURE_SECRETS" in error.details()
    assert world.view(request).reason == "forbidden"


class TestXComs:
    def test_a_value_reaches_whoever_declared_it(self, world: World) -> None:
        value = json.dumps("x" * 200_000).encode()
        producer = world.agent(world.submit("ti-a", task_id="extract"))
        producer.run()
        answer = producer.push(value)
        assert (answer.accepted, answer.rejection_reason) == (True, "")
        assert answer.ttl_seconds == world.settings.xcom.ttl_seconds
        consumer = world.agent(world.submit("ti-b", xcom_input={"rows": "extract"}))
        consumer.register()
        found = consumer.fetch("extract")
        assert (found.value, found.size_bytes, found.content_type) == (value, len(value), "application/json")
        assert found.created_at.seconds > 1_700_000_000
        assert consumer.fetch("extract", "return_value").value == value

    def test_an_input_of_several_tasks_lets_each_be_read(self, world: World) -> None:
        for name in ("left", "right"):
            producer = world.agent(world.submit(f"ti-{name}", task_id=name))
            producer.run()
            producer.push(json.dumps(name).encode())
        consumer = world.agent(world.submit("ti-b", xcom_input={"both": ["left", "right"], "one": "left"}))
        consumer.register()
        spec = consumer.spec()
        assert dict(spec.xcom_input_mapping) == {"one": "left"}
        assert declared_inputs(spec) == {"one": "left", "both": ("left", "right")}
        assert [consumer.fetch(name).value for name in ("left", "right")] == [b'"left"', b'"right"']
        assert refused(consumer.fetch, "other").code() is grpc.StatusCode.PERMISSION_DENIED

    def test_a_task_that_was_not_declared_cannot_be_read(self, world: World) -> None:
        producer = world.agent(world.submit("ti-a", task_id="extract"))
        producer.run()
        producer.push(b"1")
        consumer = world.agent(world.submit("ti-b", xcom_input={"rows": "other"}))
        consumer.register()
        error = refused(consumer.fetch, "extract")
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "'extract'" in error.details()
        assert refused(consumer.fetch, "other").code() is grpc.StatusCode.NOT_FOUND

    @pytest.mark.parametrize(
        ("size", "accepted", "reason"), [(262_144, True, ""), (262_145, False, "payload_too_large")]
    )
    def test_the_limit_is_exact(self, world: World, size: int, accepted: bool, reason: str) -> None:
        agent = world.agent(world.submit())
        agent.run()
        answer = agent.push(b'"' + b"x" * (size - 2) + b'"')
        assert (answer.accepted, answer.rejection_reason) == (accepted, reason)
        stored = world.store.xcom.of_run("default", "sales", "run:1")
        assert [item.key for item, _ in stored] == (["return_value"] if accepted else [])

    @pytest.mark.parametrize(
        ("value", "key", "reason"),
        [
            (b'{"n": "text"}', "", "schema_mismatch"),
            (b"{", "", "invalid_xcom"),
            (b"NaN", "other", "invalid_xcom"),
            (b'{"n": 1}', "", ""),
            (b'"the schema is for the return value"', "other", ""),
        ],
    )
    def test_a_value_is_checked(self, sqlite_world: World, value: bytes, key: str, reason: str) -> None:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
        agent = sqlite_world.agent(sqlite_world.submit(xcom_schema=schema))
        agent.run()
        answer = agent.push(value, key)
        assert (answer.accepted, answer.rejection_reason) == (not reason, reason)

    def test_bytes_of_another_type_are_kept_as_they_are(self, sqlite_world: World) -> None:
        agent = sqlite_world.agent(sqlite_world.submit(xcom_input={"mine": "load"}))
        agent.run()
        assert agent.push(b"\xff\x00", "blob", "application/octet-stream").accepted
        found = agent.fetch("load", "blob")
        assert (found.value, found.content_type) == (b"\xff\x00", "application/octet-stream")

    def test_a_return_value_is_json_whatever_its_writer_says(self, sqlite_world: World) -> None:
        agent = sqlite_world.agent(sqlite_world.submit())
        agent.run()
        for content_type in ("text/plain", "application/json; charset=utf-8"):
            answer = agent.push(b"hello", "return_value", content_type)
            assert (answer.accepted, answer.rejection_reason) == (False, "invalid_xcom")
        assert agent.push(b'"hello"', "return_value", "application/json; charset=utf-8").accepted

    @pytest.mark.parametrize("key", ["a:b", "x" * 513])
    def test_a_key_that_cannot_be_stored(self, sqlite_world: World, key: str) -> None:
        agent = sqlite_world.agent(sqlite_world.submit())
        agent.run()
        assert refused(agent.push, b"1", key).code() is grpc.StatusCode.INVALID_ARGUMENT

    def test_only_the_live_holder_pushes(self, world: World) -> None:
        request = world.submit()
        holder, other = world.agent(request), world.agent(request)
        assert refused(holder.push, b"1").code() is grpc.StatusCode.ABORTED
        holder.run()
        assert refused(other.push, b"2").code() is grpc.StatusCode.ABORTED
        assert holder.push(b"1").accepted
        holder.report(pb.TASK_STATE_SUCCESS)
        assert refused(holder.push, b"3").code() is grpc.StatusCode.ABORTED
        (stored,) = world.store.xcom.of_run("default", "sales", "run:1")
        assert stored[1].value == b"1"
