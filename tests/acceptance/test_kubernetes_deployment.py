"""The manifests, really deployed: every process becomes ready, and a DAG runs through in-cluster credentials alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from leoflow_celery.client import Client
from leoflow_celery.settings import Settings
from tests.support.cluster import Cluster
from tests.support.images import system_image, task_image
from tests.support.kubernetes_deployment import Deployment
from tests.support.redis_server import RedisServer
from tests.support.system import environment
from tests.support.waiting import wait_until

QUICK = {
    "MAINTENANCE_INTERVAL_SECONDS": 2,
    "KUBERNETES_FINISHED_GRACE_SECONDS": 2,
    # The processes of this test share a machine with its pods.
    "BROKER_SOCKET_TIMEOUT_SECONDS": 20,
    "BROKER_CONNECT_TIMEOUT_SECONDS": 20,
}


@pytest.fixture
def deployment(
    cluster: Cluster, tmp_path: Path, shared_redis: RedisServer, request: pytest.FixtureRequest
) -> Iterator[Deployment]:
    image = system_image()
    postgres = request.getfixturevalue("postgres")
    url = postgres.empty()
    with cluster.namespace(tmp_path) as system, cluster.namespace(tmp_path, {"leoflow.io/namespace": "tasks"}) as tasks:
        made = Deployment(tmp_path, system, tasks, shared_redis.url(), url)
        try:
            made.apply(image, **QUICK)
            yield made
        finally:
            made.close()
    postgres.drop(url)


def settings_of(deployment: Deployment) -> dict[str, str]:
    """What a scheduler outside the cluster has."""
    return {
        "LEOFLOW_BROKER_URL": deployment.broker_url,
        "LEOFLOW_DATABASE_URL": deployment.database_url,
        "LEOFLOW_JWT_SECRET": deployment.keys["jwt-secret"],
        "LEOFLOW_SEAL_KEYS": deployment.keys["seal-keys"],
        "LEOFLOW_CONTROL_PLANE_ADDR": f"{deployment.gateway.host}:{deployment.gateway.port}",
        "LEOFLOW_EXECUTOR_TYPE": "kubernetes",
    }


@pytest.mark.timeout(900)
def test_the_deployed_system_becomes_ready_and_runs_a_dag_of_pods(deployment: Deployment, tmp_path: Path) -> None:
    deployment.wait_until_ready()
    tasks = [
        {"task_id": "first", "type": "bash", "entrypoint": 'echo 21 >"$LEOFLOW_RETURN_VALUE_PATH"'},
        {
            "task_id": "second",
            "type": "bash",
            "entrypoint": 'echo $((2 * LEOFLOW_XCOM_HALF)) >"$LEOFLOW_RETURN_VALUE_PATH"',
            "depends_on": ["first"],
            "xcom_input": {"half": "first"},
        },
    ]
    dag = {"schema_version": "1.0", "dag_id": "deployed", "dag_version": "1", "image": task_image(), "tasks": tasks}
    (tmp_path / "dag.json").write_text(json.dumps(dag))
    command = [sys.executable, "-m", "leoflow_celery.cli", "run", str(tmp_path / "dag.json"), "--run-id", "one"]
    env = {**os.environ, **settings_of(deployment)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}\n{deployment.logs()}"
    with environment(settings_of(deployment)), Client(Settings.load()) as client:
        assert client.xcom("deployed", "one", "second") == 42
        places = {view.back_end for view in client.task_instances("deployed", "one")}
    assert places == {f"kubernetes/{deployment.tasks.name}"}
    wait_until(lambda: not deployment.tasks.leftovers(), 120, lambda: str(deployment.tasks.leftovers()), 0.5)

    flower = f"http://{deployment.pod_address('flower')}:5555/api/workers"
    assert requests.get(flower, timeout=30).status_code == 401
    wait_until(lambda: workers(flower, deployment.password) >= {"k8s", "control", "inline"}, 60, "Flower knows all", 1)


def workers(url: str, password: str) -> set[str]:
    """The kinds of workers that Flower has heard of."""
    answer = requests.get(url, params={"refresh": "1"}, auth=("admin", password), timeout=30)
    return {name.partition("@")[0] for name in answer.json()} if answer.ok else set()
