"""run and submit: exit codes, what is printed where, how a run is picked up again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from leoflow_celery.cli import runs
from leoflow_celery.domain.clear import KeptDag
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import RunState
from leoflow_celery.errors import NotFound
from leoflow_celery.lite.dag import Dag
from leoflow_celery.settings import Settings
from leoflow_celery.testing.scripted import End, ScriptedClient, ScriptedRun
from tests.unit.cli.conftest import Cli

TASK = {"task_id": "a", "type": "bash", "entrypoint": "true"}


@dataclass
class WholeClient(ScriptedClient):
    """The scripted client with the rest of what the command uses."""

    settings: Settings = field(default_factory=Settings)
    closed: bool = False
    kept: dict[str, KeptDag] = field(default_factory=dict)

    def create_run(
        self, dag_id: str, run_id: str, tenant_id: str = "default", dag_version: str = "", dag: Dag | None = None
    ) -> ScriptedRun:
        if dag is not None:
            self.kept[run_id] = KeptDag(json.loads(dag.model_dump_json(exclude_unset=True)))
        return super().create_run(dag_id, run_id, tenant_id, dag_version, dag)

    def dag_of(self, _dag_id: str, run_id: str, _tenant_id: str = "default") -> KeptDag:
        try:
            return self.kept[run_id]
        except KeyError as error:
            raise NotFound(run_id) from error

    def xcoms(self, *_: str) -> list[tuple[str, str, Any, float]]:
        return [("a", "return_value", {"rows": 3}, 0.0)]

    def logs(self, *_: object) -> Iterator[dict[str, Any]]:
        yield from ({"msg": f"line {number}"} for number in range(9))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> WholeClient:
    client = WholeClient()
    monkeypatch.setattr("leoflow_celery.cli.runs.open_client", lambda: client)
    monkeypatch.setattr("leoflow_celery.lite.driver.Pace", lambda: client.pace)
    return client


@pytest.fixture
def dag_file(tmp_path: Path) -> Path:
    return write_dag(tmp_path, TASK)


def write_dag(directory: Path, *tasks: dict[str, Any]) -> Path:
    path = directory / "dag.json"
    head = {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": "i"}
    path.write_text(json.dumps({**head, "tasks": list(tasks)}))
    return path


def test_a_successful_run_exits_0_and_prints_its_values_on_stdout(
    cli: Cli, client: WholeClient, dag_file: Path
) -> None:
    result = cli("run", str(dag_file), "--run-id", "r7")
    assert result.code == 0
    assert result.out == 'a.return_value = {"rows": 3}\n'
    progress = [line.split(" ", 1)[1] for line in result.err.splitlines()]
    assert progress == ["run r7 of d started", "a: running", "a: success after 1.00 s", "run ended: success"]
    assert client.closed


def test_a_failed_run_exits_1_and_says_why(cli: Cli, client: WholeClient, dag_file: Path) -> None:
    client.script = {"a": [End.failed(FailureReason.OOM_KILLED)]}
    result = cli("run", str(dag_file))
    assert result.code == 1
    assert "a failed (oom_killed)" in result.err
    assert "    line 8" in result.err
    assert "line 3\n" not in result.err  # the end of the log is enough


def test_ctrl_c_leaves_the_run_alone_and_says_how_to_go_on(
    cli: Cli, client: WholeClient, dag_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = client.pause

    def interrupted(seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pause(seconds)

    monkeypatch.setattr(client, "pause", interrupted)
    result = cli("run", str(dag_file), "--run-id", "r7")
    assert result.code == 130
    assert "--run-id r7" in result.err
    assert "leoflow cancel d r7" in result.err
    monkeypatch.setattr(client, "pause", pause)
    assert client.run("d", "r7").state is RunState.RUNNING
    again = cli("run", str(dag_file), "--run-id", "r7")
    assert again.code == 0
    assert "run r7 of d resumed" in again.err
    assert client.started == [("a", 1)]


def test_a_run_that_ended_starts_nothing_and_takes_no_other_file(
    cli: Cli, client: WholeClient, dag_file: Path, tmp_path: Path
) -> None:
    assert cli("run", str(dag_file), "--run-id", "r7").code == 0
    again = cli("run", str(dag_file), "--run-id", "r7")
    assert again.code == 0
    assert "run r7 of d had ended before: nothing is started" in again.err
    write_dag(tmp_path, TASK, {**TASK, "task_id": "b"})
    refused = cli("run", str(dag_file), "--run-id", "r7")
    assert refused.code == 2
    assert "--run-id: run 'r7' of dag 'd' (success) was started with another content" in refused.err
    assert f"'leoflow retry d r7 --dag {dag_file}'" in refused.err
    assert client.started == [("a", 1)]


def test_an_inline_call_that_asks_for_too_much_time_is_refused_before_the_run(
    cli: Cli, client: WholeClient, tmp_path: Path
) -> None:
    call = {"task_id": "slow", "type": "http_api", "http_request": {"method": "GET", "url": "http://localhost/"}}
    result = cli("run", str(write_dag(tmp_path, TASK, {**call, "execution_timeout_seconds": 301})))
    assert result.code == 2
    assert "task 'slow': timeout_seconds: 301" in result.err
    assert "execution_mode: pod" in result.err
    assert client.started == []


def test_a_secret_that_nobody_would_resolve_is_refused_before_the_run(
    cli: Cli, client: WholeClient, tmp_path: Path
) -> None:
    late = {**TASK, "task_id": "b", "depends_on": ["a"], "secrets": [{"name": "TOKEN", "source": "vault"}]}
    result = cli("run", str(write_dag(tmp_path, TASK, late)))
    assert result.code == 2
    assert "task 'b': secrets.0.source: 'vault' of 'TOKEN' is not resolved" in result.err
    assert client.started == []


def test_new_run_ids_are_different_and_valid_everywhere() -> None:
    ids = {runs.new_run_id() for _ in range(50)}
    assert len(ids) == 50
    assert all(run_id.replace("-", "").isalnum() and run_id == run_id.lower() for run_id in ids)


def test_a_huge_value_is_cut_and_the_whole_is_pointed_to(
    cli: Cli, client: WholeClient, dag_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "xcoms", lambda *_: [("a", "return_value", "x" * 50_000, 0.0)])
    result = cli("run", str(dag_file))
    assert len(result.out) < 2_200
    assert "50002 characters" in result.out


def test_a_request_file_that_cannot_be_read(cli: Cli, settings: Settings) -> None:
    result = cli("submit", "nowhere.json")
    assert result.code == 2
    assert "nowhere.json: cannot be read: No such file" in result.err
