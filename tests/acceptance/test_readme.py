"""README.md, "Deployed": what it says to type makes a system that runs; a worker without its package does not start."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.markdown import blocks
from tests.support.ports import free_port
from tests.support.process import ManagedProcess

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_URL = "postgresql+psycopg://leoflow:PASSWORD@127.0.0.1/leoflow"
#: What each process prints when it is there.
READY = {
    "leoflow gateway": "gateway listening on",
    "celery -A leoflow_celery.beat_schedule": "beat: Starting",
    "leoflow flower": "Connected to redis",
    "celery -A leoflow_celery.workers.": r"@\S+ ready\.",
}


def section(title: str) -> list[str]:
    """The texts of the shell blocks below a heading."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index(f"## {title}") + 1
    end = next(
        (number for number, line in enumerate(lines, 1) if number > start and line.startswith("## ")), len(lines)
    )
    return [one.text for one in blocks(ROOT / "README.md") if one.language == "sh" and start < one.line < end]


def prepared(text: str, redis_url: str, database_url: str, kept: Path) -> dict[str, str]:
    """Type the block that prepares, and return what every process then has in its environment."""
    port = free_port()
    setup = text.replace("redis://127.0.0.1:6379/0", redis_url).replace(_URL, database_url)
    assert setup.count(redis_url) == setup.count(database_url) == 1
    typed = [line for line in setup.splitlines() if not line.startswith(("python3 -m venv", ". venv", "pip install"))]
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "LEOFLOW_GATEWAY_LISTEN": f"127.0.0.1:{port}",
        "LEOFLOW_CONTROL_PLANE_ADDR": f"127.0.0.1:{port}",
    }
    shell = ["bash", "-e", "-c", "\n".join([*typed, f"env -0 > {shlex.quote(str(kept))}"])]
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(one.split("=", 1) for one in kept.read_text().split("\0") if one)


def test_what_the_readme_says_to_type_makes_a_system(redis_url: str, database_url: str, tmp_path: Path) -> None:
    setup, processes = section("Deployed")
    environment = prepared(setup, redis_url, database_url, tmp_path / "environment")
    assert environment["LEOFLOW_EXECUTOR_TYPE"] == "docker"
    started: list[ManagedProcess] = []
    try:
        for number, line in enumerate(processes.splitlines()):
            ready = next(text for command, text in READY.items() if line.startswith(command))
            own = f"{line} --port={free_port()}" if "flower" in line else line
            command = ["bash", "-c", f"exec {own}"]
            process = ManagedProcess(command, tmp_path / f"{number}.out", env=environment, cwd=tmp_path, name=line)
            started.append(process)
            process.wait_for_line(ready, 60)
        only = ("keys", "database", "broker", "gateway", "workers")
        options = [option for name in only for option in ("--only", name)]
        doctor = subprocess.run(
            [BIN / "leoflow", "doctor", *options], env=environment, capture_output=True, text=True, check=False
        )
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    finally:
        for process in reversed(started):
            process.stop(20)


@pytest.mark.parametrize(
    ("worker", "package", "extra"), [("docker", "docker", "docker"), ("k8s", "kubernetes", "kubernetes")]
)
def test_a_worker_without_its_package_does_not_start_and_names_the_extra(
    tmp_path: Path, redis_url: str, worker: str, package: str, extra: str
) -> None:
    """As on a machine on which nobody installed it: an importer says so before all others."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n\n\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n\n\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    command = [sys.executable, "-m", "celery", "-A", f"leoflow_celery.workers.{worker}", "worker", "--pool=threads"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LEOFLOW_BROKER_URL": redis_url}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert f"the worker does not start: the {extra} executor needs the package {package!r}" in done.stderr
    assert f"pip install 'leoflow-celery[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
