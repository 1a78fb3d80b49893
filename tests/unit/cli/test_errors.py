"""Errors are one line on stderr and exit code 2; passwords stay out of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from leoflow_celery.settings import Settings
from tests.unit.cli.conftest import Cli, Result

REQUEST = {
    "task_instance_id": "ti-1",
    "dag_id": "d",
    "run_id": "r",
    "task_id": "t",
    "operator": "bash",
    "entrypoint": "true",
}


def is_one_line(result: Result) -> bool:
    return result.err.startswith("leoflow: ") and result.err.count("\n") == 1 and "Traceback" not in result.err


def test_a_dag_that_breaks_a_rule(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "dag.json").write_text('{"dag_id": "a b"}')
    for command in (["run"], ["lite", "run"]):
        result = cli(*command, str(tmp_path / "dag.json"))
        assert result.code == 2
        assert is_one_line(result)
        assert "dag.json: " in result.err


def test_a_dag_that_is_not_there(cli: Cli) -> None:
    result = cli("lite", "run", "nowhere.json")
    assert (result.code, is_one_line(result)) == (2, True)
    assert "nowhere.json: cannot be read: No such file or directory" in result.err


def test_an_unreachable_broker_is_named_without_its_password(cli: Cli, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST))
    result = cli("submit", str(tmp_path / "request.json"))
    assert (result.code, is_one_line(result)) == (2, True)
    assert "127.0.0.1:1" in result.err
    assert "s3cret" not in result.err + result.out


def test_an_unreachable_database_is_named_without_its_password(
    cli: Cli, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", "postgresql://u:s3cret@127.0.0.1:1/leoflow")
    result = cli("status", "d", "r")
    assert (result.code, is_one_line(result)) == (2, True)
    assert "127.0.0.1:1" in result.err
    assert "s3cret" not in result.err


def test_a_database_without_tables_names_the_command_that_makes_them(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", f"sqlite:///{tmp_path / 'empty.db'}")
    result = cli("status", "d", "r")
    assert (result.code, is_one_line(result)) == (2, True)
    assert "leoflow db upgrade" in result.err


def test_a_wrong_setting_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEOFLOW_GATEWAY_LEASE_SECONDS", "soon")
    result = cli("status", "d", "r")
    assert (result.code, is_one_line(result)) == (2, True)
    assert "LEOFLOW_GATEWAY_LEASE_SECONDS" in result.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"operator": "perl"}, "operator"),
        ({"entrypoint": ""}, "entrypoint"),
        ({"surprise": 1}, "surprise"),
        ({"resources": {"limits": {"cpu": "lots"}}}, "resources.limits.cpu"),
        ({"run_id": "../../etc"}, "run_id"),
    ],
)
def test_a_request_that_breaks_a_rule(
    cli: Cli, settings: Settings, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    (tmp_path / "request.json").write_text(json.dumps(REQUEST | change))
    result = cli("submit", str(tmp_path / "request.json"))
    assert (result.code, is_one_line(result)) == (2, True)
    assert says in result.err


def test_ctrl_c_and_sigterm_end_with_their_codes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        monkeypatch.setattr(
            "leoflow_celery.security.sealing.fresh_keys", lambda number=number: os.kill(os.getpid(), number)
        )
        result = cli("keys")
        assert result.code == code
        assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dance"], "No such command 'dance'"),
        (["status", "a", "b", "--colour"], "No such option: --colour"),
        (["status"], "Missing argument"),
        (["runs", "--limit", "-1"], "'--limit'"),
        (["runs", "--limit", "9" * 40], "'--limit'"),
        (["runs", "--state", "sleepy"], "'--state'"),
        (["logs", "a", "b", "--try", "0"], "'--try'"),
        (["keys", "--for", "nobody"], "'nobody' is none of k8s"),
    ],
)
def test_a_wrong_word_or_option_is_one_line(cli: Cli, words: list[str], said: str) -> None:
    result = cli(*words)
    assert (result.code, is_one_line(result)) == (2, True), result.err
    assert said in result.err
    assert "--help' says how" in result.err


def test_help_imports_nothing_heavy() -> None:
    heavy = (
        "celery",
        "sqlalchemy",
        "pydantic",
        "grpc",
        "redis",
        "rich.console",
        "requests",
        "leoflow_celery.lite.driver",
    )
    code = f"import sys, leoflow_celery.cli; print([name for name in {heavy!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_more_errors_than_three_say_how_many_more(cli: Cli, tmp_path: Path) -> None:
    task = {"task_id": "a", "type": "bash", "entrypoint": "true"}
    head = {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": ""}
    wrong = {f"key{number}": 1 for number in range(5)}
    (tmp_path / "dag.json").write_text(json.dumps({**head, **wrong, "tasks": [task]}))
    said = cli("run", str(tmp_path / "dag.json")).err
    assert said.count("is not a known key") == 3
    assert said.rstrip().endswith("; and 2 more")


def test_without_any_settings_the_error_names_the_system_that_needs_none(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("runs")
    assert result.code == 2
    assert is_one_line(result)
    assert "'leoflow lite run DAG.json' needs no settings" in result.err


def test_doctor_names_every_check_that_only_takes(cli: Cli) -> None:
    from leoflow_celery.cli.doctor import CHECKS

    text = " ".join(cli("doctor", "--help").out.replace("│", " ").split())
    assert f"Only this check: {', '.join(CHECKS)}." in text


def test_a_run_id_that_no_run_can_have_is_refused_before_anything_starts(cli: Cli, tmp_path: Path) -> None:
    task = {"task_id": "a", "type": "bash", "entrypoint": "true"}
    head = {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": ""}
    (tmp_path / "dag.json").write_text(json.dumps({**head, "tasks": [task]}))
    for command in (["run"], ["lite", "run"]):
        for option, value in (("--run-id", "latest"), ("--run-id", "a\nb"), ("--run-id", ""), ("--tenant", "a/b")):
            result = cli(*command, str(tmp_path / "dag.json"), option, value)
            assert (result.code, is_one_line(result)) == (2, True), result.err
            assert result.err.startswith(f"leoflow: {option}: "), result.err
