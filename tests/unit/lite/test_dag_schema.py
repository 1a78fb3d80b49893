"""The documented keys are all keys, each example is accepted, and page, schema file and code say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from leoflow_celery.lite.dag import Dag, load_dag
from leoflow_celery.lite.dag_schema import KEYS, dag_json_schema, key_table

DOCS = Path(__file__).parents[3] / "docs"
FIRST = {"task_id": "first", "type": "bash", "entrypoint": "true"}
CALL = {"method": "GET", "url": "https://example.com/"}
#: Object → where it stands in a task; Dag, DefaultArgs and Staging stand in the DAG itself.
IN_TASK: dict[str, tuple[str, ...]] = {
    "TaskSpec": (),
    "HttpRequest": ("http_request",),
    "Resources": ("resources",),
    "ResourceList": ("resources", "limits"),
    "Execution": ("execution",),
}


def whole(name: str, key: str, example: Any) -> dict[str, Any]:
    """A dag.json in which the key has the value of its example."""
    dag: dict[str, Any] = {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "tasks": [FIRST]}
    if name == "Dag":
        return {**dag, key: example}
    if name in ("DefaultArgs", "Staging"):
        return {**dag, {"DefaultArgs": "default_args", "Staging": "staging"}[name]: {key: example}}
    task: dict[str, Any] = {**FIRST, "task_id": "second", "depends_on": ["first"]}
    if name == "HttpRequest" or key in ("execution_mode", "http_request"):
        del task["entrypoint"]
        task |= {"type": "http_api", "http_request": dict(CALL)}
        if name == "HttpRequest" and "{{" in json.dumps(example):
            task |= {"xcom_input": {"rows": "first"}} if "xcom" in json.dumps(example) else {"call_args": {"id": 1}}
    if name == "SecretReference":
        return {**dag, "tasks": [FIRST, {**task, "secrets": [{"name": "A", "source": "env", key: example}]}]}
    if name == "Toleration":
        return {**dag, "tasks": [FIRST, {**task, "execution": {"tolerations": [{key: example}]}}]}
    place = task
    for step in IN_TASK[name]:
        place = place.setdefault(step, {})
    place[key] = example
    return {**dag, "tasks": [FIRST, task]}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_an_example_of_the_page_is_a_dag_that_loads(name: str, key: str) -> None:
    document = whole(name, key, KEYS[name][key][1])
    load_dag(json.dumps(document).encode())
    jsonschema.validate(document, dag_json_schema())


def test_every_key_has_a_meaning_and_an_example() -> None:
    schema = dag_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (schema["$id"], schema["$schema"].startswith("https://json-schema.org/")) == ("urn:leoflow:dag:1.0", True)
    for name, part in [("Dag", schema), *schema["$defs"].items()]:
        assert set(part.get("properties", {})) == set(KEYS.get(name, {})), name
        assert all(one["description"] and one["examples"] for one in part.get("properties", {}).values())


def test_the_page_and_the_schema_file_are_those_of_the_code() -> None:
    page = (DOCS / "dag.md").read_text()
    for name in KEYS:
        assert key_table(name) in page, f"docs/dag.md has no table of {name} as key_table() writes it"
    for rule in Dag.model_json_schema()["$defs"]["TriggerRule"]["enum"]:
        assert f"| `{rule}` |" in page
    file = json.loads((DOCS / "dag.schema.json").read_text())
    assert file == dag_json_schema(), "run: leoflow schema --dag > docs/dag.schema.json"
