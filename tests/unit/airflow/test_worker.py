"""The worker module before any code of Airflow is needed: its input, and an API server that is away."""

from __future__ import annotations

import subprocess
import sys

import pytest

from leoflow_celery.airflow import worker


def test_the_input_is_taken_and_nothing_is_left_of_it() -> None:
    code = (
        "import os, sys; from leoflow_celery.airflow.worker import _take_input; text = _take_input();"
        "sys.stdout.write(f'{len(text)} {os.read(0, 10)} {os.readlink(\"/proc/self/fd/0\")}')"
    )
    ended = subprocess.run([sys.executable, "-c", code], input=b"x" * 100_000, capture_output=True, timeout=60)
    assert ended.stdout.decode() == "100000 b'' /dev/null", ended.stderr


def test_importing_it_costs_neither_airflow_nor_the_client() -> None:
    code = (
        "import sys; import leoflow_celery.airflow.worker;"
        "sys.exit(bool({'airflow', 'celery', 'sqlalchemy', 'pydantic'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_did_not_run_leaves_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    path = tmp_path / "reason"
    monkeypatch.setenv("LEOFLOW_REASON_PATH", str(path))
    monkeypatch.setattr(worker, "_take_input", lambda: b"{}")
    for reason, code in (("launch_failed", 1), ("skipped", 0)):

        def refuse(_: bytes, reason: str = reason) -> int:
            raise worker.NotRun(reason, "the API server did not answer")

        monkeypatch.setattr(worker, "_run", refuse)
        assert worker.main() == code
        assert path.read_text() == f"{reason}\nthe API server did not answer\n"
