"""DAG files of the Airflow Task SDK become dag.json, or are refused with line and way out. The SDK is the real one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from leoflow_celery.errors import InvalidDag
from leoflow_celery.lite import dag_file
from leoflow_celery.lite.dag_file import DagFile, load_dag_file
from tests.support.airflow_python import BUILD_SECONDS, airflow_python
from tests.support.waiting import wait_until

__all__ = ["airflow_python"]  # a fixture
pytestmark = pytest.mark.timeout(BUILD_SECONDS + 180)

HEAD = """\
from datetime import timedelta
from airflow.sdk import DAG, dag, task, task_group
from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.python import PythonOperator, ShortCircuitOperator
from airflow.providers.http.operators.http import HttpOperator

@task
def one(value=1, *, more=None):
    return value

"""
LINES = HEAD.count("\n")
Compile = Callable[..., DagFile]


@pytest.fixture
def compiled(tmp_path: Path, airflow_python: Path) -> Compile:
    def compile_(body: str, head: str = HEAD, **options: Any) -> DagFile:
        path = tmp_path / "flow.py"
        path.write_text(head + body)
        return load_dag_file(path, python=str(airflow_python), **options)

    return compile_


def test_everything_that_is_expressible(compiled: Compile) -> None:
    dag = compiled("""\
@task(retries=2, retry_delay=timedelta(seconds=1.5), execution_timeout=timedelta(minutes=1))
def total(parts, first, factor=1):
    return sum(parts) * factor

def plain(value, unit):
    return f"{value} {unit}"

with DAG("flow", schedule="@daily", tags=["b", "a"], description="All of it.", default_args={"retries": 1}):
    start = EmptyOperator(task_id="start")
    parts = [one.override(task_id=f"part_{n}")(n) for n in range(2)]
    start >> parts
    sum_ = total(parts, first=parts[0], factor=3)
    @task_group
    def group(value):
        @task
        def inner(value):
            return value
        return inner(value)
    deep = group(sum_)
    text = PythonOperator(task_id="text", python_callable=plain, op_args=[deep], op_kwargs={"unit": "EUR"})
    say = BashOperator(task_id="say", bash_command='echo "$TEXT"', env={"TEXT": text.output, "A": "b"})
    HttpOperator(task_id="call", endpoint="https://example.org/x", data={"t": sum_, "q": "a b"}, method="GET",
                 headers={"X-T": sum_}, extra_options={"timeout": 5})
    say >> EmptyOperator(task_id="end", trigger_rule="none_failed_min_one_success")
""").dag
    by = dag.by_id
    assert (dag.dag_id, dag.schedule, dag.tags, dag.description) == ("flow", "@daily", ("a", "b"), "All of it.")
    assert list(by) == ["start", "part_0", "part_1", "total", "group__inner", "text", "say", "call", "end"]
    assert by["part_1"].depends_on == ("start",)
    assert (by["part_1"].entrypoint, by["part_1"].call_args) == ("dag:one", {"value": 1})
    assert by["total"].xcom_input == {"parts": ("part_0", "part_1"), "first": "part_0"}
    assert by["total"].call_args == {"factor": 3}
    assert (by["total"].retries, by["total"].retry_delay_seconds, by["total"].execution_timeout_seconds) == (2, 1.5, 60)
    assert by["part_0"].retries == 1
    assert by["group__inner"].entrypoint == "dag:task=flow/group.inner"
    assert by["text"].entrypoint == "dag:plain"
    assert (by["text"].xcom_input, by["text"].call_args) == ({"value": "group__inner"}, {"unit": "EUR"})
    assert (by["say"].env, by["say"].xcom_input) == ({"A": "b"}, {"TEXT": "text"})
    call = by["call"].http_request
    assert call is not None
    assert (call.method, call.url) == ("GET", "https://example.org/x?t={{ xcom.t }}&q=a%20b")
    assert (call.headers, call.timeout_seconds) == ({"X-T": "{{ xcom.X_T }}"}, 5)
    assert by["end"].trigger_rule == "none_failed_min_one_success"
    assert dag.source.startswith("from datetime")


def test_a_decorated_dag_and_a_choice_of_several(compiled: Compile) -> None:
    body = """\
@dag(schedule=None)
def left():
    @task
    def inside(): return 1
    inside()

@dag(schedule=None)
def right():
    one()

left()
right()
"""
    assert compiled(body, dag_id="left").dag.by_id["inside"].entrypoint == "dag:task=left/inside"
    with pytest.raises(InvalidDag, match="defines the DAGs 'left', 'right'; choose one with --dag-id"):
        compiled(body)
    with pytest.raises(InvalidDag, match="no DAG 'x', it defines 'left', 'right'"):
        compiled(body, dag_id="x")


#: (a statement inside of a DAG, words of its error)
REFUSED = [
    ("one.expand(value=[1, 2])", ["expand() decides at run time", "list comprehension"]),
    ("ShortCircuitOperator(task_id='s', python_callable=one.function)", ["'s'", "leoflow_runtime.skip()"]),
    ("one(made['k'])", ["argument 'value'", "key 'k'", "index"]),
    ("one([made, 1])", ["argument 'value'", "mixes", "list of results only"]),
    ("one({'deep': made})", ["argument 'value'", "mixes"]),
    ("one(made.map(str))", ["argument 'value'", ".map()"]),
    ("one(object())", ["argument 'value'", "is not JSON", "use text"]),
    ("one('{{ ds }}')", ["argument 'value'", "Jinja", "as it is"]),
    ("BashOperator(task_id='b', bash_command='echo {{ ds }}')", ["'b'", "bash_command", "env="]),
    (
        "BashOperator(task_id='c', bash_command=\"echo {{ ti.xcom_pull(task_ids='x') }}\")",
        ["'c'", "no task has the id 'x'"],
    ),
    ("BashOperator(task_id='d', bash_command=f\"echo '{made}'\")", ["'d'", "single quotes"]),
    ("BashOperator(task_id='e', bash_command='run.sh')", ["'e'", "template file"]),
    ("HttpOperator(task_id='h', endpoint='x')", ["'h'", "'http_default'", "AIRFLOW_CONN_HTTP_DEFAULT"]),
    ("HttpOperator(task_id='i', endpoint='http://a/', response_check=bool)", ["'i'", "response_check", "@task behind"]),
    ("one.override(on_failure_callback=print)()", ["on_failure_callback", "one_failed"]),
    ("one.override(pool='small')()", ["pool", "remove it"]),
    ("one.override(retries=1, retry_exponential_backoff=True)()", ["retry_exponential_backoff"]),
    ("one().as_teardown()", ["is_teardown", "all_done"]),
    ("needs()", ["'ti'", "leoflow_runtime.context()"]),
]


def test_all_that_cannot_be_expressed_is_refused_with_its_line(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dag_file, "_SHOWN_ERRORS", 100)
    before = "@task\ndef needs(ti): pass\nwith DAG('flow', schedule=None):\n    made = one()\n"
    with pytest.raises(InvalidDag) as caught:
        compiled(before + "".join(f"    {statement}\n" for statement, _ in REFUSED))
    errors = re.split(r"; (?=/)", str(caught.value))
    assert len(errors) == len(REFUSED)
    for number, (error, (_, words)) in enumerate(zip(errors, REFUSED, strict=True)):
        assert f"flow.py:{LINES + 5 + number}: task " in error
        for word in words:
            assert word in error


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def f(:\n", ["flow.py:2: SyntaxError"]),
        ("1 / 0\n", ["flow.py:2: ZeroDivisionError"]),
        ("import not_there\n", ["flow.py:2: ModuleNotFoundError", "not_there"]),
        ("import sys; sys.exit(3)\n", ["flow.py: ends with sys.exit(3)"]),
        ("import os; os._exit(3)\n", ["ended before the DAG was compiled"]),
        ("DAG('empty')\n", ["no DAG with a task"]),
    ],
)
def test_a_file_that_cannot_be_read_says_where(compiled: Compile, body: str, words: list[str]) -> None:
    with pytest.raises(InvalidDag) as caught:
        compiled(body, head="from airflow.sdk import DAG\n")
    for word in words:
        assert word in str(caught.value)


def test_user_code_sees_no_setting_and_ends_with_its_children(
    compiled: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEOFLOW_SEAL_KEYS", "secret")
    seen, child = tmp_path / "seen", tmp_path / "child"
    spy = (
        "import os, subprocess, time\n"
        f"open({str(seen)!r}, 'w').write(str([n for n in os.environ if n.startswith('LEOFLOW_')]))\n"
        f"open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))\n"
    )
    with pytest.raises(InvalidDag, match="takes more than 15 s to import"):
        compiled(spy + "time.sleep(600)\n", head="", seconds=15)
    assert seen.read_text() == "[]"
    wait_until(lambda: not psutil.pid_exists(int(child.read_text())), 10)


def test_an_interpreter_without_the_sdk_is_told_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "flow.py"
    path.write_text("from airflow.sdk import DAG\n")
    with pytest.raises(InvalidDag, match=r"no Airflow Task SDK; install leoflow-celery\[authoring\]"):
        load_dag_file(path, python=sys.executable)
    with pytest.raises(InvalidDag, match="--python"):
        load_dag_file(path, python="/nowhere/python")


def test_bash_gets_text_as_text_and_returns_its_last_line(compiled: Compile, tmp_path: Path) -> None:
    by = compiled("""\
with DAG("flow", schedule=None):
    value = one()
    first = BashOperator(task_id="first", bash_command='echo up; printf "%s\\n" "$T"', env={"T": value})
    second = BashOperator(task_id="second", bash_command="echo \\"<{{ ti.xcom_pull(task_ids='first') }}>\\"; exit 99")
    first >> second
    one.override(task_id="taker")(first.output)
""").dag.by_id
    result, reason = tmp_path / "result", tmp_path / "reason"
    environ = {"PATH": os.environ["PATH"], "LEOFLOW_RETURN_VALUE_PATH": str(result), "LEOFLOW_REASON_PATH": str(reason)}
    text = 'a "quoted" \\ back\tslash $HOME é'

    ran = subprocess.run(
        ["bash", "-c", by["first"].entrypoint],
        env={**environ, "LEOFLOW_XCOM_T": json.dumps(text, ensure_ascii=False)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout == f"up\n{text}\n"
    assert json.loads(result.read_text()) == text
    parameter = next(iter(by["second"].xcom_input))
    ran = subprocess.run(
        ["bash", "-c", by["second"].entrypoint],
        env={**environ, f"LEOFLOW_XCOM_{parameter}": '"x"'},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout, reason.read_text()) == (0, "<x>\n", "skipped")
