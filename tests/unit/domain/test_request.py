"""The door: what a request may hold, and a sentence that names field, value and fix for what it may not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.fields import is_printable, is_storable
from leoflow_celery.domain.http_call import TemplateError, Values, fill
from leoflow_celery.domain.request import (
    MAX_REQUEST_BYTES,
    check_celery_id,
    parse_request,
    request_json_schema,
)
from leoflow_celery.errors import InvalidRequest, RequestTooLarge

IDS = {"task_instance_id": "ti-1", "dag_id": "sales", "run_id": "manual:1", "task_id": "load"}
BASH = {**IDS, "operator": "bash", "entrypoint": "true"}
PYTHON = {**IDS, "operator": "python", "entrypoint": "dag:load"}
EXEC = {**IDS, "operator": "exec", "argv": ["cat"], "stdin": "secret"}
HTTP = {**IDS, "operator": "http_api", "http_request": {"method": "GET", "url": "http://service/orders"}}
CANARY = "c4n4ry"


def call(**more: Any) -> dict[str, Any]:
    return {**HTTP, "http_request": {**HTTP["http_request"], **more}}  # type: ignore[dict-item]


@pytest.mark.parametrize("data", [BASH, PYTHON, HTTP])
def test_ids_and_the_operators_own_fields_are_all_that_is_needed(data: dict[str, Any]) -> None:
    request = parse_request(data)
    assert parse_request(json.dumps(data)) == parse_request(json.dumps(data).encode()) == request
    assert parse_request(request) is request
    assert request.attempt == AttemptId("ti-1", 1, 1)
    assert request.tenant_id == "default"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(BASH)[:-1] + ', "operator": "bash"}',
        json.dumps(BASH)[:-1] + ', "env": {"A": "1", "\\u0041": "2"}}',
        json.dumps(BASH)[:-1] + ', "call_args": {"deep": [{"in": {"k": 1, "k": 2}}]}}',
    ],
)
def test_text_with_a_key_twice_is_refused(text: str) -> None:
    for data in (text, text.encode()):
        with pytest.raises(InvalidRequest, match="an object has the same key twice"):
            parse_request(data)


FULL = {
    **HTTP,
    "tenant_id": "acme",
    "try_number": 3,
    "image": "registry/app:1",
    "image_pull_policy": "IfNotPresent",
    "env": {"A": "1"},
    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    "execution": {
        "node_selector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
        "service_account": "runner",
        "image_pull_policy": "Always",
    },
    "timeout_seconds": 60,
    "control_plane_addr": "gateway:9090",
    "staging_claim": "leoflow-staging-sales-1",
    "staging_size": "1Gi",
    "staging_storage_class": "fast",
    "staging_access_mode": "ReadWriteMany",
    "agent_tls_ca_config_map": "ca",
    "task_secret_name": "s",
    "task_secret_mount_path": "/secrets",
    "dag_version": "v1",
    "execution_mode": "pod",
    "executor": "kubernetes",
    "http_request": {**HTTP["http_request"], "body": ["{{ xcom.orders }}", "{{ args.n }}"]},
    "xcom_input": {"orders": "extract"},
    "xcom_schema": {"type": "object"},
    "call_args": {"n": [1, None, {"x": 1.5}]},
    "secrets": [{"name": "TOKEN", "source": "env", "reference": "token"}],
    "result_callback": {"task": "shop.done", "queue": "shop"},
    "priority": 9,
}


def test_every_field_survives_json() -> None:
    request = parse_request(FULL)
    again = json.loads(request.model_dump_json())
    assert parse_request(again) == request
    assert (
        again.items() >= {key: value for key, value in FULL.items() if key not in ("execution", "http_request")}.items()
    )


def test_a_request_that_is_accepted_is_valid_by_the_schema_we_publish() -> None:
    schema = request_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for data in (BASH, PYTHON, HTTP, EXEC, FULL):
        jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**BASH, "nope": 1}, schema)


def test_a_request_cannot_be_changed_but_evolved() -> None:
    request = parse_request(BASH)
    with pytest.raises(ValidationError, match="frozen"):
        request.dag_id = "other"  # type: ignore[misc]
    assert request.evolve(try_number=2).attempt == AttemptId("ti-1", 2)
    assert request.try_number == 1


FILE_NAMES = "is used in file names: no slash, backslash, control character, '.' or '..'"
NO_QUANTITY = "is not a Kubernetes quantity; write for example 500m, 2, 128Mi or 1Gi"

NO_NAME = "a name may hold no '=', NUL or half a surrogate pair and not be empty"
NO_NUMBER = "NaN, Infinity and integers of thousands of digits are no numbers that JSON or its readers know"
HALF = "\ud800"
HUGE = 10**5000
DEEP: Any = json.loads("[" * 120 + "]" * 120)


def task(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "task", **fields}]}}


BAD = [
    # operator and what it needs
    ({**BASH, "operator": "spark"}, "operator", "Input should be 'python', 'bash', 'http_api' or 'exec'"),
    ({**IDS, "operator": "exec"}, "argv", "is empty; an exec task needs a program and its arguments, as a list"),
    ({**EXEC, "argv": ["", "x"]}, "argv", "is empty"),
    ({**EXEC, "entrypoint": "true"}, "entrypoint", "an exec task runs argv; remove it"),
    ({**EXEC, "stdin": 5}, "stdin", "Input should be a valid string"),
    ({**BASH, "stdin": "x"}, "stdin", "is for exec tasks; remove it from this bash task"),
    ({**PYTHON, "argv": ["x"]}, "argv", "is for exec tasks; remove it from this python task"),
    ({**BASH, "relaunch": "twice"}, "relaunch", "Input should be 'always', 'before_start' or 'never'"),
    ({**PYTHON, "entrypoint": ""}, "entrypoint", "a python task needs 'module:callable', e.g. 'dag:extract' (got '')"),
    ({**PYTHON, "entrypoint": "dag"}, "entrypoint", "needs 'module:callable', e.g. 'dag:extract' (got 'dag')"),
    ({**PYTHON, "entrypoint": "dag:"}, "entrypoint", "needs 'module:callable'"),
    ({**PYTHON, "entrypoint": ":load"}, "entrypoint", "needs 'module:callable'"),
    ({**BASH, "entrypoint": " "}, "entrypoint", "is empty; a bash task needs the command to run"),
    ({**IDS, "operator": "http_api"}, "http_request", "is missing; an http_api task needs method and url"),
    ({**BASH, "execution_mode": "inline"}, "execution_mode", "'inline' is for http_api tasks; a bash task is run by"),
    ({**PYTHON, "executor": "inline"}, "executor", "'inline' is for http_api tasks; a python task is run by an agent"),
    # ids
    ({**BASH, "dag_id": "../../etc"}, "dag_id", f"{FILE_NAMES} (got '../../etc')"),
    ({**BASH, "task_id": ".."}, "task_id", FILE_NAMES),
    ({**BASH, "run_id": "a\nb"}, "run_id", FILE_NAMES),
    ({**BASH, "run_id": "a\\b"}, "run_id", FILE_NAMES),
    ({**BASH, "task_instance_id": "a\0"}, "task_instance_id", FILE_NAMES),
    ({**BASH, "tenant_id": ""}, "tenant_id", "must have 1 to 512 bytes"),
    ({**BASH, "dag_id": "é" * 257}, "dag_id", "must have 1 to 512 bytes"),
    ({**BASH, "dag_id": "a:b"}, "dag_id", "is used in keys that colons separate: no colon (got 'a:b')"),
    ({**BASH, "dag_id": None}, "dag_id", "Input should be a valid string"),
    ({key: value for key, value in BASH.items() if key != "run_id"}, "run_id", "Field required"),
    ({**BASH, "xcom_input": {"x": "a/b"}}, "xcom_input.x", FILE_NAMES),
    # names
    ({**BASH, "xcom_input": {"x=y": "a"}}, "xcom_input.x=y", f"{NO_NAME} (got 'x=y')"),
    ({**BASH, "xcom_input": {"": "a"}}, "xcom_input.", NO_NAME),
    ({**BASH, "xcom_input": {"p": "a", "P": "b"}}, "xcom_input", "'p' and 'P' are one variable, LEOFLOW_XCOM_P"),
    ({**BASH, "xcom_input": {"x\0": "a"}}, "xcom_input.x\ufffd", NO_NAME),
    ({**BASH, "xcom_input": {HALF: "a"}}, "xcom_input.\ufffd\ufffd\ufffd", f"{NO_NAME} (got '\\ud800')"),
    ({**BASH, "secrets": [{"name": "A=B", "source": "env"}]}, "secrets.0.name", f"{NO_NAME} (got 'A=B')"),
    ({**BASH, "secrets": [{"name": "", "source": "env"}]}, "secrets.0.name", NO_NAME),
    # schemas
    ({**BASH, "xcom_schema": {"type": "number-ish"}}, "xcom_schema", "is not a JSON Schema"),
    ({**BASH, "xcom_schema": {"$ref": "#/definitions/x"}}, "xcom_schema", "refers to what it does not hold"),
    ({**BASH, "xcom_schema": {"$ref": "http://h/x"}}, "xcom_schema", "nothing is fetched; put that below $defs"),
    ({**BASH, "xcom_schema": {"$schema": 5}}, "xcom_schema", "is not a JSON Schema"),
    ({**BASH, "xcom_schema": {"enum": {1}}}, "xcom_schema.enum", "not a valid JSON value"),
    ({**BASH, "xcom_schema": {"minimum": float("inf")}}, "xcom_schema", NO_NUMBER),
    # JSON that not every reader takes
    ({**BASH, "call_args": {"n": [float("nan")]}}, "call_args", NO_NUMBER),
    ({**BASH, "call_args": {"n": HUGE}}, "call_args", NO_NUMBER),
    ({**BASH, "call_args": {"n": {HALF: 1}}}, "call_args", "half a surrogate pair is no character; remove it"),
    ({**BASH, "call_args": {"n": DEEP}}, "call_args", "nested deeper than 100 levels; flatten them"),
    ({**BASH, "pod_override": {"spec": {"a": float("nan")}}}, "pod_override", NO_NUMBER),
    ({**BASH, "execution": {"affinity": {"a": HALF}}}, "execution.affinity", "half a surrogate pair"),
    (call(body={"n": float("inf")}), "http_request.body", NO_NUMBER),
    (call(body=HALF), "http_request.body", "half a surrogate pair"),
    # integers that Python itself refuses to write
    ({**BASH, "try_number": HUGE}, "try_number", "equal to 1000000 (got an integer of thousands of digits)"),
    ({**BASH, "image": HUGE}, "image", "valid string (got an integer of thousands of digits)"),
    (call(timeout_seconds=HUGE), "http_request.timeout_seconds", "valid number"),
    (
        {**BASH, "execution": {"tolerations": [{"tolerationSeconds": HUGE}]}},
        "execution.tolerations.0.tolerationSeconds",
        "less than 9223372036854775808",
    ),
    # numbers
    ({**BASH, "try_number": 0}, "try_number", "greater than or equal to 1 (got 0)"),
    ({**BASH, "timeout_seconds": -1}, "timeout_seconds", "greater than or equal to 0 (got -1)"),
    ({**BASH, "timeout_seconds": "soon"}, "timeout_seconds", "should be a valid integer"),
    ({**BASH, "timeout_seconds": 30 * 24 * 3600 + 1}, "timeout_seconds", "less than or equal to 2592000"),
    ({**BASH, "priority": 10}, "priority", "less than or equal to 9 (got 10)"),
    # quantities
    ({**BASH, "resources": {"limits": {"memory": "1GB"}}}, "resources.limits.memory", f"'1GB' {NO_QUANTITY}"),
    ({**BASH, "resources": {"requests": {"cpu": "-1"}}}, "resources.requests.cpu", f"'-1' {NO_QUANTITY}"),
    ({**BASH, "staging_size": "big"}, "staging_size", f"'big' {NO_QUANTITY}"),
    ({**BASH, "staging_size": "0" * 64 + "1"}, "staging_size", "must have at most 64 characters; write for example"),
    # environment
    ({**BASH, "env": {"A=B": CANARY}}, "env", f"variable 'A=…': {NO_NAME}"),
    ({**BASH, "env": {"A": CANARY + HALF}}, "env", "variable 'A': a name may hold no '='"),
    ({**BASH, "env": {HALF: CANARY}}, "env", "variable '\\ud800'"),
    ({**BASH, "env": {"": CANARY}}, "env", "variable ''"),
    ({**BASH, "env": {"A": f"{CANARY}\0"}}, "env", "a value no NUL"),
    ({**BASH, "env": {"A": 1}}, "env.A", "Input should be a valid string"),
    # the call
    (call(method="TRACE"), "http_request.method", "'GET', 'POST', 'PUT', 'PATCH' or 'DELETE' (got 'TRACE')"),
    (call(url="ftp://host/"), "http_request.url", "is not an http or https URL with a host"),
    *(
        (call(url=url), "http_request.url", "names no host and port that can be called")
        for url in ("http://[::1/x", "http://[abc]/", "http://℀.com/", "http://a:99999/", "http://a:b/", "http://@/")
    ),
    (call(url="http:///path"), "http_request.url", "is not an http or https URL with a host"),
    (call(timeout_seconds=0), "http_request.timeout_seconds", "greater than 0 (got 0)"),
    (call(timeout_seconds=float("inf")), "http_request.timeout_seconds", "finite number"),
    (call(success_status_codes=[]), "http_request.success_status_codes", "needs at least one item"),
    (call(success_status_codes=[2000]), "http_request.success_status_codes.0", "less than or equal to 599 (got 2000)"),
    # unknown words
    ({**BASH, "entry_point": "x"}, "entry_point", "is not a known key; remove it or check its spelling"),
    (call(verb="GET"), "http_request.verb", "is not a known key"),
    ({**BASH, "executor": "nomad"}, "executor", "'kubernetes', 'docker', 'subprocess' or 'inline' (got 'nomad')"),
    ({**BASH, "image_pull_policy": "Sometimes"}, "image_pull_policy", "(got 'Sometimes')"),
    # text that no server takes
    ({**BASH, "image": "a\x00b"}, "image", "holds a NUL character"),
    ({**BASH, "entrypoint": "echo \x00"}, "entrypoint", "holds a NUL character"),
    ({**BASH, "source": f"{CANARY}\x00"}, "source", "holds a NUL character"),
    (
        {**BASH, "source": CANARY + HALF},
        "source",
        "or half a surrogate pair, which no database or process takes; remove",
    ),
    ({**BASH, "dag_id": HALF}, "dag_id", "or half a surrogate pair"),
    ({**BASH, "execution": {"tolerations": [{"key": HALF}]}}, "execution.tolerations.0.key", "half a surrogate pair"),
    (call(headers={"A": CANARY + HALF}), "http_request.headers.A", "half a surrogate pair"),
    (call(url="http://h/\0"), "http_request.url", "holds a NUL character"),
    ({**BASH, "staging_claim": "Sales/1"}, "staging_claim", "names a volume: at most 253 lower-case letters"),
    ({**BASH, "staging_claim": "a" * 254}, "staging_claim", "at most 253"),
    # pods
    (
        {**BASH, "pod_override": {"containers": []}},
        "pod_override",
        "a Pod has metadata and spec: write spec.containers",
    ),
    (
        {**BASH, "pod_override": task(env=[{"name": "PW", "value": CANARY}, {"name": "N", "value": 5432}])},
        "pod_override",
        "spec.containers[task].env[N].value: a number stands where text belongs; write it in quotes",
    ),
    (
        {**BASH, "pod_override": {"spec": {"nodeSelector": {"gpu": True}}}},
        "pod_override",
        "spec.nodeSelector.gpu: true or false stands where text belongs; write it in quotes",
    ),
    (
        {**BASH, "pod_override": task(args=["a", 1])},
        "pod_override",
        "spec.containers[task].args[1]: a number stands where text",
    ),
    (
        {**BASH, "pod_override": {"spec": {"hostNetwork": CANARY}}},
        "pod_override",
        "spec.hostNetwork: text stands where true or false belongs",
    ),
    (
        {**BASH, "pod_override": task(env=[{"name": "LEOFLOW_AGENT_WORK_DIR", "value": CANARY}])},
        "pod_override",
        "spec.containers[task].env: variable 'LEOFLOW_AGENT_WORK_DIR' controls the agent",
    ),
    # variables that control the agent, for every executor
    *(
        ({**BASH, "executor": executor, "env": {name: CANARY}}, "env", f"variable {name!r} controls the agent")
        for executor in ("kubernetes", "docker", "subprocess")
        for name in (
            *("LEOFLOW_AGENT_WORK_DIR", "LEOFLOW_AGENT_TOKEN", "LEOFLOW_AGENT_ENV_FILE", "LEOFLOW_AGENT_OF_TOMORROW"),
            *("LEOFLOW_CONTROL_PLANE_ADDR", "LEOFLOW_TASK_INSTANCE_ID", "LEOFLOW_TERMINATION_LOG"),
            *("LEOFLOW_RETURN_VALUE_PATH", "LEOFLOW_XCOM_PARAMS", "LEOFLOW_CALL_ARGS_FILE", "LEOFLOW_WARM_WORKER"),
        )
    ),
    ({**BASH, "env": {"LEOFLOW_AGENT_SPOOL_BYTES": CANARY}}, "env", "its value must be a number of at least 65536"),
    ({**BASH, "env": {"LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": "nan"}}, "env", "must be a number of at least 0"),
    # docker_override
    *(
        ({**BASH, "docker_override": override}, f"docker_override.{field}", text)
        for override, field, text in (
            ({"privileged": True}, "privileged", "is not a known key"),
            ({"DeviceRequests": []}, "DeviceRequests", "is not a known key"),
            ({"shm_size": "lots"}, "shm_size", "not a Kubernetes quantity"),
            ({"ulimits": [{"name": "files", "soft": 1}]}, "ulimits.0.name", "'nofile'"),
            ({"ulimits": [{"name": "nofile", "soft": 9, "hard": 1}]}, "ulimits.0", "soft is more than hard"),
            ({"ulimits": [{"name": "nofile", "soft": -1, "hard": 1}]}, "ulimits.0", "soft is more than hard"),
            ({"device_requests": [{}]}, "device_requests.0", "needs one of count"),
            ({"device_requests": [{"count": 1, "options": {}}]}, "device_requests.0.options", "is not a known key"),
            ({"extra_hosts": {"a b": "1.2.3.4"}}, "extra_hosts.a b", "is the name of a host"),
            ({"extra_hosts": {"db": "elsewhere"}}, "extra_hosts.db", "is an IP address"),
            ({"mounts": [{"type": "tmpfs", "source": "a", "target": "/a"}]}, "mounts.0.type", "'volume' or 'bind'"),
            ({"mounts": [{"source": "a", "target": "a"}]}, "mounts.0.target", "an absolute path"),
            ({"mounts": [{"source": "a", "target": "/a/../etc"}]}, "mounts.0", "leads out of itself"),
            (
                {"mounts": [{"source": "a", "target": "/a", "volume_options": {"o": "bind"}}]},
                "mounts.0.volume_options",
                "is not a known key",
            ),
        )
    ),
    ({**BASH, "task_secret_name": "s"}, "task_secret_mount_path", "is empty; say where task_secret_name is mounted"),
    (
        {**BASH, "task_secret_name": "s", "task_secret_mount_path": "secrets"},
        "task_secret_mount_path",
        "an absolute path without a colon",
    ),
    ({**BASH, "secrets": [{"name": "A", "source": "ldap"}]}, "secrets.0.source", "'env', 'vault' or 'k8s_secret'"),
]


@pytest.mark.parametrize(("data", "field", "text"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_by_its_field_with_its_value_and_the_fix(
    data: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(data)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert text in str(caught.value)
    assert CANARY not in str(caught.value)


def test_every_message_can_be_stored_and_sent() -> None:
    for data, _, _ in BAD:
        with pytest.raises(InvalidRequest) as caught:
            parse_request(data)
        assert is_storable(str(caught.value))
        assert len(str(caught.value)) < 1_000


def test_variables_of_the_users_own_and_how_patient_an_agent_is_are_taken() -> None:
    env = {
        "LEOFLOW_PYTHON": "/venv/bin/python",
        "LEOFLOW_MINE": "1",
        "MY_LEOFLOW_AGENT_TOKEN": "2",
        "LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": "2.5",
        "LEOFLOW_AGENT_SPOOL_BYTES": "65536",
    }
    assert parse_request({**BASH, "env": env}).env == env
    part = task(
        env=[*({"name": name, "value": value} for name, value in env.items()), {"name": "A", "$patch": "delete"}]
    )
    assert parse_request({**BASH, "pod_override": part}).pod_override == part
    taken = {"spec": {"overhead": {"cpu": 1}, "fieldOfNextYear": 5, "activeDeadlineSeconds": None, "tolerations": []}}
    assert parse_request({**BASH, "pod_override": taken}).pod_override == taken


FORGERIES = ("a\x1b[2J", "a\u202eb", "a\u2066b", "a\u200bb", "a\u2028b", "a\x85b", "a\ufeffb", "a\x7fb", "a\rb", "a\nb")
LABELS: list[Callable[[str], dict[str, Any]]] = [
    *((lambda text, name=name: {**BASH, name: text}) for name in ("task_instance_id", "run_id", "dag_id", "task_id")),
    *((lambda text, name=name: {**BASH, name: text}) for name in ("tenant_id", "image", "dag_version", "operator")),
    *(
        (lambda text, name=name: {**BASH, name: text})
        for name in ("control_plane_addr", "agent_token", "staging_claim")
    ),
    *((lambda text, name=name: {**BASH, name: text}) for name in ("staging_storage_class", "agent_tls_ca_config_map")),
    *((lambda text, name=name: {**BASH, name: text}) for name in ("task_secret_name", "executor", "execution_mode")),
    lambda text: {**BASH, "task_secret_name": "s", "task_secret_mount_path": f"/{text}"},
    lambda text: {**BASH, "execution": {"service_account": text}},
    lambda text: {**BASH, "execution": {"node_selector": {text: "x"}}},
    lambda text: {**BASH, "execution": {"node_selector": {"x": text}}},
    lambda text: {**BASH, "execution": {"image_pull_secrets": [text]}},
    lambda text: {**BASH, "execution": {"tolerations": [{"key": text}]}},
    lambda text: {**BASH, "secrets": [{"name": text, "source": "env"}]},
    lambda text: {**BASH, "secrets": [{"name": "A", "source": "env", "reference": text}]},
    lambda text: {**BASH, "result_callback": {"task": text}},
    lambda text: {**BASH, "result_callback": {"task": "t", "queue": text}},
    lambda text: {**BASH, "xcom_input": {text: "a"}},
    lambda text: {**BASH, "xcom_input": {"a": text}},
    lambda text: {**BASH, "env": {text: CANARY}},
    lambda text: {**BASH, text: 1},
    lambda text: call(url=f"http://h/{text}"),
    lambda text: call(headers={text: CANARY}),
]


@pytest.mark.parametrize("text", FORGERIES, ids=ascii)
@pytest.mark.parametrize("build", LABELS)
def test_what_forges_logs_and_terminals_is_refused_in_every_id_name_and_label(
    build: Callable[[str], dict[str, Any]], text: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(build(text))
    assert is_printable(str(caught.value))
    assert is_printable(caught.value.field)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "Transfer-Encoding",
        "content_length",
        "CONNECTION",
        "Keep-Alive",
        "Upgrade",
        "TE",
        "Trailer",
        "Host",
        "Expect",
        "Proxy-Authorization",
        "proxy_x",
        "A b",
        "A:",
        "A\r\nB",
        "",
        "ü",
    ],
)
def test_a_header_that_frames_the_message_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^http_request\.headers\..* (header|character)") as caught:
        parse_request(call(headers={name: CANARY}))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"url": "http://{{ args.a }}/"}, "http_request.url", "is not|may not name"),
        ({"url": "http://h{{ args.a }}/"}, "http_request.url", "may not name"),
        ({"url": "http://h/#{{ args.a }}"}, "http_request.url", "not sent"),
        ({"url": "http://h/{{ args.b }}"}, "http_request.url", "args.b is unknown"),
        ({"url": "http://h/{{ args.a.b }}"}, "http_request.url", "there is no 'b'"),
        ({"url": "http://h/{{ 1+1 }}"}, "http_request.url", "space|is not a value|no placeholder"),
        ({"body": {"{{ args.a }}": 1}}, "http_request.body", "may not be a key"),
        ({"body": "{{ args.a }}", "headers": {"content-type": "multipart/x"}}, "http_request.body", "multipart"),
        ({"headers": {"Content-Type": "{{ args.a }}"}}, "http_request.headers.Content-Type", "write it out"),
        ({}, "call_args.a", "is not used"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_request({**call(**fields), "call_args": {"a": "x"}})
    assert caught.value.field == field


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@given(TEXTS)
def test_a_value_stays_in_its_place(text: str) -> None:
    values = Values(args={"a": text})
    try:
        url = fill("https://h:1/p/{{ args.a }}/e?x={{ args.a }}&y=1", {}, None, values).url
    except TemplateError:
        assert text in ("", ".", "..")
    else:
        parts = urlsplit(url)
        assert (parts.scheme, parts.netloc, parts.fragment) == ("https", "h:1", "")
        assert [unquote(one) for one in parts.path.split("/")] == ["", "p", text, "e"]
        assert parse_qsl(parts.query, keep_blank_values=True) == [("x", text), ("y", "1")]
    json_text = {"Content-Type": "application/json"}
    filled = fill("https://h", json_text, '{"s": "\\"{{ args.a }}", "v": {{ args.a }}}', values)
    assert json.loads(filled.body) == {"s": '"' + text, "v": text}
    assert fill("https://h", {}, {"v": "{{ args.a }}", "s": "-{{ args.a }}"}, values).body == {
        "v": text,
        "s": f"-{text}",
    }
    form = fill("https://h", {"content-type": "application/x-www-form-urlencoded"}, "x={{ args.a }}&y=1", values).body
    assert parse_qsl(form, keep_blank_values=True) == [("x", text), ("y", "1")]
    try:
        header = fill("https://h", {"X": "a {{ args.a }} b"}, None, values).headers["X"]
    except TemplateError:
        return
    assert header == f"a {text} b"
    assert not set(header) & set("\r\n\0")


def test_what_values_add_is_bounded() -> None:
    with pytest.raises(TemplateError, match="add more than"):
        fill("https://h", {}, "{{ args.a }}" * 1_000, Values(args={"a": "x" * 250_000}))


def test_a_header_is_one_line() -> None:
    with pytest.raises(InvalidRequest, match=r"http_request\.headers\.A: is one line of an HTTP message"):
        parse_request(call(headers={"A": f"{CANARY}\r\nHost: evil"}))


@pytest.mark.parametrize("text", ["Ä-日本", "naïve", "a b", "🚀"])
def test_letters_of_any_language_are_fine(text: str) -> None:
    request = parse_request({**BASH, "dag_id": text, "run_id": text, "image": text, "entrypoint": "a\x1b\n\u202e"})
    assert (request.dag_id, request.entrypoint) == (text, "a\x1b\n\u202e")


@pytest.mark.parametrize("celery_id", ["", "x" * 256, "a\0", HALF, *FORGERIES])
def test_a_celery_id_that_no_database_keeps_is_refused(celery_id: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^id: a Celery id has 1 to 255 characters, no NUL .* \(got '"):
        check_celery_id(celery_id)
    check_celery_id("x" * 255)


@pytest.mark.parametrize("data", ["", "{", "[1]", "5", b"\xff", None, 5, [], '{"dag_id": "\\ud800"}'])
def test_what_is_no_object_is_refused(data: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse_request(data)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(InvalidRequest, match=r"^dag_id: .*; timeout_seconds: .*; nope: "):
        parse_request({**BASH, "dag_id": "a/b", "timeout_seconds": -1, "nope": 1})


@pytest.mark.parametrize(
    "data",
    [
        {**BASH, "agent_token": [CANARY]},
        {**BASH, "env": CANARY},
        {**BASH, "env": {"A": [CANARY]}},
        {**BASH, "call_args": CANARY},
        {**BASH, "source": [CANARY]},
        call(url=f"ftp://user:{CANARY}@host/"),
        call(headers={"Authorization": [CANARY]}),
        call(headers=CANARY),
        {**BASH, "agent_tokens": CANARY},
    ],
)
def test_a_message_never_repeats_what_may_be_a_secret(data: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request(data)
    assert CANARY not in str(caught.value)


def test_text_that_is_cut_short_is_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request('{"agent_token": "' + CANARY)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("text", ["x" * 10_000_000, b"x" * 10_000_000, "é" * (MAX_REQUEST_BYTES // 2 + 1)])
def test_a_request_too_large_for_the_broker_is_refused_unread(text: str | bytes) -> None:
    with pytest.raises(RequestTooLarge, match=r"the limit is 1048576; put large data into the image, an XCom"):
        parse_request(text)


#: Half surrogate pairs too.
texts = st.text(st.characters(), max_size=5)
scalars = (
    st.none() | st.booleans() | st.floats() | st.integers() | st.just(5_000).map(lambda digits: 10**digits) | texts
)
anything = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner))


@given(anything)
def test_anything_at_all_is_a_request_or_an_error_of_ours(data: Any) -> None:
    fields = ("call_args", "env", "dag_id", "xcom_schema", "xcom_input", "execution", "timeout_seconds")
    for candidate in (data, *({**BASH, field: data} for field in fields), call(headers=data), call(body=data)):
        with contextlib.suppress(InvalidRequest):
            request = parse_request(candidate)
            # What is accepted can be sealed and opened again, and told to an agent.
            again = json.dumps(request.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()
            assert parse_request(json.loads(again)) == request
