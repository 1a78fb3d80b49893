"""Python tasks: inputs, results and what is wrong with them."""

from __future__ import annotations

import json

import grpc
import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import FAN_IN
from tests.integration.agent.control_plane import Refusal

DAG = """
import json, os, sys
class Task:
    def __init__(self, function): self.function = function
    def __call__(self, *a, **k): raise RuntimeError("only builds the graph")
def plain(rows, limit=10): return {"rows": rows, "limit": limit}
decorated = Task(plain)
def size(text, factor=1): return len(text) * factor
def big(): return "x" * 200_000
def nan(): return float("nan")
def a_set(): return {1}
def nothing(): return None
def fails(): raise ValueError("no such table")
def skips():
    class AirflowSkipException(Exception): pass
    raise AirflowSkipException("nothing to do")
def sizes(**kwargs): return {name: len(value) for name, value in kwargs.items()}
async def later(): return "now"
def pushes(key="rows"):
    import leoflow_runtime
    leoflow_runtime.xcom_push(key, 1)
    leoflow_runtime.xcom_push(key, {"n": [2, "é"]})
    leoflow_runtime.xcom_push("other", None)
    return leoflow_runtime.context()._asdict()
def skips_itself():
    from leoflow_runtime import skip
    skip("no rows today")
def forgets():
    os.environ.clear()
    return "kept"
def env(): return [os.environ.get("AIRFLOW_VAR_REGION"), os.environ.get("AIRFLOW_CONN_DB")]
"""


@pytest.fixture
def run(plane, start_agent, tmp_path):
    (tmp_path / "dag.py").write_text(DAG)

    def run(name, **spec):
        plane.spec = pb.TaskSpec(operator="python", entrypoint=f"dag:{name}", **spec)
        agent = start_agent()
        return agent.wait()

    return run


def result(plane):
    return json.loads(plane.pushed[-1].value)


def test_xcom_wins_over_call_args_and_defaults_fill_the_rest(run, plane):
    plane.xcoms["extract"] = b"[1,2]"
    code = run("plain", xcom_input_mapping={"rows": "extract"}, call_args_json='{"rows": 0, "limit": 5}')
    assert code == 0
    assert result(plane) == {"rows": [1, 2], "limit": 5}


def test_a_decorated_callable_runs_its_function(run, plane):
    assert run("decorated", call_args_json='{"rows": 3}') == 0
    assert result(plane) == {"rows": 3, "limit": 10}


def test_200_kib_travel_in_and_out(run, plane):
    plane.xcoms["extract"] = json.dumps("é" * 100_000, ensure_ascii=False).encode()
    assert run("size", xcom_input_mapping={"text": "extract"}) == 0
    assert result(plane) == 100_000
    plane.holder = ""
    assert run("big") == 0
    assert result(plane) == "x" * 200_000


def test_a_hundred_inputs_of_60_kib_start_all_the_same(run, plane):
    plane.xcoms["extract"] = json.dumps("x" * 60_000).encode()
    assert run("sizes", xcom_input_mapping={f"Param_{i}": "extract" for i in range(100)}) == 0
    assert result(plane) == {f"Param_{i}": 60_000 for i in range(100)}


def test_call_args_over_128_kib_travel_by_file(run, plane):
    assert run("size", call_args_json=json.dumps({"text": "x" * 300_000})) == 0
    assert result(plane) == 300_000


def test_an_input_of_several_tasks_is_a_list_in_their_order(run, plane):
    plane.xcoms.update({f"t{i}": str(i).encode() for i in range(100)})
    spec = pb.TaskSpec(xcom_input_mapping={"limit": "t7"})
    spec.extra[FAN_IN] = json.dumps({"rows": ["t9", "absent", "t0", "t9", *(f"t{i}" for i in range(50))]})
    assert run("plain", xcom_input_mapping=spec.xcom_input_mapping, extra=spec.extra) == 0
    assert result(plane) == {"rows": [9, None, 0, 9, *range(50)], "limit": 7}


def test_an_absent_xcom_leaves_the_default(run, plane):
    assert run("size", xcom_input_mapping={"factor": "absent"}, call_args_json='{"text": "abc"}') == 0
    assert result(plane) == 3


def test_a_missing_parameter_is_named(run, plane):
    assert run("plain", xcom_input_mapping={"rows": "absent"}) == 1
    assert "parameter 'rows' of plain has no value" in plane.text("stderr")[0]
    assert plane.final().request.exit_code == 2


def test_an_xcom_that_may_not_be_read_fails_the_task(run, plane):
    def refuse(call):
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "not declared")

    plane.script["FetchXCom"] = refuse
    assert run("plain", xcom_input_mapping={"rows": "extract"}) == 1
    assert plane.final().metadata["x-leoflow-reason"] == "forbidden"
    assert "'rows'" in plane.final().request.error_message


def test_a_task_pushes_values_of_its_own_and_knows_which_it_is(run, plane):
    names = {"tenant_id": "t", "dag_id": "d", "dag_version": "7", "run_id": "r", "task_id": "load", "try_number": 2}
    assert run("pushes", **names) == 0
    pushed = {one.key: json.loads(one.value) for one in plane.pushed}
    assert pushed == {"rows": {"n": [2, "é"]}, "other": None, "return_value": pushed["return_value"]}
    assert pushed["return_value"].items() >= names.items()
    assert pushed["return_value"]["task_instance_id"]


def test_a_push_that_is_refused_fails_the_task(run, plane):
    plane.script["PushXCom"] = lambda _: pb.PushXComResponse(accepted=False, rejection_reason="payload_too_large")
    assert run("pushes") == 1
    assert plane.final().metadata["x-leoflow-reason"] == "payload_too_large"
    assert "the XCom 'rows'" in plane.final().request.error_message


def test_a_push_of_return_value_is_an_error_of_the_task(run, plane):
    assert run("pushes", call_args_json='{"key": "return_value"}') == 1
    assert "return the value instead" in plane.final().request.error_message
    assert plane.pushed == []


def test_a_task_skips_itself_and_says_why(run, plane):
    assert run("skips_itself") == 0
    final = plane.final().request
    assert (final.state, final.error_message) == (pb.TASK_STATE_SKIPPED, "no rows today")


def test_a_bash_task_pushes_lines_of_json_and_one_that_is_none_fails_it(plane, start_agent):
    command = """echo '{"key": "k", "value": [1]}' >> "$LEOFLOW_PUSH_PATH" """
    plane.spec = pb.TaskSpec(operator="bash", entrypoint=command)
    assert start_agent().wait() == 0
    assert [(one.key, one.value) for one in plane.pushed] == [("k", b"[1]")]
    plane.holder, plane.spec = "", pb.TaskSpec(operator="bash", entrypoint='echo oops >> "$LEOFLOW_PUSH_PATH"')
    assert start_agent().wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_xcom"
    assert "line 1 of LEOFLOW_PUSH_PATH" in plane.final().request.error_message


@pytest.mark.parametrize("name", ["nan", "a_set"])
def test_a_result_that_is_not_json_is_invalid_xcom(run, plane, name):
    assert run(name) == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_xcom"
    assert "the result is not JSON" in plane.text("stderr")[0]
    assert plane.pushed == []


def test_a_bash_task_that_writes_no_json_is_invalid_xcom(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo '{oops' > $LEOFLOW_RETURN_VALUE_PATH")
    assert start_agent().wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_xcom"


@pytest.mark.parametrize("reason", ["payload_too_large", "schema_mismatch"])
def test_a_value_the_control_plane_refuses_fails_the_task_with_its_reason(run, plane, reason):
    plane.script["PushXCom"] = lambda call: pb.PushXComResponse(accepted=False, rejection_reason=reason)
    assert run("big") == 1
    assert plane.final().request.state == pb.TASK_STATE_FAILED
    assert plane.final().metadata["x-leoflow-reason"] == reason
    assert plane.text("agent")[-1].startswith("task failed")


def test_none_pushes_nothing(run, plane):
    assert run("nothing") == 0
    assert plane.pushed == []


def test_a_coroutine_function_is_awaited(run, plane):
    assert run("later") == 0
    assert result(plane) == "now"


def test_an_exception_shows_its_traceback_from_the_users_code_on(run, plane):
    assert run("fails") == 1
    text = "\n".join(plane.text("stderr"))
    assert "ValueError: no such table" in text
    assert "dag.py" in text
    assert "leoflow_runtime" not in text


def test_a_skip_exception_of_airflow_skips(run, plane):
    assert run("skips") == 0
    assert plane.final().request.state == pb.TASK_STATE_SKIPPED


@pytest.mark.parametrize(
    ("entrypoint", "message"),
    [
        ("dag:absent", "module 'dag' has no attribute 'absent'"),
        ("no_such_module:f", "no module named 'no_such_module'"),
        ("dag:json", "is a module, not a callable"),
    ],
)
def test_a_wrong_entry_point_is_one_clear_line(plane, start_agent, tmp_path, entrypoint, message):
    (tmp_path / "dag.py").write_text(DAG)
    plane.spec = pb.TaskSpec(operator="python", entrypoint=entrypoint)
    assert start_agent().wait() == 1
    assert len(plane.text("stderr")) == 1
    assert message in plane.text("stderr")[0]


def test_variables_and_connections_are_airflows(run, plane):
    plane.variables["region"] = "eu"
    plane.connections["db"] = "postgresql://x"
    assert run("env") == 0
    assert result(plane) == ["eu", "postgresql://x"]


def test_an_interpreter_without_our_packages_finds_the_runtime_and_nothing_else_of_ours(
    plane, start_agent, tmp_path_factory
):
    import subprocess
    import sys

    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    script = tmp_path_factory.mktemp("code")
    (script / "probe.py").write_text(
        "import importlib.util, sys\ndef f():\n    return [sys.prefix, importlib.util.find_spec('grpc') is None]\n"
    )
    plane.spec = pb.TaskSpec(operator="python", entrypoint="probe:f", environment={"PYTHONPATH": str(script)})
    assert start_agent(LEOFLOW_PYTHON=str(venv / "bin" / "python")).wait() == 0
    assert result(plane) == [str(venv), True]


def test_a_file_beside_the_dag_stands_in_for_no_module_of_ours(plane, start_agent, tmp_path_factory):
    code = tmp_path_factory.mktemp("code")
    for name in ("token.py", "random.py", "json.py", "tempfile.py"):
        (code / name).write_text("raise RuntimeError('the wrong one')\n")
    (code / "plain.py").write_text("def f(): return __file__\n")
    plane.spec = pb.TaskSpec(operator="python", entrypoint="plain:f", environment={"PYTHONPATH": str(code)})
    assert start_agent().wait() == 0
    assert result(plane) == str(code / "plain.py")


def test_a_task_that_clears_its_environment_keeps_its_value(run, plane):
    assert run("forgets") == 0
    assert result(plane) == "kept"


def test_the_sentence_of_a_failure_is_the_exceptions(run, plane):
    assert run("fails") == 1
    assert plane.final().request.error_message == "ValueError: no such table"
    assert plane.final().metadata["x-leoflow-reason"] == "non_zero_exit"


@pytest.mark.parametrize("entrypoint", ["dag:absent", "no_such_module:f"])
def test_what_does_not_exist_is_the_configurations_fault(plane, start_agent, tmp_path, entrypoint):
    (tmp_path / "dag.py").write_text(DAG)
    plane.spec = pb.TaskSpec(operator="python", entrypoint=entrypoint)
    assert start_agent().wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_spec"


def test_a_module_that_exits_while_it_is_imported_is_a_failure(plane, start_agent, tmp_path):
    (tmp_path / "dag.py").write_text("import sys\nsys.exit(0)\n")
    plane.spec = pb.TaskSpec(operator="python", entrypoint="dag:f")
    assert start_agent().wait() == 1
    assert "sys.exit(0)" in plane.final().request.error_message
