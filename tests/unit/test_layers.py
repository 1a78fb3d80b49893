"""The architecture as failing tests: layers, owners of foreign clients, what a process must not load, file size."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("leoflow_celery", "leoflow_runtime", "workers")

#: The only places that may import each foreign client; a folder stands for everything in it.
OWNERS = {
    "kubernetes": ("leoflow_celery/executors/kubernetes/",),
    "yaml": (
        "leoflow_celery/lite/dag_file.py",
        "leoflow_celery/executors/kubernetes/",
        "leoflow_celery/executors/policy.py",
    ),
    "docker": ("leoflow_celery/executors/docker/engine.py",),
    "requests": ("leoflow_celery/executors/inline_http/", "leoflow_celery/executors/docker/engine.py"),
    "grpc": ("leoflow_celery/gateway/", "leoflow_celery/agent/client.py", "leoflow_celery/cli/doctor.py"),
    "grpc_health": ("leoflow_celery/gateway/", "leoflow_celery/cli/doctor.py"),
    "jwt": ("leoflow_celery/security/tokens.py",),
    "cryptography": ("leoflow_celery/security/", "leoflow_celery/cli/"),
}


def sources(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not path.name.endswith("_pb2.py") and not any(part.startswith(".") for part in path.parts[len(ROOT.parts) :])
    )


def imported_packages(path: Path) -> set[str]:
    """The top-level packages a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def loaded_by(statement: str) -> set[str]:
    """The top-level modules of a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_every_import_contract_of_setup_cfg_holds() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("client", OWNERS)
def test_a_foreign_client_is_imported_only_by_its_owners(client: str) -> None:
    strangers = [
        name
        for path in sources(*PACKAGES)
        if client in imported_packages(path) and not (name := str(path.relative_to(ROOT))).startswith(OWNERS[client])
    ]
    assert strangers == []


def test_the_agent_loads_none_of_the_servers_libraries() -> None:
    """It starts once per task, often in a container: what it imports is latency and memory of every single task."""
    heavy = {"pydantic", "sqlalchemy", "requests", "celery", "kombu", "redis", "jsonschema_rs", "kubernetes", "docker"}
    assert loaded_by("import leoflow_celery.agent.__main__") & heavy == set()


@pytest.mark.parametrize("name", ["k8s", "docker", "subprocess"])
def test_a_launch_worker_does_not_load_sql(name: str) -> None:
    """It has no SQL credentials; that it never imports the client is the proof that it needs none."""
    if not (ROOT / "workers" / f"{name}.py").exists():
        pytest.skip(f"workers.{name} is not there yet")
    steps = "[symbol_by_name(step) for steps in app.steps.values() for step in steps]"
    statement = (
        f"from celery.utils.imports import symbol_by_name; from workers.{name} import app; "
        f"app.loader.import_default_modules(); {steps}"
    )
    assert loaded_by(statement) & {"sqlalchemy", "alembic", "psycopg"} == set()


def test_the_users_side_imports_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | {"leoflow_runtime", "airflow"}
    strangers = {str(path.relative_to(ROOT)): imported_packages(path) - allowed for path in sources("leoflow_runtime")}
    assert {name: packages for name, packages in strangers.items() if packages} == {}
