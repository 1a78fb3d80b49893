"""The system image: everything a gateway, worker, beat or Flower needs, for a user that owns nothing but its state."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import docker
import pytest
from docker.errors import ContainerError

from tests.support.images import system_image

SECURED = {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges"], "remove": True}


def run(engine: docker.DockerClient, *command: str, **options) -> str:
    try:
        return engine.containers.run(system_image(), list(command), **{**SECURED, **options}).decode()
    except ContainerError as error:
        raise AssertionError(f"{command}: {error.stderr.decode()}") from error


@pytest.fixture
def volume(engine) -> Iterator[str]:
    """A named volume, as a deployment keeps state in."""
    name = f"leoflow-test-{secrets.token_hex(6)}"
    engine.volumes.create(name)
    yield name
    engine.volumes.get(name).remove(force=True)


def test_it_has_no_entry_point_and_runs_as_a_number(engine):
    config = engine.images.get(system_image()).attrs["Config"]
    assert not config["Entrypoint"]
    assert int(config["User"].partition(":")[0]) > 0


def test_the_migrations_are_inside_and_state_is_kept_in_a_volume(engine, volume):
    """A new volume takes over the owner of the folder it covers."""
    env = {"LEOFLOW_DATABASE_URL": "sqlite:////var/lib/leoflow/leoflow.db"}
    options = {"environment": env, "volumes": {volume: {"bind": "/var/lib/leoflow", "mode": "rw"}}, "read_only": True}
    run(engine, "leoflow", "db", "upgrade", **options)
    query = "select count(*) from task_instance"
    script = f"import sqlite3; print(sqlite3.connect('leoflow.db').execute('{query}').fetchone())"
    assert run(engine, "python", "-c", script, **options) == "(0,)\n"


@pytest.mark.parametrize("app", ["workers.control", "workers.docker", "workers.inline", "workers.k8s", "beat_schedule"])
def test_celery_finds_every_process_of_the_system(engine, app):
    assert "transport:redis" in run(engine, "celery", "-A", app, "report", read_only=True)


def test_the_clients_of_every_back_end_and_flower_are_inside(engine):
    run(engine, "python", "-c", "import docker, kubernetes, psycopg, flower, redis, leoflow_runtime")
    assert "flower" in run(engine, "celery", "--help")


def test_commands_start_from_byte_code_alone(engine):
    output = run(engine, "python", "-I", "-v", "-c", "import leoflow_celery.cli, workers.control", stderr=True)
    assert [line for line in output.splitlines() if "code object from '/" in line and ".pyc" not in line] == []
