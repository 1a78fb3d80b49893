"""The task image as executors and DAG authors use it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator

import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.images.conftest import HARDENED
from tests.support.host import host_address
from tests.support.http_target import HttpTarget
from tests.support.images import task_image

DAG = """
import os, sys
def describe(text, factor=1):
    import helper
    return {"length": len(text) * factor, "uid": os.getuid(), "cwd": os.getcwd(), "helper": helper.NAME}
"""


@pytest.fixture
def dag_image(engine, tmp_path) -> Iterator[str]:
    """An image as a DAG author builds it: FROM the base, and the code. Its modules have names of the agent's own."""
    (tmp_path / "dag.py").write_text(DAG)
    (tmp_path / "helper.py").write_text("NAME = 'helper'")
    for name in ("grpc", "google", "pydantic", "requests", "leoflow_celery"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not the real one')")
    (tmp_path / "Dockerfile").write_text(f"FROM {task_image()}\nENV PYTHONPATH=/app\nCOPY *.py ./\n")
    tag = f"leoflow-test-dag:{secrets.token_hex(6)}"
    engine.images.build(path=str(tmp_path), tag=tag, rm=True)
    yield tag
    engine.images.remove(tag, force=True)


def bash(command: str, **more) -> pb.TaskSpec:
    return pb.TaskSpec(operator="bash", entrypoint=command, **more)


def test_dag_code_in_a_derived_image_runs_and_cannot_get_between_the_agent_and_its_modules(
    dag_image, plane, start_task
):
    plane.xcoms["extract"] = json.dumps("x" * 200_000).encode()  # more than an environment string holds
    plane.spec = pb.TaskSpec(
        operator="python",
        entrypoint="dag:describe",
        xcom_input_mapping={"text": "extract"},
        call_args_json='{"factor": 2}',
    )
    task = start_task(dag_image, **HARDENED)
    assert task.wait() == 0
    assert json.loads(plane.pushed[-1].value) == {"length": 400_000, "uid": 10001, "cwd": "/app", "helper": "helper"}


def test_an_http_api_task_runs_in_the_derived_image(dag_image, plane, start_task):
    with HttpTarget(host_address()) as target:
        plane.spec = pb.TaskSpec(operator="http_api", execution_timeout_seconds=60)
        plane.spec.extra["http_request"] = json.dumps({"method": "GET", "url": target.url("rates")})
        task = start_task(dag_image, **HARDENED)
        assert task.wait() == 0, task.logs()
    assert target.calls["rates"] == 1
    assert json.loads(plane.pushed[-1].value)["path"] == "/200/rates"


def test_the_lines_of_a_task_are_in_docker_logs_too(plane, start_task):
    plane.spec = bash("echo out; echo err >&2; printf unfinished")
    task = start_task()
    assert task.wait() == 0
    assert task.container.logs(stdout=True, stderr=False) == b"out\nunfinished\n"
    assert task.container.logs(stdout=False, stderr=True) == b"err\n"
    assert plane.text("stdout") == ["out", "unfinished"]
    assert task.termination()["reported"] is True


def test_a_task_cannot_read_the_agents_token(plane, start_task):
    plane.spec = bash("env; cat /proc/1/environ; cat /proc/$PPID/mem")
    task = start_task(env={"LEOFLOW_AGENT_TOKEN": "canary-31d7"})
    task.wait()
    assert plane.calls[0].metadata["authorization"] == "Bearer canary-31d7"
    assert "/proc/1/environ: Permission denied" in "\n".join(plane.text("stderr"))
    assert "canary" not in task.logs()


def test_any_user_may_run_it(plane, start_task):
    """Some clusters choose the user."""
    plane.spec = pb.TaskSpec(operator="python", entrypoint="os:getuid")
    task = start_task(user="54321:0", **HARDENED)
    assert task.wait() == 0, task.logs()
    assert plane.pushed[-1].value == b"54321"


def test_a_volume_at_staging_is_shared_by_tasks_of_different_users(engine, plane, start_task):
    volume = engine.volumes.create(f"leoflow-test-{secrets.token_hex(6)}")
    try:
        options = {"volumes": {volume.name: {"bind": "/staging", "mode": "rw"}}, **HARDENED}
        plane.spec = bash("echo 42 > $LEOFLOW_STAGING_DIR/rows")
        writer = start_task(env={"LEOFLOW_STAGING_DIR": "/staging"}, **options)
        assert writer.wait() == 0, writer.logs()
        plane.holder = ""
        plane.spec = bash("cat $LEOFLOW_STAGING_DIR/rows; echo more > /staging/other")
        reader = start_task(env={"LEOFLOW_STAGING_DIR": "/staging"}, user="54321:0", **options)
        assert reader.wait() == 0, reader.logs()
        assert plane.text("stdout") == ["42"]
        for task in (writer, reader):
            task.container.remove(v=True)
    finally:
        volume.remove(force=True)


def test_without_its_environment_it_says_what_is_missing(engine):
    container = engine.containers.run(task_image(), detach=True)
    try:
        assert container.wait(timeout=60)["StatusCode"] == 1
        assert b"LEOFLOW_CONTROL_PLANE_ADDR is not set" in container.logs()
    finally:
        container.remove(force=True)


def test_it_passes_run_as_non_root_and_needs_no_path_to_find_its_agent(engine):
    config = engine.images.get(task_image()).attrs["Config"]
    user = config["User"].partition(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    assert config["Entrypoint"][0].startswith("/")


def test_the_agent_starts_from_byte_code_alone(engine):
    """Compiling a module at each start, because nobody could keep the result, costs more than the rest of the start."""
    script = "import leoflow_celery.agent.__main__, leoflow_celery.executors.inline_http.__main__"
    command = ["-I", "-v", "-c", script]
    output = engine.containers.run(
        task_image(), command, entrypoint="/opt/leoflow/bin/python", stderr=True, remove=True, read_only=True
    ).decode()
    assert "matches /opt/leoflow" in output, "byte code is read"
    assert [line for line in output.splitlines() if "code object from '/" in line and ".pyc" not in line] == []


def test_the_images_python_finds_the_runtime_and_nothing_else_of_ours(engine):
    names = ("leoflow_runtime", "leoflow_celery", "grpc")
    script = f"from importlib.util import find_spec; print([bool(find_spec(name)) for name in {names}])"
    output = engine.containers.run(task_image(), ["-c", script], entrypoint="python", remove=True)
    assert output == b"[True, False, False]\n"
