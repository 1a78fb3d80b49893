"""An interpreter with the Airflow Task SDK and its operators, as the extra ``authoring`` installs them."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.requirements import require

CACHE = Path(__file__).parents[2] / ".cache"
BUILD_SECONDS = 600
PACKAGES = ("apache-airflow-task-sdk", "apache-airflow-providers-standard", "apache-airflow-providers-http")


@pytest.fixture(scope="session")
def airflow_python() -> Path:
    """An interpreter with the Task SDK, built once and kept in the repository's ignored cache."""
    CACHE.mkdir(exist_ok=True)
    venv = CACHE / "airflow-authoring"
    python = venv / "bin" / "python"
    with (CACHE / "airflow-authoring.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not python.exists() or not _has_sdk(python):
            _build(venv, python)
    return python


def _has_sdk(python: Path) -> bool:
    return (
        subprocess.run(
            [python, "-c", "import airflow.sdk, airflow.providers.http, airflow.providers.standard"],
            capture_output=True,
            check=False,
        ).returncode
        == 0
    )


def _build(venv: Path, python: Path) -> None:
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, capture_output=True)
        pip = [python, "-m", "pip", "install", "-q", *PACKAGES]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        require("airflow", f"pip cannot install {PACKAGES}: {getattr(error, 'stderr', '') or error}")
