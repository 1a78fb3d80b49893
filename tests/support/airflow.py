"""A real Airflow in its own environment (``make`` installs it into .venv-airflow), over PostgreSQL."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import psycopg
from cryptography.fernet import Fernet
from sqlalchemy.engine import make_url

from tests.support.ports import free_port
from tests.support.process import ManagedProcess
from tests.support.requirements import require
from tests.support.system import System
from tests.support.waiting import wait_until

VENV = Path(os.environ.get("LEOFLOW_TEST_AIRFLOW_VENV") or Path(__file__).parents[2] / ".venv-airflow")
PYTHON = VENV / "bin" / "python"
OURS = "leoflow_celery.airflow.LeoflowExecutor"
_START_SECONDS = 90
_TRIGGER = """
import sys
from airflow.api.common.trigger_dag import trigger_dag
from airflow.models.dag import DagModel
from airflow.utils.session import create_session
from airflow.utils.types import DagRunTriggeredByType
run_id, *dag_ids = sys.argv[1:]
for dag_id in dag_ids:
    with create_session() as session:
        session.query(DagModel).filter(DagModel.dag_id == dag_id).update({"is_paused": False})
    trigger_dag(dag_id=dag_id, triggered_by=DagRunTriggeredByType.TEST, run_id=run_id)
"""


def require_airflow() -> None:
    """Skip the running test where Airflow is not installed."""
    if not (VENV / "bin" / "airflow").exists():
        require("airflow-scheduler", f"no Airflow in {VENV}; 'make test-airflow' installs it")


class Airflow:
    """One installation of Airflow. Its processes are those of a ``System``, and end with it."""

    def __init__(self, system: System, database_url: str, dags: Path, executor: str = OURS, **config: object) -> None:
        """``config`` are options as ``SECTION__KEY``; ``dags`` is a directory."""
        self.system, self.port = system, free_port()
        self.home = system.directory / "airflow"
        self.home.mkdir(exist_ok=True)
        url = make_url(database_url)
        self._url = url.set(drivername="postgresql").render_as_string(hide_password=False)
        options: dict[str, object] = {
            "CORE__EXECUTOR": executor,
            "CORE__DAGS_FOLDER": dags,
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__FERNET_KEY": Fernet.generate_key().decode(),
            "CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{self.port}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "CORE__PARALLELISM": 16,
            "DATABASE__SQL_ALCHEMY_CONN": url.set(drivername="postgresql+psycopg2").render_as_string(
                hide_password=False
            ),
            "API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "API__SECRET_KEY": secrets.token_hex(16),
            "API__WORKERS": 1,
            "LOGGING__LOGGING_CONFIG_CLASS": "leoflow_celery.airflow.logs.LOGGING_CONFIG",
            # A scheduler that was killed is found dead, and its tasks are adopted, within seconds.
            "SCHEDULER__SCHEDULER_HEARTBEAT_SEC": 1,
            "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": 6,
            "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": 3,
            "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": 0.2,
            "DAG_PROCESSOR__REFRESH_INTERVAL": 5,
            "USAGE_DATA_COLLECTION__ENABLED": "False",
            **config,
        }
        self.env = {
            "AIRFLOW_HOME": str(self.home),
            "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
            "PYTHONWARNINGS": "ignore",
            "_AIRFLOW__STARTUP": "",
            **{f"AIRFLOW__{name}": str(value) for name, value in options.items()},
        }
        self.command("db", "migrate")

    # -- processes ----------------------------------------------------------------------------------------------

    def command(self, *words: str) -> str:
        """Run ``airflow …`` to its end; what it printed."""
        ended = subprocess.run(
            [PYTHON, "-m", "airflow", *words],
            env={**os.environ, **self.system.env, **self.env},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def start(self, name: str, *words: str, as_name: str = "") -> ManagedProcess:
        return self.system.start(as_name or name, PYTHON, "-m", "airflow", name, *words, env=self.env)

    def start_api_server(self) -> ManagedProcess:
        server = self.start("api-server", "--port", str(self.port), "--host", "127.0.0.1")
        server.wait_for_port(self.port, _START_SECONDS)
        return server

    def start_scheduler(self, name: str = "scheduler") -> ManagedProcess:
        return self.start("scheduler", as_name=name)

    def start_dag_processor(self, *words: str) -> ManagedProcess:
        return self.start("dag-processor", *words)

    # -- asking -------------------------------------------------------------------------------------------------

    def query(self, text: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of Airflow's own database."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            return connection.execute(text, values).fetchall()

    def wait_for_dags(self, *dag_ids: str) -> None:
        wanted = set(dag_ids)
        query = "SELECT dag_id FROM serialized_dag"
        wait_until(lambda: wanted <= {one for (one,) in self.query(query)}, _START_SECONDS, f"{wanted} are parsed")

    def trigger(self, run_id: str, *dag_ids: str) -> None:
        """One run of each of these DAGs, which are not paused any more."""
        self.python(_TRIGGER, run_id, *dag_ids)

    def python(self, code: str, *arguments: str) -> str:
        """Run Python in Airflow's environment; what it printed."""
        ended = subprocess.run(
            [PYTHON, "-c", code, *arguments],
            env={**os.environ, **self.system.env, **self.env},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def run_state(self, dag_id: str, run_id: str) -> str:
        found = self.query("SELECT state FROM dag_run WHERE dag_id = %s AND run_id = %s", dag_id, run_id)
        return str(found[0][0]) if found else ""

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str]:
        """State of each task instance, ``task[index]`` of mapped ones."""
        query = "SELECT task_id, map_index, state FROM task_instance WHERE dag_id = %s AND run_id = %s"
        rows = self.query(query, dag_id, run_id)
        return {task if index < 0 else f"{task}[{index}]": str(state) for task, index, state in rows}

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1) -> list[str]:
        """The lines of a task's log as the API server gives them to the UI; their texts."""
        path = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        answer = json.loads(self._get(path, self._token()))
        return [one["event"] if isinstance(one, dict) else one for one in answer["content"]]

    def _token(self) -> str:
        return str(json.loads(self._get("/auth/token"))["access_token"])

    def _get(self, path: str, token: str = "") -> bytes:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - our own server
            return bytes(answer.read())

    def wait_for_run(self, dag_id: str, run_id: str, timeout: float = 120) -> str:
        return wait_until(
            lambda: state if (state := self.run_state(dag_id, run_id)) in ("success", "failed") else None,
            timeout,
            f"{dag_id} {run_id} has ended",
        )


def start_ours(system: System) -> None:
    """The processes of ours that run Airflow's tasks on this host."""
    system.start_gateway()
    env = {"LEOFLOW_PYTHON": str(PYTHON)}
    for module in ("workers.control", "workers.subprocess"):
        system.start_worker(module, env=env)
    system.start_beat()
