"""The command line in this process, and a database of its own."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from leoflow_celery.cli import main
from leoflow_celery.security.sealing import fresh_keys
from leoflow_celery.settings import Settings
from tests.support.postgres_databases import migrate

#: Nobody listens on port 1.
DEAD_BROKER = "redis://:s3cret@127.0.0.1:1/0"


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


class Cli(Protocol):
    def __call__(self, *arguments: str) -> Result: ...


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """``cli("status", "x")`` runs the console script's function and gives its exit code and output."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["leoflow", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Result(int(ended.value.code or 0), printed.out, printed.err)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A system of which only the database and the logs exist; the environment names it."""
    for name, value in fresh_keys().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LEOFLOW_BROKER_URL", DEAD_BROKER)
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", f"sqlite:///{tmp_path / 'leoflow.db'}")
    monkeypatch.setenv("LEOFLOW_LOGS_ROOT", str(tmp_path / "logs"))
    monkeypatch.setenv("LEOFLOW_CONTROL_PLANE_ADDR", f"unix:{tmp_path / 'nobody.sock'}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    monkeypatch.setenv("COLUMNS", "200")
    loaded = Settings.load()
    migrate(loaded.database.url.get_secret_value())
    return loaded
