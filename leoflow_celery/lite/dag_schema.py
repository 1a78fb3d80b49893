"""What each key of a dag.json means, with an example: the JSON Schema and ``docs/dag.md`` say the same, from here."""

from __future__ import annotations

import json
from typing import Any

from leoflow_celery.lite.dag import Dag

SCHEMA_ID = "urn:leoflow:dag:1.0"

#: Object → key → (meaning, example).
KEYS: dict[str, dict[str, tuple[str, Any]]] = {
    "Dag": {
        "schema_version": ("The version of this format.", "1.0"),
        "dag_id": ("The name of the DAG: letters, digits, `_` and `-`, at most 200.", "sales"),
        "dag_version": ("Any text that tells two versions of the DAG apart.", "2026-11-27"),
        "image": (
            "The image of every task. Needed in pods and containers only, and there only where the queue has no "
            "`default_image` (`LEOFLOW_KUBERNETES_DEFAULT_IMAGE`, `LEOFLOW_DOCKER_DEFAULT_IMAGE`).",
            "registry.example.com/sales:7",
        ),
        "tasks": ("The tasks, at least one, in any order.", [{"task_id": "a", "type": "bash", "entrypoint": "true"}]),
        "description": ("What the DAG is for.", "Sales of a day, in euros."),
        "owner": ("Who answers for it.", "analytics"),
        "tags": ("Words to find it by.", ["daily", "money"]),
        "schedule": ("When the scheduler starts runs; one run does not use it.", "0 6 * * *"),
        "schedule_timezone": ("The time zone of the schedule; the scheduler's.", "Europe/Berlin"),
        "start_date": ("No run before it; the scheduler's.", "2026-01-01"),
        "end_date": ("No run after it; the scheduler's.", "2027-01-01"),
        "max_active_runs": ("Runs at a time; the scheduler's.", 1),
        "catchup": ("Whether missed runs are made up for; the scheduler's.", False),
        "default_args": ("What a task takes when it says nothing itself.", {"retries": 2, "retry_delay_seconds": 60}),
        "staging": ("One volume that the tasks of a run share.", {"enabled": True, "size": "1Gi"}),
        "source": ("The text of `dag.py`, which python tasks import as `dag`.", "def f():\n    return 1\n"),
    },
    "TaskSpec": {
        "task_id": ("The name of the task: letters, digits, `_` and `-`, at most 200.", "load"),
        "type": ("`python` calls a function, `bash` runs a command, `http_api` makes a call.", "bash"),
        "depends_on": ("The tasks that it waits for.", ["first"]),
        "trigger_rule": ("What they must have become for it to start.", "all_done"),
        "retries": ("How often it is tried again after a failure, 0 to 100.", 3),
        "retry_delay_seconds": ("The pause before each further try.", 30),
        "execution_timeout_seconds": ("A try that takes longer is stopped.", 600),
        "execution_mode": (
            "`inline`: the control plane makes the call of an http_api task; `pod`: an agent does. python and bash are "
            "always `pod`.",
            "pod",
        ),
        "agent": (
            "`inject`: our agent is put into the container of an image that has none; `image`: the image has it. The "
            "queue's setting by default.",
            "inject",
        ),
        "entrypoint": ("python: `module:callable`; bash: the command.", "echo hello"),
        "http_request": ("http_api: the call.", {"method": "GET", "url": "https://example.com/orders"}),
        "env": ("Environment variables of the task.", {"REGION": "north"}),
        "call_args": ("python: parameter → any JSON value; http_api: `{{ args.NAME }}`.", {"limit": 10}),
        "secrets": ("Secrets that become environment variables.", [{"name": "API_KEY", "source": "env"}]),
        "resources": (
            "What is reserved and what is enforced.",
            {"requests": {"cpu": "500m"}, "limits": {"memory": "1Gi"}},
        ),
        "execution": ("Where and as whom it runs.", {"node_selector": {"disk": "ssd"}}),
        "xcom_input": (
            "Parameter → the task whose result it gets, or a list of tasks: then it gets the list of their results in "
            "that order, `null` for one that left none.",
            {"rows": "first", "parts": ["first"]},
        ),
        "xcom_schema": ("A JSON Schema that the result must fit.", {"type": "object", "required": ["total"]}),
    },
    "DefaultArgs": {
        "retries": ("How often a task is tried again after a failure, 0 to 100.", 2),
        "retry_delay_seconds": ("The pause before each further try.", 60),
        "execution_timeout_seconds": ("A try that takes longer is stopped.", 3600),
    },
    "Staging": {
        "enabled": ("Whether runs have the volume.", True),
        "size": ("How large, as a Kubernetes quantity.", "10Gi"),
        "storage_class": ("The storage class of the cluster.", "fast"),
    },
    "HttpRequest": {
        "method": ("GET, POST, PUT, PATCH or DELETE.", "POST"),
        "url": ("The address; it may hold placeholders.", "https://example.com/orders/{{ args.id }}"),
        "headers": ("Name → value, with placeholders.", {"Accept": "application/json"}),
        "body": ("Text, or any JSON, with placeholders in its strings.", {"rows": "{{ xcom.rows }}"}),
        "timeout_seconds": ("For one attempt of the call.", 10),
        "success_status_codes": ("What counts as success.", [200, 202]),
        "attempts": ("How often the call is made at the most, 1 to 10.", 2),
        "show_path": ("Whether logs and errors may name the path of the URL.", True),
    },
    "Resources": {
        "requests": ("What the scheduler reserves.", {"cpu": "1", "memory": "512Mi"}),
        "limits": ("What is enforced.", {"cpu": "2", "memory": "1Gi"}),
    },
    "ResourceList": {
        "cpu": ("Processor time, as a Kubernetes quantity.", "500m"),
        "memory": ("Memory, as a Kubernetes quantity.", "1Gi"),
    },
    "SecretReference": {
        "name": ("The environment variable.", "API_KEY"),
        "source": ("`env`: the gateway's back ends; `vault`, `k8s_secret`: the executor's.", "env"),
        "reference": ("The name there, when it is another.", "sales-api-key"),
    },
    "Execution": {
        "node_selector": ("Labels that the node must have.", {"disk": "ssd"}),
        "tolerations": ("Taints that the pod tolerates.", [{"key": "gpu", "operator": "Exists"}]),
        "service_account": ("As whom the pod runs.", "loader"),
        "image_pull_policy": ("Always, IfNotPresent or Never.", "IfNotPresent"),
        "affinity": ("A Kubernetes Affinity object.", {"nodeAffinity": {}}),
        "image_pull_secrets": ("Names of Secrets, added to those of the queue.", ["registry"]),
        "termination_grace_seconds": ("Between SIGTERM and SIGKILL, 0 to 3600.", 60),
    },
    "Toleration": {
        "key": ("The key of the taint.", "gpu"),
        "operator": ("Exists or Equal.", "Equal"),
        "value": ("The value of the taint, for Equal.", "a100"),
        "effect": ("NoSchedule, PreferNoSchedule or NoExecute.", "NoSchedule"),
        "tolerationSeconds": ("How long NoExecute is tolerated.", 300),
    },
}


def dag_json_schema() -> dict[str, Any]:
    """The JSON Schema of a dag.json: ``$id``, ``$schema``, and a description and example of every key."""
    schema = Dag.model_json_schema()
    for name, part in [("Dag", schema), *schema["$defs"].items()]:
        for key, (meaning, example) in KEYS.get(name, {}).items():
            part["properties"][key] |= {"description": meaning, "examples": [example]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, "title": "dag.json"}
    return {**head, **{key: value for key, value in schema.items() if key != "title"}}


def key_table(name: str) -> str:
    """The keys of one object as a Markdown table."""
    required = Dag.model_json_schema()
    needed = (required if name == "Dag" else required["$defs"][name]).get("required", ())
    rows = []
    for key, (meaning, example) in KEYS[name].items():
        text = json.dumps({key: example}, ensure_ascii=False)[1:-1]
        rows.append(f"| `{key}`{'*' if key in needed else ''} | {meaning} | `{text}` |")
    return "\n".join(["| key | meaning | example |", "|---|---|---|", *rows])
