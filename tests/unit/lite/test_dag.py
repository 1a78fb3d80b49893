"""dag.json: every rule of the format, with errors that name task, key, value and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.request import Operator
from leoflow_celery.errors import InvalidDag, InvalidRequest
from leoflow_celery.lite.dag import Dag, load_dag, task_instance_id, task_request
from leoflow_celery.lite.plan import Retries, TriggerRule

BASH = {"task_id": "a", "type": "bash", "entrypoint": "true"}
PYTHON = {"task_id": "p", "type": "python", "entrypoint": "dag:extract"}
HTTP = {"task_id": "h", "type": "http_api", "http_request": {"method": "GET", "url": "http://localhost/x"}}


def bash(task_id: str, *upstreams: str, **more: Any) -> dict[str, Any]:
    return {"task_id": task_id, "type": "bash", "entrypoint": "true", "depends_on": list(upstreams), **more}


def document(*tasks: Any, **more: Any) -> dict[str, Any]:
    return {
        "schema_version": "1.0",
        "dag_id": "sales",
        "dag_version": "v1",
        "image": "img",
        "tasks": list(tasks or (BASH,)),
        **more,
    }


def load(*tasks: Any, **more: Any) -> Dag:
    return load_dag(json.dumps(document(*tasks, **more)).encode())


def test_a_small_file_gets_the_defaults_of_the_format() -> None:
    dag = load(BASH, PYTHON, HTTP)
    assert [task.type for task in dag.tasks] == [Operator.BASH, Operator.PYTHON, Operator.HTTP_API]
    assert dag.tasks[0].trigger_rule is TriggerRule.ALL_SUCCESS
    assert dag.retries_of("a") == Retries(0, 300)
    assert [task.mode for task in dag.tasks] == ["pod", "pod", "inline"]
    call = dag.by_id["h"].http_request
    assert call is not None
    assert (call.timeout_seconds, call.success_status_codes) == (60, (200, 201, 202, 204))


def test_every_known_key_is_accepted() -> None:
    task = {
        **PYTHON,
        "depends_on": ["h"],
        "trigger_rule": "all_done",
        "retries": 3,
        "retry_delay_seconds": 0.5,
        "execution_timeout_seconds": 9,
        "execution_mode": "pod",
        "env": {"A": "1"},
        "call_args": {"rows": [1, {"x": None}]},
        "secrets": [{"name": "TOKEN", "source": "vault", "reference": "kv/token"}],
        "resources": {"requests": {"cpu": "100m"}, "limits": {"memory": "1Gi"}},
        "execution": {
            "node_selector": {"disk": "ssd"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "service_account": "runner",
            "image_pull_policy": "Always",
        },
        "xcom_input": {"figures": "h"},
        "xcom_schema": {"type": "object"},
    }
    dag = load(
        {**HTTP, "execution_mode": "pod"},
        task,
        description="d",
        owner="o",
        tags=["t"],
        schedule="@daily",
        schedule_timezone="UTC",
        start_date="2026-01-01",
        end_date="2026-12-31",
        max_active_runs=1,
        catchup=True,
        default_args={"retries": 1, "retry_delay_seconds": 2, "execution_timeout_seconds": 3},
        staging={"enabled": True, "size": "2Gi", "storage_class": "fast"},
        source="x = 1",
    )
    assert dag.retries_of("p") == Retries(3, 0.5)
    assert dag.retries_of("h") == Retries(1, 2)
    assert dag.by_id["h"].mode == "pod"


def test_null_means_not_set_but_a_null_of_the_users_own_is_kept() -> None:
    task = {**PYTHON, "depends_on": None, "retries": None, "call_args": {"x": None}}
    dag = load(task, schedule=None, default_args={"retries": None})
    assert dag.by_id["p"].depends_on == ()
    assert dag.by_id["p"].call_args == {"x": None}


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        pytest.param(document(surprise=1), ["surprise", "not a known key"], id="unknown top key"),
        pytest.param(document({**BASH, "retrys": 1}), ["'a'", "retrys", "not a known key"], id="unknown task key"),
        pytest.param(document(default_args={"x": 1}), ["default_args.x", "not a known key"], id="unknown default"),
        pytest.param(document(staging={"x": 1}), ["staging.x", "not a known key"], id="unknown staging"),
        pytest.param(
            document({**HTTP, "http_request": {**HTTP["http_request"], "verb": "x"}}),  # type: ignore[dict-item]
            ["'h'", "http_request.verb", "not a known key"],
            id="unknown http key",
        ),
        pytest.param(
            document({**BASH, "resources": {"limits": {"gpu": "1"}}}), ["'a'", "resources.limits.gpu"], id="resource"
        ),
        pytest.param(
            document({**BASH, "resources": {"limits": {"memory": "1Gb"}}}),
            ["'a'", "resources.limits.memory", "1Gb", "1Gi"],
            id="bad quantity",
        ),
        pytest.param({**document(), "schema_version": "2.0"}, ["schema_version", "2.0", "1.0"], id="version"),
        pytest.param({**document(), "dag_id": "a/b"}, ["dag_id", "a/b"], id="dag id"),
        pytest.param({**document(), "dag_id": "sales\n"}, ["dag_id"], id="dag id with newline"),
        pytest.param({**document(), "dag_id": "../../etc"}, ["dag_id", "../../etc"], id="dag id as path"),
        pytest.param(document(bash("x" * 201)), ["task_id"], id="long id"),
        pytest.param(document(bash("-a")), ["task_id", "-a"], id="id starts with dash"),
        pytest.param({**document(), "tasks": []}, ["tasks: is empty", "at least one"], id="no task"),
        pytest.param(document(BASH, BASH), ["'a'", "more than once"], id="same id twice"),
        pytest.param(document({**BASH, "type": "perl"}), ["'a'", "type", "perl", "bash"], id="unknown type"),
        pytest.param(document({**BASH, "retries": 101}), ["'a'", "retries", "101", "100"], id="retries high"),
        pytest.param(document({**BASH, "retries": "3"}), ["'a'", "retries", "3"], id="retries as text"),
        pytest.param(document({**BASH, "retries": True}), ["'a'", "retries"], id="retries as boolean"),
        pytest.param(document({**BASH, "retry_delay_seconds": -1}), ["retry_delay_seconds", "-1"], id="delay"),
        pytest.param(document({**BASH, "execution_timeout_seconds": 0}), ["execution_timeout_seconds"], id="timeout"),
        pytest.param(document({**BASH, "trigger_rule": "any"}), ["'a'", "trigger_rule", "any", "all_done"], id="rule"),
        pytest.param(document({**BASH, "execution_mode": "inline"}), ["'a'", "execution_mode", "http_api"], id="mode"),
        pytest.param(document({**BASH, "entrypoint": " "}), ["'a'", "entrypoint", "command"], id="bash entrypoint"),
        pytest.param(
            document({**PYTHON, "entrypoint": "dag"}), ["'p'", "entrypoint", "'dag'", "module:callable"], id="py"
        ),
        pytest.param(document({"task_id": "h", "type": "http_api"}), ["'h'", "http_request", "missing"], id="http"),
        pytest.param(
            document({**BASH, "http_request": HTTP["http_request"]}), ["'a'", "http_request"], id="stray http"
        ),
        pytest.param(document(bash("a", "nobody")), ["'a'", "depends_on", "'nobody'"], id="unknown upstream"),
        pytest.param(document(bash("a", "a")), ["'a' → 'a'"], id="waits for itself"),
        pytest.param(
            document({**PYTHON, "xcom_input": {"x": "nobody"}}), ["'p'", "xcom_input", "'nobody'"], id="unknown input"
        ),
        pytest.param(
            document(BASH, {**PYTHON, "xcom_input": {"x": "a"}}),
            ["'p'", "xcom_input", "'x'", "'a'", "depends_on"],
            id="an input that does not run before",
        ),
        pytest.param(
            document(BASH, {**PYTHON, "depends_on": ["a"], "xcom_input": {"x": ["a", "nobody"]}}),
            ["'p'", "xcom_input", "'nobody'"],
            id="unknown input in a list",
        ),
        pytest.param(
            document(BASH, {**BASH, "task_id": "b"}, {**PYTHON, "depends_on": ["a"], "xcom_input": {"x": ["a", "b"]}}),
            ["'p'", "xcom_input", "'x'", "'b'", "depends_on"],
            id="input that is no ancestor",
        ),
        pytest.param(
            document({**PYTHON, "xcom_schema": {"type": "objekt"}}), ["'p'", "xcom_schema", "JSON Schema"], id="schema"
        ),
        pytest.param(document({**BASH, "env": {"A=B": "1"}}), ["'a'", "env", "A=…"], id="env name"),
        pytest.param(
            document(BASH, {**PYTHON, "depends_on": ["a"], "xcom_input": {"p": "a", "P": "a"}}),
            ["'p': xcom_input: the parameters 'p' and 'P' are one variable, LEOFLOW_XCOM_P"],
            id="one parameter twice",
        ),
        pytest.param(document({**BASH, "secrets": [{"name": "X", "source": "post-it"}]}), ["secrets"], id="secret"),
        pytest.param(document("a"), ["tasks[0]"], id="task that is no object"),
    ],
)
def test_a_broken_rule_is_named(broken: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(InvalidDag) as caught:
        load_dag(json.dumps(broken).encode())
    for words in ["dag.json: ", *says]:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        (document({**BASH, "retries": "3"}), "dag.json: task 'a': retries: Input should be a valid integer (got '3')"),
        (
            document(staging={"enabled": True, "size": "big"}),
            "dag.json: staging.size: 'big' is not a Kubernetes quantity; write for example 500m, 2, 128Mi or 1Gi "
            "(got 'big')",
        ),
    ],
)
def test_one_mistake_is_one_sentence(broken: dict[str, Any], whole: str) -> None:
    with pytest.raises(InvalidDag) as caught:
        load_dag(json.dumps(broken).encode())
    assert str(caught.value) == whole


def test_a_missing_key_is_named() -> None:
    for key in ("schema_version", "dag_id", "dag_version", "tasks"):
        broken = document()
        del broken[key]
        with pytest.raises(InvalidDag, match=key):
            load_dag(json.dumps(broken).encode())


def test_a_cycle_is_printed_in_the_order_of_depends_on() -> None:
    with pytest.raises(InvalidDag) as caught:
        load(bash("a", "c"), bash("b", "a"), bash("c", "b"), bash("alone"))
    circle = str(caught.value)
    assert any(text in circle for text in ("'a' → 'c' → 'b' → 'a'", "'c' → 'b' → 'a' → 'c'", "'b' → 'a' → 'c' → 'b'"))
    assert "alone" not in circle


def test_an_input_from_a_distant_ancestor_is_fine() -> None:
    dag = load(bash("a"), bash("b", "a"), bash("c", "b", xcom_input={"x": "a"}))
    assert dag.order == ("a", "b", "c")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "line 1 column 2: is not JSON"),
        (b"\xff{}", "is not UTF-8 text"),
        (b"[]", "is not a JSON object"),
        (b'{"dag_id": "a", "dag_id": "b"}', "key 'dag_id' is given twice"),
        (b'{"x": NaN}', "NaN is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_text_that_is_no_json_object_is_an_error(content: bytes, says: str) -> None:
    with pytest.raises(InvalidDag, match=r"dag\.json: ") as caught:
        load_dag(content)
    assert says in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidDag, match=r"nowhere\.json: cannot be read: No such file"):
        load_dag(tmp_path / "nowhere.json")
    with pytest.raises(InvalidDag, match="cannot be read: Is a directory"):
        load_dag(tmp_path)
    (tmp_path / "bad.json").write_text(json.dumps(document(surprise=1)))
    with pytest.raises(InvalidDag, match=r"bad\.json: surprise"):
        load_dag(str(tmp_path / "bad.json"))


def test_no_secret_value_is_repeated() -> None:
    with pytest.raises(InvalidDag) as caught:
        load({**BASH, "env": {"TOKEN": "canary\x00"}})
    assert "canary" not in str(caught.value)


def test_a_request_carries_everything_of_its_task() -> None:
    task = {
        **PYTHON,
        "depends_on": ["a"],
        "env": {"A": "1"},
        "call_args": {"n": 2},
        "secrets": [{"name": "TOKEN", "source": "env"}],
        "execution": {"image_pull_policy": "Never"},
        "xcom_input": {"x": "a"},
        "xcom_schema": {"type": "integer"},
    }
    dag = load(
        BASH,
        task,
        source="x = 1",
        default_args={"execution_timeout_seconds": 7},
        staging={"enabled": True, "size": "2Gi", "storage_class": "fast"},
    )
    request = task_request(dag, "p", "run 1", try_number=3, tenant_id="acme")
    assert request.task_instance_id == task_instance_id("acme", "sales", "run 1", "p")
    assert (request.tenant_id, request.dag_id, request.dag_version) == ("acme", "sales", "v1")
    assert (request.run_id, request.task_id, request.try_number) == ("run 1", "p", 3)
    assert (request.operator, request.entrypoint, request.image) == (Operator.PYTHON, "dag:extract", "img")
    assert (request.timeout_seconds, request.source, request.execution_mode) == (7, "x = 1", "pod")
    assert (request.env, request.call_args, request.xcom_input) == ({"A": "1"}, {"n": 2}, {"x": "a"})
    assert request.secrets[0].name == "TOKEN"
    assert request.xcom_schema == {"type": "integer"}
    assert request.image_pull_policy == "Never"
    assert (request.staging_size, request.staging_storage_class) == ("2Gi", "fast")
    assert request.staging_claim.startswith("leoflow-staging-sales-run-1")


def test_without_staging_no_claim_is_asked_for() -> None:
    assert task_request(load(), "a", "r").staging_claim == ""


def test_task_instance_ids_are_stable_and_different() -> None:
    parts = [
        ("t", "d", "r", "x"),
        ("u", "d", "r", "x"),
        ("t", "e", "r", "x"),
        ("t", "d", "s", "x"),
        ("t", "d", "r", "y"),
    ]
    ids = [task_instance_id(*part) for part in parts]
    assert len(set(ids)) == len(ids)
    assert ids == [task_instance_id(*part) for part in parts]
    assert "/" not in "".join(ids)


def test_a_run_id_that_cannot_be_a_file_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="run_id"):
        task_request(load(), "a", "../../etc")
