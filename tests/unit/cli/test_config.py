"""config: every setting, where it comes from, and no secret; what a shell completes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leoflow_celery.cli import complete
from leoflow_celery.cli.config import masked
from leoflow_celery.client import Client
from leoflow_celery.settings import Settings, variables
from tests.unit.cli.conftest import Cli
from tests.unit.cli.test_tasks import request_of


def shown(cli: Cli, *arguments: str) -> dict[str, tuple[str, str]]:
    result = cli(*arguments, "config", "--json")
    assert result.code == 0, result.err
    return {one["name"]: (one["value"], one["source"]) for one in json.loads(result.out)}


def test_every_setting_is_shown_with_its_source_and_no_secret(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", "postgresql://u:s3cret@h/db?sslpassword=s3cret2")
    monkeypatch.setenv("LEOFLOW_XCOM_TTL_SECONDS", "60")
    monkeypatch.delenv("LEOFLOW_XCOM_TTL_SECONDS")
    monkeypatch.setenv("LEOFLOW_ENV_FILE", "")  # and taken away again afterwards
    (tmp_path / "e.env").write_text("LEOFLOW_XCOM_TTL_SECONDS=77\n")
    found = shown(cli, "--env-file", str(tmp_path / "e.env"))
    expected = {
        names[0]
        for field in Settings.model_fields.values()
        for names in variables(field.annotation).values()  # type: ignore[arg-type]
    }
    assert found.keys() == expected
    assert found["LEOFLOW_BROKER_URL"] == ("redis://:***@127.0.0.1:1/0", "environment")
    assert found["LEOFLOW_DATABASE_URL"] == ("postgresql://u:***@h/db?sslpassword=***", "environment")
    assert found["LEOFLOW_JWT_SECRET"] == ("***", "environment")
    assert found["LEOFLOW_MAINTENANCE_MAX_RELAUNCHES"] == ("2", "default")
    assert found["LEOFLOW_XCOM_TTL_SECONDS"] == ("77", f"LEOFLOW_ENV_FILE {tmp_path / 'e.env'}")
    result = cli("config", "broker", "--changed")
    names = [line.split()[0] for line in result.out.splitlines()[2:]]
    assert names == ["LEOFLOW_BROKER_URL"]
    assert "s3cret" not in result.out + result.err


def test_what_a_value_may_hide() -> None:
    assert masked("X", "redis://u:a:b/c@h:1/0;redis://:x@g/0") == "redis://u:***@h:1/0;redis://:***@g/0"
    assert masked("X", "redis://h:6379/0") == "redis://h:6379/0"
    assert masked("LEOFLOW_GATEWAY_SECRET_COMMAND", "vault read --token abc") == "vault ***"
    assert masked("X", Path("/a")) == "/a"
    assert masked("X", {"k8s": 3}) == '{"k8s": 3}'


@pytest.fixture
def completed(settings: Settings) -> Settings:
    """Runs of two DAGs; ``sales r1`` has a task."""
    from leoflow_celery.domain.routing import ExecutorType
    from leoflow_celery.store.submissions import NewTry

    with Client(settings) as client:
        client.create_run("sales", "r1")
        client.create_run("sales", "x%1")
        client.create_run("stock", "r9")
        client.services.store.submissions.record([NewTry(request_of("load"), ExecutorType.SUBPROCESS, "sealed")])
    return settings


def words(text: str, **env: str) -> list[str]:
    """What bash is offered at the end of a line."""
    cursor = len(text.split()) - (not text.endswith(" "))
    asked = {"COMP_WORDS": text, "COMP_CWORD": str(cursor), "_LEOFLOW_COMPLETE": "complete_bash"}
    leoflow = Path(sys.executable).with_name("leoflow")
    ended = subprocess.run([leoflow], env={**os.environ, **asked, **env}, capture_output=True, text=True, check=False)
    assert ended.stderr == ""
    return ended.stdout.split()


def test_dags_runs_and_tasks_are_completed(completed: Settings) -> None:
    assert words("leoflow status s") == ["sales", "stock"]
    assert words("leoflow runs st") == ["stock"]
    assert set(words("leoflow tasks sales ")) == {"latest", "r1", "x%1"}
    assert words("leoflow tasks sales x%") == ["x%1"]
    assert words("leoflow retry sales r1 ") == ["load"]
    assert words("leoflow logs sales r1 l") == ["load"]
    assert words("leoflow logs nothing ") == []


def test_a_database_that_cannot_answer_offers_nothing(completed: Settings) -> None:
    assert words("leoflow status s", LEOFLOW_DATABASE_URL="sqlite:////nowhere/x.db") == []
    assert words("leoflow status s", LEOFLOW_DATABASE_URL="postgresql://u:p@127.0.0.1:1/x") == []
    assert words("leoflow status s", LEOFLOW_ENV_FILE="/nowhere") == []


def test_completing_loads_none_of_the_large_libraries(completed: Settings) -> None:
    """They alone would take longer than a person waits for a tab."""
    code = (
        "import sys, time; from leoflow_celery.cli import main; from leoflow_celery.cli import complete\n"
        "class Context:\n    params = {}\n    def find_root(self): return self\n"
        "assert complete.dags(Context(), 's') == ['sales', 'stock']\n"
        "print([one for one in ('pydantic', 'sqlalchemy', 'celery', 'kombu') if one in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_completion_is_quick_however_many_runs_there_are(completed: Settings) -> None:
    import time
    from types import SimpleNamespace

    import sqlalchemy as sa

    from leoflow_celery.store import Store
    from leoflow_celery.store.models import DagRun, table_of

    now = time.time()
    rows = [
        {
            "tenant_id": "default",
            "dag_id": f"dag{n % 40}",
            "run_id": f"run-{n}",
            "dag_version": "",
            "state": "success",
            "started_at": now + n,
            "sealed_dag": "x" * 2_000,
        }
        for n in range(20_000)
    ]
    store = Store(completed)
    with store.database.transaction() as connection:
        connection.execute(sa.insert(table_of(DagRun)), rows)
    store.close()
    context = SimpleNamespace(params={}, find_root=lambda: SimpleNamespace(params={}))
    before = time.process_time()
    assert len(complete.dags(context, "dag")) == 40  # type: ignore[arg-type]
    assert complete.targets(SimpleNamespace(**{**vars(context), "params": {"target": ["dag7"]}}), "run-")[0] == (  # type: ignore[arg-type]
        "run-19967"
    )
    assert time.process_time() - before < 0.2


def test_a_word_that_no_setting_has_is_said(cli: Cli) -> None:
    refused = cli("config", "nosuch")
    assert (refused.code, refused.out) == (2, "")
    assert "WORD: no setting's name holds 'nosuch'; 'leoflow config' lists all" in refused.err
    assert "every setting is the default" in cli("config", "lease_seconds", "--changed").err
