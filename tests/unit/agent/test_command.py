from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from leoflow_celery.agent.command import build_command
from leoflow_celery.agent.config import AgentConfig
from leoflow_celery.agent.inputs import Inputs
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.protocol import agent_pb2 as pb

CONFIG = AgentConfig(address="a:1", token="secret", task_instance_id="ti", python="/venv/bin/python")
DIRECTORY = Path("/private")


def build(spec, inputs=None, environ=None):
    return build_command(spec, inputs or Inputs(), CONFIG, DIRECTORY, environ or {})


def test_python_runs_the_runtime_in_the_chosen_interpreter():
    command = build(pb.TaskSpec(operator="python", entrypoint="dag:f"), environ={"PYTHONPATH": "/mine"})
    assert command.argv == ["/venv/bin/python", "-m", "leoflow_runtime", "dag:f"]
    assert command.env["PYTHONPATH"] == "/mine:/private/runtime"


def test_bash_runs_the_command():
    assert build(pb.TaskSpec(operator="bash", entrypoint="echo $A")).argv == ["bash", "-c", "echo $A"]


def test_a_script_too_long_for_an_argument_becomes_a_file():
    command = build(pb.TaskSpec(operator="bash", entrypoint="#" * 70_000))
    assert command.argv == ["bash", "/private/script.sh"]
    assert len(command.files["/private/script.sh"]) == 70_000


def test_http_api_is_called_by_our_own_module():
    spec = pb.TaskSpec(operator="http_api", execution_timeout_seconds=9, try_number=2)
    spec.extra["http_request"] = '{"method": "GET"}'
    command = build(spec)
    assert command.argv == [sys.executable, "-I", "-m", "leoflow_celery.executors.inline_http"]
    assert command.env["LEOFLOW_HTTP_REQUEST_JSON"] == '{"method": "GET"}'
    assert (command.env["LEOFLOW_TRY_NUMBER"], command.env["LEOFLOW_TIMEOUT_SECONDS"]) == ("2", "9")


def test_an_agent_fills_a_call_as_the_inline_worker_does():
    spec = pb.TaskSpec(operator="http_api", environment={"T": "t"}, call_args_json='{"a": "x/y"}')
    spec.xcom_input_mapping["o"] = "up"
    call = {"url": "http://h/{{ args.a }}", "headers": {"X": "{{ env.T }}"}, "body": ["{{ xcom.o }}"]}
    spec.extra["http_request"] = json.dumps({"method": "PUT", **call})
    sent = json.loads(build(spec, Inputs(xcoms={"o": b'{"id": "{{ args.a }}"}'})).env["LEOFLOW_HTTP_REQUEST_JSON"])
    assert (sent["url"], sent["headers"], sent["body"]) == ("http://h/x%2Fy", {"X": "t"}, [{"id": "{{ args.a }}"}])
    with pytest.raises(InvalidRequest, match="task 'up' left no return_value"):
        build(spec, Inputs())


def test_an_unknown_operator_is_named():
    with pytest.raises(InvalidRequest, match="cobol"):
        build(pb.TaskSpec(operator="cobol"))


@pytest.mark.parametrize(
    ("spec", "inputs", "named"),
    [
        ({"environment": {"A=canary": "1"}}, {}, "'A'"),
        ({"environment": {"A\0": "1"}}, {}, r"'A\\x00'"),
        ({"environment": {"A": "canary\0"}}, {}, "'A'"),
        ({}, {"variables": {"region=canary": "1"}}, "'AIRFLOW_VAR_REGION'"),
        ({}, {"connections": {"db": "canary\0"}}, "'AIRFLOW_CONN_DB'"),
        ({}, {"xcoms": {"p=q": b"1"}}, "'LEOFLOW_XCOM_P'"),
        ({"entrypoint": "echo canary\0"}, {}, "entrypoint"),
    ],
)
def test_what_no_process_can_be_given_is_named_and_not_repeated(spec, inputs, named):
    with pytest.raises(InvalidRequest, match=named) as caught:
        build(pb.TaskSpec(**{"operator": "bash", "entrypoint": "true", **spec}), Inputs(**inputs))
    assert "canary" not in str(caught.value).lower()


def test_what_is_the_agents_own_is_not_inherited():
    environ = {
        "LEOFLOW_AGENT_TOKEN": "secret", "LEOFLOW_CONTROL_PLANE_ADDR": "a:1", "LEOFLOW_XCOM_BACKEND": "redis",
        "LEOFLOW_STAGING_DIR": "/staging", "HOME": "/home/u",
    }  # fmt: skip
    env = build(pb.TaskSpec(operator="bash", entrypoint="true"), environ=environ).env
    assert "secret" not in env.values()
    assert "LEOFLOW_XCOM_BACKEND" not in env
    assert (env["HOME"], env["LEOFLOW_STAGING_DIR"]) == ("/home/u", "/staging")
    assert env["LEOFLOW_TASK_INSTANCE_ID"] == "ti"


def test_the_specs_environment_wins_over_variables_and_the_agents():
    spec = pb.TaskSpec(operator="bash", entrypoint="true", environment={"A": "spec", "AIRFLOW_VAR_X": "spec"})
    env = build(spec, Inputs(variables={"x": "var", "y": "var"}, connections={"db": "uri"}), {"A": "agent"}).env
    assert (env["A"], env["AIRFLOW_VAR_X"], env["AIRFLOW_VAR_Y"], env["AIRFLOW_CONN_DB"]) == (
        "spec", "spec", "var", "uri",
    )  # fmt: skip


@pytest.mark.parametrize(("size", "by_file"), [(65_536, False), (65_537, True)])
def test_an_xcom_over_64_kib_travels_by_file(size, by_file):
    value = json.dumps("x" * (size - 2)).encode()
    command = build(pb.TaskSpec(operator="python", entrypoint="d:f"), Inputs(xcoms={"Rows": value}))
    assert ("LEOFLOW_XCOMFILE_ROWS" in command.env) is by_file
    assert ("LEOFLOW_XCOM_ROWS" in command.env) is not by_file
    assert list(command.files.values()) == ([value] if by_file else [])
    assert json.loads(command.env["LEOFLOW_XCOM_PARAMS"]) == ["Rows"]


@pytest.mark.parametrize("value", [b"\xff", b'"\x00"'])
def test_an_xcom_that_no_environment_can_hold_travels_by_file(value):
    command = build(pb.TaskSpec(operator="python", entrypoint="d:f"), Inputs(xcoms={"p": value}))
    assert list(command.files.values()) == [value]


def test_the_token_is_not_in_the_configs_text():
    assert "secret" not in repr(CONFIG)


def test_exec_runs_its_arguments_and_reads_its_input():
    spec = pb.TaskSpec(operator="exec")
    spec.extra["argv"], spec.extra["stdin"] = ["cat", "a b"], "secret"
    command = build(spec)
    assert (command.argv, command.stdin, command.files) == (["cat", "a b"], b"secret", {})
    assert "secret" not in repr(command)
    spec.extra["argv"] = ["{python}", "-m", "x"]
    assert build(spec).argv == ["/venv/bin/python", "-m", "x"]
